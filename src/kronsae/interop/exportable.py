"""What is exported to the format of another library: an SAE, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kronsae.core.sae import SAE


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """An SAE with what the files of other libraries state about it.

    Args:
        name: its name in the run.
        sae: the SAE, as saved: it takes raw activations.
        model: name of the language model; None: not known.
        hooks_read: hooks that it reads, as our hooks (``layers.6``).
        hooks_written: hooks that it writes; the same as ``hooks_read`` for an SAE.
        context_length: tokens in a window of the language model; None: not known.
        text: source of the text; None: not known.
        metadata: all that ``cfg.json`` states about its training.
    """

    name: str
    sae: SAE
    model: str | None = None
    hooks_read: tuple[str, ...] = ()
    hooks_written: tuple[str, ...] = ()
    context_length: int | None = None
    text: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote.

    Args:
        folders: by name of the SAE: the folder (or file) that holds it.
        remarks: sentences for the user, such as what the other library has to import first.
        next_steps: commands or code that open the result.
    """

    folders: Mapping[str, Path]
    remarks: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()


class Target(Protocol):
    """Interface of the module of a target of ``kronsae export``."""

    def check(self, saes: tuple[Exportable, ...]) -> None:
        """Refuse SAEs that the format cannot hold exactly; called before anything is written.

        Raises:
            UserError: which SAE, why, and what to do instead.
        """
        ...

    def export(self, saes: tuple[Exportable, ...], out: Path) -> Exported:
        """Write the SAEs into ``out``, a new or empty folder; each file atomically."""
        ...


def folder_of(one: Exportable, saes: tuple[Exportable, ...], out: Path) -> Path:
    """Return the folder of one SAE: ``out`` itself for a single SAE, otherwise ``out/<name>``."""
    return out if len(saes) == 1 else out / one.name
