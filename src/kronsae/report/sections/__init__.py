"""Sections of the page, one module per measurement.

A section's builder takes a stored result ``{"measure", "settings", "provenance", "result"}``, as
`kronsae.report.measurements` keeps it, and the names of the page's SAEs in order (their indices select their colours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kronsae.report.measurements import MEASUREMENTS, section_module
from kronsae.report.section import Section
from kronsae.support.errors import UserError


def sections(kept: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> tuple[Section, ...]:
    """Build the sections of the given results, in the order of `MEASUREMENTS`.

    Raises:
        UserError: a result does not have this version's format.
    """
    return tuple(_section(name, kept[name], names) for name in MEASUREMENTS if name in kept)


def _section(name: str, kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    try:
        built: Section = section_module(name).section(kept, names)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise UserError(
            f"the stored result of '{name}' must have this version's format ({type(error).__name__}: {error}). "
            f"Delete measures/{name}.json in the run folder, or measure again: kronsae eval {name}."
        ) from None
    return built
