"""Which SAE is meant, where a run folder, a folder of folders or a repository of the Hub holds several."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from kronsae.interop.formats import files_among
from kronsae.support.errors import UserError, nearest, shown, shown_text

RUN_FOLDER = "saes"
"""Folder of the SAEs in a run folder, and in a repository that `kronsae push` filled."""

SHOWN_NAMES = 20

MAX_FOLDERS = 10_000
"""Local folders that are looked into."""

MAX_DEPTH = 5


def choose(folders: Iterable[str], name: str | None, *, where: str, source: str) -> str:
    """Return the folder of the SAE that is meant.

    Args:
        folders: folders with an SAE, below the source; ``"."`` is the source itself. At least one.
        name: name of the SAE in a run, its folder, or a folder with only one SAE; None: the only one. The SAEs in
            ``saes/`` come first.
        where: the source, for messages.
        source: the source as the user gave it.

    Raises:
        UserError: it could be several, or none has this name.
    """
    known = {folder.removeprefix(f"{RUN_FOLDER}/"): folder for folder in sorted(folders, key=_natural)}
    if name is None:
        if "." in known:
            return "."
        own = [short for short, folder in known.items() if folder.startswith(f"{RUN_FOLDER}/")]
        inside = own or list(known)
    else:
        name = name.strip("/") if name.strip("/") else name
        if name in known:
            return known[name]
        if name in known.values():
            return name
        inside = [short for short, folder in known.items() if f"{folder}/".startswith(f"{name}/")]
    if len(inside) == 1:
        return known[inside[0]]
    if inside:
        place = where if name is None else f"{shown_text(name)} of {where}"
        raise UserError(
            f"{place} holds {len(inside)} SAEs: {_listed(inside)}. Give the name or the folder of one of them: "
            f"{inside[0]!r}, or {source}/{known[inside[0]]}."
        )
    assert name is not None
    hint = nearest(name, dict.fromkeys([*known, *known.values()]))
    raise UserError(f"name must be one of {_listed(known)} for {where}; got {shown(name)}.{hint}")


def _listed(names: Iterable[str]) -> str:
    shown_names = [shown_text(name) for name in names if name != "."]
    more = len(shown_names) - SHOWN_NAMES
    return ", ".join(shown_names[:SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _natural(text: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts layer_2 before layer_10."""
    return [(part.isdecimal(), int(part[:18]) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", text)]


def folders_below(folder: Path) -> list[str]:
    """Return the folders below a folder that hold an SAE, by the names of their files; links are not followed."""
    found = []
    for number, (place, below, files) in enumerate(os.walk(folder)):
        path = Path(place).relative_to(folder)
        below[:] = [] if len(path.parts) >= MAX_DEPTH else sorted(one for one in below if not one.startswith("."))
        if path.parts and files_among(files) is not None:
            found.append(path.as_posix())
        if number >= MAX_FOLDERS:
            break
    return found
