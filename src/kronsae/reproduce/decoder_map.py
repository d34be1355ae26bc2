"""A map of decoder rows by UMAP, as a picture beside a page; no figure and no verdict depends on it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kronsae.bench.plot import save_figure
from kronsae.reproduce.claims import Row
from kronsae.reproduce.context import Context

PACKAGES = {"umap": "umap-learn", "matplotlib": "matplotlib"}
HEADS = 10


def draw_map(context: Context, rows: Sequence[Row], path: Path) -> str | None:
    """Draw the decoder rows of the KronSAEs of the first seed, one panel each; return a caption.

    Grey: all latents. Colours: the latents of `HEADS` heads; lines join those with one base if M < N, and those with
    one extension otherwise. UMAP: 15 neighbours by cosine, minimum distance 0.1, seed 0.

    Args:
        context: where the trained SAEs are.
        rows: rows of KronSAEs, with ``group`` and ``name_in_group``.
        path: file to write, ``.png``.

    Returns:
        None if a package or the trained SAEs are not there; ``context.say`` then has the reason.
    """
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        context.say(
            f"No map of the decoder rows: it needs {' and '.join(missing)}. Install it with: pip install "
            "'kronsae[umap]', then run the study again; its figures are kept."
        )
        return None
    first = [row for row in rows if row["seed"] == min(int(row["seed"]) for row in rows)]
    runs = [(run, name, row) for run, saes in context.runs(first) for name, row in saes.items()]
    if lost := [run.folder for run, _, _ in runs if not run.folder.is_dir()]:
        context.say(f"No map of the decoder rows: the trained SAEs are not in {lost[0]}.")
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(runs), 5), layout="constrained")
    for number, (run, name, row) in enumerate(runs, 1):
        W_dec_FD = run.saes()[name].W_dec.detach().cpu().float().numpy()
        axes = figure.add_subplot(1, len(runs), number)
        _panel(axes, _places(W_dec_FD), int(row["d_base"]), int(row["d_extension"]))
    save_figure(figure, path)
    return (
        f"UMAP of the decoder rows, seed {first[0]['seed']}. Grey: all latents. Colours: {HEADS} heads, with lines "
        "between latents of one base (M < N) or one extension (M >= N). The verdict does not use it."
    )


def _places(W_dec_FD: np.ndarray) -> np.ndarray:
    import umap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a seed turns threads off, which umap-learn warns of
        places_F2: np.ndarray = umap.UMAP(metric="cosine", random_state=0).fit_transform(W_dec_FD)
    return places_F2


def _panel(axes: Any, places_F2: np.ndarray, d_base: int, d_extension: int) -> None:
    cells_HMN = np.arange(len(places_F2)).reshape(-1, d_base, d_extension)
    axes.scatter(*places_F2.T, s=1, color="0.85", linewidths=0)
    chosen = np.linspace(0, len(cells_HMN) - 1, HEADS).astype(int)
    for number, head in enumerate(chosen):
        groups = cells_HMN[head] if d_base < d_extension else cells_HMN[head].T
        for group in groups:
            axes.plot(*places_F2[group].T, marker="o", markersize=3, linewidth=0.8, color=f"C{number % 10}")
    parent = "base" if d_base < d_extension else "extension"
    axes.set(xticks=[], yticks=[], title=f"M = {d_base}, N = {d_extension}; lines: one {parent}")
