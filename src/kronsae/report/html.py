"""Rendering of the page: one self-contained HTML file that fetches nothing and escapes all input.

All text passes through Jinja's autoescape, after `visible` has replaced control characters. The page's
Content-Security-Policy forbids network access and any script other than its own (by the script's hash).
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
    """A piece of a context; plain text if ``style`` is empty."""

    text: str
    style: str
    title: str


class Line(NamedTuple):
    """A context as a line of text, split at its peak."""

    before: list[Span]
    peak: Span
    after: list[Span]


class Lines(NamedTuple):
    """The contexts of a latent: top and sampled, as in `kronsae.eval.ShownLatent`."""

    top: list[Line]
    sampled: list[Line]


def render(data: ReportData | SweepPage) -> str:
    """Render the page: template ``page.html`` for a run, ``sweep.html`` for a sweep."""
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
    """Return the contexts of a latent, base or extension (JSON values of `kronsae.eval`) as lines, shaded per unit."""
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
    """Return the distinct tokens at the peaks, strongest first; they serve as a name for the latent."""
    found = dict.fromkeys(
        (_shown(context["tokens"][context["peak"]]).strip() or "␣") for context in contexts if context["tokens"]
    )
    return list(found)[:most]


def strongest(head: Mapping[str, Any]) -> int:
    """Return the index of a head's most frequent cell, which is shown first."""
    frequencies = [cell["frequency"] for cell in head["cells"]]
    return frequencies.index(max(frequencies))


def share(value: float) -> str:
    """Format a share as a percentage with two significant digits."""
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
        return f"0: not kept by the sparsifier ({parents})"
    return f"{value:.3g} ({parents})"


def _shown(token: str) -> str:
    """Return a token for one line of text: runs of at least three spaces (code indentation) become ``␣₈``."""
    return re.sub(" {3,}", lambda run: f"␣{str(len(run[0])).translate(SUBSCRIPTS)}", visible(token))
