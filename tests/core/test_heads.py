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


NULL = KroneckerEncoderConfig(num_heads=3, d_base=2, d_extension=3, null_symbols=True)


def test_with_null_symbols_the_grid_has_a_row_and_a_column_more() -> None:
    grid = head_grid(NULL)
    assert grid == HeadGrid(3, 2, 3, null_symbols=True)
    assert grid.cells == 11
    laid_HMN = grid.of(torch.arange(1, 34))
    assert laid_HMN.shape == (3, 3, 4)
    assert (laid_HMN[:, 2, 3] == 0).all()
    for head, base, extension in [(0, 0, 0), (1, 1, 2), (2, 0, 3), (2, 2, 2)]:
        latent = head * 11 + base * 4 + extension
        assert laid_HMN[head, base, extension] == 1 + latent
        place = (head, base if base < 2 else None, extension if extension < 3 else None)
        assert grid.place(latent) == place
    assert head_grid(SwitchEncoderConfig(num_experts=4, expert=NULL)) == HeadGrid(12, 2, 3, null_symbols=True)


def test_places_without_null_symbols() -> None:
    grid = head_grid(KRON)
    assert grid is not None
    assert [grid.place(latent) for latent in (0, 5, 16)] == [(0, 0, 0), (0, 1, 2), (2, 1, 1)]


def test_dead_shares_with_null_symbols_by_hand() -> None:
    """Head 0: base 1 alone is live, and no pair; head 1: extension 2 alone; head 2: the pair (0, 0)."""
    alive_F = torch.zeros(33, dtype=torch.bool)
    alive_F[[1 * 4 + 3, 11 + 2 * 4 + 2, 22]] = True
    found = dead_shares(alive_F, NULL)
    assert found == DeadShares(latents=1 - 3 / 33, bases=4 / 6, extensions=7 / 9, heads=0.0)


def test_dead_shares_by_hand() -> None:
    alive_HMN = torch.zeros(3, 2, 3, dtype=torch.bool)
    alive_HMN[0] = True
    alive_HMN[1, 1, 2] = True  # head 1: base 0 and extensions 0 and 1 are dead; head 2 is dead
    found = dead_shares(alive_HMN.flatten(), KRON)
    assert found == DeadShares(latents=1 - 7 / 18, bases=1 - 3 / 6, extensions=1 - 4 / 9, heads=1 / 3)


def test_without_heads_only_latents_are_counted() -> None:
    found = dead_shares(torch.tensor([True, False, False, False]), DenseEncoderConfig(d_sae=4))
    assert found == DeadShares(latents=0.75)
