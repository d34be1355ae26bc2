"""How far some work has come, on stderr: a bar on a terminal, gone when done; elsewhere a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

Progress = Callable[[int, int], None]
"""Called with ``(done, total)``."""

PLAIN_SECONDS = 10.0
"""Between lines where the output is no terminal."""

TOLD_FROM = 0.02
"""Of the work, the share from which on the rate says something about the rest: beginnings are slow."""


@contextmanager
def progress_bar(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yield ``report(done, total)``, which moves the bar; work of several stages begins anew with each.

    Args:
        what: one word for the work, shown before the bar.
        quiet: show nothing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _nothing if quiet else _lines(what)
        return
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def progress_of_part(progress: Progress | None, number: int, parts: int) -> Progress | None:
    """Return the progress of part ``number`` (from 0) of so many equal parts, reported as progress of the whole."""
    return None if progress is None else lambda done, total: progress(number * total + done, parts * total)


def progress_after(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return the progress of a stage that starts when ``before`` of ``total`` is done."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def _nothing(done: int, total: int) -> None:
    """Nothing is shown."""


def _lines(what: str) -> Callable[[int, int], None]:
    """Says ``evaluating: 40%, about 30 s left``, at most every `PLAIN_SECONDS`; of short work nothing."""
    started = said = monotonic()
    first = last = 0

    def report(done: int, total: int) -> None:
        nonlocal started, said, first, last
        now = monotonic()
        if done < last:  # a new stage, under way since about now
            started, first = now, done
        last = done
        if now - said >= PLAIN_SECONDS and 0 < done < total:
            said = now
            share = done / total
            told = share >= TOLD_FROM and done > first
            left = f", about {(now - started) * (total - done) / (done - first):.0f} s left" if told else ""
            sys.stderr.write(f"{what}: {share:.0%}{left}\n")
            sys.stderr.flush()

    return report
