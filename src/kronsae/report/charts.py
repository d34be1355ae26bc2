"""Line and step charts as SVG text. They need no script; the page's script adds a display of values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40
SETTLED = 0.05  # this initial share of a curve is ignored for the y scale, because it would flatten the rest


@dataclass(frozen=True)
class Series:
    """A named curve; ``number`` selects its colour; points are ordered by x.

    ``spread`` is the standard deviation at each point, drawn as an error bar; no bars if it is empty.
    """

    name: str
    number: int
    points: tuple[tuple[float, float], ...]
    spread: tuple[float, ...] = ()

    def with_spread(self) -> list[tuple[float, float, float]]:
        """Return the points that have a spread, as (x, y, spread)."""
        pairs = zip(self.points, self.spread, strict=bool(self.spread))
        return [(x, y, spread) for (x, y), spread in pairs]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Several curves over a shared x axis.

    Args:
        key: identifier of the chart, unique within its page.
        title, about, x_label: heading, description and label of the x axis.
        series: the curves, each with at least one point.
        text: formats a value; ``percent``: the y axis is labelled in percent.
        log_y: logarithmic y axis (all values above 0).
        log_x: logarithmic x axis (all x above 0).
        dots: points are separate measurements: each is marked, and all of them determine the scale.
        x_text: formats an x value.
        steps: a histogram: each value holds until the next x, and x is log10 of a share.
        from_zero: whether the y axis always includes 0.
    """

    key: str
    title: str
    about: str
    x_label: str
    series: tuple[Series, ...]
    text: Callable[[float], str]
    percent: bool = False
    log_y: bool = False
    log_x: bool = False
    dots: bool = False
    steps: bool = False
    from_zero: bool = False
    x_text: Callable[[float], str] = lambda x: f"{si(x)} tokens"

    @property
    def scale(self) -> Scale:
        """Return the mapping from values to SVG coordinates."""
        xs = [math.log10(x) if self.log_x else x for series in self.series for x, _ in series.points]
        start, end = min(xs), max(xs)
        settled = start + SETTLED * (end - start)
        everything = self.steps or self.dots
        ys = [y for series in self.series for x, y in series.points if everything or x >= settled]
        ys += [y + side * each for series in self.series for _, y, each in series.with_spread() for side in (-1, 1)]
        low, high = min(ys), max(ys)
        if self.from_zero:
            low = min(low, 0.0)
        if self.log_y:
            low, high = math.log10(low), math.log10(high)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        floor = low if self.from_zero and low == 0 else low - room
        margin = 0.04 * (end - start) if self.dots else 0.0  # keeps dots at the edge from being clipped
        return Scale(
            start - margin,
            end + margin if end > start else start + 1,
            floor,
            high + room,
            self.log_y,
            self.log_x,
        )

    def data(self) -> dict[str, Any]:
        """Return the data that the script needs to show values at the pointer."""
        scale = self.scale
        return {
            "steps": self.steps,
            "series": [
                {
                    "name": series.name,
                    "number": series.number,
                    "x": [round(scale.x(x), 1) for x, _ in series.points],
                    "y": [round(scale.y(y), 1) for _, y in series.points],
                    "at": [self._place(series, place) for place in range(len(series.points))],
                    "text": [self.text(y) for _, y in series.points],
                }
                for series in self.series
            ],
        }

    def _place(self, series: Series, place: int) -> str:
        x = series.points[place][0]
        if not self.steps:
            return self.x_text(x)
        end = series.points[min(place + 1, len(series.points) - 1)][0]
        return f"{10**x:.2g} to {10**end:.2g} of tokens"

    def svg(self) -> Markup:
        """Return the chart as an ``<svg>`` element."""
        scale = self.scale
        parts = [
            Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
                WIDTH, HEIGHT, f"{self.title}, {self.about}; {self._values_as_text()}"
            ),
            Markup('<clipPath id="clip-{}"><rect x="{}" y="{}" width="{}" height="{}"/></clipPath>').format(
                self.key, LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
            ),
            *self._grid(scale),
            Markup('<g clip-path="url(#clip-{})">').format(self.key),
            *(part for series in self.series for part in self._curve(series, scale)),
            Markup('</g><line class="cursor" y1="{}" y2="{}"/></svg>').format(TOP, HEIGHT - BOTTOM),
        ]
        return Markup("\n").join(parts)

    def _values_as_text(self) -> str:
        return ", ".join(
            f"{series.name} {'at most' if self.steps else 'ends at'} "
            + self.text(max(y for _, y in series.points) if self.steps else series.points[-1][1])
            for series in self.series
        )

    def _grid(self, scale: Scale) -> list[Markup]:
        base = HEIGHT - BOTTOM
        parts = []
        for value in _log_ticks(scale.low, scale.high) if self.log_y else _ticks(scale.low, scale.high):
            y = scale.y(10**value if self.log_y else value)
            label = si(10**value) if self.log_y else _short(value, percent=self.percent)
            parts.append(
                Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y, y)
            )
            parts.append(Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 7, y + 4, label))
        for value, label in self._x_labels(scale):
            x = scale.x(value)
            parts.append(
                Markup('<line class="tick" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(x, x, base, base + 4)
            )
            parts.append(Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x, base + 17, label))
        parts.append(
            Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, base, base)
        )
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                middle, HEIGHT - 6, self.x_label
            )
        )
        return parts

    def _x_labels(self, scale: Scale) -> list[tuple[float, str]]:
        if self.steps:
            return [(float(n), _share(n)) for n in range(math.ceil(scale.start), math.floor(scale.end) + 1)]
        if self.log_x:
            return [(10**tick, si(10**tick)) for tick in _log_ticks(scale.start, scale.end)]
        return [(value, si(value)) for value in _ticks(scale.start, scale.end)]

    def _curve(self, series: Series, scale: Scale) -> list[Markup]:
        places = [(scale.x(x), scale.y(y)) for x, y in series.points]
        commands = [f"M{places[0][0]:.1f},{places[0][1]:.1f}"]
        for (_, before), (x, y) in itertools.pairwise(places):
            commands.append(f"L{x:.1f},{before:.1f}L{x:.1f},{y:.1f}" if self.steps else f"L{x:.1f},{y:.1f}")
        path = "".join(commands)
        parts = []
        if self.steps:
            base = HEIGHT - BOTTOM
            area = f"M{places[0][0]:.1f},{base}L{path[1:]}L{places[-1][0]:.1f},{base}Z"
            parts.append(Markup('<path class="area s{}" d="{}"/>').format(series.number, area))
        parts.append(Markup('<path class="curve s{}" d="{}"/>').format(series.number, path))
        for x, y, spread in series.with_spread():
            ends = scale.x(x), scale.y(y - spread), scale.y(y + spread)
            bar = Markup('<path class="curve s{}" d="M{:.1f},{:.1f}V{:.1f}"/>')
            parts.append(bar.format(series.number, *ends))
        for place in places if self.dots or len(places) == 1 else []:
            parts.append(Markup('<circle class="s{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(series.number, *place))
        return parts


@dataclass(frozen=True)
class Scale:
    """Linear map from ``start..end``, ``low..high`` to SVG coordinates; of log10 y if ``log``, log10 x if ``log_x``."""

    start: float
    end: float
    low: float
    high: float
    log: bool
    log_x: bool = False

    def x(self, value: float) -> float:
        """Horizontal place."""
        along = (math.log10(value) if self.log_x else value) - self.start
        return LEFT + (WIDTH - LEFT - RIGHT) * along / (self.end - self.start)

    def y(self, value: float) -> float:
        """Return the vertical coordinate, clamped to ten chart heights to avoid extreme coordinates."""
        level = (math.log10(value) if self.log else value) - self.low
        share = max(-10.0, min(10.0, level / (self.high - self.low)))
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def si(value: float) -> str:
    """Format a count with an SI suffix: ``1.5M``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return about ``wanted`` round values between ``low`` and ``high``."""
    step = 10 ** math.floor(math.log10((high - low) / wanted))
    step *= min((m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= wanted), default=10)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return log10 of round values: 1, 2 and 5 times powers of ten, or only powers of ten over a long range."""
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    if high - low < 0.5:
        return [math.log10(value) for value in _ticks(10**low, 10**high, 4)]
    decades = range(math.floor(low), math.ceil(high) + 1)
    values = [decade + math.log10(step) for decade in decades for step in steps]
    return [value for value in values if low <= value <= high]


def _short(value: float, *, percent: bool) -> str:
    value = 0.0 if abs(value) < 1e-12 else value
    return f"{100 * value:.3g}%" if percent else si(value) if abs(value) >= 10_000 else f"{value:.4g}"


def _share(exponent: float) -> str:
    return f"{10**exponent:.0%}" if exponent > -2.5 else f"{100 * 10**exponent:.6g}%"
