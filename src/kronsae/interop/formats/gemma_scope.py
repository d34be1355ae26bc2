"""Gemma Scope (Lieberum et al. 2024): JumpReLU SAEs and transcoders in a folder with ``params.npz``.

``z = p`` where ``p = W_enc^T x + b_enc > threshold``; ``x_hat = z W_dec + b_dec (+ W_skip x)``. The file is a ZIP
archive of NumPy arrays ``W_enc [d_in, d_sae]``, ``b_enc``, ``W_dec [d_sae, d_out]``, ``b_dec``, ``threshold`` and, of a
skip transcoder, ``W_skip [d_out, d_in]``. There is no config: model, layer and kind are read from the folders' names,
such as ``gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82``.
"""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kronsae.core.checks import check_count
from kronsae.interop.formats import convert
from kronsae.interop.formats.foreign import Foreign
from kronsae.interop.formats.reading import check_reading, damage_of, damaged, open_zip
from kronsae.support.errors import UserError, shown_text

WEIGHTS_FILE = "params.npz"
CONFIG_FILE = None
TENSORS = {"w_enc", "b_enc", "w_dec", "b_dec", "threshold"}
MAX_HEADER_BYTES = 10_000
MAX_EXPANSION = 20
"""Largest ratio between unpacked and packed bytes; trained weights shrink by a tenth."""

SPARE_BYTES = 2**24
"""Unpacked bytes that are allowed at any ratio: biases may all be 0."""

PLACES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
"""Hook in a block by the kind of a repository."""


class Member(NamedTuple):
    """An array of the archive: its entry there, shape and type."""

    entry: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def recognizes(folder: Path) -> bool:
    """Return whether the folder has a ``params.npz``."""
    return (folder / WEIGHTS_FILE).exists()


def read(folder: Path, device: torch.device | str = "cpu") -> Foreign:
    """Read the SAE; names of arrays may be upper or lower case.

    Raises:
        UserError: the archive is damaged or a bomb, holds anything but these arrays, or their sizes do not fit.
    """
    path = folder / WEIGHTS_FILE
    with open_zip(path, "a zip archive as NumPy writes") as archive, damage_of(path):
        members = dict(_members(path, archive))
        _check(path, members, path.stat().st_size)
        found = {name: _array(path, archive, one).to(device) for name, one in members.items()}
    factor = found.pop("scaling_factor", None)
    if factor is not None and not bool(((factor - 1).abs() < 1e-5).all()):
        raise UserError(f"{path}: scaling_factor must be 1 everywhere, because it is not applied; it is not.")
    place = _place(folder)
    transcoder = place.transcoder or "w_skip" in found or found["b_dec"].shape != found["w_enc"].shape[:1]
    sae = convert.dense_sae(
        found["w_enc"].T,
        found["b_enc"],
        found["w_dec"],
        found["b_dec"],
        convert.thresholds(len(found["threshold"]), place.l0),
        thresholds_F=found["threshold"],
        W_skip_OD=found.get("w_skip"),
        transcoder=transcoder,
    )
    return Foreign(
        sae=sae,
        format="gemma_scope",
        architecture="jumprelu_transcoder" if transcoder else "jumprelu",
        model=place.model,
        hook_read=place.hook_read,
        hook_write=place.hook_write if transcoder else None,
        settings={} if place.l0 is None else {"l0": place.l0},
    )


