"""The sentences on the toy model of correlation follow from the figures, whichever way these fall."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from kronsae.report.sections import sections
from kronsae.report.sections.toy import setup_table, table, verdict

KRONS = ("kron-h2-m2-n4", "kron-h4-m2-n2")  # heads of 8 and of 4 latents


def recovery(rv: float, chance: float = 0.1, cosine: float = 0.5) -> dict[str, float]:
    return {
        "rv": rv,
        "rv_by_direction": rv + 0.01,
        "rv_permuted": chance,
        "effective_rank": 5.0,
        "rank_difference": 2.0,
        "mean_correlation": 0.2,
        "mean_cosine": cosine,
    }


def result(seeds: int = 2, **changes: float) -> dict[str, Any]:
    """Four setups; ``kron``, ``topk`` and what else is given are RVs, with a little spread."""
    rv = {"topk": 0.2, "kron": 0.4, "kron_untrained": 0.2, "topk_untrained": 0.2, "kron_mismatched": 0.2} | {
        "topk_mismatched": 0.2,
        "fitting": 0.0,
        "independent_topk": 0.5,
        "independent_kron": 0.5,
    }
    rv |= changes
    setups = [
        {"name": name, "blocks": blocks, "within": 0.9, "across": 0.0, "inner": None, "effective_rank": 4.0}
        for name, blocks in (("eights", [8, 8]), ("odd", [5, 11]), ("fours", [4] * 4), ("independent", [16]))
    ]
    rows = []
    for (number, setup), seed in itertools.product(enumerate(setups), range(seeds)):
        noise = 0.001 * (number + seed % 2)
        for name in ("autoencoder", "topk", *KRONS):
            kind = "topk" if name in ("autoencoder", "topk") else "kron"
            alone = setup["name"] == "independent"
            own = rv[f"independent_{kind}"] if alone else rv[kind]
            fits = (setup["name"], name) in (("eights", KRONS[0]), ("fours", KRONS[1]))
            extra = rv["fitting"] if fits else 0.0
            # noise that differs between the kinds, so that differences have a spread
            own += extra + (noise if kind == "kron" else 0.0)
            mismatched = None if alone else recovery(rv[f"{kind}_mismatched"] + 0.5 * noise)
            row: dict[str, Any] = {"setup": setup["name"], "seed": seed, "dictionary": name, "explained_variance": 0.9}
            trained = {"trained": recovery(own, cosine=own), "untrained": recovery(rv[f"{kind}_untrained"] - noise)}
            rows.append(row | trained | {"mismatched": mismatched})
    return {"setups": setups, "rows": rows}


def sentences(seeds: int = 2, **changes: float) -> str:
    return "\n".join(verdict(result(seeds, **changes)))


@pytest.mark.parametrize(
    ("kron", "expected"),
    [
        (0.4, "KronSAEs recover the correlation significantly better than TopK"),
        (0.2, "the difference between KronSAEs and TopK is not significant"),
        (0.1, "TopK recovers the correlation significantly better than KronSAEs"),
    ],
)
def test_the_claim(kron: float, expected: str) -> None:
    first, second, *_ = verdict(result(kron=kron - 0.001 if kron == 0.2 else kron))
    assert expected in first
    assert first.startswith("RV, matched by structure")
    assert second.startswith("RV, matched by direction")


def test_seeds_of_one_setup_are_no_further_pairs() -> None:
    few, many = (next(verdict(result(seeds, kron=0.1995))) for seeds in (2, 200))
    assert few == many
    assert "the difference between KronSAEs and TopK is not significant" in few
    assert "over 3 setups" in few


@pytest.mark.parametrize(
    ("untrained", "expected"),
    [
        (0.2, "training increases the KronSAE's value, so its structure alone does not explain the recovery"),
        (0.6, "training decreases the KronSAE's value, so its structure alone recovers more"),
        (0.403, "training does not change the KronSAE's value significantly"),
    ],
)
def test_is_it_the_shape(untrained: float, expected: str) -> None:
    assert expected in sentences(kron_untrained=untrained)


def test_the_shape_before_training() -> None:
    assert "an untrained KronSAE is further above chance than an untrained TopK" in sentences(kron_untrained=0.5)
    assert "the difference between an untrained KronSAE and an untrained TopK is not significant" in sentences()
    assert "an untrained KronSAE is less far above chance than" in sentences(kron_untrained=0.1)


def test_whatever_the_truth() -> None:
    assert "no: a KronSAE is further above chance for its own truth" in sentences()
    assert "possibly: for a KronSAE, the difference between its own truth and another is not significant" in sentences(
        kron_mismatched=0.4005
    )
    assert "yes: a KronSAE is further above chance" in sentences(kron_mismatched=0.6)
    assert ", not significant." in sentences(topk_mismatched=0.1995)
    assert ", significant." in sentences(topk_mismatched=0.1)


def test_independent_features() -> None:
    assert "in RV, TopK is better" in sentences(independent_topk=0.7)
    assert "in RV, the difference is not significant" in sentences(independent_kron=0.4975)
    assert "in RV, KronSAEs are better" in sentences(independent_kron=0.8)


def test_blocks_that_fit_heads() -> None:
    assert "is larger than the gain in setups without such blocks" in sentences(fitting=0.2)
    assert "is smaller than the gain in setups without such blocks" in sentences(fitting=-0.2)
    nothing_fits = result()
    nothing_fits["setups"][0]["blocks"] = [6, 10]
    assert not any("the size of a head" in sentence for sentence in verdict(nothing_fits))


def test_the_tables() -> None:
    found = table(result())
    assert [row.name for row in found.rows] == ["autoencoder", "topk", *KRONS]
    headings = [heading for heading, _ in found.headings]
    cells = dict(zip(headings, found.rows[1].cells, strict=True))
    assert cells["RV"].text == "0.20 ± 0.00"  # the independent features, at 0.5, are not counted
    assert cells["effective rank"].text == "5.0 ± 0.0"
    by_setup = setup_table(result())
    assert [row.name for row in by_setup.rows] == ["eights", "odd", "fours", "independent"]
    assert [cell.text for cell in by_setup.rows[3].cells][:3] == ["4.0", "0.50 ± 0.00", "0.50 ± 0.00"]


def test_the_section_says_whose_saes_they_are() -> None:
    [section] = sections({"toy": {"result": result(), "settings": {}}}, ["mine"])
    assert section.key == "toy"
    assert "not this run's" in section.paragraphs[0]
    assert section.paragraphs[1:] == tuple(verdict(result()))
    assert "3 covariances and 2 seeds" in section.notes[0]
