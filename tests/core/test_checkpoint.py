from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.saved_saes import replace_weights

from kronsae.core import checkpoint
from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.gates import GateName
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError
from kronsae.support.files import sha256
from kronsae.support.sealed import write_sealed


def build(gate: GateName = "mand", num_heads: int = 3, seed: int = 0) -> SAE:
    encoder = KroneckerEncoderConfig(num_heads=num_heads, d_base=2, d_extension=4, gate=gate)
    return SAEConfig(d_in=6, encoder=encoder, sparsifier=TopKConfig(k=2)).build(seed)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(build(), tmp_path / "sae", {"hook": "layers.3"})


def edit(saved: Path, **changes: Any) -> None:
    path = saved / "cfg.json"
    write_sealed(path, json.loads(path.read_text()) | changes)


def refusal(folder: Path) -> str:
    """Return the error message of `load`, with the folder's path replaced by ``SAE``."""
    with pytest.raises(UserError) as error:
        checkpoint.load(folder)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return str(error.value).replace(str(folder), "SAE")


def test_a_saved_sae_is_two_files(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    config = json.loads((saved / "cfg.json").read_text())
    assert list(config) == ["format", "kronsae_version", "architecture", "weights_sha256", "sae", "metadata", "sha256"]
    assert config["weights_sha256"] == hashlib.sha256((saved / "sae_weights.safetensors").read_bytes()).hexdigest()
    assert config["metadata"] == {"hook": "layers.3"}
    assert config["architecture"] == "kronecker-topk"
    assert config["sae"] == {
        "d_in": 6,
        "encoder": {
            "kind": "kronecker",
            "num_heads": 3,
            "d_base": 2,
            "d_extension": 4,
            "d_sae": 24,
            "gate": "mand",
            "init_norm": None,
            "null_symbols": False,
        },
        "sparsifier": {"kind": "topk", "k": 2},
        "read_widths": [],
        "write_widths": [],
        "skip": False,
        "pursuit": None,
    }
    del config["sha256"]
    assert checkpoint.read_config(saved) == config
    with safe_open(saved / "sae_weights.safetensors", "pt") as weights:
        assert weights.get_slice("decoder.W_dec").get_shape() == [24, 6]


def test_a_loaded_sae_trains_on_without_touching_the_file(saved: Path) -> None:
    before = (saved / "sae_weights.safetensors").read_bytes()
    sae = checkpoint.load(str(saved))
    sae(torch.randn(5, 6)).sum().backward()
    with torch.no_grad():
        for parameter in sae.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    assert not torch.equal(sae.W_dec, build().W_dec)
    assert (saved / "sae_weights.safetensors").read_bytes() == before


def test_saving_does_not_change_the_sae(saved: Path) -> None:
    sae = build()
    weight = sae.encoder.weight
    checkpoint.save(sae, saved)
    assert sae.encoder.weight is weight
    assert weight.requires_grad


def test_saving_over_another_sae_replaces_it(saved: Path) -> None:
    checkpoint.save(build(num_heads=5), saved)
    assert checkpoint.load(saved).config == build(num_heads=5).config
    assert json.loads((saved / "cfg.json").read_text())["metadata"] == {}


def test_missing_files_are_named(saved: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "no") == "the saved SAE: SAE/cfg.json does not exist."
    (saved / "sae_weights.safetensors").unlink()
    assert refusal(saved) == "the saved SAE: SAE/sae_weights.safetensors does not exist."


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_damaged_weights(saved: Path, kept: int) -> None:
    path = saved / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(saved)
    assert message.startswith("the saved SAE: SAE/sae_weights.safetensors is damaged: its SHA-256 is ")
    assert message.endswith("Save or download it again.")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_damaged_weights_whose_checksum_fits(saved: Path, kept: int) -> None:
    path = saved / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    edit(saved, weights_sha256=sha256(path))
    message = refusal(saved)
    assert message.startswith("the saved SAE: SAE/sae_weights.safetensors is damaged (")
    assert message.endswith("Save or download it again.")


def test_a_flipped_bit_is_noticed(saved: Path) -> None:
    path = saved / "sae_weights.safetensors"
    whole = path.read_bytes()
    for place in (3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert refusal(saved) == (
            f"the saved SAE: SAE/sae_weights.safetensors is damaged: its SHA-256 is {sha256(path)}, and cfg.json names "
            f"{hashlib.sha256(whole).hexdigest()}. Save or download it again."
        )


def test_a_folder_without_a_checksum_loads_with_a_note(saved: Path) -> None:
    path = saved / "cfg.json"
    config = json.loads(path.read_text())
    del config["weights_sha256"], config["sha256"]
    path.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"cfg\.json names no weights_sha256, so sae_weights\.safetensors cannot be"):
        loaded = checkpoint.load(saved)
    assert torch.equal(loaded.W_dec, build().W_dec)


def test_a_folder_in_place_of_the_weights(saved: Path) -> None:
    (saved / "sae_weights.safetensors").unlink()
    (saved / "sae_weights.safetensors").mkdir()
    assert refusal(saved) == "the saved SAE: SAE/sae_weights.safetensors must be a file; it is a folder."


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
def test_no_pickle_is_executed(saved: Path, file: str) -> None:
    (saved / file).write_bytes(pickle.dumps(Bomb()))
    refusal(saved)
    torch.save(Bomb(), saved / file)
    refusal(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "null", '{"format": 1}'])
