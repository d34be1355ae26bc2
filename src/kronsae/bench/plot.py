"""Plot of the grid: step time against hidden width (the paper's figure 8)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kronsae.bench.runs import GridPoint
from kronsae.support.errors import UserError
from kronsae.support.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"kronsae": "KronSAE", "topk": "TopK"}
STYLES = {"kronsae": "-", "topk": "--"}


def plot_grid(points: Sequence[GridPoint], path: Path) -> None:
    """Plot step time against d_in on logarithmic axes: a curve per SAE and dictionary size, quartiles as error bars.

    Raises:
        UserError: matplotlib is not installed, the file's suffix names no format, or no point was measured.
    """
    check_plot(path)
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    measured = [point for point in points if point.timings]
    if not measured:
        raise UserError("plot must have at least one point; none fitted this machine.")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for number, d_sae in enumerate(sorted({point.shape.d_sae for point in measured})):
        of_size = [point for point in measured if point.shape.d_sae == d_sae]
        widths = [point.shape.d_in for point in of_size]
        for subject, name in NAMES.items():
            timings = [point.timings[subject] for point in of_size]
            medians = [timing.median_ms for timing in timings]
            below = [timing.median_ms - timing.low_ms for timing in timings]
            above = [timing.high_ms - timing.median_ms for timing in timings]
            axes.errorbar(
                widths,
                medians,
                yerr=(below, above),
                linestyle=STYLES[subject],
                color=f"C{number}",
                marker="o",
                markersize=4,
                capsize=2,
                label=f"{name}, F = {d_sae:,}",
            )
    batch = measured[0].shape.batch
    axes.set(xscale="log", yscale="log", xlabel="hidden width D", ylabel=f"training step of {batch} tokens, ms")
    axes.set_xticks(sorted({point.shape.d_in for point in measured}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure of matplotlib atomically; an SVG of the same figure has the same bytes."""
    import matplotlib

    with atomic_path(path) as temporary, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kronsae"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)


def check_plot(path: Path) -> None:
    """Raise, before anything is measured, if the plot could not be written."""
    if path.suffix not in {".svg", ".png", ".pdf"}:
        raise UserError(f"plot must end in .svg, .png or .pdf; got '{path}'.")
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UserError("plot needs matplotlib, which is not installed. Install it with: pip install 'kronsae[plots]'")
