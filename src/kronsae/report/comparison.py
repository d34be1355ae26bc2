"""The table that compares the SAEs of a run, with its notes and summary sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kronsae.eval.display import visible

Row = Mapping[str, Any]
_R = TypeVar("_R", bound=Row)

L0_TOLERANCE = 0.02  # relative; SAEs with a larger difference in l0 are not ranked by reconstruction


@dataclass(frozen=True)
class Cell:
    """A table cell; ``best`` if it is the best of its column, ``note`` for its tooltip."""

    text: str
    best: bool = False
    note: str = ""


@dataclass(frozen=True)
class TableRow:
    """A row of a table; ``series`` is the index of the SAE's colour, None for a row of differences."""

    name: str
    cells: tuple[Cell, ...]
    series: int | None = None


@dataclass(frozen=True)
class Table:
    """A table: headings with their explanations, and rows."""

    headings: tuple[tuple[str, str], ...]
    rows: tuple[TableRow, ...]


@dataclass(frozen=True)
class _Column:
    key: str
    heading: str
    about: str
    text: Callable[[Any], str]
    better: int = 0  # +1 more is better, -1 less is better, 0 neither
    difference: Callable[[float, float], str] | None = None
    of_quality: bool = False  # comparable only at equal l0


def _ratio(value: float, other: float) -> str:
    return f"× {value / other:.3g}" if other else "–"


def _points(digits: int) -> Callable[[float, float], str]:
    def text(value: float, other: float) -> str:
        return _signed(f"{value - other:+.{digits}f}")

    return text


def _share_points(value: float, other: float) -> str:
    return _signed(f"{100 * (value - other):+.1f}") + " pp"


def _signed(text: str) -> str:
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def hooks(row: Row) -> str:
    """Return an SAE's hooks: ``"a"``, ``"a + b"`` for a crosscoder, ``"a → b"`` for a transcoder; ``""`` if unknown."""
    read, written = (" + ".join(map(str, row.get(key) or ())) for key in ("hooks_read", "hooks_written"))
    return visible(read if read == written else f"{read} → {written}")


def architecture(row: Row) -> str:
    """Return the architecture as trained and as saved: ``"dense-batch_topk, saved as jumprelu"``."""
    trained, saved = row.get("architecture"), row.get("saved_as")
    if trained is None:
        return "–"
    return visible(str(trained) if saved is None else f"{trained}, saved as {saved}")


def differ_in_hooks(rows: Sequence[Row]) -> bool:
    """Return whether the SAEs have different hooks, so that their reconstruction metrics are not comparable."""
    return len({hooks(row) for row in rows}) > 1


_HOOKS = _Column("hooks_read", "hooks", "hooks read → hooks written", str)
_ARCHITECTURE = _Column("architecture", "architecture", "encoder-sparsifier, as trained", str)
_COLUMNS = (
    _ARCHITECTURE,
    _Column("d_sae", "latents", "d_sae, rows of the dictionary", "{:,}".format, 0, _ratio),
    _Column("parameters", "parameters", "all weights and biases", "{:,}".format, 0, _ratio),
    _Column("encoder_parameters", "encoder parameters", "weights and biases of the encoder", "{:,}".format, 0, _ratio),
    _Column(
        "training_flops",
        "training FLOPs",
        "calculated, not measured: 6 per multiply-add of the forward pass, per token",
        lambda value: f"{value:.2e}",
        0,
        _ratio,
    ),
    _Column("tokens", "tokens", "training tokens", "{:,}".format, 0, _ratio),
    _Column(
        "explained_variance",
        "EV",
        "explained variance: 1 − Σ‖x − x̂‖² / Σ‖x − mean‖² over the held-out tokens",
        "{:.4f}".format,
        +1,
        _points(4),
        True,
    ),
    _Column(
        "explained_variance_per_token",
        "EV per token",
        "mean over tokens of 1 − ‖x − x̂‖² / ‖x − mean‖²",
        "{:.4f}".format,
        +1,
        _points(4),
        True,
    ),
    _Column("l0", "l0", "active latents per token, mean", "{:.2f}".format, 0, _points(2)),
    _Column(
        "dead_share",
        "dead share",
        "share of the latents active on none of the held-out tokens",
        "{:.1%}".format,
        -1,
        _share_points,
    ),
    _Column(
        "ce_recovered",
        "CE recovered",
        "(CE zeroed − CE spliced) / (CE zeroed − CE clean); 1 is perfect, 0 is as bad as zero ablation",
        "{:.4f}".format,
        +1,
        _points(4),
        True,
    ),
    _Column(
        "kl_recovered",
        "KL recovered",
        "1 − KL(clean ‖ spliced) / KL(clean ‖ zeroed)",
        "{:.4f}".format,
        +1,
        _points(4),
        True,
    ),
    _Column("seconds", "seconds", "time of this SAE's training steps on this machine", "{:,.0f}".format, 0, _ratio),
)


