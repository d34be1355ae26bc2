"""A run: training of SAEs, and the folder with its config, metrics, SAEs and results.

`train` starts or resumes a run; `open_run` opens an existing one.
"""

from __future__ import annotations

import itertools
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from kronsae.core import checkpoint
from kronsae.data.model import ModelConfig, origin
from kronsae.data.text import TextConfig, TextStream
from kronsae.runs.config import RunConfig, own_hook
from kronsae.runs.evaluation import Comparison, evaluate_run, write_report
from kronsae.runs.folder import METRICS, RunFolder
from kronsae.runs.parsing import parse_sae
from kronsae.runs.pipeline import Source
from kronsae.runs.planning import TIMED_FROM_STEPS, Plan, make_plan, with_times
from kronsae.runs.trainers import Alone, Together, Trainers
from kronsae.support.config import differences, from_dict, to_dict
from kronsae.support.errors import Interrupted as Interrupted
from kronsae.support.errors import UserError, nearest
from kronsae.support.files import check_folder_place, fingerprint, folder_lock
from kronsae.support.sealed import write_sealed
from kronsae.training.config import LoopConfig, MemberConfig
from kronsae.training.display import DisplaySink
from kronsae.training.member import Member
from kronsae.training.sinks import JsonlSink, Sink, TensorBoardSink, WandbSink, check_history, require
from kronsae.training.state import Progress
from kronsae.training.trainer import fit

if TYPE_CHECKING:
    from kronsae.distributed.team import Team


class Run(RunFolder):
    """A run folder with methods to evaluate the run and to write its report."""

    def compare(self, tokens: int | None = None) -> Comparison:
        """Evaluate the SAEs on held-out text; ``print`` shows a table, ``.rows`` has all metrics."""
        return Comparison(evaluate_run(self, tokens=tokens))

    def report(self) -> Path:
        """Write ``report.html`` and return its path; evaluate the run first if it was not."""
        return write_report(self)


def open_run(folder: Path | str) -> Run:
    """Open the run in ``folder``.

    Raises:
        UserError: there is no run, or its config cannot be read.
    """
    run = Run(Path(folder))
    if not run.folder.is_dir():
        raise UserError(
            f"the run folder must exist; there is no {folder}. Give the --out of an earlier `kronsae train`."
        )
    _ = run.config
    return run


def train(
    *,
    model: str | ModelConfig,
    text: str | TextConfig,
    hook: str | int | None = None,
    saes: Sequence[MemberConfig | str],
    out: Path | str,
    tokens: int | None = None,
    flops: float | None = None,
    same_flops_as: str | None = None,
    batch_tokens: int = 8192,
    log_every: int = 10,
    checkpoint_every: int = 500,
    show_progress: bool = True,
    tensorboard: bool = False,
    wandb: str | None = None,
    **options: Any,
) -> Run:
    """Train SAEs side by side on the activations of a language model, in one pass over the text.

    The same call resumes an unfinished run (bit-identical on a CPU) and returns a finished one.

    Args:
        model: Hub name, local folder, GGUF file, a name of `kronsae models` such as ``"bundled"``, or a config.
        text: Hub data set, local file or folder, ``"bundled"``, or a config.
        hook: module path or layer, such as ``"layers.6"`` or ``6``, for SAEs without hooks of their own; optional if
            every SAE has its own.
        saes: configs from `kronsae.topk`, `kronsae.kron` and other functions of `kronsae.runs.architectures`, or
            specifications: ``"batch_topk d_sae=4096 k=32"``.
        out: the run folder.
        tokens: training budget in tokens.
        flops: training budget of each SAE in FLOPs (`kronsae.core.flops.training_flops`), instead of ``tokens``.
        same_flops_as: name of the SAE that trains on ``tokens``; every other SAE gets the same FLOPs.
        batch_tokens: tokens per optimiser step.
        log_every: steps between metrics.
        checkpoint_every: steps between checkpoints.
        show_progress: show a live display on stderr.
        tensorboard: also write TensorBoard events into the run folder.
        wandb: also log to this Weights & Biases project.
        **options: the remaining fields of `kronsae.RunConfig` (context_length, buffer_tokens, seed, ...).

    Raises:
        UserError: an argument is invalid; nothing has been written.
    """
    members = tuple(parse_sae(one) if isinstance(one, str) else one for one in saes)
    if hook is None and (hook := own_hook(members)) is None:
        raise UserError("hook, such as 'layers.6', or read= of every SAE must be given; got neither.")
    config = RunConfig(
        model=ModelConfig(name=model) if isinstance(model, str) else model,
        text=TextConfig(source=text) if isinstance(text, str) else text,
        hook=str(hook),
        saes=members,
        loop=LoopConfig(
            tokens=tokens,
            flops=flops,
            same_flops_as=same_flops_as,
            batch_tokens=batch_tokens,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
        ),
        **_known_options(options),
    )
    return execute(config, out, show_progress=show_progress, tensorboard=tensorboard, wandb=wandb)


