"""Concepts with human labels: how well single latents and pairs detect parts of speech, categories and sentiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from kronsae.data.english import LabelName, read_rows, write_labels
from kronsae.eval.probing import Per, Probing, ProbingConfig, probing
from kronsae.measures.probing import ProbingSettings, labelled_text
from kronsae.reproduce.absorption import FORMS
from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import Column, Comparison, by, judge, means, minus, of
from kronsae.runs.loaded import LoadedRun
from kronsae.support.errors import UserError
from kronsae.support.progress import progress_bar

KINDS: dict[LabelName, Per] = {"parts-of-speech": "token", "categories": "text", "sentiment": "text"}
"""Labels of English text, and whether tokens or whole texts have them."""
PYTHON = "syntax of Python code"
WINDOWS = 120
"""Training windows of the labels that tokens have; the parts of speech of a few thousand tokens are enough."""


def rows(context: Context) -> list[Row]:
    """Train TopK, KronSAE and Matryoshka, and score their latents as detectors of labels.

    The model reads the examples of each kind of label once, for the SAEs of all seeds.
    """
    tasks: list[tuple[str, Per, Path | None]] = [(name, per, labels(context, name)) for name, per in KINDS.items()]
    if tasks[0][2] is None:
        tasks = [(PYTHON, "token", None)]
    trained = list(context.runs(context.train([f"{context.sae(form)} name={form}" for form in FORMS])))
    loaded = [LoadedRun(run) for run, _ in trained]
    by_key, saes = {}, {}
    for run, (_, own) in zip(loaded, trained, strict=True):
        for name, row in own.items():
            key = f"{row['name']}, seed {row['seed']}"
            by_key[key], saes[key] = row, run.saes[name]
    found: list[Row] = []
    for kind, per, path in tasks:
        settings = ProbingSettings(labels=path, per=per, windows=WINDOWS if per == "token" else None)
        text = labelled_text(loaded[0], settings)
        context.say(f"{kind}: {len(text.concepts)} concepts, {len(text.held_out_N):,} {per}s.")
        with progress_bar(f"probing, {kind}", quiet=context.quiet) as progress:
            read = loaded[0].activations(list(text.windows), progress)
            scores, accuracy = probing(saes, text, read, ProbingConfig(seed=settings.seed), context.say)
        about = {
            "labels": kind,
            "per": per,
            "concepts": len(text.concepts),
            "scored_on": int(text.held_out_N.sum()),
            "probe_accuracy": mean(accuracy.values()),
        }
        found += [{**by_key[key], **about, **_figures(one)} for key, one in scores.items()]
    return found


def _figures(one: Probing) -> dict[str, float]:
    """Return the means over concepts; ``always_active_f1`` is that of a detector that is always active."""
    return {
        "mean_f1": one.mean_f1,
        "mean_pair_f1": one.mean_pair_f1,
        **{f"accuracy_{k}": accuracy for k, accuracy in one.mean_accuracy_by_k.items()},
        "always_active_f1": mean(2 * concept.share / (1 + concept.share) for concept in one.concepts),
    }


def labels(context: Context, name: LabelName) -> Path | None:
    """Return a file with human labels of the scale's text; None for the bundled text, which has its own.

    Raises:
        UserError: the text has no labels.
    """
    if context.scale.text == "bundled":
        return None
    text, out = Path(context.scale.text).expanduser(), context.folder / f"{name}.jsonl"
    if not text.exists():
        raise UserError(
            f"probing needs text with human labels; '{context.scale.text}' has none. Give --text english.jsonl.gz, the "
            "file that `kronsae texts english` writes."
        )
    if not out.exists():
        next(read_rows(text))  # a clear message for another file
        write_labels(text, name, out)
    return out


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per kind of label and SAE."""
    columns = [
        Column("F1 of the best latent", "mean_f1", "{:.3f}"),
        Column("F1 of the best pair", "mean_pair_f1", "{:.3f}"),
        Column("accuracy of one latent", "accuracy_1", "{:.3f}"),
        Column("of five", "accuracy_5", "{:.3f}"),
    ]
    about = []
    for (kind,), rows in by(found, "labels").items():
        first = rows[0]
        about.append(
            f"- {kind}: {first['concepts']} concepts, scored on {first['scored_on']:,} held-out {first['per']}s. A "
            f"detector that is always active has F1 {first['always_active_f1']:.3f}, and a probe on the activations "
            f"themselves has accuracy {first['probe_accuracy']:.3f}."
        )
    keys = [Column("labels", "labels", "{}"), Column("SAE", "name", "{}")]
    note = "Means over concepts. Accuracy: equal numbers of examples with and without the concept; chance is 0.5."
    return [*means(found, keys, columns), "", note, "", *about]


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare single latents of KronSAE with TopK's, for each kind of label."""
    comparisons = []
    for (kind,), rows in by(found, "labels").items():
        topk, kron = of(rows, name="topk"), of(rows, name="kron")
        comparisons += [
            Comparison(f"{kind}, F1 of KronSAE's best latent minus TopK's", minus(kron, topk, "mean_f1"), "{:+.3f}"),
            Comparison(f"{kind}, accuracy of one latent", minus(kron, topk, "accuracy_1"), "{:+.3f}"),
        ]
    return judge(comparisons)


STUDY = Study(
    name="probing",
    title="Concepts with human labels",
    of="section 5 (interpretability)",
    claim="Single latents of a KronSAE detect concepts that people have labelled at least as well as TopK's.",
    rows=rows,
    table=table,
    judge=verdict,
    limits="The paper has no such measurement. Labels: parts of speech (by token) and categories (by text) of the "
    "Brown corpus, sentiment of movie reviews (by text: a line has its review's, which many lines do not show); at the "
    "bundled scale, the syntax of Python code. By text: means of the activations over the first window of each text, "
    "as in SAEBench's sparse probing. Where a probe on the activations is near chance, latents cannot differ by much.",
)
