"""A cache of latents as delphi (eai-delphi 0.1.3) writes and reads it, straight from sparse codes.

delphi runs model and SAE itself, forms dense activations and keeps all of them in memory until it saves. This writer
takes sparse codes batch by batch and keeps one split in memory. The layout of ``latents/MODULE/``::

    config.json                the fields of delphi's CacheConfig, and model_name, which it gives to AutoTokenizer
    START_END.safetensors      the latents START to END (inclusive):
        locations    [n, 3]    row, position, latent - START; uint16 where all fit, else uint32
        activations  [n]       float16
        tokens       [rows, T] int64, the same in every file

As in delphi, the boundaries of n splits are ``linspace(0, d_sae, n + 1)``, entries are in the order of row, position
and latent, and an activation counts if it is above 1e-5.
"""

from __future__ import annotations

import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from safetensors.numpy import save_file
from torch import Tensor

from kronsae.core.checks import check_count
from kronsae.core.codes import SparseCodes
from kronsae.support.errors import UserError
from kronsae.support.files import write_json

LEAST = 1e-5
"""Activations up to here are no activations for delphi."""

LARGEST = float(np.finfo(np.float16).max)

ENTRY = np.dtype([("row", "<u4"), ("position", "<u4"), ("latent", "<u4"), ("value", "<f2")])
"""One activation, as it is kept on disk until the split is written."""


def boundaries(d_sae: int, splits: int) -> list[tuple[int, int]]:
    """Return first and last latent of each split, as delphi divides ``d_sae`` latents."""
    edges = torch.linspace(0, d_sae, steps=splits + 1).long().tolist()
    return [(start, end - 1) for start, end in pairwise(edges)]


class CacheWriter:
    """Write the cache of one module; as a context manager, it leaves the whole cache or nothing.

    Args:
        latents: the folder ``latents``; the cache becomes its subfolder ``module``.
        module: name of the module, such as ``layers.3``.
        d_sae: F, number of latents.
        splits: number of files.
        config: what ``config.json`` says besides sizes.

    Raises:
        UserError: there is a cache of this module, the splits do not fit the latents, or an activation is too large
            for float16.
    """

    def __init__(self, latents: Path, module: str, *, d_sae: int, splits: int, config: dict[str, Any]) -> None:
        check_count("splits", splits)
        if splits > d_sae:
            raise UserError(f"splits must be at most the {d_sae} latents; got {splits}.")
        self._target = latents / module
        if self._target.exists():
            raise UserError(f"out must hold no cache of {module} yet; {self._target} exists. Choose another folder.")
        self._splits, self._config = boundaries(d_sae, splits), config
        self._starts = np.array([start for start, _ in self._splits])
        self._tokens: list[np.ndarray[Any, Any]] = []
        self.rows = 0
        self.entries = 0

    def __enter__(self) -> CacheWriter:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self._target.name}.", suffix=".part", dir=self._target.parent))
        self._parts = [(self._folder / f"{start}.part").open("w+b") for start, _ in self._splits]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for part in self._parts:
                part.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, tokens_ST: Int[Tensor, "S T"], keep_ST: Bool[Tensor, "S T"], codes: SparseCodes) -> None:
        """Add windows.

        Args:
            tokens_ST: token ids; T is the same for all windows.
            keep_ST: the tokens that were encoded: an SAE is not trained on special tokens.
            codes: their codes, ``[number of kept tokens, K]``, window by window.
        """
        places = keep_ST.cpu().nonzero()
        values, latents = codes.values.detach().float().cpu().numpy(), codes.indices.cpu().numpy()
        on = values > LEAST
        if on.any() and (largest := float(values.max())) > LARGEST:
            raise UserError(
                f"activations must be at most {LARGEST:g}, because delphi keeps them in float16; got {largest:g}. "
                "Train on normalised activations, or scale the model's."
            )
        token, slot = on.nonzero()
        found = np.empty(len(token), ENTRY)
        found["row"] = places[:, 0].numpy()[token] + self.rows
        found["position"] = places[:, 1].numpy()[token]
        found["latent"] = latents[token, slot]
        found["value"] = values[token, slot]
        found = found[np.lexsort((found["latent"], token))]
        split = np.searchsorted(self._starts, found["latent"], side="right") - 1
        for number, part in enumerate(self._parts):
            part.write(found[split == number].tobytes())
        self._tokens.append(tokens_ST.cpu().numpy().astype(np.int64))
        self.rows += len(tokens_ST)
        self.entries += len(found)

    def _finish(self) -> None:
        if not self.rows:
            raise UserError("the cache must hold at least one window; got none. Give more text or tokens.")
        tokens = np.concatenate(self._tokens)
        for (start, end), part in zip(self._splits, self._parts, strict=True):
            part.seek(0)
            found = np.frombuffer(part.read(), ENTRY)
            small = max(self.rows, tokens.shape[1], end + 1 - start) <= 2**16
            locations = np.empty((len(found), 3), np.uint16 if small else np.uint32)
            locations[:, 0], locations[:, 1] = found["row"], found["position"]
            locations[:, 2] = found["latent"] - start
            tensors = {"locations": locations, "activations": found["value"].copy(), "tokens": tokens}
            save_file(tensors, self._folder / f"{start}_{end}.safetensors")
            part.close()
            (self._folder / f"{start}.part").unlink()
        sizes = {
            "cache_ctx_len": tokens.shape[1],
            "ctx_len": tokens.shape[1],  # delphi 0.1.3 writes one name and reads the other
            "n_tokens": tokens.size,
            "n_splits": len(self._splits),
        }
        write_json(self._folder / "config.json", self._config | sizes)
        self._folder.chmod(0o755)
        self._folder.rename(self._target)
