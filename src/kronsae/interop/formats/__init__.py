"""SAEs in the file formats of other libraries: one module per format, and the registry that recognises them.

A module defines ``recognizes(folder)`` and ``read(folder, device)``. Nothing of the other library is imported: a format
is a config and tensors. Whatever another encoder computes is written in our terms (dense or Kronecker encoder, TopK or
JumpReLU) exactly, so every measurement, report and pursuit works on the result.
"""

from __future__ import annotations

from collections.abc import Container
from importlib import import_module
from pathlib import Path

import torch

from kronsae.interop.formats.foreign import Files, Foreign, Format
from kronsae.support.errors import UserError

__all__ = ["FORMATS", "Files", "Foreign", "Format", "all_files", "files_among", "format_module", "read", "recognize"]

FORMATS: dict[str, str] = {
    "sae_lens": "sae_lens",
    "gemma_scope": "gemma_scope",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
}
"""Names of the formats, and the module of each in this package; recognised in this order."""


def format_module(name: str) -> Format:
    """Return the module of a format, imported when it is needed."""
    module: Format = import_module(f"{__name__}.{FORMATS[name]}")
    return module


def all_files() -> list[Files]:
    """Return the files of each format; those of SAELens have the names that kronsae gives its own."""
    modules = [format_module(name) for name in FORMATS]
    return [Files(module.WEIGHTS_FILE, module.CONFIG_FILE) for module in modules]


def files_among(names: Container[str]) -> Files | None:
    """Return the files of the SAE that a folder with files of these names holds; None: it holds none."""
    return next((files for files in all_files() if all(one in names for one in files.names)), None)


def recognize(folder: Path) -> str | None:
    """Return the name of the format that the files of a folder have; None if no format is recognised."""
    return next((name for name in FORMATS if format_module(name).recognizes(folder)), None)


def read(folder: Path, device: torch.device | str = "cpu") -> Foreign:
    """Read an SAE of another library.

    Raises:
        UserError: the folder has none of the formats, or its files are damaged or ask for something that is not
            supported.
    """
    name = recognize(folder)
    if name is None:
        raise UserError(f"{folder} must hold an SAE in a known format ({', '.join(FORMATS)}); it has none of them.")
    foreign = format_module(name).read(folder, device)
    if (weight := foreign.sae.unsound_weight()) is not None:
        raise UserError(f"{folder}: weights must be finite in float32; {weight} holds NaN or infinity.")
    return foreign
