"""A run is one training per SAE: its page says "least" and "largest" only with what stands behind it."""

from __future__ import annotations

from typing import Any

import pytest

from kronsae.report.sections import absorption, probing

SAME, NEAR, FAR = (0.30, 0.40, 0.50), (0.32, 0.37, 0.52), (0.50, 0.61, 0.69)


def absorbed(fractions: tuple[float, ...]) -> dict[str, Any]:
    classes = [{"name": f"c{i}", "fraction": fraction} for i, fraction in enumerate(fractions)]
    means = ("mean_absorption_fraction", "mean_full_absorption", "mean_num_split_latents", "mean_f1")
    return dict.fromkeys(means, sum(fractions) / len(fractions)) | {"classes": classes}


def absorption_page(**saes: tuple[float, ...]) -> tuple[str, ...]:
    names = [f"c{i}" for i in range(len(SAME))]
    result = {
        "task": "t",
        "examples": {"learnt_from": 1, "scored_on": 1},
        "classes": names,
        "left_out": ["c9"],
        "needed": 3,
        "probe_f1": dict.fromkeys(names, 0.9),
        "min_f1": 0.6,
        "saes": {name: absorbed(fractions) for name, fractions in saes.items()},
    }
    page = absorption.section({"result": result}, list(saes))
    assert "c9" in page.notes[0]
    return page.paragraphs


def probed(f1: tuple[float, ...]) -> dict[str, Any]:
    return {
        "mean_f1": sum(f1) / len(f1),
        "mean_pair_f1": 0.5,
        "mean_accuracy_by_k": {"1": 0.5},
        "recall": [{"latents": 8.0, "recall_0.5": 0.5}],
        "perturbation": [],
        "concepts": [{"name": f"c{i}", "f1": one, "share": 0.1} for i, one in enumerate(f1)],
    }


def probing_page(**saes: tuple[float, ...]) -> tuple[str, ...]:
    names = [f"c{i}" for i in range(len(SAME))]
    result = {
        "task": "t",
        "per": "token",
        "examples": {"learnt_from": 1, "scored_on": 1},
        "concepts": names,
        "bars": [0.5],
        "probe_accuracy": dict.fromkeys(names, 0.9),
        "d_sae": dict.fromkeys(saes, 8),
        "saes": {name: probed(f1) for name, f1 in saes.items()},
    }
    return probing.section({"result": result}, list(saes)).paragraphs


@pytest.mark.parametrize(
    ("page", "word", "clear"), [(absorption_page, "smallest", "a"), (probing_page, "largest", "b")]
)
def test_ties_chance_and_a_clear_lead(page: Any, word: str, clear: str) -> None:
    assert len(page(a=SAME)) == 1
    assert page(a=SAME, b=SAME)[-1].startswith("All SAEs have the same mean")
    assert "is not significant (paired t-test" in page(a=SAME, b=NEAR)[-1]
    told = page(a=SAME, b=FAR)[-1]
    assert told.startswith(f"{clear} has the {word} mean")
    assert "The difference from each other SAE is significant" in told
    assert "Each SAE was trained with one seed" in told
