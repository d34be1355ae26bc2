"""Errors for users: argument, rule, value and remedy in one or two sentences."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN_CHARACTERS = 200


class UserError(ValueError):
    """The caller gave something that cannot be used.

    The message gives argument, rule, value and remedy. The command line prints it without a traceback and exits with
    `exit_status`.
    """

    exit_status = 2


class Interrupted(UserError):
    """The user stopped long work; what is done is saved, and the same command goes on."""

    exit_status = 130  # a shell's exit status for a process ended by Ctrl-C


def shown(value: object) -> str:
    """Return ``repr(value)`` for a message, shortened to `SHOWN_CHARACTERS`: a stranger's file may hold anything."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: an integer of more than 4,300 digits
        return f"a {type(value).__name__}"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def shown_text(value: object) -> str:
    """Return ``str(value)`` for a message: shortened, on one line, without control characters and lone surrogates."""
    try:
        text = repr(str(value))[1:-1]
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to ``name``, or ``""`` if none is close."""
    if len(name) > SHOWN_CHARACTERS:  # the comparison takes quadratic time
        return ""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