def execute(
    config: RunConfig,
    out: Path | str,
    *,
    show_progress: bool = True,
    tensorboard: bool = False,
    wandb: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    team: Team | None = None,
    keep_checkpoints: bool = False,
) -> Run:
    """Train or resume the run of a config; see `train`.

    Args:
        config: the run.
        out: the run folder.
        show_progress, tensorboard, wandb: as for `train`.
        say: takes each line for the user.
        team: the processes that train together and all call this (`kronsae.distributed`); None: this one alone.
        keep_checkpoints: leave the last checkpoints, with the states of the optimisers, in the finished run's folder.
    """
    run = Run(Path(out))
    trainers = Alone() if team is None else Together(team)
    if not trainers.leads:
        show_progress, tensorboard, wandb, say = False, False, None, _silently
    config = from_dict(RunConfig, to_dict(config))  # a config that cannot be read back must not be written
    check_folder(run, config)
    for package, wanted in (("tensorboard", tensorboard), ("wandb", wandb is not None)):
        if wanted:
            require(package)
    trainers.check(config)
    with folder_lock(run.folder) if trainers.leads and not run.finished else nullcontext():
        check_folder(run, config)  # again: another process may have started or finished a run before the lock was taken
        if run.finished:
            say(f"The run in {run.folder} is already finished; nothing is trained or logged.")
        else:
            logging = {"show_progress": show_progress, "tensorboard": tensorboard, "wandb": wandb}
            _train_run(run, config, trainers, logging, say)
            if trainers.leads and not keep_checkpoints:
                shutil.rmtree(run.folder / "checkpoint", ignore_errors=True)
    return run


def _silently(line: str) -> None:
    """Do nothing with a line for the user."""


def _train_run(
    run: Run, config: RunConfig, trainers: Trainers, logging: dict[str, Any], say: Callable[[str], None]
) -> None:
    source = Source(config)
    newest = trainers.newest(run.folder / "checkpoint", say)
    progress = Progress() if newest is None else newest.progress
    if trainers.leads and progress.history is not None:
        metrics = run.folder / METRICS
        check_history(metrics, progress.history)
        if not metrics.exists():
            say(f"Warning: {metrics} is missing; the metrics of the first {progress.step} steps are lost.")
    plan = make_plan(source, run.folder, progress.step)
    if progress.step < plan.steps:
        plan.check()
        if trainers.leads and plan.steps - progress.step >= TIMED_FROM_STEPS:
            plan = with_times(plan, source)
        say(f"{plan}{trainers.description}")
    steps = {member.name: member.steps for member in plan.members}
    members = [
        Member(member, source.widths, config.hook, steps[member.name], source.device, trainers.split)
        for member in config.saes
    ]
    if newest is not None:
        trainers.load(newest, members)
        say(f"Resuming after {progress.tokens:,} of {plan.tokens:,} tokens.")
    if progress.step == plan.steps:  # the process stopped after the last step and before saving the SAEs
        _finish(run, members, progress, trainers)
        return
    say(plan.start)
    filling = perf_counter()
    stream = iter(trainers.batches(source, progress.stream))
    first = next(stream)  # tests text, model and activations before anything is written
    progress = replace(progress, seconds=progress.seconds + perf_counter() - filling)
    if trainers.leads:
        if problem := _nothing_held_out(config):
            say(f"Warning: `kronsae eval` will have no held-out text: {problem}")
        write_sealed(run.folder / "run.json", {"kronsae_version": version("kronsae"), "config": to_dict(config)})
    with (
        _sinks(run, plan, progress, **logging, leads=trainers.leads) as sinks,
        _stop_on_interrupt() as interrupted,
        trainers.sharing(),
    ):
        batches, checkpoints = itertools.chain([first], stream), run.folder / "checkpoint"
        should_stop = partial(trainers.agreed, interrupted)
        save = partial(_save, trainers, sinks)
        progress = fit(members, batches, config.loop, sinks, checkpoints, progress, should_stop, save)
    if progress.step < plan.steps:
        raise Interrupted(
            f"stopped after {progress.tokens:,} of {plan.tokens:,} tokens; a checkpoint is saved in {run.folder}. "
            "Run the same command again to resume."
        )
    _finish(run, members, progress, trainers)
    say(
        f"Trained on {progress.tokens:,} tokens in {progress.seconds:.0f} s: "
        f"{progress.tokens / progress.seconds:,.0f} tokens/s for {len(members)} SAE(s)."
    )


def _save(
    trainers: Trainers, sinks: Sequence[Sink], folder: Path, members: Sequence[Member], progress: Progress
) -> None:
    """Write a checkpoint that knows the metrics up to its step, which are in a file outside of it."""
    written = [sink.written for sink in sinks if isinstance(sink, JsonlSink)]
    trainers.save(folder, members, replace(progress, history=written[0] if written else None))