def with_pursuit(name: str) -> str:
    """Return the name of an SAE's row with a pursuit."""
    return f"{name} + pursuit"


def beside(rows: Sequence[_R], pursued: Sequence[_R]) -> list[_R]:
    """Return each row, followed by that of the same SAE with a pursuit if there is one."""
    by_name = {row["name"]: row for row in pursued}
    pairs = ((row, by_name.get(with_pursuit(row["name"]))) for row in rows)
    return [row for pair in pairs for row in pair if row is not None]


def comparison(rows: Sequence[Row]) -> Table:
    """Build the table: metrics of each SAE with the best marked, and differences between Kronecker and dense SAEs."""
    ranked = _equal_l0(rows) and not differ_in_hooks(rows)
    columns = (_COLUMNS[0], _HOOKS, *_COLUMNS[1:]) if differ_in_hooks(rows) else _COLUMNS
    best: dict[str, str] = {}
    for column in _COLUMNS:
        if column.better and (ranked or not column.of_quality) and all(is_figure(row, column.key) for row in rows):
            # values that are equal as displayed are not ranked
            texts = {column.text(row[column.key]) for row in rows}
            top = max(rows, key=lambda row: column.better * row[column.key])
            best[column.key] = column.text(top[column.key]) if len(texts) > 1 else ""
    shown = []
    for number, row in enumerate(rows):
        cells = []
        for column in columns:
            if column in (_HOOKS, _ARCHITECTURE):
                cells.append(Cell(hooks(row) if column is _HOOKS else architecture(row)))
                continue
            text = column.text(row[column.key]) if row.get(column.key) is not None else "–"
            cells.append(Cell(text, text == best.get(column.key), _missing(row, column.key)))
        shown.append(TableRow(visible(str(row["name"])), tuple(cells), number))
    for row, other in _pairs(rows):
        cells = [Cell(_difference(column, row, other)) for column in columns]
        shown.append(TableRow(f"{visible(str(row['name']))} against {visible(str(other['name']))}", tuple(cells)))
    return Table(tuple((column.heading, column.about) for column in columns), tuple(shown))


def _difference(column: _Column, row: Row, other: Row) -> str:
    if column.difference is None or not (is_figure(row, column.key) and is_figure(other, column.key)):
        return "–"
    return column.difference(row[column.key], other[column.key])


def losses(rows: Sequence[Row]) -> Table | None:
    """Build the table of losses behind CE and KL recovered; None if none was measured."""
    measured = [(number, row) for number, row in enumerate(rows) if entry(row, "language_model", "kind") == "measured"]
    if not measured:
        return None
    headings = (
        ("clean", "nothing replaced"),
        ("spliced", "replaced by the SAE's reconstruction"),
        ("mean", "replaced by the mean activation"),
        ("zero", "replaced by 0"),
    )
    shown = []
    for number, row in measured:
        figures = row["language_model"]
        texts = [f"{figures[f'ce_{key}']:.4f}" for key, _ in headings]
        texts += [f"{figures[f'kl_{key}']:.4f}" for key, _ in headings[1:]]
        shown.append(TableRow(visible(str(row["name"])), tuple(map(Cell, texts)), number))
    ce = tuple((f"CE {key}", f"cross-entropy of the next token, nats; hook {about}") for key, about in headings)
    kl = tuple((f"KL {key}", f"KL(clean ‖ this), nats; hook {about}") for key, about in headings[1:])
    return Table(ce + kl, tuple(shown))


