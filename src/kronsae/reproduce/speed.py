"""Figure 8: time of a training step against the width of the model."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.bench.runs import grid
from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import Column, Comparison, judge, means, of

WIDTHS = {"bundled": (512, 1024, 2048), "laptop": (512, 1024, 2048)}
SIZES = {"bundled": (2**13, 2**14), "laptop": (2**14, 2**15)}
PAPER_WIDTHS, PAPER_SIZES = (1024, 2048, 4096, 8192), (2**15, 2**16, 2**17)


def rows(context: Context) -> list[Row]:
    """Time steps of TopK and KronSAE, interleaved; each seed repeats the measurement."""
    name = context.scale.name
    found: list[Row] = []
    for seed in context.seeds:
        for point in grid(WIDTHS.get(name, PAPER_WIDTHS), SIZES.get(name, PAPER_SIZES), seed=seed):
            if point.skipped is not None:
                context.say(f"D = {point.shape.d_in}, F = {point.shape.d_sae} {point.skipped}.")
                continue
            times = {key: timing.median_ms for key, timing in point.timings.items()}
            found.append(
                {"name": "step", "seed": seed, "d_in": point.shape.d_in, "d_sae": point.shape.d_sae}
                | {"topk_ms": times["topk"], "kron_ms": times["kronsae"], "ratio": times["topk"] / times["kronsae"]}
            )
    return found


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per width and size."""
    keys = [Column("latents", "d_sae", "{:,}"), Column("D", "d_in", "{:,}")]
    columns = [
        Column("TopK, ms", "topk_ms", "{:,.0f}"),
        Column("KronSAE, ms", "kron_ms", "{:,.0f}"),
        Column("TopK / KronSAE", "ratio", "{:.2f}"),
    ]
    return means(sorted(found, key=lambda row: (row["d_sae"], row["d_in"])), keys, columns)


def verdict(found: Sequence[Row]) -> Verdict:
    """Ask whether a step of KronSAE is faster at every point."""
    comparisons = [
        Comparison(
            f"TopK's time over KronSAE's minus 1 at D = {d_in:,}, F = {d_sae:,}",
            [float(row["ratio"]) - 1 for row in of(found, d_in=d_in, d_sae=d_sae)],
            "{:+.2f}",
        )
        for d_in, d_sae in dict.fromkeys((row["d_in"], row["d_sae"]) for row in found)
    ]
    return judge(comparisons)


STUDY = Study(
    name="speed",
    title="Time of a training step",
    of="figure 8",
    claim="A training step of KronSAE is faster than TopK's, the more so the larger the width and the dictionary.",
    rows=rows,
    table=table,
    judge=verdict,
    synthetic=True,
    limits="M = 4, N = 8, k = 50, batches of 256 tokens. Both use the library's own kernels, which select and decode "
    "sparsely; the paper times a dense listing. Absolute times depend on the machine: read the ratio.",
)
