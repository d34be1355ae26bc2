"""SAEs of SAELens: ``cfg.json`` and ``sae_weights.safetensors``, as ``SAE.load_from_disk`` reads them.

Read from version 6.54.12. With ``p = W_enc^T (x - b_dec) + b_enc`` (without ``- b_dec`` where ``apply_b_dec_to_input``
is off, as in every transcoder) and ``x_hat = z W_dec + b_dec (+ W_skip x)``:

- standard, transcoder: ``z = relu(p)``; jumprelu: ``z = p`` where ``p > threshold`` and ``p > 0``;
- topk: ``z`` is the positive part of the k largest ``p``. With ``rescale_acts_by_decoder_norm``, ``p |W_dec|`` is
  ranked and ``W_dec / |W_dec|`` is summed;
- gated: ``z = relu(e w(x) + b_mag)`` where ``w(x) + b_gate > 0``, with ``e = exp(r_mag)``. Both use the same rows, so
  the condition is ``z > max(0, b_mag - e b_gate)``;
- batchtopk and matryoshka_batchtopk, which are checkpoints of trainings: what SAELens saves when they end, a JumpReLU
  with the learned threshold;
- the architectures of `kronsae.interop.saelens_layout`.

Configs from before version 6 are flat, with the settings of the training; they are read as version 6 reads them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.core import checkpoint
from kronsae.core.checks import check_count
from kronsae.core.gates import GateName
from kronsae.core.sae import SAE
from kronsae.interop import saelens_layout
from kronsae.interop.formats import convert
from kronsae.interop.formats.foreign import Foreign
from kronsae.interop.formats.reading import check_shapes, headers_of, optional, read_config, tensors_of, value
from kronsae.support.config import checked
from kronsae.support.errors import UserError, nearest, shown, shown_text

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"

DTYPES = {
    f"{prefix}{name}": getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16")
    for prefix in ("", "torch.")
}

CHECKPOINTS = ("batchtopk", "matryoshka_batchtopk")
"""Architectures of unfinished trainings; `convert` turns them into what SAELens saves at the end."""

THRESHOLDS = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
SKIPS = ("skip_transcoder", "jumprelu_skip_transcoder")
DENSE = ("standard", "gated", "topk", "jumprelu", *CHECKPOINTS, *TRANSCODERS)

REFUSED = {
    "abstopk": "its latents may be negative, and those of kronsae are not",
    "matching_pursuit": "it encodes by projecting out one latent after another, which is not the pursuit of kronsae",
    "temporal": "it reads earlier tokens through attention, and an SAE of kronsae reads one token",
}
"""Architectures of SAELens that no SAE of kronsae computes exactly, and why."""

BASE_KEYS = {
    *("architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations"),
    *("reshape_activations", "metadata", "sae_lens_version", "sae_lens_training_version"),
}
OWN_KEYS = {
    **{name: {"k", "rescale_acts_by_decoder_norm"} for name in ("topk", *CHECKPOINTS)},
    **{name: {"d_out"} for name in TRANSCODERS},
    **{name: {"d_base", "d_extension", "gate", "k"} for name in saelens_layout.SPARSIFIERS},
    **{name: {"d_base", "d_extension", "gate", "k", "d_out", "skip"} for name in saelens_layout.TRANSCODERS},
}
"""Keys that say what an architecture computes, besides `BASE_KEYS`."""

ONLY_TRAINING = {
    *("decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "l0_coefficient", "l0_warm_up_steps"),
    *("use_sparse_activations", "aux_loss_coefficient", "topk_threshold_lr", "matryoshka_widths", "target_l0"),
    *("use_matryoshka_aux_loss", "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode"),
    *("pre_act_loss_coefficient", "jumprelu_tanh_scale", "jumprelu_ste_to_input", "threshold_decay"),
}
"""Keys of checkpoints that change the training, and not what the SAE computes."""


RENAMED_IN_6 = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


class Layout(NamedTuple):
    """A config in the layout of version 6: what is computed, and statements about model and text."""

    config: Mapping[str, Any]
    metadata: Mapping[str, Any]


def recognizes(folder: Path) -> bool:
    """Return whether the folder has both files, and a config with ``d_in`` that kronsae itself did not write."""
    if not all((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        return False
    try:
        config = read_config(folder / CONFIG_FILE)
    except UserError:
        return False
    return "d_in" in config and "sae" not in config


def read(folder: Path, device: torch.device | str = "cpu") -> Foreign:
    """Read the SAE.

    Raises:
        UserError: damaged files, an architecture or a setting that cannot be represented exactly, or a setting that
            this version does not know.
    """
    path = folder / CONFIG_FILE
    config, metadata = _current(path, read_config(path))
    architecture = value(config, "architecture", str, path)
    _check_architecture(path, architecture)
    _check_keys(path, config, architecture)
    _check_normalization(path, config)
    dtype = value(config, "dtype", str, path, "float32")
    if dtype not in DTYPES:
        raise UserError(f"{path}: dtype must be one of {', '.join(DTYPES)}; got {shown(dtype)}.")
    weights = folder / WEIGHTS_FILE
    if architecture in saelens_layout.SPARSIFIERS:
        sae = _kron(path, weights, config, architecture, DTYPES[dtype], device)
    else:
        sae = _dense(path, weights, Layout(config, metadata), architecture, DTYPES[dtype], device)
    stated = ("reshape_activations", "normalize_activations", "dtype")
    return Foreign(
        sae=sae,
        format="sae_lens",
        architecture=architecture,
        model=optional(metadata, "model_name", str),
        hook_read=optional(metadata, "hook_name", str),
        hook_write=optional(metadata, "hook_name_out", str),
        settings={key: config[key] for key in stated if key in config}
        | {key: one for key, one in metadata.items() if key not in ("model_name", "hook_name", "hook_name_out")},
    )


def _current(path: Path, config: Mapping[str, Any]) -> Layout:
    """Return a config of any version in the layout of version 6."""
    metadata = value(config, "metadata", dict, path, {})
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    if version:
        major = re.match(r"(\d{1,9})\.", version) if isinstance(version, str) else None
        if major is None:
            raise UserError(f"{path}: sae_lens_version must be a version such as '6.0.0'; got {shown(version)}.")
        if int(major[1]) >= 6:
            return Layout(config, metadata)
    return _from_before_6(path, config)


def _from_before_6(path: Path, config: Mapping[str, Any]) -> Layout:
    old = {RENAMED_IN_6.get(key, key): one for key, one in config.items()}
    activation = old.get("activation_fn") or "relu"
    if activation not in ("relu", "topk"):
        raise UserError(
            f"{path}: activation_fn must be 'relu' or 'topk'; got {shown(activation)}. Since version 6, SAELens loads "
            "such an SAE with a ReLU, which changes its latents."
        )
    kept = (BASE_KEYS | OWN_KEYS["topk"] | OWN_KEYS["transcoder"]) - {"metadata"}
    new = {key: one for key, one in old.items() if key in kept}
    new["architecture"] = old.get("architecture") or "standard"
    if activation == "topk":
        new["architecture"] = "topk"
        new["k"] = value(value(old, "activation_fn_kwargs", dict, path), "k", int, path)
    elif new["architecture"] != "topk":
        new.pop("k", None)
    if new["architecture"] not in TRANSCODERS:
        new.pop("d_out", None)
    if new["architecture"] != "topk":
        new.pop("rescale_acts_by_decoder_norm", None)
    hook = old.get("hook_name")
    new.setdefault("reshape_activations", "hook_z" if isinstance(hook, str) and "hook_z" in hook else "none")
    normalization = old.get("normalize_activations")
    if normalization is None or isinstance(normalization, bool):
        new["normalize_activations"] = "expected_average_only_in" if normalization else "none"
    used = new.keys() | {"metadata", "activation_fn", "activation_fn_kwargs", "finetuning_scaling_factor"}
    return Layout(new, {key: one for key, one in old.items() if key not in used})


def _check_architecture(path: Path, architecture: str) -> None:
    if architecture in REFUSED:
        raise UserError(f"{path}: an SAE of architecture '{architecture}' cannot be read: {REFUSED[architecture]}.")
    known = (*DENSE, *saelens_layout.SPARSIFIERS)
    if architecture not in known:
        raise UserError(
            f"{path}: architecture must be one of {', '.join(known)}; got {shown(architecture)}."
            f"{nearest(architecture, known)}"
        )


def _check_keys(path: Path, config: Mapping[str, Any], architecture: str) -> None:
    known = BASE_KEYS | OWN_KEYS.get(architecture, set()) | ONLY_TRAINING
    for key in config:
        if key not in known:
            raise UserError(
                f"{path}: {shown_text(key)} is not a key of a '{architecture}' SAE in SAELens 6.54.12, so what it "
                f"changes is not known.{nearest(key, known)} Remove the key if it only concerns training."
            )


def _check_normalization(path: Path, config: Mapping[str, Any]) -> None:
    found = value(config, "normalize_activations", str, path, "none")
    if found == "expected_average_only_in":
        warnings.warn(
            f"{path}: the SAE was trained on activations that were scaled to a mean norm of sqrt(d_in), and the file "
            "does not hold the scale. It is read as SAELens loads it, without the scale: give it activations of this "
            "norm, or fold the scale into its weights with SAELens.",
            stacklevel=3,
        )
    elif found == "covariance_whitening":
        raise UserError(
            f"{path}: normalize_activations is 'covariance_whitening', and the whitening is not in the file. Save the "
            "SAE with SAELens after its training, which folds it into the weights."
        )
    elif found != "none":
        raise UserError(
            f"{path}: normalize_activations must be 'none' or 'expected_average_only_in'; got {shown(found)}. "
            "A normalisation of each token is no part of an SAE of kronsae."
        )
    reshape = value(config, "reshape_activations", str, path, "none")
    if reshape not in ("none", "hook_z"):
        raise UserError(f"{path}: reshape_activations must be 'none' or 'hook_z'; got {shown(reshape)}.")


def _kron(
    path: Path,
    weights: Path,
    config: Mapping[str, Any],
    architecture: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> SAE:
    if value(config, "apply_b_dec_to_input", bool, path, False):
        raise UserError(f"{path}: apply_b_dec_to_input must be false for a '{architecture}' SAE; got true.")
    transcoder = architecture in saelens_layout.TRANSCODERS
    gate: GateName = checked(GateName, config.get("gate", "mand"), f"{path}: gate")
    shape = saelens_layout.kron_config(
        architecture,
        d_in=_size(path, config, "d_in"),
        d_sae=_size(path, config, "d_sae"),
        d_base=_size(path, config, "d_base", 2),
        d_extension=_size(path, config, "d_extension", 4),
        gate=gate,
        k=_size(path, config, "k", 100),
        d_out=_size(path, config, "d_out", 768) if transcoder else None,
        skip=transcoder and value(config, "skip", bool, path, False),
    )
    checkpoint.weight_elements(shape)  # refuses sizes whose product no tensor has
    with torch.device("meta"):
        sae = shape.build_empty()
    expected = {name: tuple(tensor.shape) for name, tensor in saelens_layout.to_disk(sae.state_dict()).items()}
    check_shapes(weights, headers_of(weights), expected)
    found = saelens_layout.from_disk(tensors_of(weights, device))
    sae.load_state_dict({name: tensor.to(dtype).float() for name, tensor in found.items()}, assign=True)
    return sae.trained()


def _dense(
    path: Path, weights: Path, layout: Layout, architecture: str, dtype: torch.dtype, device: torch.device | str
) -> SAE:
    config = layout.config
    d_in, d_sae = _size(path, config, "d_in"), _size(path, config, "d_sae")
    transcoder = architecture in TRANSCODERS
    d_out = _size(path, config, "d_out", 768) if transcoder else d_in
    subtract = value(config, "apply_b_dec_to_input", bool, path, True)
    if subtract and transcoder:
        raise UserError(f"{path}: apply_b_dec_to_input must be false for a transcoder, as SAELens demands; got true.")
    k = None
    if architecture == "topk":
        k = _size(path, config, "k", 100)
        if k > d_sae:
            raise UserError(f"{path}: k must be at most d_sae; got k={k} with d_sae={d_sae}.")
    rescale = OWN_KEYS.get(architecture, set()) >= {"rescale_acts_by_decoder_norm"} and value(
        config, "rescale_acts_by_decoder_norm", bool, path, architecture in CHECKPOINTS
    )
    found = _tensors(path, weights, _shapes(architecture, d_in, d_sae, d_out), dtype, device)
    rows_FD, bias_F, W_dec_FO = found["W_enc"].T, found.get("b_enc"), found["W_dec"]
    thresholds_F = found.get("threshold")
    if architecture == "gated":
        scale_F = found["r_mag"].double().exp()
        rows_FD, bias_F = rows_FD.mul_(scale_F.float().unsqueeze(1)), found["b_mag"]
        thresholds_F = found["b_mag"].double() - scale_F * found["b_gate"].double()
    assert bias_F is not None  # `_shapes` demands it of every other architecture
    if rescale:
        norm_F = W_dec_FO.float().norm(dim=1)
        if not bool((norm_F > 0).all()):
            raise UserError(
                f"{weights}: rows of W_dec must not be 0 with rescale_acts_by_decoder_norm; row "
                f"{int((~(norm_F > 0)).nonzero()[0])} is, or is not a number. SAELens would reconstruct NaN."
            )
        rows_FD, bias_F = rows_FD.mul_(norm_F.unsqueeze(1)), bias_F * norm_F  # in place: they may have gigabytes
        W_dec_FO = W_dec_FO.div_(norm_F.unsqueeze(1))
    if architecture in CHECKPOINTS:
        thresholds_F = found["topk_threshold"].expand(d_sae)
    return convert.dense_sae(
        rows_FD,
        bias_F,
        W_dec_FO,
        found["b_dec"],
        convert.thresholds(d_sae, _l0(config, layout.metadata)) if k is None else convert.topk(k),
        subtracted_D=found["b_dec"] if subtract else None,
        thresholds_F=thresholds_F,
        W_skip_OD=found.get("W_skip"),
        transcoder=transcoder or writes_another_hook(layout.metadata),
    )


def writes_another_hook(metadata: Mapping[str, Any]) -> bool:
    """Return whether the files state that another hook is written: of a TopK transcoder, which is a ``topk`` there."""
    written = optional(metadata, "hook_name_out", str)
    return written is not None and written != optional(metadata, "hook_name", str)


def _shapes(architecture: str, d_in: int, d_sae: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of an architecture and their shapes."""
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    biases = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    shapes |= dict.fromkeys(biases, (d_sae,))
    if architecture in THRESHOLDS:
        shapes["threshold"] = (d_sae,)
    if architecture in CHECKPOINTS:
        shapes["topk_threshold"] = ()
    if architecture in SKIPS:
        shapes["W_skip"] = (d_out, d_in)
    return shapes


