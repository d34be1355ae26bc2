"""Folders in the formats of other libraries, and what those libraries compute, written out as formulas."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 16, 40, 5

Latents = Callable[[Tensor], Tensor]
"""From activations [B, D_IN] to the latents [B, D_SAE] of the other library."""

Decode = Callable[[Tensor, Tensor], Tensor]
"""From latents and activations to the reconstruction."""


def keep_k(z: Tensor, k: int = K) -> Tensor:
    """Return the k largest of each row, after ReLU."""
    values, indices = z.relu().topk(k)
    return torch.zeros_like(z).scatter(1, indices, values)


def numbers(*shape: int, seed: int, scale: float = 0.4) -> Tensor:
    """Return seeded normal numbers."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparsify(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Latents, Decode]:
    """Write an SAE of sparsify (or a transcoder, by ``changes`` of its config); return what it computes."""
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": K}
    config |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_IN} | changes
    tensors = {
        "encoder.weight": numbers(D_SAE, D_IN, seed=1),
        "encoder.bias": numbers(D_SAE, seed=2),
        "W_dec": numbers(D_SAE, D_IN, seed=3),
        "b_dec": numbers(D_IN, seed=4),
    }
    if config["skip_connection"]:
        tensors["W_skip"] = numbers(D_IN, D_IN, seed=5)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    one = {name: tensor.double() for name, tensor in tensors.items()}
    subtracted = 0.0 if config["transcode"] else one["b_dec"]

    def latents(x: Tensor) -> Tensor:
        return keep_k((x.double() - subtracted) @ one["encoder.weight"].T + one["encoder.bias"])

    def decode(z: Tensor, x: Tensor) -> Tensor:
        skipped = x.double() @ one["W_skip"].T if "W_skip" in one else 0.0
        return z @ one["W_dec"] + one["b_dec"] + skipped

    return latents, decode


def _trainer(kind: str, **more: Any) -> dict[str, Any]:
    about = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 2, "steps": 100, "seed": 0}
    return about | {"lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_2"} | more


def dictionary_learning(folder: Path, kind: str, **changes: Any) -> tuple[Latents, Decode]:
    """Write an SAE of a class of dictionary_learning, 0.1.0; ``changes`` are of its config's ``trainer``."""
    rows, bias = numbers(D_SAE, D_IN, seed=1), numbers(D_SAE, seed=2)
    W_dec, b_dec = numbers(D_SAE, D_IN, seed=3), numbers(D_IN, seed=4)
    number_of = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    linear = {"encoder.weight": rows, "encoder.bias": bias, "decoder.weight": W_dec.T}
    matrices = {"W_enc": rows.T, "b_enc": bias, "W_dec": W_dec, "b_dec": b_dec}
    lowest = numbers(D_SAE, seed=6, scale=1.0)
    more: dict[str, Any] = {"k": K} if kind.endswith(("TopK", "TopKSAE")) else {}
    tensors: dict[str, Tensor] = {
        "AutoEncoder": linear | {"bias": b_dec},
        "AutoEncoderNew": linear | {"decoder.bias": b_dec},
        "GatedAutoEncoder": {"encoder.weight": rows, "decoder.weight": W_dec.T, "decoder_bias": b_dec}
        | {name: numbers(D_SAE, seed=seed) for seed, name in enumerate(("r_mag", "gate_bias", "mag_bias"), 7)},
        "AutoEncoderTopK": linear | {"b_dec": b_dec} | number_of,
        "BatchTopKSAE": linear | {"b_dec": b_dec} | number_of,
        "MatryoshkaBatchTopKSAE": matrices | number_of | {"group_sizes": torch.tensor([8, D_SAE - 8])},
        "JumpReluAutoEncoder": matrices | {"threshold": lowest},
    }[kind]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    config = {"trainer": _trainer(kind, **more) | changes, "buffer": {"io": "out", "ctx_len": 32}}
    (folder / "config.json").write_text(json.dumps(config))
    one = {name: tensor.double() for name, tensor in tensors.items()}
    norms = W_dec.double().norm(dim=1) if kind == "AutoEncoder" else torch.ones(D_SAE, dtype=torch.float64)

    def latents(x: Tensor) -> Tensor:
        x = x.double()
        centred = x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - b_dec.double()
        z = centred @ rows.double().T
        if kind == "GatedAutoEncoder":
            opened = z + one["gate_bias"] > 0
            return opened * (one["r_mag"].exp() * z + one["mag_bias"]).relu()
        z = z + bias.double()
        if kind == "AutoEncoderTopK":
            return keep_k(z)
        if "threshold" in one:
            return (z * (z > one["threshold"])).relu()
        return z.relu() * norms

    def decode(z: Tensor, x: Tensor) -> Tensor:
        return z @ (W_dec.double() / norms[:, None]) + b_dec.double()

    return latents, decode


def gemma_scope(folder: Path, seed: int = 0) -> None:
    """Write an SAE of Gemma Scope."""
    shapes: dict[str, Any] = {"W_enc": (D_IN, D_SAE), "b_enc": D_SAE, "W_dec": (D_SAE, D_IN), "b_dec": D_IN}
    draw = np.random.default_rng(seed).standard_normal
    arrays: dict[str, Any] = {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **arrays, threshold=np.abs(draw(D_SAE)).astype(np.float32))


def wrapped_state_dict(state: Mapping[str, Tensor]) -> dict[str, torch.nn.Parameter]:
    """Return a state dict of Parameters, which some users save."""
    return {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()}
