"""Results of a sweep: one row per SAE and seed, as a CSV file, a table and an HTML page."""

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
SHAPE = ("num_experts", "gate", "num_heads", "d_base", "d_extension", "null_symbols")
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
"""Columns copied from the rows of `kronsae.runs.evaluation.evaluate_run`."""


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and its results so far; ``print`` shows means over seeds.

    Args:
        folder: folder with ``sweep.csv``, ``sweep.html``, ``sweep.json`` and the run folders in ``groups/``.
        rows: rows of the CSV file.
        settings: settings given for each SAE, by name.
    """

    folder: Path
    rows: list[dict[str, Any]]
    settings: Mapping[str, Mapping[str, Any]]

    @property
    def csv(self) -> Path:
        """Return the path of the CSV file with all rows and columns."""
        return self.folder / CSV_FILE

    @property
    def page(self) -> Path:
        """Return the path of the HTML page with the plots."""
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
        """Return the distinct values of a column as text; None if there are none."""
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
    """Return one row of the CSV file: name, seed, shape, metrics, all settings (``sae.``, ``run.``), provenance.

    Args:
        point: the SAE. The number of heads of a switch encoder is that of all experts.
        figures: its row of `evaluate_run`; empty if it diverged.
        provenance: provenance of its training.
        group: name of its run folder.
        diverged: error message of a training that diverged; None if the training finished.
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
        | _flatten({key: value for key, value in to_dict(member).items() if key != "name"}, "sae")
        | _flatten(run, "run")
        | about
        | {f"{package}_version": found for package, found in provenance["versions"].items()}
        | {"group": group}
    )


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as CSV with the union of their columns; missing values are empty."""
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flatten(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {key: leaf for name, inner in value.items() for key, leaf in _flatten(inner, f"{place}.{name}").items()}
    return {place: " ".join(map(str, value)) if isinstance(value, list) else value}
