"""The two absorption measures: cases worked out by hand, and a slow definition word by word."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.eval.absorption.words import AbsorptionRule, probe_cosines, word_absorption
from kronsae.support.errors import UserError

COSINE = torch.tensor([0.5, 0.8, 0.05, -0.4, 0.25], dtype=torch.float64)


def of_word(activations: dict[int, float], p: float, main: list[int]) -> tuple[float, bool]:
    values = torch.tensor([list(activations.values())], dtype=torch.float64)
    indices = torch.tensor([list(activations)], dtype=torch.int64)
    found = word_absorption(SparseCodes(values, indices, 5), torch.tensor([p]), COSINE, main)
    return float(found.fraction_E[0]), bool(found.full_E[0])


@pytest.mark.parametrize(
    ("activations", "p", "main", "fraction", "full"),
    [
        # main 0.5, absorbers 1.6 = 0.8 p, but only p - main = 1.5 of them counts: 1.5 / (1.5 + 0.5)
        ({0: 1.0, 1: 2.0}, 2.0, [0], 0.75, False),
        # absorbers 0.8 = 0.4 p exactly, less than p - main = 1.5: 0.8 / (0.8 + 0.5)
        ({0: 1.0, 1: 1.0}, 2.0, [0], 0.8 / 1.3, False),
        ({0: 1.0, 1: 0.99}, 2.0, [0], 0.0, False),  # below 0.4 p
        ({0: 4.0, 1: 3.0}, 2.0, [0], 0.0, False),  # main = p
        ({1: 1.0}, 1.0, [0], 1.0, True),  # main off, one latent carries 0.8 p
        ({1: 1.0, 3: 1.0}, 1.0, [3], 1.0, False),  # main = -0.4 is below 0, and on
        ({1: 1.0}, -1.0, [0], 0.0, False),
        ({1: 1.0}, 0.0, [0], 0.0, False),
        ({2: 10.0}, 1.0, [0], 0.0, True),  # a cosine of 0.05 is too small for a fraction, enough to absorb in full
        ({3: 1.0}, 1.0, [0], 0.0, False),  # the only active latent points away
        ({4: 2.0, 1: 0.5}, 1.0, [0], 1.0, True),
        ({0: 0.0, 1: 0.0}, 1.0, [0], 0.0, False),  # padding only
    ],
)
def test_a_word_worked_out_by_hand(
    activations: dict[int, float], p: float, main: list[int], fraction: float, full: bool
) -> None:
    found = of_word(activations, p, main)
    assert found[0] == pytest.approx(fraction, abs=1e-12)
    assert found[1] == full


def test_at_most_three_latents_share_in_an_absorption() -> None:
    cosine_F = torch.full((6,), 0.5)
    codes = SparseCodes(torch.ones(1, 6), torch.arange(6).unsqueeze(0), 6)
    p = torch.tensor([10.0])
    # main 0.5; five others of 0.5, of which three count: 1.5 / 10 is not 0.4, with p = 3 it is 0.5
    assert float(word_absorption(codes, p, cosine_F, [0]).fraction_E) == 0.0
    assert float(word_absorption(codes, p * 0.3, cosine_F, [0]).fraction_E) == pytest.approx(1.5 / 2.0)
    four = AbsorptionRule(max_absorbers=4)
    assert float(word_absorption(codes, p * 0.3, cosine_F, [0], four).fraction_E) == pytest.approx(2.0 / 2.5)


def slow(dense_F: Tensor, p: float, cosine_F: Tensor, main: list[int]) -> tuple[float, bool]:
    """The definition on all latents of one word."""
    c = [float(f * cos) for f, cos in zip(dense_F, cosine_F, strict=True)]
    main_sum = sum(c[i] for i in main)
    others = sorted((c[i] for i in range(len(c)) if i not in main and cosine_F[i] >= 0.1 and c[i] > 0), reverse=True)
    absorbers = sum(others[:3])
    if main_sum >= p or absorbers / p < 0.4:
        fraction = 0.0
    elif main_sum <= 0:
        fraction = 1.0
    else:
        taken = min(absorbers, p - main_sum)
        fraction = min(max(taken / (taken + main_sum), 0.0), 1.0)
    top = max(range(len(c)), key=c.__getitem__)
    off = all(dense_F[i] < 1e-8 for i in main)
    return fraction, off and float(cosine_F[top]) >= 0.025 and p >= 0 and c[top] / p >= 0.4


def test_it_is_the_slow_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        dense_EF = torch.rand(7, 12, generator=generator, dtype=torch.float64)
        dense_EF *= torch.rand(7, 12, generator=generator) < 0.3
        cosine_F = torch.rand(12, generator=generator, dtype=torch.float64) * 1.2 - 0.3
        p_E = torch.randn(7, generator=generator, dtype=torch.float64) + 0.5
        main = torch.randperm(12, generator=generator)[: 1 + case % 3].tolist()
        order = torch.argsort(torch.rand(7, 12, generator=generator), dim=-1)
        found = word_absorption(SparseCodes(dense_EF.gather(1, order), order, 12), p_E, cosine_F, main)
        expected = [slow(row, float(p), cosine_F, main) for row, p in zip(dense_EF, p_E, strict=True)]
        torch.testing.assert_close(found.fraction_E, torch.tensor([one[0] for one in expected], dtype=torch.float64))
        assert found.full_E.tolist() == [one[1] for one in expected]


def test_cosines_ignore_lengths() -> None:
    W_dec = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert probe_cosines(torch.tensor([5.0, 0.0]), W_dec).tolist() == [1.0, 0.0, -1.0]


def test_a_rule_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="share must be between 0 and 1; got 0"):
        AbsorptionRule(share=0)
    with pytest.raises(UserError, match="max_absorbers must be at least 1"):
        AbsorptionRule(max_absorbers=0)
