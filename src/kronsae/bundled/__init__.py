"""The small language model inside the package: no download, no account, no GPU."""

from __future__ import annotations

from pathlib import Path

NAME = "bundled"
"""Model name that stands for :func:`path` wherever a model name is accepted."""


def path() -> Path:
    """Return the folder of the model, as ``from_pretrained`` expects it.

    Example:
        >>> path().name
        'model'
    """
    return Path(__file__).parent / "model"


__all__ = ["NAME", "path"]
