"""Absorption from activations to figures: dictionaries that absorb by construction and that do not; the gate."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kronsae.core.encoders import DenseEncoderConfig
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import JumpReLUConfig, TopKConfig
from kronsae.eval.absorption import Absorption, AbsorptionConfig, Examples, ProbeTraining, absorption, probe_classes
from kronsae.support.errors import UserError

D = 12
SPECIAL = 8  # the direction of the special words of class 0
CONFIG = AbsorptionConfig(
    probe=ProbeTraining(batch=64, epochs=40), latent_probe=ProbeTraining(batch=64, epochs=40, l1=0.01), max_k=3
)


def examples() -> Examples:
    """Three classes along axes 0, 1, 2; one in four words of class 0 also has a direction of its own, axis 8."""
    number = torch.arange(480)
    labels = number % 3
    x = 4.0 * torch.eye(D)[labels]
    x += 0.05 * torch.randn(480, D, generator=torch.Generator().manual_seed(0))
    x[special(number), SPECIAL] += 3.0
    return Examples(x_ED=x, labels_E=labels, held_out_E=number >= 360, classes=("a", "b", "c"))


def special(number: torch.Tensor) -> torch.Tensor:
    return number % 12 == 0


def dictionary(*, absorbing: bool) -> SAE:
    """Latents along the axes; if absorbing, latent 8 writes axis 0 as well and latent 0 is off where 8 is on."""
    shape = SAEConfig(d_in=D, encoder=DenseEncoderConfig(d_sae=D), sparsifier=TopKConfig(k=3))
    sae = shape.build()
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(D))
        sae.encoder.bias.fill_(-0.5)
        sae.W_dec.copy_(torch.eye(D))
        if absorbing:
            sae.encoder.weight[0, SPECIAL] = -10.0
            sae.W_dec[SPECIAL] = torch.nn.functional.normalize(torch.eye(D)[0] + 0.75 * torch.eye(D)[SPECIAL], dim=0)
    return sae


def measured(sae: SAE) -> Absorption:
    data = examples()
    return absorption(sae, data, probe_classes(data, CONFIG), CONFIG)


def test_a_dictionary_of_the_classes_absorbs_nothing() -> None:
    found = measured(dictionary(absorbing=False))
    assert found.mean_absorption_fraction < 0.05
    assert found.mean_full_absorption == 0.0
    assert found.mean_num_split_latents == 1.0
    assert [one.latents for one in found.classes] == [(0,), (1,), (2,)]
    assert found.mean_f1 == 1.0


def test_what_absorbs_by_construction_is_found() -> None:
    """With latent 8 left out (max_k = 1), a quarter of class 0's words are absorbed in full."""
    data, config = examples(), replace(CONFIG, max_k=1)
    found = absorption(dictionary(absorbing=True), data, probe_classes(data, config), config)
    of_class = {one.name: one for one in found.classes}
    assert of_class["a"].words == 40
    assert of_class["a"].full == pytest.approx(0.25)
    assert of_class["a"].fraction == pytest.approx(0.25, abs=0.02)
    assert of_class["b"].full == of_class["c"].full == 0.0
    assert found.mean_full_absorption == pytest.approx(0.25 / 3)
    assert found.spread_of_fraction is not None


def test_a_split_class_is_not_absorbed() -> None:
    """With two latents allowed, 8 stands for the class as 0 does."""
    of_class = {one.name: one for one in measured(dictionary(absorbing=True)).classes}
    assert set(of_class["a"].latents) == {0, SPECIAL}
    assert of_class["a"].full == 0.0


def test_a_dictionary_that_is_never_active_absorbs_nothing() -> None:
    """Nor does SAEBench's: what absorbs must carry 0.4 of the projection, and here nothing carries any."""
    sae = SAEConfig(d_in=D, encoder=DenseEncoderConfig(d_sae=D), sparsifier=JumpReLUConfig(k=3)).build()
    with torch.no_grad():
        sae.encoder.bias.fill_(-1000.0)
    found = measured(sae)
    assert found.mean_absorption_fraction == found.mean_full_absorption == found.mean_f1 == 0.0


def test_equal_seeds_give_equal_digits() -> None:
    one, other = (json.dumps(measured(dictionary(absorbing=True)).to_dict()) for _ in range(2))
    assert one == other


def test_classes_that_no_probe_tells_end_it() -> None:
    data = examples()
    mixed = replace(data, labels_E=torch.arange(480) // 7 % 3)
    with pytest.raises(UserError, match=r"F1 > 0.6 for at least 3 of the 3 classes; got \d \(a 0\.\d\d, b"):
        probe_classes(mixed, CONFIG)
    assert probe_classes(data, CONFIG).f1 == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("classes", "needed"), [(26, 20), (16, 13), (3, 3), (13, 10)])
def test_the_gate_is_twenty_of_twenty_six(classes: int, needed: int) -> None:
    assert AbsorptionConfig().needed(classes) == needed
    assert AbsorptionConfig(min_classes=2).needed(classes) == 2


def test_only_classes_with_a_believed_probe_count() -> None:
    data = examples()
    noisy = data.labels_E.clone()
    number = torch.arange(480)
    noisy[(number % 2 == 0) & (noisy > 0)] = 3 - noisy[(number % 2 == 0) & (noisy > 0)]  # b and c cannot be told
    mixed, config = replace(data, labels_E=noisy), replace(CONFIG, min_classes=1, min_f1=0.9)
    found = absorption(dictionary(absorbing=False), mixed, probe_classes(mixed, config), config)
    assert [one.name for one in found.classes] == ["a"]
    assert found.spread_of_fraction is None


def test_a_config_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="max_k must be at least 1"):
        AbsorptionConfig(max_k=0)
    with pytest.raises(UserError, match=r"min_classes must be at most the number of classes; got 4 with 3"):
        AbsorptionConfig(min_classes=4).needed(3)
    with pytest.raises(UserError, match="min_classes must be at least 1"):
        AbsorptionConfig(min_classes=0)


def test_small_activations_can_be_scaled() -> None:
    data = examples()
    small = replace(data, x_ED=data.x_ED / 1000)
    with pytest.raises(UserError, match="absorption needs probes"):
        probe_classes(small, replace(CONFIG, probe=ProbeTraining(batch=64, epochs=5)))
    config = replace(CONFIG, scaled=True)
    sae = dictionary(absorbing=True)
    large = absorption(sae, data, probe_classes(data, config), config)
    with torch.no_grad():
        sae.encoder.bias.div_(1000)
    found = absorption(sae, small, probe_classes(small, config), config)
    assert found.mean_absorption_fraction == pytest.approx(large.mean_absorption_fraction, abs=1e-3)
