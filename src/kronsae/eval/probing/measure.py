"""Sparse probing of some SAEs on one text: single latents, pairs, k-sparse probes, recall, targeted perturbation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.core.sae import SAE
from kronsae.eval.absorption.probes import LinearProbe, ProbeTraining, train_probe
from kronsae.eval.absorption.sparse_probes import logistic_regression
from kronsae.eval.example_codes import columns, concatenated, encode_rows, root_mean_square, rows_of, scaled
from kronsae.eval.hooked import Windows
from kronsae.eval.probing.entries import Entries, Thresholds, best_thresholds, mean_difference, scores
from kronsae.eval.probing.pairs import Pair, best_pair, recall_by_size
from kronsae.eval.probing.perturbation import Perturbation, balanced_samples, important_latents, perturbations
from kronsae.eval.probing.pooling import mean_activations, mean_codes
from kronsae.eval.probing.text import ConceptText
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ProbingConfig:
    """Settings of sparse probing.

    Args:
        ks: sizes of the k-sparse probes.
        ablated: numbers of latents of a concept that targeted perturbation ablates.
        bars: F1 thresholds; a concept is recalled if its best latent exceeds the threshold.
        sample: number of training examples with each concept, and of examples without it, for the probes; half as many
            are used for scoring.
        draws: number of random subsets of the dictionary per size.
        probe: training of the probes on activations.
        seed: seed of the samples, subsets and probes.
    """

    ks: tuple[int, ...] = (1, 2, 5)
    ablated: tuple[int, ...] = (2, 10, 50)
    bars: tuple[float, ...] = (0.5, 0.7)
    sample: int = 400
    draws: int = 20
    probe: ProbeTraining = field(default_factory=lambda: ProbeTraining(epochs=30))
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ks", "ablated", "bars"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise UserError(f"{name} must contain at least one number, all above 0; got {getattr(self, name)}.")
        if self.sample < 2 or self.draws < 1:
            raise UserError(f"sample must be at least 2 and draws at least 1; got {self.sample} and {self.draws}.")


@dataclass(frozen=True, kw_only=True)
class ConceptProbing:
    """Results for one concept in one SAE, on the held-out examples: tokens, or texts with their mean activations.

    Args:
        name: name of the concept.
        share: share of the held-out examples that have the concept. (A latent that is always active has F1
            ``2 share / (1 + share)``.)
        latent, threshold: latent and threshold with the best F1 on the training examples; the latent detects the
            concept at activations of at least ``threshold``; None if no latent is active on an example with it.
        f1: F1 of that latent.
        pair: the best AND or OR of two latents.
        accuracy_by_k: accuracy of logistic regressions on the k latents with the largest difference in mean activation,
            on equal numbers of examples with and without the concept: chance is 0.5.
    """

    name: str
    share: float
    latent: int
    threshold: float | None
    f1: float
    pair: Pair | None
    accuracy_by_k: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Probing:
    """Results of sparse probing for one SAE.

    Args:
        mean_f1: F1 of the best latent, mean over concepts.
        mean_pair_f1: F1 of the best pair, mean over concepts.
        mean_accuracy_by_k: accuracy of the k-sparse probes, mean over concepts.
        recall: rows of `recall_by_size`, the whole dictionary first.
        perturbation: targeted perturbation, for each number of ablated latents.
        concepts: results by concept.
    """

    mean_f1: float
    mean_pair_f1: float
    mean_accuracy_by_k: dict[int, float]
    recall: tuple[dict[str, float], ...]
    perturbation: tuple[Perturbation, ...]
    concepts: tuple[ConceptProbing, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; dictionary keys become strings."""
        found = to_dict(self)
        for row, one in zip(found["perturbation"], self.perturbation, strict=True):
            row["score"] = one.score
        for row in (found, *found["concepts"]):
            for key in ("mean_accuracy_by_k", "accuracy_by_k"):
                if key in row:
                    row[key] = {str(k): value for k, value in row[key].items()}
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Baseline:
    """Data shared by all SAEs: the sampled examples, and probes on their activations times ``factor``."""

    train: list[Tensor]
    held_out: list[Tensor]
    factor: float
    probe: LinearProbe
    scored: Tensor
    logits_NL: Tensor
    accuracy: tuple[float, ...]


