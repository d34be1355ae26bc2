"""Saving and loading an SAE as a folder of ``cfg.json`` and ``sae_weights.safetensors``; loading executes no code.

``cfg.json`` holds the SHA-256 of the weights file and one of itself, which `load` checks. Sizes are compared before
anything is allocated: a config that claims 10^12 latents costs nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from kronsae.core.decoders import Decoder, Skip
from kronsae.core.experts import SwitchEncoderConfig
from kronsae.core.sae import SAE, SAEConfig
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError, shown, shown_text
from kronsae.support.files import atomic_path, file_bytes, read_json, sha256
from kronsae.support.resources import check_memory
from kronsae.support.sealed import read_sealed, write_sealed
from kronsae.support.tensors import FLOATS, read_headers, read_tensors

T = TypeVar("T")

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
FORMAT = 1
KEYS = frozenset({"format", "kronsae_version", "architecture", "weights_sha256", "sae", "metadata"})
MAX_CONFIG_BYTES = 2**24
MAX_HEADER_BYTES = 2**27
"""More than the header of a safetensors file may have (100 MB)."""


def save(sae: SAE, folder: Path | str, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write ``sae`` into ``folder``, each file atomically. ``metadata`` is JSON stored in the config file.

    Parts that only training needs are left out (`SAE.trained`): a BatchTopK SAE is saved as JumpReLU.
    """
    folder, sae = Path(folder), sae.trained()
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in sae.state_dict().items()}
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
        digest = sha256(temporary)
        (folder / CONFIG_FILE).unlink(missing_ok=True)  # after an interruption here there is no SAE, not a mixed one
    about = {"format": FORMAT, "kronsae_version": version("kronsae"), "architecture": sae.config.architecture}
    about |= {"weights_sha256": digest}
    write_sealed(folder / CONFIG_FILE, about | {"sae": to_dict(sae.config), "metadata": dict(metadata or {})})
    return folder


def load(folder: Path | str, device: torch.device | str = "cpu") -> SAE:
    """Read an SAE that `save` wrote: same weights, dtype and outputs.

    The weights are copied into memory: the files may change or vanish afterwards. A folder that names no checksum, as
    older versions wrote it, is loaded with a warning.

    Raises:
        UserError: no SAE in the folder, an unknown key, a damaged file (wrong checksum), or weights that do not fit
            the config.
    """
    folder = Path(folder)
    about = read_config(folder)
    config = _shape(folder, about)
    _check_size(folder / WEIGHTS_FILE, weight_elements(config))
    _check_digest(folder / WEIGHTS_FILE, about.get("weights_sha256"))
    with torch.device("meta"):
        sae = config.build_empty()
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    _check_headers(folder / WEIGHTS_FILE, expected)
    sae.load_state_dict(_read(read_tensors, folder / WEIGHTS_FILE, device), assign=True)
    return sae


def weight_elements(config: SAEConfig) -> int:
    """Return how many numbers the weights of an SAE have, without allocating them.

    Raises:
        UserError: more than a tensor can hold.
    """
    try:
        with torch.device("meta"):
            if isinstance(config.encoder, SwitchEncoderConfig):
                experts = config.encoder.num_experts
                encoder = experts * (_numel(config.encoder.expert.build(config.d_in)) + config.d_in + 1)
            else:
                encoder = _numel(config.encoder.build(config.d_in))
            sparsifier = _numel(config.sparsifier.build(config.d_sae))
            decoder = _numel(Decoder(config.d_sae, config.d_out))
            skip = _numel(Skip(config.d_in, config.d_out)) if config.skip else 0
    except (RuntimeError, TypeError, OverflowError):  # torch's words for sizes beyond 64 bits
        sizes = ", ".join(f"{name}={size}" for name, size in config.sizes.items())
        raise UserError(f"the sizes of an SAE must fit into memory; got {sizes}. Use smaller ones.") from None
    return encoder + sparsifier + decoder + skip


