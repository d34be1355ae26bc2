"""What may be said in public of where a run's model and text come from: Hub names, and no paths of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from kronsae.data.hub import looks_like_path
from kronsae.data.model import BUNDLED
from kronsae.data.named_models import NAMED


@dataclass(frozen=True)
class Origin:
    """Where a model or a text comes from.

    Args:
        name: what to call it; of a local file or folder its last part.
        hub_name: its name on the Hub; None: it is not from there.
        about: further words, such as ``"a local file or folder"``.
    """

    name: str
    hub_name: str | None = None
    about: str = ""

    def __str__(self) -> str:
        return f"`{self.name}`{f' ({self.about})' if self.about else ''}"


def origin_of(source: str) -> Origin:
    """Return the origin of a model or text, given by its name in the run's config."""
    if source == BUNDLED:
        return Origin(source, about="part of the kronsae package")
    if source in NAMED:
        return Origin(source, about=NAMED[source].source)
    if looks_like_path(source) or Path(source).expanduser().exists():
        return Origin(PureWindowsPath(source).name or source, about="a local file or folder")
    return Origin(source, hub_name=source)


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of an SAE's ``cfg.json`` without the paths of this machine."""
    metadata = dict(config.get("metadata", {}))
    if isinstance(name := metadata.get("model_name"), str):
        metadata["model_name"] = origin_of(name).name
    if isinstance(text := metadata.get("text"), Mapping) and isinstance(source := text.get("source"), str):
        metadata["text"] = {**text, "source": origin_of(source).name}
    return {**config, "metadata": metadata}
