"""Compare kronsae's absorption with SAEBench's functions on equal inputs; write docs/results/absorption_parity.json.

SAEBench (sae-bench 0.6.0) pins numpy<2 and datasets<4, so it needs a separate environment:

    python -m venv /tmp/saebench && /tmp/saebench/bin/pip install torch==2.13.0 sae-bench==0.6.0
    .venv/bin/python scripts/absorption_parity.py --peer /tmp/saebench/bin/python

This script writes the inputs, runs itself in that environment (``--as-peer FOLDER``, without kronsae) and compares
both results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

RESULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "absorption_parity.json"
TOLERANCE = 1e-6
LETTERS = 26
MAX_K = 5
EPOCHS = 500  # of one step each
SEED = 3
PIPELINES = (1, 2)  # k of the SAE
WORD_CASES = 300
WORDS = 8  # in a case
PACKAGES = ("torch", "numpy", "scikit-learn")


def word_cases() -> dict[str, np.ndarray]:
    """Return codes, activations, probes and dictionaries of many random cases, some of them at boundaries."""
    rng = np.random.default_rng(0)
    d, f = 12, 30
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("W_dec", "codes", "x", "direction", "main")}
    for case in range(WORD_CASES):
        direction = rng.standard_normal(d)
        W_dec = rng.standard_normal((f, d)) + rng.choice([0.0, 0.5, 1.0]) * direction
        W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
        codes = rng.exponential(2.0, (WORDS, f)) * (rng.random((WORDS, f)) < rng.choice([0.1, 0.3]))
        x = codes @ W_dec * rng.choice([0.5, 1.0, 1.5]) + 0.3 * rng.standard_normal((WORDS, d))
        if case % 10 == 0:  # exact in binary, with axes as rows, so that ties and p = main occur
            direction = np.eye(d)[0] * 2.0
            W_dec = np.eye(d)[rng.integers(0, 3, f)] * rng.choice([1.0, -1.0], (f, 1))
            codes = rng.integers(0, 3, (WORDS, f)) * (rng.random((WORDS, f)) < 0.15) * 0.5
            x = np.zeros((WORDS, d))
            x[:, 0] = rng.choice([-1.0, 0.5, 1.0, 1.25, 2.5], WORDS)  # without 0, because SAEBench divides by it
        main = np.zeros(f, dtype=bool)
        main[rng.choice(f, rng.integers(1, 4), replace=False)] = True
        if case % 4 == 1:
            codes[:, main] = 0.0  # required for full absorption
        for name, value in (("W_dec", W_dec), ("codes", codes), ("x", x), ("direction", direction), ("main", main)):
            found[name].append(value)
    return {name: np.stack(values) for name, values in found.items()}


def pipeline_case(k: int) -> dict[str, np.ndarray]:
    """Return 26 linearly separable classes and an SAE that keeps the k largest of relu(x W_enc + b_enc)."""
    rng = np.random.default_rng(1)
    d, f, train, held_out = 64, 60, 1400, 700
    means = 2 * rng.standard_normal((LETTERS, d))
    kinds = means[:, None] + 1.2 * rng.standard_normal((LETTERS, 3, d))  # directions of specialised latents
    labels = np.concatenate([np.arange(train) % LETTERS, np.arange(held_out) % LETTERS])
    x = kinds[labels, rng.choice(3, len(labels), p=(0.7, 0.26, 0.04))] + 0.8 * rng.standard_normal((len(labels), d))
    rows = np.concatenate([means, kinds.reshape(-1, d)])[rng.permutation(4 * LETTERS)[:f]]
    W_dec = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return {
        "x": x,
        "labels": labels,
        "train": np.array(train),
        "W_dec": W_dec,
        "b_enc": np.full(f, -2.0),
        "k": np.array(k),
    }


def ours(words: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Return the absorption of each word and the number of words in each branch of the definition."""
    from kronsae.core.codes import SparseCodes
    from kronsae.eval.absorption.words import probe_cosines, word_absorption

    found: dict[str, list[Any]] = {"fraction": [], "full": []}
    branches = dict.fromkeys(("none", "partial", "whole", "full", "p < 0"), 0)
    for W_dec, codes, x, direction, main in zip(*(words[name] for name in words), strict=True):
        d = torch.tensor(direction)
        dense = torch.tensor(codes)
        sparse = SparseCodes(*dense.sort(dim=-1, descending=True), d_sae=dense.shape[1])  # different order, same codes
        p = torch.tensor(x) @ (d / d.norm())
        result = word_absorption(sparse, p, probe_cosines(d, torch.tensor(W_dec)), np.flatnonzero(main).tolist())
        found["fraction"].append(result.fraction_E.numpy())
        found["full"].append(result.full_E.numpy())
        branches["p < 0"] += int((p < 0).sum())
        branches["none"] += int((result.fraction_E == 0).sum())
        branches["whole"] += int((result.fraction_E == 1).sum())
        branches["partial"] += int(((result.fraction_E > 0) & (result.fraction_E < 1)).sum())
        branches["full"] += int(result.full_E.sum())
    return {name: np.stack(values) for name, values in found.items()}, branches


