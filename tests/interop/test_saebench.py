"""The adapter for SAEBench, by what SAEBench asks of an SAE; nothing of it is imported."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, jaxtyped
from torch import Tensor

from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.experts import SwitchEncoderConfig
from kronsae.core.pursuit import Pursuit
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import JumpReLUConfig, TopKConfig
from kronsae.interop.saebench import (
    LINEAR_ONLY,
    NoLinearEncoder,
    SAEBenchConfig,
    SAEBenchSAE,
    parents,
    transformer_lens_hook,
)
from kronsae.support.errors import UserError

D_IN = 8
DENSE = DenseEncoderConfig(d_sae=24)
KRON = KroneckerEncoderConfig(num_heads=3, d_base=2, d_extension=4)
SHAPES = {
    "dense-topk": SAEConfig(d_in=D_IN, encoder=DENSE, sparsifier=TopKConfig(k=5)),
    "dense-jumprelu": SAEConfig(d_in=D_IN, encoder=DENSE, sparsifier=JumpReLUConfig(k=5)),
    "kronecker": SAEConfig(d_in=D_IN, encoder=KRON, sparsifier=TopKConfig(k=5)),
    "pursuit": SAEConfig(d_in=D_IN, encoder=KRON, sparsifier=TopKConfig(k=5), pursuit=Pursuit(candidates=2)),
    "switch": SAEConfig(
        d_in=D_IN, encoder=SwitchEncoderConfig(num_experts=3, expert=DenseEncoderConfig(d_sae=8)),
        sparsifier=TopKConfig(k=5),
    ),
}  # fmt: skip
FACTORISED = ("kronecker", "pursuit", "switch")


def build(name: str) -> SAE:
    """Return an SAE with biases, and decoder rows of different norms."""
    sae = SHAPES[name].build(1)
    with torch.no_grad():
        sae.decoder.b_dec.normal_()
        if SHAPES[name].pursuit is None:
            sae.decoder.W_dec.mul_(torch.rand(24, 1) * 3 + 0.2)
        for parameter in sae.encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return sae


def about(**changes: object) -> SAEBenchConfig:
    values = {"model_name": "tiny", "d_in": D_IN, "d_sae": 24, "hook_layer": 2, "architecture": ""}
    return SAEBenchConfig(**(values | {"hook_name": "blocks.2.hook_resid_post"} | changes))  # type: ignore[arg-type]


@pytest.fixture(params=list(SHAPES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_reconstruction_is_the_saes_own(name: str) -> None:
    sae = build(name)
    adapter = SAEBenchSAE(sae, about())
    x = torch.randn(3, 4, D_IN)
    codes = sae.encode(x)
    torch.testing.assert_close(adapter(x), sae(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.encode(x), codes.to_dense() * sae.W_dec.norm(dim=1), rtol=1e-6, atol=1e-6)
    assert torch.equal(adapter.encode(x) > 0, codes.to_dense() > 0)


def test_decoder_rows_have_norm_1_as_saebench_checks(name: str) -> None:
    norms = SAEBenchSAE(build(name), about()).W_dec.data.norm(dim=1)
    assert torch.allclose(norms, torch.ones(24), atol=1e-5)


def test_a_direction_of_0_stays_0() -> None:
    sae = build("dense-topk")
    with torch.no_grad():
        sae.decoder.W_dec[3] = 0
    adapter = SAEBenchSAE(sae, about())
    assert not adapter.W_dec[3].any()
    assert adapter(torch.randn(5, D_IN)).isfinite().all()


@jaxtyped(typechecker=beartype)
def collected(acts: Float[Tensor, "batch seq_len d_sae"]) -> Float[Tensor, "batch seq_len d_sae"]:
    """The check that SAEBench's `collect_sae_activations` makes."""
    return acts


def test_activations_are_dense_in_the_saes_dtype(name: str) -> None:
    adapter = SAEBenchSAE(build(name), about()).to(dtype=torch.float64)
    acts = collected(adapter.encode(torch.randn(2, 3, D_IN)))
    assert acts.shape == (2, 3, 24)
    assert acts.dtype == adapter.dtype == torch.float64
    assert not acts.requires_grad
    assert adapter.encode(torch.randn(7, D_IN)).shape == (7, 24)
    assert adapter.decode(torch.rand(7, 24)).dtype == torch.float64
    assert adapter.cfg.dtype == "float64"
    assert adapter.device == torch.device("cpu")
    assert adapter.to("cpu") is adapter


def test_the_config_can_be_extended_and_written(name: str) -> None:
    adapter = SAEBenchSAE(build(name), about())
    adapter.cfg.metadata = object()  # type: ignore[attr-defined]  # as SAEBench does
    adapter.cfg.hook_layer = 2
    written = json.loads(json.dumps(adapter.cfg.to_dict()))
    assert written["architecture"] == SHAPES[name].architecture
    assert written["d_sae"] == 24
    assert written["hook_name"] == "blocks.2.hook_resid_post"


