"""SAEs and transcoders of sparsify (``eai-sparsify``): ``<run>/<hookpoint>/cfg.json`` and ``sae.safetensors``.

``z = topk(relu(W (x - b_dec) + b))``, without ``- b_dec`` for a transcoder; ``x_hat = z W_dec + b_dec (+ W_skip x)``.
Read from version 1.3.3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar

import torch

from kronsae.core.checks import check_count
from kronsae.interop.formats import convert
from kronsae.interop.formats.foreign import Foreign
from kronsae.interop.formats.reading import check_shapes, headers_of, optional, read_config, tensors_of, value
from kronsae.support.errors import UserError, shown, shown_text

CONFIG_FILE, WEIGHTS_FILE, RUN_FILE = "cfg.json", "sae.safetensors", "config.json"

ONLY_TRAINING = {"normalize_decoder", "multi_topk", "expansion_factor", "num_latents", "d_in"}
"""Keys that do not change what a trained SAE computes, or give its sizes."""

COMPUTED = {"activation", "k", "skip_connection", "transcode"}
"""Keys that say what it computes."""

HOOKPOINT = r"(?:[A-Za-z_]\w*\.)+\d+(?:\.[A-Za-z_]\w*)*"
"""A module inside a block, or a block: ``layers.10``, ``layers.3.mlp``, ``h.3.attn``."""


P = TypeVar("P", bound=PurePath)


def recognizes(folder: Path) -> bool:
    """Return whether the folder has a ``cfg.json`` and a ``sae.safetensors``."""
    return all((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE))


def read(folder: Path, device: torch.device | str = "cpu") -> Foreign:
    """Read the SAE.

    Raises:
        UserError: damaged files, the activation ``groupmax``, or a setting that this version does not know.
    """
    path = folder / CONFIG_FILE
    config = read_config(path)
    k = value(config, "k", int, path)
    transcode = value(config, "transcode", bool, path, False)
    skip = value(config, "skip_connection", bool, path, False)
    _check_settings(path, config)
    d_in, d_sae = _sizes(path, config)
    sparsifier = convert.topk(k)
    expected = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if skip:
        expected["W_skip"] = (d_in, d_in)
    weights = folder / WEIGHTS_FILE
    check_shapes(weights, headers_of(weights), expected)
    found = tensors_of(weights, device)
    sae = convert.dense_sae(
        found["encoder.weight"],
        found["encoder.bias"],
        found["W_dec"],
        found["b_dec"],
        sparsifier,
        subtracted_D=None if transcode else found["b_dec"],
        W_skip_OD=found.get("W_skip"),
        transcoder=transcode or skip,
    )
    hookpoint, run = _origin(folder)
    return Foreign(
        sae=sae,
        format="sparsify",
        architecture="-".join([*(["skip"] if skip else []), "transcoder" if transcode else "sae"]),
        model=optional(run, "model", str),
        hook_read=f"{hookpoint}:input" if hookpoint and transcode else hookpoint,
        hook_write=hookpoint if transcode else None,
        settings={key: run[key] for key in ("dataset", "ctx_len", "revision") if isinstance(run.get(key), str | int)},
    )


def _check_settings(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what is not exactly a TopK, and settings of other versions that are switched on."""
    activation = value(config, "activation", str, path, "topk")
    if activation != "topk":
        reason = " It keeps the largest latent of each of k groups, which no sparsifier of kronsae does."
        raise UserError(
            f"{path}: activation must be 'topk'; got {shown(activation)}.{reason if activation == 'groupmax' else ''}"
        )
    for key, setting in config.items():
        if key not in ONLY_TRAINING | COMPUTED and setting not in (None, False, 0, "", [], {}):
            raise UserError(
                f"{path}: {shown_text(key)}={shown(setting)} is not a setting of sparsify 1.3.3, so what it changes "
                "is not known. Remove the key if it only concerns training."
            )


def _sizes(path: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    d_in = value(config, "d_in", int, path)
    check_count(f"{path}: d_in", d_in)
    latents = value(config, "num_latents", int, path, 0)
    d_sae = latents if latents else d_in * value(config, "expansion_factor", int, path, 32)
    check_count(f"{path}: num_latents or d_in * expansion_factor", d_sae)
    return d_in, d_sae


def run_file(folder: P) -> P:
    """Return where the config of the training run lies: beside the folder of the hookpoint."""
    return _hookpoint_folder(folder).parent / RUN_FILE


def _hookpoint_folder(folder: P) -> P:
    """Return the folder that is named after the hookpoint; with several seeds, it holds a folder for each."""
    return folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder


def _origin(folder: Path) -> tuple[str | None, Mapping[str, Any]]:
    """Return the hookpoint, from the names of the folders, and the config of the training run, if it is there."""
    place = folder.resolve()
    hookpoint = _hookpoint_folder(place).name
    try:
        run = read_config(run_file(place))
    except UserError:
        run = {}
    trained = run.get("hookpoints")
    known = isinstance(trained, list) and hookpoint in trained
    if not known:
        run = {}
    return (hookpoint if known or re.fullmatch(HOOKPOINT, hookpoint) else None), run
