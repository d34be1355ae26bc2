"""Ours: whether pursuit, which fits better, costs meaning."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.eval.token_rule import TokenRuleConfig
from kronsae.measures import probing, token_rule
from kronsae.reproduce import absorption
from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.probing import WINDOWS, labels
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import RECONSTRUCTION, SPLICED, Column, Comparison, judge, means, minus, of
from kronsae.reproduce.variants import WORDS
from kronsae.support.progress import progress_bar

FORMS = ("topk", "kron")
FIGURES = {
    "mean_f1": "F1 of the best latent",
    "auc": "AUC of the token rule",
    "mean_absorption_fraction": "absorption fraction",
}
BETTER_BELOW = ("mean_absorption_fraction",)


def rows(context: Context) -> list[Row]:
    """Train TopK and KronSAE, plain and with pursuit; measure concepts, token rules and absorption of all."""
    specs = [f"{context.sae(form)}{more} name={form}{suffix}" for suffix, more in WORDS.items() for form in FORMS]
    settings = probing.ProbingSettings(labels=labels(context, "parts-of-speech"), windows=WINDOWS)
    rules = TokenRuleConfig(tokens=context.scale.eval_tokens, min_active_tokens=50)
    found: list[Row] = []
    for run, saes in context.runs(context.train(specs)):
        with progress_bar("probing", quiet=context.quiet) as progress:
            concepts = probing.measure(run, settings, say=context.say, progress=progress)["saes"]
        with progress_bar("token rule", quiet=context.quiet) as progress:
            ruled = token_rule.measure(run, rules, saes=tuple(saes), say=context.say, progress=progress)
        auc = {one.sae: one.auc.mean for one in ruled.saes}
        absorbed = absorption.absorption_of(run, absorption.settings(context), context)["saes"]
        for name, row in saes.items():
            figures = {"mean_f1": concepts[name]["mean_f1"], "auc": auc[name]}
            figures["mean_absorption_fraction"] = absorbed[name]["mean_absorption_fraction"]
            found.append({**row, **figures})
    return found


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per SAE."""
    columns = [Column(words, key, "{:.3f}") for key, words in FIGURES.items()]
    return means(found, [Column("SAE", "name", "{}")], [*columns, *RECONSTRUCTION, SPLICED])


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare each figure with and without pursuit, and KronSAE with pursuit to plain TopK."""
    comparisons, more = [], []
    for key, words in FIGURES.items():
        sign, order = (-1, "without minus with") if key in BETTER_BELOW else (1, "with minus without")

        def gains(own: str, other: str, key: str = key, sign: int = sign) -> list[float]:
            return [sign * gap for gap in minus(of(found, name=own), of(found, name=other), key)]

        for form in FORMS:
            about = f"{words}, {form}: {order} pursuit"
            comparisons.append(Comparison(about, gains(f"{form}-pursuit", form), "{:+.3f}", above=-0.01))
        about = "plain topk minus kron with pursuit" if key in BETTER_BELOW else "kron with pursuit minus plain topk"
        more.append(Comparison(f"{words}, {about}", gains("kron-pursuit", "topk"), "{:+.3f}"))
    return judge(comparisons, f" {'; '.join(map(str, more))}.")


STUDY = Study(
    name="meaning",
    title="Pursuit and meaning",
    of="beyond the paper",
    claim="Training with pursuit does not make latents less meaningful (here: no figure gets worse by more than .01).",
    rows=rows,
    table=table,
    judge=verdict,
    limits="Concepts: parts of speech as in probing. Token rules as in token-rule. One learning rate for all.",
)
