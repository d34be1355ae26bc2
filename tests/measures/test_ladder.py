from __future__ import annotations

import json

from typer.testing import CliRunner

from kronsae.cli.main import app
from kronsae.measures.ladder import LadderConfig, measure
from kronsae.report.measurements import kept_results
from kronsae.report.sections import sections
from kronsae.runs.run import Run


def test_the_verb_its_table_and_its_section(run: Run) -> None:
    words = ["eval", "ladder", str(run.folder), "--tokens", "200"]
    told = CliRunner().invoke(app, [*words, "--json"])
    assert told.exit_code == 0, told.output
    saes = json.loads(told.stdout)["saes"]
    assert [one["sae"] for one in saes] == run.names
    lines: list[str] = []
    assert measure(run, LadderConfig(tokens=200), say=lines.append) == {"saes": saes}
    assert lines == ["Already measured with these settings."]
    table = CliRunner().invoke(app, words)
    [section] = sections(kept_results(run.folder)[0], run.names)
    (_, rungs), (_, parts) = section.tables
    for number, one in enumerate(saes):
        for key, cell in zip(("encoded", "one_step", "best_values"), rungs.rows[number].cells, strict=False):
            assert cell.text == f"{one['ladder'][key]:.4f}"
        assert rungs.rows[number].cells[0].text in table.stdout
        assert [cell.text for cell in parts.rows[number].cells] == [f"{lost:.4f}" for lost in one["lost_by"].values()]
        assert one["ladder"]["tokens"] >= 200


def test_one_sae_alone(run: Run) -> None:
    told = CliRunner().invoke(
        app, ["eval", "ladder", str(run.folder), "--tokens", "100", "--sae", run.names[1], "--json"]
    )
    assert [one["sae"] for one in json.loads(told.stdout)["saes"]] == run.names[1:2]
