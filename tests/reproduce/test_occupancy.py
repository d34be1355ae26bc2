"""Power laws are found where rows follow one, and not where they do not."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from kronsae.reproduce.claims import Holds, Row
from kronsae.reproduce.occupancy import PREDICTORS, fit, verdict

SIZES = tuple(itertools.product((16, 32, 64, 128), (512, 256, 128, 64)))


def rows(excess: list[float]) -> list[Row]:
    return [
        {"k": k, "num_heads": heads, "occupancy": k / heads, "seed": 0, "excess": value}
        for (k, heads), value in zip(SIZES, excess, strict=True)
    ]


def test_a_power_of_the_occupancy_is_found() -> None:
    found = rows([0.3 * (k / heads) ** 0.7 for k, heads in SIZES])
    (a, b), r2 = fit(found, PREDICTORS["K/H"])
    assert (math.exp(a), b, r2) == pytest.approx((0.3, 0.7, 1.0))
    judged = verdict([{**row, "seed": seed} for row in found for seed in (0, 1)])
    assert judged.holds == Holds.YES
    assert "Excess = 0.300 (K/H)^0.70 from K/H = 0.0312 to 2" in judged.why


def test_k_alone_is_not_taken_for_the_occupancy() -> None:
    found = rows([0.01 * k for k, _ in SIZES])
    assert fit(found, PREDICTORS["k"])[1] == pytest.approx(1.0)
    assert verdict([{**row, "seed": seed} for row in found for seed in (0, 1)]).holds == Holds.NO
    noise = np.random.default_rng(0).uniform(0.01, 0.1, len(SIZES)).tolist()
    assert fit(rows(noise), PREDICTORS["K/H"])[1] < 0.3
