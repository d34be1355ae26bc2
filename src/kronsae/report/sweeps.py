"""Conversion of a sweep's rows (as plain data) to its page: means over seeds, the paper's plots, one table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kronsae.eval.display import visible
from kronsae.report.charts import Chart, Series, si
from kronsae.report.comparison import Cell, Row, Table, TableRow, is_figure

COLOURS = 10
FIGURES: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("explained_variance", "EV", "explained variance on the held-out tokens", "{:.4f}".format),
    ("l0", "l0", "active latents per token, mean", "{:.2f}".format),
    ("dead_share", "dead share", "share of the latents active on none of the held-out tokens", "{:.1%}".format),
    ("ce_recovered", "CE recovered", "(CE zeroed − CE spliced) / (CE zeroed − CE clean)", "{:.4f}".format),
    ("kl_recovered", "KL recovered", "1 − KL(clean ‖ spliced) / KL(clean ‖ zeroed)", "{:.4f}".format),
    ("tokens", "tokens", "trained on", "{:,.0f}".format),
    ("training_flops", "training FLOPs", "calculated, not measured", "{:.2e}".format),
    ("seconds", "seconds", "time of its training steps on this machine", "{:,.0f}".format),
)
"""Key, heading, explanation and formatter of each metric of the table."""


@dataclass(frozen=True)
class Summary:
    """A metric over the seeds: mean, standard deviation (n - 1 in the denominator; 0 for n = 1), and n."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Means of one SAE of the grid over its seeds.

    Args:
        name: name of the SAE, as in the rows.
        settings: settings given for it by name, including its ``kind``.
        figures: metrics that all seeds have, over the seeds that did not diverge.
        seeds: number of seeds that did not diverge.
        diverged: number of seeds that diverged.
    """

    name: str
    settings: Mapping[str, Any]
    figures: Mapping[str, Summary]
    seeds: int
    diverged: int


@dataclass(frozen=True)
class Plot:
    """A chart and its explanation."""

    chart: Chart
    about: str


@dataclass(frozen=True, kw_only=True)
class SweepPage:
    """The content of the page; text is unescaped, because the template escapes it."""

    title: str
    facts: tuple[tuple[str, str], ...]
    plots: tuple[Plot, ...]
    table: Table
    notes: tuple[str, ...]
    config: str


def sweep_page(
    *,
    rows: Sequence[Row],
    settings: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
) -> SweepPage:
    """Build the content of a sweep's page.

    Args:
        rows: one row per SAE and seed, with at least ``name``, ``seed``, ``num_heads`` and the metrics. A row that
            diverged has a sentence under ``diverged`` and is in no mean.
        settings: by SAE name, the settings given for it; ``kind`` is its name without the settings that vary.
        facts: facts shown at the top.
        config: the sweep's config, shown at the end.
    """
    means = summaries(rows, settings)
    shown = {name: value for name, value in facts.items() if value is not None}
    return SweepPage(
        title="Sweep of sparse autoencoders",
        facts=tuple((name, visible(str(value))) for name, value in shown.items()),
        plots=tuple(plot for plot in (_by_heads(means), _by_l0(means), _by_flops(means)) if plot is not None),
        table=mean_table(means),
        notes=(*(visible(line) for line in divergences(rows)), *_notes(means)),
        config="\n".join(visible(line) for line in json.dumps(config, indent=2, ensure_ascii=False).split("\n")),
    )


def summaries(rows: Sequence[Row], settings: Mapping[str, Mapping[str, Any]]) -> list[Mean]:
    """Return the means over seeds for each name, in the order of the rows."""
    found = []
    for name in dict.fromkeys(str(row["name"]) for row in rows):
        alike = [row for row in rows if row["name"] == name]
        own = [row for row in alike if not row.get("diverged")]
        names = own[0] if own else {}
        keys = [key for key in names if all(is_figure(row, key) and not isinstance(row[key], bool) for row in own)]
        figures = {key: summary([float(row[key]) for row in own]) for key in keys}
        lost = len(alike) - len(own)
        found.append(Mean(name=name, settings=settings[name], figures=figures, seeds=len(own), diverged=lost))
    return found


def divergences(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each row whose training diverged."""
    return [f"Seed {row['seed']}: {row['diverged']}" for row in rows if row.get("diverged")]


def summary(values: Sequence[float]) -> Summary:
    """Return mean, standard deviation and number of values."""
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


# --- plots --------------------------------------------------------------------------------------------------------


def _by_heads(means: Sequence[Mean]) -> Plot | None:
    """Plot EV against h for each m (paper, figure 3)."""
    with_heads = [mean for mean in means if "num_heads" in mean.figures]
    return _plot(
        with_heads,
        key="heads",
        title="EV against heads, by base size",
        x_key="num_heads",
        follow=("num_heads", "d_sae", "d_extension"),
        x_label="heads h, log scale",
        x_text="h = {:,.0f}".format,
    )


def _by_l0(means: Sequence[Mean]) -> Plot | None:
    return _plot(
        means,
        key="l0",
        title="EV against l0",
        x_key="l0",
        follow=("k",),
        x_label="l0 on held-out tokens, log scale",
        x_text="l0 {:.1f}".format,
    )


def _by_flops(means: Sequence[Mean]) -> Plot | None:
    return _plot(
        means,
        key="flops",
        title="EV against the budget",
        x_key="training_flops",
        follow=("tokens", "flops", "loop.tokens", "loop.flops"),
        x_label="training FLOPs, log scale",
        x_text="{:.2e} FLOPs".format,
    )


