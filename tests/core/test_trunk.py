"""Heads with a dense trunk: exact selection from the union of both parts, ties, initialisation and bad configs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kronsae as ks
from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.pursuit import Pursuit
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.core.trunk import TrunkEncoder, TrunkEncoderConfig, UnionLatents
from kronsae.kernels import BatchChoice, Choice
from kronsae.support.errors import UserError

assert_equal = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)  # float64


def config(heads: int, d_base: int, d_extension: int, blocks: int, null_symbols: bool = False) -> TrunkEncoderConfig:
    shape = KroneckerEncoderConfig(num_heads=heads, d_base=d_base, d_extension=d_extension, null_symbols=null_symbols)
    return TrunkEncoderConfig(trunk=DenseEncoderConfig(d_sae=blocks * shape.block), heads=shape)


def drawn(encoder: TrunkEncoderConfig, d_in: int, k: int, seed: int, *, tied: bool = False) -> SAE:
    sae = SAEConfig(d_in=d_in, encoder=encoder, sparsifier=TopKConfig(k=k)).build(seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if tied:
                parameter.round_().clamp_(-1, 1)
    return sae


def inputs(tokens: int, d_in: int, seed: int) -> Tensor:
    return torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_codes_and_gradients_are_those_of_the_materialised_latents(data: st.DataObject) -> None:
    whole = st.integers
    heads, d_base, d_extension, blocks = (data.draw(whole(1, most)) for most in (5, 3, 4, 3))
    encoder = config(heads, d_base, d_extension, blocks, null_symbols=data.draw(st.booleans()))
    k, d_in, tokens = data.draw(whole(1, encoder.d_sae)), data.draw(whole(1, 9)), data.draw(whole(1, 12))
    seed = data.draw(whole(0, 10**6))
    sae, x_BD = drawn(encoder, d_in, k, seed), inputs(tokens, d_in, seed).requires_grad_()
    sae.decode(sae.encode(x_BD)).square().sum().backward()
    found = {name: parameter.grad for name, parameter in sae.named_parameters()} | {"x": x_BD.grad}
    sae.zero_grad()
    x_BD.grad = None
    z_BF = sae.encoder(x_BD).materialize()
    kept_BF = torch.zeros_like(z_BF).scatter(1, z_BF.topk(k, dim=1).indices, 1.0)
    ((z_BF * kept_BF) @ sae.W_dec + sae.b_dec).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in sae.named_parameters()} | {"x": x_BD.grad}
    for name, grad in expected.items():
        own = found[name]
        zero = torch.zeros_like(sae.get_parameter(name) if name != "x" else x_BD)
        assert_equal(zero if own is None else own, zero if grad is None else grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_choices_of_listed_latents_and_of_the_batch(tied: bool) -> None:
    encoder = config(4, 2, 3, 2)
    for seed in range(20):
        sae, x_BD = drawn(encoder, 5, 3, seed, tied=tied), inputs(9, 5, seed)
        x_BD = x_BD.round() if tied else x_BD
        latents = sae.encoder(x_BD)
        assert isinstance(latents, UnionLatents)
        z_BF = latents.materialize()
        for listed in ([0, 3, 11, 12, 13, 35], [12, 30], [1, 2]):
            (codes,) = latents.choose(Choice(2, torch.tensor(listed)))
            assert set(codes.indices[codes.active].tolist()) <= set(listed)
            assert_equal(codes.values.sort(dim=1).values, z_BF[:, listed].topk(2, dim=1).values.sort(dim=1).values)
            assert_equal(z_BF.gather(1, codes.indices)[codes.active], codes.values[codes.active])
        (codes,) = latents.choose(BatchChoice(17))
        wanted_N = z_BF.flatten().topk(17).values
        assert_equal(codes.values[codes.active].sort().values, wanted_N[wanted_N > 0].sort().values)
        assert_equal(z_BF.gather(1, codes.indices)[codes.active], codes.values[codes.active])


def test_of_equal_values_the_trunks_come_first_then_the_smaller_latent() -> None:
    sae = drawn(config(3, 2, 2, 1), 4, 5, 0)
    with torch.no_grad():
        for name, parameter in sae.encoder.named_parameters():
            parameter.fill_(1.0 if name.endswith("bias") else 0.0)
    codes = sae.encode(inputs(3, 4, 0))
    assert (codes.values == 1).all()
    assert codes.indices.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_a_pursuit_takes_candidates_from_both_parts() -> None:
    sae, x_BD = drawn(config(8, 2, 2, 4), 6, 4, 1), inputs(50, 6, 1)
    plain, pursued = sae.encode(x_BD), sae.encode(x_BD, pursuit=Pursuit())
    assert (x_BD - sae.decode(pursued)).square().sum() < (x_BD - sae.decode(plain)).square().sum()
    used_F = pursued.counts()
    assert used_F[:16].any()
    assert used_F[16:].any()


def test_both_parts_start_with_the_norm_of_the_whole_dictionary() -> None:
    encoder = config(300, 4, 4, 100)
    built = encoder.build(50)
    assert isinstance(built, TrunkEncoder)
    built.initialize(torch.Generator().manual_seed(0))
    expected = (50 / (2 * encoder.d_sae)) ** 0.5
    for weight in (built.trunk.weight, built.heads.weight.flatten(0, 1)):
        assert float(weight.detach().norm(dim=1).mean()) == pytest.approx(expected, rel=0.02)
    given_norm = ks.kron(d_sae=6400, d_base=4, d_extension=4, d_trunk=1600, k=4, init_norm=0.3).encoder.build(50)
    given_norm.initialize(torch.Generator().manual_seed(0))
    assert float(given_norm.weight.detach().norm(dim=1).mean()) == pytest.approx(0.3, rel=0.02)


def test_sizes_and_parameters() -> None:
    member = ks.kron(d_sae=64, d_base=2, d_extension=4, d_trunk=16, k=5)
    assert member.encoder == ks.kron(num_heads=6, d_base=2, d_extension=4, d_trunk=16, k=5).encoder
    shape = member.shape(12, "layers.0")
    assert shape.architecture == "trunk-topk"
    assert shape.sizes == {
        "d_in": "12",
        "d_sae": 64,
        "k": 5,
        "d_trunk": 16,
        "num_heads": 6,
        "d_base": 2,
        "d_extension": 4,
    }
    assert member.encoder.multiply_adds(12) == 12 * 16 + 12 * 6 * 6 + 48


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"d_sae": 64, "d_trunk": 12}, "d_trunk must be a multiple of the latents of a head, 8; got 12."),
        ({"d_sae": 64, "d_trunk": 64}, "d_trunk must be less than d_sae; got 64 with d_sae=64."),
        ({"d_sae": 64, "d_trunk": -8}, "d_trunk must be"),
        ({"num_heads": 4, "d_trunk": 12}, "d_trunk must be a multiple of the latents of a head, 8; got 12."),
        (
            {"num_heads": 4, "d_sae": 64, "d_trunk": 8},
            r"d_sae must equal d_trunk \+ num_heads \* 8 latents of a head; got 64 with 8 \+",
        ),
    ],
)
def test_bad_sizes_are_refused(words: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ks.kron(d_base=2, d_extension=4, k=5, **words)  # type: ignore[arg-type]


def test_a_trunk_needs_heads_and_no_experts() -> None:
    with pytest.raises(UserError, match="d_trunk must be used with a Kronecker encoder; got a dense one"):
        ks.batch_topk(d_sae=64, d_trunk=16, k=5)
    with pytest.raises(UserError, match="d_trunk must not be used with experts"):
        ks.switch(d_sae=128, d_base=2, d_extension=4, d_trunk=16, num_experts=2, k=5)
