"""sae-lens' synthetic benchmark as a source of known features; most of it runs where sae-lens is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch

from kronsae.interop.sae_lens_synthetic import SaeLensConfig
from kronsae.support.errors import UserError

HERE = importlib.util.find_spec("sae_lens") is not None
needs_sae_lens = pytest.mark.skipif(not HERE, reason="sae-lens is not installed")
SMALL = SaeLensConfig(features=256, d_in=24)


@pytest.mark.skipif(HERE, reason="sae-lens is installed")
def test_without_sae_lens_it_says_what_to_install() -> None:
    with pytest.raises(UserError, match="pip install sae-lens"):
        SMALL.build()


@pytest.mark.parametrize("changes", [{"features": 127}, {"d_in": 0}, {"seed": -1}])
def test_wrong_sizes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="features must be at least 128"):
        replace(SMALL, **changes)


@needs_sae_lens
@pytest.mark.filterwarnings("ignore")
def test_its_features_are_what_it_says() -> None:
    features = SMALL.build()
    before = torch.random.get_rng_state()
    x, activations = features.sample(400, held_out=False, number=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.allclose(x, activations @ features.directions_GD, atol=1e-4)
    on = activations > 0
    edges = features.edges["hierarchy"]
    assert bool((on[:, edges[:, 0]] | ~on[:, edges[:, 1]]).all())
    assert torch.cat(list(features.kinds.values())).sort().values.tolist() == list(range(256))
    assert len(features.kinds["root"]) == 2
    again = SMALL.build().sample(400, held_out=False, number=3)
    assert torch.equal(again[0], x)
    assert not torch.equal(features.sample(400, held_out=True, number=3)[0], x)
    assert not torch.equal(features.sample(400, held_out=False, number=4)[0], x)


@needs_sae_lens
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, 1])
def test_an_sae_of_the_same_seed_does_not_start_at_the_truth(seed: int) -> None:
    from kronsae.eval.known_features import absolute_cosines
    from kronsae.runs.recipes import topk

    features = replace(SMALL, seed=seed).build()
    untrained = topk(d_sae=256, k=4).shape(24).build(seed)
    assert float(absolute_cosines(untrained.W_dec, features.directions_GD).diagonal().mean()) < 0.3


@needs_sae_lens
@pytest.mark.filterwarnings("ignore")
def test_an_sae_is_measured_as_sae_lens_measures_it() -> None:
    from sae_lens.synthetic.evals import compute_classification_metrics

    from kronsae.eval.known_features import KnownFeaturesMeter
    from kronsae.runs.recipes import kron

    features = SMALL.build()
    sae = kron(num_heads=16, d_base=2, d_extension=4, k=8).shape(24).build(0)
    x, activations = features.sample(300, held_out=True, number=0)
    codes = sae.encode(x)
    meter = KnownFeaturesMeter(sae.W_dec, features.directions_GD, features.kinds, features.edges)
    meter.update(codes, activations)
    expected = compute_classification_metrics(codes.to_dense(), activations, sae.W_dec, features.directions_GD)
    found = meter.value()
    assert (found.precision, found.recall, found.f1) == pytest.approx(
        (expected.precision, expected.recall, expected.f1_score), abs=1e-6
    )
