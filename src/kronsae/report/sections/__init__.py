"""From the kept result of each measurement to its section of the page.

A builder takes ``{"measure", "settings", "provenance", "result"}`` as `kronsae.measures` keeps it, and the names of the
page's SAEs in order (their places are the numbers of their colours).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kronsae.report.section import Section
from kronsae.report.sections import absorption, autointerp, interaction, latents, probing, synthetic, token_rule, toy
from kronsae.support.errors import UserError

Builder = Callable[[Mapping[str, Any], Sequence[str]], Section]

BUILDERS: dict[str, Builder] = {
    "latents": latents.section,
    "interaction": interaction.section,
    "autointerp": autointerp.section,
    "token-rule": token_rule.section,
    "synthetic": synthetic.section,
    "toy": toy.section,
    "absorption": absorption.section,
    "probing": probing.section,
}


def sections(kept: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> tuple[Section, ...]:
    """The sections of the results that are there, in the order of `BUILDERS`.

    Raises:
        UserError: a result is not what this version keeps.
    """
    return tuple(_section(name, kept[name], names) for name in BUILDERS if name in kept)


def _section(name: str, kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    try:
        return BUILDERS[name](kept, names)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise UserError(
            f"the kept result of '{name}' is not what this version writes ({type(error).__name__}: {error}). "
            f"Delete measures/{name}.json in the run folder, or measure again: kronsae eval {name}."
        ) from None