def check_folder(run: Run, config: RunConfig) -> None:
    """Raise if the folder holds other files or a run with another config."""
    if not run.finished:  # a finished run is only read
        check_folder_place(run.folder)
    if not run.folder.exists():
        return
    if not (run.folder / "run.json").exists():
        if any(not path.name.startswith(".") for path in run.folder.iterdir()):
            raise UserError(
                f"out must be a new or empty folder or a run; {run.folder} holds other files. Choose another one."
            )
        return
    if run.imported:
        raise UserError(
            f"out must be a new folder or one of a training; {run.folder} holds imported SAEs "
            f"({', '.join(run.names)}), which kronsae can measure but not train or resume. Choose another --out."
        )
    changed = differences(
        to_dict(run.config), to_dict(config)
    )  # fields that the run's version did not have get their defaults
    if changed:
        raise UserError(
            f"out must be a new folder or hold a run with the same config; {run.folder} holds a different run "
            f"({'; '.join(changed[:3])}{f'; and {len(changed) - 3} more' if len(changed) > 3 else ''}). Choose another "
            "--out, or remove the folder."
        )


def _finish(run: Run, members: Sequence[Member], progress: Progress, trainers: Trainers) -> None:
    saes = {member.name: member.finished_sae() for member in members}
    if not trainers.leads:
        return
    tokens = {member.name: member.steps * run.config.loop.batch_tokens for member in members}
    for member in members:
        scales = {what: of.scale_H.tolist() for what, of in member.normalizations.items()}
        about = sae_metadata(run.config, member.config, tokens[member.name]) | {"training_scales": scales}
        checkpoint.save(saes[member.name], run.folder / "saes" / member.name, about)
    seconds = {member.name: member.seconds for member in members}
    learned = {member.name: getattr(member.sae.encoder, "gate_exponent", None) for member in members}
    exponents = {name: exponent for name, exponent in learned.items() if exponent is not None}
    history = fingerprint(run.folder / METRICS) if (run.folder / METRICS).exists() else None
    write_sealed(
        run.folder / "training.json",
        {"steps": progress.step, "tokens": progress.tokens, "seconds": progress.seconds}
        | {"sae_tokens": tokens, "sae_seconds": seconds, "history": history}
        | ({"gate_exponents": exponents} if exponents else {}),
    )


def _nothing_held_out(config: RunConfig) -> str:
    """Return why there is no held-out text to evaluate on, or ``""``; not checked for harvested activations."""
    if config.activations is not None:
        return ""
    held_out = TextStream(config.text, held_out=True, held_out_share=config.held_out_share, repeat=False)
    try:
        next(iter(held_out))
    except UserError as error:
        return str(error)
    return ""


def sae_metadata(config: RunConfig, member: MemberConfig, tokens: int) -> dict[str, Any]:
    """Return the metadata of an SAE for its ``cfg.json``: model, hooks, text and training."""
    return {
        "model_name": config.model.name,
        "model_revision": config.model.revision,
        "model_origin": origin(config.model.name),
        "hook_name": member.reads(config.hook)[0],
        "hooks_read": list(member.reads(config.hook)),
        "hooks_written": list(member.writes(config.hook)),
        "context_length": config.context_length,
        "text": to_dict(config.text),
        "tokens": tokens,
        "trained_as": member.shape(1, config.hook).architecture,  # BatchTopK, for example, is saved as JumpReLU
        "training": to_dict(member),
    }


def _known_options(options: dict[str, Any]) -> dict[str, Any]:
    known = {
        *("activations", "activation_order", "context_length", "model_batch", "window_pool_tokens", "buffer_tokens"),
        *("eval_tokens", "eval_ce_tokens", "held_out_share", "seed"),
    }
    for name in options:
        if name not in known:
            raise UserError(f"'{name}' is not an argument of train.{nearest(name, known)}")
    return options


@contextmanager
def _sinks(
    run: Run, plan: Plan, progress: Progress, *, show_progress: bool, tensorboard: bool, wandb: str | None, leads: bool
) -> Iterator[list[Sink]]:
    if not leads:
        yield []
        return
    sinks: list[Sink] = [JsonlSink(run.folder / METRICS, after_step=progress.step)]
    try:
        if tensorboard:
            sinks.append(TensorBoardSink(run.folder / "tensorboard", after_tokens=progress.tokens))
        if wandb is not None:
            sinks.append(WandbSink(wandb, run.folder, to_dict(run.config)))
        if show_progress:
            sinks.append(DisplaySink(plan.tokens, progress.tokens))
        yield sinks
    finally:
        for sink in reversed(sinks):
            sink.close()


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Make the first Ctrl-C or SIGTERM in the block stop the loop after its current step; a second stops at once."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_interrupt(number: int, frame: Any) -> None:
        requested.set()
        restore()

    for number in before:
        signal.signal(number, on_interrupt)
    try:
        yield requested.is_set
    finally:
        restore()
