"""SAEs of dictionary_learning: ``ae.pt``, the state dict in a file of ``torch.save``, and ``config.json``.

Read from version 0.1.0, the classes that its ``load_dictionary`` loads. ``ae.pt`` is read without unpickling
(`kronsae.interop.formats.torch_archive`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae.core.checks import check_count
from kronsae.core.sae import SAE
from kronsae.interop.formats import convert
from kronsae.interop.formats.foreign import Foreign
from kronsae.interop.formats.reading import optional, read_config, value
from kronsae.interop.formats.torch_archive import Stored, TorchArchive, open_archive
from kronsae.support.errors import UserError, nearest, shown, shown_text
from kronsae.support.tensors import FLOATS

CONFIG_FILE, WEIGHTS_FILE = "config.json", "ae.pt"

Tensors = Mapping[str, Tensor]


def recognizes(folder: Path) -> bool:
    """Return whether the folder has a ``config.json`` and an ``ae.pt``."""
    return all((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE))


def read(folder: Path, device: torch.device | str = "cpu") -> Foreign:
    """Read the SAE, as ``load_dictionary`` would load it.

    Raises:
        UserError: damaged files, a class that is not one of `CLASSES`, or a BatchTopK SAE that has no threshold.
    """
    path = folder / CONFIG_FILE
    config = read_config(path)
    trainer = value(config, "trainer", dict, path)
    kind = value(trainer, "dict_class", str, f"{path}: trainer")
    if kind not in CLASSES:
        raise UserError(
            f"{path}: trainer.dict_class must be one of {', '.join(CLASSES)}; got {shown(kind)}."
            f"{nearest(kind, CLASSES)}"
        )
    with open_archive(folder / WEIGHTS_FILE) as archive:
        tensors = _checked_tensors(archive, kind, trainer, path)
    sae = CLASSES[kind](tensors, trainer).to(device)
    buffer = optional(config, "buffer", dict) or {}
    keys = ("trainer_class", "layer", "submodule_name", "steps", "seed")
    return Foreign(
        sae=sae,
        format="dictionary_learning",
        architecture=kind,
        model=optional(trainer, "lm_name", str),
        hook_read=_hook(trainer, buffer),
        settings={key: trainer[key] for key in keys if isinstance(trainer.get(key), str | int)}
        | {key: buffer[key] for key in ("ctx_len",) if isinstance(buffer.get(key), int)},
    )


def _hook(trainer: Mapping[str, Any], buffer: Mapping[str, Any]) -> str | None:
    """Return the residual stream after a layer, if that is what the config names; other names follow no rule."""
    named = re.fullmatch(r"resid_post_layer_(\d{1,4})", optional(trainer, "submodule_name", str) or "")
    return f"layers.{int(named[1])}" if named and buffer.get("io", "out") == "out" else None


def _auto_encoder(tensors: Tensors, _: Mapping[str, Any]) -> SAE:
    """ReLU, of the trainers standard, standard_new and p_anneal; decoder rows are scaled to norm 1 when loaded."""
    rows_FD, bias_F, W_dec_FD = tensors["encoder.weight"], tensors["encoder.bias"], tensors["decoder.weight"].T
    norms_F = W_dec_FD.norm(dim=1)
    if not torch.allclose(norms_F, torch.ones_like(norms_F)):
        norms_F = torch.where(norms_F > 0, norms_F, 1.0)
        rows_FD.mul_(norms_F[:, None])  # in place: each matrix may have gigabytes
        W_dec_FD.div_(norms_F[:, None])
        bias_F = bias_F * norms_F
    subtracted_D = tensors["bias"]
    kept = convert.thresholds(len(bias_F))
    return convert.dense_sae(rows_FD, bias_F, W_dec_FD, subtracted_D, kept, subtracted_D=subtracted_D)


def _auto_encoder_new(tensors: Tensors, _: Mapping[str, Any]) -> SAE:
    """ReLU, of the April update's first version; nothing is subtracted from the input."""
    rows_FD, bias_F = tensors["encoder.weight"], tensors["encoder.bias"]
    kept = convert.thresholds(len(bias_F))
    return convert.dense_sae(rows_FD, bias_F, tensors["decoder.weight"].T, tensors["decoder.bias"], kept)


def _gated(tensors: Tensors, _: Mapping[str, Any]) -> SAE:
    """``H(a + b_gate) relu(exp(r) a + b_mag)`` with ``a = W (x - b_dec)``: a JumpReLU, as gate and magnitude share W.

    The magnitude is ``exp(r) a + b_mag``; the gate is open where it exceeds ``b_mag - exp(r) b_gate``.
    """
    scale_F, subtracted_D = tensors["r_mag"].double().exp(), tensors["decoder_bias"]
    lowest_F = tensors["mag_bias"].double() - scale_F * tensors["gate_bias"].double()
    rows_FD = tensors["encoder.weight"].mul_(scale_F.float()[:, None])
    return convert.dense_sae(
        rows_FD,
        tensors["mag_bias"],
        tensors["decoder.weight"].T,
        subtracted_D,
        convert.thresholds(len(rows_FD)),
        subtracted_D=subtracted_D,
        thresholds_F=lowest_F,
    )


def _topk(tensors: Tensors, trainer: Mapping[str, Any]) -> SAE:
    """TopK per token, which the library uses by default; its learned threshold is an option of its ``encode``."""
    subtracted_D = tensors["b_dec"]
    return convert.dense_sae(
        tensors["encoder.weight"],
        tensors["encoder.bias"],
        tensors["decoder.weight"].T,
        subtracted_D,
        convert.topk(trainer["k"]),
        subtracted_D=subtracted_D,
    )