def _plot(
    means: Sequence[Mean],
    *,
    key: str,
    title: str,
    x_key: str,
    follow: tuple[str, ...],
    x_label: str,
    x_text: Callable[[float], str],
) -> Plot | None:
    """Plot EV over ``x_key``, with one curve per combination of the varying settings except ``follow``.

    ``follow`` are the settings that x depends on. If a curve would have two values at the same x, it is split by all of
    these settings but the first. Returns None if x does not vary.
    """
    usable = [mean for mean in means if {x_key, "explained_variance"} <= mean.figures.keys()]
    usable = [mean for mean in usable if mean.figures[x_key].mean > 0]
    varies = x_key == follow[0] or any(name in varying_settings(usable) for name in follow)
    if not varies or len({mean.figures[x_key].mean for mean in usable}) < 2:
        return None
    apart: list[str] = []
    curves = _curves(usable, follow)
    for name in follow[1:]:
        if any(_doubled(curve, x_key) for curve in curves.values()):
            apart.append(name)
            curves = _curves(usable, [other for other in follow if other not in apart])
    series = []
    for number, (label, curve) in enumerate(curves.items()):
        ordered = sorted(curve, key=lambda mean: mean.figures[x_key].mean)
        values = [mean.figures["explained_variance"] for mean in ordered]
        points = tuple((mean.figures[x_key].mean, ev.mean) for mean, ev in zip(ordered, values, strict=True))
        spread = tuple(ev.std for ev in values) if all(ev.n > 1 for ev in values) else ()
        series.append(Series(visible(label), number % COLOURS, points, spread))
    chart = Chart(
        key=key,
        title=title,
        about="explained variance on held-out tokens",
        x_label=x_label,
        series=tuple(series),
        text="{:.4f}".format,
        log_x=True,
        dots=True,
        x_text=x_text,
    )
    counts = sorted({mean.figures["explained_variance"].n for mean in usable})
    seeds = "one seed, so there are no error bars" if counts == [1] else "bars: one standard deviation over the seeds"
    return Plot(chart, f"Each dot is the mean over n = {', '.join(map(str, counts))}; {seeds}.")


def varying_settings(means: Sequence[Mean]) -> list[str]:
    """Return the settings that differ between the SAEs, ``kind`` first."""
    names = dict.fromkeys(["kind", *(name for mean in means for name in mean.settings)])
    return [name for name in names if len({repr(mean.settings.get(name)) for mean in means}) > 1]


def _curves(means: Sequence[Mean], follow: Sequence[str]) -> dict[str, list[Mean]]:
    """Group the SAEs into curves by kind and by the settings that vary within it, except ``follow``."""
    found: dict[str, list[Mean]] = {}
    for kind in dict.fromkeys(str(mean.settings["kind"]) for mean in means):
        alike = [mean for mean in means if mean.settings["kind"] == kind]
        names = [name for name in varying_settings(alike) if name not in follow]
        for mean in alike:
            parts = [f"{name} {mean.settings[name]}" for name in names if name in mean.settings]
            found.setdefault(", ".join([kind, *parts]), []).append(mean)
    return found


def _doubled(curve: Sequence[Mean], x_key: str) -> bool:
    return len({mean.figures[x_key].mean for mean in curve}) < len(curve)


# --- table --------------------------------------------------------------------------------------------------------


def mean_table(means: Sequence[Mean]) -> Table:
    """Build the table of each SAE's varying settings and its metrics with their spread."""
    axes = [name for name in varying_settings(means) if name != "kind"]
    keys = [figure for figure in FIGURES if any(figure[0] in mean.figures for mean in means)]
    headings = tuple((name, "setting") for name in axes)
    headings = (*headings, *((heading, about) for _, heading, about, _ in keys), ("seeds", "n"))
    lost = any(mean.diverged for mean in means)
    if lost:
        headings = (*headings, ("diverged", "seeds whose training diverged; not included in the means"))
    rows = []
    for mean in means:
        cells = [Cell(visible(str(mean.settings.get(name, "–")))) for name in axes]
        cells += [Cell(format_summary(mean.figures.get(key), text)) for key, _, _, text in keys]
        cells += [Cell(str(count)) for count in ((mean.seeds, mean.diverged) if lost else (mean.seeds,))]
        rows.append(TableRow(visible(mean.name), tuple(cells)))
    return Table(headings, tuple(rows))


def format_summary(found: Summary | None, text: Callable[[float], str]) -> str:
    """Format as ``0.8123 ± 0.0010``; no spread if it is displayed as 0 or there is one seed; a dash for None."""
    if found is None:
        return "–"
    shown, spread = text(found.mean), text(found.std)
    return shown if found.n == 1 or spread == text(0.0) else f"{shown} ± {spread}"


def _notes(means: Sequence[Mean]) -> tuple[str, ...]:
    found = ["± is one standard deviation over the seeds (n − 1 in the denominator)."]
    if all(mean.seeds + mean.diverged == 1 for mean in means):
        found = ["Each SAE was trained with one seed. Small differences may be due to the seed; use --seeds 3."]
    sizes = sorted({size.mean for mean in means if (size := mean.figures.get("evaluation_tokens")) is not None})
    if sizes:
        found.append(f"Dead latents are active on none of {', '.join(si(size) for size in sizes)} held-out tokens.")
    levels = [level.mean for mean in means if (level := mean.figures.get("l0")) is not None]
    if {"hook", "read", "write"} & {*varying_settings(means)}:
        found.append("Do not rank SAEs of different hooks by EV: they reconstruct different activations.")
    if levels and max(levels) - min(levels) > 0.02 * max(levels):
        found.append("Do not rank SAEs of different l0 by EV: reconstruction improves with l0.")
    return tuple(found)
