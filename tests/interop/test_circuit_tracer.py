"""Transcoders for circuit-tracer: the files, and the encoder vectors of any architecture. The package is not needed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import kronsae as ks
from kronsae.core.sae import SAE
from kronsae.interop import circuit_tracer_export as target
from kronsae.interop.circuit_tracer import LayerTranscoder, transcoder_set
from kronsae.interop.exportable import Exportable
from kronsae.support.errors import UserError
from kronsae.training.config import MemberConfig

D = 6
HOOKS: dict[str, Any] = {"read": "layers.0.mlp:input", "write": "layers.0.mlp"}


def filled(member: MemberConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> SAE:
    """Return a saved form of a transcoder with random biases, skip weights and thresholds."""
    sae = member.shape(D).build(seed).to(dtype).trained()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sae.state_dict().items():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)
            if "threshold" in name:
                weight.copy_(noise * 0.3 - 1.5)
            else:
                weight.add_(noise, alpha=0.3)
    return sae.requires_grad_(False)


def exportable(layer: int, *, skip: bool = False, read: str = "", **changes: Any) -> Exportable:
    member = ks.jumprelu(d_sae=12, k=3, skip=skip, **HOOKS)
    settings: dict[str, Any] = {
        "name": f"t{layer}",
        "sae": filled(member, layer),
        "model": "EleutherAI/pythia-70m",
        "hooks_read": (read or f"layers.{layer}.mlp:input",),
        "hooks_written": (f"gpt_neox.layers.{layer}.mlp",),
    }
    return Exportable(**settings | changes)


@pytest.mark.parametrize("skip", [False, True])
def test_the_files_hold_the_transcoder(skip: bool, tmp_path: Path) -> None:
    """Their formulas, applied to the files, give our latents and reconstruction, to 1e-12 in float64."""
    saes = tuple(exportable(layer, skip=skip) for layer in (1, 0))
    target.check(saes)
    done = target.export(saes, tmp_path / "set")
    assert {path.name for path in (tmp_path / "set").iterdir()} == {
        "config.yaml",
        "layer_0.safetensors",
        "layer_1.safetensors",
    }
    assert done.folders["t1"] == tmp_path / "set" / "layer_1.safetensors"
    assert yaml.safe_load((tmp_path / "set" / "config.yaml").read_text()) == {
        "model_name": "EleutherAI/pythia-70m",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "scan": "set",
    }
    for one in saes:
        W = load_file(done.folders[one.name])
        assert W.keys() == {"W_enc", "b_enc", "W_dec", "b_dec", "activation_function.threshold"} | (
            {"W_skip"} if skip else set()
        )
        x = torch.randn(50, D, dtype=torch.float64)
        z = x @ W["W_enc"].T + W["b_enc"]
        f = z * (z > W["activation_function.threshold"])
        y = f @ W["W_dec"] + W["b_dec"] + (x @ W["W_skip"].T if skip else 0)
        torch.testing.assert_close(f, one.sae.encode(x).to_dense(), rtol=0, atol=1e-12)
        torch.testing.assert_close(y, one.sae(x), rtol=0, atol=1e-12)
        assert 0 < int((f != 0).sum()) < f.numel()


def test_a_local_model_is_not_named(tmp_path: Path) -> None:
    done = target.export((exportable(0, model=str(tmp_path)),), tmp_path / "set")
    assert "model_name" not in (tmp_path / "set" / "config.yaml").read_text()
    assert done.remarks == ("config.yaml names no model, because it is local: give circuit-tracer --model.",)


def refusal(*saes: Exportable) -> str:
    with pytest.raises(UserError) as caught:
        target.check(saes)
    return str(caught.value)


def test_what_the_format_cannot_hold() -> None:
    assert refusal(exportable(0), exportable(2)) == (
        "circuit-tracer needs exactly one transcoder for each layer of the model, from 0 on; got layers 0, 2. Name one "
        "SAE per layer, or train the missing ones."
    )
    assert refusal(exportable(0), exportable(0)).startswith(
        "circuit-tracer needs exactly one transcoder for each layer"
    )
    assert refusal(exportable(0), exportable(1, skip=True)) == (
        "circuit-tracer needs a skip connection to be alike in all transcoders; got t0: False, t1: True."
    )
    other = filled(ks.jumprelu(d_sae=13, k=3, **HOOKS))
    assert refusal(exportable(0), exportable(1, sae=other)) == (
        "circuit-tracer needs d_sae to be alike in all transcoders; got t0: 12, t1: 13."
    )
    plain = filled(ks.jumprelu(d_sae=12, k=3))
    assert refusal(exportable(0, sae=plain)).startswith(
        "circuit-tracer needs transcoders with d_out = d_in; 't0' is a dense-jumprelu SAE, which reconstructs what it "
        "reads. Train"
    )
    for member in (ks.topk(d_sae=12, k=3, **HOOKS), ks.kron(num_heads=2, d_base=2, d_extension=3, k=3, **HOOKS)):
        said = refusal(exportable(0, sae=filled(member)))
        assert said.startswith("circuit-tracer's files hold dense transcoders with a threshold per latent; 't0' is a ")
        assert said.endswith("in Python: kronsae.interop.circuit_tracer.transcoder_set(saes).")
    for read in ("layers.0.mlp", "layers.1.mlp:input", "layers.0", "layers.0.attention:input"):
        assert refusal(exportable(0, read=read)).startswith("t0 must read the input of an MLP and write its output,")
    target.check((exportable(0, sae=filled(ks.batch_topk(d_sae=12, k=3, **HOOKS))),))


TRANSCODERS: dict[str, MemberConfig] = {
    "jumprelu": ks.jumprelu(d_sae=12, k=3, skip=True, **HOOKS),
    "topk": ks.topk(d_sae=12, k=3, **HOOKS),
    "kron": ks.kron(num_heads=3, d_base=2, d_extension=2, k=3, skip=True, **HOOKS),
    "kron, jumprelu": ks.jumprelu(num_heads=3, d_base=2, d_extension=2, k=3, **HOOKS),
    "kron, power_mean": ks.kron(num_heads=3, d_base=2, d_extension=2, k=3, gate="power_mean", **HOOKS),
}


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_the_interface_of_a_single_layer_transcoder(kind: str) -> None:
    """Dense and sparse forms agree with the SAE, in float64; an encoder vector is the gradient of its latent."""
    sae = filled(TRANSCODERS[kind])
    layer = LayerTranscoder(sae, 0)
    x = torch.randn(9, D, dtype=torch.float64)
    dense = sae.encode(x).to_dense()
    torch.testing.assert_close(layer.encode(x), dense)
    torch.testing.assert_close(layer.activation_function(layer.encode(x, apply_activation_function=False)), dense)
    torch.testing.assert_close(layer(x), sae(x))
    torch.testing.assert_close(layer.decode(dense, x), sae(x))
    sparse, vectors = layer.encode_sparse(x)
    expected = dense.clone()
    expected[0] = 0
    torch.testing.assert_close(sparse.to_dense(), expected)
    reconstruction, scaled = layer.decode_sparse(sparse, x)
    torch.testing.assert_close(reconstruction, layer.decode(expected, x))
    rows, latents = sparse.indices()
    assert len(rows) > 5
    torch.testing.assert_close(scaled, sparse.values().unsqueeze(1) * layer._get_decoder_vectors(latents))
    for place, (row, latent) in enumerate(zip(rows.tolist(), latents.tolist(), strict=True)):
        start = x[row].clone().requires_grad_()

        def value(one: Tensor = start, latent: int = latent) -> Tensor:
            found: Tensor = sae.encode(one.unsqueeze(0)).to_dense()[0, latent]
            return found

        (gradient,) = torch.autograd.grad(value(), start)
        torch.testing.assert_close(vectors[place], gradient, rtol=1e-9, atol=1e-12)


def test_the_encoder_vectors_of_mand_are_complete() -> None:
    """Euler's identity: without biases, ``z = dz/dx . x`` exactly, so nothing of a latent is left unattributed."""
    sae = filled(TRANSCODERS["kron"])
    sae.encoder.bias.zero_()
    x = torch.randn(9, D, dtype=torch.float64)
    sparse, vectors = LayerTranscoder(sae, 0).encode_sparse(x)
    torch.testing.assert_close((vectors * x[sparse.indices()[0]]).sum(1), sparse.values(), rtol=1e-12, atol=1e-12)


def test_what_is_no_layer_transcoder() -> None:
    for member in (ks.topk(d_sae=12, k=3), ks.switch(num_experts=2, d_sae=12, k=3, **HOOKS)):
        with pytest.raises(UserError, match=r"^saes must be transcoders with d_out = d_in, a dense or a Kronecker enc"):
            LayerTranscoder(filled(member), 0)
    null_symbols = ks.kron(num_heads=3, d_base=1, d_extension=1, k=3, null_symbols=True, **HOOKS)
    with pytest.raises(
        UserError, match=r"no null symbols and no pursuit; got a kron.* for layer 0 with null symbols\."
    ):
        LayerTranscoder(filled(null_symbols), 0)


@pytest.mark.skipif(importlib.util.find_spec("circuit_tracer") is not None, reason="circuit-tracer is installed")
def test_without_the_package() -> None:
    with pytest.raises(UserError) as caught:
        transcoder_set({0: filled(TRANSCODERS["kron"])})
    assert str(caught.value) == (
        "circuit-tracer must be installed; it was not found. Install it with: pip install circuit-tracer."
    )
