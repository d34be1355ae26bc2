"""What SAELens demands of a registered architecture, rule by rule."""

from __future__ import annotations

import importlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from tests.interop_real.saelens.lens import D_IN, inputs

import kronsae.interop.saelens as ours
from kronsae.interop import formats
from kronsae.support.errors import UserError

INFERENCE = [config.architecture() for _, config in ours.INFERENCE]
TRAINING = [config.architecture() for _, config in ours.TRAINING]
SIZES: dict[str, Any] = {"d_in": D_IN, "d_sae": 64, "k": 5}


def build(architecture: str, training: bool = False, **settings: Any) -> Any:
    """Return an SAE of SAELens with one of our architectures."""
    registry = SAE_TRAINING_CLASS_REGISTRY if training else SAE_CLASS_REGISTRY
    sae_class, config_class = registry[architecture]
    return sae_class(config_class(**SIZES, **settings))


def test_importing_twice_registers_once() -> None:
    before = dict(SAE_CLASS_REGISTRY), dict(SAE_TRAINING_CLASS_REGISTRY)
    ours.register()
    importlib.reload(ours)
    assert (SAE_CLASS_REGISTRY.keys(), SAE_TRAINING_CLASS_REGISTRY.keys()) == (before[0].keys(), before[1].keys())
    assert set(INFERENCE) <= SAE_CLASS_REGISTRY.keys()
    assert set(TRAINING) <= SAE_TRAINING_CLASS_REGISTRY.keys()


@pytest.mark.parametrize("architecture", INFERENCE)
@torch.no_grad()
def test_rule_1_there_is_no_w_enc_and_no_fold_of_norms(architecture: str) -> None:
    sae, x = build(architecture), inputs()
    assert not hasattr(sae, "W_enc")
    assert not hasattr(sae, "b_enc")
    with pytest.raises(AttributeError, match="its encoder is factorised"):
        _ = sae.W_enc
    before = sae(x)
    sae.fold_W_dec_norm()  # the rows have norm 1: there is nothing to fold
    assert torch.equal(sae.fold_and_get_W_dec_norm(), torch.ones(64))
    assert torch.equal(sae(x), before)
    sae.W_dec[3] *= 1.1
    for fold in (sae.fold_W_dec_norm, sae.fold_and_get_W_dec_norm):
        with pytest.raises(NotImplementedError, match=r"share their rows, .* Norms are 1 to 1\.1\.$"):
            fold()


@pytest.mark.parametrize("architecture", INFERENCE)
def test_tools_that_mask_the_encoder_see_that_all_latents_are_needed(architecture: str) -> None:
    """SAEDashboard asks for SAELens' TopK; what it computes is what our sparsifier leaves to the ranking."""
    found = build(architecture).activation_fn
    assert isinstance(found, sae_lens.saes.topk_sae.TopK)
    assert found.k == (64 if "jumprelu" in architecture else 5)


@pytest.mark.parametrize("gate", ["mand", "relu_product"])
@torch.no_grad()
def test_rule_1_a_scale_of_the_activations_folds(gate: str) -> None:
    sae, x = build("kronsae_topk", gate=gate), inputs()
    before, acts = sae(4 * x) / 4, sae.encode(4 * x)
    sae.fold_activation_norm_scaling_factor(4.0)
    assert torch.allclose(sae(x), before, atol=1e-5)
    scale = 4 if gate == "mand" else 1
    assert torch.allclose(scale * sae.encode(x), acts, atol=1e-5)
    if gate == "mand":
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-6)


@torch.no_grad()
def test_rule_1_a_whitening_folds() -> None:
    sae, x = build("kronsae_jumprelu"), inputs()
    mean, matrix = torch.randn(D_IN), torch.randn(D_IN, D_IN) + 3 * torch.eye(D_IN)
    inverse = torch.linalg.inv(matrix)
    white = (x - mean) @ matrix
    acts, before = sae.encode(white), sae(white) @ inverse + mean
    sae.fold_activation_whitening(mean, matrix, inverse)
    assert torch.allclose(sae.encode(x), acts, atol=1e-4)
    assert torch.allclose(sae(x), before, atol=1e-4)


