from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from kronsae.cli.main import app
from kronsae.measures.interaction import InteractionConfig, measure, not_applicable, random_twin
from kronsae.report.measurements import kept_results, result_path
from kronsae.report.sections import sections
from kronsae.runs.architectures import switch
from kronsae.runs.recipes import kron, topk
from kronsae.runs.run import Run
from kronsae.support.errors import UserError
from kronsae.support.sealed import write_sealed

CONFIG = InteractionConfig(tokens=300, max_cells=20, least_active=2)


def test_a_run_is_measured_kept_and_known(run: Run) -> None:
    result = measure(run, CONFIG)
    assert 300 <= result["tokens"] < 340
    assert result["not_applicable"] == {"topk": not_applicable(run.config.saes[0])}
    found = result["saes"]["kron"]
    assert found["gate"] == "mand"
    assert (found["heads"], len(found["sampled_heads"])) == (8, 5)
    for whose in ("trained", "twin"):
        for kind, spread in found[whose]["directions"].items():  # dead latents have neither
            assert spread["number"] == found[whose]["kept"][kind]["number"]
        for which in ("kept", "composed"):
            kinds = found[whose][which]
            parts = ("same_base", "same_extension", "neither")
            assert kinds["within"]["number"] == sum(kinds[part]["number"] for part in parts) <= 5 * 6
            assert kinds["between"]["number"] <= 190 - 30
    assert found["twin"] != found["trained"]
    assert dict(found["fidelity"]["false_positive_mass"])[0.0] == 0  # mand is exactly 0 off its support
    assert found["fidelity"]["activations"] > 0
    assert sum(found["living"]["heads_by_living"]) == 8
    assert len(found["bases"]["each"]) == len(found["extensions"]["each"]) == 16
    assert [grid["head"] for grid in found["grids"]] == found["sampled_heads"][:4]
    lines: list[str] = []
    assert measure(run, CONFIG, say=lines.append) == result
    assert lines[0].startswith("Already measured")
    result_path(run.folder, "interaction").unlink()
    assert measure(run, CONFIG) == result
    other = measure(run, replace(CONFIG, seed=1))["saes"]["kron"]
    assert other["sampled_heads"] != found["sampled_heads"]
    assert other["living"] == found["living"]


def test_the_page_has_a_section_of_it(run: Run) -> None:
    measure(run, CONFIG)
    (section,) = sections(kept_results(run.folder)[0], run.names)
    assert section.key == "interaction"
    assert "topk: It does not apply to a dense encoder" in section.paragraphs[1]
    (_, table) = section.tables[0]
    assert [name for name, _ in table.headings] == ["kron"]
    assert all(len(row.cells) == 1 for row in table.rows)


def test_the_verb_prints_json_or_a_table(run: Run) -> None:
    words = ["eval", "interaction", str(run.folder), "--tokens", "100", "--max-cells", "8", "--quiet"]
    outcome = CliRunner().invoke(app, [*words, "--json"])
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["saes"]["kron"]["heads"] == 8
    shown = CliRunner().invoke(app, words)
    assert "correlation within a head" in shown.stdout
    assert "topk: It does not apply" in shown.stderr


def test_a_run_without_heads_is_refused(run: Run) -> None:
    about = json.loads((run.folder / "run.json").read_text())
    del about["config"]["saes"][1]
    (run.folder / "run.json").unlink()
    write_sealed(run.folder / "run.json", about)
    with pytest.raises(
        UserError, match=r"^interaction must be measured on an SAE with a Kronecker encoder.*has none \(topk\)"
    ):
        measure(run, CONFIG)


def test_why_it_does_not_apply() -> None:
    small = {"num_heads": 4, "d_base": 2, "d_extension": 2, "k": 2}
    assert not_applicable(kron(**small)) == ""  # type: ignore[arg-type]
    assert re.search("no heads", not_applicable(topk(d_sae=8, k=2)))
    routed = switch(num_experts=2, num_heads=4, d_base=2, d_extension=2, k=2)
    assert re.search("routed to it", not_applicable(routed))
    assert re.search("only one parent", not_applicable(kron(**small, null_symbols=True)))  # type: ignore[arg-type]


def test_the_twin_starts_as_training_would() -> None:
    member = kron(num_heads=4, d_base=2, d_extension=2, k=3)
    x_ND = torch.randn(64, 6) * 5 + 3
    twin = random_twin(member, 6, 7, x_ND)
    plain = member.shape(6).build(7)
    mean_D = x_ND.mean(0)
    scale = (x_ND - mean_D).square().sum(-1).mean().sqrt() / 6**0.5
    expected = plain.encode((x_ND - mean_D) / scale)
    found = twin.encode(x_ND)
    torch.testing.assert_close(found.to_dense(), expected.to_dense() * scale, rtol=1e-3, atol=1e-5)
    raw = random_twin(replace(member, normalize_activations="none"), 6, 7, x_ND)
    torch.testing.assert_close(raw.encode(x_ND).to_dense(), plain.encode(x_ND).to_dense())


def test_the_config_checks_itself() -> None:
    with pytest.raises(UserError, match=r"max_cells must be a whole number above 0; got 0"):
        InteractionConfig(max_cells=0)
    with pytest.raises(UserError, match=r"shown_heads must be at least 0; got -1"):
        InteractionConfig(shown_heads=-1)
