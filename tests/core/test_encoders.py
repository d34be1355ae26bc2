"""Test selections of latents against the materialised definition, and the paper's initialisation."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kronsae import kernels
from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import DenseEncoderConfig, EncoderConfig, KroneckerEncoder, KroneckerEncoderConfig
from kronsae.core.gates import GATES, GateName
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.kernels import Choice
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError

# float64 throughout: with fp32 roots, the rounding decides which of two neighbours is the larger
assert_equal = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)


def build(encoder: EncoderConfig, k: int, d_in: int, seed: int) -> SAE:
    sae = SAEConfig(d_in=d_in, encoder=encoder, sparsifier=TopKConfig(k=k)).build(seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae


def inputs(tokens: int, d_in: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(tokens, d_in, generator=generator, dtype=torch.float64).requires_grad_()


# conditions: changes made to the weights and the input
def as_drawn(sae: SAE, x_BD: Tensor) -> None:
    """Return continuous values, which have no ties."""


def tied(sae: SAE, x_BD: Tensor) -> None:
    """Return small integers, with many equal products, many exact zeros and no rounding."""
    for tensor in (*sae.parameters(), x_BD):
        tensor.round_().clamp_(-1, 1)


def all_negative(sae: SAE, x_BD: Tensor) -> None:
    sae.encoder.bias.fill_(-1e3)


def some_tokens_silent(sae: SAE, x_BD: Tensor) -> None:
    """Return values for which every second token has no active latents."""
    sae.encoder.weight.abs_()
    sae.encoder.bias.zero_()
    x_BD[::2].abs_().neg_()
    x_BD[1::2].abs_()


PATHS = ["portable", None]  # None: whatever is the fastest here


def kernels_path(path: str | None) -> AbstractContextManager[None]:
    return nullcontext() if path is None else kernels.use(path)


CONDITIONS: list[Callable[[SAE, Tensor], None]] = [as_drawn, tied, all_negative, some_tokens_silent]


@st.composite
def kronecker_shapes(draw: st.DrawFn) -> tuple[KroneckerEncoderConfig, int]:
    heads, d_base, d_extension = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 7))
    gate: GateName = draw(st.sampled_from(sorted(GATES)))
    null_symbols = gate == "mand" and draw(st.booleans())
    shape = KroneckerEncoderConfig(
        num_heads=heads, d_base=d_base, d_extension=d_extension, gate=gate, null_symbols=null_symbols
    )
    # as often fewer than the heads, where pruning leaves heads out, as any number
    return shape, draw(st.integers(1, heads) | st.integers(1, shape.d_sae))


@st.composite
def dense_shapes(draw: st.DrawFn) -> tuple[DenseEncoderConfig, int]:
    shape = DenseEncoderConfig(d_sae=draw(st.integers(1, 60)))
    return shape, draw(st.integers(1, shape.d_sae))


def assert_are_the_largest(codes: SparseCodes, all_BF: Tensor, k: int) -> None:
    """Indices distinct, each value its latent's, the multiset of values torch.topk's, none left out larger."""
    assert codes.indices.shape == (len(all_BF), k)
    chosen = torch.zeros_like(all_BF, dtype=torch.bool).scatter_(1, codes.indices, True)
    assert (chosen.sum(1) == k).all()
    assert_equal(codes.values, all_BF.gather(1, codes.indices))
    largest = all_BF.topk(k, dim=1).values
    assert_equal(codes.values.sort(1, descending=True).values, largest)
    left_out = all_BF.masked_fill(chosen, -torch.inf).amax(1)
    assert (codes.values.amin(1) >= left_out - 1e-12 * left_out.abs()).all()


def gradients(loss: Tensor, sae: SAE, x_BD: Tensor) -> dict[str, Tensor]:
    named = dict(sae.named_parameters()) | {"x": x_BD}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def loss_of(x_hat_BD: Tensor, values_BK: Tensor, x_BD: Tensor) -> Tensor:
    """Not the training loss: the reconstruction's and each value's own gradient, none of them equal to another."""
    return (x_hat_BD - x_BD).square().sum() + (
        values_BK * torch.linspace(1, 2, values_BK.numel()).view_as(values_BK)
    ).sum()


def assert_equals_the_definition(sae: SAE, x_BD: Tensor, codes: SparseCodes, all_BF: Tensor) -> None:
    """Forward and every gradient, against plain autograd through all F latents and a dense B x F decoder."""
    values_BK = all_BF.gather(1, codes.indices)
    dense_BF = torch.zeros_like(all_BF).scatter(1, codes.indices, values_BK)
    expected_BD = dense_BF @ sae.W_dec + sae.b_dec
    x_hat_BD = sae.decode(codes)
    assert_equal(x_hat_BD, expected_BD)
    expected = gradients(loss_of(expected_BD, values_BK, x_BD), sae, x_BD)
    found = gradients(loss_of(x_hat_BD, codes.values, x_BD), sae, x_BD)
    for name, gradient in expected.items():
        # summands of the size of the largest gradient may cancel; what remains has their rounding, 500 eps of float64
        atol = max(1e-11, 1e-13 * float(gradient.abs().max())) if gradient.numel() else 0.0
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=atol, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("condition", CONDITIONS)
@given(
    shape=kronecker_shapes() | dense_shapes(),
    tokens=st.integers(1, 9),
    d_in=st.integers(1, 7),
    seed=st.integers(0, 999),
)
@settings(max_examples=20, deadline=None, report_multiple_bugs=False)
def test_topk_equals_the_materialised_definition(
    path: str | None,
    condition: Callable[[SAE, Tensor], None],
    shape: tuple[Any, int],
    tokens: int,
    d_in: int,
    seed: int,
) -> None:
    sae, x_BD = build(*shape, d_in, seed), inputs(tokens, d_in, seed)
    with torch.no_grad():
        condition(sae, x_BD)
    all_BF = sae.encoder(x_BD).materialize()
    with kernels_path(path):
        codes = sae.encode(x_BD)
        assert_are_the_largest(codes, all_BF, shape[1])
        assert_equals_the_definition(sae, x_BD, codes, all_BF)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("condition", CONDITIONS)
@given(
    shape=kronecker_shapes() | dense_shapes(),
    tokens=st.integers(1, 9),
    d_in=st.integers(1, 7),
    seed=st.integers(0, 999),
    data=st.data(),
)
@settings(max_examples=20, deadline=None, report_multiple_bugs=False)
def test_choosing_among_some_latents_equals_masking(
    path: str | None,
    condition: Callable[[SAE, Tensor], None],
    shape: tuple[Any, int],
    tokens: int,
    d_in: int,
    seed: int,
    data: st.DataObject,
) -> None:
    sae, x_BD = build(*shape, d_in, seed), inputs(tokens, d_in, seed)
    with torch.no_grad():
        condition(sae, x_BD)
    listed = data.draw(st.lists(st.integers(0, sae.d_sae - 1), min_size=1, unique=True))
    k = data.draw(st.integers(1, len(listed)))
    latents = sae.encoder(x_BD)
    all_BF = latents.materialize()
    unlisted = torch.ones(sae.d_sae, dtype=torch.bool).index_fill(0, torch.tensor(listed), False)
    with kernels_path(path):
        both = latents.choose(Choice(shape[1]), Choice(k, torch.tensor(listed)))
        assert_are_the_largest(both[0], all_BF, shape[1])
        assert_are_the_largest(both[1], all_BF.masked_fill(unlisted, -torch.inf), k)
        for codes in both:
            assert_equals_the_definition(sae, x_BD, codes, all_BF)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", range(1, 10))
def test_each_of_the_k_largest_may_sit_in_a_head_of_its_own(k: int, path: str | None) -> None:
    """Test a case that needs all k heads: with k - 1 expanded heads, the last latent would be missed."""
    sae = build(KroneckerEncoderConfig(num_heads=9, d_base=2, d_extension=3), k, 4, seed=0)
    strength_H = torch.tensor([4.0, 9.0, 1.0, 7.0, 3.0, 8.0, 2.0, 6.0, 5.0])
    with torch.no_grad():
        sae.encoder.weight.zero_()
        sae.encoder.bias.fill_(1e-3)
        sae.encoder.bias[:, 1] = sae.encoder.bias[:, 4] = strength_H  # base 1 and extension 2 of each head
    with kernels_path(path):
        codes = sae.encode(inputs(3, 4, seed=0))
    best = strength_H.topk(k)
    for token in range(3):
        order = codes.values[token].argsort(descending=True)
        assert_equal(codes.values[token, order], best.values.double())
        assert codes.indices[token, order].tolist() == [6 * head + 5 for head in best.indices.tolist()]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gate", sorted(GATES.keys() - {"minimum", "and_ail"}))  # whose cells are tied
def test_indices_agree_where_nothing_is_tied(gate: GateName, path: str | None) -> None:
    shape = KroneckerEncoderConfig(num_heads=300, d_base=2, d_extension=4, gate=gate)
    sae, x_BD = build(shape, 20, 16, seed=0), inputs(50, 16, seed=0)
    with kernels_path(path):
        codes = sae.encode(x_BD)
    largest = sae.encoder(x_BD).materialize().topk(20)
    assert torch.equal(codes.indices.sort(1).values, largest.indices.sort(1).values)


def test_tied_inputs_are_tied() -> None:
    """The previous test covers ties only if there are ties at the threshold."""
    shape = KroneckerEncoderConfig(num_heads=9, d_base=3, d_extension=4)
    sae, x_BD = build(shape, 5, 7, seed=0), inputs(40, 7, seed=0)
    with torch.no_grad():
        tied(sae, x_BD)
    sixth = sae.encoder(x_BD).materialize().topk(6).values
    at_threshold = (sixth[:, 4] == sixth[:, 5]) & (sixth[:, 4] > 0)
    assert at_threshold.float().mean() > 0.5


def test_a_head_that_pruning_leaves_out_would_change_the_answer() -> None:
    """The check detects that the best head is left out."""
    shape = KroneckerEncoderConfig(num_heads=9, d_base=2, d_extension=3)
    sae, x_BD = build(shape, 3, 7, seed=0), inputs(5, 7, seed=0)
    latents = sae.encoder(x_BD)
    all_BF = latents.materialize()
    best_head = int(all_BF[0].argmax()) // 6
    rest = torch.tensor([latent for latent in range(54) if latent // 6 != best_head])
    with pytest.raises(AssertionError):
        assert_are_the_largest(latents.choose(Choice(3, rest))[0], all_BF, 3)


@pytest.mark.parametrize(
    "encoder",
    [
        KroneckerEncoderConfig(num_heads=5, d_base=2, d_extension=3),
        KroneckerEncoderConfig(num_heads=2, d_base=2, d_extension=3, gate="mand_eps"),
        KroneckerEncoderConfig(num_heads=5, d_base=2, d_extension=3, gate="power_mean"),
        KroneckerEncoderConfig(num_heads=5, d_base=2, d_extension=3, gate="raw_product"),
        KroneckerEncoderConfig(num_heads=5, d_base=2, d_extension=3, null_symbols=True),
        DenseEncoderConfig(d_sae=20),
    ],
    ids=["mand", "mand_eps", "power_mean", "raw_product", "null symbols", "dense"],
)
def test_gradcheck(encoder: EncoderConfig) -> None:
    sae, x_BD = build(encoder, 4, 5, seed=2), inputs(3, 5, seed=2)
    names = list(dict(sae.named_parameters()))

    def reconstruct(x_BD: Tensor, *parameters: Tensor) -> Tensor:
        weights = dict(zip(names, parameters, strict=True))
        found: Tensor = torch.func.functional_call(sae, weights, (x_BD,))
        return found

    assert torch.autograd.gradcheck(reconstruct, (x_BD, *sae.parameters()), eps=1e-7, atol=1e-5)


def test_latent_numbering_is_head_then_base_then_extension() -> None:
    sae = build(KroneckerEncoderConfig(num_heads=3, d_base=2, d_extension=4), 24, 5, seed=0)
    assert isinstance(sae.encoder, KroneckerEncoder)
    x_BD = inputs(6, 5, seed=0)
    u_BHM, v_BHN = sae.encoder.pre_latents(x_BD)
    assert (u_BHM.shape, v_BHN.shape) == ((6, 3, 2), (6, 3, 4))
    torch.testing.assert_close(u_BHM[:, 1, 0], x_BD @ sae.encoder.W_base[1, 0] + sae.encoder.bias[1, 0])
    torch.testing.assert_close(v_BHN[:, 2, 3], x_BD @ sae.encoder.W_extension[2, 3] + sae.encoder.bias[2, 5])
    all_BF = sae.encode(x_BD).to_dense()
    for h in range(3):
        for i in range(2):
            for j in range(4):
                product = u_BHM[:, h, i].relu() * v_BHN[:, h, j].relu()
                torch.testing.assert_close(all_BF[:, h * 8 + i * 4 + j], product.sqrt())


def test_null_symbols_by_hand() -> None:
    """A grid of 3 x 4 without its last cell; index ``h*11 + i*4 + j``; j = 3: no extension, i = 2: no base."""
    shape = KroneckerEncoderConfig(num_heads=2, d_base=2, d_extension=3, null_symbols=True)
    assert (shape.d_sae, shape.block) == (22, 11)
    sae = build(shape, 22, 4, seed=0)
    with torch.no_grad():
        sae.encoder.weight.zero_()
        sae.encoder.bias.copy_(torch.tensor([[9.0, 1.0, 4.0, -2.0, 1.0], [-1.0, -2.0, 3.0, -1.0, 0.0]]))
    x_BD = torch.zeros(1, 4, dtype=torch.float64)
    expected_F = torch.tensor([6.0, 0, 3, 9 - 4, 2, 0, 1, 0, 0, 0, 0, *[0] * 8, 3, 0, 0]).double()
    assert_equal(sae.encoder(x_BD).materialize()[0], expected_F)
    assert_equal(sae.encode(x_BD).to_dense()[0], expected_F)


def test_null_symbols_have_no_rows_of_their_own_and_start_in_the_decoder_as_the_only_parent() -> None:
    shape = KroneckerEncoderConfig(num_heads=5, d_base=2, d_extension=3, null_symbols=True)
    sae = SAEConfig(d_in=16, encoder=shape, sparsifier=TopKConfig(k=1)).build()
    weight = sae.encoder.weight
    assert weight.shape == (5, 5, 16)
    for h in range(5):
        for i in range(3):
            for j in range(4):
                if (i, j) == (2, 3):
                    continue
                rows = [i] * (i < 2) + [2 + j] * (j < 3)
                row = weight[h, rows].sum(0)
                torch.testing.assert_close(sae.W_dec[h * 11 + i * 4 + j], row / row.norm())


def test_where_the_rival_of_a_parent_alone_is_positive_it_learns_too() -> None:
    shape = KroneckerEncoderConfig(num_heads=1, d_base=1, d_extension=2, null_symbols=True)
    sae = build(shape, 1, 3, seed=0)
    x_BD = torch.zeros(1, 3, dtype=torch.float64)
    for rivals, slopes in ([1.0, -5.0], [-1.0, 0.0]), ([1.0, 1.0], [-1.0, 0.0]), ([-5.0, -6.0], [0.0, 0.0]):
        with torch.no_grad():
            sae.encoder.weight.zero_()
            sae.encoder.bias.copy_(torch.tensor([[8.0, *rivals]]))
        for values in (sae.encode(x_BD).values, sae.encoder(x_BD).materialize()):
            (found,) = torch.autograd.grad(values.max(), sae.encoder.bias)
            assert found.tolist() == [[1.0, *slopes]]


def test_materialised_kronecker_is_the_root_of_the_kronecker_product() -> None:
    sae = build(KroneckerEncoderConfig(num_heads=1, d_base=3, d_extension=4), 1, 5, seed=0)
    assert isinstance(sae.encoder, KroneckerEncoder)
    x_BD = inputs(1, 5, seed=0)
    u_BHM, v_BHN = sae.encoder.pre_latents(x_BD)
    product = torch.kron(u_BHM[0, 0].relu(), v_BHN[0, 0].relu())
    torch.testing.assert_close(sae.encoder(x_BD).materialize()[0], product.sqrt())


# --- initialisation (method: paper's) ---


@pytest.mark.parametrize(
    "encoder", [DenseEncoderConfig(d_sae=4096), KroneckerEncoderConfig(num_heads=512, d_base=2, d_extension=4)]
)
def test_rows_start_as_normal_over_root_of_2f(encoder: EncoderConfig) -> None:
    sae = SAEConfig(d_in=96, encoder=encoder, sparsifier=TopKConfig(k=1)).build()
    weight = sae.encoder.weight.detach().double()
    scale = (2 * sae.d_sae) ** -0.5
    count = weight.numel()
    assert abs(weight.mean().item()) < 5 * scale / count**0.5
    assert weight.std().item() == pytest.approx(scale, rel=5 / (2 * count) ** 0.5)
    kurtosis = (weight / scale).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, abs=5 * (96 / count) ** 0.5)
    row_norms = weight.reshape(-1, 96).norm(dim=1)
    assert row_norms.square().mean().sqrt().item() == pytest.approx((96 / (2 * sae.d_sae)) ** 0.5, rel=0.01)
    assert sae.encoder.bias.count_nonzero() == 0
    assert sae.b_dec.count_nonzero() == 0


def test_init_norm_sets_the_expected_norm() -> None:
    for encoder in (
        DenseEncoderConfig(d_sae=2000, init_norm=0.25),
        KroneckerEncoderConfig(num_heads=300, d_base=2, d_extension=4, init_norm=0.25),
    ):
        weight = SAEConfig(d_in=64, encoder=encoder, sparsifier=TopKConfig(k=1)).build().encoder.weight
        assert weight.flatten(0, -2).norm(dim=1).square().mean().sqrt().item() == pytest.approx(0.25, rel=0.01)


def test_dense_decoder_starts_as_the_transpose_with_unit_rows() -> None:
    sae = SAEConfig(d_in=16, encoder=DenseEncoderConfig(d_sae=50), sparsifier=TopKConfig(k=1)).build()
    weight = sae.encoder.weight
    torch.testing.assert_close(sae.W_dec, weight / weight.norm(dim=1, keepdim=True))
    assert sae.W_dec.data_ptr() != weight.data_ptr()


def test_kronecker_decoder_starts_as_the_sum_of_the_parents_with_unit_rows() -> None:
    encoder = KroneckerEncoderConfig(num_heads=5, d_base=2, d_extension=3)
    sae = SAEConfig(d_in=16, encoder=encoder, sparsifier=TopKConfig(k=1)).build()
    weight = sae.encoder.weight
    for h in range(5):
        for i in range(2):
            for j in range(3):
                row = weight[h, i] + weight[h, 2 + j]
                torch.testing.assert_close(sae.W_dec[h * 6 + i * 3 + j], row / row.norm())


def test_normalising_leaves_a_zero_row_zero() -> None:
    sae = SAEConfig(d_in=4, encoder=DenseEncoderConfig(d_sae=3), sparsifier=TopKConfig(k=1)).build()
    with torch.no_grad():
        sae.W_dec[0] = 0
        sae.W_dec[1] *= 7
    sae.decoder.normalize()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.tensor([0.0, 1.0, 1.0]))


# --- what the configs refuse ---


def test_d_sae_must_be_the_product() -> None:
    with pytest.raises(UserError) as error:
        KroneckerEncoderConfig(num_heads=8, d_base=16, d_extension=16, d_sae=4096)
    assert str(error.value) == (
        "d_sae must equal num_heads * d_base * d_extension; got 4096 with 8 * 16 * 16 = 2048. "
        "Leave d_sae out, or change one."
    )
    given_and_right = KroneckerEncoderConfig(num_heads=8, d_base=16, d_extension=16, d_sae=2048)
    assert given_and_right == KroneckerEncoderConfig(num_heads=8, d_base=16, d_extension=16)
    assert replace(given_and_right, num_heads=4).d_sae == 1024
    assert from_dict(KroneckerEncoderConfig, to_dict(given_and_right)) == given_and_right
    assert to_dict(given_and_right)["d_sae"] == 2048
    assert "d_sae" not in to_dict(given_and_right, derived=False)
    with pytest.raises(UserError, match=r"^d_sae must equal .*; got 2048 with 4 \* 16 \* 16 = 1024\."):
        from_dict(KroneckerEncoderConfig, to_dict(given_and_right) | {"num_heads": 4})


def test_what_null_symbols_refuse() -> None:
    sizes: dict[str, Any] = {"num_heads": 8, "d_base": 2, "d_extension": 4, "null_symbols": True}
    with pytest.raises(UserError) as error:
        KroneckerEncoderConfig(**sizes, d_sae=64)
    assert str(error.value) == (
        "d_sae must equal num_heads * ((d_base + 1) * (d_extension + 1) - 1) with null_symbols; got 64 with "
        "8 * (3 * 5 - 1) = 112. Leave d_sae out, or change one."
    )
    assert KroneckerEncoderConfig(**sizes, d_sae=112) == KroneckerEncoderConfig(**sizes)
    assert replace(KroneckerEncoderConfig(**sizes), num_heads=4).d_sae == 56
    with pytest.raises(
        UserError, match=r"^null_symbols must be used with gate 'mand'; got 'minimum'\. Leave one of the two out\.$"
    ):
        KroneckerEncoderConfig(**sizes, gate="minimum")


@pytest.mark.parametrize("name", ["num_heads", "d_base", "d_extension"])
@pytest.mark.parametrize("value", [0, -2, True])
def test_counts_must_be_whole_and_above_0(name: str, value: int) -> None:
    sizes: dict[str, Any] = {"num_heads": 2, "d_base": 2, "d_extension": 2} | {name: value}
    with pytest.raises(UserError, match=f"^{name} must be a whole number above 0; got {value}\\.$"):
        KroneckerEncoderConfig(**sizes)


def test_other_refusals() -> None:
    with pytest.raises(UserError, match=re.escape("k must be at most d_sae; got k=9 with d_sae=8. Lower k or widen.")):
        SAEConfig(d_in=4, encoder=DenseEncoderConfig(d_sae=8), sparsifier=TopKConfig(k=9))
    with pytest.raises(UserError, match=r"^k must be a whole number above 0; got 0\.$"):
        TopKConfig(k=0)
    with pytest.raises(UserError, match=r"^d_in must be a whole number above 0; got 0\.$"):
        SAEConfig(d_in=0, encoder=DenseEncoderConfig(d_sae=8), sparsifier=TopKConfig(k=1))
    with pytest.raises(UserError, match=r"^init_norm must be above 0; got -1\.0\.$"):
        DenseEncoderConfig(d_sae=8, init_norm=-1.0)
    with pytest.raises(UserError, match=r"^init_norm must be above 0; got nan\.$"):
        DenseEncoderConfig(d_sae=8, init_norm=float("nan"))
