"""Contract tests that hold for every combination of encoder, sparsifier and decoder."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kronsae.core import checkpoint
from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import Encoder, Latents
from kronsae.core.experts import SwitchEncoderConfig
from kronsae.core.objective import objective
from kronsae.core.sae import SAE, SAEConfig, count_parameters
from kronsae.core.sparsifiers import Sparsifier
from kronsae.core.trunk import TrunkEncoderConfig
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def batch(config: SAEConfig, *leading: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, config.d_in, generator=generator).to(dtype)


def trained(config: SAEConfig, dtype: torch.dtype = torch.float32) -> SAE:
    """Return an SAE with nonzero biases and, if it has thresholds, thresholds updated on a batch."""
    sae = config.build(seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        objective(sae, batch(config, 40, seed=2))
    return sae.to(dtype)


def has_fixed_width(config: SAEConfig) -> bool:
    """Return whether the codes of every token have k entries in every batch."""
    return config.sparsifier.kind == "topk"


def test_roles_are_filled(config: SAEConfig) -> None:
    sae = config.build()
    assert isinstance(sae.encoder, Encoder)
    assert isinstance(sae.encoder(batch(config, 2)), Latents)
    assert isinstance(sae.sparsifier, Sparsifier)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_dtypes(config: SAEConfig, dtype: torch.dtype) -> None:
    sae, x_BD = trained(config, dtype), batch(config, 7, dtype=dtype)
    codes = sae.encode(x_BD)
    assert codes.values.shape == codes.indices.shape
    assert len(codes.values) == 7
    assert codes.values.shape[1] == config.sparsifier.k or not has_fixed_width(config)
    assert (codes.values.dtype, codes.indices.dtype) == (dtype, torch.int64)
    assert codes.d_sae == sae.d_sae == config.d_sae
    assert codes.values.isfinite().all()
    assert (codes.values >= 0).all()
    assert ((codes.indices >= 0) & (codes.indices < sae.d_sae)).all()
    assert int(codes.counts().sum()) == int((codes.to_dense() > 0).sum()), "indices of active latents are distinct"
    x_hat_BD = sae.decode(codes)
    assert (x_hat_BD.shape, x_hat_BD.dtype) == (x_BD.shape, dtype)
    assert torch.equal(sae(x_BD), x_hat_BD)
    assert torch.equal(sae.decode(codes, x_BD), x_hat_BD), "what was encoded plays no part without a skip connection"
    assert sae.encoder(x_BD).materialize().shape == (7, sae.d_sae)
    assert (sae.W_dec.shape, sae.b_dec.shape) == ((sae.d_sae, sae.d_in), (sae.d_in,))


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions_are_kept(config: SAEConfig, leading: tuple[int, ...]) -> None:
    sae, x = trained(config), batch(config, *leading)
    codes = sae.encode(x)
    assert codes.values.shape == codes.indices.shape
    assert codes.values.shape[:-1] == leading
    assert sae(x).shape == x.shape
    assert codes.to_dense().shape == (*leading, sae.d_sae)
    # one token alone takes another path through the matrix product than a batch does: equal up to rounding
    torch.testing.assert_close(sae(x).reshape(-1, sae.d_in), sae(x.reshape(-1, sae.d_in)))


def test_strided_input_gives_the_same(config: SAEConfig) -> None:
    sae, x_BD = trained(config, torch.float64), batch(config, 8, dtype=torch.float64)
    strided = torch.stack([x_BD, -x_BD], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(sae(strided), sae(x_BD))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_reach_every_parameter_and_the_input(config: SAEConfig, dtype: torch.dtype) -> None:
    sae, x_BD = trained(config, dtype), batch(config, 50, dtype=dtype).requires_grad_()
    objective(sae, x_BD, l0_weight=0.1).loss.backward()
    for name, tensor in [*sae.named_parameters(), ("x", x_BD)]:
        assert tensor.grad is not None, name
        assert tensor.grad.dtype == dtype, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.count_nonzero() > 0, name


def test_no_graph_is_kept_where_none_is_asked(config: SAEConfig) -> None:
    sae, x_BD = trained(config), batch(config, 4)
    with torch.no_grad():
        codes, x_hat_BD = sae.encode(x_BD), sae(x_BD)
    assert not codes.values.requires_grad
    assert not x_hat_BD.requires_grad
    assert torch.equal(sae(x_BD), x_hat_BD)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
def test_empty_batch(config: SAEConfig, leading: tuple[int, ...]) -> None:
    sae, x = trained(config), batch(config, *leading).requires_grad_()
    codes = sae.encode(x)
    assert codes.values.shape[:-1] == leading
    x_hat = sae.decode(codes)
    assert x_hat.shape == x.shape
    x_hat.sum().backward()
    for name, parameter in sae.named_parameters():
        if name == "sparsifier.log_threshold":
            continue  # learns in training only
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() == 0, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_save_then_load_gives_the_same_sae(config: SAEConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    sae, x_BD = trained(config, dtype), batch(config, 9, dtype=dtype)
    assert checkpoint.save(sae, tmp_path / "a" / "sae", {"layer": 3}) == tmp_path / "a" / "sae"
    again = checkpoint.load(tmp_path / "a" / "sae")
    saved = sae.trained()
    assert again.config == saved.config
    for (name, old), (new_name, new) in zip(saved.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == new_name
        assert (old.dtype, old.shape) == (new.dtype, new.shape), name
        assert torch.equal(old, new), name
    old_codes, new_codes = sae.encode(x_BD), again.encode(x_BD)
    assert torch.equal(old_codes.values, new_codes.values)
    assert torch.equal(old_codes.indices, new_codes.indices)
    assert torch.equal(sae(x_BD), again(x_BD))
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert again.training == sae.training


@pytest.mark.parametrize("write_widths", [(), (3,)])
def test_the_number_of_weights_is_known_without_building(config: SAEConfig, write_widths: tuple[int, ...]) -> None:
    config = replace(config, write_widths=write_widths, skip=bool(write_widths))
    weights = config.build_empty().state_dict().values()
    assert checkpoint.weight_elements(config) == sum(weight.numel() for weight in weights)


def test_everything_learned_is_in_the_state_dict(config: SAEConfig) -> None:
    sae = trained(config)
    names = [name for name in sae.state_dict() if name.startswith("encoder.")]
    learned = {"topk": [], "batch_topk": ["log_threshold"], "jumprelu": ["log_threshold"]}[config.sparsifier.kind]
    names += [f"sparsifier.{name}" for name in learned]
    assert list(sae.state_dict()) == [*names, "decoder.W_dec", "decoder.b_dec"]
    parameters = [name for name, _ in sae.named_parameters()]
    assert [name for name in sae.state_dict() if name not in parameters] == (
        ["sparsifier.log_threshold"] if config.sparsifier.kind == "batch_topk" else []
    )
    fresh = config.build_empty()
    fresh.load_state_dict(sae.state_dict())
    x_BD = batch(config, 5)
    assert torch.equal(fresh(x_BD), sae(x_BD))
    assert torch.equal(copy.deepcopy(sae)(x_BD), sae(x_BD))


def test_parameter_counts_agree_with_shapes(config: SAEConfig) -> None:
    sae = config.build()
    decoder = config.d_sae * config.d_in + config.d_in
    assert sae.num_parameters() == count_parameters(sae.encoder) + count_parameters(sae.sparsifier) + decoder
    if config.encoder.kind == "switch":
        return  # a token meets one expert only
    outputs = count_parameters(sae.encoder) // (config.d_in + 1)
    composed = config.encoder.heads.d_sae if isinstance(config.encoder, TrunkEncoderConfig) else config.d_sae
    assert config.encoder.multiply_adds(config.d_in) - outputs * config.d_in in (0, composed)


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone(config: SAEConfig) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = config.build(seed=5), config.build(seed=5), config.build(seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
    assert not torch.equal(one.W_dec, other.W_dec)
    assert torch.equal(config.build().W_dec, config.build(seed=0).W_dec)


def test_forward_and_backward_repeat_bit_for_bit(config: SAEConfig) -> None:
    grads = []
    for _ in range(2):
        sae = trained(config)
        objective(sae, batch(config, 64), l0_weight=0.1).loss.backward()
        grads.append({name: parameter.grad for name, parameter in sae.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None
        assert torch.equal(grad, grads[1][name]), name  # type: ignore[arg-type]


def test_config_survives_json(config: SAEConfig) -> None:
    assert from_dict(SAEConfig, to_dict(config)) == config
    assert config.build().config == config
    encoder, ending = (config.encoder, "")
    if isinstance(encoder, SwitchEncoderConfig):
        encoder, ending = encoder.expert, "-switch"
    assert config.architecture == f"{encoder.kind}-{config.sparsifier.kind}{ending}"


@pytest.mark.parametrize("shape", [(4, 5), (7,), (2, 3, 1), (6, 0)], ids=str)
def test_wrong_width_is_named(config: SAEConfig, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError) as error:
        config.build().encode(torch.zeros(shape))
    assert str(error.value) == f"x must have d_in=6 as its last dimension; got shape {shape}."


def test_wrong_dtype_is_named(config: SAEConfig) -> None:
    with pytest.raises(UserError, match=r"x must have the SAE's dtype, torch\.float32; got torch\.bfloat16"):
        config.build().encode(torch.zeros(2, 6, dtype=torch.bfloat16))


def test_codes_of_another_dictionary_are_refused(config: SAEConfig) -> None:
    codes = SparseCodes(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), d_sae=1000)
    with pytest.raises(UserError) as error:
        config.build().decode(codes)
    assert str(error.value) == f"codes must have d_sae={config.d_sae} latents; got 1000."