def _numel(module: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def read_shape(folder: Path) -> SAEConfig:
    """Return the config of a saved SAE without reading its weights."""
    return _shape(folder, read_config(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """Return the contents of ``cfg.json``, after checking that kronsae wrote it."""
    config = read_sealed(folder / CONFIG_FILE, "the saved SAE", KEYS, max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(config, dict) or "sae" not in config:
        raise UserError(f"{folder / CONFIG_FILE} is not a config written by kronsae: it has no 'sae' entry.")
    if config.get("format") != FORMAT:
        raise UserError(
            f"{folder / CONFIG_FILE} has format {shown(config.get('format'))}; this version reads format {FORMAT}. "
            f"It was written by kronsae {shown_text(config.get('kronsae_version'))}: install that version."
        )
    if unknown := sorted(config.keys() - KEYS):
        raise UserError(f"{folder / CONFIG_FILE} has unknown keys {shown_text(', '.join(unknown))}; remove them.")
    return config


def is_own(folder: Path) -> bool:
    """Return whether `save` wrote the config of a folder; other libraries have a ``cfg.json`` too."""
    try:
        config = read_json(folder / CONFIG_FILE, "the saved SAE", max_bytes=MAX_CONFIG_BYTES)
    except UserError:
        return False
    return isinstance(config, dict) and not config.keys().isdisjoint({"sae", "weights_sha256"})


def _shape(folder: Path, about: Mapping[str, Any]) -> SAEConfig:
    return from_dict(SAEConfig, about["sae"], where=f"{folder / CONFIG_FILE}: sae")


def _check_digest(path: Path, expected: object) -> None:
    """Refuse a weights file whose SHA-256 is not the one that ``cfg.json`` names."""
    if expected is None:
        warnings.warn(
            f"{path.parent / CONFIG_FILE} names no weights_sha256, so {path.name} cannot be checked. "
            "Save the SAE again to add one.",
            stacklevel=3,
        )
        return
    found = _read(sha256, path)
    if found != expected:
        raise UserError(
            f"the saved SAE: {path} is damaged: its SHA-256 is {found}, and {CONFIG_FILE} names "
            f"{shown_text(expected)}. Save or download it again."
        )


def _check_size(path: Path, numbers: int) -> None:
    """Refuse a weights file that is larger than the config's numbers or than the memory, before it is read."""
    size = file_bytes(path, "the saved SAE")
    if size > (largest := 8 * numbers + MAX_HEADER_BYTES):  # 8 bytes: float64
        raise UserError(
            f"{path} does not fit {CONFIG_FILE}: it has {size:,} bytes, more than the {largest:,} that "
            f"{numbers:,} numbers can take. Save the SAE again."
        )
    check_memory(size, f"the saved SAE {path}", "Free memory, or use a larger machine.")


def _check_headers(path: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    headers = _read(read_headers, path)
    found = {name: header.shape for name, header in headers.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name))
        detail = "; ".join(f"{name}: expected {expected.get(name)}, found {found.get(name)}" for name in wrong)
        raise UserError(f"{path} does not fit {CONFIG_FILE} ({detail}). Save the SAE again.")
    dtypes = {header.dtype for header in headers.values()}
    if len(dtypes) > 1 or not dtypes <= FLOATS.keys():
        raise UserError(
            f"{path}: weights must all have one floating-point dtype ({', '.join(FLOATS)}); got "
            f"{', '.join(sorted(dtypes))}. Save the SAE again."
        )


def _read(read: Callable[..., T], path: Path, *arguments: object) -> T:
    try:
        return read(path, *arguments)
    except FileNotFoundError:
        raise UserError(f"the saved SAE: {path} does not exist.") from None
    except (SafetensorError, OSError, MemoryError) as error:
        raise UserError(f"the saved SAE: {path} is damaged ({error}). Save or download it again.") from None
