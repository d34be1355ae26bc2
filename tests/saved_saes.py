"""Replacement of a saved SAE's weights on disk, with a valid checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kronsae.support.files import sha256
from kronsae.support.sealed import write_sealed


def replace_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Replace the weights of a saved SAE, and their checksum in ``cfg.json``."""
    save_file(dict(weights), folder / "sae_weights.safetensors")
    path = folder / "cfg.json"
    config = json.loads(path.read_text()) | {"weights_sha256": sha256(folder / "sae_weights.safetensors")}
    write_sealed(path, config)