def test_damaged_config(saved: Path, text: str) -> None:
    (saved / "cfg.json").write_text(text)
    message = refusal(saved)
    assert message.startswith(("the saved SAE: SAE/cfg.json cannot be read as JSON", "SAE/cfg.json is not a config"))


def test_weights_of_other_shapes_are_named(saved: Path) -> None:
    edit(saved, sae=to_dict(build(num_heads=4).config))
    assert refusal(saved) == (
        "SAE/sae_weights.safetensors does not fit cfg.json (decoder.W_dec: expected (32, 6), found (24, 6); "
        "encoder.bias: expected (4, 6), found (3, 6); encoder.weight: expected (4, 6, 6), found (3, 6, 6)). "
        "Save the SAE again."
    )


def test_missing_and_surplus_weights_are_named(saved: Path) -> None:
    path = saved / "sae_weights.safetensors"
    weights = load_file(path)
    weights["threshold"] = weights.pop("decoder.b_dec").clone()
    replace_weights(saved, weights)
    assert refusal(saved) == (
        "SAE/sae_weights.safetensors does not fit cfg.json (decoder.b_dec: expected (6,), found None; "
        "threshold: expected None, found (6,)). Save the SAE again."
    )


def test_weights_that_are_no_floating_point_numbers_are_refused(saved: Path) -> None:
    path = saved / "sae_weights.safetensors"
    replace_weights(saved, {name: tensor.long() for name, tensor in load_file(path).items()})
    assert "must all have one floating-point dtype" in refusal(saved)


def test_unknown_keys_are_refused(saved: Path) -> None:
    edit(saved, extra=1)
    assert refusal(saved) == "SAE/cfg.json has unknown keys extra; remove them."


def test_an_unknown_key_within_the_sae_names_the_nearest(saved: Path) -> None:
    config = to_dict(build().config)
    config["encoder"]["num_head"] = config["encoder"].pop("num_heads")
    edit(saved, sae=config)
    message = refusal(saved)
    assert message.startswith(
        "SAE/cfg.json: sae.encoder.num_head is not a known key of KroneckerEncoderConfig. Did you mean 'num_heads'?"
    )


def test_another_format_is_refused(saved: Path) -> None:
    edit(saved, format=2, kronsae_version="9.0")
    assert refusal(saved) == (
        "SAE/cfg.json has format 2; this version reads format 1. It was written by kronsae 9.0: install that version."
    )


def test_metadata_that_is_no_json_leaves_no_sae_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        checkpoint.save(build(), tmp_path / "sae", {"path": object()})
    with pytest.raises(UserError, match=r"cfg\.json does not exist"):
        checkpoint.load(tmp_path / "sae")


class Killed(BaseException):
    """Simulate that the process ends at this point."""


def kill(*_: Any, **__: Any) -> None:
    raise Killed


@pytest.mark.parametrize("point", ["save_file", "write_sealed"])
def test_killed_while_saving_for_the_first_time_leaves_no_sae(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, point, kill)
    with pytest.raises(Killed):
        checkpoint.save(build(), tmp_path / "sae")
    assert refusal(tmp_path / "sae") == "the saved SAE: SAE/cfg.json does not exist."


@pytest.mark.parametrize("point", ["save_file", "write_sealed"])
def test_killed_while_saving_over_another_leaves_the_old_or_none_but_no_mixture(
    saved: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal shapes and another gate, new weights with the old config would load without an error."""
    monkeypatch.setattr(checkpoint, point, kill)
    with pytest.raises(Killed):
        checkpoint.save(build(gate="mand_eps", seed=1), saved)
    if point == "save_file":
        old = checkpoint.load(saved)
        assert old.config == build().config
        assert torch.equal(old.W_dec, build().W_dec)
    else:
        assert refusal(saved) == "the saved SAE: SAE/cfg.json does not exist."


def test_a_dense_sae_is_no_kronecker_one(tmp_path: Path) -> None:
    sae = SAEConfig(d_in=6, encoder=DenseEncoderConfig(d_sae=24), sparsifier=TopKConfig(k=2)).build()
    folder = checkpoint.save(sae, tmp_path)
    edit(folder, sae=to_dict(build().config))
    assert "does not fit cfg.json" in refusal(folder)
