from __future__ import annotations

from typing import Any

import pytest
from tests.report.pages import row, rows

from kronsae.report.comparison import comparison, losses, notes, verdicts


def column(name: str, found: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    table = comparison(found)
    place = [heading for heading, _ in table.headings].index(name)
    return [(line.cells[place].text, line.cells[place].best) for line in table.rows]


def test_figures_bests_and_differences() -> None:
    assert column("EV", rows()) == [("0.9000", True), ("0.8700", False), ("−0.0300", False)]
    assert column("dead share", rows()) == [("25.0%", False), ("10.0%", True), ("−15.0 pp", False)]
    assert column("encoder parameters", rows()) == [("526,336", False), ("394,752", False), ("× 0.75", False)]
    assert column("l0", rows()) == [("32.00", False), ("32.00", False), ("0.00", False)]
    assert column("architecture", rows())[2] == ("–", False)


def test_what_looks_equal_is_no_better() -> None:
    given = rows()
    given[1]["kl_recovered"] = given[0]["kl_recovered"] + 1e-6
    assert column("KL recovered", given) == [("0.9800", False), ("0.9800", False), ("0.0000", False)]


def test_no_best_among_saes_of_different_l0() -> None:
    given = rows()
    given[1]["l0"] = 31.5
    assert column("EV", given)[0] == ("0.9000", True)  # within 2%
    given[1]["l0"] = 40.0
    assert not any(best for name in ("EV", "CE recovered", "KL recovered") for _, best in column(name, given))
    assert column("dead share", given)[1] == ("10.0%", True)
    assert "differ in l0" in notes(given)[0]


def test_a_single_sae_is_not_the_best_of_anything() -> None:
    table = comparison(rows()[:1])
    assert len(table.rows) == 1
    assert not any(cell.best for cell in table.rows[0].cells)
    assert len(notes(rows()[:1])) == 1


def test_missing_figures_are_dashes_with_their_reason() -> None:
    given = rows()
    for line in given:
        line |= {"ce_recovered": None, "kl_recovered": None}
        line["language_model"] = {"kind": "skipped", "reason": "the checkpoint is a BertModel"}
    assert column("CE recovered", given) == [("–", False)] * 3
    table = comparison(given)
    place = [heading for heading, _ in table.headings].index("CE recovered")
    assert table.rows[0].cells[place].note == "the checkpoint is a BertModel"
    assert "CE and KL recovered were not measured: the checkpoint is a BertModel." in notes(given)
    assert losses(given) is None


def test_each_kronecker_sae_is_compared_to_its_dense_one() -> None:
    given = [
        row("wide", "dense-topk", d_sae=4096),
        row("same", "dense-topk", d_sae=2048),
        row("jump", "dense-jumprelu", d_sae=2048),
        row("kron", "kronecker-topk", d_sae=2048),
        row("alone", "kronecker-batchtopk"),
    ]
    assert [line.name for line in comparison(given).rows[5:]] == ["kron against same"]


def test_what_is_saved_otherwise_than_it_was_trained_says_both() -> None:
    """A BatchTopK SAE is a JumpReLU on disk, and is still to be compared with BatchTopK."""
    given = [
        row("jump", "dense-jumprelu"),
        row("batch", "dense-batch_topk", saved_as="jumprelu"),
        row("kron", "kronecker-batch_topk", saved_as="jumprelu"),
    ]
    assert [text for text, _ in column("architecture", given)] == [
        "dense-jumprelu",
        "dense-batch_topk, saved as jumprelu",
        "kronecker-batch_topk, saved as jumprelu",
        "–",
    ]
    assert [line.name for line in comparison(given).rows[3:]] == ["kron against batch"]


def test_the_verdict_in_words() -> None:
    (verdict,) = verdicts(rows())
    assert verdict == (
        "kron explains 87.00% of the variance, topk 90.00%, both at l0 32.0; CE recovered is 98.50% for kron and "
        "99.00% for topk; kron's encoder has 75% of the parameters of topk's."
    )
    given = rows()
    given[1]["l0"] = 30.0
    assert "at l0 30.0 and 32.0;" in verdicts(given)[0]
    given[1]["explained_variance"] = None
    given[1]["ce_recovered"] = None
    assert verdicts(given) == ("kron's encoder has 75% of the parameters of topk's.",)
    assert verdicts(rows()[:1]) == ()


def test_losses() -> None:
    table = losses(rows())
    assert table is not None
    assert [heading for heading, _ in table.headings] == [
        "CE clean",
        "CE spliced",
        "CE mean",
        "CE zero",
        "KL spliced",
        "KL mean",
        "KL zero",
    ]
    assert [cell.text for cell in table.rows[1].cells] == ["2.0000"] * 7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_what_is_no_number_is_not_ranked(value: float | None) -> None:
    given = rows()
    given[0]["explained_variance"] = value
    assert not any(best for _, best in column("EV", given))
    assert column("EV", given)[2] == ("–", False)