def _batch_topk(tensors: Tensors, trainer: Mapping[str, Any]) -> SAE:
    """BatchTopK, which keeps at inference what is above one threshold; below 0 (none learned yet), all of ReLU."""
    linear = "encoder.weight" in tensors
    rows_FD = tensors["encoder.weight"] if linear else tensors["W_enc"].T
    subtracted_D = tensors["b_dec"]
    return convert.dense_sae(
        rows_FD,
        tensors["encoder.bias" if linear else "b_enc"],
        tensors["decoder.weight"].T if linear else tensors["W_dec"],
        subtracted_D,
        convert.thresholds(len(rows_FD), trainer["k"]),
        subtracted_D=subtracted_D,
        thresholds_F=tensors["threshold"].expand(len(rows_FD)),
    )


def _jumprelu(tensors: Tensors, trainer: Mapping[str, Any]) -> SAE:
    """JumpReLU; nothing is subtracted from the input."""
    l0 = optional(trainer, "target_l0", float) or optional(trainer, "target_l0", int)
    if l0 is not None and not 0 < l0 < math.inf:
        l0 = None
    kept = convert.thresholds(len(tensors["b_enc"]), l0)
    return convert.dense_sae(
        tensors["W_enc"].T,
        tensors["b_enc"],
        tensors["W_dec"],
        tensors["b_dec"],
        kept,
        thresholds_F=tensors["threshold"],
    )


CLASSES: dict[str, Callable[[Tensors, Mapping[str, Any]], SAE]] = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": _auto_encoder_new,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _batch_topk,
    "JumpReluAutoEncoder": _jumprelu,
}
"""Classes of the library, and the conversion of each, which may change the tensors in place."""

_LINEAR = {"encoder.weight": "FD", "encoder.bias": "F", "decoder.weight": "DF"}
_MATRICES = {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D"}
SHAPES: dict[str, dict[str, str]] = {
    "AutoEncoder": _LINEAR | {"bias": "D"},
    "AutoEncoderNew": _LINEAR | {"decoder.bias": "D"},
    "GatedAutoEncoder": {"encoder.weight": "FD", "decoder.weight": "DF", "decoder_bias": "D"}
    | dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), "F"),
    "AutoEncoderTopK": _LINEAR | {"b_dec": "D", "k": "", "threshold": ""},
    "BatchTopKSAE": _LINEAR | {"b_dec": "D", "k": "", "threshold": ""},
    "MatryoshkaBatchTopKSAE": _MATRICES | {"k": "", "threshold": "", "group_sizes": "G"},
    "JumpReluAutoEncoder": _MATRICES | {"threshold": "F"},
}
"""Tensors of each class and their axes: D inputs, F latents, G groups; ``""`` is a single number."""

OPTIONAL = {"AutoEncoderTopK": {"k", "threshold"}, "BatchTopKSAE": {"k"}}
"""Tensors that older versions did not save and that are not needed: k is also in the config."""

WHOLE_NUMBERS = {"k", "group_sizes"}


def _checked_tensors(archive: TorchArchive, kind: str, trainer: Mapping[str, Any], config: Path) -> dict[str, Tensor]:
    """Return the tensors of a class in float32, after all their shapes were compared."""
    path, found = archive.path, archive.tensors
    expected = {
        name: axes for name, axes in SHAPES[kind].items() if name in found or name not in OPTIONAL.get(kind, ())
    }
    if expected.keys() != found.keys():
        missing, surplus = (", ".join(sorted(one)) for one in (expected.keys() - found, found.keys() - expected))
        raise UserError(
            f"{path} must hold the tensors of {kind}, {', '.join(expected)}; missing: {missing or 'none'}; surplus: "
            f"{shown_text(surplus) or 'none'}."
        )
    sizes = _sizes(found, kind, trainer, config)
    for name, axes in expected.items():
        _check_tensor(path, name, found[name], tuple(sizes.get(axis, -1) for axis in axes))
    if "k" in SHAPES[kind]:
        k = value(trainer, "k", int, f"{config}: trainer")
        check_count(f"{config}: trainer.k", k)
        if "k" in found and (saved := int(archive.read("k"))) != k:
            raise UserError(f"{path} has k={saved}, and {config} has k={k}. One of the two was changed.")
    return {name: archive.read(name).float() for name in expected if name not in WHOLE_NUMBERS}


def _sizes(found: Mapping[str, Stored], kind: str, trainer: Mapping[str, Any], config: Path) -> dict[str, int]:
    """Return D, F and G as the tensors have them; refuse another width or size in the config."""
    first = "encoder.weight" if "encoder.weight" in found else "W_enc"
    shape = found[first].shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{config.parent / WEIGHTS_FILE}: {first} must be a matrix; it has the shape {shape}.")
    sizes = dict(zip(SHAPES[kind][first], shape, strict=True))
    for key, axis in (("activation_dim", "D"), ("dict_size", "F")):
        if value(trainer, key, int, f"{config}: trainer", sizes[axis]) != sizes[axis]:
            raise UserError(
                f"{config}: trainer.{key} must be that of {WEIGHTS_FILE}, {sizes[axis]}; got {shown(trainer[key])}."
            )
    groups = found.get("group_sizes")
    return sizes | ({"G": groups.shape[0]} if groups is not None and len(groups.shape) == 1 else {})


def _check_tensor(path: Path, name: str, stored: Stored, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise UserError(f"{path}: {name} must have the shape {shape}; it has {stored.shape}.")
    whole = not stored.dtype.is_floating_point
    if whole != (name in WHOLE_NUMBERS):
        kind = "whole numbers" if name in WHOLE_NUMBERS else f"of type {', '.join(FLOATS)}"
        raise UserError(f"{path}: {name} must be {kind}; it has the type {stored.dtype}.")
