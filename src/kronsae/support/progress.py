"""Progress on stderr: a transient bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

Progress = Callable[[int, int], None]
"""Called with ``(done, total)``."""

PLAIN_SECONDS = 10.0
"""Seconds between lines if the output is not a terminal."""

SHOW_REST_FROM = 0.02
"""Share of the work from which on the time left is shown: the rate of the beginning is too low."""


@contextmanager
def progress_bar(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yield ``report(done, total)``, which updates the bar; work in several stages restarts the bar for each.

    Args:
        what: one word for the work, shown before the bar.
        quiet: whether to show nothing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _report_nothing if quiet else _line_reporter(what)
        return
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def progress_of_part(progress: Progress | None, number: int, parts: int) -> Progress | None:
    """Return a reporter for part ``number`` (from 0) of ``parts`` equal parts, which reports progress of the whole."""
    return None if progress is None else lambda done, total: progress(number * total + done, parts * total)


def progress_after(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return a reporter for a stage that starts when ``before`` of ``total`` is done."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def _report_nothing(done: int, total: int) -> None:
    """Show nothing."""


def _line_reporter(what: str) -> Callable[[int, int], None]:
    """Return a reporter that prints ``evaluating: 40%, about 30 s left`` at most every `PLAIN_SECONDS` seconds."""
    started = printed_at = monotonic()
    first = last = 0

    def report(done: int, total: int) -> None:
        nonlocal started, printed_at, first, last
        now = monotonic()
        if done < last:  # a new stage, which has just started
            started, first = now, done
        last = done
        if now - printed_at >= PLAIN_SECONDS and 0 < done < total:
            printed_at = now
            share = done / total
            show_rest = share >= SHOW_REST_FROM and done > first
            left = f", about {(now - started) * (total - done) / (done - first):.0f} s left" if show_rest else ""
            sys.stderr.write(f"{what}: {share:.0%}{left}\n")
            sys.stderr.flush()

    return report
