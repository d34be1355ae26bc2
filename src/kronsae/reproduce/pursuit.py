"""Ours: training and encoding with pursuit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from kronsae.core.pursuit import Pursuit
from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import (
    ENCODER,
    EXPLAINED,
    RECONSTRUCTION,
    SPLICED,
    Column,
    Comparison,
    judge,
    means,
    minus,
    of,
)
from kronsae.runs.evaluation import evaluate_pursuit
from kronsae.support.progress import progress_bar

SHAPES: dict[str, tuple[int, int] | None] = {"topk": None, "kron-2x4": (2, 4), "kron-4x4": (4, 4)}
PLAIN, ENCODED, TRAINED = "plain", "plain-encoded-with-pursuit", "trained-with-pursuit"
KEYS = ("explained_variance", EXPLAINED, "l0", "dead_share", "ce_recovered", "kl_recovered")
PURSUIT = Pursuit()


def rows(context: Context) -> list[Row]:
    """Train each encoder with and without pursuit at its best learning rate; encode the plain ones with one too."""
    words = f" pursuit_rounds={PURSUIT.rounds} pursuit_candidates={PURSUIT.candidates}"
    saes: dict[str, Callable[[float], str]] = {}
    for name, shape in SHAPES.items():
        saes[f"{name}_{PLAIN}"] = partial(_spec, context, shape, "")
        saes[f"{name}_{TRAINED}"] = partial(_spec, context, shape, words)
    found: list[Row] = []
    for row in context.train_tuned(saes):
        encoder, _, codes = row["name"].partition("_")
        found.append({**row, "encoder": encoder, "codes": codes})
    for run, own in context.runs([row for row in found if row["codes"] == PLAIN]):
        with progress_bar("evaluating", quiet=context.quiet) as progress:
            figures = {
                row["name"]: row
                for row in evaluate_pursuit(run, PURSUIT, saes=tuple(own), say=context.say, progress=progress)
            }
        for name, row in own.items():
            pursued = figures[f"{name} + pursuit"]
            found.append({**row, **{key: pursued[key] for key in KEYS}, "codes": ENCODED})
    return found


def _spec(context: Context, shape: tuple[int, int] | None, words: str, rate: float) -> str:
    lr = rate * context.scale.peak_lr(context.scale.d_sae)
    if shape is None:
        return context.sae("topk", lr=lr) + words
    return context.sae("kron", lr=lr, d_base=shape[0], d_extension=shape[1]) + words


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per encoder and way to encode."""
    order = [PLAIN, ENCODED, TRAINED]
    ordered = sorted(found, key=lambda row: (order.index(row["codes"]), list(SHAPES).index(row["encoder"])))
    keys = [Column("SAE", "encoder", "{}"), Column("codes", "codes", "{}")]
    return means(ordered, keys, [ENCODER, *RECONSTRUCTION, SPLICED, Column("rate", "lr", "{:.4f}")])


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare KronSAEs trained with pursuit with plain TopK, and TopK with pursuit."""
    topk, best = (of(found, encoder="topk", codes=codes) for codes in (PLAIN, TRAINED))
    claimed, more = [], []
    for name in list(SHAPES)[1:]:
        own = of(found, encoder=name, codes=TRAINED)
        claimed.append(Comparison(f"EV of {name} trained with pursuit minus plain TopK's", minus(own, topk)))
        more.append(Comparison(f"EV of {name} minus TopK's, both trained with pursuit", minus(own, best)))
    for name in SHAPES:
        gain = minus(of(found, encoder=name, codes=ENCODED), of(found, encoder=name, codes=PLAIN))
        more.append(Comparison(f"gain of a plain {name} that is encoded with pursuit", gain))
    return judge(claimed, f" {'; '.join(map(str, more))}.")


STUDY = Study(
    name="pursuit",
    title="Pursuit",
    of="beyond the paper",
    claim="A KronSAE trained with pursuit has a higher EV than a plain TopK SAE of the same size and sparsity.",
    rows=rows,
    table=table,
    judge=verdict,
    limits="docs/pursuit.md explains pursuit.",
)
