"""``kronsae eval probing RUN``: how well single latents, pairs and small sets of latents detect labelled concepts."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kronsae.core.checks import check_count, check_seed
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError
from kronsae.support.terminal import Json, Quiet, RunArgument, Seed, print_json, print_table, say, what_now

if TYPE_CHECKING:
    from kronsae.eval.labelling import Passage
    from kronsae.eval.probing import ConceptText, Per
    from kronsae.runs.loaded import LoadedRun
    from kronsae.runs.run import Run

NAME = "probing"
WINDOWS = {"token": 300, "text": 1600}
"""What an example may be, and for each the default number of windows to train on."""
AT_LEAST = {"token": 50, "text": 20}
"""Number of examples that must have a concept, and that must lack it, in each split."""


@dataclass(frozen=True, kw_only=True)
class ProbingSettings:
    """Settings of the probing measurement.

    Args:
        labels: file of labelled text, see `kronsae.measures.tasks.read_labelled`; None: concepts of Python code, for a
            run on Python's library.
        per: ``token``, or ``text``: mean activations over the tokens of each text, for labels of whole texts.
        windows: windows of text to train on, or texts, of which the first window is read; a quarter as many are used
            for testing. None: the default (`WINDOWS`).
        seed: seed of the sampling and the probes.
    """

    labels: Path | None = None
    per: Per = "token"
    windows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per not in WINDOWS:
            raise UserError(f"per must be 'token' or 'text'; got '{self.per}'.")
        if self.windows is not None:
            check_count("windows", self.windows)
        check_seed(self.seed)


def measure(
    run: Run,
    settings: ProbingSettings,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure all SAEs of a run and store the result.

    Returns:
        ``{"task", "per", "examples", "concepts", "bars", "probe_accuracy", "d_sae", "saes"}``, as JSON values;
        ``saes`` maps names to `kronsae.eval.probing.Probing`.

    Raises:
        UserError: the run is not finished, or there is not enough labelled text.
    """
    from kronsae.eval.probing import ProbingConfig, probing
    from kronsae.report.measurements import keep_result, known_result
    from kronsae.runs.loaded import LoadedRun, expected_l0

    loaded = LoadedRun(run)
    hook = loaded.hook
    text = labelled_text(loaded, settings)
    config = ProbingConfig(seed=settings.seed)
    about = {"content": text.digest(), "config": to_dict(config)}
    if (known := known_result(run.folder, NAME, about)) is not None:
        say("Already measured with these settings.")
        return known
    saes = loaded.saes
    examples, tokens = len(text.held_out_N), sum(windows.num_kept for windows in text.windows)
    entries = sum(min(tokens * expected_l0(sae), examples * sae.d_sae) for sae in saes.values())
    of_texts = "" if text.per == "token" else f"{examples:,} texts with "
    say(
        f"{len(text.concepts)} concept(s) in {of_texts}{tokens:,} tokens; the model runs once up to {hook.name}. The "
        f"codes of {len(saes)} SAE(s) take about {entries * 12 / 2**20:,.0f} MB."
    )
    found, accuracy = probing(saes, text, loaded.activations(list(text.windows), progress), config, say)
    result = {
        "task": "python" if settings.labels is None else settings.labels.name,
        "per": text.per,
        "examples": {"learnt_from": int((~text.held_out_N).sum()), "scored_on": int(text.held_out_N.sum())},
        "concepts": list(text.concepts),
        "bars": list(config.bars),
        "probe_accuracy": accuracy,
        "d_sae": {name: sae.d_sae for name, sae in saes.items()},
        "saes": {name: one.to_dict() for name, one in found.items()},
    }
    keep_result(run.folder, NAME, about, result)
    return result


def labelled_text(loaded: LoadedRun, settings: ProbingSettings) -> ConceptText:
    """Return the examples with their concepts, tokenised for the run's model.

    Raises:
        UserError: there is not enough labelled text.
    """
    from kronsae.eval.probing import concept_text
    from kronsae.eval.python_code import CONCEPTS
    from kronsae.measures.tasks import frame_of

    return concept_text(
        _passages(loaded, settings.labels),
        loaded.source.language_model.tokenizer,
        frame=frame_of(loaded),
        context_length=loaded.run.config.context_length,
        concepts=CONCEPTS if settings.labels is None else None,
        windows=WINDOWS[settings.per] if settings.windows is None else settings.windows,
        at_least=AT_LEAST[settings.per],
        per=settings.per,
        seed=settings.seed,
    )


def _passages(loaded: LoadedRun, labels: Path | None) -> Iterator[Passage]:
    from kronsae.data.model import BUNDLED
    from kronsae.eval.labelling import Passage
    from kronsae.eval.python_code import python_spans
    from kronsae.measures.tasks import DOCUMENTS, documents, read_labelled

    if labels is not None:
        yield from read_labelled(labels)
        return
    if loaded.run.config.text.source != BUNDLED:
        raise UserError(
            "labels must be given if the run's text is not Python's library; got none. Give --labels FILE.jsonl."
        )
    for held_out, number in ((False, DOCUMENTS // 2), (True, DOCUMENTS // 4)):
        for document in documents(loaded, held_out=held_out, number=number):
            spans = tuple(python_spans(document.text))
            if spans:  # code that cannot be parsed would count as text without any concept
                yield Passage(text=document.text, spans=spans, held_out=held_out)


app = typer.Typer(add_completion=False)


@app.command(
    help="Measure how well single latents, pairs and small sets of latents detect labelled concepts: sparse probing, "
    "concept recall and targeted perturbation."
)
def probing(
    run_folder: RunArgument,
    labels: Annotated[
        Path | None,
        typer.Option(
            help='Your own labelled text: JSON lines of {"text", "label"} or {"text", "spans": [{"start", "end", '
            '"label"}]}. '
            "Default: concepts of Python code, for a run on Python's library."
        ),
    ] = None,
    per: Annotated[
        str,
        typer.Option(help="An example is a 'token', or a 'text' with its mean activations, for labels of whole texts."),
    ] = "token",
    windows: Annotated[
        int | None,
        typer.Option(
            help="Windows of text to train on, or texts, of which the first window is read; a quarter as many are used "
            f"for testing. Default: {WINDOWS['token']} windows or {WINDOWS['text']} texts."
        ),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Probe a run's SAEs and print the results."""
    from kronsae.report.sections.probing import table
    from kronsae.report.tables import rich_table
    from kronsae.runs.run import open_run
    from kronsae.support.progress import progress_bar

    run = open_run(run_folder)
    settings = ProbingSettings(labels=labels, per=per, windows=windows, seed=seed)  # type: ignore[arg-type]
    with progress_bar("tokens", quiet=quiet) as progress:
        result = measure(run, settings, say=say, progress=progress)
    if as_json:
        print_json(result)
    else:
        print_table(rich_table(table(result), "SAE"))
    what_now(f"kronsae report {shlex.quote(str(run.folder))}", "docs/measurements/probing.md explains the metrics")
