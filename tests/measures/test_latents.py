from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kronsae.cli.main import app
from kronsae.eval import latent_statistics
from kronsae.measures.latents import LatentsConfig, measure
from kronsae.report.measurements import kept_results, result_path
from kronsae.report.sections import sections
from kronsae.runs.run import Run
from kronsae.support.errors import UserError

CONFIG = LatentsConfig(tokens=300, pre_latent_tokens=100, example_tokens=200, num_latents=4, num_heads=1)


def test_a_run_is_measured_kept_and_known(run: Run) -> None:
    result = measure(run, CONFIG)
    assert 300 <= result["tokens"] < 340
    assert 100 <= result["pre_latent_tokens"] < 140
    assert 200 <= result["example_tokens"] < 240
    x_ND = run.activations(result["tokens"])
    for name, found in result["saes"].items():
        expected = latent_statistics(run.load(name), [x_ND]).to_dict()
        assert found["latents"]["activity"] == expected
        assert found["summary"]["latents"]["living"] == sum(count > 0 for count in expected["active_tokens"])
        assert found["dead"]["latents"] == pytest.approx(1 - found["summary"]["latents"]["living"] / 32)
        assert len(found["gallery"]["latents"]) == 4
        assert any(latent["quantiles"] for latent in found["gallery"]["latents"])
    topk, kron = result["saes"]["topk"], result["saes"]["kron"]
    assert topk["bases"] is topk["dead"]["heads"] is None
    assert kron["bases"]["activity"]["tokens"] == result["pre_latent_tokens"]
    assert len(kron["bases"]["activity"]["active_tokens"]) == len(kron["extensions"]["token_entropy"]) == 16
    assert kron["dead"]["heads"] <= kron["dead"]["bases"] <= kron["dead"]["latents"]
    lines: list[str] = []
    assert measure(run, CONFIG, say=lines.append) == result
    assert lines[0].startswith("Already measured")
    before = result_path(run.folder, "latents").read_bytes()
    result_path(run.folder, "latents").unlink()
    assert measure(run, CONFIG) == result  # the same seed, the same digits
    assert json.loads(before)["result"] == result


def test_the_page_has_a_section_of_it(run: Run) -> None:
    measure(run, CONFIG)
    (section,) = sections(kept_results(run.folder)[0], run.names)
    assert section.key == "latents"
    assert len(section.paragraphs) == 3
    (_, table) = section.tables[0]
    assert [row.name for row in table.rows] == [
        "topk latents",
        "kron latents",
        "kron bases",
        "kron extensions",
        "kron heads",
    ]
    assert [row.series for row in table.rows] == [0, 1, 1, 1, 1]
    assert all(len(row.cells) == len(table.headings) for row in table.rows)


def test_the_verb_prints_json_or_a_table(run: Run) -> None:
    words = ["eval", "latents", str(run.folder), "--tokens", "100", "--latent", "3", "--num-latents", "1", "--quiet"]
    outcome = CliRunner().invoke(app, [*words, "--json"])
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    assert result["saes"]["topk"]["gallery"]["latents"][0]["latent"] == 3
    shown = CliRunner().invoke(app, words)
    assert "kron extensions" in shown.stdout
    assert "kronsae report" in shown.stderr


def test_the_config_checks_itself() -> None:
    with pytest.raises(UserError, match=r"tokens must be a whole number above 0; got 0"):
        LatentsConfig(tokens=0)
    with pytest.raises(UserError, match=r"gallery\.negatives must be at least 0; got -1"):
        LatentsConfig(negatives=-1)
