"""Errors for users: argument, rule, value and remedy in one or two sentences."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The caller gave something that cannot be used.

    The message gives argument, rule, value and remedy. The command line prints it without a traceback and exits with
    `exit_status`.
    """

    exit_status = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to ``name``, or ``""`` if none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
