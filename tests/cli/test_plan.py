"""``kronsae plan``: from a recipe, a file or options; JSON; short errors; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.command_line import KRON, Kronsae

from kronsae.runs.recipes import tiny
from kronsae.support.config import to_dict


def test_a_recipe(kronsae: Kronsae) -> None:
    shown = kronsae("plan", "--recipe", "paper-gemma-2-2b", "--gpus", "8", "--gpu", "a100", "--price-per-hour", "2")
    assert shown.status == 0, shown.err
    assert "Model: google/gemma-2-2b, width 2,304, 26 layers of which 13 run" in shown.out
    assert "Devices: 8 x a100" in shown.out
    assert "Parallelism: data parallel over 8." in shown.out
    assert " at 2 per device and hour." in shown.out
    assert "What now? kronsae train" in shown.err


def test_a_file_gives_what_its_recipe_gives(kronsae: Kronsae, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(to_dict(tiny())), "utf-8")
    recipe, file = (
        kronsae("plan", *options, "--json")
        for options in (("--recipe", "tiny"), ("--config", str(tmp_path / "run.json")))
    )
    assert recipe.status == file.status == 0
    assert json.loads(recipe.out) == json.loads(file.out)
    assert json.loads(recipe.out)["run"]["tokens"] == 131_072


def test_options_alone(kronsae: Kronsae) -> None:
    """The hook is the middle layer; given sizes make any model known."""
    known = kronsae("plan", "--model", "llama-3.1-8b", "--sae", KRON, "--tokens", "1000000", "--json")
    assert json.loads(known.out)["run"]["hook"] == "layers.16"
    sizes = ("--d-in", "4096", "--layers", "32", "--parameters", "8030261248", "--vocabulary", "128256")
    given = kronsae("plan", *sizes, "--sae", KRON, "--tokens", "1000000", "--json")
    figures = json.loads(given.out)
    assert (figures["model"]["name"], figures["model"]["source"]) == ("given", "given")
    for place in ("memory_per_device", "disk"):
        assert figures[place] == json.loads(known.out)[place]


def test_a_device_of_ones_own(kronsae: Kronsae) -> None:
    rates = ("--device-memory", "2e11", "--flops", "1e14", "--bandwidth", "1e12", "--link-bandwidth", "1e11")
    shown = kronsae("plan", "--recipe", "paper-pythia-1.4b", *rates, "--efficiency", "1", "--json")
    figures = json.loads(shown.out)
    assert figures["device"]["name"] == "given"
    assert figures["efficiency"] == 1
    half = kronsae("plan", "--recipe", "paper-pythia-1.4b", *rates, "--efficiency", "0.5", "--json")
    assert json.loads(half.out)["hours"] == pytest.approx(2 * figures["hours"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "tiny", "--gpu", "h10"), "gpu must be one of "),
        (("--recipe", "tiny", "--gpus", "0"), "gpus must be a whole number above 0; got 0."),
        (("--recipe", "tiny", "--parameters", "1.5"), "parameters must be a whole number above 0; got 1.5."),
        (("--recipe", "tiny", "--parameters", "nan"), "parameters must be a whole number above 0; got nan."),
        (("--recipe", "tiny", "--config", "x.json"), "--recipe and --config must not be given together"),
        (("--recipe", "tiny", "--model", "org/unknown"), "model must be a known one, a folder with a config.json, or "),
        (("--model", "gpt2", "--tokens", "1000000"), "--sae must be given without --recipe or --config."),
        (("--sae", KRON, "--tokens", "1000000"), "--model, --hook must be given without --recipe or --config."),
        (
            ("--recipe", "paper-gemma-2-2b", "--gpus", "1", "--device-memory", "8e9"),
            "the training must fit into the memory of the devices; it needs about ",
        ),
    ],
)
def test_short_errors(kronsae: Kronsae, options: tuple[str, ...], message: str) -> None:
    shown = kronsae("plan", *options)
    assert shown.status == 2
    assert shown.err.startswith(f"Error: {message}")
    assert "Traceback" not in shown.err


def test_nothing_is_loaded(kronsae: Kronsae, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kronsae.data.model.load_model", "kronsae.data.model.fetch", "kronsae.data.hub.check_model"):
        monkeypatch.setattr(name, None)
    assert kronsae("plan", "--recipe", "quickstart-smollm2").status == 0
    assert kronsae("plan", "--recipe", "quickstart").status == 0
