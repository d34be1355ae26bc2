"""Test the toy model of correlated features: covariances, features, autoencoder and stream."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from kronsae.data.random import generator_for
from kronsae.data.toy import (
    HIDDEN,
    INDEPENDENT,
    SETUPS,
    BlockSetup,
    CorrelatedFeatures,
    HiddenStates,
    ToyAutoencoder,
)
from kronsae.support.errors import UserError


def test_a_covariance_by_hand() -> None:
    setup = BlockSetup(name="x", blocks=(3, 1), within=0.5, across=0.1, inner=2, inner_within=0.8)
    expected = [[1, 0.8, 0.5, 0.1], [0.8, 1, 0.5, 0.1], [0.5, 0.5, 1, 0.1], [0.1, 0.1, 0.1, 1]]
    assert setup.covariance().tolist() == expected


@pytest.mark.parametrize("setup", [*SETUPS, INDEPENDENT], ids=lambda setup: setup.name)
def test_every_setup_is_a_covariance_of_256_features(setup: BlockSetup) -> None:
    matrix = setup.covariance()
    assert matrix.shape == (256, 256)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0


def test_there_are_eight_setups() -> None:
    assert len({setup.name for setup in SETUPS}) == len(SETUPS) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": ()}, "blocks must be one or more sizes above 0; got"),
        ({"blocks": (2, 0)}, "blocks must be one or more sizes above 0; got"),
        ({"inner": 2}, "must be given together; got inner=2 and inner_within=None"),
        ({"inner": 0, "inner_within": 0.9}, "inner must be above 0"),
        ({"across": 0.6}, "must satisfy 0 <= across <= within <= inner_within < 1; got"),
        ({"within": 1.0}, "must satisfy 0 <= across <= within <= inner_within < 1; got"),
        ({"inner": 2, "inner_within": 0.1}, "must satisfy 0 <= across <= within <= inner_within < 1; got"),
    ],
)
def test_a_wrong_setup_is_refused(changes: dict[str, Any], message: str) -> None:
    fine = BlockSetup(name="x", blocks=(2, 2), within=0.5)
    with pytest.raises(UserError, match=message):
        replace(fine, **changes)


def test_features_have_the_covariance() -> None:
    setup = BlockSetup(name="x", blocks=(6, 4, 2), within=0.7)
    every = CorrelatedFeatures(setup.covariance(), 12).sample(20_000, generator_for(0, "test"))
    assert float((torch.corrcoef(every.T) - setup.covariance()).abs().max()) < 0.03
    few = CorrelatedFeatures(setup.covariance(), 4).sample(20_000, generator_for(0, "test"))  # they compete: nearly S
    assert float((torch.corrcoef(few.T) - setup.covariance()).abs().max()) < 0.2


def test_without_correlation_so_many_features_are_on() -> None:
    features = CorrelatedFeatures(torch.eye(10, dtype=torch.float64), 3).sample(200, generator_for(0, "test"))
    assert int((features > 0).sum(1).max()) == 3
    assert float(features.min()) == 0
    with pytest.raises(UserError, match="from 1 to the number of features, 10; got 11"):
        CorrelatedFeatures(torch.eye(10), 11)


def test_the_autoencoder_by_hand() -> None:
    model = ToyAutoencoder(3, 2, generator_for(0, "test"))
    with torch.no_grad():
        model.W.copy_(torch.tensor([[1.0, 0, 1], [0, 2, 0]]))
        model.b.copy_(torch.tensor([0.0, 0, -4]))
    s = torch.tensor([[1.0, 1, 2]])
    assert model.hidden(s).tolist() == [[3, 2]]
    assert model(s).tolist() == [[3, 4, 0]]
    assert model.rows.tolist() == [[1, 0], [0, 2], [1, 0]]


def test_the_autoencoder_learns() -> None:
    s = CorrelatedFeatures(torch.eye(12, dtype=torch.float64), 2).sample(2000, generator_for(0, "test"))
    model = ToyAutoencoder(12, 8, generator_for(0, "weights"))
    before, start = float((model(s) - s).square().mean().detach()), model.rows
    model.fit(s, steps=200, batch=64, lr=1e-2, seed=0)
    assert float((model(s) - s).square().mean()) < 0.5 * before
    assert not torch.equal(model.rows, start)
    again = ToyAutoencoder(12, 8, generator_for(0, "weights")).fit(s, steps=200, batch=64, lr=1e-2, seed=0)
    assert torch.equal(again.rows, model.rows)


def test_the_stream_goes_on_where_it_stopped() -> None:
    hidden = torch.randn(50, 3)
    whole = list(itertools.islice(HiddenStates(hidden, batch=8, seed=1), 5))
    rest = list(itertools.islice(HiddenStates(hidden, batch=8, seed=1, state=whole[1][1]), 3))
    assert all(torch.equal(a[0][HIDDEN], b[0][HIDDEN]) for a, b in zip(whole[2:], rest, strict=True))
    assert not torch.equal(whole[0][0][HIDDEN], whole[1][0][HIDDEN])
    assert not torch.equal(whole[0][0][HIDDEN], next(iter(HiddenStates(hidden, batch=8, seed=2)))[0][HIDDEN])
