"""``kronsae eval toy``: tiny trainings, deterministic results, with and without a run."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kronsae.cli.main import app
from kronsae.data.toy import BlockSetup
from kronsae.eval.known_covariance import effective_rank, recovery
from kronsae.measures import toy
from kronsae.measures.toy import ToyConfig, measure, train_cell
from kronsae.runs.run import Run
from kronsae.support.errors import UserError

TINY = ToyConfig(
    setups=(BlockSetup(name="even", blocks=(8, 8), within=0.9), BlockSetup(name="odd", blocks=(5, 11), within=0.9)),
    independent=BlockSetup(name="independent", blocks=(16,), within=0.0),
    shapes=((2, 2, 4),),
    hidden=6,
    active=3,
    k=2,
    seeds=2,
    tokens=400,
    held_out_tokens=100,
    autoencoder_steps=20,
    steps=10,
    batch=32,
)


@pytest.fixture(scope="module")
def tiny_result() -> dict[str, Any]:
    return measure(TINY)


def test_the_same_seed_gives_the_same_digits(tiny_result: dict[str, Any]) -> None:
    assert json.dumps(measure(TINY), allow_nan=False) == json.dumps(tiny_result)
    assert measure(replace(TINY, seeds=1, seed=1))["rows"][1]["trained"] != tiny_result["rows"][1]["trained"]


def test_every_dictionary_in_every_setup_with_every_seed(tiny_result: dict[str, Any]) -> None:
    found = [(row["seed"], row["setup"], row["dictionary"]) for row in tiny_result["rows"]]
    names = ["autoencoder", "topk", "kron-h2-m2-n4"]
    assert found == [
        (seed, setup, name) for seed in (0, 1) for setup in ("even", "odd", "independent") for name in names
    ]
    assert [row["mismatched"] is None for row in tiny_result["rows"]] == [row[1] == "independent" for row in found]
    assert [setup["effective_rank"] for setup in tiny_result["setups"]] == [
        effective_rank(setup.covariance()) for setup in (*TINY.setups, TINY.independent)
    ]


def test_the_controls_are_what_they_say(tiny_result: dict[str, Any]) -> None:
    even, odd = (train_cell(TINY, setup, 0) for setup in TINY.setups)
    name = "kron-h2-m2-n4"
    [row] = [r for r in tiny_result["rows"] if (r["setup"], r["seed"], r["dictionary"]) == ("even", 0, name)]
    start = TINY.members(0)[1].shape(TINY.hidden).build(0).W_dec
    assert row["trained"] == asdict(recovery(even.trained[name], even.reference_GD, even.truth_GG))
    assert row["untrained"] == asdict(recovery(start, even.reference_GD, even.truth_GG))
    assert row["mismatched"] == asdict(recovery(even.trained[name], odd.reference_GD, odd.truth_GG))
    assert row["trained"] != row["untrained"]


def test_progress_reaches_its_end() -> None:
    calls: list[tuple[int, int]] = []
    measure(replace(TINY, seeds=1, steps=2, autoencoder_steps=2), progress=lambda *at: calls.append(at))
    assert calls == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be a whole number above 0"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"setups": TINY.setups[:1]}, "setups must hold at least two"),
        ({"shapes": ((2, 2, 3),)}, "all setups and shapes must have the same number of features; got 12, 16"),
        ({"lr": 0.0}, "lr must be above 0"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(TINY, **changes)


def test_the_command_needs_no_run(tiny_result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "measure", lambda config, progress: tiny_result)
    outcome = CliRunner().invoke(app, ["eval", "toy", "--json", "--quiet"], catch_exceptions=False)
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout)["rows"] == tiny_result["rows"]
    assert json.loads(outcome.stdout)["verdict"]
    assert "27 autoencoders and 135 SAEs of 256 latents" in outcome.stderr
    outcome = CliRunner().invoke(app, ["eval", "toy", "--quiet"], catch_exceptions=False)
    assert "kron-h2-m2-n4" in outcome.stdout
    assert "Does the Kronecker structure alone explain the recovery?" in outcome.stderr


def test_a_run_keeps_the_result(
    finished_run: Run, tiny_result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_bytes((finished_run.folder / "run.json").read_bytes())
    calls: list[ToyConfig] = []

    def counted(config: ToyConfig, progress: object) -> dict[str, Any]:
        calls.append(config)
        return tiny_result

    monkeypatch.setattr(toy, "measure", counted)
    for options in ([], [], ["--seed", "1"]):
        outcome = CliRunner().invoke(app, ["eval", "toy", str(folder), "--quiet", *options], catch_exceptions=False)
        assert outcome.exit_code == 0
    assert [config.seed for config in calls] == [0, 1]
    assert json.loads((folder / "measures" / "toy.json").read_text("utf-8"))["result"] == tiny_result