def _tensors(
    path: Path,
    weights: Path,
    expected: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Return the tensors in the type that the config states, in which SAELens computes, and without factors of 1."""
    headers = headers_of(weights)
    d_sae = expected["W_dec"][:1]
    if "scaling_factor" in headers:  # of version 3 and before
        expected = expected | {"scaling_factor": d_sae}
    if "log_threshold" in headers and "threshold" in expected:  # of older trainings
        expected = {("log_threshold" if name == "threshold" else name): shape for name, shape in expected.items()}
    check_shapes(weights, headers, expected)
    found = {name: tensor.to(dtype).float() for name, tensor in tensors_of(weights, device).items()}
    if "log_threshold" in found:
        found["threshold"] = found.pop("log_threshold").exp()
    factor = found.pop("scaling_factor", None)
    if factor is not None and not bool(((factor - 1).abs() < 1e-5).all()):
        raise UserError(
            f"{weights}: scaling_factor must be 1 everywhere; it is not. Neither kronsae nor SAELens since version 6 "
            f"applies it: multiply the rows of W_dec by it, and remove it from the file. ({path.name})"
        )
    return found


def _size(path: Path, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    found = value(config, key, int, path, default)
    check_count(f"{path}: {key}", found)
    return found


def _l0(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> float | None:
    """Return the mean number of active latents that the files state: measured, or that of the training."""
    details = metadata.get("training_architecture_details")
    places = (metadata.get("l0"), config.get("k"), details.get("k") if isinstance(details, dict) else None)
    for one in places:
        if isinstance(one, int | float) and not isinstance(one, bool) and 0 < one < 1e9 and math.isfinite(one):
            return float(one)
    return None
