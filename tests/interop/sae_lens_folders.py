"""Folders as SAELens writes them, made with plain safetensors, and its formulas in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, D_OUT = 12, 40, 10
METADATA = {
    "sae_lens_version": "6.54.12",
    "sae_lens_training_version": "6.54.12",
    "model_name": "gpt2",
    "hook_name": "blocks.6.hook_resid_post",
    "context_size": 128,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {},
    "standard, b_dec not applied": {"apply_b_dec_to_input": False},
    "topk": {"k": 7},
    "topk, rescaled": {"k": 7, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"apply_b_dec_to_input": False},
    "jumprelu, b_dec applied": {},
    "gated": {},
    "gated, b_dec not applied": {"apply_b_dec_to_input": False},
    "batchtopk": {"k": 6.5, "rescale_acts_by_decoder_norm": True, "topk_threshold_lr": 0.01},
    "batchtopk, not rescaled": {"k": 6.5, "rescale_acts_by_decoder_norm": False},
    "matryoshka_batchtopk": {"k": 6.0, "matryoshka_widths": [10, 40], "use_matryoshka_aux_loss": False},
    "transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
}
"""Settings of the cases, each of which begins with its architecture."""


def architecture_of(case: str) -> str:
    """Return the architecture of a case."""
    return case.partition(",")[0]


def make(case: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of a case of `SETTINGS`."""
    architecture, settings = architecture_of(case), SETTINGS[case]
    d_out = settings.get("d_out", D_IN)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {"W_enc": draw(D_IN, D_SAE), "W_dec": draw(D_SAE, d_out), "b_dec": draw(d_out)}
    if architecture == "gated":
        weights |= {"b_gate": draw(D_SAE), "b_mag": draw(D_SAE), "r_mag": 0.3 * draw(D_SAE)}
    else:
        weights["b_enc"] = draw(D_SAE)
    if "jumprelu" in architecture:
        weights["threshold"] = draw(D_SAE) + 0.5  # some are below 0
    if "batchtopk" in architecture:
        weights["topk_threshold"] = torch.tensor(2.5, dtype=torch.float64)
    if "skip" in architecture:
        weights["W_skip"] = draw(d_out, D_IN)
    config = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": dict(METADATA),
        "architecture": architecture,
    }
    return config | settings, weights


def write(folder: Path, config: object, weights: dict[str, Tensor]) -> Path:
    """Write both files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def reference(config: dict[str, Any], weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents and reconstruction by SAELens' formulas, in float64."""
    w, x = {name: tensor.double() for name, tensor in weights.items()}, x.double()
    architecture, W_dec = config["architecture"], w["W_dec"]
    shifted = x - w["b_dec"] if config["apply_b_dec_to_input"] else x
    if architecture == "gated":
        on = shifted @ w["W_enc"] + w["b_gate"] > 0
        acts = on * (shifted @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
        return acts, acts @ W_dec + w["b_dec"]
    pre = shifted @ w["W_enc"] + w["b_enc"]
    if config.get("rescale_acts_by_decoder_norm", "batchtopk" in architecture):
        pre, W_dec = pre * W_dec.norm(dim=-1), W_dec / W_dec.norm(dim=-1, keepdim=True)
    if architecture == "topk":
        top = pre.topk(config["k"], dim=-1)
        acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    else:
        threshold = w.get("threshold", w.get("topk_threshold", torch.tensor(0.0)))
        acts = pre.relu() * (pre > threshold)
    x_hat = acts @ W_dec + w["b_dec"]
    return acts, x_hat + x @ w["W_skip"].T if "W_skip" in w else x_hat