def _members(path: Path, archive: zipfile.ZipFile) -> Iterator[tuple[str, Member]]:
    """Yield the arrays by lower-case name; only their headers are read."""
    seen: set[str] = set()
    for entry in archive.infolist():
        name = entry.filename.removesuffix(".npy").lower()
        if name not in TENSORS | {"w_skip", "scaling_factor"} or not entry.filename.endswith(".npy") or name in seen:
            raise UserError(
                f"{path}: arrays must be {', '.join(sorted(TENSORS))} and w_skip, each once; got "
                f"{shown_text(entry.filename)}."
            )
        seen.add(name)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise damaged(path, f"{name} is packed in another way than NumPy's")
        with archive.open(entry) as file:
            shape, dtype = _header(file)
            header_bytes = file.tell()
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise UserError(f"{path}: arrays must hold floating-point numbers; {name} holds {shown_text(dtype)}.")
        if header_bytes + math.prod(shape) * dtype.itemsize != entry.file_size:
            raise damaged(path, f"{name} does not have the size that its header states")
        yield name, Member(entry, shape, dtype)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError("the version of an array's header is not known")
    with warnings.catch_warnings():  # NumPy warns of headers that Python 2 wrote
        warnings.simplefilter("ignore")
        shape, _, dtype = readers[version](file, max_header_size=MAX_HEADER_BYTES)
    return shape, dtype


def _check(path: Path, members: Mapping[str, Member], size: int) -> None:
    """Refuse missing arrays, sizes that do not fit, archives that unpack to far more, and too little memory."""
    if missing := sorted(TENSORS - members.keys()):
        raise UserError(f"{path}: arrays must be {', '.join(sorted(TENSORS))}; {', '.join(missing)} is missing.")
    if len(members["w_enc"].shape) != 2 or len(members["b_dec"].shape) != 1:
        raise UserError(f"{path}: w_enc must have two dimensions and b_dec one; got other shapes.")
    (d_in, d_sae), (d_out,) = members["w_enc"].shape, members["b_dec"].shape
    for name, count in (("d_in", d_in), ("d_sae", d_sae), ("d_out", d_out)):
        check_count(f"{path}: {name}", count)
    expected = {
        "w_enc": (d_in, d_sae),
        "w_dec": (d_sae, d_out),
        "b_dec": (d_out,),
        "w_skip": (d_out, d_in),
        **dict.fromkeys(("b_enc", "threshold", "scaling_factor"), (d_sae,)),
    }
    for name, one in members.items():
        if one.shape != expected[name]:
            raise UserError(f"{path}: {name} must have shape {expected[name]}; it has {shown_text(one.shape)}.")
    unpacked = sum(one.entry.file_size for one in members.values())
    if unpacked > MAX_EXPANSION * size + SPARE_BYTES:
        raise UserError(
            f"{path} must not unpack to more than {MAX_EXPANSION} times its size; {size:,} bytes claim to hold "
            f"{unpacked:,}. These are no trained weights."
        )
    check_reading(path, (one.shape for one in members.values()))


def _array(path: Path, archive: zipfile.ZipFile, member: Member) -> Tensor:
    with archive.open(member.entry) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = np.lib.format.read_array(file, allow_pickle=False, max_header_size=MAX_HEADER_BYTES)
        if array.shape != member.shape or file.read(1):
            raise damaged(path, "an array does not have the size that its header states")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


class Place(NamedTuple):
    """What the names of the folders say."""

    model: str | None
    hook_read: str | None
    hook_write: str | None
    transcoder: bool
    l0: float | None


def _place(folder: Path) -> Place:
    name = folder.absolute().as_posix()
    repository = re.findall(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)(?=[/\-]|$)", name)
    layer = re.findall(r"(?:^|/)layer_(\d{1,3})(?=/|$)", name)
    l0 = re.findall(r"average_l0_(\d{1,6})(?=/|$)", name)
    size, tuned, kind = repository[-1] if repository else ("", "", "")
    block = f"blocks.{int(layer[-1])}." if layer else None
    transcoder = kind == "transcoders" or "transcoder" in folder.absolute().name
    hook_read = hook_write = None
    if block and transcoder:
        hook_read, hook_write = f"{block}ln2.hook_normalized", f"{block}hook_mlp_out"
    elif block and kind:
        hook_read = block + PLACES[kind]
    return Place(
        model=f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}" if size else None,
        hook_read=hook_read,
        hook_write=hook_write,
        transcoder=transcoder,
        l0=float(l0[-1]) if l0 else None,
    )
