"""The section of ``kronsae eval toy``: tables of the toy model of correlation, and sentences generated from them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kronsae.eval.display import visible
from kronsae.eval.paired import LEVEL, paired_difference
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.section import Section

REVISION = 1
"""Revision of the stored result; see `kronsae.report.measurements`."""

AUTOENCODER, TOPK, KRON = "autoencoder", "topk", "kron"
"""Names of dictionaries; KRON is the prefix of a KronSAE's name."""

Row = Mapping[str, Any]
Figure = Callable[[Row], float]


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """Build the section from a stored result. The SAEs are not those of the page, so ``names`` is unused."""
    result = kept["result"]
    seeds = len({row["seed"] for row in result["rows"]})
    return Section(
        key="toy",
        title="Toy model of correlation",
        paragraphs=(
            "A small autoencoder represents features with a known block covariance in superposition, and SAEs are "
            "trained on its hidden states. Does the Gram matrix of an SAE's dictionary show which features are "
            "correlated? These SAEs are trained by the measurement; they are not this run's.",
            *map(visible, verdict(result)),
        ),
        tables=(("dictionary", table(result)),),
        notes=(
            f"Mean ± standard deviation over {len(result['setups']) - 1} covariances and {seeds} seeds, without the "
            f"independent features. Significance is by a t-test paired by covariance, at level {LEVEL:g}.",
        ),
    )


_COLUMNS: tuple[tuple[str, str, str, str], ...] = (
    ("RV", "trained", "rv", "RV coefficient with the truth; rows matched by structure (the paper's FAQ)"),
    ("RV by direction", "trained", "rv_by_direction", "the same, rows matched by their directions"),
    ("chance", "trained", "rv_permuted", "mean RV over all permutations of the true features"),
    ("RV untrained", "untrained", "rv", "the same SAE at initialisation, matched by structure"),
    (
        "RV by direction untrained",
        "untrained",
        "rv_by_direction",
        "the same SAE at initialisation, matched by direction",
    ),
    ("RV mismatched", "mismatched", "rv", "with the truth of another setup, matched to that setup's autoencoder"),
    ("RV by direction mismatched", "mismatched", "rv_by_direction", "the same, matched by direction"),
    ("effective rank", "trained", "effective_rank", "of the dictionary's Gram matrix"),
    ("rank difference", "trained", "rank_difference", "absolute difference from the truth's effective rank"),
    ("mean correlation", "trained", "mean_correlation", "mean |cosine| of two rows"),
    ("mean cosine", "trained", "mean_cosine", "with the autoencoder's rows, matched by direction"),
)


def table(result: Mapping[str, Any]) -> Table:
    """Build the table of mean ± standard deviation over the correlated setups and seeds, one row per dictionary."""
    shown = []
    for name in dictionaries(result):
        rows = list(_rows(result, name))
        cells = [Cell(_spread([row[kind][key] for row in rows], key)) for _, kind, key, _ in _COLUMNS]
        shown.append(TableRow(visible(name), (Cell(_spread([row["explained_variance"] for row in rows])), *cells)))
    headings = (("EV", "explained variance on held-out tokens"), *((text, about) for text, _, _, about in _COLUMNS))
    return Table(headings, tuple(shown))


def setup_table(result: Mapping[str, Any]) -> Table:
    """Build the table of RV (matched by structure) by setup and dictionary, mean ± standard deviation over seeds."""
    names = dictionaries(result)
    shown = []
    for setup in result["setups"]:
        of_setup = [row for row in result["rows"] if row["setup"] == setup["name"]]
        texts = [f"{setup['effective_rank']:.1f}"]
        texts += [_spread([row["trained"]["rv"] for row in of_setup if row["dictionary"] == name]) for name in names]
        shown.append(TableRow(visible(setup["name"]), tuple(map(Cell, texts))))
    return Table((("true rank", "effective rank of the truth"), *((name, "RV") for name in names)), tuple(shown))


def dictionaries(result: Mapping[str, Any]) -> list[str]:
    """Return the names of the dictionaries, in order."""
    return list(dict.fromkeys(row["dictionary"] for row in result["rows"]))


