"""Figures 1, 2 and 9 and table 3: explained variance at equal tokens and at equal FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import ENCODER, RECONSTRUCTION, Column, Comparison, judge, means, minus, of

SHAPES = ((2, 4), (4, 4), (4, 8))
TOKENS, FLOPS = "equal tokens", "equal FLOPs"


def rows(context: Context) -> list[Row]:
    """Train TopK and three KronSAEs of every size, each at its best learning rate, on equal tokens and equal FLOPs."""
    found: list[Row] = []
    for d_sae in context.scale.wide:
        saes: dict[str, Callable[[float], str]] = {"topk": partial(_spec, context, d_sae, None)}
        saes |= {f"kron-{m}x{n}": partial(_spec, context, d_sae, (m, n)) for m, n in SHAPES}
        tuned = context.train_tuned(saes)
        found += [{**row, "budget": TOKENS} for row in tuned]
        rates = {row["name"]: float(row["rate"]) for row in tuned}
        equal = context.train([f"{spec(rates[name])} name={name}" for name, spec in saes.items()], same_flops_as="topk")
        found += [{**row, "budget": FLOPS, "rate": rates[row["name"]]} for row in equal]
    return found


def _spec(context: Context, d_sae: int, shape: tuple[int, int] | None, rate: float) -> str:
    lr = rate * context.scale.peak_lr(d_sae)
    if shape is None:
        return context.sae("topk", d_sae=d_sae, lr=lr)
    return context.sae("kron", d_sae=d_sae, lr=lr, d_base=shape[0], d_extension=shape[1])


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per size, budget and SAE."""
    keys = [Column("latents", "d_sae", "{:,}"), Column("budget", "budget", "{}"), Column("SAE", "name", "{}")]
    cost = [ENCODER, Column("tokens", "tokens", "{:,.0f}"), Column("training FLOPs", "training_flops", "{:.2e}")]
    return means(found, keys, [*cost, *RECONSTRUCTION, Column("rate", "lr", "{:.4f}")])


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare each KronSAE with TopK at equal FLOPs, which is the paper's claim, and report equal tokens."""
    at_flops: list[Comparison] = []
    at_tokens: list[Comparison] = []
    for d_sae in dict.fromkeys(row["d_sae"] for row in found):
        for m, n in SHAPES:
            for budget, into in ((FLOPS, at_flops), (TOKENS, at_tokens)):
                own, topk = (of(found, d_sae=d_sae, budget=budget, name=name) for name in (f"kron-{m}x{n}", "topk"))
                into.append(Comparison(f"EV of ({m}, {n}) minus TopK's, {d_sae:,} latents, {budget}", minus(own, topk)))
    return judge(at_flops, f" {'; '.join(map(str, at_tokens))}.")


STUDY = Study(
    name="budgets",
    title="Explained variance and budget",
    of="figures 1, 2 and 9, table 3",
    claim="At equal training FLOPs KronSAE reconstructs as well as TopK or better, with fewer encoder parameters; at "
    "equal tokens it is close.",
    paper="""| F | TopK | KronSAE, mean | KronSAE, best |
|---|---|---|---|
| 32,768 | .793 | .783 | .793 |
| 65,536 | .802 | .795 | .805 |
| 131,072 | .801 | .800 | .810 |

Pythia-1.4B, 125M tokens for TopK and the same FLOPs for KronSAE, EV.""",
    rows=rows,
    table=table,
    judge=verdict,
    limits="The activations are twice the scale's tokens; more tokens than that repeat. Tens of thousands of latents "
    "learn little on few tokens: compare the dead shares.",
)
