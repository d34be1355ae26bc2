"""The subcommands of ``kronsae eval``, and how their results are stored."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from tests.command_line import Outcome
from tests.saved_saes import replace_weights
from typer.testing import CliRunner

from kronsae import report
from kronsae.cli.main import app
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.measurements import (
    MEASUREMENTS,
    keep_result,
    kept_results,
    known_result,
    module_name,
    section_module,
)
from kronsae.report.sections import sections
from kronsae.report.tables import rich_table
from kronsae.runs.architectures import jumprelu
from kronsae.runs.config import RunConfig
from kronsae.runs.evaluation import write_report
from kronsae.runs.loaded import LoadedRun, describe_tokens
from kronsae.runs.run import Run, execute
from kronsae.support.errors import UserError


def test_the_group_lists_the_table_and_every_verb() -> None:
    outcome = CliRunner().invoke(app, ["eval", "--help"])
    assert outcome.exit_code == 0
    for verb in ("table", *MEASUREMENTS):
        assert f" {verb} " in outcome.output


@pytest.mark.parametrize("verb", MEASUREMENTS)
def test_every_verb_is_a_command_with_json(verb: str) -> None:
    module = import_module(f"kronsae.measures.{verb.replace('-', '_')}")
    assert isinstance(module.app, typer.Typer)
    outcome = CliRunner().invoke(app, ["eval", verb, "--help"])
    assert outcome.exit_code == 0
    assert "--json" in outcome.output
    assert "completion" not in outcome.output


@pytest.mark.parametrize(
    ("counted", "wanted", "expected"),
    [
        (1100, 1000, "1,100 held-out tokens (whole windows)"),
        (1000, 1000, "1,000 held-out tokens"),
        (900, 1000, "900 held-out tokens (1,000 requested; the text has no more)"),
    ],
)
def test_description_of_tokens(counted: int, wanted: int, expected: str) -> None:
    assert describe_tokens(counted, wanted) == expected


@pytest.mark.parametrize("verb", ["latents", "interaction"])
@pytest.mark.parametrize("wanted", [70, 10**6])
def test_described_tokens_are_those_of_the_result(run: Run, verb: str, wanted: int) -> None:
    outcome = CliRunner().invoke(app, ["eval", verb, str(run.folder), "--tokens", str(wanted), "--json"])
    assert outcome.exit_code == 0, outcome.output
    assert describe_tokens(json.loads(outcome.stdout)["tokens"], wanted) in outcome.stderr


@pytest.mark.parametrize("seed", [-1, 2**63])
@pytest.mark.parametrize("verb", [verb for verb in MEASUREMENTS if verb not in ("toy", "autointerp", "ladder")])
def test_a_seed_no_generator_takes_is_refused(kronsae: Callable[..., Outcome], run: Run, verb: str, seed: int) -> None:
    outcome = kronsae("eval", verb, run.folder, "--seed", seed)
    assert outcome.status == 2
    assert outcome.sentence == f"seed must be from 0 to 2**63 - 1; got {seed}."


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "1" * 5000])
def test_a_damaged_result_is_reported_with_a_remedy(run: Run, text: str) -> None:
    path = keep_result(run.folder, "latents", {"seed": 1}, {"value": 0.5})
    path.write_text(text, encoding="utf-8")
    for read in (lambda: known_result(run.folder, "latents", {"seed": 1}), lambda: kept_results(run.folder)):
        with pytest.raises(UserError, match=r"latents.json cannot be read as JSON .* Delete it, and measure again\."):
            read()


@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize("kept", [{"settings": {}, "result": {}}, [1], {"settings": None, "result": {"saes": 3}}])
def test_a_result_of_another_make_is_no_page(name: str, kept: Any) -> None:
    with pytest.raises(UserError, match=f"the stored result of '{name}' must have this version's format") as refused:
        sections({name: kept}, ["topk"])
    assert f"measure again: kronsae eval {name}." in str(refused.value)


def test_brackets_in_a_table_are_text() -> None:
    table = Table((("[bold]f1", "about"),), (TableRow("[red]a[/red]", (Cell("[1]"),)),))
    console = Console(width=80, file=io.StringIO())
    console.print(rich_table(table, "[b]"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(text in shown for text in ("[b]", "[bold]f1", "[red]a[/red]", "[1]"))


@pytest.mark.parametrize("verb", ["table", "latents", "interaction", "token-rule", "absorption", "probing", "ladder"])
def test_weights_that_are_no_numbers_are_no_result(
    kronsae: Callable[..., Outcome], finished_run: Run, tmp_path: Path, verb: str
) -> None:
    folder = Path(shutil.copytree(finished_run.folder, tmp_path / "run"))
    for name in ("evaluation.json", "measures"):  # what is known is not measured again
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
    [path] = (folder / "saes" / "kron").glob("*.safetensors")
    weights = load_file(path)
    weights["encoder.bias"][0, 0] = torch.nan
    replace_weights(path.parent, weights)
    labels = tmp_path / "labels.jsonl"
    rows = [{"text": f"the {word} {i}", "label": word} for i in range(100) for word in ("fox", "dog")]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--labels", labels] if verb in ("absorption", "probing") else []
    outcome = kronsae("eval", verb, folder, *options)
    assert outcome.status == 2
    assert outcome.sentence.startswith("weights must be finite; encoder.bias of 'kron' holds NaN or infinity")


def test_a_threshold_of_zero_is_a_sound_weight(config: RunConfig, tmp_path: Path) -> None:
    """A BatchTopK or JumpReLU SAE that never had an active latent has threshold 0, whose logarithm is -infinity."""
    run = execute(replace(config, saes=(jumprelu(d_sae=32, k=4),)), tmp_path / "run", show_progress=False)
    [path] = (run.folder / "saes" / "jumprelu").glob("*.safetensors")
    weights = load_file(path)
    [name] = [name for name in weights if "threshold" in name]
    replace_weights(path.parent, weights | {name: torch.full_like(weights[name], -torch.inf)})
    assert list(LoadedRun(run).saes) == ["jumprelu"]
    replace_weights(path.parent, weights | {name: torch.full_like(weights[name], torch.inf)})
    with pytest.raises(UserError, match="threshold of 'jumprelu' holds NaN or infinity"):
        LoadedRun(run).saes  # noqa: B018


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_has_a_verb_and_a_section_with_a_revision(name: str) -> None:
    verb = import_module(f"kronsae.measures.{module_name(name)}")
    assert name == verb.NAME
    assert len(verb.app.registered_commands) == 1
    assert section_module(name).REVISION >= 1
    assert callable(section_module(name).section)


def test_no_measurement_is_left_out_of_the_registry() -> None:
    sections_there = {path.stem for path in Path(report.sections.__file__).parent.glob("*.py")} - {"__init__"}
    assert sections_there == set(map(module_name, MEASUREMENTS))


def test_a_misspelt_verb_is_not_read_as_a_folder() -> None:
    with pytest.raises(
        UserError, match=r"^the measurement must be one of table, .*; got 'tabel'\. Did you mean 'table'"
    ):
        CliRunner().invoke(app, ["eval", "tabel", "runs/x"], catch_exceptions=False, standalone_mode=False)


def test_a_result_of_another_revision_is_measured_anew_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    keep_result(run.folder, "toy", {"seed": 1}, {"value": 0.5})
    assert kept_results(run.folder)[1] == ()
    monkeypatch.setattr(section_module("toy"), "REVISION", 999)
    assert known_result(run.folder, "toy", {"seed": 1}) is None
    assert kept_results(run.folder) == ({}, ("toy",))
    keep_result(run.folder, "toy", {"seed": 1}, {"value": 0.6})
    assert known_result(run.folder, "toy", {"seed": 1}) == {"value": 0.6}
    assert kept_results(run.folder)[1] == ()


def test_the_report_says_what_it_leaves_out(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_result(finished_run.folder, "toy", {}, {"nothing": "that a section could be made of"})
    monkeypatch.setattr(section_module("toy"), "REVISION", 999)
    lines: list[str] = []
    page = write_report(finished_run, say=lines.append).read_text("utf-8")
    assert [line for line in lines if "toy" in line] == [
        "The report leaves out toy, because another version measured it. Measure it again: kronsae eval toy "
        f"{finished_run.folder}"
    ]
    assert 'id="measure-toy"' not in page


def test_a_result_is_known_by_its_settings(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert known_result(run.folder, "toy", {"seed": 1}) is None
    keep_result(run.folder, "toy", {"seed": 1}, {"value": 0.5})
    assert known_result(run.folder, "toy", {"seed": 1}) == {"value": 0.5}
    assert known_result(run.folder, "toy", {"seed": 2}) is None
    [kept] = kept_results(run.folder)[0].values()
    assert kept["measure"] == "toy"
    assert kept["result"] == {"value": 0.5}
    assert kept["provenance"]["python"]
