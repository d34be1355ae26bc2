"""sae-lens' synthetic benchmark as a source of known features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kronsae.interop.sae_lens_synthetic import SaeLensConfig

SMALL = SaeLensConfig(features=256, d_in=24)


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


@pytest.mark.parametrize("seed", [0, 1])
def test_an_sae_of_the_same_seed_does_not_start_at_the_truth(seed: int) -> None:
    from kronsae.eval.known_features import absolute_cosines
    from kronsae.runs.recipes import topk

    features = replace(SMALL, seed=seed).build()
    untrained = topk(d_sae=256, k=4).shape(24).build(seed)
    assert float(absolute_cosines(untrained.W_dec, features.directions_GD).diagonal().mean()) < 0.3


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