def probing(
    saes: Mapping[str, SAE],
    text: ConceptText,
    activations: Iterable[tuple[Windows, Float[Tensor, "N D"]]],
    config: ProbingConfig,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Probing], dict[str, float]]:
    """Probe several SAEs on the same tokens, which are read once.

    Per text, activations and codes are replaced by their means over the tokens of each text. Everything else is as for
    tokens; ablated latents too, because the mean of ``x - f_i W_dec_i`` is the mean of x minus that of f_i times
    W_dec_i.

    Memory: the codes of all examples, ``N * K * 12`` bytes per SAE, where K of a text is the number of latents active
    on any of its tokens; the activations of the sampled examples; counts of size latents x concepts.

    Args:
        saes: SAEs by name.
        text: the examples and their concepts.
        activations: activations of the text's windows, in order.
        config: settings.
        say: called with a message when an SAE is done.

    Returns:
        The results by SAE; and by concept, the accuracy of a probe on the activations themselves.
    """
    rng = np.random.default_rng(config.seed)
    held_out_N = text.held_out_N
    samples = balanced_samples(text.labels_NL, ~held_out_N, config.sample, rng)
    scored = balanced_samples(text.labels_NL, held_out_N, max(1, config.sample // 2), rng)
    wanted_N = torch.zeros(len(held_out_N), dtype=torch.bool)
    wanted_N[torch.cat([*samples, *scored])] = True
    parts: dict[str, list[SparseCodes]] = {name: [] for name in saes}
    kept_x, start = [], 0
    for windows, x_TD in activations:
        tokens_S = windows.keep_ST.sum(1).tolist()
        x_ND = x_TD if text.per == "token" else mean_activations(x_TD, tokens_S)
        kept_x.append(x_ND[wanted_N[start : start + len(x_ND)].to(x_ND.device)].cpu())
        start += len(x_ND)
        for name, sae in saes.items():
            codes = encode_rows(sae, x_TD)
            parts[name].append(codes if text.per == "token" else mean_codes(codes, tokens_S))
    baseline = _baseline(text, torch.cat(kept_x), wanted_N, samples, scored, config)
    found = {}
    for name, sae in saes.items():
        found[name] = _probe_sae(sae, concatenated(parts.pop(name), sae.d_sae), text, baseline, config)
        say(f"{name}: mean F1 of the best latent {found[name].mean_f1:.3f}")
    return found, dict(zip(text.concepts, baseline.accuracy, strict=True))


def _baseline(
    text: ConceptText, x: Tensor, wanted_N: Tensor, train: list[Tensor], held_out: list[Tensor], config: ProbingConfig
) -> _Baseline:
    row_of_N = wanted_N.cumsum(0) - 1
    learnt = torch.unique(torch.cat(train))
    factor = 1 / root_mean_square(x[row_of_N[learnt]])  # held-out examples must not influence training
    x = x * factor
    scored = torch.unique(torch.cat(held_out))
    probe = train_probe(x[row_of_N[learnt]], text.labels_NL[learnt], config.probe, config.seed)
    logits_NL = probe.scores(x[row_of_N[scored]])
    place_of_N = torch.full((len(wanted_N),), -1)
    place_of_N[scored] = torch.arange(len(scored))
    right_NL = (logits_NL > 0) == text.labels_NL[scored]
    accuracy = tuple(float(right_NL[place_of_N[rows], c].double().mean()) for c, rows in enumerate(held_out))
    return _Baseline(
        train=train,
        held_out=held_out,
        factor=factor,
        probe=probe,
        scored=scored,
        logits_NL=logits_NL,
        accuracy=accuracy,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Detectors:
    """One SAE's latents as detectors of the concepts, fitted on the training examples and scored on the held-out ones.

    Args:
        codes: codes of all examples, in the probes' units.
        entries, labels: activations and concepts by split (key: held out or not).
        best: best threshold of each latent for each concept, and its F1, on the training examples.
        held_out_f1_FL: F1 at these thresholds on the held-out examples.
        difference_FL: mean activation with the concept minus that without, on the training examples.
    """

    codes: SparseCodes
    entries: dict[bool, Entries]
    labels: dict[bool, np.ndarray]
    best: Thresholds
    held_out_f1_FL: np.ndarray
    difference_FL: np.ndarray

    @staticmethod
    def of(codes: SparseCodes, text: ConceptText) -> _Detectors:
        labels = {side: text.labels_NL[text.held_out_N == side].numpy() for side in (False, True)}
        entries = {side: Entries.of(rows_of(codes, text.held_out_N == side)) for side in (False, True)}
        best = best_thresholds(entries[False], labels[False])
        return _Detectors(
            codes=codes,
            entries=entries,
            labels=labels,
            best=best,
            held_out_f1_FL=scores(entries[True], labels[True], best.threshold_FL),
            difference_FL=mean_difference(entries[False], labels[False]),
        )

    def pair(self, c: int) -> Pair | None:
        """Return the best AND or OR of two latents for one concept."""
        return best_pair(
            self.entries[False],
            self.labels[False][:, c],
            self.entries[True],
            self.labels[True][:, c],
            self.best.f1_FL[:, c],
            self.best.threshold_FL[:, c],
        )


def _probe_sae(sae: SAE, codes: SparseCodes, text: ConceptText, baseline: _Baseline, config: ProbingConfig) -> Probing:
    detectors = _Detectors.of(scaled(codes, baseline.factor), text)
    concepts = tuple(_concept(c, detectors, text, baseline, config) for c in range(len(text.concepts)))
    recall = recall_by_size(
        detectors.best.f1_FL, detectors.held_out_f1_FL, bars=config.bars, draws=config.draws, seed=config.seed
    )
    return Probing(
        mean_f1=float(np.mean([one.f1 for one in concepts])),
        mean_pair_f1=float(np.mean([one.f1 if one.pair is None else one.pair.f1 for one in concepts])),
        mean_accuracy_by_k={k: float(np.mean([one.accuracy_by_k[k] for one in concepts])) for k in config.ks},
        recall=tuple(recall),
        perturbation=_perturbation(sae, detectors, text, baseline, config),
        concepts=concepts,
    )


def _perturbation(
    sae: SAE, detectors: _Detectors, text: ConceptText, baseline: _Baseline, config: ProbingConfig
) -> tuple[Perturbation, ...]:
    W_dec_FD = sae.W_dec.detach().cpu().float()
    place_of_N = torch.full((len(text.held_out_N),), -1)
    place_of_N[baseline.scored] = torch.arange(len(baseline.scored))
    return perturbations(
        rows_of(detectors.codes, baseline.scored),
        baseline.logits_NL,
        text.labels_NL[baseline.scored],
        [place_of_N[rows] for rows in baseline.held_out],
        important_latents(detectors.difference_FL, W_dec_FD, baseline.probe),
        W_dec_FD @ baseline.probe.weight_CI.T,
        config.ablated,
    )


def _concept(
    c: int, detectors: _Detectors, text: ConceptText, baseline: _Baseline, config: ProbingConfig
) -> ConceptProbing:
    latent = int(detectors.best.f1_FL[:, c].argmax())
    threshold = float(detectors.best.threshold_FL[latent, c])
    pair = detectors.pair(c)
    return ConceptProbing(
        name=text.concepts[c],
        share=float(detectors.labels[True][:, c].mean()),
        latent=latent,
        threshold=threshold / baseline.factor if math.isfinite(threshold) else None,
        f1=float(detectors.held_out_f1_FL[latent, c]),
        pair=None if pair is None else pair.in_units(1 / baseline.factor),
        accuracy_by_k=_k_sparse(c, detectors, text, baseline, config.ks),
    )


def _k_sparse(
    c: int, detectors: _Detectors, text: ConceptText, baseline: _Baseline, ks: Sequence[int]
) -> dict[int, float]:
    true_N = text.labels_NL[:, c]
    order = np.argsort(-np.abs(detectors.difference_FL[:, c]), kind="stable")[: max(ks)].tolist()
    train, held_out = baseline.train[c], baseline.held_out[c]
    train_EK = columns(rows_of(detectors.codes, train), order)
    held_out_EK = columns(rows_of(detectors.codes, held_out), order)
    found = {}
    for k in ks:
        weight_K, bias = logistic_regression(train_EK[:, :k], true_N[train])
        right_E = (held_out_EK[:, :k] @ weight_K + bias > 0) == true_N[held_out]
        found[k] = float(right_E.double().mean())
    return found
