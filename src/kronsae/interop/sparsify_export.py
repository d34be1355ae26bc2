"""SAEs and transcoders in the format of sparsify (``eai-sparsify``): ``<hookpoint>/cfg.json``, ``sae.safetensors``.

sparsify knows one architecture: a dense encoder, TopK, an input and an output of one width. It subtracts ``b_dec`` from
the input of an SAE, so the encoder's bias becomes ``b_enc + W_enc b_dec``; of a transcoder it subtracts nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kronsae.core.encoders import DenseEncoderConfig
from kronsae.core.sae import SAE, SAEConfig
from kronsae.interop.exportable import Exportable, Exported
from kronsae.interop.formats.sparsify import CONFIG_FILE, HOOKPOINT, WEIGHTS_FILE
from kronsae.support.errors import UserError
from kronsae.support.files import atomic_path, write_json


def check(saes: tuple[Exportable, ...]) -> None:
    """Refuse SAEs that sparsify cannot compute.

    Raises:
        UserError: which SAE, and why.
    """
    for one in saes:
        if reason := _reason(one.sae.config):
            raise UserError(
                f"the export to sparsify must be of TopK SAEs and transcoders with a dense encoder; {one.name} "
                f"{reason}. Give the names of those that are, or another format."
            )


def _reason(shape: SAEConfig) -> str:
    """Return why sparsify cannot compute an SAE; ``""`` if it can."""
    if shape.encoder.kind == "kronecker":
        return "has a Kronecker encoder, whose AND of two parents is not linear, so no dense encoder equals it"
    if not isinstance(shape.encoder, DenseEncoderConfig):
        return f"has a {shape.encoder.kind} encoder"
    if shape.sparsifier.kind != "topk":
        return f"is a {shape.sparsifier.kind} SAE, which has thresholds in place of a fixed k"
    if shape.pursuit is not None:
        return "pursues its codes"
    if max(len(shape.widths_read), len(shape.widths_written)) > 1:
        return "is a crosscoder"
    if shape.d_in != shape.d_out:
        return f"reads {shape.d_in} numbers and writes {shape.d_out}, which must be equal"
    return ""


def export(saes: tuple[Exportable, ...], out: Path) -> Exported:
    """Write each SAE into the folder of its hookpoint, below its name where two have the same hookpoint."""
    points = {one.name: _hookpoint(one) for one in saes}
    unique = len(set(points.values())) == len(points)
    folders, remarks = {}, []
    for one in saes:
        point = points[one.name]
        folders[one.name] = folder = out / point if unique else out / one.name / point
        _write(one.sae, folder)
        if point == one.name:
            hooks = f"{' + '.join(one.hooks_read)} and writes {' + '.join(one.hooks_written)}"
            remarks.append(
                f"{one.name} reads {hooks}, which is no hookpoint of sparsify (a module, whose input a transcoder "
                "reads): its folder has its own name."
            )
    first = next(iter(folders.values()))
    code = f"from sparsify import SparseCoder; SparseCoder.load_from_disk({str(first)!r})"
    return Exported(folders=folders, remarks=tuple(remarks), next_steps=(code,))


def _hookpoint(one: Exportable) -> str:
    """Return the module as sparsify names it, from the list of blocks on; the SAE's name if there is no such module."""
    hook = one.hooks_written[0] if one.hooks_written else ""
    if one.sae.config.autoencodes != (one.hooks_read == one.hooks_written) or ":" in hook:
        return one.name
    if not one.sae.config.autoencodes and one.hooks_read != (f"{hook}:input",):
        return one.name
    if hook.isdecimal():
        hook = f"layers.{hook}"
    found = re.search(r"\w+\.\d+(?:\..+)?$", hook)
    return found[0] if found and re.fullmatch(HOOKPOINT, found[0]) else one.name


@torch.no_grad()
def _write(sae: SAE, folder: Path) -> None:
    shape, encoder = sae.config, sae.encoder
    rows, bias = encoder.get_parameter("weight").detach(), encoder.get_parameter("bias").detach()
    if shape.autoencodes:
        bias = (bias.double() + rows.double() @ sae.b_dec.double()).to(bias.dtype)
    tensors = {"encoder.weight": rows, "encoder.bias": bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.skip is not None:
        tensors["W_skip"] = sae.skip.W_skip
    config: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": max(1, shape.d_sae // shape.d_in),
        "normalize_decoder": shape.autoencodes,
        "num_latents": shape.d_sae,
        "k": shape.sparsifier.k,
        "multi_topk": False,
        "skip_connection": shape.skip,
        "transcode": not shape.autoencodes,
        "d_in": shape.d_in,
    }
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(owned, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, config)
