from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kronsae.cli.main import app
from kronsae.eval.token_rule import TokenRuleConfig
from kronsae.measures.token_rule import measure
from kronsae.report.measurements import kept_results
from kronsae.report.sections import sections
from kronsae.runs.run import Run
from kronsae.support.errors import UserError

CONFIG = TokenRuleConfig(latents=4, tokens=1500, examples=40, min_active_tokens=20)


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """Return a writable copy of the finished run."""
    return Run(Path(shutil.copytree(finished_run.folder, tmp_path / "run")))


def test_rules_of_a_run(run: Run) -> None:
    steps: list[tuple[int, int]] = []
    found = measure(run, CONFIG, progress=lambda done, total: steps.append((done, total)))
    assert [one.sae for one in found.saes] == run.names
    reading, learning = steps[:-8], steps[-8:]
    assert learning == [(done, 8) for done in range(1, 9)]
    assert [done for done, _ in reading] == sorted(done for done, _ in reading)
    assert len({total for _, total in reading}) == 1
    assert reading[-1][0] == reading[-1][1] >= 2 * 1500  # both texts, twice
    for one in found.saes:
        assert one.auc.n == len(one.latents) == 4
        for rule in one.latents:
            assert 20 <= rule.learned_from <= 40
            assert 20 <= rule.tested_on <= 40
            assert rule.auc is not None
            assert 0 <= rule.auc <= 1
    assert found.saes[0].auc.mean is not None
    assert found.saes[0].auc.mean > 0.7  # the output of a random model's block depends mostly on the current token
    lines: list[str] = []
    assert measure(run, CONFIG, say=lines.append) == found
    assert lines == ["Already measured with these settings."]


def test_the_verb_and_the_section(run: Run) -> None:
    words = ["eval", "token-rule", str(run.folder), "--latents", "2", "--min-active", "20", "--tokens", "1500"]
    outcome = CliRunner().invoke(app, [*words, "--json", "--sae", run.names[1]])
    assert outcome.exit_code == 0, outcome.output
    [figures] = json.loads(outcome.stdout)["saes"]
    table = CliRunner().invoke(app, [*words, "--sae", run.names[1]])
    assert f"{figures['auc']['mean']:.3f} ± {figures['auc']['std']:.3f}" in table.stdout
    [section] = sections(kept_results(run.folder)[0], run.names)
    [(_, shown)] = section.tables
    assert shown.rows[0].name == run.names[1]
    assert shown.rows[0].series == 1
    assert shown.rows[0].cells[1].text == f"{figures['auc']['mean']:.3f} ± {figures['auc']['std']:.3f}"


def test_latents_too_rare_are_reported(run: Run) -> None:
    with pytest.raises(UserError, match="must be active on min_active_tokens=100000 tokens of both texts; got none"):
        measure(run, TokenRuleConfig(tokens=500, min_active_tokens=100_000))
