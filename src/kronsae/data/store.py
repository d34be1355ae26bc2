"""Write activations to disk as safetensors shards with a manifest, and read them in random order.

A folder contains ``activations-00000.safetensors``, ... with one tensor ``[tokens, d_in]`` per hook, and
``manifest.json`` with the format, dtype, number of tokens, width of every hook, size and SHA-256 of every shard, and
the writer's metadata on the model and the text. The manifest is written last, so a folder with a manifest is complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kronsae.data.buffer import ActivationRows, Activations, EpochRows
from kronsae.data.model import DTYPES
from kronsae.data.shuffle import BlockReader
from kronsae.data.stream import State
from kronsae.support.errors import UserError, nearest
from kronsae.support.files import atomic_path, check_folder_place, read_json, sha256, write_json

FORMAT = "kronsae-activations-1"
MANIFEST = "manifest.json"
# Shards whose SHA-256 is checked in parallel; more threads do not read faster.
CHECKING_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard: file name, number of tokens and SHA-256."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of a folder of activations.

    Args:
        format: Name and version of the format.
        dtype: Precision on disk.
        tokens: Total number of rows in all shards.
        d_in: Width of the activations, by hook.
        shards: The shards, in the order in which they were harvested.
        metadata: The writer's metadata: model, text, context length, ...
    """

    format: str
    dtype: str
    tokens: int
    d_in: dict[str, int]
    shards: tuple[Shard, ...]
    metadata: dict[str, Any]


def write_activations(
    stream: Iterable[tuple[Mapping[str, Tensor], State]],
    folder: Path | str,
    *,
    tokens: int,
    shard_tokens: int = 1_000_000,
    dtype: str = "float32",
    metadata: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the first ``tokens`` rows of a stream into a new or empty folder.

    Each file is written atomically. If an error occurs, the files already written are removed.

    Args:
        stream: Activations by hook, such as an ActivationStream or a ShuffleBuffer.
        folder: Folder to write into.
        tokens: Number of rows to write.
        shard_tokens: Rows in a file. A shard takes ``shard_tokens * d_in * 4`` bytes of memory per hook.
        dtype: Precision on disk: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        metadata: Metadata for the manifest, which must be representable as JSON.

    Raises:
        UserError: If the folder is not empty, the stream has too few rows, or a value exceeds the dtype's range.
    """
    folder = Path(folder)
    check_target(folder, dtype)
    if tokens < 1 or shard_tokens < 1:
        raise UserError(f"tokens and shard_tokens must be at least 1; got {tokens} and {shard_tokens}.")
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    try:
        return _write(stream, folder, tokens, shard_tokens, dtype, dict(metadata or {}), written)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        if not existed:
            folder.rmdir()
        raise


def check_target(folder: Path, dtype: str) -> None:
    """Raise the errors of ``write_activations`` that can be detected before any activations are computed."""
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}; got '{dtype}'.{nearest(dtype, DTYPES)}")
    check_folder_place(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"out must be a new or empty folder; {folder} contains files. Give another folder, or remove it."
        )


def _write(
    stream: Iterable[tuple[Mapping[str, Tensor], State]],
    folder: Path,
    tokens: int,
    shard_tokens: int,
    dtype: str,
    metadata: dict[str, Any],
    written: list[Path],
) -> Manifest:
    store = ActivationRows(min(shard_tokens, tokens))
    reader = BlockReader(lambda *, state=None: stream, store)
    shards: list[Shard] = []
    d_in: dict[str, int] = {}
    left = tokens
    while left > 0:
        count = reader.read(torch.arange(min(shard_tokens, left)))
        if count == 0:
            raise UserError(
                f"tokens must not exceed the number of tokens in the text; got {tokens} with {tokens - left}. "
                "Give more text or fewer tokens."
            )
        rows = store.first(count)
        path = folder / f"activations-{len(shards):05d}.safetensors"
        written.append(path)
        with atomic_path(path) as temporary:
            save_file({hook: _narrow(values, hook, dtype) for hook, values in rows.items()}, temporary)
            shards.append(Shard(file=path.name, tokens=count, sha256=sha256(temporary)))
        d_in = {hook: values.shape[1] for hook, values in rows.items()}
        left -= count
    manifest = Manifest(format=FORMAT, dtype=dtype, tokens=tokens, d_in=d_in, shards=tuple(shards), metadata=metadata)
    write_json(folder / MANIFEST, asdict(manifest))
    return manifest


def _narrow(values: Tensor, hook: str, dtype: str) -> Tensor:
    narrow = values.to("cpu", DTYPES[dtype]).contiguous()
    if not bool(narrow.isfinite().all()):
        raise UserError(
            f"dtype must represent every activation; got {dtype} with {values.abs().max().item():g} at hook '{hook}'. "
            "Give bfloat16 or float32."
        )
    return narrow


def read_manifest(folder: Path | str) -> Manifest:
    """Return the manifest of a folder, after checking that its files exist.

    Raises:
        UserError: If the manifest or one of its files is missing, or the manifest is damaged.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"folder must contain harvested activations; '{folder}' has no {MANIFEST}. Harvest into it first."
        )
    fields = read_json(path, "harvested activations")
    try:
        manifest = Manifest(**{**fields, "shards": tuple(Shard(**shard) for shard in fields["shards"])})
    except (TypeError, KeyError) as error:
        raise _damaged(path) from error
    plain_names = all(Path(shard.file).name == shard.file for shard in manifest.shards)
    if not manifest.shards or not manifest.d_in or not plain_names:
        raise _damaged(path)
    if manifest.format != FORMAT:
        raise UserError(
            f"{MANIFEST} must have the format {FORMAT}; got '{manifest.format}' in '{path}'. Harvest again, or read it "
            "with the version that wrote it."
        )
    for shard in manifest.shards:
        if not (folder / shard.file).is_file():
            raise UserError(
                f"folder must contain every shard of {MANIFEST}; '{folder / shard.file}' is missing. Harvest again."
            )
    return manifest


class StoredActivations:
    """Yield ``({hook: values_BD}, state)`` from a folder of activations, in random order.

    Every epoch has a new random order of all rows of all shards. The state is ``{"epoch", "next_batch"}``. Shards are
    memory-mapped and only the rows of a batch are read, so that memory does not depend on the size of the folder. Each
    shard's SHA-256 is compared with the manifest before the first batch, which reads every file once.

    Args:
        folder: Folder written by ``write_activations``.
        batch_size: Rows in a batch. Rows that do not fill the last batch of an epoch are dropped from that epoch.
        seed: Seed of the order.
        repeat: Whether to repeat the data indefinitely.
        device: Device of the batches.
        hooks: Hooks to read; None reads all harvested hooks.
        share: ``(i, n)`` reads rows i, i + n, i + 2n, ... of each batch: the share of one of n processes.
        state: State yielded with a batch; iteration resumes after that batch.

    Raises:
        UserError: If the folder or one of its files is missing or damaged, a hook is missing, there are fewer rows than
            ``batch_size``, or the state was written by an incompatible version.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        batch_size: int,
        seed: int = 0,
        repeat: bool = True,
        device: torch.device | str = "cpu",
        hooks: Sequence[str] | None = None,
        share: tuple[int, int] = (0, 1),
        state: State | None = None,
    ) -> None:
        self.manifest = read_manifest(folder)
        self._folder = Path(folder)
        self._hooks = tuple(self.manifest.d_in if hooks is None else hooks)
        for hook in self._hooks:
            if hook not in self.manifest.d_in:
                raise UserError(
                    f"hooks must be among those harvested into {folder}: {', '.join(self.manifest.d_in)}; got '{hook}'."
                    f"{nearest(hook, self.manifest.d_in)}"
                )
        self._device = torch.device(device)
        self._share = slice(share[0], None, share[1])
        self._rows = EpochRows(
            sum(shard.tokens for shard in self.manifest.shards),
            batch_size=batch_size,
            seed=seed,
            repeat=repeat,
            state=state,
        )

    def __iter__(self) -> Iterator[tuple[Activations, State]]:
        shards = self._open()
        ends = np.cumsum([shard.tokens for shard in self.manifest.shards])
        for rows, state in self._rows:
            own = rows[self._share]
            yield {hook: _take(shards[hook], ends, own).to(self._device) for hook in self._hooks}, state

    def _open(self) -> dict[str, list[Tensor]]:
        """Return the shards of each hook, memory-mapped, after checking their SHA-256."""
        paths = [self._folder / shard.file for shard in self.manifest.shards]
        with ThreadPoolExecutor(min(CHECKING_THREADS, os.cpu_count() or 1)) as threads:
            list(threads.map(_verify, paths, self.manifest.shards))
        shards: dict[str, list[Tensor]] = {hook: [] for hook in self._hooks}
        for path, shard in zip(paths, self.manifest.shards, strict=True):
            try:
                with safe_open(path, framework="pt") as file:
                    for hook, found in shards.items():
                        found.append(file.get_tensor(hook))
            except SafetensorError as error:
                raise _damaged(path) from error
            if any(found[-1].shape != (shard.tokens, self.manifest.d_in[hook]) for hook, found in shards.items()):
                raise _damaged(path)
        return shards


def _take(shards: Sequence[Tensor], ends: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> Tensor:
    """Return a copy of the given rows in float32; each shard is read in ascending order of its rows.

    Args:
        shards: Values of one hook in each shard.
        ends: Cumulative number of rows at the end of each shard.
        rows: Row indices, counted over all shards.
    """
    values = torch.empty((len(rows), shards[0].shape[1]))
    order = np.argsort(rows)
    of_shard = np.searchsorted(ends, rows[order], side="right")
    for number in np.unique(of_shard):
        chosen = order[of_shard == number]
        within = rows[chosen] - ends[number] + len(shards[number])
        values[torch.from_numpy(chosen)] = shards[number][torch.from_numpy(within)].float()
    return values


def _verify(path: Path, shard: Shard) -> None:
    try:
        about = path.stat()
        matches = _sha256_at(path, about.st_size, about.st_mtime_ns) == shard.sha256
    except OSError:
        matches = False
    if not matches:
        raise _damaged(path)


def _damaged(path: Path) -> UserError:
    return UserError(f"'{path}' must be unchanged since it was written; it is damaged. Harvest again.")


@cache
def _sha256_at(path: Path, size: int, modified_ns: int) -> str:
    """Return the SHA-256 of a file, cached by size and time, so that a plan and its training read a folder once."""
    return sha256(path)
