"""Figures 4 and 11 and table 5: absorption by first letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kronsae.measures.absorption import AbsorptionSettings, measure
from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.sparsity import specs
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import EV, Column, Comparison, judge, means, minus, of
from kronsae.runs.run import Run
from kronsae.support.progress import progress_bar

FORMS = ("topk", "kron", "matryoshka")
FRACTION = "mean_absorption_fraction"
KEYS = (FRACTION, "mean_full_absorption", "mean_num_split_latents", "mean_f1")


def rows(context: Context) -> list[Row]:
    """Measure absorption by first letters, or by the roles of names where the model cannot spell."""
    return measured(context, settings(context), context.scale.l0s_of_absorption)


def settings(context: Context) -> AbsorptionSettings:
    """Return the task of the scale's model."""
    spells = context.scale.model != "bundled"
    return AbsorptionSettings(
        task="first-letter" if spells else "roles",
        windows=context.scale.prompts if spells else None,
        min_classes=20 if spells else None,
    )


def absorption_of(run: Run, settings: AbsorptionSettings, context: Context) -> dict[str, Any]:
    """Measure absorption of a run; the examples are read once for all runs of the context."""
    with progress_bar("absorption", quiet=context.quiet) as progress:
        return measure(run, settings, cache=context.folder / "examples", say=context.say, progress=progress)


def measured(context: Context, settings: AbsorptionSettings, l0s: Sequence[int]) -> list[Row]:
    """Train each form with each k, and measure the absorption of all; the examples are the same for all seeds."""
    trained = context.train([specs(context, form, l0s) for form in FORMS])
    found: list[Row] = []
    for run, saes in context.runs(trained):
        result = absorption_of(run, settings, context)
        accurate = sum(f1 > result["min_f1"] for f1 in result["probe_f1"].values())
        for name, row in saes.items():
            figures = {key: result["saes"][name][key] for key in KEYS}
            about = {"task": result["task"], "accurate_classes": accurate, "examples": result["examples"]["scored_on"]}
            about |= {"classes": len(result["classes"]), "needed": result["needed"]}
            found.append({**row, "name": row["name"].partition("-")[0], **figures, **about})
    return found


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per k and form."""
    order = {form: number for number, form in enumerate(FORMS)}
    ordered = sorted(found, key=lambda row: (int(row["k"]), order[row["name"]]))
    columns = [
        Column("absorption fraction", FRACTION, "{:.3f}"),
        Column("full absorption", "mean_full_absorption", "{:.3f}"),
        Column("split latents", "mean_num_split_latents", "{:.2f}"),
        Column("F1 of the best latent", "mean_f1", "{:.3f}"),
        EV,
        Column("dead", "dead_share", "{:.1%}"),
    ]
    first = found[0]
    about = (
        f"Task: {first['task']}; {first['accurate_classes']} classes have a probe with F1 > 0.6, and "
        f"{first['examples']:,} held-out examples are scored."
    )
    return [*means(ordered, [Column("l0", "k", "{}"), Column("SAE", "name", "{}")], columns), "", about]


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare KronSAE's mean absorption fraction with TopK's: lower, and by the paper's factor."""
    comparisons, ratios = compared(found)
    least, most = (f"{bound(float(row['mean_f1']) for row in found):.2f}" for bound in (min, max))
    control = below_topk(found, "matryoshka", "Matryoshka's")
    return judge(
        comparisons,
        f" {ratios} (the paper: 0.55 to 0.75). The F1 of the best latent of a class is {least} to {most}: where it is "
        f"low, hardly a latent stands for a class, and little is there to be absorbed. {'; '.join(map(str, control))}.",
    )


def compared(found: Sequence[Row]) -> tuple[list[Comparison], str]:
    """Return TopK's mean absorption fraction minus KronSAE's by l0, and the ratios of the means in words."""
    ratios = []
    for k in _l0s(found):
        own, other = (sum(float(row[FRACTION]) for row in of(found, name=name, k=k)) for name in ("kron", "topk"))
        ratios.append(f"{own / other:.2f}" if other else "–")
    return below_topk(found, "kron", "KronSAE's"), f"Ratio of the means, KronSAE to TopK, by l0: {', '.join(ratios)}"


def below_topk(found: Sequence[Row], form: str, words: str) -> list[Comparison]:
    """Return TopK's mean absorption fraction minus another form's, by l0."""
    return [
        Comparison(
            f"TopK's absorption fraction minus {words} at l0 {k}",
            minus(of(found, name="topk", k=k), of(found, name=form, k=k), FRACTION),
            "{:+.3f}",
        )
        for k in _l0s(found)
    ]


def _l0s(found: Sequence[Row]) -> list[int]:
    return sorted({int(row["k"]) for row in found})


STUDY = Study(
    name="absorption",
    title="Feature absorption",
    of="figures 4 and 11, table 5",
    claim="KronSAE's mean absorption fraction is about half of TopK's.",
    paper="""| l0 | 16 | 32 | 64 | 128 | 256 |
|---|---|---|---|---|---|
| TopK | .445 | .233 | .058 | .006 | .004 |
| KronSAE | .244 | .129 | .033 | .007 | .003 |

Pythia-1.4B, SAEBench's mean absorption fraction.""",
    rows=rows,
    table=table,
    judge=verdict,
    limits="The bundled model cannot spell: at its scale the classes are the roles of names in Python code.",
)
