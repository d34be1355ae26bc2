"""``kronsae saebench`` up to SAEBench, for which a stand-in answers; tests/interop_real/saebench runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.command_line import Outcome
from tests.interop.foreign_saes import sparsify

from kronsae.core import checkpoint
from kronsae.interop.saebench_job import JOB_FILE, OUTCOME_FILE
from kronsae.runs import saebench
from kronsae.runs.run import Run
from kronsae.support.environment import Environment

Kronsae = Callable[..., Outcome]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The jobs that SAEBench's stand-in was given; it measures everything at 0.25, and cannot do absorption."""
    given: list[dict[str, Any]] = []

    def run_module(_self: Environment, module: str, folder: str, *, offline: bool) -> int:
        assert module == "kronsae.interop.saebench_runner"
        job = json.loads((Path(folder) / JOB_FILE).read_text())
        given.append(job | {"offline": offline})
        rows = []
        for name in job["evals"]:
            for sae in job["saes"]:
                assert checkpoint.load(sae["folder"]).d_sae == 32
                row: dict[str, Any] = {"sae": sae["name"], "eval": name, "file": None, "metrics": {}, "reason": None}
                found = {"file": f"{name}.json", "metrics": {"score": 0.25}}
                rows.append(row | ({"reason": "It cannot spell."} if name == "absorption" else found))
        (Path(folder) / OUTCOME_FILE).write_text(json.dumps(rows))
        return 0

    monkeypatch.setattr(Environment, "ready", property(lambda _self: True))
    monkeypatch.setattr(Environment, "run_module", run_module)
    return given


def test_all_saes_of_a_run_are_given_with_what_is_known_of_them(
    finished_run: Run, tmp_path: Path, kronsae: Kronsae, jobs: list[dict[str, Any]]
) -> None:
    done = kronsae("saebench", finished_run.folder, "--evals", "absorption,meta_structure", "--out", tmp_path / "o",
                   "--set", "meta_structure.k=2", "--words", 300, "--json")  # fmt: skip
    assert done.status == 0, done.err
    results = json.loads(done.out)["results"]
    assert [(row["sae"], row["eval"]) for row in results] == [
        ("topk", "absorption"),
        ("kron", "absorption"),
        ("topk", "meta_structure"),
        ("kron", "meta_structure"),
    ]
    assert "kron, absorption: no result. It cannot spell." in done.err
    assert "What now?" in done.err
    (job,) = jobs
    assert [sae["hook"] for sae in job["saes"]] == ["blocks.2.hook_resid_post"] * 2
    assert [sae["training_tokens"] for sae in job["saes"]] == [1280] * 2
    assert job["location"] == finished_run.config.model.name
    assert job["model"] == Path(finished_run.config.model.name).name
    assert job["words"] == 300
    assert job["context_length"] == 32
    assert job["offline"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == []  # the stand-in writes no results


def test_a_single_sae_needs_model_and_hook_unless_its_files_state_them(
    finished_run: Run, tmp_path: Path, kronsae: Kronsae, jobs: list[dict[str, Any]]
) -> None:
    folder, model = finished_run.sae_folder("kron"), finished_run.config.model.name
    words = ("--evals", "meta_structure", "--out", tmp_path / "o")
    sparsify(tmp_path / "theirs")
    for given, missing in (((), "--model and --hook"), (("--model", model), "--hook")):
        assert kronsae("saebench", tmp_path / "theirs", *words, *given).sentence == (
            f"{missing} must be given for a single SAE whose files do not state it; got {tmp_path / 'theirs'}."
        )
    for place in ((), ("--model", model, "--hook", "layers.2")):
        done = kronsae("saebench", folder, *words, *place)
        assert done.status == 0, done.err
        assert "0.25" in done.out
    assert [job["saes"][0]["name"] for job in jobs] == ["kron"] * 2
    assert [job["saes"][0]["hook"] for job in jobs] == ["blocks.2.hook_resid_post"] * 2
    assert [job["location"] for job in jobs] == [model] * 2


def test_without_any_result_it_fails(
    finished_run: Run, tmp_path: Path, kronsae: Kronsae, jobs: list[dict[str, Any]]
) -> None:
    done = kronsae("saebench", finished_run.folder, "--evals", "absorption", "--sae", "kron", "--out", tmp_path)
    assert done.status == 2
    assert "SAEBench gave no result; It cannot spell." in done.err


def test_a_crash_of_saebench_is_one_sentence(
    finished_run: Run, tmp_path: Path, kronsae: Kronsae, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Environment, "ready", property(lambda _self: True))
    monkeypatch.setattr(Environment, "run_module", lambda *_args, **_options: 1)
    done = kronsae("saebench", finished_run.folder, "--out", tmp_path)
    assert done.status == 2
    assert "SAEBench failed; its own error is above. Results that were complete are in" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("own_cache")
def test_without_an_environment_it_says_how_to_build_one(
    finished_run: Run, tmp_path: Path, kronsae: Kronsae, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = kronsae("saebench", finished_run.folder, "--out", tmp_path / "o")
    assert done.status == 2
    assert "SAEBench must have an environment of its own" in done.err
    assert "Add --prepare to build it in" in done.err
    monkeypatch.setattr(saebench, "PYTHONS", ())
    done = kronsae("saebench", "--prepare")
    assert done.status == 2
    assert "SAEBench must run on Python 3.11 or 3.12" in done.err


@pytest.mark.usefixtures("own_cache")
def test_what_is_wrong_is_said_before_anything_is_built(finished_run: Run, tmp_path: Path, kronsae: Kronsae) -> None:
    for words, message in [
        (("--evals", ","), "evals must name at least one of absorption, "),
        (("--evals", "absorbtion"), "Did you mean 'absorption'"),
        (("--evals", "autointrp"), "got 'autointrp'. Did you mean 'autointerp'?"),
        (("--evals", "core"), "SAEBench's core is not offered: it runs code that comes with its data set"),
        (("--sae", "krn"), "name must be one of the SAEs"),
        (("--hook", "layers.2.mlp"), "hook must be the output of a transformer block"),
        (("--model", "./nowhere"), "there is no folder './nowhere'"),
        (("--set", "absorption.k"), "settings must be EVAL.FIELD=VALUE"),
        (("--device", "tpu7"), "device must be one that this machine"),
    ]:
        done = kronsae("saebench", finished_run.folder, "--prepare", "--out", tmp_path / "o", *words)
        assert done.status == 2, words
        assert message in done.err, words
    assert not (tmp_path / "o").exists()
    assert "SAE_OR_RUN must be given" in kronsae("saebench").err
    start = "SAE_OR_RUN must be a run folder, an SAE folder or a Hub name (user/repo); there is no "
    assert kronsae("saebench", "absorbtion").sentence == (
        f"{start}absorbtion. Did you mean 'absorption'? Evaluations are given by --evals."
    )
    assert kronsae("saebench", "./runs/x").sentence == f"{start}./runs/x. Check the path."
