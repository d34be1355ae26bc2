"""The page of a sweep: means and spreads by hand, curves that hold what belongs together, text that can do no harm."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tests.report.pages import Page

from kronsae.report import render, sweep_page
from kronsae.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Series
from kronsae.report.sweeps import SweepPage, format_summary, summaries, summary


def row(name: str, seed: int, ev: float, **changes: Any) -> dict[str, Any]:
    figures = {
        "l0": 8.0,
        "dead_share": 0.1,
        "ce_recovered": None,
        "tokens": 1000,
        "training_flops": 1e9,
        "seconds": 2.0,
    }
    return (
        {"name": name, "seed": seed, "num_heads": None, "explained_variance": ev, "evaluation_tokens": 500}
        | figures
        | changes
    )


def page_of(rows: list[dict[str, Any]], settings: dict[str, dict[str, Any]]) -> SweepPage:
    return sweep_page(rows=rows, settings=settings, facts={"model": "m", "none": None}, config={"a": 1})


def test_means_and_spreads() -> None:
    found = summary([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.std == pytest.approx((((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2) ** 0.5)
    assert summary([3.0]).std == 0.0
    rows = [row("a", 0, 0.5), row("a", 1, 0.7), row("b", 0, 0.2, l0=float("nan"))]
    a, b = summaries(rows, {"a": {"kind": "a"}, "b": {"kind": "b"}})
    assert a.figures["explained_variance"].mean == pytest.approx(0.6)
    assert a.figures["explained_variance"].n == 2
    assert "ce_recovered" not in a.figures
    assert "l0" not in b.figures


def test_a_seed_that_diverged_is_counted_and_in_no_mean() -> None:
    lost = row("a", 2, 0.1) | dict.fromkeys(("explained_variance", "l0", "evaluation_tokens")) | {"diverged": "<b> is"}
    rows = [lost, row("a", 0, 0.5), row("a", 1, 0.7), lost | {"name": "b"}]
    settings = {"a": {"kind": "a"}, "b": {"kind": "b"}}
    a, b = summaries(rows, settings)
    assert a.figures["explained_variance"].mean == pytest.approx(0.6)
    assert a.figures["l0"].n == 2
    assert (a.seeds, a.diverged, b.seeds, b.diverged, b.figures) == (2, 1, 0, 1, {})
    page = page_of(rows, settings)
    assert [heading for heading, _ in page.table.headings][-2:] == ["seeds", "diverged"]
    assert [[cell.text for cell in shown.cells[-2:]] for shown in page.table.rows] == [["2", "1"], ["0", "1"]]
    assert page.notes[:2] == ("Seed 2: <b> is",) * 2
    assert "Seed 2: &lt;b&gt; is" in render(page)
    assert "diverged" not in [heading for heading, _ in page_of(rows[1:3], settings).table.headings]


def test_a_figure_format_summary() -> None:
    text = "{:.2f}".format
    assert format_summary(summary([0.5, 0.7]), text) == "0.60 ± 0.14"
    assert format_summary(summary([0.5, 0.501]), text) == "0.50"
    assert format_summary(summary([0.5]), text) == "0.50"
    assert format_summary(None, text) == "–"


def settings_of(kind: str, **words: Any) -> dict[str, Any]:
    return {"kind": kind} | words


def curves(found: SweepPage, key: str) -> dict[str, tuple[tuple[float, float], ...]] | None:
    for plot in found.plots:
        if plot.chart.key == key:
            return {series.name: series.points for series in plot.chart.series}
    return None


def test_heads_by_base_size() -> None:
    """At a fixed width the heads follow from m and n: n runs along a curve, m tells curves apart."""
    rows, settings = [], {}
    for m in (1, 2):
        for n in (4, 8):
            name = f"kron-d_base{m}-d_extension{n}"
            settings[name] = settings_of("kron", d_base=m, d_extension=n, d_sae=64)
            rows += [row(name, seed, m + n / 100, num_heads=64 // (m * n)) for seed in (0, 1)]
    rows.append(row("topk", 0, 0.5))
    settings["topk"] = settings_of("topk", d_sae=64)
    found = page_of(rows, settings)
    assert curves(found, "heads") == {
        "kron, d_base 1": ((8.0, 1.08), (16.0, 1.04)),
        "kron, d_base 2": ((4.0, 2.08), (8.0, 2.04)),
    }
    assert curves(found, "l0") is None
    assert curves(found, "flops") is None


def test_heads_of_two_widths_are_two_curves_where_they_meet() -> None:
    rows, settings = [], {}
    for n, d_sae in ((4, 64), (8, 128), (4, 128)):
        name = f"kron-{n}-{d_sae}"
        settings[name] = settings_of("kron", d_base=2, d_extension=n, d_sae=d_sae)
        rows.append(row(name, 0, n / 10, num_heads=d_sae // (2 * n)))
    found = curves(page_of(rows, settings), "heads")
    assert found == {"kron, d_sae 64": ((8.0, 0.4),), "kron, d_sae 128": ((8.0, 0.8), (16.0, 0.4))}


def test_l0_and_budget() -> None:
    rows, settings = [], {}
    for k in (8, 16):
        for tokens in (1000, 2000):
            name = f"topk-k{k}-tokens{tokens}"
            settings[name] = settings_of("topk", k=k, tokens=tokens)
            rows.append(row(name, 0, k + tokens, l0=float(k), training_flops=tokens * 1e6))
    found = page_of(rows, settings)
    assert curves(found, "l0") == {
        "topk, tokens 1000": ((8.0, 1008), (16.0, 1016)),
        "topk, tokens 2000": ((8.0, 2008), (16.0, 2016)),
    }
    budget = curves(found, "flops")
    assert budget is not None
    assert list(budget) == ["topk, k 8", "topk, k 16"]
    assert [x for x, _ in budget["topk, k 8"]] == [1e9, 2e9]
    assert "one seed, so there are no error bars" in found.plots[0].about


def test_an_l0_that_only_drifts_is_no_axis() -> None:
    rows = [row("a", 0, 0.5, l0=8.0), row("b", 0, 0.6, l0=8.1)]
    assert page_of(rows, {"a": settings_of("a", k=8), "b": settings_of("b", k=8)}).plots == ()


def test_the_table_shows_what_varies() -> None:
    rows = [row("topk-k8", seed, 0.5 + seed / 10) for seed in (0, 1)] + [row("topk-k16", 0, 0.7, l0=16.0)]
    settings = {"topk-k8": settings_of("topk", k=8, lr=1e-3), "topk-k16": settings_of("topk", k=16, lr=1e-3)}
    table = page_of(rows, settings).table
    headings = [heading for heading, _ in table.headings]
    assert headings[:4] == ["k", "EV", "l0", "dead share"]
    assert headings[-1] == "seeds"
    assert "CE recovered" not in headings
    assert [cell.text for cell in table.rows[0].cells][:2] == ["8", "0.5500 ± 0.0707"]
    assert [found.cells[-1].text for found in table.rows] == ["2", "1"]


def test_text_can_do_no_harm() -> None:
    evil = "<script>alert(1)</script>"
    rows = [row(evil, seed, 0.5, l0=8.0) for seed in (0, 1)] + [row("b", 0, 0.6, l0=16.0)]
    settings = {evil: settings_of(evil, k=evil), "b": settings_of("b", k=16)}
    text = render(sweep_page(rows=rows, settings=settings, facts={evil: evil}, config={evil: evil}))
    assert evil not in text
    page = Page(text.removeprefix("<!DOCTYPE html>"))
    assert len(page.all("script")) == 2  # the page's own, and one chart's data
    assert len(page.all("svg")) == 1


def test_dots_bars_and_a_logarithmic_axis() -> None:
    series = (Series("a", 0, ((1.0, 0.5), (10.0, 0.6), (100.0, 0.7)), (0.1, 0.1, 0.1)),)
    chart = Chart(
        key="k",
        title="t",
        about="a",
        x_label="x",
        series=series,
        text="{:.1f}".format,
        dots=True,
        log_x=True,
        x_text="{:.0f} heads".format,
    )
    svg = str(chart.svg())
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle class="s0" cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert len(dots) == 3
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2)
    assert all(LEFT < x < WIDTH - RIGHT and TOP < y < HEIGHT - BOTTOM for x, y in dots)
    bars = re.findall(r'class="curve s0" d="M[\d.]+,([\d.]+)V([\d.]+)"', svg)
    for (_, y), (low, high) in zip(dots, bars, strict=True):
        assert float(low) - y == pytest.approx(y - float(high), abs=0.2)
        assert float(low) < HEIGHT - BOTTOM
    assert chart.data()["series"][0]["at"] == ["1 heads", "10 heads", "100 heads"]


def test_saes_of_different_hooks_are_not_ranked() -> None:
    rows = [row("a", 0, 0.5), row("b", 0, 0.7)]
    warning = "Do not rank SAEs of different hooks by EV: they reconstruct different activations."
    alike = page_of(rows, {"a": settings_of("topk", k=1), "b": settings_of("topk", k=2)})
    apart = page_of(rows, {"a": settings_of("topk"), "b": settings_of("topk", read="layers.1")})
    assert warning not in alike.notes
    assert warning in apart.notes