def our_pipeline(pipeline: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return kronsae's results, from activations and labels to the means."""
    from kronsae.eval.absorption import AbsorptionConfig, Examples, ProbeTraining, absorption, probe_classes

    case = {name: torch.tensor(value) for name, value in pipeline.items()}
    held_out = torch.arange(len(case["x"])) >= case["train"]
    names = tuple(chr(97 + c) for c in range(LETTERS))
    examples = Examples(x_ED=case["x"], labels_E=case["labels"], held_out_E=held_out, classes=names)
    training = ProbeTraining(
        batch=len(held_out), epochs=EPOCHS, weight_decay=1e-4
    )  # one batch, so that the results do not depend on its order
    latents = ProbeTraining(batch=len(held_out), epochs=EPOCHS, weight_decay=1e-6, l1=0.01)
    config = AbsorptionConfig(probe=training, latent_probe=latents, max_k=MAX_K, seed=SEED)
    probed = probe_classes(examples, config)
    result = absorption(_sae(pipeline), examples, probed, config)
    return {
        "probe_weight": probed.probe.weight_CI.numpy(),
        "probe_f1": np.array(probed.f1),
        "classes": np.array([names.index(one.name) for one in result.classes]),
        "f1_by_k": np.array([one.f1_by_k for one in result.classes]),
        "split": np.array([len(one.latents) for one in result.classes]),
        "main": np.array([[*one.latents, *[-1] * (MAX_K - len(one.latents))] for one in result.classes]),
        "words": np.array([one.words for one in result.classes]),
        "class_fraction": np.array([one.fraction for one in result.classes]),
        "class_full": np.array([one.full for one in result.classes]),
        "means": np.array(
            [result.mean_absorption_fraction, result.mean_full_absorption, result.mean_num_split_latents]
        ),
    }


def _sae(case: dict[str, np.ndarray]) -> Any:
    """Return the SAE of `pipeline_case` as a kronsae SAE in float64."""
    from kronsae.core.encoders import DenseEncoderConfig
    from kronsae.core.sae import SAEConfig
    from kronsae.core.sparsifiers import TopKConfig

    f, d = case["W_dec"].shape
    shape = SAEConfig(d_in=d, encoder=DenseEncoderConfig(d_sae=f), sparsifier=TopKConfig(k=int(case["k"])))
    sae = shape.build().double()
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.tensor(case["W_dec"]))
        sae.encoder.bias.copy_(torch.tensor(case["b_enc"]))
        sae.W_dec.copy_(torch.tensor(case["W_dec"]))
    return sae


class PeerSAE:
    """An SAE with the interface that SAEBench's functions need; codes are looked up in ``rows`` or computed."""

    def __init__(self, W_dec: np.ndarray, b_enc: np.ndarray | None = None, k: int = 0) -> None:
        self.W_dec, self.k = torch.tensor(W_dec), k
        self.W_enc = self.W_dec.T
        self.b_enc = None if b_enc is None else torch.tensor(b_enc)
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.cfg = SimpleNamespace(d_sae=len(W_dec))
        self.rows: dict[bytes, torch.Tensor] = {}

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        if self.b_enc is None:
            return torch.stack([self.rows[row.numpy().tobytes()] for row in x])
        dense = torch.relu(x @ self.W_enc + self.b_enc)
        top = dense.topk(self.k, dim=-1)
        return torch.zeros_like(dense).scatter(-1, top.indices, top.values)


