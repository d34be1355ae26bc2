"""Conversion of a run's files (as plain data) to the content of its page: formatted metrics, comparisons, sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kronsae.eval.display import visible, visible_lines
from kronsae.report.charts import Chart, Series
from kronsae.report.comparison import Row, Table, beside, comparison, entry, hooks, is_figure, losses, notes, verdicts
from kronsae.report.section import Section
from kronsae.report.sections import sections

BINS_PER_DECADE = 4
MAX_POINTS = 300  # per curve


@dataclass(frozen=True)
class SAELatents:
    """The shown latents of one SAE: its `kronsae.eval.Gallery` as JSON values, and a summary of its statistics."""

    name: str
    series: int
    summary: str
    gallery: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The content of the page; text is unescaped, because the template escapes it."""

    title: str
    verdict: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    table: Table
    losses: Table | None
    notes: tuple[str, ...]
    curves: tuple[Chart, ...]
    density: Chart | None
    saes: tuple[SAELatents, ...]
    sections: tuple[Section, ...]
    config: str


def report_data(
    *,
    run: Mapping[str, Any],
    rows: Sequence[Row],
    pursued: Sequence[Row] = (),
    metrics: Iterable[Row] = (),
    latents: Mapping[str, Mapping[str, Any]] | None = None,
    measures: Mapping[str, Mapping[str, Any]] | None = None,
    title: str = "",
) -> ReportData:
    """Build the content of a run's page.

    Args:
        run: contents of ``run.json``: ``{"kronsae_version", "config"}``, and ``imported`` for SAEs trained elsewhere.
        rows: rows of ``evaluation.json``, one per SAE: metrics by name; a missing metric or None shows as a dash.
        pursued: rows of the same SAEs encoded with a pursuit, ``<name> + pursuit``, for the tables.
        metrics: the lines of ``metrics.jsonl``.
        latents: `kronsae.eval.Evaluation.latents` by SAE: ``{"statistics", "gallery"}``.
        measures: stored results of `kronsae.measures` by name; each becomes a section.
        title: title of the page; if empty, made from the model and the hook.
    """
    config = run.get("config", {})
    names = tuple(visible(str(row["name"])) for row in rows)
    model, hook = visible(str(entry(config, "model", "name"))), _hooks(config, rows)
    latents = latents or {}
    shown = beside(rows, pursued)
    saes = [
        SAELatents(name, number, _density_summary(latents[str(row["name"])]), latents[str(row["name"])]["gallery"])
        for number, (name, row) in enumerate(zip(names, rows, strict=True))
        if str(row["name"]) in latents
    ]
    return ReportData(
        title=visible(title) or f"Sparse autoencoders on {hook} of {model}",
        verdict=verdicts(rows),
        facts=_facts(run, rows),
        names=names,
        table=comparison(shown),
        losses=losses(shown),
        notes=notes(rows),
        curves=_curves([str(row["name"]) for row in rows], list(metrics)),
        density=_density(rows, latents),
        saes=tuple(saes),
        sections=sections({} if measures is None else measures, [str(row["name"]) for row in rows]),
        config=visible_lines(json.dumps(run, indent=2, ensure_ascii=False)),
    )


