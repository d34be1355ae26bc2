"""Encoders of a user's own in configs, training and saved SAEs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from kronsae.core import checkpoint
from kronsae.core.encoders import DenseEncoderConfig, DenseLatents, Encoder
from kronsae.core.registration import register_encoder
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.support import config as config_module
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError
from kronsae.training.config import MemberConfig


@pytest.fixture(autouse=True)
def _nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "_ADDED", {})


@dataclass(frozen=True, kw_only=True)
class HalfConfig:
    """An encoder that reads the first half of x alone."""

    kind: ClassVar[str] = "half"
    block: ClassVar[int] = 1
    d_sae: int

    @property
    def latents_per_token(self) -> int:
        return self.d_sae

    def build(self, d_in: int) -> Half:
        return Half(self, d_in)

    def multiply_adds(self, d_in: int) -> int:
        return d_in // 2 * self.d_sae


class Half(nn.Module):
    def __init__(self, config: HalfConfig, d_in: int) -> None:
        super().__init__()
        self.config, self.d_in, self.d_sae = config, d_in, config.d_sae
        self.weight = nn.Parameter(torch.empty(config.d_sae, d_in // 2))
        self.bias = nn.Parameter(torch.zeros(config.d_sae))

    def forward(self, x_BD: Tensor) -> DenseLatents:
        return DenseLatents(x_BD[:, : self.d_in // 2].contiguous(), self.weight, self.bias)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator))

    @torch.no_grad()
    def initial_decoder_rows(self) -> Tensor:
        return torch.cat([self.weight, torch.ones_like(self.weight)], dim=1)

    @torch.no_grad()
    def fold(self, mean_D: Tensor, scale_D: Tensor, latent_scale: Tensor) -> None:
        half = self.d_in // 2
        self.weight.mul_(latent_scale / scale_D if scale_D.ndim == 0 else latent_scale / scale_D[:half])
        self.bias.mul_(latent_scale).sub_(self.weight @ mean_D[:half])


def shape() -> SAEConfig:
    return SAEConfig(d_in=8, encoder=HalfConfig(d_sae=20), sparsifier=TopKConfig(k=3))


def test_an_sae_with_it_is_saved_and_loaded(tmp_path: Path) -> None:
    register_encoder(HalfConfig)
    sae = shape().build(3)
    assert isinstance(sae.encoder, Encoder)
    checkpoint.save(sae, tmp_path)
    again = checkpoint.load(tmp_path)
    x = torch.randn(5, 8)
    assert torch.equal(sae(x), again(x))
    assert again.config == sae.config
    assert again.config.architecture == "half-topk"


def test_it_is_trained_and_its_normalisation_folded() -> None:
    from kronsae.data.buffer import PLAIN, TensorStream
    from kronsae.training.config import LoopConfig
    from kronsae.training.member import Member
    from kronsae.training.trainer import fit

    x = torch.randn(400, 8) * 3 + 1
    loop = LoopConfig(tokens=400, batch_tokens=40)
    settings = MemberConfig(name="half", encoder=HalfConfig(d_sae=20), sparsifier=TopKConfig(k=3))
    member = Member(settings, 8, hook=PLAIN, steps=loop.steps)
    before = member.sae.encoder.weight.detach().clone()
    fit([member], TensorStream(x, batch_size=40, seed=0), loop)
    assert not torch.equal(member.sae.encoder.weight, before)
    trained, normalization = member.sae, member.normalizations["read"]
    inside = trained(normalization(x))
    torch.testing.assert_close(normalization(member.finished_sae()(x)), inside, rtol=1e-4, atol=1e-4)


def test_unregistered_it_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint.save(shape().build(), tmp_path)
    with pytest.raises(
        UserError, match=r"encoder.kind must be one of 'dense', 'kronecker', 'trunk', 'switch'; got 'half'"
    ):
        checkpoint.load(tmp_path)


def test_a_config_of_a_run_holds_it() -> None:
    register_encoder(HalfConfig)
    member = MemberConfig(name="half", encoder=HalfConfig(d_sae=20), sparsifier=TopKConfig(k=3))
    assert from_dict(MemberConfig, to_dict(member)) == member


def test_it_is_no_expert_of_a_switch_encoder() -> None:
    register_encoder(HalfConfig)
    switch = {"kind": "switch", "num_experts": 2, "expert": {"kind": "half", "d_sae": 4}}
    member = to_dict(MemberConfig(name="one", encoder=DenseEncoderConfig(d_sae=8), sparsifier=TopKConfig(k=1)))
    with pytest.raises(UserError, match=r"expert.kind must be one of 'dense', 'kronecker'; got 'half'"):
        from_dict(MemberConfig, member | {"encoder": switch})


def test_registering_twice_is_fine_but_not_another_class_of_the_kind() -> None:
    assert register_encoder(HalfConfig) is HalfConfig
    register_encoder(HalfConfig)

    @dataclass(frozen=True, kw_only=True)
    class Other(HalfConfig):
        pass

    with pytest.raises(UserError, match="kind must belong to one class; 'half' of Other is that of HalfConfig"):
        register_encoder(Other)


@dataclass
class Thawed:
    kind: ClassVar[str] = "thawed"


@dataclass(frozen=True)
class Bare:
    kind: ClassVar[str] = "bare"
    d_sae: int = 3


@dataclass(frozen=True, kw_only=True)
class Taken(HalfConfig):
    kind: ClassVar[str] = "dense"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Thawed, "must be a frozen dataclass; Thawed is none"),
        (int, "must be a frozen dataclass; int is none"),
        (Bare, "Bare has no block, latents_per_token, build, multiply_adds"),
        (Taken, "kind of Taken must be a text other than dense, kronecker, switch, trunk; got 'dense'"),
    ],
)
def test_what_is_no_encoders_config_is_refused(config: type, message: str) -> None:
    with pytest.raises(UserError, match=message):
        register_encoder(config)
