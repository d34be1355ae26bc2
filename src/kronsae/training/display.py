"""Live display of training: a progress bar with tokens/s and time left, and a line per SAE."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from time import monotonic
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kronsae.support.progress import PLAIN_SECONDS

COLUMNS = {"explained_variance": "EV", "l0": "l0", "dead_share": "dead", "loss": "loss", "lr": "lr"}
FORMATS = {"explained_variance": "{:.4f}", "l0": "{:.1f}", "dead_share": "{:.1%}", "loss": "{:.4g}", "lr": "{:.1e}"}


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = task.speed
        return Text("- tokens/s" if rate is None else f"{rate:,.0f} tokens/s")


class DisplaySink:
    """Sink that shows the newest metrics: live on a terminal, as a line every few seconds elsewhere.

    Args:
        tokens: total number of tokens.
        done: tokens used by earlier processes of the run.
    """

    def __init__(self, tokens: int, done: int) -> None:
        self._console = Console(file=sys.stderr)
        self._rows: dict[str, Mapping[str, Any]] = {}
        self._tokens, self._printed_at = tokens, monotonic() - PLAIN_SECONDS
        self._last = self._printed = 0  # tokens of the newest rows, and of the last printed line
        self._started, self._tokens_before = monotonic(), done
        self._bar = Progress(
            TextColumn("training"), BarColumn(), TextColumn("{task.percentage:.0f}%"), _Rate(), TimeRemainingColumn()
        )
        self._task = self._bar.add_task("training", total=tokens, completed=done)
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        if self._live is not None:
            self._live.start()

    def write(self, row: Mapping[str, Any]) -> None:
        if self._live is None and row["tokens"] > self._last and monotonic() - self._printed_at >= PLAIN_SECONDS:
            self._print_line()  # of the previous step, which now has the rows of all SAEs
        self._rows[row["sae"]] = row
        self._last = row["tokens"]
        self._bar.update(self._task, completed=row["tokens"])
        if self._live is not None:
            self._live.update(Group(self._bar, self._table()))

    def flush(self) -> None:
        """Do nothing: no output is buffered."""

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        else:
            self._print_line()

    def _print_line(self) -> None:
        """Print a line for the last step with rows, once."""
        if self._last > self._printed:
            self._printed_at, self._printed = monotonic(), self._last
            self._console.print(self._format_line(self._last), highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table("SAE", *COLUMNS.values(), box=None)
        for name, row in self._rows.items():
            table.add_row(name, *(_format_cell(row, key) for key in COLUMNS))
        return table

    def _format_line(self, tokens: int) -> str:
        rate = (tokens - self._tokens_before) / max(1e-9, monotonic() - self._started)
        left = (self._tokens - tokens) / max(1e-9, rate)
        each = "; ".join(
            f"{name} EV {_format_cell(row, 'explained_variance')} l0 {_format_cell(row, 'l0')} "
            f"dead {_format_cell(row, 'dead_share')}"
            for name, row in self._rows.items()
        )
        return f"{tokens:,} of {self._tokens:,} tokens, {rate:,.0f} tokens/s, {left:.0f} s left | {each}"


def _format_cell(row: Mapping[str, Any], key: str) -> str:
    return "-" if row[key] is None else FORMATS[key].format(row[key])