def notes(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the caveats of the table."""
    found = []
    if len(rows) > 1 and not _equal_l0(rows):
        found.append(
            "The SAEs differ in l0 by more than 2%. Reconstruction improves with l0, so no best value is marked for "
            "reconstruction metrics."
        )
    if differ_in_hooks(rows):
        found.append(
            "The SAEs have different hooks and reconstruct different activations, so no best value is marked for "
            "reconstruction metrics."
        )
    found += filter(None, map(_by_hook, rows))
    reasons = {str(entry(row, "language_model", "reason")) for row in rows if row.get("ce_recovered") is None}
    found += [f"CE and KL recovered were not measured: {visible(reason)}." for reason in sorted(reasons - {"", "?"})]
    sizes = sorted({row["evaluation_tokens"] for row in rows if row.get("evaluation_tokens") is not None})
    if sizes:
        found.append(
            f"Dead latents are active on none of {', '.join(f'{size:,}' for size in sizes)} held-out tokens. Very rare "
            "latents may count as dead."
        )
    if len(rows) > 1:
        found.append("Each SAE was trained with one seed. Small differences may be due to the seed; train more seeds.")
    return tuple(found)


def _by_hook(row: Row) -> str:
    """Return a sentence with a crosscoder's explained variance at each hook it writes."""
    explained = row.get("explained_variance_by_hook") or ()
    parts = [
        f"{visible(str(hook))} {value:.4f}"
        for hook, value in zip(row.get("hooks_written") or (), explained, strict=False)
        if value is not None
    ]
    return f"Explained variance of {visible(str(row['name']))} at each hook: {', '.join(parts)}." if parts else ""


def _pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pair each Kronecker SAE with a dense SAE of the same sparsifier and hooks, preferably of the same d_sae."""
    found = []
    for row in rows:
        encoder, _, sparsifier = str(row.get("architecture", "")).partition("-")
        same = [
            other
            for other in rows
            if str(other.get("architecture", "")) == f"dense-{sparsifier}" and hooks(other) == hooks(row)
        ]
        if encoder == "kronecker" and same:
            found.append((row, min(same, key=lambda other: other.get("d_sae") != row.get("d_sae"))))
    return found


def verdicts(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return a sentence for each Kronecker SAE that compares it with its dense counterpart."""
    return tuple(filter(None, (_verdict(row, other) for row, other in _pairs(rows))))


def _verdict(row: Row, other: Row) -> str:
    name, rival = visible(str(row["name"])), visible(str(other["name"]))
    parts = []
    if is_figure(row, "explained_variance") and is_figure(other, "explained_variance"):
        ev, rival_ev = row["explained_variance"], other["explained_variance"]
        text = f"{name} explains {ev:.2%} of the variance, {rival} {rival_ev:.2%}"
        if is_figure(row, "l0") and is_figure(other, "l0"):
            l0, rival_l0 = f"{row['l0']:.1f}", f"{other['l0']:.1f}"
            text += f", both at l0 {l0}" if l0 == rival_l0 else f", at l0 {l0} and {rival_l0}"
        parts.append(text)
    if is_figure(row, "ce_recovered") and is_figure(other, "ce_recovered"):
        parts.append(
            f"CE recovered is {row['ce_recovered']:.2%} for {name} and {other['ce_recovered']:.2%} for {rival}"
        )
    if is_figure(row, "encoder_parameters") and other.get("encoder_parameters"):
        share = row["encoder_parameters"] / other["encoder_parameters"]
        parts.append(f"{name}'s encoder has {share:.0%} of the parameters of {rival}'s")
    return "; ".join(parts) + "." if parts else ""


def _equal_l0(rows: Sequence[Row]) -> bool:
    values = [row["l0"] for row in rows if is_figure(row, "l0")]
    return len(values) == len(rows) > 1 and max(values) - min(values) <= L0_TOLERANCE * max(values)


def is_figure(row: Row, key: str) -> bool:
    """Return whether a row has a finite number under ``key``."""
    value = row.get(key)
    return isinstance(value, int | float) and math.isfinite(value)


def _missing(row: Row, key: str) -> str:
    reason = entry(row, "language_model", "reason")
    return visible(str(reason)) if row.get(key) is None and key.endswith("_recovered") and reason != "?" else ""


def entry(data: Mapping[str, Any], *path: str) -> Any:
    """Return a nested entry, or ``"?"`` if it is missing."""
    value: Any = data
    for key in path:
        value = value.get(key, "?") if isinstance(value, Mapping) else "?"
    return value
