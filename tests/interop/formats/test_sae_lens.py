"""SAELens' folders, read without SAELens and compared with its formulas."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.interop.sae_lens_folders import D_IN, D_SAE, METADATA, SETTINGS, architecture_of, make, reference, write
from torch import Tensor

from kronsae.core.sparsifiers import JumpReLUConfig
from kronsae.interop import formats, saelens_layout
from kronsae.interop.formats import sae_lens
from kronsae.support.errors import UserError

TOLERANCE = 1e-5
"""Of float32 against float64; activations are of order 1 to 10."""


@torch.no_grad()
def compare(folder: Path, expected: tuple[Tensor, Tensor], x: Tensor) -> None:
    """Compare latents and reconstruction of the SAE in a folder; the same latents must be active."""
    sae = formats.read(folder).sae
    codes = sae.encode(x)
    acts = codes.to_dense()
    assert torch.equal(acts != 0, expected[0] != 0)
    assert float((acts - expected[0]).abs().max()) <= TOLERANCE
    assert float((sae.decode(codes, x) - expected[1]).abs().max()) <= TOLERANCE * 10  # sums of up to 40 latents


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_architecture_is_read_as_sae_lens_computes_it(case: str, seed: int, tmp_path: Path) -> None:
    config, weights = make(case, seed)
    folder, x = write(tmp_path / "sae", config, weights), torch.randn(64, D_IN)
    assert formats.recognize(folder) == "sae_lens"
    expected = reference(config, weights, x)
    assert 0 < float((expected[0] != 0).double().mean()) < 0.9
    compare(folder, expected, x)
    found = formats.read(folder)
    assert (found.architecture, found.model, found.hook_read) == (architecture_of(case), "gpt2", METADATA["hook_name"])
    assert found.settings["context_size"] == 128
    assert ("transcoder" in case) == bool(found.sae.write_widths)
    assert all(weight.dtype == torch.float32 for weight in found.sae.state_dict().values())


@pytest.mark.parametrize(
    ("case", "old"),
    [
        ("standard", {"hook_point": "blocks.6.hook_resid_post", "activation_fn_str": "relu"}),
        ("standard", {"activation_fn": "relu", "noise_scale": 0.0, "l1_coefficient": 8e-5, "use_ghost_grads": True}),
        ("topk", {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}),
        ("jumprelu", {"architecture": "jumprelu", "apply_b_dec_to_input": False}),
        ("gated", {"architecture": "gated", "normalize_activations": None, "sae_lens_training_version": "3.20.0"}),
        ("gated", {"architecture": "gated", "normalize_activations": False, "sae_lens_version": "5.10.3"}),
    ],
)
def test_configs_from_before_version_6_are_read_as_version_6_reads_them(
    case: str, old: dict[str, Any], tmp_path: Path
) -> None:
    config, weights = make(case)
    flat = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "model_name": "gpt2-small", "lr": 4e-4}
    folder, x = write(tmp_path / "sae", flat | old, weights), torch.randn(32, D_IN)
    compare(folder, reference(config, weights, x), x)
    found = formats.read(folder)
    assert (found.model, found.settings["lr"]) == ("gpt2-small", 4e-4)


def test_an_old_config_with_nested_metadata_loses_it_as_in_sae_lens(tmp_path: Path) -> None:
    config, weights = make("standard")
    config["metadata"]["sae_lens_version"] = "5.10.3"
    assert formats.read(write(tmp_path / "sae", config, weights)).hook_read is None


def test_an_sae_of_attention_heads_says_so(tmp_path: Path) -> None:
    _, weights = make("standard")
    flat = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "hook_point": "blocks.5.attn.hook_z"}
    found = formats.read(write(tmp_path / "sae", flat, weights))
    assert found.settings["reshape_activations"] == "hook_z"


def test_weights_are_rounded_to_the_type_of_the_config(tmp_path: Path) -> None:
    config, weights = make("jumprelu")
    folder = write(tmp_path / "sae", config | {"dtype": "bfloat16"}, weights)
    rounded = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    x = torch.randn(32, D_IN)
    compare(folder, reference(config, rounded, x), x)


def test_a_scaling_factor_of_1_is_dropped_and_another_is_refused(tmp_path: Path) -> None:
    config, weights = make("standard")
    folder = write(tmp_path / "sae", config, weights | {"scaling_factor": torch.ones(D_SAE)})
    x = torch.randn(16, D_IN)
    compare(folder, reference(config, weights, x), x)
    write(folder, config, weights | {"scaling_factor": torch.full((D_SAE,), 2.0)})
    with pytest.raises(UserError, match="scaling_factor must be 1 everywhere"):
        formats.read(folder)


def test_an_older_checkpoint_holds_the_logarithm_of_its_thresholds(tmp_path: Path) -> None:
    config, weights = make("jumprelu")
    weights["threshold"] = weights["threshold"].clamp_min(0.01)
    logs = {("log_threshold" if name == "threshold" else name): weights[name] for name in weights}
    logs["log_threshold"] = weights["threshold"].log()
    x = torch.randn(16, D_IN)
    compare(write(tmp_path / "sae", config, logs), reference(config, weights, x), x)


def test_a_missing_scale_of_the_activations_is_said(tmp_path: Path) -> None:
    config, weights = make("standard")
    folder = write(tmp_path / "sae", config | {"normalize_activations": "expected_average_only_in"}, weights)
    with pytest.warns(UserWarning, match="the file does not hold the scale"):
        found = formats.read(folder)
    assert found.settings["normalize_activations"] == "expected_average_only_in"


def test_l0_is_that_of_the_files(tmp_path: Path) -> None:
    config, weights = make("jumprelu")
    config["metadata"] |= {"l0": 31.7}
    sparsifier = formats.read(write(tmp_path / "sae", config, weights)).sae.config.sparsifier
    assert sparsifier == JumpReLUConfig(k=32)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("standard", {"normalize_activations": "layer_norm"}, "must be 'none' or 'expected_average_only_in'"),
    ("standard", {"normalize_activations": "constant_norm_rescale"}, "must be 'none' or 'expected_average_only_in'"),
    ("standard", {"normalize_activations": "covariance_whitening"}, "the whitening is not in the file"),
    ("standard", {"reshape_activations": "hook_q"}, "reshape_activations must be 'none' or 'hook_z'"),
    ("standard", {"architecture": "abstopk"}, "its latents may be negative"),
    ("standard", {"architecture": "matching_pursuit"}, "projecting out"),
    ("standard", {"architecture": "temporal"}, "through attention"),
    ("standard", {"architecture": "standrad"}, "Did you mean 'standard'"),
    ("standard", {"k": 3}, "k is not a key of a 'standard' SAE"),
    ("standard", {"activation_fn": "topk"}, "activation_fn is not a key"),
    ("standard", {"dtype": "float8"}, "dtype must be one of"),
    ("standard", {"d_in": D_IN + 1}, r"W_enc: expected \(13, 40\), found \(12, 40\)"),
    ("standard", {"d_in": "12"}, "d_in must be int"),
    ("standard", {"d_sae": 10**30}, "d_sae must be at most"),
    ("standard", {"d_sae": True}, "d_sae must be int"),
    ("standard", {"metadata": "gpt2"}, "metadata must be dict"),
    ("standard", {"metadata": {"sae_lens_version": "six"}}, "sae_lens_version must be a version"),
    ("topk", {"k": D_SAE + 1}, "k must be at most d_sae"),
    ("topk", {"k": 7.5}, "k must be int"),
    ("transcoder", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be false"),
    ("jumprelu_transcoder", {"d_out": 768}, "expected"),
]


@pytest.mark.parametrize(("case", "changes", "message"), REFUSED)
def test_what_cannot_be_read_exactly_is_refused(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config, weights = make(case)
    with pytest.raises(UserError, match=message):
        formats.read(write(tmp_path / "sae", config | changes, weights))


@pytest.mark.parametrize("activation", ["tanh-relu", ["relu"], {"k": 2}])
def test_an_activation_of_old_versions_that_version_6_replaces_is_refused(activation: object, tmp_path: Path) -> None:
    _, weights = make("standard")
    old = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "activation_fn_str": activation}
    with pytest.raises(UserError, match="activation_fn must be 'relu' or 'topk'"):
        formats.read(write(tmp_path / "sae", old, weights))


def test_a_row_of_0_cannot_be_rescaled(tmp_path: Path) -> None:
    config, weights = make("topk, rescaled")
    weights["W_dec"][3] = 0
    with pytest.raises(UserError, match=r"row 3 is, or is not a number"):
        formats.read(write(tmp_path / "sae", config, weights))


@pytest.mark.parametrize("architecture", saelens_layout.SPARSIFIERS)
@pytest.mark.parametrize("gate", ["mand", "power_mean"])
def test_our_architectures_are_read(architecture: str, gate: Any, tmp_path: Path) -> None:
    transcoder = architecture in saelens_layout.TRANSCODERS
    roles: dict[str, Any] = {"d_out": 10, "skip": True} if transcoder else {}
    sizes: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "d_base": 2, "d_extension": 4, "gate": gate, "k": 6}
    sae = saelens_layout.kron_config(architecture, **sizes, **roles).build(seed=1)
    for name, weight in sae.state_dict().items():
        weight.copy_(torch.randn(weight.shape) - (2 if "threshold" in name else 0))
    config = {**sizes, **roles, "architecture": architecture, "metadata": METADATA, "dtype": "float32"}
    folder = write(tmp_path / "sae", config, saelens_layout.to_disk(sae.state_dict()))
    found, x = formats.read(folder).sae, torch.randn(32, D_IN)
    assert found.config == sae.trained().config
    assert torch.equal(found(x), sae(x))
    with pytest.raises(UserError, match="apply_b_dec_to_input must be false"):
        formats.read(write(folder, config | {"apply_b_dec_to_input": True}, saelens_layout.to_disk(sae.state_dict())))
    with pytest.raises(UserError, match="d_sae must be a multiple of d_base"):
        formats.read(write(folder, config | {"d_base": 3}, saelens_layout.to_disk(sae.state_dict())))


def test_sizes_of_our_architectures_whose_product_no_tensor_has(tmp_path: Path) -> None:
    config = {"architecture": "kronsae_topk", "d_in": 10**9, "d_sae": 8 * 10**9, "k": 3, "metadata": METADATA}
    with pytest.raises(UserError, match="the sizes of an SAE must fit into memory"):
        formats.read(write(tmp_path / "sae", config, {"W_dec": torch.zeros(2, 2)}))


def test_a_folder_of_ours_is_not_taken_for_one_of_sae_lens(tmp_path: Path) -> None:
    _, weights = make("standard")
    assert not sae_lens.recognizes(write(tmp_path / "a", {"format": 1, "sae": {"d_in": 3}}, weights))
    assert not sae_lens.recognizes(write(tmp_path / "b", [], weights))
    (tmp_path / "b" / "cfg.json").write_text("{", encoding="utf-8")
    assert not sae_lens.recognizes(tmp_path / "b")


ODD: list[object] = [None, True, -1, 0, 10**40, 1e300, "", "x" * 1000, [], [1], {}, {"a": {}}, "float32", "\ud800"]


@pytest.mark.parametrize("folders", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_folders_load_or_give_a_clear_error(folders: int, tmp_path: Path) -> None:
    """Odd values, missing and surplus keys and tensors, wrong shapes and types, damaged bytes."""
    generator, loaded, longest = random.Random(0), 0, 0
    for number in range(folders):
        config, weights = make(generator.choice(list(SETTINGS)), seed=number)
        folder = tmp_path / "sae"
        for _ in range(generator.choice([1, 1, 2])):
            _mutate(generator, config, weights)
        save_file(weights, write(folder, config, {}) / "sae_weights.safetensors")
        if generator.random() < 0.4:
            _damage(generator, folder / generator.choice(["cfg.json", "sae_weights.safetensors"]))
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("warnings.warn", lambda *_, **__: None)
                formats.read(folder)
            loaded += 1
        except UserError as error:
            longest = max(longest, len(str(error)))
    assert 0.05 < loaded / folders < 0.8
    assert longest < 3000


def _mutate(generator: random.Random, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    key, name = generator.choice(list(config)), generator.choice(list(weights))
    kind = generator.randrange(7)
    if kind == 0:
        config[key] = generator.choice(ODD)
    elif kind == 1:
        del config[key]
    elif kind == 2:
        config[generator.choice(["activation_fn", "d_out", "k", "skip", "unknown"])] = generator.choice(ODD)
    elif kind == 3 and isinstance(config.get("metadata"), dict):
        config["metadata"][generator.choice(["sae_lens_version", "hook_name", "l0", "x"])] = generator.choice(ODD)
    elif kind == 4:
        weights[name] = weights[name].to(generator.choice([torch.int32, torch.bool, torch.float16, torch.float64]))
    elif kind == 5:
        weights[name] = torch.randn(generator.choice([(), (0,), (3,), (D_SAE, 2), (1, 1, 1)]))
    else:
        weights[generator.choice(["b_enc", "extra", "threshold"])] = torch.full((D_SAE,), float("nan"))


def _damage(generator: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    kind = generator.randrange(4)
    if kind == 0:
        content = content[: generator.randrange(len(content))]
    elif kind == 1:
        for _ in range(generator.choice([1, 5, 50])):
            content[generator.randrange(min(len(content), 600))] = generator.randrange(256)
    elif kind == 2:
        content = bytearray(b"[" * 100_000 if path.suffix == ".json" else b"\xff" * 64)
    else:
        content += b"\x00" * 100
    path.write_bytes(content)


def test_a_config_of_many_bytes_is_not_read(tmp_path: Path) -> None:
    config, weights = make("standard")
    folder = write(tmp_path / "sae", config, weights)
    (folder / "cfg.json").write_text(json.dumps(config) + " " * 2**24, encoding="utf-8")
    with pytest.raises(UserError, match="must have at most"):
        sae_lens.read(folder)
