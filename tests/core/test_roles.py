"""SAE, transcoder, skip transcoder, crosscoder: one class, whatever is read and written, against the definition.

All F latents, masks, a dense decoder and plain autograd in float64, as in `test_cells`; only the widths differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kronsae.core import checkpoint
from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoderConfig
from kronsae.core.flops import forward_multiply_adds
from kronsae.core.losses import LossConfig, MatryoshkaConfig, SquaredErrorConfig, squared_error
from kronsae.core.normalization import Normalization
from kronsae.core.objective import AuxKConfig, objective
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import BatchTopKConfig, JumpReLU, JumpReLUConfig, SparsifierConfig, TopKConfig
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError

K, F, TOKENS = 3, 24, 30
DEAD_C = torch.tensor([1, 7, 8, 23])

ROLES: dict[str, dict[str, Any]] = {
    "": {"d_in": 5},
    "transcoder": {"d_in": 5, "write_widths": (4,)},
    "transcoder, equal widths": {"d_in": 5, "write_widths": (5,)},
    "skip_transcoder": {"d_in": 5, "write_widths": (4,), "skip": True},
    "crosscoder": {"d_in": 7, "read_widths": (3, 4)},
    "crosscoder of one hook on two": {"d_in": 3, "write_widths": (3, 4)},
    "skip_crosscoder": {"d_in": 7, "read_widths": (3, 4), "write_widths": (2, 2, 1), "skip": True},
}
ENCODERS: dict[str, AnyEncoderConfig] = {
    "dense": DenseEncoderConfig(d_sae=F),
    "kron": KroneckerEncoderConfig(num_heads=4, d_base=2, d_extension=3),
}
SPARSIFIERS: dict[str, SparsifierConfig] = {
    "topk": TopKConfig(k=K),
    "batch_topk": BatchTopKConfig(k=K),
    "jumprelu": JumpReLUConfig(k=K),
}
EVERY_ROLE = pytest.mark.parametrize("role", ROLES)
EVERY_CELL = pytest.mark.parametrize(("encoder", "sparsifier"), [(e, s) for e in ENCODERS for s in SPARSIFIERS])


def config(role: str, encoder: str = "kron", sparsifier: str = "topk") -> SAEConfig:
    return SAEConfig(encoder=ENCODERS[encoder], sparsifier=SPARSIFIERS[sparsifier], **ROLES[role])


def batch(shape: SAEConfig, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return the input and the target."""
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(TOKENS, shape.d_in, generator=generator, dtype=torch.float64)
    other_BO = torch.randn(TOKENS, shape.d_out, generator=generator, dtype=torch.float64)
    return x_BD, x_BD if shape.autoencodes else other_BO


