from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.report import pages

from kronsae.report import report_data
from kronsae.report.analysis import MAX_POINTS
from kronsae.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Series, si


def chart(points: list[tuple[float, float]], **changes: Any) -> Chart:
    series = (Series("a", 0, tuple(points)),)
    return Chart(key="k", title="t", about="a", x_label="x", series=series, text="{:.3g}".format, **changes)


def path(found: Chart) -> list[tuple[float, float]]:
    match = re.search(r'class="curve s0" d="([^"]*)"', found.svg())
    assert match is not None
    pairs = re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", match[1])
    return [(float(x), float(y)) for x, y in pairs]


def test_a_line_runs_from_edge_to_edge() -> None:
    (x0, y0), (x1, y1) = path(chart([(0, 1), (100, 2)]))
    assert (x0, x1) == (LEFT, WIDTH - RIGHT)
    assert TOP < y1 < HEIGHT - BOTTOM
    assert y1 < y0  # up is more


def test_the_beginning_does_not_set_the_scale() -> None:
    points = [(0.0, -1e6), *((float(x), 0.9 + x / 1e4) for x in range(10, 101))]
    assert chart(points).scale.low > 0.8


def test_zero_is_on_the_scale_where_asked() -> None:
    assert chart([(0, 31.9), (1, 32)], from_zero=True).scale.low == 0
    assert chart([(0, 31.9), (1, 32)]).scale.low > 30


def test_logarithms() -> None:
    found = chart([(0, 1), (1, 10), (2, 100)], log_y=True)
    heights = [y for _, y in path(found)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


@pytest.mark.parametrize("points", [[(5.0, 3.0)], [(0.0, 0.0), (1.0, 0.0)], [(0.0, 7.0), (9.0, 7.0)]])
@pytest.mark.parametrize("from_zero", [True, False])
def test_what_does_not_vary_has_a_chart(points: list[tuple[float, float]], from_zero: bool) -> None:
    found = chart(points, from_zero=from_zero)
    assert all(math.isfinite(part) for pair in path(found) for part in pair)
    assert 'class="grid"' in found.svg()


finite = st.floats(-1e9, 1e9, allow_subnormal=False)


@given(st.lists(finite, min_size=1, max_size=20), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_values(values: list[float], log: bool, from_zero: bool) -> None:
    points = [(float(x), abs(y) + 1e-9 if log else y) for x, y in enumerate(values)]
    found = chart(points, log_y=log, from_zero=from_zero and not log)
    assert "nan" not in found.svg()
    assert all(abs(part) < 20 * WIDTH for pair in path(found) for part in pair)
    assert len(re.findall('class="grid"', found.svg())) < 20
    assert len(found.data()["series"][0]["x"]) == len(values)


def test_density_is_a_histogram_of_living_latents() -> None:
    statistics = {"tokens": 1000, "active_tokens": [0, 0, 1, 10, 10, 100, 1000, 1000]}
    given = {"topk": {"statistics": statistics, "gallery": {"tokens": 1000, "latents": [], "heads": []}}}
    found = report_data(run={}, rows=[pages.row("topk", "dense-topk")], latents=given).density
    assert found is not None
    bins = {round(x, 2): share for x, share in found.series[0].points[:-1] if share}
    assert bins == {-3.0: 1 / 8, -2.0: 2 / 8, -1.0: 1 / 8, -0.25: 2 / 8}  # the last bin holds 100% too
    assert found.series[0].points[-1][0] == 0.0


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    lines = pages.metrics(["topk"], lines=5 * MAX_POINTS + 3)
    found = report_data(run={}, rows=[pages.row("topk", "dense-topk")], metrics=lines)
    for curve in found.curves:
        points = curve.series[0].points
        assert MAX_POINTS / 2 < len(points) <= MAX_POINTS
        assert points[-1][0] == lines[-1]["tokens"]


def test_lines_of_other_saes_and_broken_values_are_left_out() -> None:
    lines = [*pages.metrics(["topk"], 3), {"sae": "topk", "tokens": 9, "loss": None}, {"sae": "gone", "tokens": 1}]
    lines.append({"sae": "topk", "tokens": 10, "loss": 0.0, "explained_variance": float("nan")})
    found = report_data(run={}, rows=[pages.row("topk", "dense-topk")], metrics=lines)
    assert [(curve.key, len(curve.series[0].points)) for curve in found.curves] == [
        ("explained_variance", 3),
        ("loss", 3),
        ("l0", 3),
        ("dead_share", 3),
    ]


def test_counts_in_short() -> None:
    assert [si(value) for value in (0, 5, 1500, 2_000_000, 1.25e9, 3e12)] == ["0", "5", "1.5k", "2M", "1.25B", "3T"]
