"""``kronsae eval probing`` on a tiny run, with the user's own labelled text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kronsae.cli.main import app
from kronsae.measures.probing import ProbingSettings, measure
from kronsae.report.measurements import kept_results
from kronsae.report.sections import sections
from kronsae.runs.run import Run
from kronsae.support.errors import UserError


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write texts that contain animals and numbers."""
    rows = []
    for i in range(400):
        animal = ("fox", "dog")[i % 2]
        text = f"the lazy {animal} jumps over {i} and writes each sum"
        spans = [
            {"start": 9, "end": 12, "label": "animal"},
            {"start": 24, "end": 24 + len(str(i)), "label": "number"},
        ]
        rows.append({"text": text, "spans": spans})
    path = tmp_path_factory.mktemp("labels") / "spans.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_verb_the_kept_result_and_the_section(finished_run: Run, labels: Path) -> None:
    command = ["eval", "probing", str(finished_run.folder), "--labels", str(labels), "--json", "--quiet"]
    outcome = CliRunner().invoke(app, command, catch_exceptions=False)
    result = json.loads(outcome.stdout)
    assert result["concepts"] == ["animal", "number"]
    assert list(result["saes"]) == finished_run.names
    assert result["probe_accuracy"]["animal"] > 0.9
    for one in result["saes"].values():
        assert list(one["mean_accuracy_by_k"]) == ["1", "2", "5"]
        assert one["mean_pair_f1"] >= 0
        assert [row["latents"] for row in one["recall"]] == [32, 16, 8, 4, 2]
    said: list[str] = []
    assert measure(finished_run, ProbingSettings(labels=labels), say=said.append) == result
    assert said == ["Already measured with these settings."]
    [section] = sections({"probing": kept_results(finished_run.folder)[0]["probing"]}, finished_run.names)
    first, recall, concepts = (table for _, table in section.tables)
    assert [row.name for row in first.rows] == finished_run.names
    assert len(recall.rows) == 5 * len(finished_run.names)
    assert [row.name for row in concepts.rows] == ["animal", "number"]
    shown = CliRunner().invoke(app, [*command[:-2], "--quiet"], catch_exceptions=False)
    assert "F1, best pair" in shown.stdout


def test_labels_of_whole_texts(finished_run: Run, tmp_path: Path) -> None:
    rows = [{"text": f"the lazy {('fox', 'dog')[i % 2]} jumps {i}", "label": ("a", "b")[i % 2]} for i in range(400)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["eval", "probing", str(finished_run.folder), "--labels", str(path), "--per", "text", "--json"]
    outcome = CliRunner().invoke(app, command, catch_exceptions=False)
    result = json.loads(outcome.stdout)
    assert (result["per"], result["concepts"]) == ("text", ["a", "b"])
    assert sum(result["examples"].values()) == 400
    assert "400 texts with" in outcome.stderr
    assert result["probe_accuracy"]["a"] > 0.9
    [section] = sections({"probing": kept_results(finished_run.folder)[0]["probing"]}, finished_run.names)
    assert "training texts" in section.notes[0]
    assert "held-out texts, each with the means over its tokens" in section.notes[0]


def test_other_text_than_pythons_library_needs_labels(finished_run: Run) -> None:
    with pytest.raises(UserError, match="labels must be given if the run's text is not Python's library; got none"):
        measure(finished_run, ProbingSettings())
    with pytest.raises(UserError, match="windows must be a whole number above 0"):
        ProbingSettings(windows=0)
    with pytest.raises(UserError, match="per must be 'token' or 'text'; got 'word'"):
        ProbingSettings(per="word")  # type: ignore[arg-type]
