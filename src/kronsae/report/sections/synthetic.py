"""Known features: the table, and where a Kronecker encoder wins and loses, each sentence by a rule."""

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
"""Of the kept result; see `kronsae.report.measurements`."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Figure:
    """A column: where it stands in a row, and whether more of it is better (1), worse (-1) or neither (0)."""

    heading: str
    about: str
    path: tuple[str, ...]
    better: int = 1

    def value(self, row: Row) -> float | None:
        """The figure of a row; None where it was not measured."""
        found: Any = row
        for key in self.path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return None if found is None else float(found)


_FIGURES = (
    _Figure("MCC", "mean |cos| of features and latents, matched one to one", ("mcc",)),
    _Figure("MCC untrained", "the same before training", ("mcc_untrained",), 0),
    _Figure("uniqueness", "different nearest features, per latent", ("uniqueness",)),
    _Figure("precision", "of latents as detectors of their nearest features", ("precision",)),
    _Figure("recall", "of latents as detectors of their nearest features", ("recall",)),
    _Figure("F1", "of latents as detectors of their nearest features", ("f1",)),
    _Figure("F1 independent", "of independent features' own latents", ("f1_by_kind", "independent")),
    _Figure("F1 root", "of hierarchies' roots' own latents", ("f1_by_kind", "root")),
    _Figure("F1 child", "of their children's own latents", ("f1_by_kind", "child")),
    _Figure("F1 conjunction", "of conjunctions' own latents", ("f1_by_kind", "conjunction")),
    _Figure(
        "absorbed by children",
        "of the tokens on which a root is on and its child's latent fires, the share on which the root's is off",
        ("absorption", "hierarchy", "rate"),
        -1,
    ),
    _Figure(
        "missed without",
        "of the tokens on which a root is on alone, the share on which its latent is off",
        ("absorption", "hierarchy", "missed_alone"),
        -1,
    ),
    _Figure(
        "absorbed by conjunctions",
        "as absorbed by children: a conjunction and its two parents",
        ("absorption", "conjunction", "rate"),
        -1,
    ),
    _Figure(
        "missed without conjunction",
        "as missed without: a conjunction's parent",
        ("absorption", "conjunction", "missed_alone"),
        -1,
    ),
    _Figure("EV", "explained variance on held-out tokens", ("explained_variance",)),
    _Figure("l0", "active latents per token", ("l0",), 0),
    _Figure("dead", "share of the latents active on no held-out token", ("dead_share",), -1),
)


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """The section of a kept result."""
    result, settings = kept["result"], kept["settings"]
    about = result["about"][0]
    return Section(
        key="synthetic",
        title="Known features",
        paragraphs=(
            f"SAEs of this run's forms, trained on activations made of {about['features']} known features in width "
            f"{about['d_in']} (not this run's weights): which of the features do they find, detect and absorb?",
            *map(visible, verdict(result)),
        ),
        tables=(("SAE", table(result, names)),),
        notes=(
            f"Mean ± standard deviation over {len(result['about'])} seeds; {settings['steps'] * settings['batch']:,} "
            f"training tokens, source {visible(str(settings['source']))}. A difference counts when a paired "
            f"t-test at {LEVEL:g} says so.",
        ),
    )


def table(result: Mapping[str, Any], names: Sequence[str] = ()) -> Table:
    """Mean ± standard deviation over seeds, one row per SAE; ``names`` are the page's SAEs, for their colours."""
    figures = [one for one in _FIGURES if any(one.value(row) is not None for row in result["rows"])]
    shown = []
    for name in dict.fromkeys(row["sae"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["sae"] == name]
        cells = tuple(Cell(_spread([one.value(row) for row in rows])) for one in figures)
        shown.append(TableRow(visible(name), cells, list(names).index(name) if name in names else None))
    return Table(tuple((one.heading, one.about) for one in figures), tuple(shown))


def verdict(result: Mapping[str, Any]) -> Iterator[str]:
    """Where Kronecker encoders lose, win, or neither; none where there is nothing to compare.

    One pair is one Kronecker SAE and the dense one of the same sparsifier, loss and experts, the mean over seeds: seeds
    of one pair are no independent evidence about others. With a single such pair, each seed is one.
    """
    by_seed = list(_pairs(result))
    pairs = _grouped(by_seed)
    if len(pairs) < 2:
        return
    told: dict[int, list[str]] = {-1: [], 1: [], 0: []}
    for figure in (one for one in _FIGURES if one.better):
        known = [means for pair in pairs if (means := _means(figure, pair)) is not None]
        if len(known) < 2:
            continue
        gain = paired_difference([kron for kron, _ in known], [dense for _, dense in known])
        told[gain.sign * figure.better].append(f"{figure.heading} ({gain})")
    says = {-1: "lose", 1: "win", 0: "neither win nor lose visibly"}
    for sign, found in told.items():
        if found:
            yield f"Over {len(pairs)} pairs, Kronecker encoders {says[sign]} in {', '.join(found)}."
    yield from _by_family(by_seed)


def _grouped(pairs: Sequence[tuple[Row, Row]]) -> list[list[tuple[Row, Row]]]:
    """The seeds of each Kronecker SAE together; of a single one, each alone."""
    found: dict[str, list[tuple[Row, Row]]] = {}
    for kron, dense in pairs:
        found.setdefault(kron["sae"], []).append((kron, dense))
    return list(found.values()) if len(found) > 1 else [[pair] for pair in pairs]


def _means(figure: _Figure, seeds: Sequence[tuple[Row, Row]]) -> tuple[float, float] | None:
    """Of the Kronecker SAE and of the dense one, over the seeds in which both have the figure; None without any."""
    both = [(figure.value(kron), figure.value(dense)) for kron, dense in seeds]
    known = [(kron, dense) for kron, dense in both if kron is not None and dense is not None]
    if not known:
        return None
    return statistics.fmean(kron for kron, _ in known), statistics.fmean(dense for _, dense in known)


def _by_family(pairs: Sequence[tuple[Row, Row]]) -> Iterator[str]:
    """Which SAEs are behind, or ahead, in MCC with every seed, of several."""
    gains: dict[tuple[str, str], list[float]] = {}
    for kron, dense in pairs:
        gains.setdefault((kron["sae"], dense["sae"]), []).append(kron["mcc"] - dense["mcc"])
    behind = [
        f"{kron} (against {dense})" for (kron, dense), found in gains.items() if len(found) > 1 and max(found) < 0
    ]
    ahead = [f"{kron} (against {dense})" for (kron, dense), found in gains.items() if len(found) > 1 and min(found) > 0]
    for names, says in ((behind, "behind"), (ahead, "ahead")):
        if names:
            yield f"In MCC {says} with every seed: {visible(', '.join(names))}."


def _pairs(result: Mapping[str, Any]) -> Iterator[tuple[Row, Row]]:
    """Each Kronecker SAE with the first dense one of its family and seed."""
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
