"""Trains single SAEs step by step, alone and in several processes, on the same batches."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from tests.core.test_registration import HalfConfig
from torch import Tensor

from kronsae.core.shares import sharing
from kronsae.core.sparsifiers import BatchTopKConfig
from kronsae.distributed.heads import HeadSplit
from kronsae.distributed.launch import team
from kronsae.distributed.shares import TokenShares
from kronsae.runs.architectures import ARCHITECTURES
from kronsae.runs.parsing import parse_sae
from kronsae.training.config import MemberConfig, OptimizerConfig
from kronsae.training.member import Member

D_IN, BATCH, STEPS = 12, 24, 10
DEAD_AFTER = 3 * BATCH
SMALLER = {"d_sae": 64, "num_heads": 8, "k": 3, "smallest": 8, "num_experts": 4, "lr": 5e-3}
KRON = "kron num_heads=8 d_base=2 d_extension=4 k=3"
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "revived": (KRON, {"revive_every_tokens": 2 * BATCH}),
    "revived jumprelu": ("jumprelu d_sae=64 k=3", {"revive_every_tokens": 2 * BATCH}),
    "trunk": (f"{KRON} d_trunk=16", {}),
    "trunk batch_topk": ("batch_topk num_heads=6 d_base=2 d_extension=4 k=3 d_trunk=16", {}),
    "pursued": (f"{KRON} pursuit_rounds=2", {}),
    "unrolled": (f"{KRON} pursuit_rounds=2 pursuit_learning=unrolled", {}),
    "minimum": (f"{KRON} gate=minimum", {}),
    "clipped": (KRON, {"optimizer": OptimizerConfig(lr=5e-3, clip_norm=0.05)}),
}


def configs() -> dict[str, MemberConfig]:
    """Return a small SAE of each architecture, and of what training may add; their latents die within the test."""
    configs = {}
    for name, (words, changes) in ({name: (_smaller(of), {}) for name, of in ARCHITECTURES.items()} | OTHERS).items():
        config = parse_sae(words)
        aux_k = replace(config.aux_k, dead_after_tokens=DEAD_AFTER)
        configs[name] = replace(config, name="one", aux_k=aux_k, **changes)
    own = MemberConfig(name="one", encoder=HalfConfig(d_sae=64), sparsifier=BatchTopKConfig(k=3))
    return configs | {"own encoder": own}


def _smaller(specification: str) -> str:
    kind, *words = specification.split()
    given = dict(word.split("=", 1) for word in words)
    sizes = {key: SMALLER[key] for key in given if key in SMALLER} | {"lr": SMALLER["lr"]}
    return " ".join([kind, *(f"{key}={value}" for key, value in (given | sizes).items())])


def batch(hooks: tuple[str, ...], step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return random, correlated activations of each hook."""
    generator = torch.Generator().manual_seed(step)
    mixing = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(99), dtype=dtype)
    x_BD = torch.randn(BATCH, D_IN, generator=generator, dtype=dtype) @ mixing * 3 + 1
    return {hook: x_BD.roll(number, 1) * (number + 1) for number, hook in enumerate(hooks)}


def holders(step: int, shares: int) -> Tensor:
    """Return which share each token belongs to: shares of different sizes, of which only one has tokens in step 4."""
    dealt = torch.randint(shares, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.zeros_like(dealt) if step == 4 else dealt


def train(config: MemberConfig, dtype: torch.dtype, split: HeadSplit | None = None) -> dict[str, Any]:
    """Return the metrics of each step, when each latent was active, and the weights and codes of the whole SAE."""
    hooks = tuple(dict.fromkeys((*config.reads("h"), *config.writes("h"))))
    member = Member(config, D_IN, "h", STEPS, split=split)
    member.sae.to(dtype)
    metrics, unseen = [], []
    for step in range(STEPS):
        whole = batch(hooks, step, dtype)
        if split is None:
            row = member.step_on(whole, step, want_metrics=True)
        else:
            among = split.among
            holder_B = holders(step, among.group.size)
            among.begin(holder_B)
            with sharing(among):
                own = {hook: x[holder_B == among.group.me] for hook, x in whole.items()}
                row = member.step_on(own, step, want_metrics=True)
        assert row is not None
        metrics.append({key: value for key, value in asdict(row).items() if key != "member_seconds"})
        unseen.append(member.dead.tokens_since_active_F.clone())
    found = member.split.whole(member.sae, member.shape)
    return {"metrics": metrics, "unseen": torch.stack(unseen), "sae": found.state_dict()}


def train_in_team(names: list[str], dtype: torch.dtype, head_parallel: int) -> dict[str, Any]:
    """Return the results of `train` in one of several processes."""
    with team(head_parallel) as processes:
        assert processes is not None
        split = HeadSplit(processes.heads, TokenShares(processes.data))
        return {name: train(configs()[name], dtype, split) for name in names}
