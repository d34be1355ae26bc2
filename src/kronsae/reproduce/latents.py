"""Figures 7 and 17: frequency, token entropy and multitoken ratio of latents."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.measures.latents import LatentsConfig, measure
from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import Column, Comparison, judge, means, minus, of
from kronsae.support.progress import progress_bar

KEYS = ("frequency", "mean_activation", "token_entropy", "multitoken_ratio")


def rows(context: Context) -> list[Row]:
    """Train TopK and KronSAE, and measure the medians over their latents."""
    tokens = context.scale.eval_tokens
    config = LatentsConfig(tokens=tokens, pre_latent_tokens=tokens, example_tokens=min(tokens, 8192), num_latents=4)
    found: list[Row] = []
    for run, saes in context.runs(context.train([f"{context.sae(kind)} name={kind}" for kind in ("topk", "kron")])):
        with progress_bar("latents", quiet=context.quiet) as progress:
            result = measure(run, config, say=context.say, progress=progress)
        for name, row in saes.items():
            summary = result["saes"][name]["summary"]["latents"]
            found.append({**row, **{key: summary[key] for key in KEYS}, "living": summary["living"]})
    return found


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per SAE."""
    columns = [
        Column("frequency", "frequency", "{:.3%}"),
        Column("mean activation", "mean_activation", "{:.2f}"),
        Column("token entropy (nats)", "token_entropy", "{:.2f}"),
        Column("multitoken ratio", "multitoken_ratio", "{:.4f}"),
        Column("living latents", "living", "{:,.0f}"),
    ]
    return means(found, [Column("SAE", "name", "{}")], columns)


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare the medians of KronSAE with TopK's."""
    topk, kron = of(found, name="topk"), of(found, name="kron")
    return judge(
        [
            Comparison("TopK's median token entropy minus KronSAE's", minus(topk, kron, "token_entropy"), "{:+.3f}"),
            Comparison(
                "TopK's median multitoken ratio minus KronSAE's", minus(topk, kron, "multitoken_ratio"), "{:+.5f}"
            ),
        ]
    )


STUDY = Study(
    name="latents",
    title="Properties of latents",
    of="figures 7 and 17",
    claim="KronSAE's latents are more specific than TopK's: lower token entropy and lower multitoken ratio.",
    rows=rows,
    table=table,
    judge=verdict,
    limits="Medians over the living latents of the held-out tokens.",
)
