"""A sentence that ranks SAEs by a mean, with a significance test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from kronsae.eval.display import visible
from kronsae.eval.paired import LEVEL, paired_difference


def ranking_sentence(
    values: Mapping[str, Sequence[float]], *, figure: str, over: str, less_is_better: bool = False
) -> str:
    """Return a sentence that names the SAEs with the best mean; ``""`` for a single SAE.

    SAEs whose means are equal as displayed are ranked equal. Each other SAE is compared with them by a paired t-test
    over the parts (classes, concepts), at `LEVEL` divided by the number of tests. The sentence says which differences
    are not significant. It also says that the test does not cover the variation between training seeds.

    Args:
        values: for each SAE, its metric in each part; the same parts in the same order.
        figure: name of the metric, such as ``absorption fraction``.
        over: name of the parts, such as ``classes``.
        less_is_better: whether the smallest mean is the best.
    """
    if len(values) < 2:
        return ""
    sign = -1 if less_is_better else 1
    means = {name: mean(parts) for name, parts in values.items()}
    shown = f"{sign * max(sign * value for value in means.values()):.3f}"
    best = [name for name, value in means.items() if f"{value:.3f}" == shown]
    others = [name for name in values if name not in best]
    if not others:
        return f"All SAEs have the same mean {figure}, {shown}."
    number = len(values[best[0]])
    start = (
        f"{_listed(best)} {'has' if len(best) == 1 else 'have'} the {'smallest' if less_is_better else 'largest'} "
        f"mean {figure}, {shown}"
    )
    if number < 2:
        return f"{start}; the significance cannot be tested, because there are fewer than two {over}."
    tests = len(best) * len(others)
    similar = [
        other
        for other in others
        if any(paired_difference(values[one], values[other]).sign_of_several(tests) != sign for one in best)
    ]
    corrected = "" if tests == 1 else f", corrected for {tests} comparisons"
    test = f"(paired t-test over {number} {over} at level {LEVEL:g}{corrected})"
    if not similar:
        outcome = f". The difference from each other SAE is significant {test}"
    else:
        outcome = f". The difference from {_listed(similar)} is not significant {test}"
    return f"{start}{outcome}. Each SAE was trained with one seed; other seeds may rank them differently."


def _listed(names: Sequence[str]) -> str:
    shown = [visible(name) for name in names]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
