"""The results of a sweep: one row per SAE and seed, as a CSV, a table and a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kronsae.core.heads import head_grid
from kronsae.report import sweep_page, write
from kronsae.report.sweeps import divergences, mean_table, summaries
from kronsae.support.config import to_dict
from kronsae.support.files import write_text
from kronsae.sweeps.grid import Point

CSV_FILE, PAGE_FILE, CONFIG_FILE = "sweep.csv", "sweep.html", "sweep.json"
SHAPE = ("num_experts", "gate", "num_heads", "d_base", "d_extension")
FIGURES = (
    "architecture",
    "d_sae",
    "parameters",
    "encoder_parameters",
    "tokens",
    "training_flops",
    "explained_variance",
    "explained_variance_per_token",
    "mean_squared_error",
    "cosine_similarity",
    "l0",
    "dead_share",
    "ce_recovered",
    "kl_recovered",
    "seconds",
    "evaluation_tokens",
)
"""Columns taken over from `kronsae.runs.evaluation.evaluate_run`."""


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and what was measured so far; ``print`` shows means over seeds.

    Args:
        folder: with ``sweep.csv``, ``sweep.html``, ``sweep.json`` and ``groups/``, each a run folder.
        rows: as in the CSV.
        settings: by name of an SAE, what was given for it.
    """

    folder: Path
    rows: list[dict[str, Any]]
    settings: Mapping[str, Mapping[str, Any]]

    @property
    def csv(self) -> Path:
        """All rows and columns."""
        return self.folder / CSV_FILE

    @property
    def page(self) -> Path:
        """The page with the plots."""
        return self.folder / PAGE_FILE

    def write(self, config: Mapping[str, Any]) -> None:
        """Write ``sweep.csv`` and ``sweep.html``; ``config`` is shown on the page."""
        write_text(self.csv, as_csv(self.rows))
        evaluated_on = self._all("evaluation_tokens", "{:,}")
        facts = {
            "model": self._all("run.model.name"),
            "hook": self._all("run.hook"),
            "text": self._all("run.text.source"),
            "SAEs": f"{len({row['name'] for row in self.rows})}",
            "seeds": ", ".join(map(str, sorted({row["seed"] for row in self.rows}))),
            "evaluated on": None if evaluated_on is None else f"{evaluated_on} held-out tokens",
            "processor": self._all("processor"),
            "commit": self._all("commit"),
        }
        write(sweep_page(rows=self.rows, settings=self.settings, facts=facts, config=config), self.page)

    def _all(self, key: str, form: str = "{}") -> str | None:
        """What stands in a column, each value once; None where nothing does."""
        return ", ".join(form.format(value) for value in dict.fromkeys(row[key] for row in self.rows) if value) or None

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        found = mean_table(summaries(self.rows, self.settings))
        table = Table("SAE", *(heading for heading, _ in found.headings), box=None)
        for row in found.rows:
            table.add_row(row.name, *(cell.text for cell in row.cells))
        console = Console(width=240, file=io.StringIO(), highlight=False)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        lines = [console.file.getvalue().rstrip(), *divergences(self.rows)]
        if "," in (evaluated_on := self._all("evaluation_tokens", "{}") or ""):
            lines.append(f"Evaluated on different numbers of held-out tokens: {evaluated_on}.")
        return "\n".join(lines)


def result_row(
    point: Point,
    figures: Mapping[str, Any],
    provenance: Mapping[str, Any],
    group: str,
    *,
    diverged: str | None = None,
) -> dict[str, Any]:
    """One row: name and seed, shape (of a switch the heads of all experts), figures, every setting by its place
    (``sae.``, ``run.``), provenance.

    Args:
        point: the SAE.
        figures: its row of `evaluate_run`; empty if it diverged.
        provenance: of the machine that trained it.
        group: name of the run folder that holds it.
        diverged: the sentence that its training ended with; None of one that was trained to its end.
    """
    member = point.run.saes[0]
    encoder, grid = to_dict(member.encoder), head_grid(member.encoder)
    shape = encoder | encoder.get("expert", {}) | {"num_heads": None if grid is None else grid.num_heads}
    run = {key: value for key, value in to_dict(point.run).items() if key != "saes"}
    about = {key: value for key, value in provenance.items() if key != "versions"}
    return (
        {"name": point.name, "seed": point.seed}
        | {key: shape.get(key) for key in SHAPE}
        | {"k": member.sparsifier.k, "lr": member.optimizer.lr, "diverged": diverged}
        | {key: figures.get(key) for key in FIGURES}
        | _flat({key: value for key, value in to_dict(member).items() if key != "name"}, "sae")
        | _flat(run, "run")
        | about
        | {f"{package}_version": found for package, found in provenance["versions"].items()}
        | {"group": group}
    )


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV, with every column that one of them has; what a row has not is empty."""
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {key: leaf for name, inner in value.items() for key, leaf in _flat(inner, f"{place}.{name}").items()}
    return {place: " ".join(map(str, value)) if isinstance(value, list) else value}