class PeerModel:
    """A language model whose activation for a prompt is looked up by the prompt's last word."""

    tokenizer = SimpleNamespace()
    positions = 6

    def __init__(self, x_of: dict[str, torch.Tensor]) -> None:
        self.x_of = x_of

    def to_tokens(self, prompt: str) -> torch.Tensor:
        return torch.zeros(1, self.positions)

    def run_with_cache(self, prompts: list[str], names_filter: list[str]) -> tuple[None, dict[str, torch.Tensor]]:
        words = [re.search(r"(\w+) has the first letter:$", prompt).group(1) for prompt in prompts]
        x = torch.stack([self.x_of[word] for word in words])
        return None, {names_filter[0]: x.unsqueeze(1).expand(-1, self.positions, -1)}


def _word(letter: int, number: int) -> str:
    """Return a distinct word of letters for each number, with the given first letter."""
    digits = np.base_repr(number, 26).rjust(5, "0").lower()
    return chr(97 + letter) + "".join(chr(97 + int(digit, 26)) for digit in digits)


def _calculator(x_of: dict[str, torch.Tensor]) -> Any:
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator

    examples = [_word(0, 10**6 + i) for i in range(4)]
    return FeatureAbsorptionCalculator(
        model=PeerModel(x_of),
        icl_word_list=examples,
        max_icl_examples=2,
        base_template="{word} has the first letter:",
        word_token_pos=-6,
    )


