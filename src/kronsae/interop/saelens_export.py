"""SAEs as folders of SAELens (sae-lens >= 6): ``cfg.json`` and ``sae_weights.safetensors``.

Dense SAEs are written as architectures of SAELens: TopK as ``topk``, thresholds (JumpReLU, BatchTopK, and Matryoshka
trained with either) as ``jumprelu``, transcoders as ``jumprelu_transcoder`` or ``jumprelu_skip_transcoder``. A TopK
transcoder has no architecture there; with equal widths and without a skip connection, ``topk`` computes it. SAEs with
a Kronecker encoder are written as our architectures (`kronsae.interop.saelens_layout`), which SAELens knows after
``import kronsae.interop.saelens``.

Our SAEs take raw activations and subtract nothing from them: ``apply_b_dec_to_input`` is off, and no normalisation is
named.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kronsae.core.encoders import DenseEncoder, KroneckerEncoder, KroneckerEncoderConfig
from kronsae.core.sae import SAE
from kronsae.core.sparsifiers import JumpReLU, TopK
from kronsae.interop import saelens_layout
from kronsae.interop.exportable import Exportable, Exported, folder_of
from kronsae.interop.formats.sae_lens import CONFIG_FILE, WEIGHTS_FILE
from kronsae.interop.hook_names import family_of, to_transformer_lens
from kronsae.support.errors import UserError
from kronsae.support.files import atomic_path, write_json

SAE_LENS_VERSION = "6.54.12"
"""The version whose layout is written; SAELens drops the metadata of a config that names none."""

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def check(saes: tuple[Exportable, ...]) -> None:
    """Refuse SAEs that no architecture of SAELens or ours computes exactly.

    Raises:
        UserError: which SAE, why, and what to do instead.
    """
    for one in saes:
        architecture_of(one)


_NOT_THERE = {"switch": "experts", "trunk": "a dense trunk"}
"""Kinds of encoders that no architecture computes, in words."""


def architecture_of(one: Exportable) -> str:
    """Return the architecture that an SAE is written as."""
    config = one.sae.trained().config
    if config.pursuit is not None:
        raise UserError(
            f"{one.name}: SAELens has no pursuit, and its codes would be others. Export an SAE trained without one, or "
            "measure this one with `kronsae eval`."
        )
    if "crosscoder" in config.role:
        raise UserError(f"{one.name}: SAELens has no crosscoders. Export an SAE or a transcoder of one hook.")
    if config.encoder.kind in _NOT_THERE:
        raise UserError(
            f"{one.name}: SAELens has no architecture with {_NOT_THERE[config.encoder.kind]}. Export an SAE with a "
            "dense or a Kronecker encoder, or publish this one in our own format: `kronsae push`."
        )
    if isinstance(config.encoder, KroneckerEncoderConfig) and config.encoder.null_symbols:
        raise UserError(
            f"{one.name}: SAELens has no null symbols, and its codes would be others. Export an SAE trained without "
            "null_symbols, or publish this one in our own format: `kronsae push`."
        )
    ours = saelens_layout.architecture_of(config)
    if ours is not None:
        return ours
    thresholds = config.sparsifier.kind == "jumprelu"
    if config.autoencodes:
        return "jumprelu" if thresholds else "topk"
    if thresholds:
        return "jumprelu_skip_transcoder" if config.skip else "jumprelu_transcoder"
    if config.skip or config.d_out != config.d_in:
        raise UserError(
            f"{one.name}: SAELens has no TopK transcoder with a skip connection or with another output width. Train it "
            "with batch_topk or jumprelu, or use `--to sparsify`."
        )
    return "topk"


def export(saes: tuple[Exportable, ...], out: Path) -> Exported:
    """Write each SAE as SAELens saves it: into ``out``, or into a folder per SAE if there are several."""
    check(saes)
    folders = {one.name: write(one, folder_of(one, saes, out)) for one in saes}
    kron = any(architecture_of(one) in saelens_layout.SPARSIFIERS for one in saes)
    first = next(iter(folders.values()))
    remarks = []
    if kron:
        remarks.append("SAELens knows KronSAE's architectures after: import kronsae.interop.saelens")
    opening = "import kronsae.interop.saelens; " if kron else ""
    command = f"python -c \"{opening}from sae_lens import SAE; print(SAE.load_from_disk('{first}'))\""
    return Exported(folders=folders, remarks=tuple(remarks), next_steps=(command,))


def write(one: Exportable, folder: Path) -> Path:
    """Write one SAE, each file atomically; the config last."""
    architecture, sae = architecture_of(one), one.sae.trained()
    kron = architecture in saelens_layout.SPARSIFIERS
    weights = saelens_layout.to_disk(sae.state_dict()) if kron else dense_tensors(sae)
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}, temporary)
    write_json(folder / CONFIG_FILE, config_of(one, architecture))
    return folder


def dense_tensors(sae: SAE) -> dict[str, Tensor]:
    """Return the tensors of a dense SAE under SAELens' names; ``W_enc`` is ``[d_in, d_sae]``."""
    assert isinstance(sae.encoder, DenseEncoder)
    weights = {
        "W_enc": sae.encoder.weight.T,
        "b_enc": sae.encoder.bias,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    if isinstance(sae.sparsifier, JumpReLU):
        weights["threshold"] = sae.sparsifier.threshold
    if sae.skip is not None:
        weights["W_skip"] = sae.skip.W_skip
    return weights


def config_of(one: Exportable, architecture: str) -> dict[str, Any]:
    """Return the content of ``cfg.json``."""
    sae = one.sae.trained()
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": DTYPES[sae.W_dec.dtype],
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata_of(one),
    }
    if architecture in saelens_layout.SPARSIFIERS:
        assert isinstance(sae.encoder, KroneckerEncoder)
        return config | saelens_layout.kron_fields(sae.config)
    if "transcoder" in architecture:
        return config | {"d_out": sae.d_out}
    if architecture == "topk":
        assert isinstance(sae.sparsifier, TopK)
        return config | {"k": sae.sparsifier.config.k, "rescale_acts_by_decoder_norm": False}
    return config


def metadata_of(one: Exportable) -> dict[str, Any]:
    """Return what SAELens' files say about model, hooks and text; hooks by TransformerLens' names, where they have one.

    The text was tokenised with the special tokens that the model's tokenizer adds, hence no ``prepend_bos``.
    """
    family = family_of(None, one.model)
    read = [to_transformer_lens(hook, family) for hook in one.hooks_read]
    written = [to_transformer_lens(hook, family) for hook in one.hooks_written]
    stated = {
        "model_name": one.model,
        "hook_name": read[0] if read else None,
        "hook_name_out": written[0] if written and written != read else None,
        "kronsae_hook_name": one.hooks_read[0] if one.hooks_read else None,
        "kronsae_hook_name_out": one.hooks_written[0] if one.hooks_written and written != read else None,
        "context_size": one.context_length,
        "dataset_path": one.text,
        "model_class_name": "HookedTransformer" if read and read[0] != one.hooks_read[0] else "AutoModelForCausalLM",
        "trained_as": one.metadata.get("trained_as"),
        "training_tokens": one.metadata.get("tokens"),
        "kronsae_version": version("kronsae"),
    }
    about: dict[str, Any] = {"sae_lens_version": SAE_LENS_VERSION, "sae_lens_training_version": None}
    return about | {key: value for key, value in stated.items() if value is not None}
