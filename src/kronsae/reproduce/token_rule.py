"""Figure 7's question without a language model as judge: are latents predictable from the tokens around them?"""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.eval.token_rule import TokenRuleConfig
from kronsae.measures.token_rule import measure
from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import Column, Comparison, judge, means, minus, of
from kronsae.support.progress import progress_bar


def rows(context: Context) -> list[Row]:
    """Train TopK and KronSAE, and fit a rule to each of a hundred latents of both."""
    config = TokenRuleConfig(tokens=context.scale.eval_tokens, min_active_tokens=50)
    found: list[Row] = []
    for run, saes in context.runs(context.train([f"{context.sae(kind)} name={kind}" for kind in ("topk", "kron")])):
        with progress_bar("token rule", quiet=context.quiet) as progress:
            result = measure(run, config, saes=tuple(saes), say=context.say, progress=progress)
        for one in result.saes:
            figures = {"balanced_accuracy": one.balanced_accuracy.mean, "auc": one.auc.mean, "eligible": one.eligible}
            found.append({**saes[one.sae], **figures})
    return found


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per SAE."""
    columns = [
        Column("balanced accuracy", "balanced_accuracy", "{:.3f}"),
        Column("AUC", "auc", "{:.3f}"),
        Column("eligible latents", "eligible", "{:,.0f}"),
    ]
    return means(found, [Column("SAE", "name", "{}")], columns)


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare KronSAE's accuracy with TopK's."""
    topk, kron = of(found, name="topk"), of(found, name="kron")
    return judge(
        [
            Comparison("AUC of KronSAE minus TopK's", minus(kron, topk, "auc"), "{:+.3f}"),
            Comparison("balanced accuracy of KronSAE minus TopK's", minus(kron, topk, "balanced_accuracy"), "{:+.3f}"),
        ]
    )


STUDY = Study(
    name="token-rule",
    title="Latents and the tokens around them",
    of="in place of the interpretability scores of figure 7",
    claim="Nearby tokens predict KronSAE's latents better than TopK's: they are easier to describe.",
    rows=rows,
    table=table,
    judge=verdict,
    limits="The paper scores explanations by a large language model, which was not repeated. Here logistic regression "
    "on the nearby tokens takes its place. It detects latents that respond to tokens, not those with a meaning beyond "
    "them.",
)