def theirs(words: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return SAEBench's absorption of each word."""
    found: dict[str, list[Any]] = {"fraction": [], "full": []}
    for W_dec, codes, x, direction, main in zip(*(words[name] for name in words), strict=True):
        sae = PeerSAE(W_dec)
        x = x + np.arange(WORDS)[:, None] * 1e-13 * (
            np.arange(x.shape[1]) == x.shape[1] - 1
        )  # makes the lookup key of every row unique
        sae.rows = {row.tobytes(): torch.tensor(f) for row, f in zip(x, codes, strict=True)}
        names = [_word(i, i) for i in range(WORDS)]
        calculator = _calculator({name: torch.tensor(row) for name, row in zip(names, x, strict=True)})
        result = calculator.calculate_absorption(
            sae, names, torch.tensor(direction), np.flatnonzero(main).tolist(), layer=0, show_progress=False
        ).word_results
        found["fraction"].append([one.absorption_fraction for one in result])
        found["full"].append([one.is_full_absorption for one in result])
    return {name: np.array(values) for name, values in found.items()}


def their_pipeline(case: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """Return SAEBench's results, from activations and labels to the means."""
    from sae_bench.evals.absorption import feature_absorption as absorbing
    from sae_bench.evals.absorption import k_sparse_probing as sparse
    from sae_bench.evals.absorption.main import _aggregate_results_df
    from sae_bench.evals.absorption.probing import train_multi_probe

    train, x = int(case["train"]), torch.tensor(case["x"])
    labels = [(_word(int(label), number), int(label)) for number, label in enumerate(case["labels"])]
    y = torch.nn.functional.one_hot(torch.tensor(case["labels"]))
    sae = PeerSAE(case["W_dec"], case["b_enc"], int(case["k"]))
    torch.manual_seed(SEED)
    probe = train_multi_probe(
        x[:train], y[:train], batch_size=len(x), num_epochs=EPOCHS, lr=1e-2, weight_decay=1e-4,
        show_progress=False, device=torch.device("cpu"),
    )  # fmt: skip
    torch.manual_seed(SEED)
    probes = sparse.train_k_sparse_probes(
        sae, labels[:train], x[:train], ks=list(range(1, MAX_K + 1)),
        batch_size=len(x), num_epochs=EPOCHS, precalc_sae_acts=True,
    )  # fmt: skip
    raw = sparse.eval_probe_and_sae_k_sparse_raw_scores(sae, probe, probes, labels[train:], x[train:])
    about = sparse.sae_k_sparse_metadata(sae, probe, probes, "case", 0)
    metrics = sparse.build_metrics_df(raw, about, MAX_K)
    sparse.add_feature_splits_to_metrics_df(metrics, MAX_K)
    raw.to_parquet(folder / sparse.get_sparse_probing_raw_results_filename("case", 0))
    wanted = absorbing.get_stats_and_likely_false_negative_tokens(metrics, "case", 0, folder)
    calculator = _calculator({word: row for (word, _), row in zip(labels, x, strict=True)})
    words = absorbing.calculate_projection_and_cos_sims(calculator, sae, probe, 0, wanted)
    rows = _aggregate_results_df(words).sort_values("letter")
    believed = metrics.set_index("letter")["f1_probe"] > 0.6
    rows = rows[[bool(believed[letter]) for letter in rows["letter"]]]
    of_letter = metrics.set_index("letter").loc[rows["letter"]]
    padded = [[*latents, *[-1] * (MAX_K - len(latents))] for latents in of_letter["split_feats"]]
    columns = ("mean_absorption_fraction", "full_absorption_rate", "num_split_feats")
    return {
        "probe_weight": probe.weights.detach().numpy(),
        "probe_f1": metrics["f1_probe"].to_numpy(),
        "classes": np.array([ord(letter) - 97 for letter in rows["letter"]]),
        "f1_by_k": of_letter[[f"f1_sparse_sae_{k}" for k in range(1, MAX_K + 1)]].to_numpy(),
        "split": rows["num_split_feats"].to_numpy(),
        "main": np.array(padded),
        "words": rows["num_probe_true_positives"].to_numpy(),
        "class_fraction": rows["mean_absorption_fraction"].to_numpy(),
        "class_full": rows["full_absorption_rate"].to_numpy(),
        "means": np.array([rows[column].mean() for column in columns]),
    }


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {package: version(package) for package in packages}


def as_peer(folder: Path) -> None:
    """Compute SAEBench's results, in its environment."""
    torch.set_num_threads(1)
    np.savez(folder / "found_words.npz", **theirs(dict(np.load(folder / "words.npz"))))
    for k in PIPELINES:
        found = their_pipeline(dict(np.load(folder / f"pipeline_{k}.npz")), folder)
        np.savez(folder / f"found_pipeline_{k}.npz", **found)
    (folder / "versions.json").write_text(json.dumps(_versions((*PACKAGES, "sae-bench"))), encoding="utf-8")


def compare(peer: str) -> dict[str, Any]:
    """Return the largest difference of every quantity between both implementations on equal inputs."""
    torch.set_num_threads(1)
    words, pipelines = word_cases(), {k: pipeline_case(k) for k in PIPELINES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "words.npz", **words)
        for k, case in pipelines.items():
            np.savez(folder / f"pipeline_{k}.npz", **case)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [peer, str(Path(__file__).resolve()), "--as-peer", str(folder)]
        subprocess.run(command, check=True, env=clean, stderr=subprocess.DEVNULL)
        expected_words = dict(np.load(folder / "found_words.npz"))
        expected = {k: dict(np.load(folder / f"found_pipeline_{k}.npz")) for k in PIPELINES}
        versions = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    found_words, branches = ours(words)
    gaps = {"words": _gaps(found_words, expected_words)}
    about = {}
    for k, case in pipelines.items():
        found = our_pipeline(case)
        gaps[f"pipeline, k = {k}"] = _gaps(found, expected[k])
        about[f"pipeline, k = {k}"] = {
            "examples": len(case["x"]),
            "d_sae": len(case["W_dec"]),
            "classes_believed": len(found["classes"]),
            "split_latents": found["split"].tolist(),
            **dict(
                zip(("mean_absorption_fraction", "mean_full_absorption", "mean_num_split"), found["means"], strict=True)
            ),
        }
    return {
        "tolerance": TOLERANCE,
        "agrees": all(gap <= TOLERANCE for of_case in gaps.values() for gap in of_case.values()),
        "largest_difference": gaps,
        "words": {"cases": WORD_CASES, "words": WORD_CASES * WORDS, "by_branch": branches},
        "pipelines": about,
        "note": "float64; one batch per epoch in training, so that there is no order of drawing to agree on",
        "versions": {"sae-bench's environment": versions, "kronsae's environment": _versions(PACKAGES)},
    }


def _gaps(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the largest absolute difference of each quantity, or infinity if the shapes differ."""
    gaps = {}
    for name, value in found.items():
        same = value.shape == expected[name].shape
        gaps[name] = float(np.abs(value.astype(float) - expected[name].astype(float)).max()) if same else float("inf")
    return gaps


def main() -> None:
    """Compare, write the result, and fail if a difference exceeds the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of the environment with sae-bench 0.6.0")
    parser.add_argument("--as-peer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.as_peer is not None:
        as_peer(arguments.as_peer)
        return
    if arguments.peer is None:
        parser.error("give --peer, the python of an environment with sae-bench")
    from kronsae.support.files import write_json
    from kronsae.support.provenance import provenance

    result = compare(arguments.peer)
    write_json(arguments.out, {"provenance": provenance(), "result": result})
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if not result["agrees"]:
        raise SystemExit("kronsae and SAEBench differ by more than the tolerance")


if __name__ == "__main__":
    main()
