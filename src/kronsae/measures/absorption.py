"""``kronsae eval absorption RUN``: how often more specific latents are active in place of the latents of a class."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from kronsae.core.checks import check_count, check_seed
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError, nearest
from kronsae.support.terminal import Json, Quiet, RunArgument, Seed, print_json, print_table, say, what_now

if TYPE_CHECKING:
    from kronsae.runs.run import Run

NAME = "absorption"
WINDOWS = {"roles": 500, "first-letter": 10_000, "labels": 2000}
"""Tasks, and for each the default number of windows of text, or of prompts of about 80 tokens, to train on."""

LATENT_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class AbsorptionSettings:
    """Settings of the absorption measurement.

    Args:
        task: ``roles`` (names in Python code), ``first-letter`` (prompts) or ``labels`` (a file). None: ``labels`` if
            ``labels`` is given, otherwise ``roles`` for a run on Python's library and ``first-letter`` for other text.
        labels: file of the task ``labels``, see `kronsae.measures.tasks.read_labelled`.
        windows: windows of text, or prompts, to train on; None: the task's default (`WINDOWS`).
        place: token at which a word is read: its ``last`` token or the ``next`` one.
        min_classes: number of classes that must have a probe with F1 > 0.6; None: 20/26 of all classes.
        max_k: maximum number of latents that represent a class.
        latent_batch: examples per step of the probe on latents. None: SAEBench's 4096 for its first-letter task, which
            has tens of thousands of words, and 128 for the others. With few steps the weights would stay close to their
            random initialisation, and the largest weights would not select meaningful latents.
        seed: seed of the sampling, the split and the probes.
    """

    task: str | None = None
    labels: Path | None = None
    windows: int | None = None
    place: str = "last"
    min_classes: int | None = None
    max_k: int = 10
    latent_batch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in WINDOWS:
            raise UserError(
                f"task must be one of {', '.join(WINDOWS)}; got '{self.task}'.{nearest(self.task, WINDOWS)}"
            )
        if self.labels is not None and self.task not in (None, "labels"):
            raise UserError(f"labels must be used with the task 'labels'; got task '{self.task}'. Leave one out.")
        if self.place not in ("last", "next"):
            raise UserError(f"place must be 'last' or 'next'; got '{self.place}'.")
        check_seed(self.seed)
        for name in ("windows", "min_classes", "max_k", "latent_batch"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))


def measure(
    run: Run,
    settings: AbsorptionSettings,
    *,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure all SAEs of a run and store the result.

    Args:
        run: a finished run.
        settings: settings of the measurement.
        cache: folder for the activations of the examples; None: in the run folder. Runs of one model may share it.
        say: receives status messages.
        progress: called with (done, total), starting from 0 in each of three stages: tokens that the model reads,
            passes over the examples for the probes, and the work on all SAEs.

    Returns:
        ``{"task", "examples", "classes", "left_out", "needed", "probe_f1", "min_f1", "saes"}``, as JSON values.
        ``left_out`` lists classes with too few examples, ``needed`` is the number of classes that must have an accurate
        probe, and ``saes`` maps names to `kronsae.eval.absorption.Absorption`.

    Raises:
        UserError: the run is not finished, there are too few labels, or the probes of too many classes are inaccurate.
    """
    from kronsae.eval.absorption import AbsorptionConfig, Examples, absorption, probe_classes
    from kronsae.eval.absorption.probes import ON_LATENTS
    from kronsae.eval.display import visible
    from kronsae.measures.tasks import TaskName, build_task, default_task, example_activations
    from kronsae.report.measurements import keep_result, known_result
    from kronsae.runs.loaded import LoadedRun, expected_l0
    from kronsae.support.progress import progress_of_part

    loaded = LoadedRun(run)
    hook = loaded.hook
    task_name = settings.task or ("labels" if settings.labels is not None else default_task(loaded))
    assert task_name in get_args(TaskName)
    task = build_task(
        loaded,
        task_name,  # type: ignore[arg-type]
        labels=settings.labels,
        windows=WINDOWS[task_name] if settings.windows is None else settings.windows,
        place=settings.place,  # type: ignore[arg-type]
        seed=settings.seed,
    )
    as_saebench = task_name == "first-letter"
    batch = settings.latent_batch or (ON_LATENTS.batch if as_saebench else LATENT_BATCH)
    config = AbsorptionConfig(
        seed=settings.seed,
        max_k=settings.max_k,
        min_classes=settings.min_classes,
        latent_probe=replace(ON_LATENTS, batch=batch),
        scaled=not as_saebench,
    )
    about = {"task": task_name, "place": settings.place, "content": task.digest(), "config": to_dict(config)}
    if (known := known_result(run.folder, NAME, about)) is not None:
        say("Already measured with these settings.")
        return known
    needed = config.needed(len(task.classes))  # before the model runs
    tokens = sum(int(windows.attention_mask_ST.sum()) for windows in task.windows)
    left_out = f" ({', '.join(map(visible, task.left_out))} left out: too few examples)" if task.left_out else ""
    trained_on = int((~task.held_out_E).sum())
    memory = sum(len(task.words) * expected_l0(sae) * 12 for sae in loaded.saes.values()) / len(loaded.saes)
    say(
        f"Task '{visible(task.name)}': {len(task.words):,} examples of {len(task.classes)} classes{left_out} in "
        f"{tokens:,} tokens; the model runs up to {hook.name}. The probes train for {config.probe.epochs} epochs on "
        f"{trained_on:,} examples, then again for each of {len(run.names)} SAE(s). The codes of one SAE take about "
        f"{memory / 2**20:,.0f} MB."
    )
    x_ED, was_known = example_activations(loaded, task, cache or run.folder / "measures" / "cache", progress, say=say)
    if was_known:
        say("The activations of these examples were read from the cache.")
    examples = Examples(x_ED=x_ED, labels_E=task.labels_E, held_out_E=task.held_out_E, classes=task.classes)
    probed = probe_classes(examples, config, progress)
    found = {}
    count = len(loaded.saes)
    for number, (name, sae) in enumerate(loaded.saes.items(), 1):
        found[name] = absorption(sae, examples, probed, config, progress_of_part(progress, number - 1, count)).to_dict()
        say(f"{name}: absorption fraction {found[name]['mean_absorption_fraction']:.3f} ({number}/{count})")
    result = {
        "task": task.name,
        "examples": {"learnt_from": trained_on, "scored_on": int(task.held_out_E.sum())},
        "classes": list(task.classes),
        "left_out": list(task.left_out),
        "needed": needed,
        "probe_f1": dict(zip(task.classes, probed.f1, strict=True)),
        "min_f1": config.min_f1,
        "saes": found,
    }
    keep_result(run.folder, NAME, about, result)
    return result


