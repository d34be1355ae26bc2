"""The map of decoder rows: drawn where umap-learn is there, a sentence where it is not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.reproduce.test_runner import context

from kronsae.reproduce import decoder_map, runner
from kronsae.reproduce.claims import Holds, Verdict
from kronsae.reproduce.runner import run_study
from kronsae.reproduce.study import Study


class FirstTwo:
    """Stands in for umap-learn's UMAP: the first two coordinates."""

    def __init__(self, **settings: object) -> None:
        assert settings == {"metric": "cosine", "random_state": 0}

    def fit_transform(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, :2]


def test_the_picture_comes_with_the_package_and_changes_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    made = replace(context(tmp_path, seeds=(0,)), say=said.append)
    specs = [f"{made.sae('kron', d_base=m, d_extension=n)} name=kron-{m}x{n}" for m, n in ((2, 4), (4, 2))]
    study = Study(
        name="geometry",
        title="Geometry",
        of="figure 19",
        claim="None.",
        rows=lambda own: own.train(specs),
        table=lambda rows: ["table"],
        judge=lambda rows: Verdict(Holds.UNDECIDED, "No figure."),
        draw=decoder_map.draw_map,
    )
    monkeypatch.setattr(runner, "study", lambda name: study)
    monkeypatch.setattr(runner, "known_results", lambda results: [])
    results = tmp_path / "results"
    monkeypatch.setattr(decoder_map, "find_spec", lambda name: None if name == "umap" else object())
    without = run_study("geometry", made, results)
    assert "picture" not in without.kept
    assert not (results / "geometry.png").exists()
    assert "it needs umap-learn. Install it with: pip install 'kronsae[umap]'" in said[-1]
    monkeypatch.setattr(decoder_map, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=FirstTwo))
    found = run_study("geometry", made, results)
    assert found.kept["rows"] == without.kept["rows"]
    assert (results / "geometry.png").read_bytes()[:4] == b"\x89PNG"
    assert "![Geometry](geometry.png)\n\nUMAP of the decoder rows, seed 0." in found.page