def trained(shape: SAEConfig, seed: int = 0) -> SAE:
    """Return an SAE with random weights and thresholds updated on a batch."""
    sae = shape.build(seed).double()
    generator = torch.Generator().manual_seed(seed)
    learned = [sae.encoder, sae.decoder] if sae.skip is None else [sae.encoder, sae.decoder, sae.skip]
    with torch.no_grad():
        for parameter in (parameter for part in learned for parameter in part.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        x_BD, target_BO = batch(shape, seed=2)
        objective(sae, x_BD, target_BO=target_BO)
    return sae


def defined_loss(sae: SAE, x_BD: Tensor, target_BO: Tensor, loss: LossConfig, k_aux: int) -> Tensor:
    z_BF = sae.encoder(x_BD).materialize()
    threshold: Tensor | None = None
    if isinstance(sae.sparsifier, JumpReLU):
        threshold = sae.sparsifier.log_threshold.exp().detach()
        moved = sae.sparsifier.log_threshold - sae.sparsifier.log_threshold.detach()
        width = sae.sparsifier.config.bandwidth
        near_BF = ((z_BF - threshold).abs() < width * threshold / 2).double()
        f_BF = z_BF * (z_BF > threshold) - threshold / width * near_BF * moved
    else:
        rows = z_BF.reshape(1, -1) if sae.config.sparsifier.kind == "batch_topk" else z_BF
        keep = rows.topk(K * len(z_BF) if len(rows) == 1 else K, dim=1).indices
        f_BF = z_BF * torch.zeros_like(rows).scatter(1, keep, 1.0).view_as(z_BF)
    skipped_BO = torch.zeros(()) if sae.skip is None else x_BD @ sae.skip.W_skip.T
    ends = [F] if isinstance(loss, SquaredErrorConfig) else [6, 12, 24]
    parts = [f_BF[:, :end] @ sae.W_dec[:end] + sae.b_dec + skipped_BO for end in ends]
    total = torch.stack([squared_error(target_BO, y_hat_BO) for y_hat_BO in parts]).sum()
    dead_BF = torch.zeros_like(z_BF)
    dead_BC = z_BF[:, DEAD_C]
    dead_BF[:, DEAD_C] = dead_BC * torch.zeros_like(dead_BC).scatter(1, dead_BC.topk(k_aux, dim=1).indices, 1.0)
    return total + 0.5 * squared_error((target_BO - parts[-1]).detach(), dead_BF @ sae.W_dec)


@pytest.mark.parametrize("loss", [SquaredErrorConfig(), MatryoshkaConfig(groups=(6, 6, 12))], ids=["plain", "nested"])
@EVERY_CELL
@EVERY_ROLE
def test_loss_and_every_gradient_are_the_definition_s(
    role: str, encoder: str, sparsifier: str, loss: LossConfig
) -> None:
    sae = trained(config(role, encoder, sparsifier))
    x_BD, target_BO = batch(sae.config)
    x_BD.requires_grad_()
    names = dict(sae.named_parameters()) | {"x": x_BD}
    k_aux = max(1, sae.d_out // 2)  # the default
    expected = defined_loss(sae, x_BD, target_BO, loss, k_aux)
    gradients = torch.autograd.grad(expected, list(names.values()))
    target = None if sae.config.autoencodes else target_BO
    found = objective(sae, x_BD, DEAD_C, AuxKConfig(weight=0.5), loss, target_BO=target)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(found.x_hat_BO, sae.decode(found.codes, x_BD).detach(), rtol=1e-12, atol=1e-12)
    for (name, tensor), gradient in zip(names.items(), gradients, strict=True):
        assert tensor.grad is not None, name
        assert gradient.count_nonzero() > 0, name
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-9, atol=1e-10, msg=partial("{}: {}".format, name))


@EVERY_CELL
@EVERY_ROLE
def test_save_then_load_gives_the_same(role: str, encoder: str, sparsifier: str, tmp_path: Path) -> None:
    sae = trained(config(role, encoder, sparsifier))
    x_BD, _ = batch(sae.config)
    again = checkpoint.load(checkpoint.save(sae, tmp_path))
    assert again.config == sae.trained().config
    assert from_dict(SAEConfig, to_dict(again.config)) == again.config
    assert torch.equal(again(x_BD), sae(x_BD))
    assert torch.equal(again.decode(again.encode(x_BD), x_BD), sae(x_BD))
    assert again(x_BD).shape == (TOKENS, sae.d_out)
    assert again(x_BD.reshape(2, 15, -1)).shape == (2, 15, sae.d_out)
    assert ("skip.W_skip" in again.state_dict()) == sae.config.skip
    about = json.loads((tmp_path / "cfg.json").read_text())
    saved_as = "jumprelu" if sparsifier == "batch_topk" else sparsifier
    ending = role.split(",")[0].split(" ")[0]
    kind = {"dense": "dense", "kron": "kronecker"}[encoder]
    assert about["architecture"] == f"{kind}-{saved_as}" + (f"-{ending}" if ending else "")


@pytest.mark.parametrize(
    ("encoder", "sparsifier"),
    [
        *((ENCODERS[encoder], sparsifier) for encoder in ENCODERS for sparsifier in SPARSIFIERS.values()),
        (SwitchEncoderConfig(num_experts=3, expert=DenseEncoderConfig(d_sae=8)), TopKConfig(k=K)),
    ],
    ids=[*(f"{encoder} {sparsifier}" for encoder in ENCODERS for sparsifier in SPARSIFIERS), "switch topk"],
)
@EVERY_ROLE
def test_folding_changes_nothing(role: str, encoder: AnyEncoderConfig, sparsifier: SparsifierConfig) -> None:
    sae = trained(SAEConfig(encoder=encoder, sparsifier=sparsifier, **ROLES[role]))
    shape = sae.config
    x_BD, target_BO = batch(shape)
    x_BD = x_BD * torch.arange(1, shape.d_in + 1) + 30
    target_BO = x_BD if shape.autoencodes else 0.1 * target_BO * torch.arange(1, shape.d_out + 1) - 7
    read = Normalization.of(x_BD, shape.widths_read)
    written = read if shape.autoencodes else Normalization.of(target_BO, shape.widths_written)
    codes = sae.encode(read(x_BD))
    expected_BO = written.scale_D * sae.decode(codes, read(x_BD)) + written.mean_D
    W_enc, W_dec = sae.encoder.weight.clone(), sae.W_dec.clone()
    read.fold(sae, None if shape.autoencodes else written)
    folded = sae.encode(x_BD)
    torch.testing.assert_close(folded.to_dense(), written.scale * codes.to_dense(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sae(x_BD), expected_BO, rtol=1e-9, atol=1e-9)
    if len(shape.widths_written) == 1:
        assert torch.equal(sae.W_dec, W_dec), "one hook written: the dictionary keeps its norms, bit for bit"
    if shape.autoencodes and len(shape.widths_read) == 1:
        assert torch.equal(sae.encoder.weight, W_enc)


def test_each_hook_is_normalised_on_its_own() -> None:
    x_BD = torch.randn(400, 5, dtype=torch.float64)
    x_BD[:, 2:] = 50 * x_BD[:, 2:] + 3
    normalization = Normalization.of(x_BD, (2, 3))
    for part_BD, width in zip(normalization(x_BD).split((2, 3), dim=1), (2, 3), strict=True):
        torch.testing.assert_close(part_BD.mean(0), torch.zeros(width, dtype=torch.float64), rtol=0, atol=1e-12)
        assert part_BD.square().sum(1).mean().sqrt().item() == pytest.approx(math.sqrt(width))
    assert torch.equal(normalization(x_BD)[:, :2], Normalization.of(x_BD[:, :2])(x_BD[:, :2]))
    identity = Normalization.identity((2, 3), "cpu")
    assert torch.equal(identity(x_BD.float()), x_BD.float())


@EVERY_ROLE
def test_the_start(role: str) -> None:
    """Unit rows everywhere; those of the encoder where what it reads is written, random ones elsewhere; no skip."""
    shape = config(role)
    sae, other = shape.build(3), shape.build(4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    assert not torch.equal(sae.W_dec, other.W_dec)
    assert torch.equal(sae.W_dec, shape.build(3).W_dec)
    if shape.autoencodes:
        rows_FD = sae.encoder.initial_decoder_rows()
        torch.testing.assert_close(sae.W_dec, rows_FD / rows_FD.norm(dim=1, keepdim=True))
    if sae.skip is not None:
        assert sae.skip.W_skip.shape == (sae.d_out, sae.d_in)
        assert sae.skip.W_skip.count_nonzero() == 0


@EVERY_ROLE
def test_rows_by_hook_are_views(role: str) -> None:
    sae = config(role).build()
    parts = sae.W_dec_by_hook
    assert tuple(part.shape for part in parts) == tuple((F, width) for width in sae.config.widths_written)
    assert torch.equal(torch.cat(parts, dim=1), sae.W_dec)
    assert {part.untyped_storage().data_ptr() for part in parts} == {sae.W_dec.untyped_storage().data_ptr()}


@EVERY_ROLE
def test_the_cost_is_counted_by_what_is_multiplied(role: str) -> None:
    shape = config(role, "dense")
    products = [shape.d_in * F, K * shape.d_out, shape.d_in * shape.d_out if shape.skip else 0]
    assert forward_multiply_adds(shape) == sum(products)
    sae = shape.build()
    assert sae.num_parameters() == F * shape.d_in + F + (F + 1) * shape.d_out + products[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SAEConfig(encoder=ENCODERS["kron"], sparsifier=TopKConfig(k=2), d_in=5, read_widths=(2, 2)),
            "read_widths must sum to d_in; got 2 + 2 = 4 with d_in=5. Leave read_widths out, or change one.",
        ),
        (
            lambda: SAEConfig(encoder=ENCODERS["kron"], sparsifier=TopKConfig(k=2), d_in=5, write_widths=(2, 0)),
            "write_widths must be a whole number above 0; got 0.",
        ),
        (
            lambda: SAEConfig(encoder=ENCODERS["kron"], sparsifier=TopKConfig(k=2), d_in=5, skip=True),
            "skip must be used with an output hook that differs from the input hook; with the same hook the skip "
            "connection would copy the input. Set the hooks to write, or leave skip out.",
        ),
        (
            lambda: (sae := config("skip_transcoder").build()).decode(sae.encode(torch.zeros(2, 5))),
            "x must be given to decode an SAE with a skip connection. Call decode(codes, x).",
        ),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message
