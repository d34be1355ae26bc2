"""Taking latents away: against building the activation anew, and a case worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kronsae.core.codes import SparseCodes
from kronsae.eval.absorption.probes import LinearProbe
from kronsae.eval.probing.perturbation import balanced_samples, important_latents, perturbations


def test_it_is_the_accuracy_on_activations_built_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(40, 7, generator=generator) * (torch.rand(40, 7, generator=generator) < 0.5)
    W_dec = torch.randn(7, 5, generator=generator)
    error = torch.randn(40, 5, generator=generator)
    probe = LinearProbe(torch.randn(3, 5, generator=generator), torch.randn(3, generator=generator))
    labels = torch.rand(40, 3, generator=generator) < 0.5
    rows = torch.arange(7).expand(40, 7)
    samples = balanced_samples(labels, torch.ones(40, dtype=torch.bool), 10, np.random.default_rng(0))
    importance = torch.randn(7, 3, generator=generator)
    x = dense @ W_dec + error
    along = W_dec @ probe.weight_CI.T
    codes = SparseCodes(dense, rows, 7)
    [found] = perturbations(codes, probe.scores(x), labels, samples, importance, along, (2,))
    drops = torch.zeros(3, 3, dtype=torch.float64)
    for taken in range(3):
        left = dense.clone()
        left[:, importance[:, taken].topk(2).indices] = 0.0
        for scored in range(3):
            chosen = samples[scored]
            before = ((probe.scores(x) > 0) == labels)[chosen, scored].double().mean()
            after = ((probe.scores(left @ W_dec + error) > 0) == labels)[chosen, scored].double().mean()
            drops[taken, scored] = before - after
    assert found.own == pytest.approx(float(drops.diagonal().mean()))
    assert found.others == pytest.approx(float((drops.sum() - drops.diagonal().sum()) / 6))
    assert found.score == found.own - found.others


def test_a_latent_of_ones_own_touches_no_other_concept() -> None:
    """Two concepts on two axes, a latent each: without its latent a probe says no to all, the other sees nothing."""
    labels = torch.tensor([[True, False], [False, True]]).repeat(10, 1)
    codes = SparseCodes(labels.float(), torch.tensor([[0, 1]]).expand(20, 2), 2)
    probe = LinearProbe(torch.eye(2), torch.tensor([-0.5, -0.5]))
    samples = [torch.arange(20), torch.arange(20)]
    importance = important_latents(np.array([[1.0, -1.0], [-1.0, 1.0]]), torch.eye(2), probe)
    assert importance.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    logits = probe.scores(labels.float())
    [found] = perturbations(codes, logits, labels, samples, importance, torch.eye(2), (1,))
    assert (found.own, found.others, found.score) == (0.5, 0.0, 0.5)


def test_samples_have_as_many_with_as_without() -> None:
    labels = torch.zeros(100, 2, dtype=torch.bool)
    labels[:30, 0] = labels[:90, 1] = True
    among = torch.arange(100) % 2 == 0
    first, second = balanced_samples(labels, among, 12, np.random.default_rng(0))
    assert int(labels[first, 0].sum()) == 12
    assert len(first) == 24
    assert int(labels[second, 1].sum()) == 5  # as few as lack it
    assert len(second) == 10
    assert bool(among[first].all())
    assert bool(among[second].all())
