"""Tables and verdicts from rows: means and ranges over seeds, and differences seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kronsae.reproduce.claims import Holds, Row, Verdict


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, the key of the figure in the rows, and the format of its values."""

    heading: str
    key: str
    form: str = "{:.4f}"

    def cell(self, rows: Sequence[Row]) -> str:
        """Return the mean and range over rows of different seeds; a dash if a row has no such figure."""
        values = [row.get(self.key) for row in rows]
        known = [float(value) for value in values if value is not None]
        return mean_and_range(known, self.form) if known and len(known) == len(values) else "–"


EXPLAINED = "explained_variance_per_token"
"""The EV that is compared: the mean over tokens, as in the paper's listing.

The ratio of sums, `explained_variance`, is decided by the few tokens of very large norm that language models have.
"""
SAE, EV = Column("SAE", "name", "{}"), Column("EV", EXPLAINED)
POOLED = Column("EV of all tokens together", "explained_variance")
RECONSTRUCTION = (EV, POOLED, Column("l0", "l0", "{:.1f}"), Column("dead", "dead_share", "{:.1%}"))
SPLICED = Column("CE recovered", "ce_recovered")
ENCODER = Column("encoder parameters", "encoder_parameters", "{:,.0f}")


def mean_and_range(values: Sequence[float], form: str = "{:.4f}") -> str:
    """Return ``mean (minimum to maximum)``, or the value alone if all are shown alike."""
    shown = [form.format(value) for value in values]
    if len(set(shown)) == 1:
        return shown[0]
    return f"{form.format(statistics.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def by(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows by the values of some columns, in order of appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def of(rows: Iterable[Row], **where: Any) -> list[Row]:
    """Return the rows in which some columns have the given values, sorted by seed."""
    found = [row for row in rows if all(row.get(key) == value for key, value in where.items())]
    return sorted(found, key=lambda row: int(row["seed"]))


def means(rows: Iterable[Row], keys: Sequence[Column], columns: Sequence[Column]) -> list[str]:
    """Return a table with one line for each combination of ``keys`` and means over its rows.

    Args:
        rows: rows of several seeds.
        keys: columns that identify a line.
        columns: columns with figures.
    """
    lines = []
    for values, alike in by(rows, *(key.key for key in keys)).items():
        named = ["–" if value is None else key.form.format(value) for key, value in zip(keys, values, strict=True)]
        lines.append([*named, *(column.cell(alike) for column in columns), str(len(alike))])
    return markdown_rows([*(column.heading for column in (*keys, *columns)), "seeds"], lines)


def markdown_rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


@dataclass(frozen=True)
class Comparison:
    """Differences, one per seed, that a claim expects to be above a bound.

    Args:
        what: the difference in words, such as "EV of KronSAE minus TopK's".
        differences: one value per seed.
        form: format of the values, with a sign.
        above: the bound; a negative one allows a small loss where the claim is that two SAEs are equally good.
    """

    what: str
    differences: Sequence[float]
    form: str = "{:+.4f}"
    above: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether every seed agrees with the claim."""
        return min(self.differences) > self.above

    @property
    def contradicts(self) -> bool:
        """Whether every seed disagrees with the claim."""
        return max(self.differences) < self.above

    def __str__(self) -> str:
        one_sign = min(self.differences) > 0 or max(self.differences) < 0
        return f"{self.what}: {mean_and_range(self.differences, self.form)}{'' if one_sign else ', not of one sign'}"


def minus(own: Sequence[Row], other: Sequence[Row], key: str = EXPLAINED) -> list[float]:
    """Return the difference of a figure between two SAEs, seed by seed."""
    theirs = {row["seed"]: float(row[key]) for row in other}
    return [float(row[key]) - theirs[row["seed"]] for row in own if row["seed"] in theirs]


def judge(comparisons: Sequence[Comparison], more: str = "") -> Verdict:
    """Return the verdict on a claim that expects all differences to be above their bounds.

    It holds if every comparison agrees in every seed, holds in part if some do, and otherwise does not hold. With
    a single seed it stays undecided: without a true difference, n seeds agree with a probability of ``1 / 2**n``.
    """
    seeds = min(len(one.differences) for one in comparisons)
    agreeing = sum(one.agrees for one in comparisons)
    if seeds < 2:
        holds = Holds.UNDECIDED
    elif agreeing == len(comparisons):
        holds = Holds.YES
    else:
        holds = Holds.PARTLY if agreeing else Holds.NO
    listed = "; ".join(map(str, comparisons))
    contradicting = sum(one.contradicts for one in comparisons)
    counted = (
        f"{agreeing} of {len(comparisons)} comparisons agree in every seed, {contradicting} disagree in every seed"
    )
    return Verdict(holds, f"{counted}. {listed}.{more}")
