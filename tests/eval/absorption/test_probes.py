"""Probes: against torch's own linear layer and optimiser, sparse against dense; F1 by hand; split latents by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from kronsae.core.codes import SparseCodes
from kronsae.eval.absorption.probes import ON_LATENTS, ProbeTraining, f1, train_latent_probe, train_probe
from kronsae.eval.absorption.sparse_probes import logistic_regression, num_split, sparse_probes
from kronsae.support.errors import UserError

TRAINING = ProbeTraining(batch=1000, epochs=30, l1=0.01)


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.stack([x[:, 0] > 0.3, x[:, 1] + x[:, 2] > 0], dim=1)


def test_it_is_a_linear_layer_trained_by_adam() -> None:
    x, y = examples()
    found = train_probe(x, y, TRAINING, seed=4)
    torch.manual_seed(4)
    layer = nn.Linear(5, 2).double()
    adam = torch.optim.Adam(layer.parameters(), lr=1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, (1e-5 / 1e-2) ** (1 / 30))
    positives = y.sum(0)
    loss = nn.BCEWithLogitsLoss(pos_weight=((60 - positives) / positives).double())
    for _ in range(30):
        adam.zero_grad()
        (loss(layer(x), y.double()) + 0.01 * layer.weight.abs().sum(-1).mean()).backward()
        adam.step()
        schedule.step()
    torch.testing.assert_close(found.weight_CI, layer.weight.detach())
    torch.testing.assert_close(found.bias_C, layer.bias.detach())
    torch.testing.assert_close(found.scores(x), layer(x).detach())


def test_on_codes_it_is_the_same_as_on_the_dense_latents() -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.rand(50, 3, generator=generator, dtype=torch.float64)
    indices = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(50)])
    values[:5, 1] = 0.0
    codes = SparseCodes(values, indices, 8)
    y = torch.stack([(indices == 2).any(1), (indices == 5).any(1)], dim=1)
    training = replace(TRAINING, batch=16)
    sparse, dense = train_latent_probe(codes, y, training, 0), train_probe(codes.to_dense(), y, training, 0)
    torch.testing.assert_close(sparse.weight_CI, dense.weight_CI)


def test_equal_seeds_give_equal_probes_and_others_do_not() -> None:
    x, y = examples()
    training = ProbeTraining(batch=16, epochs=2)
    one, same, other = (train_probe(x, y, training, seed) for seed in (0, 0, 1))
    assert torch.equal(one.weight_CI, same.weight_CI)
    assert not torch.equal(one.weight_CI, other.weight_CI)


def test_a_class_without_positives_does_no_harm() -> None:
    x, y = examples()
    y[:, 1] = False
    found = train_probe(x, y, ProbeTraining(batch=8), seed=0)
    assert bool(found.weight_CI.isfinite().all())
    assert f1(found.scores(x)[:, 0] > 0, y[:, 0]) > 0.6


def test_f1_by_hand() -> None:
    predicted = torch.tensor([True, True, False, False])
    assert f1(predicted, torch.tensor([True, False, True, False])) == 0.5  # tp 1, fp 1, fn 1
    assert f1(predicted, predicted) == 1.0
    assert f1(predicted & False, predicted & False) == 0.0


@pytest.mark.parametrize(
    ("scores", "split"),
    [
        ([0.5], 1),
        ([0.5, 0.6, 0.7, 0.71, 0.9], 3),  # the fourth adds too little, what comes after does not count
        ([0.5, 0.53], 1),  # by exactly 0.03 is not by more
        ([0.0, 0.0], 1),
        ([0.25, 0.5, 0.75, 1.0], 4),
    ],
)
def test_split_latents_by_hand(scores: list[float], split: int) -> None:
    assert num_split(scores, 0.03) == split


def test_the_latents_of_a_class_are_found() -> None:
    """Half of the class lights latent 3, half latent 1; 0 is noise, and 2 lights on everything else."""
    rows = torch.arange(80)
    true = rows % 2 == 0
    indices = torch.where(true, torch.where(rows % 4 == 0, 3, 1), 2).unsqueeze(1)
    codes = SparseCodes(torch.ones(80, 1), indices, 5)
    weight = torch.tensor([0.1, 0.5, -2.0, 0.9, 0.0])
    found = sparse_probes(weight, codes, true, codes, true, max_k=3, jump=0.03)
    assert found.latents == (3, 1, 0)  # signed: 2 tells the class best, by its absence
    assert found.f1_by_k == pytest.approx((2 / 3, 1.0, 1.0))
    assert found.main == (3, 1)


def test_nothing_to_tell_apart_is_never_there() -> None:
    x = torch.rand(10, 2)
    weight, bias = logistic_regression(x, torch.zeros(10, dtype=torch.bool))
    assert bool((x @ weight + bias < 0).all())


def test_what_cannot_train_is_refused() -> None:
    assert ON_LATENTS.batch == 4096
    with pytest.raises(UserError, match="batch and epochs must be at least 1"):
        ProbeTraining(epochs=0)
    with pytest.raises(UserError, match="final_lr must be above 0 and at most lr"):
        ProbeTraining(final_lr=1.0)
