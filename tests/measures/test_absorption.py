"""``kronsae eval absorption`` on a tiny run, with the user's own labelled text."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from kronsae.cli.main import app
from kronsae.data.corpus import Document
from kronsae.measures import tasks
from kronsae.measures.absorption import AbsorptionSettings, measure
from kronsae.measures.tasks import read_labelled
from kronsae.report.measurements import kept_results
from kronsae.report.sections import sections
from kronsae.runs.loaded import LoadedRun
from kronsae.runs.run import Run
from kronsae.support.errors import UserError

KINDS = {"fox": "animal", "dog": "animal", "jumps": "act", "writes": "act", "quick": "how", "lazy": "how"}


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two hundred short texts whose last word is an animal, a verb or an adverb."""
    words = list(KINDS)
    rows = []
    for i in range(240):
        word = words[i % 6]
        text = f"the {words[(i // 6) % 6]} and {i} {word}"
        rows.append({"text": text, "spans": [{"start": len(text) - len(word), "end": len(text), "label": KINDS[word]}]})
    path = tmp_path_factory.mktemp("labels") / "kinds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_verb_the_kept_result_and_the_section(finished_run: Run, labels: Path) -> None:
    command = ["eval", "absorption", str(finished_run.folder), "--labels", str(labels), "--json", "--quiet"]
    outcome = CliRunner().invoke(app, command, catch_exceptions=False)
    result = json.loads(outcome.stdout)
    assert list(result["saes"]) == finished_run.names
    assert result["classes"] == ["act", "animal", "how"]
    assert (result["needed"], result["left_out"]) == (3, [])
    assert all(f1 > 0.6 for f1 in result["probe_f1"].values())
    assert "What now?" in outcome.stderr
    for one in result["saes"].values():
        assert 0 <= one["mean_absorption_fraction"] <= 1
        assert one["mean_num_split_latents"] >= 1
    said: list[str] = []
    again = measure(finished_run, AbsorptionSettings(labels=labels), say=said.append)
    assert again == result
    assert said == ["Already measured with these settings."]
    kept = {"absorption": kept_results(finished_run.folder)[0]["absorption"]}
    [section] = sections(kept, finished_run.names)
    assert [row.name for row in section.tables[0][1].rows] == finished_run.names
    assert [row.name for row in section.tables[1][1].rows] == ["act", "animal", "how"]
    shown = CliRunner().invoke(app, [*command[:-2], "--quiet"], catch_exceptions=False)
    assert "absorption fraction" in shown.stdout


def test_progress_is_reported(finished_run: Run, labels: Path, tmp_path: Path) -> None:
    said: list[str] = []
    steps: list[tuple[int, int]] = []
    settings = AbsorptionSettings(labels=labels, max_k=5)
    measure(finished_run, settings, cache=tmp_path, say=said.append, progress=lambda *step: steps.append(step))
    assert "The probes train for 50 epochs on 120 examples" in said[0]
    assert "then again for each of 2 SAE(s). The codes of one SAE take about" in said[0]
    starts = [place for place in range(len(steps)) if place == 0 or steps[place][0] <= steps[place - 1][0]]
    stages = [steps[a:b] for a, b in zip(starts, [*starts[1:], len(steps)], strict=True)]
    assert len(stages) == 3  # tokens, probes, SAEs
    assert all(stage[-1][0] == stage[-1][1] for stage in stages)
    assert stages[1][-1] == (50, 50)
    assert stages[2][-1] == (2 * (50 + 3), 2 * (50 + 3))


def test_activations_are_known_by_content(finished_run: Run, labels: Path, tmp_path: Path) -> None:
    def said_of(settings: AbsorptionSettings) -> list[str]:
        said: list[str] = []
        measure(finished_run, settings, cache=tmp_path, say=said.append)
        return said

    known = "The activations of these examples were read from the cache."
    assert known not in said_of(AbsorptionSettings(labels=labels, max_k=2))
    assert known in said_of(AbsorptionSettings(labels=labels, max_k=3))
    other = tmp_path / labels.name  # the same name, another content
    other.write_text(labels.read_text("utf-8").replace("and", "few"), encoding="utf-8")
    assert known not in said_of(AbsorptionSettings(labels=other, max_k=2))


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "shape", "nan"])
def test_a_damaged_cache_is_reported_and_computed_again(
    finished_run: Run, labels: Path, tmp_path: Path, damage: str
) -> None:
    loaded = LoadedRun(finished_run)
    task = tasks.build_task(loaded, "labels", labels=labels, windows=2000, place="last", seed=0)
    x_ED, was_known = tasks.example_activations(loaded, task, tmp_path)
    assert not was_known
    [path] = tmp_path.iterdir()
    if damage in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 100 if damage == "cut" else 0])
    else:
        wrong = {"other": {"y": x_ED}, "shape": {"x_ED": x_ED[1:]}, "nan": {"x_ED": x_ED * torch.nan}}[damage]
        save_file({name: tensor.contiguous() for name, tensor in wrong.items()}, path)
    said: list[str] = []
    again, was_known = tasks.example_activations(loaded, task, tmp_path, say=said.append)
    assert not was_known
    assert torch.equal(again, x_ED)
    assert said == [f"The cached activations in {path} are damaged; they are computed again."]
    again, was_known = tasks.example_activations(loaded, task, tmp_path)
    assert was_known
    assert torch.equal(again, x_ED)


