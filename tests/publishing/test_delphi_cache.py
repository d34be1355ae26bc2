"""``kronsae export RUN --to delphi``: the run's own codes on its held-out text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tests.command_line import Outcome
from transformers import AutoTokenizer

from kronsae.publishing.delphi_cache import export_delphi
from kronsae.runs.loaded import LoadedRun
from kronsae.runs.run import Run
from kronsae.support.errors import UserError


def test_the_cache_holds_the_codes_of_the_saes(finished_run: Run, tmp_path: Path) -> None:
    exported = export_delphi(finished_run, tmp_path / "cache", tokens=200, splits=2)
    loaded = LoadedRun(finished_run)
    for name, folder in exported.folders.items():
        module = folder / "gpt_neox.layers.2"
        about = json.loads((module / "config.json").read_text())
        assert about["cache_ctx_len"] == 32
        AutoTokenizer.from_pretrained(about["model_name"])
        parts = [load_file(path) for path in sorted(module.glob("*.safetensors"), key=lambda one: one.name)]
        tokens = torch.from_numpy(parts[0]["tokens"])
        assert tokens.shape == (about["n_tokens"] // 32, 32)
        dense = torch.zeros(*tokens.shape, 32)
        for start, part in zip((0, 16), parts, strict=True):
            rows, positions, latents = part["locations"].astype(np.int64).T
            dense[rows, positions, latents + start] = torch.from_numpy(part["activations"]).float()
        with torch.no_grad():
            output = loaded.language_model.model(tokens, output_hidden_states=True)
            expected = loaded.saes[name].encode(output.hidden_states[3]).to_dense()
        expected[:, 0] = 0  # bos
        torch.testing.assert_close(dense, expected, rtol=2e-3, atol=1e-4)  # float16
        assert dense.any()


def test_the_verb_exports_one_sae_and_says_how_to_open_it(
    finished_run: Run, tmp_path: Path, kronsae: Callable[..., Outcome]
) -> None:
    out = tmp_path / "cache"
    done = kronsae("export", finished_run.folder, "kron", "--to", "delphi", "--out", out, "--tokens", 200, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out) == {"kron": str(out / "kron" / "latents")}
    assert "shorter ones are left out" in done.err
    assert "What now? in delphi, LatentDataset(" in done.err
    assert [path.name for path in out.iterdir()] == ["kron"]
    again = kronsae("export", finished_run.folder, "--to", "delphi", "--out", out)
    assert again.status == 2
    assert "out must be a new or empty folder" in again.err


def test_tokens_are_for_delphi_alone(finished_run: Run, tmp_path: Path, kronsae: Callable[..., Outcome]) -> None:
    done = kronsae("export", finished_run.folder, "--to", "saelens", "--out", tmp_path / "x", "--tokens", 200)
    assert done.status == 2
    assert "--tokens and --splits must be used with --to delphi" in done.err


def test_an_unknown_sae_writes_nothing(finished_run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name must be one of the SAEs"):
        export_delphi(finished_run, tmp_path / "cache", ["kro"], tokens=100, splits=2)
    assert not (tmp_path / "cache").exists()
