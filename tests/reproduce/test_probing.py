"""The study of human labels: three kinds of label, all seeds in one pass."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.reproduce.test_runner import TINY

from kronsae.measures import probing as measured
from kronsae.measures.absorption import AbsorptionSettings
from kronsae.reproduce import probing, word_classes
from kronsae.reproduce.claims import Holds
from kronsae.reproduce.context import Context
from kronsae.reproduce.runner import run_study
from kronsae.support.errors import UserError

WORDS = [("the", "AT"), ("dog", "NN"), ("saw", "VBD"), ("a", "AT"), ("red", "JJ"), ("house", "NN"), (".", ".")]


def english(path: Path) -> Path:
    """Write a small file as `kronsae texts english` does: documents of two categories, and reviews."""
    rows = []
    for number in range(60):
        text, spans = f"{number} ", []
        for _ in range(40):
            for word, tag in WORDS:
                spans.append([len(text), len(text) + len(word), tag])
                text += f"{word} "
        category = ("news", "fiction")[number % 2]
        rows.append({"text": text, "source": f"brown/c{number}", "label": category, "spans": spans})
        opinion = ("a bad", "a good")[number % 2]
        lines = "\n".join(f"{number} {opinion} film, and a very long one too, number {i}" for i in range(4))
        rows.append({"text": lines, "source": f"movie_reviews/{number}", "label": ("neg", "pos")[number % 2]})
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_absorption_by_parts_of_speech_is_that_of_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings and measurements are replaced: the study asks for the labels, and says what the gate needs."""
    asked = []

    def measured(context: Context, settings: AbsorptionSettings, l0s: tuple[int, ...]) -> list[dict[str, Any]]:
        assert l0s == (4,)
        asked.append(settings)
        about = {"k": 4, "classes": 5, "needed": 4, "accurate_classes": 5, "mean_absorption_fraction": 0.5}
        return [{**about, "name": name, "seed": seed} for name in ("topk", "kron") for seed in (0, 1)]

    monkeypatch.setattr(word_classes, "measured", measured)
    scale = replace(TINY, text=str(english(tmp_path / "english.jsonl.gz")))
    rows = word_classes.rows(Context(scale=scale, folder=tmp_path, seeds=(0, 1), quiet=True))
    assert asked == [AbsorptionSettings(labels=tmp_path / "parts-of-speech.jsonl")]
    found = word_classes.verdict(rows)
    assert found.holds == Holds.NO
    assert "by l0: 1.00. At least 4 of 5 classes need an accurate probe; 5 have one." in found.why


def test_three_kinds_of_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measured.WINDOWS, "text", 40)
    monkeypatch.setitem(measured.AT_LEAST, "text", 2)
    monkeypatch.setitem(measured.AT_LEAST, "token", 5)
    monkeypatch.setattr(probing, "WINDOWS", 12)
    scale = replace(TINY, text=str(english(tmp_path / "english.jsonl.gz")), context_length=64)
    context = Context(scale=scale, folder=tmp_path / "work", seeds=(0, 1), quiet=True)
    found = run_study("probing", context, tmp_path / "results")
    assert found.kept["scale"]["text"] == "english.jsonl.gz"  # not the place where it lies
    rows = found.kept["rows"]
    kinds = ("parts-of-speech", "categories", "sentiment")
    expected = [(kind, form, seed) for kind in kinds for seed in (0, 1) for form in ("topk", "kron", "matryoshka")]
    assert [(row["labels"], row["name"], row["seed"]) for row in rows] == expected
    assert {row["labels"]: (row["per"], row["concepts"]) for row in rows} == {
        "parts-of-speech": ("token", 5),
        "categories": ("text", 2),
        "sentiment": ("text", 2),
    }
    for row in rows:
        assert 0 <= row["mean_f1"] <= 1
        assert 0 <= row["accuracy_1"] <= 1
        assert row["always_active_f1"] == pytest.approx(2 / 3, abs=0.15) or row["per"] == "token"
    assert sum(row["labels"] == "sentiment" and row["probe_accuracy"] > 0.8 for row in rows) == 6
    assert "| sentiment | kron |" in found.page
    assert "of 6 comparisons agree" in found.page
    assert "sentiment, accuracy of one latent" in found.page


def test_the_bundled_text_has_labels_of_its_own_and_other_text_without_labels_is_refused(tmp_path: Path) -> None:
    assert probing.labels(Context(scale=TINY, folder=tmp_path, seeds=(0,), quiet=True), "sentiment") is None
    context = Context(scale=replace(TINY, text="user/dataset"), folder=tmp_path, seeds=(0,), quiet=True)
    with pytest.raises(UserError, match="probing needs text with human labels; 'user/dataset' has none"):
        probing.labels(context, "sentiment")
