"""Absorption of one SAE: SAEBench's three metrics from the activations of labelled words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kronsae.core.sae import SAE
from kronsae.eval.absorption.probes import ON_LATENTS, LinearProbe, ProbeTraining, f1, train_latent_probe, train_probe
from kronsae.eval.absorption.sparse_probes import sparse_probes
from kronsae.eval.absorption.words import AbsorptionRule, probe_cosines, word_absorption
from kronsae.eval.display import visible
from kronsae.eval.example_codes import encode_rows, root_mean_square, rows_of, scaled
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError

CLASSES_TO_PASS, CLASSES_OF = 20, 26
"""SAEBench's requirement: the probes of at least 20 of the 26 letters must be accurate. With another number of classes,
the same share of them is required."""


@dataclass(frozen=True, kw_only=True)
class AbsorptionConfig:
    """Settings of the absorption measurement; the defaults are SAEBench's.

    Args:
        probe: training of the probes on activations.
        latent_probe: training of the L1 probe on latents.
        max_k: maximum number of latents that represent a class.
        jump: increase in F1 required for one more latent to count.
        min_f1: a class counts if the F1 of its probe is above this value.
        min_classes: number of classes that must count; None requires 20/26 of all classes, rounded up.
        rule: when a latent counts as absorbing.
        scaled: divide activations and codes by the root mean square of the training activations, so that the probes
            can be trained on activations of any scale. SAEBench does not do this. Absorption itself is a ratio.
        seed: seed of the probes.
    """

    probe: ProbeTraining = field(default_factory=ProbeTraining)
    latent_probe: ProbeTraining = ON_LATENTS
    max_k: int = 10
    jump: float = 0.03
    min_f1: float = 0.6
    min_classes: int | None = None
    rule: AbsorptionRule = field(default_factory=AbsorptionRule)
    scaled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_k < 1:
            raise UserError(f"max_k must be at least 1; got {self.max_k}.")
        if self.min_classes is not None and self.min_classes < 1:
            raise UserError(f"min_classes must be at least 1; got {self.min_classes}.")

    def needed(self, classes: int) -> int:
        """Return how many of ``classes`` classes must have an accurate probe.

        Raises:
            UserError: ``min_classes`` is larger than ``classes``.
        """
        if self.min_classes is None:
            return math.ceil(classes * CLASSES_TO_PASS / CLASSES_OF)
        if self.min_classes > classes:
            raise UserError(
                f"min_classes must be at most the number of classes; got {self.min_classes} with {classes}."
            )
        return self.min_classes


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Activations of labelled words, split into training and held-out examples."""

    x_ED: Float[Tensor, "E D"]
    labels_E: Int[Tensor, " E"]
    held_out_E: Bool[Tensor, " E"]
    classes: tuple[str, ...]

    def has_EC(self) -> Bool[Tensor, "E C"]:
        """Return the class of each example, one-hot."""
        return self.labels_E.unsqueeze(1) == torch.arange(len(self.classes))


@dataclass(frozen=True, kw_only=True)
class ProbedClasses:
    """The probes of all classes, which read activations times ``factor``, and their F1 on the held-out examples."""

    probe: LinearProbe
    factor: float
    f1: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ClassAbsorption:
    """Absorption in one class.

    Args:
        name: name of the class.
        probe_f1: F1 of the probe on activations, on the held-out examples.
        words: number of held-out examples of the class that its probe classifies correctly; the means are over these.
        latents: the latents that represent the class.
        f1_by_k: F1 of the k-sparse probes, k = 1, 2, ...
        fraction: mean absorption fraction.
        full: share of the words that are fully absorbed.
    """

    name: str
    probe_f1: float
    words: int
    latents: tuple[int, ...]
    f1_by_k: tuple[float, ...]
    fraction: float
    full: float


