"""Evaluation of SAEs by SAEBench, in an environment of its own: its pins differ from ours."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from kronsae.core import checkpoint
from kronsae.core.sae import SAE
from kronsae.data.model import find_device, local_folder
from kronsae.interop.hook_names import hub_name
from kronsae.interop.saebench import SAEBenchConfig, SAEBenchSAE, transformer_lens_hook
from kronsae.interop.saebench_job import JOB_FILE, KNOWN, OUTCOME_FILE, Job, JobSAE
from kronsae.runs.hub_download import hub_place
from kronsae.runs.imported import names_of
from kronsae.runs.loading import read_sae, sae_folder
from kronsae.runs.run import open_run
from kronsae.support.config import to_dict
from kronsae.support.environment import Environment
from kronsae.support.errors import UserError, nearest
from kronsae.support.files import read_json, write_json

RUNNER = "kronsae.interop.saebench_runner"
NEEDED = "about 1.5 GB to download and 3 GB on disk"
PYTHONS = ((3, 11), (3, 12))
"""Versions of Python for which there is a NumPy before 2.0."""


@dataclass(frozen=True)
class Subjects:
    """SAEs to evaluate, and what is known of their training.

    Args:
        saes: by name.
        hooks: hook of each SAE.
        model: language model.
        tokens: training tokens of each SAE; an SAE without an entry: not known.
        context_length: length of the windows that they were trained on; None: not known.
        text: the text that they were trained on; ``""``: not known.
    """

    saes: dict[str, SAE]
    hooks: dict[str, str]
    model: str
    tokens: dict[str, int] = field(default_factory=dict)
    context_length: int | None = None
    text: str = ""


def environment() -> Environment:
    """Return SAEBench's environment, built or not."""
    pins = files("kronsae.interop").joinpath("saebench-requirements.txt").read_text(encoding="utf-8")
    return Environment("saebench", pins)


def find_subjects(source: str, names: list[str], model: str | None, hook: str | None) -> Subjects:
    """Return the SAEs of a run, or a single SAE with the model and hook that are given, or that its files state."""
    if not (Path(source) / "run.json").exists():
        if names:
            raise UserError(f"--sae must be used with a run; {source} is a single SAE. Leave it out.")
        if not Path(source).exists() and hub_place(source) is None:
            known = nearest(source, KNOWN)
            hint = f"{known} Evaluations are given by --evals." if known else " Check the path."
            raise UserError(
                f"SAE_OR_RUN must be a run folder, an SAE folder or a Hub name (user/repo); there is no {source}.{hint}"
            )
        found = read_sae(sae_folder(source))
        model = hub_name(found.model) if model is None and found.model is not None else model
        hook = found.hook_read if hook is None else hook
        if model is None or hook is None:
            missing = " and ".join(name for name, one in (("--model", model), ("--hook", hook)) if one is None)
            raise UserError(f"{missing} must be given for a single SAE whose files do not state it; got {source}.")
        (name,) = names_of([source])
        return Subjects({name: found.sae}, {name: hook}, model)
    run = open_run(Path(source))
    run.require_finished()
    chosen = names or run.names
    saes = {name: run.load(name) for name in chosen}
    members = {member.name: member for member in run.config.saes}
    hooks = {}
    for name in chosen:
        own = members[name].reconstructs(run.config.hook)
        if own is None:
            raise UserError(
                f"--sae must name SAEs that reconstruct the one hook they read, which is all that SAEBench measures; "
                f"'{name}' is no such SAE. Name others by --sae."
            )
        hooks[name] = own if hook is None else hook
    tokens = {name: run.sae_tokens(name) for name in chosen}
    return Subjects(
        saes,
        hooks,
        run.config.model.name if model is None else model,
        {name: count for name, count in tokens.items() if count is not None},
        None if run.imported else run.config.context_length,  # of an imported run, those of its measurements
        "" if run.imported else run.config.text.source,
    )


def make_job(
    subjects: Subjects,
    evals: tuple[str, ...],
    out: Path,
    words: int | None,
    settings: list[str],
    device: str,
    seed: int,
) -> Job:
    """Return the job, all of it checked; the folders of the SAEs are filled in when it runs."""
    places = {name: transformer_lens_hook(hook) for name, hook in subjects.hooks.items()}
    folder = local_folder(subjects.model)
    return Job(
        saes=tuple(
            JobSAE(name=name, folder="", hook=place, layer=layer, training_tokens=subjects.tokens.get(name, -1))
            for name, (place, layer) in places.items()
        ),
        model=subjects.model if folder is None else Path(subjects.model).name,
        location=subjects.model if folder is None else str(folder),
        evals=evals,
        out=str(out.absolute()),
        settings=tuple(settings),
        words=words,
        context_length=subjects.context_length,
        text=subjects.text,
        seed=seed,
        device=str(find_device(device)),
    )


def check_subjects(subjects: Subjects, job: Job) -> None:
    """Raise before anything is built if an SAE cannot be adapted."""
    for about in job.saes:
        one = subjects.saes[about.name]
        cfg = SAEBenchConfig(
            model_name=job.model,
            d_in=one.d_in,
            d_sae=one.d_sae,
            hook_layer=about.layer,
            hook_name=about.hook,
            architecture="",
        )
        SAEBenchSAE(one, cfg)


def ready_environment(prepare: bool, confirm: Callable[[str], bool]) -> Environment:
    """Return SAEBench's environment, built now if the user wants it.

    Args:
        prepare: build it without asking.
        confirm: asks the user.

    Raises:
        UserError: there is none and it is not to be built, or cannot be.
    """
    found = environment()
    if found.ready:
        return found
    if sys.version_info[:2] not in PYTHONS:
        raise UserError(
            f"SAEBench must run on Python 3.11 or 3.12, because it needs NumPy before 2.0; this is Python "
            f"{sys.version_info.major}.{sys.version_info.minor}. Install kronsae in one of them for this command."
        )
    question = f"SAEBench runs in an environment of its own, and there is none in {found.folder}. Build it ({NEEDED})?"
    if not prepare and not confirm(question):
        raise UserError(
            f"SAEBench must have an environment of its own, because it pins NumPy before 2.0 and datasets before 4.0; "
            f"there is none. Add --prepare to build it in {found.folder} ({NEEDED})."
        )
    found.build()
    return found


def run_job(built: Environment, job: Job, subjects: Subjects) -> list[dict[str, Any]]:
    """Run the job in the environment; return one row per SAE and evaluation.

    Raises:
        UserError: SAEBench ended without an outcome.
    """
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saebench.", dir=out) as name:
        folder = Path(name)
        described = to_dict(job)
        for about in described["saes"]:
            about["folder"] = str(checkpoint.save(subjects.saes[about["name"]], folder / "saes" / about["name"]))
        write_json(folder / JOB_FILE, described)
        status = built.run_module(RUNNER, str(folder), offline=local_folder(subjects.model) is not None)
        finished = (folder / OUTCOME_FILE).is_file()
        rows: list[dict[str, Any]] = read_json(folder / OUTCOME_FILE, "the outcome") if finished else []
    if status and len(rows) < len(job.saes) * len(job.evals):
        done = f" after {len(rows)} of {len(job.saes) * len(job.evals)} evaluations" if rows else ""
        raise UserError(
            f"SAEBench failed{done}; its own error is above. Results that were complete are in {out / 'eval_results'}."
        )
    return rows
