"""Which SAE is ahead, said no louder than the figures allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from kronsae.eval.display import visible
from kronsae.eval.paired import LEVEL, paired_difference


def who_leads(values: Mapping[str, Sequence[float]], *, figure: str, over: str, less_is_better: bool = False) -> str:
    """A sentence on the best mean; ``""`` for a single SAE.

    SAEs whose means are equal as shown share the lead. Any other is behind only if a paired t-test over the parts
    (classes, concepts) says so, at `LEVEL` divided by the number of such tests; where it does not, the sentence does.
    That test knows nothing of what another training would have given, and the sentence says that too.

    Args:
        values: by SAE, its figure in each part; the same parts in the same order.
        figure: what the mean is of, such as ``absorption fraction``.
        over: the parts, such as ``classes``.
        less_is_better: the smallest mean leads.
    """
    if len(values) < 2:
        return ""
    sign = -1 if less_is_better else 1
    means = {name: mean(parts) for name, parts in values.items()}
    shown = f"{sign * max(sign * value for value in means.values()):.3f}"
    leaders = [name for name, value in means.items() if f"{value:.3f}" == shown]
    others = [name for name in values if name not in leaders]
    if not others:
        return f"All have the same mean {figure}, {shown}."
    number = len(values[leaders[0]])
    start = (
        f"{_listed(leaders)} {'has' if len(leaders) == 1 else 'share'} the {'least' if less_is_better else 'largest'} "
        f"mean {figure}, {shown}"
    )
    if number < 2:
        return f"{start}; with one of the {over} alone, nothing says whether by more than chance."
    tests = len(leaders) * len(others)
    near = [
        other
        for other in others
        if any(paired_difference(values[leader], values[other]).sign_of_several(tests) != sign for leader in leaders)
    ]
    corrected = "" if tests == 1 else f", corrected for {tests} comparisons,"
    test = f"a paired t-test over the {number} {over} at {LEVEL:g}{corrected}"
    if not near:
        told = f", and {test} tells {'it' if len(leaders) == 1 else 'them'} from every other"
    else:
        told = f", but not by more than chance: {test} does not tell {_listed(near)} from {_listed(leaders)}"
    return f"{start}{told}. Each SAE is one training, with one seed: another may order them otherwise."


def _listed(names: Sequence[str]) -> str:
    shown = [visible(name) for name in names]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