def test_a_cache_that_is_no_folder_is_refused(finished_run: Run, labels: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache must be a folder; .*file is a file"):
        measure(finished_run, AbsorptionSettings(labels=labels, max_k=4), cache=tmp_path / "file")


def test_what_the_model_does_not_know_is_an_error(finished_run: Run, tmp_path: Path) -> None:
    rows = [{"text": f"the fox {i}", "label": "xyz"[i * 7 % 11 % 3]} for i in range(200)]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError, match=r"absorption needs probes with F1 > 0.6 for at least 3 of the 3 classes; got"):
        measure(finished_run, AbsorptionSettings(labels=path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", 'must be a JSON object with a "text"'),
        ('{"text": "x", "label": ' + "1" * 5000 + "}", 'must be a JSON object with a "text"'),
        ("[" * 100_000, 'must be a JSON object with a "text"'),
        (r'{"text": "\ud800", "label": "y"}', "got an unpaired surrogate"),
        ('{"text": ""}', 'must be a JSON object with a "text"'),
        ('{"text": "x"}', 'must have "text" and either "label" or "spans"'),
        ('{"text": "x", "lable": "y"}', 'must have "text" and either "label" or "spans"; got text, lable'),
        ('{"text": "x", "spans": 3}', '"spans" must be a list'),
        ('{"text": "x", "spans": [{"start": 0, "end": 2, "label": "y"}]}', "0 <= start < end <= 1"),
        ('{"text": "x", "label": 3}', "a span must be"),
        ('{"text": "x", "label": " "}', "and a non-blank label"),
        ('{"text": "x", "label": "y", "held_out": "no"}', '"held_out" must be true or false'),
    ],
)
def test_a_line_that_is_no_labelled_text_is_refused(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"text": "a", "label": "b", "held_out": true}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2") as refused:
        list(read_labelled(path))
    assert message in str(refused.value)


def test_only_newlines_end_a_line_of_labels(tmp_path: Path) -> None:
    """JSON strings may contain U+2028, U+0085 and others unescaped; a byte order mark is not part of the text."""
    path = tmp_path / "labels.jsonl"
    texts = ["a\u2028b", "c\x85d", "e\u2029f"]
    lines = [json.dumps({"text": text, "label": "y"}, ensure_ascii=False) for text in texts]
    path.write_text("\r\n".join(lines) + "\r\n", encoding="utf-8-sig", newline="")
    assert [passage.text for passage in read_labelled(path)] == texts


def test_texts_that_differ_in_case_or_space_are_on_one_side(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    spellings = ("word {}", " word {}", "Word {}", "WORD  {}\n")
    rows = [{"text": spelling.format(i), "label": "y"} for i in range(40) for spelling in spellings]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sides = [passage.held_out for passage in read_labelled(path)]
    assert all(len(set(sides[i : i + 4])) == 1 for i in range(0, len(sides), 4))
    assert 0 < sum(sides) < len(sides)


def test_what_a_file_holds_cannot_reach_the_terminal(finished_run: Run, tmp_path: Path) -> None:
    rows = [{"text": f"the fox {i}", "label": ["\x1b[31mred", "[bold]b"][i * 7 % 11 % 2]} for i in range(200)]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        measure(finished_run, AbsorptionSettings(labels=path))
    assert "\x1b" not in str(refused.value)
    assert "[bold]b 0." in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        list(read_labelled(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "rolls"}, "task must be one of roles, first-letter, labels; got 'rolls'. Did you mean 'roles'"),
        (
            {"task": "roles", "labels": Path("x")},
            "labels must be used with the task 'labels'; got task 'roles'. Leave one out.",
        ),
        ({"place": "first"}, "place must be 'last' or 'next'"),
        ({"seed": -1}, "seed must be from 0 to 2**63 - 1; got -1"),
        ({"windows": 0}, "windows must be a whole number above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refused:
        AbsorptionSettings(**settings)  # type: ignore[arg-type]
    assert message in str(refused.value)


def test_the_task_labels_needs_a_file(finished_run: Run) -> None:
    with pytest.raises(UserError, match="the task 'labels' must have a file of labelled text; got none"):
        measure(finished_run, AbsorptionSettings(task="labels"))


def test_names_in_code_are_a_task(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes train on training documents and are tested on held-out ones; each name is read at its last token."""

    def of_library(loaded: LoadedRun, *, held_out: bool, number: int) -> list[Document]:
        modules = (json.decoder, argparse) if held_out else (json.encoder, textwrap, ast, dataclasses)
        return [Document(id=module.__name__, text=inspect.getsource(module)) for module in modules]

    monkeypatch.setattr(tasks, "documents", of_library)
    loaded = LoadedRun(finished_run)
    task = tasks.build_task(loaded, "roles", labels=None, windows=4000, place="last", seed=0)
    assert {"keyword", "function name", "parameter", "attribute", "docstring word"} <= set(task.classes)
    words: dict[str, set[str]] = {name: set() for name in task.classes}
    for label, word in zip(task.labels_E.tolist(), task.words, strict=True):
        words[task.classes[label]].add(word)
    assert {"return", "if"} <= words["keyword"]
    assert "JSONEncoder" not in words["function name"]
    assert "self" in words["parameter"]
    assert 0 < int(task.held_out_E.sum()) < len(task.words)
    assert tasks.default_task(loaded) == "first-letter"


def test_the_kept_comparison_with_saebench_agrees() -> None:
    """docs/measurements/absorption.md agrees with docs/results/absorption_parity.json."""
    path = Path(__file__).parents[2] / "docs" / "results" / "absorption_parity.json"
    result = json.loads(path.read_text(encoding="utf-8"))["result"]
    gaps = [gap for of_case in result["largest_difference"].values() for gap in of_case.values()]
    assert len(gaps) > 10
    assert max(gaps) <= result["tolerance"] == 1e-6
    assert min(result["words"]["by_branch"].values()) > 100
    assert {len(set(one["split_latents"])) > 1 for one in result["pipelines"].values()} == {True}
