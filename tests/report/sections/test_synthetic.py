"""The sentences on known features follow from the figures, whichever way these fall."""

from __future__ import annotations

from typing import Any

from kronsae.report.sections import sections
from kronsae.report.sections.synthetic import table, verdict


def row(sae: str, seed: int, mcc: float, absorbed: float | None = None, family: str = "topk") -> dict[str, Any]:
    return {
        "sae": sae,
        "seed": seed,
        "family": family,
        "encoder": "kronecker" if sae.startswith("kron") else "dense",
        "mcc": mcc,
        "mcc_untrained": 0.3,
        "f1": 0.5,
        "l0": 4.0,
        "absorption": {"hierarchy": {"rate": absorbed, "missed_alone": 0.1}},
    }


def result(kron: tuple[float, ...], dense: tuple[float, ...] = (0.6, 0.61, 0.62)) -> dict[str, Any]:
    rows = [
        found
        for seed, (one, other) in enumerate(zip(kron, dense, strict=True))
        for found in (row("topk", seed, other, 0.2 + seed / 100), row("kron", seed, one, 0.1))
    ]
    return {"about": [{"seed": seed, "features": 9, "d_in": 3, "l0": 2.0} for seed in range(len(kron))], "rows": rows}


def test_losing_is_said_first_and_plainly() -> None:
    told = list(verdict(result((0.5, 0.52, 0.51))))
    assert told[0].startswith("Over 3 pairs, Kronecker encoders are significantly worse in MCC (−0.100 ±")
    assert told[1].startswith(
        "Over 3 pairs, Kronecker encoders are significantly better in absorbed by children (−0.110 ±"
    )
    assert (
        told[2] == "Over 3 pairs, Kronecker encoders are not significantly different in F1 (+0.000 ± 0.000), "
        "missed without child (+0.000 ± 0.000)."
    )
    assert told[3] == "Lower MCC with every seed: kron (against topk)."
    assert len(told) == 4


def test_one_seed_is_not_every_seed() -> None:
    rows = [
        row(name, 0, mcc, family=family)
        for family in ("topk", "jumprelu")
        for name, mcc in ((f"kron-{family}", 0.7), (family, 0.6))
    ]
    found = {"about": [{"seed": 0, "features": 9, "d_in": 3, "l0": 2.0}], "rows": rows}
    assert not any("every seed" in sentence for sentence in verdict(found))


def test_seeds_of_one_pair_are_no_further_pairs_where_there_are_several() -> None:
    """Three kinds disagree, and their seeds agree: that is three figures, however many the seeds are."""
    gains = {"topk": 0.2, "jumprelu": 0.01, "switch": 0.09}
    told = []
    for seeds in (2, 50):
        rows = [
            row(name, seed, mcc, family=family)
            for family, gain in gains.items()
            for seed in range(seeds)
            for name, mcc in ((family, 0.5), (f"kron-{family}", 0.5 + gain))
        ]
        told.append(list(verdict({"about": [], "rows": rows})))
    assert told[0] == told[1]
    assert told[0][0].startswith(
        "Over 3 pairs, Kronecker encoders are not significantly different in MCC (+0.100 ± 0.055)"
    )


def test_winning_and_neither() -> None:
    better = list(verdict(result((0.7, 0.72, 0.73))))
    assert "are significantly better in MCC" in better[0]
    mixed = list(verdict(result((0.5, 0.61, 0.72))))
    assert "are not significantly different in MCC" in mixed[1]
    assert not any("with every seed" in sentence for sentence in mixed)


def test_only_the_same_family_is_compared() -> None:
    found = result((0.5, 0.52, 0.51))
    for one in found["rows"]:
        one["family"] = one["sae"]
    assert list(verdict(found)) == []


def test_the_table_has_what_was_measured() -> None:
    found = table(result((0.5, 0.52, 0.51)), ["kron", "topk"])
    headings = [heading for heading, _ in found.headings]
    assert headings == ["MCC", "MCC untrained", "F1", "absorbed by children", "missed without child", "l0"]
    assert [(one.name, one.series) for one in found.rows] == [("topk", 1), ("kron", 0)]
    assert [cell.text for cell in found.rows[1].cells][:2] == ["0.510 ± 0.010", "0.300 ± 0.000"]
    never = table({"about": [], "rows": [row("topk", 0, 0.5, 0.1), row("kron", 0, 0.5)]})
    assert never.rows[1].cells[3].text == "–"


def test_the_section() -> None:
    kept = {"result": result((0.5, 0.52, 0.51)), "settings": {"steps": 10, "batch": 200, "source": "own"}}
    [section] = sections({"synthetic": kept}, ["topk", "kron"])
    assert "9 known features in 3 dimensions" in section.paragraphs[0]
    assert "2,000 training tokens, source own" in section.notes[0]
