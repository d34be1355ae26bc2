"""The study of known features: each SAE at its best rate, and the comparisons of which the verdict is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kronsae.measures.synthetic import SyntheticStudyConfig
from kronsae.reproduce import known_features
from kronsae.reproduce.claims import Holds
from kronsae.reproduce.context import Context
from kronsae.reproduce.scales import SCALES

BEST = {"topk": 8e-3}
"""The others are best at the lower rate."""


def measured(members: Any, config: SyntheticStudyConfig, *, progress: object = None) -> dict[str, Any]:
    """What `measure` returns, with an MCC of 0.5, and 0.6 for KronSAEs with the larger pursuit."""
    rows = [
        {
            **dict.fromkeys(known_features.KEYS, 0.5),
            "sae": member.name,
            "seed": config.seed,
            "d_sae": 512,
            "f1_by_kind": {"independent": 0.4},
            "explained_variance": 0.9 if config.lr == BEST.get(member.name, 4e-3) else 0.8,
            "mcc": 0.6 if member.name.endswith("-4") and member.name.startswith("kron") else 0.5,
        }
        for member in members
    ]
    return {"about": [], "rows": rows}


def test_every_sae_has_its_best_rate_and_the_verdict_its_comparisons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_features, "measure", measured)
    monkeypatch.setattr(known_features, "find_spec", lambda name: None)
    context = Context(scale=SCALES["bundled"], folder=tmp_path, seeds=(3, 5, 8), quiet=True, say=lambda line: None)
    found = known_features.rows(context)
    assert {(row["name"], row["lr"]) for row in found} == {
        (name + suffix, BEST.get(name + suffix, 4e-3))
        for name in known_features.SAES
        for suffix in known_features.PURSUITS
    }
    assert sorted(row["seed"] for row in found if row["name"] == "topk") == sorted([3, 5, 8] * 3)
    assert {row["f1_independent"] for row in found} == {0.4}
    judged = known_features.verdict(found)
    assert judged.holds == Holds.PARTLY
    # MCC of two SAEs in two settings
    assert judged.why.startswith("4 of 16 comparisons agree in every seed, 0 disagree in every seed.")
    assert "MCC of kron-2x4-pursuit-4 minus plain TopK's, no conjunctions: +0.100;" in judged.why
    assert "with conjunctions" not in judged.why
