"""Harvest, train and eval on six model architectures with random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.tiny_models import BLOCKS, KINDS, WIDTH
from tests.tiny_runs import texts

import kronsae as ks
from kronsae.cli.main import app
from kronsae.data.manifest import read_manifest

COMMON = "--set context_length=32 --set loop.batch_tokens=64 --set buffer_tokens=192 --set held_out_share=0.2"
SAES = ("--sae", "topk d_sae=32 k=4", "--sae", "kron num_heads=4 d_base=2 d_extension=4 k=4")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def kronsae(*words: object) -> None:
    """Run a command and raise its exceptions."""
    app([str(word) for word in words], standalone_mode=False)


def test_harvest_train_eval(
    kind: str,
    tiny_model_folder: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = ("--model", tiny_model_folder(kind), "--text", text_file, "--hook", "layers.2")
    kronsae("harvest", *source, "--tokens", 200, "--context-length", 32, "--out", tmp_path / "acts")
    assert read_manifest(tmp_path / "acts").d_in == {"layers.2": WIDTH}

    kronsae("train", *source, "--tokens", 640, *SAES, *COMMON.split(), "--quiet", "--out", tmp_path / "r")
    capsys.readouterr()
    kronsae("eval", tmp_path / "r", "--tokens", 100, "--json")
    shown = capsys.readouterr()
    rows = {row["name"]: row for row in json.loads(shown.out)["saes"]}
    assert rows.keys() == {"topk", "kron"}
    for row in rows.values():
        assert (row["d_in"], row["d_sae"], row["tokens"]) == (WIDTH, 32, 640)
        assert row["evaluation_tokens"] >= 100
        assert row["explained_variance"] < 1
        assert 0 < row["l0"] <= 4
        if kind == "bert":
            assert row["ce_recovered"] is row["kl_recovered"] is None
            assert row["language_model"]["reason"] == (
                "the checkpoint is BertForMaskedLM, which has no head for the next token"
            )
        else:
            assert math.isfinite(row["ce_recovered"])
            assert math.isfinite(row["kl_recovered"])
    assert rows["kron"]["encoder_parameters"] == 4 * (2 + 4) * (WIDTH + 1) < rows["topk"]["encoder_parameters"]

    kronsae("eval", tmp_path / "r", "--tokens", 100)
    table = capsys.readouterr().out
    reason = "CE and KL recovered were not measured: the checkpoint is BertForMaskedLM"
    assert (reason in " ".join(table.split())) == (kind == "bert")


def test_in_python_on_a_module_by_its_own_path(
    kind: str, tiny_model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A .txt file has one document per line; in a folder, each file is one document."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts(20)):
        (folder / f"{number}.txt").write_text(text)
    run = ks.train(
        model=str(tiny_model_folder(kind)),
        text=str(folder),
        hook=f"{BLOCKS[kind]}.1",
        tokens=128,
        batch_tokens=64,
        saes=[ks.kron(num_heads=4, d_base=2, d_extension=4, k=4)],
        out=tmp_path / "r",
        context_length=24,
        buffer_tokens=64,
        show_progress=False,
    )
    sae = ks.load(run.folder)
    x = torch.randn(2, 3, WIDTH)
    assert sae.decode(sae.encode(x)).shape == x.shape
