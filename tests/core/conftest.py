"""SAEs with which the contract tests of `kronsae.core` run; add a line for a new encoder or sparsifier."""

from __future__ import annotations

import pytest

from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoderConfig
from kronsae.core.gates import GATES, GateName
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import BatchTopKConfig, JumpReLUConfig, SparsifierConfig, TopKConfig
from kronsae.core.trunk import TrunkEncoderConfig

D_IN = 6


def dense(d_sae: int) -> DenseEncoderConfig:
    return DenseEncoderConfig(d_sae=d_sae)


def kron(
    num_heads: int, d_base: int, d_extension: int, gate: GateName = "mand", null_symbols: bool = False
) -> KroneckerEncoderConfig:
    return KroneckerEncoderConfig(
        num_heads=num_heads, d_base=d_base, d_extension=d_extension, gate=gate, null_symbols=null_symbols
    )


def trunk(d_trunk: int, heads: KroneckerEncoderConfig) -> TrunkEncoderConfig:
    return TrunkEncoderConfig(trunk=dense(d_trunk), heads=heads)


def switch(expert: DenseEncoderConfig | KroneckerEncoderConfig, num_experts: int = 3) -> SwitchEncoderConfig:
    return SwitchEncoderConfig(num_experts=num_experts, expert=expert)


CASES: dict[str, tuple[AnyEncoderConfig, SparsifierConfig]] = {
    "dense": (dense(24), TopKConfig(k=3)),
    "dense, k = d_sae": (dense(5), TopKConfig(k=5)),
    "dense, one latent": (dense(1), TopKConfig(k=1)),
    "kron": (kron(4, 2, 3), TopKConfig(k=3)),
    **{f"kron, {gate}": (kron(4, 2, 3, gate), TopKConfig(k=3)) for gate in GATES if gate != "mand"},  # type: ignore[arg-type]
    "kron, k > heads": (kron(2, 2, 4), TopKConfig(k=7)),
    "kron, k = d_sae": (kron(3, 2, 2), TopKConfig(k=12)),
    "kron, one head": (kron(1, 3, 4), TopKConfig(k=3)),
    "kron, one base": (kron(5, 1, 4), TopKConfig(k=3)),
    "kron, one extension": (kron(5, 4, 1), TopKConfig(k=3)),
    "kron, one of each": (kron(7, 1, 1), TopKConfig(k=3)),
    "kron, null symbols": (kron(4, 2, 3, null_symbols=True), TopKConfig(k=3)),
    "kron, null symbols, k = d_sae": (kron(4, 1, 2, null_symbols=True), TopKConfig(k=20)),
    "trunk": (trunk(6, kron(3, 2, 3)), TopKConfig(k=3)),
    "trunk, k = d_sae": (trunk(8, kron(3, 2, 2)), TopKConfig(k=20)),
    "trunk, one head, minimum": (trunk(12, kron(1, 2, 3, "minimum")), TopKConfig(k=7)),
    "trunk, null symbols": (trunk(6, kron(2, 1, 1, null_symbols=True)), TopKConfig(k=3)),
    "batch_topk": (dense(24), BatchTopKConfig(k=3)),
    "batch_topk, kron": (kron(4, 2, 3), BatchTopKConfig(k=3)),
    "batch_topk, kron, minimum": (kron(4, 2, 3, "minimum"), BatchTopKConfig(k=3)),
    "batch_topk, kron, null symbols": (kron(4, 2, 3, null_symbols=True), BatchTopKConfig(k=3)),
    "jumprelu": (dense(24), JumpReLUConfig(k=3)),
    "jumprelu, kron": (kron(4, 2, 3), JumpReLUConfig(k=3)),
    "jumprelu, kron, raw_product": (kron(4, 2, 3, "raw_product"), JumpReLUConfig(k=3)),
    "jumprelu, kron, null symbols": (kron(4, 2, 3, null_symbols=True), JumpReLUConfig(k=3)),
    "batch_topk, trunk": (trunk(6, kron(3, 2, 3)), BatchTopKConfig(k=3)),
    "jumprelu, trunk": (trunk(6, kron(3, 2, 3)), JumpReLUConfig(k=3)),
    "switch": (switch(dense(8)), TopKConfig(k=3)),
    "switch, kron": (switch(kron(2, 2, 3)), TopKConfig(k=3)),
    "switch, kron, null symbols": (switch(kron(3, 1, 1, null_symbols=True)), TopKConfig(k=3)),
}


@pytest.fixture(params=CASES, ids=list(CASES))
def config(request: pytest.FixtureRequest) -> SAEConfig:
    encoder, sparsifier = CASES[request.param]
    return SAEConfig(d_in=D_IN, encoder=encoder, sparsifier=sparsifier)