@pytest.mark.parametrize("name", ["dense-topk", "dense-jumprelu"])
def test_a_dense_encoder_has_W_enc_in_saebenchs_layout(name: str) -> None:
    sae = build(name)
    adapter = SAEBenchSAE(sae, about())
    assert adapter.W_enc.shape == (D_IN, 24)
    x = torch.randn(9, D_IN)
    acts = adapter.encode(x)
    pre = (x @ adapter.W_enc + adapter.b_enc).relu()
    torch.testing.assert_close(torch.where(acts > 0, pre, 0.0), acts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FACTORISED)
@pytest.mark.parametrize("attribute", LINEAR_ONLY)
def test_a_factorised_encoder_refuses_W_enc(name: str, attribute: str) -> None:
    adapter = SAEBenchSAE(build(name), about())
    assert not hasattr(adapter, attribute)
    with pytest.raises(NoLinearEncoder, match=f"^{attribute} exists only for linear encoders; .* Use encode and W_dec"):
        getattr(adapter, attribute)


@pytest.mark.parametrize("name", FACTORISED)
def test_the_placeholder_can_only_give_nan(name: str) -> None:
    adapter = SAEBenchSAE(build(name), about(), placeholder=True)
    assert adapter.W_enc.shape == (D_IN, 24)
    assert adapter.b_enc.shape == (24,)
    assert adapter.W_enc.isnan().all()
    assert adapter.b_enc.isnan().all()


def test_an_unknown_attribute_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'W_gate'"):
        SAEBenchSAE(build("kronecker"), about()).W_gate  # noqa: B018


def test_parents_are_the_rows_of_the_latents() -> None:
    sae = build("kronecker")
    found = parents(sae)
    for head, i, j in ((0, 0, 0), (1, 1, 2), (2, 0, 3)):
        latent = head * 8 + i * 4 + j
        for row, cosines in ((found.W_base[head, i], found.base_cosine), (found.W_extension[head, j],
                             found.extension_cosine)):  # fmt: skip
            direction = sae.W_dec[latent]
            expected = float((row @ direction / row.norm() / direction.norm()).detach())
            assert float(cosines[latent]) == pytest.approx(expected, abs=1e-6)
    x = torch.randn(1, D_IN)
    u = (found.W_base @ x[0] + found.b_base).relu()
    v = (found.W_extension @ x[0] + found.b_extension).relu()
    products = (u.unsqueeze(2) * v.unsqueeze(1)).sqrt().flatten()
    codes = sae.encode(x)
    torch.testing.assert_close(products[codes.indices[0]], codes.values[0], rtol=1e-5, atol=1e-6)


def test_a_dense_sae_has_no_parents() -> None:
    with pytest.raises(UserError, match=r"parents exist in Kronecker encoders; this SAE is dense-topk. Read W_enc."):
        parents(build("dense-topk"))


def test_with_null_symbols_there_are_not_always_two_parents() -> None:
    encoder = KroneckerEncoderConfig(num_heads=3, d_base=2, d_extension=2, null_symbols=True)
    with pytest.raises(UserError, match="sae must not have null symbols, with which a latent may have only one parent"):
        parents(SAEConfig(d_in=D_IN, encoder=encoder, sparsifier=TopKConfig(k=5)).build())


@pytest.mark.parametrize("changes", [{"write_widths": (4,)}, {"read_widths": (4, 4)}])
def test_transcoders_and_crosscoders_are_refused(changes: dict[str, tuple[int, ...]]) -> None:
    sae = replace(SHAPES["dense-topk"], **changes).build()  # type: ignore[arg-type]
    with pytest.raises(UserError, match="sae must read one hook and reconstruct it: SAEBench measures nothing else"):
        SAEBenchSAE(sae, about())


@pytest.mark.parametrize("hook", ["layers.3", "3", "gpt_neox.layers.3", "transformer.h.3", "blocks.3.hook_resid_post"])
def test_hooks_of_blocks_have_transformer_lens_names(hook: str) -> None:
    assert transformer_lens_hook(hook) == ("blocks.3.hook_resid_post", 3)


def test_transformer_lens_names_are_kept() -> None:
    assert transformer_lens_hook("blocks.12.hook_mlp_out") == ("blocks.12.hook_mlp_out", 12)


@pytest.mark.parametrize(
    "hook", ["layers.3.mlp", "layers.3.mlp:input", "layers.3:input", "layers", "embed_in", "-1", ""]
)
def test_other_hooks_are_refused(hook: str) -> None:
    with pytest.raises(UserError, match="hook must be the output of a transformer block"):
        transformer_lens_hook(hook)
