"""What a study is: the paper's claim, the rows measured for it, a table of them and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context


@dataclass(frozen=True, kw_only=True)
class Study:
    """One table or figure of the paper, or a question of its reviewers.

    Args:
        name: name on the command line.
        title: heading of its page.
        of: the table or figure, such as ``"table 1"``.
        claim: what the paper says, in one or two sentences.
        paper: the paper's figures, as Markdown; empty where it gives none.
        rows: trains and measures; returns one row per SAE and seed.
        table: the rows as lines of Markdown: means over seeds with ranges.
        judge: compares the rows with the claim.
        draw: draws a picture to a path and returns its caption, or None where it cannot be drawn.
        synthetic: whether it is measured on synthetic data, and not on the scale's model.
        limits: what the study leaves out or does differently, as sentences.
    """

    name: str
    title: str
    of: str
    claim: str
    rows: Callable[[Context], list[Row]]
    table: Callable[[Sequence[Row]], list[str]]
    judge: Callable[[Sequence[Row]], Verdict]
    draw: Callable[[Context, Sequence[Row], Path], str | None] | None = None
    paper: str = ""
    synthetic: bool = False
    limits: str = ""
