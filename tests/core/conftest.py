"""The SAEs that every contract of `kronsae.core` is run over: a new encoder or sparsifier is one more line here."""

from __future__ import annotations

import pytest

from kronsae.core.encoders import DenseEncoderConfig, EncoderConfig, KroneckerEncoderConfig
from kronsae.core.gates import GateName
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import SparsifierConfig, TopKConfig

D_IN = 6


def dense(d_sae: int) -> DenseEncoderConfig:
    return DenseEncoderConfig(d_sae=d_sae)


def kron(num_heads: int, d_base: int, d_extension: int, gate: GateName = "mand") -> KroneckerEncoderConfig:
    return KroneckerEncoderConfig(num_heads=num_heads, d_base=d_base, d_extension=d_extension, gate=gate)


CASES: dict[str, tuple[EncoderConfig, SparsifierConfig]] = {
    "dense": (dense(24), TopKConfig(k=3)),
    "dense, k = d_sae": (dense(5), TopKConfig(k=5)),
    "dense, one latent": (dense(1), TopKConfig(k=1)),
    "kron": (kron(4, 2, 3), TopKConfig(k=3)),
    "kron, paper's epsilon": (kron(4, 2, 3, "mand_eps"), TopKConfig(k=3)),
    "kron, k > heads": (kron(2, 2, 4), TopKConfig(k=7)),
    "kron, k = d_sae": (kron(3, 2, 2), TopKConfig(k=12)),
    "kron, one head": (kron(1, 3, 4), TopKConfig(k=3)),
    "kron, one base": (kron(5, 1, 4), TopKConfig(k=3)),
    "kron, one extension": (kron(5, 4, 1), TopKConfig(k=3)),
    "kron, one of each": (kron(7, 1, 1), TopKConfig(k=3)),
}


@pytest.fixture(params=CASES, ids=list(CASES))
def config(request: pytest.FixtureRequest) -> SAEConfig:
    encoder, sparsifier = CASES[request.param]
    return SAEConfig(d_in=D_IN, encoder=encoder, sparsifier=sparsifier)
