"""Per-layer transcoders in the format of circuit-tracer (0.5): ``config.yaml`` and ``layer_<n>.safetensors``.

circuit-tracer computes ``f = z where z > threshold, else 0`` with ``z = W_enc x + b_enc``, and ``f W_dec + b_dec``
(plus ``W_skip x``): a dense JumpReLU transcoder, exactly. It needs one of every layer's MLP, all of one width. Other
architectures have no file format there; `kronsae.interop.circuit_tracer` makes them usable in Python.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kronsae.core.encoders import DenseEncoder
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import JumpReLU
from kronsae.interop.exportable import Exportable, Exported
from kronsae.support.errors import UserError
from kronsae.support.files import atomic_path, write_text

CONFIG_FILE = "config.yaml"
INPUT_HOOK, OUTPUT_HOOK = "mlp.hook_in", "mlp.hook_out"
"""circuit-tracer's names of the MLP's input and output, after and before the block's normalisations."""

_MLP = re.compile(r"(?:.*\.)?(\d+)\.mlp(?::(input|output))?")


def check(saes: tuple[Exportable, ...]) -> None:
    """Refuse SAEs that are not one dense JumpReLU transcoder of the MLP per layer, for layers 0, 1, ... without a gap.

    Raises:
        UserError: which SAE, why, and what to do instead.
    """
    for one in saes:
        _check_architecture(one)
    layers = sorted(layer_of(one) for one in saes)
    if layers != list(range(len(saes))):
        raise UserError(
            f"circuit-tracer needs exactly one transcoder for each layer of the model, from 0 on; got layers "
            f"{', '.join(map(str, layers))}. Name one SAE per layer, or train the missing ones."
        )
    for what, values in (
        ("d_sae", {one.name: one.sae.d_sae for one in saes}),
        ("a skip connection", {one.name: one.sae.skip is not None for one in saes}),
        ("dtype", {one.name: one.sae.W_dec.dtype for one in saes}),
    ):
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in values.items())
            raise UserError(f"circuit-tracer needs {what} to be alike in all transcoders; got {listed}.")


def export(saes: tuple[Exportable, ...], out: Path) -> Exported:
    """Write ``config.yaml`` and a file per layer."""
    files = {}
    for one in sorted(saes, key=layer_of):
        files[one.name] = out / f"layer_{layer_of(one)}.safetensors"
        with atomic_path(files[one.name]) as temporary:
            save_file(tensors(one.sae), temporary, metadata={"format": "pt"})
    model = saes[0].model
    named = model is not None and not Path(model).expanduser().exists()
    settings = {
        **({"model_name": model} if named else {}),
        "model_kind": "transcoder_set",
        "feature_input_hook": INPUT_HOOK,
        "feature_output_hook": OUTPUT_HOOK,
        "scan": out.name,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]  # a JSON string is a YAML string
    write_text(out / CONFIG_FILE, "\n".join(lines) + "\n")
    remarks = () if named else (f"{CONFIG_FILE} names no model, because it is local: give circuit-tracer --model.",)
    return Exported(
        folders=files,
        remarks=remarks,
        next_steps=(
            f"hf upload USER/REPO {out}",
            "circuit-tracer attribute --transcoder_set USER/REPO --prompt TEXT ...",
        ),
    )


def tensors(sae: SAE) -> dict[str, Tensor]:
    """Return the weights of a dense JumpReLU transcoder by circuit-tracer's names."""
    encoder, sparsifier = sae.encoder, sae.sparsifier
    assert isinstance(encoder, DenseEncoder)
    assert isinstance(sparsifier, JumpReLU)
    found = {
        "W_enc": encoder.weight,
        "b_enc": encoder.bias,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
        "activation_function.threshold": sparsifier.threshold,
    }
    if sae.skip is not None:
        found["W_skip"] = sae.skip.W_skip
    return {name: tensor.detach().contiguous().cpu() for name, tensor in found.items()}


def layer_of(one: Exportable) -> int:
    """Return the layer whose MLP a transcoder imitates.

    Raises:
        UserError: it reads or writes something else.
    """
    read, write = (
        _MLP.fullmatch(hooks[0]) if len(hooks) == 1 else None for hooks in (one.hooks_read, one.hooks_written)
    )
    fits = read is not None and write is not None and read[2] == "input" and write[2] != "input" and read[1] == write[1]
    if not fits:
        raise UserError(
            f"{one.name} must read the input of an MLP and write its output, such as layers.3.mlp:input and "
            f"layers.3.mlp (circuit-tracer: {INPUT_HOOK} and {OUTPUT_HOOK}); it reads {' + '.join(one.hooks_read)} "
            f"and writes {' + '.join(one.hooks_written)}."
        )
    assert read is not None
    return int(read[1])


def _what(config: SAEConfig) -> str:
    """Return what an SAE is that is no transcoder of one width, in words."""
    if config.autoencodes:
        return f"a {config.architecture} SAE, which reconstructs what it reads"
    return f"a {config.architecture} with d_in={config.d_in} and d_out={config.d_out}"


def _check_architecture(one: Exportable) -> None:
    config = one.sae.config
    if config.role not in ("transcoder", "skip_transcoder") or config.d_in != config.d_out:
        raise UserError(
            f"circuit-tracer needs transcoders with d_out = d_in; '{one.name}' is {_what(config)}. "
            "Train with read=layers.N.mlp:input write=layers.N.mlp."
        )
    if config.encoder.kind != "dense" or config.sparsifier.kind != "jumprelu" or config.pursuit is not None:
        raise UserError(
            f"circuit-tracer's files hold dense transcoders with a threshold per latent; '{one.name}' is a "
            f"{config.architecture}{' with pursuit' if config.pursuit else ''}. Train batch_topk or jumprelu "
            "transcoders, or use any transcoder in Python: kronsae.interop.circuit_tracer.transcoder_set(saes)."
        )
    layer_of(one)