@pytest.mark.parametrize("architecture", INFERENCE)
def test_rules_2_and_3_it_loads_from_the_meta_device_in_any_type(architecture: str, tmp_path: Path) -> None:
    sae, x = build(architecture), inputs()
    sae.save_model(tmp_path / "sae")
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    with torch.no_grad():
        assert torch.equal(loaded(x), sae(x))
        assert torch.allclose(formats.read(tmp_path / "sae").sae(x), sae(x), atol=1e-6)
    assert all(tensor.is_floating_point() for tensor in sae.state_dict().values())
    for dtype in ("bfloat16", "float64"):
        cast = sae_lens.SAE.load_from_disk(tmp_path / "sae", dtype=dtype)
        assert {str(tensor.dtype) for tensor in cast.state_dict().values()} == {f"torch.{dtype}"}
        assert cast(x).dtype == getattr(torch, dtype)


def test_rule_4_metadata_survive(tmp_path: Path) -> None:
    sae = build("kronsae_topk")
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(tmp_path / "sae")
    assert sae_lens.SAE.load_from_disk(tmp_path / "sae").cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text("utf-8"))
    del config["metadata"]["sae_lens_version"]
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    assert sae_lens.SAE.load_from_disk(tmp_path / "sae").cfg.metadata.hook_name is None  # why it must be there


@pytest.mark.parametrize("architecture", INFERENCE)
def test_rules_5_and_6_hooks_are_on_top_and_called(architecture: str) -> None:
    sae, x = build(architecture), inputs().view(4, 32, D_IN)
    plain = sae(x)
    expected = {"hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"}
    assert expected <= sae.hook_dict.keys()
    out, cache = sae.run_with_cache(x)
    assert expected <= cache.keys()
    assert torch.allclose(out, plain, atol=1e-6)
    assert torch.equal(cache["hook_sae_acts_post"] != 0, sae.encode(x) != 0)
    assert cache["hook_sae_acts_pre"].shape == (4, 32, 64)
    silent = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: 0 * acts)])
    recons = sae.b_dec if sae.kronsae.skip is None else sae.b_dec + sae.kronsae.skip(x)
    assert torch.allclose(silent, recons.expand_as(silent), atol=1e-6)
    ablated = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_pre", lambda pre, hook: 0 * pre)])
    assert torch.allclose(ablated, recons.expand_as(ablated), atol=1e-6)


def test_rule_6_reshaping_and_normalisation_of_sae_lens_work() -> None:
    sae = build("kronsae_topk", reshape_activations="hook_z")
    x = inputs()
    assert torch.allclose(sae(x.view(-1, 3, 4)).view(-1, D_IN), build_like(sae)(x), atol=1e-6)
    normed = build("kronsae_topk", normalize_activations="layer_norm")
    assert bool(normed(x).isfinite().all())


def build_like(sae: Any) -> Any:
    """Return the SAE of ours inside."""
    return ours.to_kronsae(sae)


@pytest.mark.parametrize("architecture", TRAINING)
def test_rule_7_defaults_are_valid_on_the_command_line(architecture: str) -> None:
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    sae = sae_class(config_class(d_in=512, d_sae=1024))
    inference = {field.name for field in fields(sae.cfg.get_inference_config_class())}
    assert inference <= {field.name for field in fields(sae.cfg)}
    assert sae.cfg.get_inference_sae_cfg_dict()["architecture"] in INFERENCE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be False"),
        ({"d_base": 3}, "d_sae must be a multiple of d_base"),
    ],
)
def test_settings_that_a_kronsae_does_not_have_are_refused(settings: dict[str, Any], message: str) -> None:
    for training in (False, True):
        with pytest.raises(UserError, match=message):
            build("kronsae_topk", training, **settings)


def test_decoder_rows_of_another_norm_are_refused() -> None:
    with pytest.raises(UserError, match="decoder_init_norm must be 1"):
        build("kronsae_topk", True, decoder_init_norm=0.1)


def test_an_sae_of_another_architecture_has_none_of_ours_inside() -> None:
    other = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=4, d_sae=8))
    with pytest.raises(UserError, match=r"load the folder with kronsae\.load"):
        ours.to_kronsae(other)
