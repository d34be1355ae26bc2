from __future__ import annotations

import pytest
import torch
from tests.interventions.test_intervene import make_sae, model_of, tokens
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import DenseEncoderConfig
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.interventions.attribution import Attribution, attribute, logit_difference
from kronsae.interventions.intervene import Intervention, intervene, scale, steer
from kronsae.support.errors import UserError


def by_hand() -> Attribution:
    codes = SparseCodes(torch.tensor([[[2.0, 0.0], [1.0, 3.0]]]), torch.tensor([[[1, 0], [3, 1]]]), 4)
    return Attribution(codes=codes, gradient=torch.tensor([[[0.5, 9.0], [-4.0, 1.0]]]), error=torch.zeros(1, 2))


def test_sums_by_hand() -> None:
    found = by_hand()
    assert found.values.tolist() == [[[1, 0], [-4, 3]]]
    assert found.by_latent().tolist() == [0, 4, 0, -4]
    assert dict(found.top(9)) == {1: 4.0, 3: -4.0}
    assert len(found.top(1)) == 1


@pytest.mark.parametrize("kron", [True, False])
@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2"])  # these models compute entirely in float64
def test_attribution_is_the_slope_of_an_intervention(kind: str, kron: bool) -> None:
    """Compare ``f d metric / d f`` with central differences of the model with scaled ``f``, in float64."""
    model, sae, ids = model_of(kind, torch.float64), make_sae(kron=kron, dtype=torch.float64), tokens(2, 6)
    metric = logit_difference(7, 9)
    (found,) = attribute(model, [(sae, "layers.1")], {"input_ids": ids}, metric)
    step = 1e-5
    for position, place in [(0, 0), (2, 1), (5, 3)]:
        for sequence in range(2):
            latent = int(found.codes.indices[sequence, position, place])
            slopes = []
            for factor in (1 + step, 1 - step):
                change = Intervention(sae=sae, hook=1, changes=[scale(latent, factor)], positions=[position])
                with intervene(model, change):
                    logits = model(ids).logits[sequence : sequence + 1]
                slopes.append(float(metric(logits)))
            expected = (slopes[0] - slopes[1]) / (2 * step)
            assert float(found.values[sequence, position, place]) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_for_a_linear_metric_it_is_ablation() -> None:
    """With a metric linear in the hooked activation, ablation changes it by exactly the attributed value."""
    model, sae, ids = model_of(dtype=torch.float64), make_sae(dtype=torch.float64), tokens(1, 5)
    direction = torch.randn(16, dtype=torch.float64)

    def linear(logits: Tensor) -> Tensor:
        read_out: Tensor = logits @ torch.linalg.pinv(model.lm_head.weight.T) @ direction
        return read_out

    # the final norm is the only nonlinearity between the last block and the logits
    model.gpt_neox.final_layer_norm = torch.nn.Identity()
    (found,) = attribute(model, [(sae, "layers.3")], {"input_ids": ids}, lambda logits: linear(logits).sum())
    (again,) = attribute(model, [(sae, "layers.3")], {"input_ids": ids}, lambda logits: linear(logits)[0, 2])
    assert torch.equal(again.gradient[0, 3], torch.zeros(5, dtype=torch.float64))  # the metric depends on another token
    for latent, share in found.top(5):
        with intervene(model, Intervention(sae=sae, hook="layers.3", changes=[scale(latent, 0.0)])):
            ablated = float(linear(model(ids).logits).sum())
        assert float(linear(model(ids).logits).sum()) - ablated == pytest.approx(share, rel=1e-8)
    x_hat_sum = float((found.by_latent().sum()) + found.error.sum()) + 5 * float(sae.b_dec @ direction)
    assert x_hat_sum == pytest.approx(float(linear(model(ids).logits).sum()), rel=1e-8)


def test_an_earlier_sites_gradient_passes_through_a_later_one() -> None:
    model, ids = model_of(dtype=torch.float64), tokens(1, 6)
    first, second = make_sae(0, dtype=torch.float64), make_sae(1, dtype=torch.float64)
    metric, inputs = logit_difference(5, 6), {"input_ids": ids}
    both = attribute(model, [(first, "layers.1"), (second, "layers.2")], inputs, metric)
    for found, site in zip(both, [(first, "layers.1"), (second, "layers.2")], strict=True):
        (alone,) = attribute(model, [site], inputs, metric)
        torch.testing.assert_close(found.values, alone.values)
        torch.testing.assert_close(found.error, alone.error)
        assert float(found.values.abs().max()) > 0


def test_padding_has_no_share() -> None:
    model, sae, ids = model_of(), make_sae(), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    (found,) = attribute(model, [(sae, "layers.1")], inputs, logit_difference(5, 6))
    assert float(found.codes.values[1, :3].abs().max()) == 0
    assert float(found.gradient[1, :3].abs().max()) == float(found.error[1, :3].abs().max()) == 0
    assert float(found.values[1, 3:].abs().max()) > 0


def test_it_runs_under_no_grad_and_leaves_the_model_as_it_was() -> None:
    model, sae, ids = model_of(), make_sae(), tokens()
    expected = model(ids).logits
    with torch.no_grad():
        (found,) = attribute(model, [(sae, "layers.1")], {"input_ids": ids}, logit_difference(5, 6))
    assert not found.values.requires_grad
    assert torch.equal(model(ids).logits, expected)


def test_within_an_intervention_it_is_of_the_changed_model() -> None:
    model, sae, ids = model_of(), make_sae(), tokens()
    site, inputs, metric = (sae, "layers.2"), {"input_ids": ids}, logit_difference(5, 6)
    (plain,) = attribute(model, [site], inputs, metric)
    with intervene(model, Intervention(sae=sae, hook="layers.1", changes=[steer(3, 5.0)])):
        (changed,) = attribute(model, [site], inputs, metric)
    assert not torch.equal(plain.by_latent(), changed.by_latent())


def test_a_metric_must_be_one_number_of_the_logits() -> None:
    model, sae, ids = model_of(), make_sae(), tokens()
    for metric, shape in [
        (lambda logits: logits[0, 0], r"\(320,\)"),
        (lambda logits: torch.zeros(()), r"\(\) without"),
    ]:
        with pytest.raises(UserError, match=rf"metric must return one number.*shape {shape}"):
            attribute(model, [(sae, "layers.1")], {"input_ids": ids}, metric)


def test_only_an_sae_of_one_hook_can_be_attributed_to() -> None:
    """The shapes of a transcoder with equal widths would fit, but the result would be meaningless."""
    model, common = model_of(), {"encoder": DenseEncoderConfig(d_sae=8), "sparsifier": TopKConfig(k=2)}
    for role, widths in (("transcoder", {"write_widths": (16,)}), ("crosscoder", {"read_widths": (8, 8)})):
        sae = SAEConfig(d_in=16, **common, **widths).build()  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"reconstruct the single hook they read; got a {role}"):
            attribute(model, [(sae, 1)], {"input_ids": tokens()}, logit_difference(1, 2))
