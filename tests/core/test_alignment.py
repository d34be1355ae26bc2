"""The address of a tensor changes no bit: weights are aligned where they are loaded, activations where they enter.

On AVX2, MKL's products of operands at 4 or 8 bytes past a multiple of 16 have other last bits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kronsae.core import checkpoint
from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoderConfig
from kronsae.core.objective import objective
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.core.trunk import TrunkEncoderConfig
from kronsae.support.tensors import ALIGNMENT_BYTES, aligned

ENCODERS: dict[str, AnyEncoderConfig] = {
    "dense": DenseEncoderConfig(d_sae=24),
    "kron": KroneckerEncoderConfig(num_heads=4, d_base=2, d_extension=3),
    "trunk": TrunkEncoderConfig(
        trunk=DenseEncoderConfig(d_sae=12), heads=KroneckerEncoderConfig(num_heads=2, d_base=2, d_extension=3)
    ),
    "switch": SwitchEncoderConfig(num_experts=2, expert=DenseEncoderConfig(d_sae=12)),
}
SHAPES = [(5, 30), (7, 3), (64, 40), (65, 1)]  # (d_in, tokens): some are sensitive on AVX2, others elsewhere
EVERY_SAE = pytest.mark.parametrize("encoder", ENCODERS)
EVERY_SHAPE = pytest.mark.parametrize(("d_in", "tokens"), SHAPES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def placed(tensor: Tensor, offset: int) -> Tensor:
    """Return a copy of a tensor that starts ``offset`` bytes after a multiple of 64."""
    size = tensor.numel() * tensor.element_size()
    raw = torch.empty(size + 2 * ALIGNMENT_BYTES, dtype=torch.uint8)
    start = (offset - raw.data_ptr()) % ALIGNMENT_BYTES
    copy = raw[start : start + size].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    assert copy.data_ptr() % ALIGNMENT_BYTES == offset
    return copy


def offsets(dtype: torch.dtype) -> range:
    return range(0, ALIGNMENT_BYTES, dtype.itemsize)


def build(encoder: str, d_in: int, dtype: torch.dtype, *, skip: bool = False) -> SAE:
    write = {"write_widths": (d_in,), "skip": True} if skip else {}
    sae = SAEConfig(d_in=d_in, encoder=ENCODERS[encoder], sparsifier=TopKConfig(k=3), **write).build(1)  # type: ignore[arg-type]
    if sae.skip is not None:
        torch.nn.init.normal_(sae.skip.W_skip)
    return sae.to(dtype)


def outputs(sae: SAE, x_BD: Tensor) -> dict[str, Tensor]:
    """Return codes, reconstruction, loss and all gradients."""
    sae.zero_grad()
    codes = sae.encode(x_BD)
    target = None if sae.config.autoencodes else 2 * x_BD
    result = objective(sae, x_BD, target_BO=target)
    result.loss.backward()
    found = {"values": codes.values, "indices": codes.indices, "x_hat": sae.decode(codes, x_BD), "loss": result.loss}
    found |= {name: parameter.grad for name, parameter in sae.named_parameters() if parameter.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert different == [], where


@EVERY_DTYPE
@EVERY_SHAPE
@EVERY_SAE
def test_weights_in_a_file_at_any_address_give_the_same_bits(
    encoder: str, d_in: int, tokens: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = build(encoder, d_in, dtype)
    checkpoint.save(sae, tmp_path)
    x_BD = torch.randn(tokens, d_in, dtype=dtype)
    expected = outputs(sae, x_BD)
    from safetensors import torch as safetensors_torch

    load_file = safetensors_torch.load_file
    for offset in offsets(dtype):
        mapped = {
            name: placed(tensor, offset) for name, tensor in load_file(tmp_path / checkpoint.WEIGHTS_FILE).items()
        }
        monkeypatch.setattr(safetensors_torch, "load_file", lambda path, device, mapped=mapped: mapped)
        loaded = checkpoint.load(tmp_path)
        assert all(parameter.data_ptr() % ALIGNMENT_BYTES == 0 for parameter in loaded.parameters())
        assert_same_bits(outputs(loaded, x_BD), expected, f"weights {offset} bytes past a multiple of 64")


@EVERY_DTYPE
@EVERY_SHAPE
@EVERY_SAE
def test_activations_at_any_address_give_the_same_bits(
    encoder: str, d_in: int, tokens: int, dtype: torch.dtype
) -> None:
    sae = build(encoder, d_in, dtype)
    x_BD = torch.randn(tokens, d_in, dtype=dtype)
    expected = outputs(sae, x_BD)
    for offset in offsets(dtype):
        assert_same_bits(outputs(sae, placed(x_BD, offset)), expected, f"x {offset} bytes past a multiple of 64")


@EVERY_DTYPE
@EVERY_SHAPE
@EVERY_SAE
def test_strided_and_transposed_activations_give_the_same_bits(
    encoder: str, d_in: int, tokens: int, dtype: torch.dtype
) -> None:
    sae = build(encoder, d_in, dtype)
    x_BD = torch.randn(tokens, d_in, dtype=dtype)
    expected = outputs(sae, x_BD)
    wide = torch.randn(tokens, d_in + 3, dtype=dtype)
    wide[:, :d_in] = x_BD
    assert_same_bits(outputs(sae, wide[:, :d_in]), expected, "columns of a wider matrix")
    assert_same_bits(outputs(sae, x_BD.T.contiguous().T), expected, "a transposed matrix")


def test_aligned_leaves_tensors_of_functional_transforms_alone() -> None:
    tensor = torch.randn(4, 3)
    assert torch.equal(torch.func.vmap(aligned)(tensor), tensor)


@EVERY_SHAPE
def test_a_skip_connection_reads_activations_at_any_address(d_in: int, tokens: int) -> None:
    sae = build("kron", d_in, torch.float32, skip=True)
    x_BD = torch.randn(tokens, d_in)
    expected = outputs(sae, x_BD)
    for offset in offsets(torch.float32):
        assert_same_bits(outputs(sae, placed(x_BD, offset)), expected, f"x {offset} bytes past a multiple of 64")


def test_aligned_copies_only_what_is_not() -> None:
    tensor = torch.randn(5, 7)
    assert aligned(tensor) is tensor
    moved = placed(tensor, 4).requires_grad_()
    copy = aligned(moved)
    assert copy.data_ptr() % ALIGNMENT_BYTES == 0
    assert torch.equal(copy, tensor)
    copy.sum().backward()
    assert moved.grad is not None
    assert torch.equal(moved.grad, torch.ones(5, 7))


def test_a_loaded_sae_does_not_depend_on_its_file(tmp_path: Path) -> None:
    sae = build("kron", 64, torch.float32)
    checkpoint.save(sae, tmp_path)
    loaded = checkpoint.load(tmp_path)
    path = tmp_path / checkpoint.WEIGHTS_FILE
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))  # in place: a mapped view would now read zeros
        file.truncate(size // 2)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), sae.parameters(), strict=True))
