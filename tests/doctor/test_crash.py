"""A small campaign of kills and damages, and checks that it notices what it must."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.command_line import Outcome
from tests.stored_activations import store

from kronsae.core import checkpoint
from kronsae.doctor import campaign as campaigns
from kronsae.doctor.campaign import campaign
from kronsae.doctor.damage import HOW, Victim, damage
from kronsae.doctor.kills import Bench, Kills, contents, kill, largest_difference
from kronsae.doctor.processes import run, victims_of
from kronsae.doctor.work import KINDS, Kind
from kronsae.runs.run import Run
from kronsae.support.errors import UserError

Kronsae = Callable[..., Outcome]


def test_a_small_campaign(tmp_path: Path) -> None:
    """One run is killed, resumed and compared, and every kind of file of a single process is damaged."""
    seen: list[tuple[int, int]] = []
    found = campaign(
        kills=1, damages=14, kinds=("live",), folder=tmp_path / "c", progress=lambda *done: seen.append(done)
    )
    (killed,) = found["kills"]
    assert (killed["kind"], killed["kills"], killed["identical"]) == ("live", 1, killed["runs"])
    assert found["failures"] == []
    assert [(one["about"], one["how"]) for one in found["damages"]] == [(about, how) for how in HOW for about in ABOUT]
    assert sum(one["detected"] for one in found["damages"]) == 28
    assert seen[-1] == (29, 29)
    assert {"commit", "versions", "processor"} <= found["provenance"].keys()


ABOUT = (
    "shard",
    "manifest of a harvest",
    "progress of a harvest",
    "checkpoint",
    "config, metrics and summary of a run",
    "saved SAE",
)


@pytest.mark.slow  # every kind, two processes
def test_a_campaign_of_every_kind(kronsae: Kronsae, tmp_path: Path) -> None:
    results = tmp_path / "crash.json"
    outcome = kronsae("doctor", "crash", "--kills", 10, "--damages", 70, "--quiet", "--json", "--results", results)
    assert outcome.status == 0, outcome.err
    found = json.loads(outcome.out)
    assert found == json.loads(results.read_text())
    assert [one["kills"] for one in found["kills"]] == [2] * len(KINDS)
    assert sum(one["detected"] for one in found["damages"]) == 140


def test_a_failure_ends_with_status_1(kronsae: Kronsae, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = {"about": "training", "kills": 1, "runs": 1, "identical": 0, "largest_difference": 0.5, "tolerance": 0.0}
    found = {"kills": [killed], "damages": [], "failures": ["run 1 of 'live' differs by 0.5 from the whole one."]}
    monkeypatch.setattr("kronsae.cli.doctor.campaign", lambda **_: found)
    outcome = kronsae("doctor", "crash", "--quiet")
    assert outcome.status == 1
    assert outcome.out.splitlines() == [
        "training: 1 kills in 1 run(s), 0 with the bits of the uninterrupted one, largest difference 0.5 (allowed 0)",
        "run 1 of 'live' differs by 0.5 from the whole one.",
    ]
    assert outcome.err.strip() == "1 failure(s); please report them with this output."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kills": 0}, r"^kills must be a whole number above 0; got 0\.$"),
        ({"damages": -1}, r"^damages must be a whole number above 0; got -1\.$"),
        ({"kinds": ("lief",)}, r"^kinds must be among live, cached, .*; got 'lief'\. Did you mean 'live'\?$"),
        ({"kinds": ()}, r"^kinds must name at least one of live, .*; got none\.$"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        campaign(**options)


def test_a_system_without_forks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(UserError, match=r"^a campaign needs a system that forks processes, such as Linux; this is "):
        campaign()


def sleep(text: Path, activations: Path, out: Path) -> None:
    time.sleep(20)


def fail(text: Path, activations: Path, out: Path) -> None:
    raise UserError("the lights must be on; they are off.")


def leave(text: Path, activations: Path, out: Path) -> None:
    """Leave a file with another number than the uninterrupted work left."""
    out.mkdir(exist_ok=True)
    (out / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.25}) + "\n")


class TestProcesses:
    def test_one_is_killed_and_one_ends(self, tmp_path: Path) -> None:
        killed = run(sleep, tmp_path, tmp_path, tmp_path, log=tmp_path / "log", kill_after=0.0, victims=(0,))
        assert (killed.killed, killed.hung, killed.statuses, killed.finished) == (True, False, (-9,), False)
        failed = run(fail, tmp_path, tmp_path, tmp_path, log=tmp_path / "log", kill_after=60.0, victims=(0,))
        assert (failed.killed, failed.statuses, failed.finished) == (False, (2,), False)
        assert failed.said == "the lights must be on; they are off.\n"

    def test_one_of_several_or_all_are_killed(self) -> None:
        draw = random.Random(0)
        assert {victims_of(2, draw) for _ in range(30)} == {(0, 1), (0,), (1,)}
        assert {victims_of(1, draw) for _ in range(30)} == {(0,)}

    @pytest.mark.parametrize(
        ("work", "failure"),
        [
            (fail, "run 1 of 'x' did not resume: exit status 2 (the lights must be on; they are off.)."),
            (leave, "run 1 of 'x' differs by 0.25 from the whole one."),
        ],
    )
    def test_what_does_not_resume_or_differs_is_a_failure(
        self, work: Any, failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(KINDS, "x", Kind("it", work))
        (tmp_path / "whole").mkdir()
        (tmp_path / "whole" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
        bench = Bench(tmp_path, tmp_path / "text", tmp_path / "activations")
        found = kill(bench, "x", tmp_path / "whole", 0.0, 1, random.Random(0), lambda done: None)
        assert isinstance(found, Kills)
        assert (found.kills, found.runs, found.identical) == (1, 1, 0)
        assert found.failures == [failure]


class TestComparison:
    def test_a_run_has_the_contents_of_its_copy(self, finished_run: Run, tmp_path: Path) -> None:
        shutil.copytree(finished_run.folder, tmp_path / "r")
        whole, copy = contents("live", finished_run.folder), contents("live", tmp_path / "r")
        assert {"saes/kron/decoder.W_dec", "metrics.jsonl/0/loss"} <= whole.keys()
        assert not any("seconds" in key for key in whole)
        assert largest_difference(whole, copy) == 0

    def test_every_difference_counts(self, finished_run: Run, tmp_path: Path) -> None:
        shutil.copytree(finished_run.folder, tmp_path / "r")
        path = tmp_path / "r" / "saes" / "kron" / "sae_weights.safetensors"
        tensors = load_file(path)
        tensors["decoder.W_dec"][3, 2] += 0.5
        save_file(tensors, path)
        whole = contents("live", finished_run.folder)
        assert largest_difference(whole, contents("live", tmp_path / "r")) == pytest.approx(0.5)
        for changed in (
            {key: value for key, value in whole.items() if not key.endswith("W_dec")},
            whole | {"metrics.jsonl/0/step": 4},
            whole | {"saes/kron/decoder.b_dec": torch.full_like(whole["saes/kron/decoder.b_dec"], float("nan"))},
            whole | {"saes/kron/decoder.b_dec": whole["saes/kron/decoder.b_dec"].double()},
        ):
            assert largest_difference(whole, changed) == float("inf")

    def test_a_harvest_is_compared_byte_by_byte(self, tmp_path: Path) -> None:
        store(tmp_path / "a")
        store(tmp_path / "b")
        assert largest_difference(contents("harvest", tmp_path / "a"), contents("harvest", tmp_path / "b")) == 0
        with (tmp_path / "b" / "activations-00001.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        assert largest_difference(contents("harvest", tmp_path / "a"), contents("harvest", tmp_path / "b")) == float(
            "inf"
        )


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (lambda folder: None, "it was not noticed"),
        (lambda folder: 1 / 0, "ZeroDivisionError instead of one sentence: division by zero"),
        (lambda folder: refuse("no"), "the message does not name the file: no"),
        (lambda folder: refuse("cfg.json\nno"), "the message has several lines: cfg.json\nno"),
    ],
)
def test_what_is_not_refused_in_one_sentence_is_a_failure(read: Any, problem: str, tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_bytes(b"whole")
    for how in HOW:
        (found,) = damage([Victim("it", tmp_path, ("cfg.json",), read)], how, 2, random.Random(0), lambda done: None)
        assert (found.damages, found.detected, len(found.failures)) == (2, 0, 2)
        assert all(one.endswith(f": {problem}") and f"cfg.json (it), {how} at" in one for one in found.failures)
    assert (tmp_path / "cfg.json").read_bytes() == b"whole"


def refuse(message: str) -> None:
    raise UserError(message)


def test_damages_of_a_saved_sae_are_detected(finished_run: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run.sae_folder("kron"), tmp_path / "kron")
    victim = Victim("SAE", tmp_path / "kron", ("cfg.json", "sae_weights.safetensors"), checkpoint.load)
    for how in HOW:
        (found,) = damage([victim], how, 60, random.Random(1), lambda done: None)
        assert (found.damages, found.detected, found.failures) == (60, 60, [])
    checkpoint.load(tmp_path / "kron")  # it is whole again


def test_kills_are_shared_by_the_kinds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shares: list[tuple[str, int]] = []

    def counted(bench: Bench, name: str, whole: Path, seconds: float, kills: int, *rest: Any) -> Kills:
        shares.append((name, kills))
        return Kills(name, kills=kills)

    monkeypatch.setattr(campaigns, "kill", counted)
    monkeypatch.setattr(campaigns, "reference", lambda bench, name: (tmp_path, 1.0))
    monkeypatch.setattr(campaigns, "_finished", lambda *_: None)
    monkeypatch.setattr(campaigns, "victims", lambda *_, **__: [])
    monkeypatch.setattr(campaigns, "damage", lambda *_: [])
    campaign(kills=7, damages=1, kinds=("live", "sweep", "harvest"))
    assert shares == [("live", 3), ("sweep", 2), ("harvest", 2)]
