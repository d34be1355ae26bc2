from __future__ import annotations

import torch

from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.experts import SwitchEncoderConfig
from kronsae.core.heads import DeadShares, HeadGrid, dead_shares, head_grid

KRON = KroneckerEncoderConfig(num_heads=3, d_base=2, d_extension=3)


def test_the_grid_is_laid_out_as_the_latents_are_numbered() -> None:
    grid = head_grid(KRON)
    assert grid == HeadGrid(3, 2, 3)
    assert grid.cells == 6
    laid_HMN = grid.of(torch.arange(18))
    for head, base, extension in [(0, 0, 0), (1, 1, 2), (2, 0, 1)]:
        assert laid_HMN[head, base, extension] == head * 6 + base * 3 + extension


def test_experts_stand_one_after_another_and_a_dense_encoder_has_no_grid() -> None:
    assert head_grid(SwitchEncoderConfig(num_experts=4, expert=KRON)) == HeadGrid(12, 2, 3)
    dense = DenseEncoderConfig(d_sae=8)
    assert head_grid(dense) is None
    assert head_grid(SwitchEncoderConfig(num_experts=2, expert=dense)) is None


def test_dead_shares_by_hand() -> None:
    alive_HMN = torch.zeros(3, 2, 3, dtype=torch.bool)
    alive_HMN[0] = True
    alive_HMN[1, 1, 2] = True  # head 1: base 0 and extensions 0 and 1 are dead; head 2 is dead
    found = dead_shares(alive_HMN.flatten(), KRON)
    assert found == DeadShares(latents=1 - 7 / 18, bases=1 - 3 / 6, extensions=1 - 4 / 9, heads=1 / 3)


def test_without_heads_only_latents_are_counted() -> None:
    found = dead_shares(torch.tensor([True, False, False, False]), DenseEncoderConfig(d_sae=4))
    assert found == DeadShares(latents=0.75)
