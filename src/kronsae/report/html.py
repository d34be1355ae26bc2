"""The page: one self-contained HTML file, nothing fetched, everything that was given escaped.

Text reaches the page through Jinja's autoescape alone, after `visible` made control characters harmless. The page
forbids itself all network and every script but its own (Content-Security-Policy with the script's hash).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kronsae.eval.display import visible
from kronsae.report.analysis import ReportData
from kronsae.report.sweeps import SweepPage
from kronsae.support.files import write_text

SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


class Span(NamedTuple):
    """A piece of a context: plain text where ``style`` is empty."""

    text: str
    style: str
    title: str


class Line(NamedTuple):
    """A context as a line around its peak."""

    before: list[Span]
    peak: Span
    after: list[Span]


class Lines(NamedTuple):
    """The contexts of a latent, as `kronsae.eval.ShownLatent` has them."""

    top: list[Line]
    sampled: list[Line]


def render(data: ReportData | SweepPage) -> str:
    """The page as text: ``page.html`` of a run, ``sweep.html`` of a sweep."""
    template = "sweep.html" if isinstance(data, SweepPage) else "page.html"
    script = _resource("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(data=data, css=Markup(_resource("style.css")), script=Markup(script), script_hash=f"sha256-{digest}")
    )


def write(data: ReportData | SweepPage, path: Path | str) -> Path:
    """Write the page atomically; return its path."""
    write_text(Path(path), render(data))
    return Path(path)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kronsae.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"lines": lines_of, "peaks": peak_tokens, "share": share, "visible": visible}
    environment.globals |= {"strongest": strongest}
    return environment


def _resource(name: str) -> str:
    return (files("kronsae.report") / name).read_text(encoding="utf-8")


def lines_of(shown: Mapping[str, Any]) -> Lines:
    """A shown latent, base or extension (JSON values of `kronsae.eval`) as lines, shaded on scales of its own."""
    top, sampled = shown["top"], shown.get("sampled", [])
    highest = [
        max((value for context in (*top, *sampled) for value in context[key]), default=0.0)
        for key in ("values", "base", "extension")
    ]
    highest[0] = max(highest[0], shown["max_activation"])
    return Lines([_line(context, highest) for context in top], [_line(context, highest) for context in sampled])


def _line(context: Mapping[str, Any], highest: Sequence[float]) -> Line:
    tokens = context["tokens"]
    columns = [context[key] or [0.0] * len(tokens) for key in ("values", "base", "extension")]
    spans = []
    for token, *values in zip(tokens, *columns, strict=True):
        levels = [(name, value / high) for name, value, high in zip("vbe", values, highest, strict=True) if value > 0]
        style = ";".join(f"--{name}:{level:.2g}" for name, level in levels)
        spans.append(Span(_shown(token), style, _explained(*values, has_parents=bool(context["base"]))))
    peak = int(context["peak"])
    return Line(_joined(spans[:peak]), spans[peak], _joined(spans[peak + 1 :]))


def peak_tokens(contexts: Sequence[Mapping[str, Any]], most: int = 3) -> list[str]:
    """The different tokens at the peaks, the strongest first: a name for a latent, for want of a better one."""
    found = dict.fromkeys(
        (_shown(context["tokens"][context["peak"]]).strip() or "␣") for context in contexts if context["tokens"]
    )
    return list(found)[:most]


def strongest(head: Mapping[str, Any]) -> int:
    """The place of a head's most frequent cell: the one to show first."""
    frequencies = [cell["frequency"] for cell in head["cells"]]
    return frequencies.index(max(frequencies))


def share(value: float) -> str:
    """A share as a percentage with two significant digits."""
    percent = 100 * value
    return f"{percent:.0f}%" if percent >= 10 else f"{percent:.2g}%" if percent >= 0.01 or percent == 0 else "<0.01%"


def _joined(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for span in spans:
        if joined and not span.style and not joined[-1].style:
            joined[-1] = Span(joined[-1].text + span.text, "", "")
        else:
            joined.append(span if span.style else Span(span.text, "", ""))
    return joined


def _explained(value: float, base: float, extension: float, *, has_parents: bool) -> str:
    if not has_parents:
        return f"{value:.3g}"
    parents = f"base {base:.3g}, extension {extension:.3g}"
    if value == 0 and base > 0 and extension > 0:
        return f"0: not among the largest ({parents})"
    return f"{value:.3g} ({parents})"


def _shown(token: str) -> str:
    """A token on one line: runs of three spaces and more, the indentation of code, as ``␣₈``."""
    return re.sub(" {3,}", lambda run: f"␣{str(len(run[0])).translate(SUBSCRIPTS)}", visible(token))
