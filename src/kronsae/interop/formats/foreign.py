"""An SAE that another library wrote, in our terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from kronsae.core.sae import SAE


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """An SAE read from the files of another library.

    Args:
        sae: the SAE; it takes raw activations and gives the latents and reconstructions of the original.
        format: name of the format (`kronsae.interop.formats.FORMATS`).
        architecture: what the other library calls it, such as ``gated``.
        model: name of the language model that the files state; None: they state none.
        hook_read: hook that it reads, as the other library writes it (``blocks.6.hook_resid_post``); None: not stated.
        hook_write: hook that it writes, if this is another one.
        settings: further statements of the files that a user may want to see (context length, data set).
    """

    sae: SAE
    format: str
    architecture: str
    model: str | None = None
    hook_read: str | None = None
    hook_write: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Files(NamedTuple):
    """Names of the files of an SAE in a folder.

    Args:
        weights: the weights.
        config: the config; None: the format has none.
    """

    weights: str
    config: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """The config, if there is one, and the weights."""
        return (self.weights,) if self.config is None else (self.config, self.weights)

    def __str__(self) -> str:
        return " and ".join(self.names)


class Format(Protocol):
    """Interface of a format's module, with the names of the files of an SAE; ``CONFIG_FILE`` is None without config."""

    WEIGHTS_FILE: str
    CONFIG_FILE: str | None

    def recognizes(self, folder: Path) -> bool:
        """Return whether the folder's files have this format, by their names and the config's keys alone."""
        ...

    def read(self, folder: Path, device: torch.device | str = "cpu") -> Foreign:
        """Read the SAE; files are data from strangers and may hold anything.

        Raises:
            UserError: damaged files, or settings that cannot be represented exactly.
        """
        ...