@dataclass(frozen=True, kw_only=True)
class Absorption:
    """Absorption of one SAE, mean over the classes whose probe is accurate.

    Args:
        mean_absorption_fraction: SAEBench's ``mean_absorption_fraction_score``, from 0 to 1.
        mean_full_absorption: SAEBench's ``mean_full_absorption_score``, share of the words.
        mean_num_split_latents: SAEBench's ``mean_num_split_features``; 1 is no splitting.
        spread_of_fraction: standard deviation of the fraction over classes; None for a single class.
        mean_f1: F1 of the best single latent, mean over classes; absorption lowers it.
        classes: results by class.
    """

    mean_absorption_fraction: float
    mean_full_absorption: float
    mean_num_split_latents: float
    spread_of_fraction: float | None
    mean_f1: float
    classes: tuple[ClassAbsorption, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return to_dict(self)


def probe_classes(
    examples: Examples, config: AbsorptionConfig, progress: Callable[[int, int], None] | None = None
) -> ProbedClasses:
    """Train the probes on activations and check that enough of them are accurate.

    ``progress`` is called with (epochs done, total epochs).

    Raises:
        UserError: fewer classes than `AbsorptionConfig.needed` have an F1 above ``min_f1``, or there are fewer classes.
            The message lists the F1 of each class.
    """
    needed = config.needed(len(examples.classes))
    train_E, held_out_E = ~examples.held_out_E, examples.held_out_E
    has_EC = examples.has_EC()
    factor = 1 / root_mean_square(examples.x_ED[train_E]) if config.scaled else 1.0
    probe = train_probe(examples.x_ED[train_E] * factor, has_EC[train_E], config.probe, config.seed, progress)
    predicted_EC = probe.scores(examples.x_ED[held_out_E] * factor) > 0
    scores = tuple(f1(predicted_EC[:, c], has_EC[held_out_E][:, c]) for c in range(len(examples.classes)))
    accurate = sum(score > config.min_f1 for score in scores)
    if accurate < needed:
        listed = [f"{visible(name)} {score:.2f}" for name, score in zip(examples.classes, scores, strict=True)]
        raise UserError(
            f"absorption needs probes with F1 > {config.min_f1} for at least {needed} of the {len(scores)} classes; "
            f"got {accurate} ({', '.join(listed)}). Choose a task that this model represents at this hook, give more "
            "examples, or lower the required number of classes (min_classes)."
        )
    return ProbedClasses(probe=probe, factor=factor, f1=scores)


def absorption(
    sae: SAE,
    examples: Examples,
    probed: ProbedClasses,
    config: AbsorptionConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Absorption:
    """Measure one SAE: split latents by k-sparse probes, then `word_absorption` on correctly classified words.

    For the last step SAEBench draws new prompts; here the held-out examples are used, so that the result depends on the
    inputs only. Memory: the codes of the examples, ``E * K * 12`` bytes. ``progress`` is called with (steps done, total
    steps); each epoch of the probe on latents and each counted class is a step.
    """
    held_out_E = examples.held_out_E
    codes = scaled(encode_rows(sae, examples.x_ED), probed.factor)
    train, scored = rows_of(codes, ~held_out_E), rows_of(codes, held_out_E)
    has_EC = examples.has_EC()
    counted = [c for c, score in enumerate(probed.f1) if score > config.min_f1]
    epochs = config.latent_probe.epochs
    report = progress or (lambda done, total: None)
    weight_CF = train_latent_probe(
        train,
        has_EC[~held_out_E],
        config.latent_probe,
        config.seed,
        lambda done, _: report(done, epochs + len(counted)),
    ).weight_CI
    x_ED = examples.x_ED[held_out_E] * probed.factor
    scores_EC = probed.probe.scores(x_ED)
    W_dec_FD = sae.W_dec.detach().cpu().float()
    found = []
    for number, c in enumerate(counted, 1):
        train_true_E, true_E = has_EC[~held_out_E, c], has_EC[held_out_E, c]
        chosen = sparse_probes(weight_CF[c], train, train_true_E, scored, true_E, max_k=config.max_k, jump=config.jump)
        direction_D = probed.probe.weight_CI[c].double()
        right_E = true_E & (scores_EC[:, c] > 0)
        of_words = word_absorption(
            rows_of(scored, right_E),
            x_ED[right_E].double() @ (direction_D / direction_D.norm()),
            probe_cosines(direction_D, W_dec_FD),
            chosen.main,
            config.rule,
        )
        found.append(
            ClassAbsorption(
                name=examples.classes[c],
                probe_f1=probed.f1[c],
                words=int(right_E.sum()),
                latents=chosen.main,
                f1_by_k=chosen.f1_by_k,
                fraction=float(of_words.fraction_E.mean()),
                full=float(of_words.full_E.double().mean()),
            )
        )
        report(epochs + number, epochs + len(counted))
    return summary(found)


def summary(classes: list[ClassAbsorption]) -> Absorption:
    """Return the means over classes."""
    fractions = [one.fraction for one in classes]
    return Absorption(
        mean_absorption_fraction=mean(fractions),
        mean_full_absorption=mean(one.full for one in classes),
        mean_num_split_latents=float(mean(len(one.latents) for one in classes)),
        spread_of_fraction=stdev(fractions) if len(fractions) > 1 else None,
        mean_f1=mean(one.f1_by_k[0] for one in classes),
        classes=tuple(classes),
    )
