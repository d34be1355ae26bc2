"""Reading the files of strangers: configs and tensors, with sizes compared before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from kronsae.core.checkpoint import MAX_CONFIG_BYTES
from kronsae.support.config import checked
from kronsae.support.errors import UserError
from kronsae.support.files import file_bytes, read_json
from kronsae.support.resources import check_memory
from kronsae.support.tensors import FLOATS, TensorHeader, read_headers, read_tensors

V = TypeVar("V")

WHAT = "the SAE"

UNREADABLE = (SafetensorError, OSError, MemoryError)
"""What reading a safetensors file raises; MemoryError: it is too large to be mapped, such as a file of holes."""


def read_config(path: Path) -> dict[str, Any]:
    """Return a config of at most 16 MB, which must be a JSON object."""
    found = read_json(path, WHAT, max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(found, dict):
        raise UserError(f"{WHAT}: {path} must be a JSON object; it is a {type(found).__name__}.")
    return found


def value(config: Mapping[str, Any], key: str, hint: type[V], where: object, default: V | None = None) -> V:
    """Return a value of a config.

    Args:
        config: the config, or a part of it.
        key: its key.
        hint: its type.
        where: file (and place) of the config, for messages.
        default: value of a missing key; None: the key must be there.

    Raises:
        UserError: it is missing or of another type.
    """
    if key not in config:
        if default is None:
            raise UserError(f"{where}: {key} is missing.")
        return default
    return cast(V, checked(hint, config[key], f"{where}: {key}"))


def optional(config: Mapping[str, Any], key: str, hint: type[V]) -> V | None:
    """Return a value that only informs, such as the name of the model; None if it is missing or of another type."""
    found = config.get(key)
    return found if isinstance(found, hint) and not isinstance(found, bool) else None


def check_shapes(path: Path, headers: Mapping[str, TensorHeader], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors of other names, shapes or types than those of a format.

    Raises:
        UserError: a tensor is missing, surplus, of another shape, or not of floating-point numbers.
    """
    found = {name: header.shape for name, header in headers.items()}
    if wrong := sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name)):
        detail = "; ".join(f"{name}: expected {expected.get(name)}, found {found.get(name)}" for name in wrong[:5])
        raise UserError(f"{path} does not fit its config ({detail}). Save or download the SAE again.")
    if others := sorted({header.dtype for header in headers.values()} - FLOATS.keys()):
        raise UserError(f"{path}: weights must be of type {', '.join(FLOATS)}; got {', '.join(others)}.")


def headers_of(path: Path) -> dict[str, TensorHeader]:
    """Return type and shape of each tensor of a safetensors file that fits into memory."""
    check_memory(file_bytes(path, WHAT), f"{WHAT} {path}", "Free memory, or use a larger machine.")
    try:
        return read_headers(path)
    except UNREADABLE as error:
        raise damaged(path, error) from None


def tensors_of(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file whose headers were checked."""
    try:
        return read_tensors(path, device)
    except UNREADABLE as error:
        raise damaged(path, error) from None


def damaged(path: Path, reason: object) -> UserError:
    """Return the error of a damaged file."""
    return UserError(f"{WHAT}: {path} is damaged ({reason}). Save or download it again.")
