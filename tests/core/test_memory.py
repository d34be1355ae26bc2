"""Test for every operation that training creates no tensor of size tokens x latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kronsae import kernels
from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import DenseEncoderConfig, EncoderConfig, KroneckerEncoderConfig
from kronsae.core.gates import GateName
from kronsae.core.losses import MatryoshkaConfig, matryoshka_groups, squared_error
from kronsae.core.objective import AuxKConfig, objective
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import BatchTopKConfig, JumpReLUConfig, SparsifierConfig, TopKConfig


class Largest(TorchDispatchMode):
    """Record the largest number of elements of any tensor that an operation returns."""

    numel, operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # storage, not shape: an expanded view takes no memory, a view of a larger tensor does
            held = leaf.untyped_storage().nbytes() // leaf.element_size() if isinstance(leaf, Tensor) else 0
            if held > self.numel:
                self.numel, self.operation = held, str(func)
        return out


# the weights and their gradients, F * D at most, must stay below what is looked for: D < B
B, D, F, P = 80, 8, 4096, 512 * 6
WIDE = KroneckerEncoderConfig(num_heads=512, d_base=2, d_extension=4)
DENSE = DenseEncoderConfig(d_sae=F)
both_encoders = pytest.mark.parametrize("encoder", [WIDE, DENSE], ids=["kronecker", "dense"])


def build(encoder: EncoderConfig, sparsifier: SparsifierConfig | None = None) -> tuple[SAE, Tensor]:
    sae = SAEConfig(d_in=D, encoder=encoder, sparsifier=sparsifier or TopKConfig(k=5)).build()
    return sae, torch.randn(B, D, requires_grad=True)


@pytest.mark.parametrize("path", ["portable", "fastest"])
@pytest.mark.parametrize("dead", [0, 300], ids=["no AuxK", "AuxK"])
def test_training_a_kronsae_makes_nothing_of_size_tokens_times_latents(dead: int, path: str) -> None:
    sae, x_BD = build(WIDE)

    def train() -> None:
        with Largest() as largest:
            objective(sae, x_BD, torch.arange(dead), AuxKConfig(k_aux=4)).loss.backward()
        assert largest.numel <= B * P, largest.operation  # the pre-latents are the largest thing there is
        assert largest.numel < B * F

    if path == "portable":
        with kernels.use(path):
            train()
    else:
        train()
    assert sae.encoder.weight.grad is not None
    assert x_BD.grad is not None


@pytest.mark.parametrize("gate", ["mand", "minimum", "power_mean"])
@pytest.mark.parametrize("sparsifier", [TopKConfig(k=5), BatchTopKConfig(k=5), JumpReLUConfig(k=5)], ids=str)
def test_no_cell_with_a_prunable_gate_makes_it(sparsifier: SparsifierConfig, gate: GateName) -> None:
    encoder = KroneckerEncoderConfig(num_heads=512, d_base=2, d_extension=4, gate=gate)
    sae, x_BD = build(encoder, sparsifier)
    nested = MatryoshkaConfig(groups=matryoshka_groups(F, 512))
    for _ in range(2):  # thresholds start on the first batch
        with Largest() as largest:
            objective(sae, x_BD, torch.arange(300), AuxKConfig(k_aux=4), nested, l0_weight=0.1).loss.backward()
        assert largest.numel <= B * P, largest.operation
    with Largest() as largest:
        sae.trained()(x_BD)
    assert largest.numel <= B * P, largest.operation


@both_encoders
def test_the_materialised_definition_does_make_it(encoder: EncoderConfig) -> None:
    """Test that the previous test can fail."""
    sae, x_BD = build(encoder)
    with Largest() as largest:
        top = sae.encoder(x_BD).materialize().topk(5)
        squared_error(x_BD, sae.decode(SparseCodes(top.values, top.indices, F))).backward()
    assert largest.numel >= B * F


def test_the_measure_sees_forward_and_backward_but_no_views() -> None:
    x = torch.ones(3, requires_grad=True)
    with Largest() as view:
        wide_view = x.expand(1000, 3)
    with Largest() as forward:
        loss = wide_view.exp().sum()
    with Largest() as backward:
        loss.backward()
    assert (view.numel, forward.numel, backward.numel) == (3, 3000, 3000)


@both_encoders
@pytest.mark.parametrize("sparsifier", [TopKConfig(k=5), BatchTopKConfig(k=5), JumpReLUConfig(k=5)], ids=str)
def test_what_is_made_by_chunks_of_tokens_stays_within_a_chunk(
    encoder: EncoderConfig, sparsifier: SparsifierConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense encoder's outputs, and AuxK with every latent dead, exist for 64 tokens or a chunk at a time."""
    for name in ("portable.CHUNK_ELEMENTS", "portable.PRODUCT_ELEMENTS", "requests.CHUNK_ELEMENTS"):
        monkeypatch.setattr(f"kronsae.kernels.{name}", 2**12)
    sae, x_BD = build(encoder, sparsifier)
    with kernels.use("portable"), Largest() as largest:
        objective(sae, x_BD, torch.arange(F), AuxKConfig(k_aux=4), l0_weight=0.1).loss.backward()
    assert largest.numel <= 64 * max(F, P), largest.operation
    assert largest.numel < B * F
