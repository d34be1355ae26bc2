"""Compare training steps and encoding with and without pursuit, or with and without null symbols.

Each round takes one step of TopK, KronSAE and its variants, and encodes the same tokens with them. Ratios are computed
per round, so that drift of the machine's speed cancels.

    python benchmarks/pursuit_step.py [--rounds 15] [--out benchmarks/results/pursuit_step.csv]
    python benchmarks/pursuit_step.py --null-symbols [--rounds 15] [--out benchmarks/results/null_symbols.csv]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kronsae.bench.measure import Timing, interleaved_times
from kronsae.bench.subjects import Subject
from kronsae.core.pursuit import Pursuit
from kronsae.core.sae import SAE
from kronsae.runs.parsing import parse_sae
from kronsae.support.files import write_csv
from kronsae.support.provenance import provenance_columns
from kronsae.training.member import Member

SIZES = ("256:4096", "768:16384")
STEPS = {
    "TopK step": "topk d_sae={d_sae} k={k}",
    "KronSAE step": "kron d_sae={d_sae} d_base=2 d_extension=4 k={k}",
    "KronSAE step, pursuit": "kron d_sae={d_sae} d_base=2 d_extension=4 k={k} pursuit_rounds=2",
    "KronSAE step, pursuit, refit=1": "kron d_sae={d_sae} d_base=2 d_extension=4 k={k} pursuit_rounds=2 "
    "pursuit_refit=1",
}
NULL_STEPS = {
    "TopK step": "topk d_sae={d_sae} k={k}",
    "KronSAE step": "kron d_sae={d_sae} d_base=2 d_extension=4 k={k}",
    "KronSAE (4, 4) step": "kron d_sae={d_sae} d_base=4 d_extension=4 k={k}",
    "KronSAE (2, 2) step, null symbols": "kron d_sae={d_sae} d_base=2 d_extension=2 null_symbols=true k={k}",
}
ENCODINGS = {"": None, ", pursuit": Pursuit(), ", pursuit, refit=1": Pursuit(refit=1)}
BASE_OF = {" step": "KronSAE step", "TopK encode": "TopK encode", " encode": "KronSAE encode"}


@dataclass(frozen=True)
class TrainingStep:
    """A step of `kronsae train`: normalisation, forward, backward, AdamW, decoder rows to unit norm."""

    member: Member

    def step(self, x_BD: Tensor) -> None:
        self.member.step(x_BD, 0, want_metrics=False)


@dataclass(frozen=True)
class Encoding:
    """Encoding without gradient."""

    sae: SAE
    pursuit: Pursuit | None

    @torch.no_grad()
    def step(self, x_BD: Tensor) -> None:
        self.sae.encode(x_BD, self.pursuit)


def subjects(d_in: int, d_sae: int, k: int, null_symbols: bool) -> dict[str, Subject]:
    """Return what is timed, by name; encodings use the SAEs in training, so that their weights are realistic."""
    members = {
        name: Member(parse_sae(words.format(d_sae=d_sae, k=k)), d_in, "bench", steps=10_000)
        for name, words in (NULL_STEPS if null_symbols else STEPS).items()
    }
    found: dict[str, Subject] = {name: TrainingStep(member) for name, member in members.items()}
    for name in members if null_symbols else ("TopK step", "KronSAE step"):
        for words, pursuit in ({"": None} if null_symbols else ENCODINGS).items():
            found[name.replace(" step", " encode") + words] = Encoding(members[name].sae, pursuit)
    return found


def base_of(name: str) -> str:
    """Return the subject whose time is the unit of the ratio."""
    return next(base for part, base in BASE_OF.items() if part in name)


def measure(d_in: int, d_sae: int, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Return a row for every subject of one size."""
    compared = subjects(d_in, d_sae, arguments.k, arguments.null_symbols)
    timed = interleaved_times(compared, arguments.batch, d_in, arguments.rounds, seed=0)
    rows: list[dict[str, object]] = []
    for name, values in timed.items():
        timing = Timing.of(values)
        ratio = Timing.of([own / base for own, base in zip(values, timed[base_of(name)], strict=True)])
        row: dict[str, object] = {"subject": name, "d_in": d_in, "d_sae": d_sae, "k": arguments.k}
        row |= {"batch": arguments.batch, "rounds": timing.rounds, "relative_to": base_of(name)}
        row |= {"median_ms": round(timing.median_ms, 2), "low_quartile_ms": round(timing.low_ms, 2)}
        row |= {"high_quartile_ms": round(timing.high_ms, 2), "ratio": round(ratio.median_ms, 3)}
        row |= {"low_quartile_ratio": round(ratio.low_ms, 3), "high_quartile_ratio": round(ratio.high_ms, 3)}
        rows.append(row | provenance_columns(0))
        print(
            f"{d_sae:6d} {name:40s} {timing.median_ms:8.1f} ms   {ratio.median_ms:.2f} of {base_of(name)}", flush=True
        )
    return rows


def main() -> None:
    """Print the times and ratios, and write them with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="d_in:d_sae of each size")
    parser.add_argument("--null-symbols", action="store_true", help="compare null symbols, not pursuit")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for size in arguments.sizes:
        d_in, d_sae = map(int, size.split(":"))
        rows += measure(d_in, d_sae, arguments)
    if arguments.out is not None:
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
