"""`kronsae import`, `eval` and `report` on an SAE that SAELens' own runner trained and saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.command_line import Outcome
from tests.interop_real.saelens.test_train import command
from tests.tiny_models import make_tiny_model
from tests.tiny_runs import write_jsonl

import kronsae.interop.saelens as ours


def test_an_sae_that_sae_lens_trained_is_evaluated_and_reported(
    tmp_path: Path, kronsae: Callable[..., Outcome], record: Callable[..., None]
) -> None:
    model = make_tiny_model("gpt_neox", tmp_path / "model")
    (tmp_path / "text").mkdir()
    write_jsonl(tmp_path / "text" / "train.jsonl", 400)
    d_in = json.loads((model / "config.json").read_text("utf-8"))["hidden_size"]
    ours.main(command("topk", model, tmp_path / "text", tmp_path / "trained", d_in))
    place = ("--model", model, "--hook", "layers.2", "--text", tmp_path / "text" / "train.jsonl")
    options = ("--set", "context_length=32", "--set", "eval_tokens=500", "--set", "held_out_share=0.2")
    run = tmp_path / "run"
    done = kronsae("import", tmp_path / "trained" / "sae", *place, *options, "--name", "theirs", "--out", run)
    assert done.status == 0, done.err
    done = kronsae("eval", run, "--json", "--quiet")
    assert done.status == 0, done.err
    (row,) = done.json["saes"]
    assert row["l0"] <= 4
    assert row["explained_variance"] > 0.3
    done = kronsae("report", run, "--quiet")
    assert done.status == 0, done.err
    assert "theirs" in (run / "report.html").read_text("utf-8")
    record(
        "`kronsae import`, `eval` and `report` of an SAE that SAELens trained",
        format="SAELens topk",
        direction="read",
        package="sae-lens",
    )