def _hooks(config: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the distinct hooks of the SAEs; if the rows have none, the run's hook."""
    return ", ".join(filter(None, dict.fromkeys(map(hooks, rows)))) or visible(str(config.get("hook", "?")))


def _facts(run: Mapping[str, Any], rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    config = run.get("config", {})
    loop = config.get("loop", {})
    revision = entry(config, "model", "revision")
    imported = "; ".join(
        f"{entry(about, 'source')} ({entry(about, 'format')})" for about in (run.get("imported") or {}).values()
    )
    remarks = [remark for about in (run.get("imported") or {}).values() for remark in about.get("remarks") or ()]
    tokens = {row["tokens"] for row in rows if row.get("tokens") is not None}  # if they differ, they are in the table
    found = [
        ("model", str(entry(config, "model", "name")) + (f" @ {revision}" if revision not in (None, "?") else "")),
        ("hook", _hooks(config, rows)),
        ("width (d_in)", ", ".join(dict.fromkeys(str(row["d_in"]) for row in rows if row.get("d_in"))) or None),
        ("text", entry(config, "text", "source")),
        ("context", _unit(config.get("context_length"), "tokens")),
        ("trained on", _unit(tokens.pop(), "tokens") if len(tokens) == 1 else None),
        ("batch", None if imported else _unit(loop.get("batch_tokens"), "tokens")),
        ("imported from", imported),
        ("note", " ".join(map(str, remarks))),
        ("evaluated on", _unit(next((row.get("evaluation_tokens") for row in rows), None), "held-out tokens")),
        ("seed", None if imported else config.get("seed")),
        ("kronsae", run.get("kronsae_version")),
    ]
    return tuple((name, visible(str(value))) for name, value in found if value not in (None, "?", ""))


def _unit(value: Any, unit: str) -> str | None:
    return f"{value:,} {unit}" if isinstance(value, int) else None


# --- curves and histograms --------------------------------------------------------------------------------------


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


_CURVES: tuple[tuple[str, str, str, Callable[[float], str], str], ...] = (
    ("explained_variance", "Explained variance", "on the training batch", "{:.4f}".format, ""),
    ("loss", "Loss", "‖x − x̂‖² summed over d_in, with AuxK; log scale", _figure, "log"),
    ("l0", "l0", "active latents per token", "{:.2f}".format, "from zero"),
    ("dead_share", "Dead share", "share of dead latents, as defined in training", "{:.2%}".format, "from zero"),
)


def _curves(names: Sequence[str], metrics: Sequence[Row]) -> tuple[Chart, ...]:
    charts = []
    for key, title, about, text, scale in _CURVES:
        log = scale == "log"
        series = []
        for number, name in enumerate(names):
            points = [
                (float(line["tokens"]), float(line[key]))
                for line in metrics
                if line.get("sae") == name and is_figure(line, key) and (not log or line[key] > 0)
            ]
            if points:
                series.append(Series(visible(name), number, _thinned(points)))
        if series:
            charts.append(
                Chart(
                    key=key,
                    title=title,
                    about=about,
                    x_label="tokens",
                    series=tuple(series),
                    text=text,
                    percent=key == "dead_share",
                    log_y=log,
                    from_zero=scale == "from zero",
                )
            )
    return tuple(charts)


def _thinned(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Return at most `MAX_POINTS` points, evenly spaced by index and including the last."""
    step = math.ceil(len(points) / MAX_POINTS)
    return tuple(points[::-step][::-1])


def _density(rows: Sequence[Row], latents: Mapping[str, Mapping[str, Any]]) -> Chart | None:
    shares: dict[str, list[float]] = {}
    for row in rows:
        if (found := latents.get(str(row["name"]))) is not None:
            tokens = found["statistics"]["tokens"]
            shares[str(row["name"])] = [count / tokens for count in found["statistics"]["active_tokens"]]
    logs = {name: [math.log10(share) for share in values if share > 0] for name, values in shares.items()}
    everything = [value for values in logs.values() for value in values]
    if not everything:
        return None
    low = math.floor(min(everything) * BINS_PER_DECADE)
    high = max(low + 1, math.ceil(max(everything) * BINS_PER_DECADE))
    series = []
    for number, row in enumerate(rows):
        name = str(row["name"])
        if name not in shares:
            continue
        counts = [0] * (high - low)
        for value in logs[name]:
            counts[min(math.floor(value * BINS_PER_DECADE) - low, len(counts) - 1)] += 1
        points = [((low + place) / BINS_PER_DECADE, count / len(shares[name])) for place, count in enumerate(counts)]
        series.append(Series(visible(name), number, (*points, (high / BINS_PER_DECADE, points[-1][1]))))
    return Chart(
        key="density",
        title="Activation frequency of latents",
        about="share of latents by the share of tokens on which they are active; dead latents are not shown",
        x_label="share of tokens, log scale",
        series=tuple(series),
        text="{:.2%}".format,
        percent=True,
        steps=True,
        from_zero=True,
    )


def _density_summary(latents: Mapping[str, Any]) -> str:
    statistics = latents["statistics"]
    counts, tokens = statistics["active_tokens"], statistics["tokens"]
    living = sorted(count for count in counts if count)
    if not living:
        return f"None of {len(counts):,} latents was active on {tokens:,} tokens."
    median, frequent = living[len(living) // 2] / tokens, sum(count > tokens / 10 for count in counts)
    return (
        f"{len(living):,} of {len(counts):,} latents were active on at least one of {tokens:,} held-out tokens. Their "
        f"median frequency is {median:.2%} of tokens; {frequent:,} were active on more than 10%."
    )