def verdict(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence on the paper's claim and one on each control.

    KronSAEs are averaged over their shapes and compared with TopK, or with themselves, by a paired test. A pair is a
    setup, averaged over its seeds, because seeds of one setup are not independent evidence about other setups. "Above
    chance" is RV minus its mean over all permutations of the true features.
    """
    for compare in (_claim, _shape_alone, _any_truth):
        for how, key in _MATCHINGS.items():
            yield compare(result, how, key)
    yield _independent(result)
    if sentence := _fit(result):
        yield sentence


_MATCHINGS = {"by structure, as in the paper": "rv", "by direction": "rv_by_direction"}


def _claim(result: Mapping[str, Any], how: str, key: str) -> str:
    gain = paired_difference(_kron(result, _trained(key)), _topk(result, _trained(key)))
    outcome = {
        1: "KronSAEs recover the correlation significantly better than TopK",
        0: "the difference between KronSAEs and TopK is not significant",
        -1: "TopK recovers the correlation significantly better than KronSAEs",
    }[gain.sign]
    return f"RV, matched {how}: {outcome} ({gain} over {gain.pairs} setups)."


def _shape_alone(result: Mapping[str, Any], how: str, key: str) -> str:
    untrained, trained = _above("untrained", key), _above("trained", key)
    start = paired_difference(_kron(result, untrained), _topk(result, untrained))
    learned = paired_difference(_kron(result, trained), _kron(result, untrained))
    head = {
        1: "an untrained KronSAE is further above chance than an untrained TopK",
        0: "the difference between an untrained KronSAE and an untrained TopK is not significant",
        -1: "an untrained KronSAE is less far above chance than an untrained TopK",
    }[start.sign]
    tail = {
        1: "training increases the KronSAE's value, so its structure alone does not explain the recovery",
        0: "training does not change the KronSAE's value significantly, so its structure may explain the recovery",
        -1: "training decreases the KronSAE's value, so its structure alone recovers more",
    }[learned.sign]
    return (
        f"Does the Kronecker structure alone explain the recovery? Matched {how}, {head} ({start}); {tail} ({learned})."
    )


def _any_truth(result: Mapping[str, Any], how: str, key: str) -> str:
    trained, mismatched = _above("trained", key), _above("mismatched", key)
    own = paired_difference(_kron(result, trained), _kron(result, mismatched))
    topk = paired_difference(_topk(result, trained), _topk(result, mismatched))
    outcome = {
        1: "no: a KronSAE is further above chance for its own truth than for another",
        0: "possibly: for a KronSAE, the difference between its own truth and another is not significant",
        -1: "yes: a KronSAE is further above chance for another truth than for its own",
    }[own.sign]
    significance = "significant" if topk.sign else "not significant"
    return (
        f"Is the Gram matrix similar for every truth? Matched {how}, {outcome} ({own}). For TopK the difference is "
        f"{topk}, {significance}."
    )


def _independent(result: Mapping[str, Any]) -> str:
    name = result["setups"][-1]["name"]
    parts = []
    for what, figure in (("RV", _trained("rv")), ("mean cosine with the true directions", _trained("mean_cosine"))):
        kron, topk = (_means(_by(result, names, "seed", [name]), figure) for names in (_krons(result), [TOPK]))
        if len(kron) < 2:
            return f"Independent features: {len(kron)} seed is too few for a comparison."
        gain = paired_difference(topk, kron)
        outcome = {1: "TopK is better", 0: "the difference is not significant", -1: "KronSAEs are better"}[gain.sign]
        parts.append(f"in {what}, {outcome} ({gain})")
    return f"Independent features, where TopK is expected to be better: {'; '.join(parts)}."


def _fit(result: Mapping[str, Any]) -> str:
    """Compare the gain over TopK between setups in which all blocks have a head's size and setups in which none has.

    Returns "" if there are no such setups.
    """
    plain = {
        setup["name"]: set(setup["blocks"])
        for setup in result["setups"][:-1]
        if setup["inner"] is None and setup["across"] == 0 and setup["within"] == result["setups"][0]["within"]
    }
    fitting, others = [], []
    for name in _krons(result):
        size = int(name.split("-m")[1].split("-n")[0]) * int(name.split("-n")[1])
        fits = [setup for setup, blocks in plain.items() if blocks == {size}]
        misfits = [setup for setup, blocks in plain.items() if size not in blocks]
        if fits and misfits:
            fitting.append(_gain(result, name, fits))
            others.append(_gain(result, name, misfits))
    if len(fitting) < 2:
        return ""
    more = paired_difference(fitting, others)
    outcome = {1: "larger than", 0: "not significantly different from", -1: "smaller than"}[more.sign]
    return (
        f"In setups whose blocks all have the size of a head, the gain in RV over TopK is {outcome} the gain in setups "
        f"without such blocks ({more} over {more.pairs} shapes)."
    )


def _gain(result: Mapping[str, Any], name: str, setups: Sequence[str]) -> float:
    """Return a dictionary's mean RV over setups and seeds minus that of TopK."""
    own, topk = (_means(_by(result, [one], "setup", setups), _trained("rv")) for one in (name, TOPK))
    return statistics.mean(own) - statistics.mean(topk)


def _trained(key: str) -> Figure:
    return lambda row: float(row["trained"][key])


def _above(kind: str, key: str) -> Figure:
    return lambda row: float(row[kind][key] - row[kind]["rv_permuted"])


def _kron(result: Mapping[str, Any], figure: Figure) -> list[float]:
    return _means(_by(result, _krons(result), "setup", _correlated(result)), figure)


def _topk(result: Mapping[str, Any], figure: Figure) -> list[float]:
    return _means(_by(result, [TOPK], "setup", _correlated(result)), figure)


def _krons(result: Mapping[str, Any]) -> list[str]:
    return [name for name in dictionaries(result) if name.startswith(KRON)]


def _correlated(result: Mapping[str, Any]) -> list[str]:
    return [setup["name"] for setup in result["setups"][:-1]]


def _by(result: Mapping[str, Any], names: Sequence[str], key: str, setups: Sequence[str]) -> list[list[Row]]:
    """Return the rows of the given dictionaries and setups, grouped by ``key``."""
    found: dict[Any, list[Row]] = {}
    for row in result["rows"]:
        if row["setup"] in setups and row["dictionary"] in names:
            found.setdefault(row[key], []).append(row)
    return [found[one] for one in sorted(found)]


def _means(groups: Sequence[Sequence[Row]], figure: Figure) -> list[float]:
    return [statistics.fmean(figure(row) for row in rows) for rows in groups]


def _rows(result: Mapping[str, Any], name: str) -> Iterator[Row]:
    return (row for row in result["rows"] if row["dictionary"] == name and row["mismatched"] is not None)


def _spread(values: Sequence[float], key: str = "") -> str:
    form = "{:.1f}" if "rank" in key else "{:.2f}"
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean
