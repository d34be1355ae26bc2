"""Storage of `torch.distributed.checkpoint` in safetensors and JSON: nothing in it is executed when it is read.

``layout.json`` says for each tensor its dtype, its shape, and of which chunks it consists; for each chunk its place in
the tensor, its file and its name there. Each process writes one file. A checkpoint of a single process, one safetensors
file with whole tensors and no layout, is read too. Checksums of all files are in ``progress.json``, like those of a
single process (`kronsae.training.state`).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from kronsae.support.errors import UserError
from kronsae.support.files import atomic_path, fingerprint, read_json, write_json
from kronsae.support.tensors import read_headers
from kronsae.training.state import LAYOUT, STATE, NewCheckpoint

FORMAT = "kronsae-shards-2"
FIRST_FORMAT = "kronsae-shards-1"
"""Format of earlier versions, with checksums in the layout, which are not compared any more."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "I64": torch.int64}
"""Types of the tensors of a training's state, by their name in a safetensors file."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter(StorageWriter):
    """Writes the chunks that a plan gives to this process into ``state-<rank>.safetensors``.

    In process 0, size and SHA-256 of the files of all processes are entered into the checkpoint in the end.

    Args:
        new: the checkpoint.
        rank: rank of this process.
    """

    def __init__(self, new: NewCheckpoint, rank: int) -> None:
        self._new, self._path = new, new.folder / f"state-{rank:05d}.safetensors"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the folder exists."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        chunks: dict[str, Tensor] = {}
        results = []
        for number, item in enumerate(plan.items):
            found = planner.resolve_data(item)
            assert isinstance(found, Tensor)  # a state holds nothing else
            tensor = found.detach().cpu().contiguous()
            chunks[str(number)] = tensor
            where = {"file": self._path.name, "key": str(number), "dtype": NAMES[tensor.dtype]}
            results.append(WriteResult(item.index, tensor.nbytes, where))
        if chunks:
            with atomic_path(self._path) as temporary:
                save_file(chunks, temporary)
                written = fingerprint(temporary)
            for result in results:
                result.storage_data["written"] = written
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = {result.index: result.storage_data for of_rank in results for result in of_rank}
        tensors: dict[str, Any] = {}
        for name, about in metadata.state_dict_metadata.items():
            assert isinstance(about, TensorStorageMetadata)
            chunks = [
                {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes)}
                | {key: written[MetadataIndex(name, chunk.offsets)][key] for key in ("file", "key")}
                for chunk in about.chunks
            ]
            tensors[name] = {"dtype": NAMES[about.properties.dtype], "size": list(about.size), "chunks": chunks}
        for where in written.values():
            if not (self._new.folder / where["file"]).exists():
                raise UserError(
                    f"out must be on a file system that all processes see; {where['file']} is missing there"
                )
            self._new.files[where["file"]] = where["written"]
        write_json(self._new.folder / LAYOUT, {"format": FORMAT, "tensors": tensors})
        self._new.files[LAYOUT] = fingerprint(self._new.folder / LAYOUT)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()


class ShardReader(StorageReader):
    """Reads the chunks that a plan asks for.

    Args:
        folder: the checkpoint, which was verified (`kronsae.training.state.verified`).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[MetadataIndex, tuple[str, str]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader reads one checkpoint."""

    def read_metadata(self) -> Metadata:
        layout = self._layout()
        tensors: dict[str, Any] = {}
        for name, about in layout.items():
            chunks = [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in about["chunks"]]
            properties = TensorProperties(dtype=DTYPES[about["dtype"]])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(about["size"]), chunks)
            for chunk in about["chunks"]:
                self._files[MetadataIndex(name, chunk["offsets"])] = (chunk["file"], chunk["key"])
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `read_metadata` keeps where the chunks are."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            file, key = self._files[item.storage_index]
            by_file[file].append((key, item))
        for name, wanted in by_file.items():
            with safe_open(self._folder / name, framework="pt") as file:
                for key, item in wanted:
                    places = tuple(
                        slice(start, start + length)
                        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(file.get_slice(key)[places] if places else file.get_tensor(key))
                    planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()

    def _layout(self) -> Mapping[str, Any]:
        """Return the tensors as in the layout file; without one, those of a checkpoint of a single process."""
        if not (self._folder / LAYOUT).exists():
            headers = read_headers(self._folder / STATE)
            return {
                name: {"dtype": about.dtype, "size": about.shape, "chunks": [_whole(name, about.shape)]}
                for name, about in headers.items()
            }
        layout = read_json(self._folder / LAYOUT, "the checkpoint")
        if layout["format"] not in (FORMAT, FIRST_FORMAT):
            raise UserError(f"{LAYOUT} must have the format {FORMAT}; got {layout['format']!r}.")
        tensors: Mapping[str, Any] = layout["tensors"]
        return tensors


DAMAGES = (SafetensorError, OSError, UserError, KeyError, TypeError, ValueError, AttributeError)
"""What reading a damaged checkpoint raises, besides `torch.distributed.checkpoint.CheckpointException`."""


def _whole(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"offsets": [0] * len(shape), "sizes": list(shape), "file": STATE, "key": name}


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
