"""Pursuit in a run: an evaluation beside the plain one, and an SAE trained with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kronsae.cli.main import app
from kronsae.core.pursuit import Pursuit
from kronsae.runs.architectures import jumprelu, kron, topk
from kronsae.runs.config import RunConfig
from kronsae.runs.evaluation import evaluate_pursuit, evaluate_run, write_report
from kronsae.runs.parsing import parse_pursuit, parse_sae
from kronsae.runs.run import Run, execute
from kronsae.support.errors import UserError
from kronsae.training.member import Member


def test_rows_side_by_side_and_the_plain_file_as_it_was(finished_run: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(finished_run.folder, tmp_path / "run")))
    plain = evaluate_run(run, tokens=300)
    before = (run.folder / "evaluation.json").read_bytes()
    words = ["eval", str(run.folder), "--pursuit", "rounds=2 candidates=2"]
    told = CliRunner().invoke(app, [*words, "--json"])
    assert told.exit_code == 0, told.output
    rows = json.loads(told.stdout)["saes"]
    assert [row["name"] for row in rows] == [name for one in run.names for name in (one, f"{one} + pursuit")]
    assert rows[::2] == plain
    assert (run.folder / "evaluation.json").read_bytes() == before
    for own, pursued in zip(rows[::2], rows[1::2], strict=True):
        assert pursued["explained_variance"] > own["explained_variance"]
        assert pursued["evaluation_tokens"] == own["evaluation_tokens"]
        assert pursued["training_flops"] == own["training_flops"]  # it was trained without
    kept = json.loads((run.folder / "evaluation-pursuit.json").read_text())
    assert kept["pursuit"] == {"rounds": 2, "candidates": 2, "refit": 2, "start": 0.7}
    again = CliRunner().invoke(app, [*words, "--json"])
    assert "Already evaluated with this pursuit" in again.stderr
    assert json.loads(again.stdout)["saes"] == rows
    other = CliRunner().invoke(app, ["eval", str(run.folder), "--pursuit", "rounds=1 refit=1", "--json"])
    assert json.loads(other.stdout)["saes"][1] != rows[1]


def test_saes_without_a_fixed_k_are_named_and_left_out_and_the_report_shows_both_rows(
    config: RunConfig, tmp_path: Path
) -> None:
    members = (jumprelu(d_sae=24, k=4), topk(d_sae=24, k=4))
    run = execute(replace(config, saes=members), tmp_path / "run", show_progress=False)
    said: list[str] = []
    rows = evaluate_pursuit(run, Pursuit(), tokens=300, say=said.append)
    assert [row["name"] for row in rows] == ["jumprelu", "topk", "topk + pursuit"]
    assert any(line.startswith("'jumprelu' has no pursuit: ") for line in said)
    assert "topk + pursuit" in write_report(run).read_text(encoding="utf-8")
    with pytest.raises(UserError, match="'jumprelu' has no pursuit"):
        evaluate_pursuit(run, Pursuit(), saes=("jumprelu",), tokens=300)
    with pytest.raises(UserError, match="saes must be among jumprelu, topk; got 'kron'"):
        evaluate_pursuit(run, Pursuit(), saes=("kron",), tokens=300)
    evaluate_run(run, tokens=200)  # on other tokens: the rows cannot be compared
    assert "topk + pursuit" not in write_report(run).read_text(encoding="utf-8")


def test_the_words_of_a_pursuit() -> None:
    assert parse_pursuit("rounds=4 candidates=3 refit=0 start=1") == Pursuit(rounds=4, candidates=3, refit=0, start=1.0)
    for spec, text in (
        ("rounds", "--pursuit takes name=value pairs, such as 'rounds=2 candidates=2'; got 'rounds'."),
        ("rounds=1 rounds=2", "--pursuit must say each thing once; 'rounds' is there twice in 'rounds=1 rounds=2'."),
        ("round=1", "--pursuit.round is not a known key of Pursuit. Did you mean 'rounds'?"),
        ("rounds=x", "--pursuit.rounds must be int; got 'x'."),
    ):
        with pytest.raises(UserError) as error:
            parse_pursuit(spec)
        assert str(error.value).startswith(text)


def test_an_sae_with_pursuit_by_its_words() -> None:
    member = parse_sae("kron num_heads=4 d_base=2 d_extension=3 k=4 pursuit_rounds=2 pursuit_refit=1")
    assert member.pursuit == Pursuit(rounds=2, refit=1)
    assert member.pursuit_learning == "two_losses"
    assert parse_sae("topk d_sae=24 k=4 pursuit_rounds=2 pursuit_learning=unrolled").pursuit_learning == "unrolled"
    assert kron(num_heads=4, d_base=2, d_extension=3, k=4).pursuit is None
    for make, text in (
        (lambda: kron(num_heads=4, d_base=2, d_extension=3, k=4, pursuit_refit=1), "must be used with pursuit_rounds"),
        (
            lambda: kron(
                num_heads=4,
                d_base=2,
                d_extension=3,
                k=4,
                pursuit_rounds=2,
                pursuit_learning="unrolled",
                unit_norm_decoder=False,
            ),
            "pursuit_learning 'unrolled' must be used with unit_norm_decoder; 'kron' has none.",
        ),
        (
            lambda: kron(num_heads=4, d_base=2, d_extension=3, k=4, pursuit_learning="unrolled"),
            "pursuit_learning must be used with a pursuit; 'kron' has none. Give pursuit_rounds=2, or leave it out.",
        ),
        (
            lambda: parse_sae("topk d_sae=24 k=4 pursuit_rounds=2 pursuit_learning=rolled"),
            "pursuit_learning must be",
        ),
        (lambda: jumprelu(d_sae=24, k=4, pursuit_rounds=2), "pursuit shares out a k that is the same for every token"),
        (
            lambda: kron(num_heads=4, d_base=2, d_extension=3, k=4, pursuit_rounds=2, write="layers.1"),
            "pursuit needs an SAE of one hook",
        ),
    ):
        with pytest.raises(UserError, match=text.replace(".", r"\.")):
            make()


def test_training_with_pursuit_learns_and_keeps_it() -> None:
    config = kron(num_heads=8, d_base=2, d_extension=3, k=4, lr=3e-3, pursuit_rounds=2)
    torch.manual_seed(0)
    directions = torch.randn(40, 12)
    member = Member(config, 12, "hook", steps=60)
    variances = []
    for step in range(60):
        x_BD = torch.rand(256, 40).mul(torch.rand(256, 40) < 0.08) @ directions
        metrics = member.step(x_BD, step, want_metrics=True)
        assert metrics is not None
        variances.append(metrics.explained_variance)
    assert variances[-1] > variances[0] + 0.1
    sae = member.finished_sae()
    assert sae.pursuit == Pursuit()
    norms = member.sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    with torch.no_grad():  # folding the normalisation changes nothing: scale plays no part
        inside = member.sae(member.normalizations["read"](x_BD))
        outside = member.normalizations["read"](sae(x_BD))
    torch.testing.assert_close(outside, inside, rtol=0, atol=1e-3)
