"""The section of ``kronsae eval synthetic``: the table of known features, and sentences on Kronecker against dense."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kronsae.eval.display import visible
from kronsae.eval.paired import LEVEL, paired_difference
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.section import Section

REVISION = 1
"""Revision of the stored result; see `kronsae.report.measurements`."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Figure:
    """A column: its path in a row, and whether higher is better (1), worse (-1) or neither (0)."""

    heading: str
    about: str
    path: tuple[str, ...]
    better: int = 1

    def value(self, row: Row) -> float | None:
        """Return the metric of a row; None if it was not measured."""
        found: Any = row
        for key in self.path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return None if found is None else float(found)


_FIGURES = (
    _Figure("MCC", "mean |cos| of features and latents, matched one to one", ("mcc",)),
    _Figure("MCC untrained", "the same before training", ("mcc_untrained",), 0),
    _Figure("uniqueness", "distinct nearest features divided by the number of latents", ("uniqueness",)),
    _Figure("precision", "of latents as detectors of their nearest features", ("precision",)),
    _Figure("recall", "of latents as detectors of their nearest features", ("recall",)),
    _Figure("F1", "of latents as detectors of their nearest features", ("f1",)),
    _Figure("F1 independent", "of the matched latents of independent features", ("f1_by_kind", "independent")),
    _Figure("F1 root", "of the matched latents of hierarchy roots", ("f1_by_kind", "root")),
    _Figure("F1 child", "of the matched latents of hierarchy children", ("f1_by_kind", "child")),
    _Figure("F1 conjunction", "of the matched latents of conjunctions", ("f1_by_kind", "conjunction")),
    _Figure(
        "absorbed by children",
        "share of tokens on which the root's latent is inactive, where the root and a child's latent are active",
        ("absorption", "hierarchy", "rate"),
        -1,
    ),
    _Figure(
        "missed without child",
        "share of tokens on which the root's latent is inactive, where the root is active without a child",
        ("absorption", "hierarchy", "missed_alone"),
        -1,
    ),
    _Figure(
        "absorbed by conjunctions",
        "as 'absorbed by children', for a conjunction and its two parents",
        ("absorption", "conjunction", "rate"),
        -1,
    ),
    _Figure(
        "missed without conjunction",
        "as 'missed without child', for a conjunction's parents",
        ("absorption", "conjunction", "missed_alone"),
        -1,
    ),
    _Figure("EV", "explained variance on held-out tokens", ("explained_variance",)),
    _Figure("l0", "active latents per token", ("l0",), 0),
    _Figure("dead", "share of latents active on no held-out token", ("dead_share",), -1),
)


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """Build the section from a stored result."""
    result, settings = kept["result"], kept["settings"]
    about = result["about"][0]
    return Section(
        key="synthetic",
        title="Known features",
        paragraphs=(
            f"SAEs with this run's architectures, but newly trained on synthetic activations composed of "
            f"{about['features']} known features in {about['d_in']} dimensions: which of the features do they recover, "
            "detect and absorb?",
            *map(visible, verdict(result)),
        ),
        tables=(("SAE", table(result, names)),),
        notes=(
            f"Mean ± standard deviation over {len(result['about'])} seeds; {settings['steps'] * settings['batch']:,} "
            f"training tokens, source {visible(str(settings['source']))}. Significance is by a paired t-test at level "
            f"{LEVEL:g}.",
        ),
    )


def table(result: Mapping[str, Any], names: Sequence[str] = ()) -> Table:
    """Build the table of mean ± standard deviation over seeds, one row per SAE; ``names`` select their colours."""
    figures = [one for one in _FIGURES if any(one.value(row) is not None for row in result["rows"])]
    shown = []
    for name in dict.fromkeys(row["sae"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["sae"] == name]
        cells = tuple(Cell(_spread([one.value(row) for row in rows])) for one in figures)
        shown.append(TableRow(visible(name), cells, list(names).index(name) if name in names else None))
    return Table(tuple((one.heading, one.about) for one in figures), tuple(shown))


def verdict(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences on the metrics in which Kronecker encoders are worse, better, or not significantly different.

    A pair is a Kronecker SAE and the dense SAE of the same sparsifier, loss and experts, each averaged over seeds,
    because seeds of one pair are not independent evidence about other pairs. With a single such pair, each seed is a
    pair. Nothing is yielded with fewer than two pairs.
    """
    by_seed = list(_pairs(result))
    pairs = _grouped(by_seed)
    if len(pairs) < 2:
        return
    by_outcome: dict[int, list[str]] = {-1: [], 1: [], 0: []}
    for figure in (one for one in _FIGURES if one.better):
        known = [means for pair in pairs if (means := _means(figure, pair)) is not None]
        if len(known) < 2:
            continue
        gain = paired_difference([kron for kron, _ in known], [dense for _, dense in known])
        by_outcome[gain.sign * figure.better].append(f"{figure.heading} ({gain})")
    words = {-1: "significantly worse", 1: "significantly better", 0: "not significantly different"}
    for sign, found in by_outcome.items():
        if found:
            yield f"Over {len(pairs)} pairs, Kronecker encoders are {words[sign]} in {', '.join(found)}."
    yield from _by_family(by_seed)


def _grouped(pairs: Sequence[tuple[Row, Row]]) -> list[list[tuple[Row, Row]]]:
    """Group pairs by Kronecker SAE; if there is only one, each seed is a group."""
    found: dict[str, list[tuple[Row, Row]]] = {}
    for kron, dense in pairs:
        found.setdefault(kron["sae"], []).append((kron, dense))
    return list(found.values()) if len(found) > 1 else [[pair] for pair in pairs]


def _means(figure: _Figure, seeds: Sequence[tuple[Row, Row]]) -> tuple[float, float] | None:
    """Return the means of both SAEs over the seeds in which both have the metric; None if there is no such seed."""
    both = [(figure.value(kron), figure.value(dense)) for kron, dense in seeds]
    known = [(kron, dense) for kron, dense in both if kron is not None and dense is not None]
    if not known:
        return None
    return statistics.fmean(kron for kron, _ in known), statistics.fmean(dense for _, dense in known)


def _by_family(pairs: Sequence[tuple[Row, Row]]) -> Iterator[str]:
    """Yield which SAEs have a lower, or a higher, MCC with every seed; only SAEs with several seeds are considered."""
    gains: dict[tuple[str, str], list[float]] = {}
    for kron, dense in pairs:
        gains.setdefault((kron["sae"], dense["sae"]), []).append(kron["mcc"] - dense["mcc"])
    lower = [f"{kron} (against {dense})" for (kron, dense), found in gains.items() if len(found) > 1 and max(found) < 0]
    higher = [
        f"{kron} (against {dense})" for (kron, dense), found in gains.items() if len(found) > 1 and min(found) > 0
    ]
    for names, word in ((lower, "Lower"), (higher, "Higher")):
        if names:
            yield f"{word} MCC with every seed: {visible(', '.join(names))}."


def _pairs(result: Mapping[str, Any]) -> Iterator[tuple[Row, Row]]:
    """Pair each Kronecker SAE with the first dense SAE of its family and seed."""
    dense: dict[tuple[str, int], Row] = {}
    for row in result["rows"]:
        if row["encoder"] == "dense":
            dense.setdefault((row["family"], row["seed"]), row)
    for row in result["rows"]:
        if row["encoder"] == "kronecker" and (row["family"], row["seed"]) in dense:
            yield row, dense[row["family"], row["seed"]]


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.mean(known):.3f}"
    return f"{mean} ± {statistics.stdev(known):.3f}" if len(known) > 1 else mean
