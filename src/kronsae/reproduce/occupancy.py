"""How full the heads are: does K/H, active latents per head, predict what a KronSAE loses to TopK?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np

from kronsae.reproduce import shapes, sparsity
from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import EV, EXPLAINED, Column, Comparison, judge, means, of

LEAST = 1e-3
"""Excess residuals below this, which are not clear of the spread over seeds, are fitted as this value."""
GOOD_FIT = 0.9


def rows(context: Context) -> list[Row]:
    """Train TopK and KronSAEs of every shape with every k; add the excess residual and K/H to the KronSAEs' rows."""
    ks = context.scale.l0s
    grid = "{" + ",".join(map(str, ks)) + "}"
    kron = [f"{context.sae('kron', d_base=m, d_extension=n, k=grid)} name=kron-{m}x{n}" for m, n in shapes.SHAPES]
    found = context.train([sparsity.specs(context, "topk", ks), *kron])
    topk = {(row["k"], row["seed"]): float(row[EXPLAINED]) for row in found if row["num_heads"] is None}
    return [
        {
            **row,
            "occupancy": row["k"] / row["num_heads"],
            "topk_explained_variance": topk[row["k"], row["seed"]],
            "excess": (1 - row[EXPLAINED]) / (1 - topk[row["k"], row["seed"]]) - 1,
        }
        for row in found
        if row["num_heads"] is not None
    ]


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per shape and k, by K/H."""
    ordered = sorted(found, key=lambda row: (row["occupancy"], row["num_heads"]))
    keys = [Column("K/H", "occupancy", "{:.4g}"), Column("M", "d_base", "{}"), Column("N", "d_extension", "{}")]
    columns = [Column("excess residual", "excess", "{:.1%}"), EV, Column("EV of TopK", "topk_explained_variance")]
    return means(ordered, [*keys, Column("k", "k", "{}")], columns)


Predictor = Callable[[Row], float]
PREDICTORS: dict[str, tuple[Predictor, ...]] = {
    "K/H": (lambda row: row["k"] / row["num_heads"],),
    "k": (lambda row: row["k"],),
    "H": (lambda row: row["num_heads"],),
    "k and H apart": (lambda row: row["k"], lambda row: row["num_heads"]),
}


def fit(found: Sequence[Row], predictors: Sequence[Predictor]) -> tuple[list[float], float]:
    """Return coefficients (a, b, ...) and R^2 of ``log excess = a + b log p + ...``, by least squares."""
    logs = np.log([[predictor(row) for predictor in predictors] for row in found])
    target = np.log([max(float(row["excess"]), LEAST) for row in found])
    design = np.column_stack([np.ones(len(found)), logs])
    coefficients = np.linalg.lstsq(design, target, rcond=None)[0]
    unexplained = np.square(target - design @ coefficients).sum()
    return coefficients.tolist(), float(1 - unexplained / np.square(target - target.mean()).sum())


def verdict(found: Sequence[Row]) -> Verdict:
    """Fit power laws to the excess residual, seed by seed, and ask how much of its logarithm K/H explains."""
    seeds = sorted({int(row["seed"]) for row in found})
    fits = {name: [fit(of(found, seed=seed), own) for seed in seeds] for name, own in PREDICTORS.items()}
    law = [coefficients for coefficients, _ in fits["K/H"]]
    factor = statistics.mean(float(np.exp(a)) for a, _ in law)
    power = statistics.mean(b for _, b in law)
    others = ", ".join(
        f"{statistics.mean(r2 for _, r2 in own):.3f} with {name}" for name, own in fits.items() if name != "K/H"
    )
    low, high = min(row["occupancy"] for row in found), max(row["occupancy"] for row in found)
    law_found = f"Excess = {factor:.3f} (K/H)^{power:.2f} from K/H = {low:.3g} to {high:.3g}"
    r2 = [r2 for _, r2 in fits["K/H"]]
    return judge(
        [Comparison("R^2 of log excess on log K/H", r2, "{:.3f}", above=GOOD_FIT)],
        f" {law_found}; mean R^2 of other fits: {others}.",
    )


STUDY = Study(
    name="occupancy",
    title="How full the heads are",
    of="no table of the paper: the choice of M, N and H",
    claim="The excess residual of a KronSAE, (1 - EV) / (1 - EV of TopK with as many latents) - 1, is a power of K/H, "
    f"the active latents per head, whatever the shape (here: R^2 above {GOOD_FIT:g}).",
    rows=rows,
    table=table,
    judge=verdict,
    limits="One number of latents, so H also fixes the size of the heads and the encoder's parameters; equal tokens, "
    f"one learning rate. An excess below {LEAST:g} is fitted as {LEAST:g}.",
)
