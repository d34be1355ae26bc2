"""Concepts with human labels: how well single latents and pairs detect parts of speech."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kronsae.data.english import read_rows, write_labels
from kronsae.measures.probing import ProbingSettings, measure
from kronsae.reproduce.absorption import FORMS
from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import Column, Comparison, judge, means, minus, of
from kronsae.support.errors import UserError
from kronsae.support.progress import progress_bar


def rows(context: Context) -> list[Row]:
    """Train TopK, KronSAE and Matryoshka, and score their latents as detectors of labels."""
    settings = ProbingSettings(labels=labels(context), windows=120)
    found: list[Row] = []
    for run, saes in context.runs(context.train([f"{context.sae(form)} name={form}" for form in FORMS])):
        with progress_bar("probing", quiet=context.quiet) as progress:
            result = measure(run, settings, say=context.say, progress=progress)
        for name, row in saes.items():
            one = result["saes"][name]
            found.append(
                {**row, "mean_f1": one["mean_f1"], "mean_pair_f1": one["mean_pair_f1"], "task": result["task"]}
                | {"concepts": len(result["concepts"]), "tokens_scored": result["tokens"]["scored_on"]}
            )
    return found


def labels(context: Context) -> Path | None:
    """Return a file with the parts of speech of the scale's text; None for the bundled text, which has its own.

    Raises:
        UserError: the text has no labels.
    """
    if context.scale.text == "bundled":
        return None
    text, out = Path(context.scale.text).expanduser(), context.folder / "parts-of-speech.jsonl"
    if not text.exists():
        raise UserError(
            f"probing needs text with human labels; '{context.scale.text}' has none. Give --text english.jsonl.gz, the "
            "file that `kronsae texts english` writes."
        )
    if not out.exists():
        next(read_rows(text))  # a clear message for another file
        write_labels(text, "parts-of-speech", out)
    return out


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per SAE."""
    columns = [
        Column("F1 of the best latent", "mean_f1", "{:.3f}"),
        Column("F1 of the best pair", "mean_pair_f1", "{:.3f}"),
        Column("EV", "explained_variance"),
    ]
    first = found[0]
    about = f"{first['concepts']} concepts of {first['task']}, scored on {first['tokens_scored']:,} held-out tokens."
    return [*means(found, [Column("SAE", "name", "{}")], columns), "", about]


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare KronSAE's F1 with TopK's."""
    topk, kron = of(found, name="topk"), of(found, name="kron")
    return judge(
        [
            Comparison("F1 of KronSAE's best latent minus TopK's", minus(kron, topk, "mean_f1"), "{:+.3f}"),
            Comparison("F1 of KronSAE's best pair minus TopK's", minus(kron, topk, "mean_pair_f1"), "{:+.3f}"),
        ]
    )


STUDY = Study(
    name="probing",
    title="Concepts with human labels",
    of="section 5 (interpretability)",
    claim="Single latents of a KronSAE detect concepts that people have labelled at least as well as TopK's.",
    rows=rows,
    table=table,
    judge=verdict,
    limits="The paper has no such measurement. Labels: parts of speech of the Brown corpus, or names in Python code.",
)