app = typer.Typer(add_completion=False)


@app.command(
    help="Measure how often more specific latents are active in place of a class's latents (SAEBench's absorption)."
)
def absorption(
    run_folder: RunArgument,
    task: Annotated[
        str | None,
        typer.Option(
            help="roles (names in Python code), first-letter (prompts) or labels (with --labels). Default: roles for a "
            "run on Python's library, first-letter for other text."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help='Your own labelled text: JSON lines of {"text", "label"} or {"text", "spans": [{"start", "end", '
            '"label"}]}.'
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            help="Windows of text, or prompts, to train on; a quarter as many are used for testing. Default: "
            + ", ".join(f"{number} ({task})" for task, number in WINDOWS.items())
            + "."
        ),
    ] = None,
    place: Annotated[str, typer.Option(help="Read a word at its 'last' token or at the 'next' one.")] = "last",
    min_classes: Annotated[
        int | None,
        typer.Option(
            help="Number of classes whose probe must have F1 > 0.6. Default: 20/26 of all classes, rounded up."
        ),
    ] = None,
    max_k: Annotated[int, typer.Option(help="Maximum number of latents that represent a class.")] = 10,
    latent_batch: Annotated[
        int | None,
        typer.Option(
            help=f"Examples per step of the probe on latents. Default: 4096 (first-letter) or {LATENT_BATCH}."
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for activations; several runs can share it. Default: in RUN.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure absorption and print it."""
    from kronsae.report.sections.absorption import table
    from kronsae.report.tables import rich_table
    from kronsae.runs.run import open_run
    from kronsae.support.progress import progress_bar

    run = open_run(run_folder)
    settings = AbsorptionSettings(
        task=task,
        labels=labels,
        windows=windows,
        place=place,
        min_classes=min_classes,
        max_k=max_k,
        latent_batch=latent_batch,
        seed=seed,
    )
    with progress_bar("absorption", quiet=quiet) as progress:
        result = measure(run, settings, cache=cache, say=say, progress=progress)
    if as_json:
        print_json(result)
    else:
        print_table(rich_table(table(result), "SAE"))
    what_now(f"kronsae report {shlex.quote(str(run.folder))}", "docs/measurements/absorption.md explains the metrics")
