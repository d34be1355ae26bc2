"""Sweep: the points of a grid, trained in groups that share a stream, evaluated, and collected in a CSV and a page.

A point is identified by its config, not by its name or its position in the grid. Therefore an interrupted sweep
resumes, and a sweep with a changed grid trains only the new points.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kronsae.core.checks import check_count
from kronsae.core.flops import training_flops
from kronsae.runs.config import RunConfig
from kronsae.runs.evaluation import evaluate_run
from kronsae.runs.pipeline import Source
from kronsae.runs.planning import TIMED_FROM_STEPS, MemberPlan, Plan, format_duration, make_plan, with_times
from kronsae.runs.run import Run, execute
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import Interrupted, UserError, nearest
from kronsae.support.files import check_folder_place, folder_lock, read_json, write_json
from kronsae.support.progress import progress_bar
from kronsae.support.provenance import provenance
from kronsae.support.resources import format_bytes, free_disk_bytes
from kronsae.sweeps.grid import Point, SweepConfig, digest_of, points, seeds
from kronsae.sweeps.results import CONFIG_FILE, Sweep, result_row
from kronsae.training.config import MemberConfig
from kronsae.training.member import Diverged

MEMORY_SHARE = 0.8
"""Share of the available memory that a group may use; the rest is for evaluation and errors of the estimate."""
DIVERGED_FOLDER = "diverged"
"""Folder, inside a sweep's folder, with a file for each point whose training diverged, named by its digest."""


@dataclass(frozen=True)
class Group:
    """Points that train on one stream, and their run folder."""

    folder: Path
    points: tuple[Point, ...]

    @property
    def run_config(self) -> RunConfig:
        """Return the config of the run with all of these points."""
        return replace(self.points[0].run, saes=tuple(point.run.saes[0] for point in self.points))


@dataclass(frozen=True)
class SweepPlan:
    """Remaining work of a sweep and its requirements; ``str()`` describes it.

    Args:
        groups: groups to train, in order.
        finished: number of points that are already trained.
        diverged: number of points whose training diverged earlier; they are not trained again.
        seconds: measured time of the remaining training; None if it was not measured.
        stale: trained runs to evaluate again, because the grid now has another ``eval_tokens``.
        disk_bytes: size of the SAEs of all groups that have not started, and of the checkpoints of the largest.
        memory_bytes: estimated memory of the largest of these groups.
        disk_free_bytes: free disk space.
    """

    groups: tuple[Group, ...]
    finished: int
    diverged: int
    seconds: float | None
    stale: tuple[Run, ...] = ()
    disk_bytes: int = 0
    memory_bytes: int = 0
    disk_free_bytes: int = 0

    def check(self) -> None:
        """Check the disk space.

        Raises:
            UserError: the disk cannot hold the SAEs and checkpoints.
        """
        if self.disk_bytes > self.disk_free_bytes:
            raise UserError(
                f"the sweep must fit on the disk; it needs about {format_bytes(self.disk_bytes)}, but only "
                f"{format_bytes(self.disk_free_bytes)} are free. Free space, choose another --out, or use a "
                "smaller grid."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        groups = [
            {"folder": str(group.folder), "seed": group.points[0].seed, "saes": [point.name for point in group.points]}
            for group in self.groups
        ]
        return {
            "groups": groups,
            "finished": self.finished,
            "diverged": self.diverged,
            "evaluated_again": [str(run.folder) for run in self.stale],
            "seconds": self.seconds,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
        }

    def __str__(self) -> str:
        count = sum(len(group.points) for group in self.groups)
        seeds_left = sorted({point.seed for group in self.groups for point in group.points})
        lines = [
            f"{count} SAEs to train in {len(self.groups)} group(s), seeds {', '.join(map(str, seeds_left)) or '-'}"
        ]
        if self.finished:
            lines[0] += f"; {self.finished} are finished"
        if self.diverged:
            lines[0] += f"; {self.diverged} diverged"
        for group in self.groups:
            lines.append(f"  {group.folder.name}: {', '.join(point.name for point in group.points)}")
        if self.stale:
            lines.append(f"{len(self.stale)} finished group(s) to evaluate again, because eval_tokens changed.")
        if self.disk_bytes:
            disk, free = format_bytes(self.disk_bytes), format_bytes(self.disk_free_bytes)
            lines.append(
                f"Memory: about {format_bytes(self.memory_bytes)} at a time. Disk: about {disk} of {free} free."
            )
        if self.seconds is not None:
            lines.append(f"Time: about {format_duration(self.seconds)} of training, plus the evaluation of each group.")
        return "\n".join(lines)


def sweep(
    *,
    saes: Sequence[str],
    out: Path | str,
    recipe: str | None = None,
    model: str | None = None,
    text: str | None = None,
    hook: str | int | None = None,
    activations: Path | str | None = None,
    tokens: int | Sequence[int] = (),
    flops: float | Sequence[float] = (),
    same_flops_as: str | None = None,
    seeds: int | Sequence[int] = 1,
    set: Sequence[str] = (),
    group_size: int = 16,
    show_progress: bool = True,
) -> Sweep:
    """Train and evaluate every SAE of a grid; the same call resumes an interrupted sweep.

    If the training of an SAE diverges, its row records this and the other SAEs of its group restart without it.

    Args:
        saes: SAEs in the form of ``--sae``; ``{a,b}`` is replaced by each value in turn:
            ``["topk d_sae=1024 k=16", "kron num_heads=128 d_base={1,2} d_extension=4 k=16"]``.
        out: folder of the sweep.
        recipe: name of a recipe to start from; without one, ``model`` (or ``activations``), ``text`` and ``hook`` are
            required.
        model, text, hook, activations: override the recipe's.
        tokens: one or more budgets in tokens.
        flops: one or more budgets in FLOPs, instead of ``tokens``.
        same_flops_as: name of the SAE that trains on ``tokens``; every other SAE gets the same FLOPs.
        seeds: number of seeds (0, 1, ...), or the seeds themselves, of the weights and of the order of the data.
        set: other fields of the runs, ``"loop.batch_tokens={1024,2048}"``; ``saes.*`` means every SAE.
        group_size: maximum number of SAEs on one stream.
        show_progress: show live displays on stderr.

    Raises:
        UserError: an argument is invalid; nothing has been written.
    """
    return execute_sweep(
        SweepConfig(
            saes=tuple(saes),
            recipe=recipe,
            activations=None if activations is None else str(activations),
            model=model,
            text=text,
            hook=None if hook is None else str(hook),
            tokens=(tokens,) if isinstance(tokens, int) else tuple(tokens),
            flops=(flops,) if isinstance(flops, int | float) else tuple(flops),
            same_flops_as=same_flops_as,
            seeds=_seeds(seeds),
            set=tuple(set),
        ),
        out,
        group_size=group_size,
        show_progress=show_progress,
    )


_seeds = seeds  # the argument `seeds` of `sweep` hides the function


def execute_sweep(
    config: SweepConfig,
    out: Path | str,
    *,
    group_size: int = 16,
    show_progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Sweep:
    """Train and evaluate every SAE of a config's grid; see `sweep`."""
    folder = Path(out)
    config = from_dict(SweepConfig, to_dict(config))
    wanted = sweep_points(config)
    _check_folder(folder)
    try:
        with folder_lock(folder):
            return _run_sweep(config, wanted, folder, group_size, show_progress, say)
    except KeyboardInterrupt:  # outside of a training, which ends with a checkpoint
        raise Interrupted(
            f"stopped; the finished groups are kept in {folder}. Run the same command again to resume."
        ) from None


def _run_sweep(
    config: SweepConfig,
    wanted: Sequence[Point],
    folder: Path,
    group_size: int,
    show_progress: bool,
    say: Callable[[str], None],
) -> Sweep:
    finished, plan = plan_sweep(wanted, folder, group_size)
    say(str(plan))
    plan.check()
    _remove_diverged(folder)
    write_json(folder / CONFIG_FILE, {"kronsae_version": version("kronsae"), "sweep": to_dict(config)})
    by_digest = {point.digest: point for point in wanted}
    for run in plan.stale:
        finished |= _results(run, by_digest, show_progress, say)
    for number, group in enumerate(plan.groups, 1):
        say(f"Group {number} of {len(plan.groups)}, seed {group.points[0].seed}, {len(group.points)} SAE(s):")
        if (trained := _train_group(group, folder, show_progress, say)) is not None:
            finished |= _results(trained, by_digest, show_progress, say)
        finished |= _diverged_rows(folder, wanted)
        _collect(folder, wanted, finished).write(to_dict(config))  # intermediate results
    found = _collect(folder, wanted, finished)
    found.write(to_dict(config))
    return found


def _train_group(group: Group, folder: Path, show_progress: bool, say: Callable[[str], None]) -> Run | None:
    """Train a group and return its run; None if all of its SAEs diverge.

    If an SAE diverges, this is recorded in a file and the others restart without it.
    """
    while True:
        try:
            say_short = partial(_say_single_lines, say)
            return execute(group.run_config, group.folder, show_progress=show_progress, say=say_short)
        except Diverged as error:
            (lost,) = (point for point in group.points if point.run.saes[0].name == error.member)
            write_json(_divergence_file(lost.digest, folder), {"what": error.what, "provenance": provenance()})
            shutil.rmtree(group.folder)
            others = [point for point in group.points if point is not lost]
            say(f"{error} The sweep continues without it.")
            if not others:
                return None
            group = _new_group(folder, others)


def _divergence_file(digest: str, folder: Path) -> Path:
    return folder / DIVERGED_FOLDER / f"{digest}.json"


def _remove_diverged(folder: Path) -> None:
    """Remove groups of which an SAE diverged: the process stopped after recording it and before removing the group."""
    for run in _runs(folder):
        if not run.finished and any(_divergence_file(digest, folder).exists() for digest in _digests(run.config)):
            shutil.rmtree(run.folder)


def _runs(folder: Path) -> list[Run]:
    return [Run(path.parent) for path in sorted((folder / "groups").glob("*/run.json"))]


def _diverged_rows(folder: Path, wanted: Iterable[Point]) -> dict[str, dict[str, Any]]:
    """Return the rows, without metrics, of the points whose training diverged, by digest."""
    rows = {}
    for point in wanted:
        if (path := _divergence_file(point.digest, folder)).exists():
            record = read_json(path, "the record of a divergence")
            sentence = str(Diverged(point.name, record["what"]))
            rows[point.digest] = result_row(point, {}, record["provenance"], "", diverged=sentence)
    return rows


def sweep_points(config: SweepConfig) -> list[Point]:
    """Return the points of the grid; with ``same_flops_as``, their budgets are converted to FLOPs."""
    found = points(config)
    if config.same_flops_as is None:
        return found
    resolved, widths = [], dict[str, dict[str, int]]()
    for point in found:
        alike = [other for other in found if other.shared == point.shared]
        names = [other for other in alike if config.same_flops_as in (other.name, other.kind)]
        if len(names) != 1:
            known = dict.fromkeys(other.name for other in alike)
            raise UserError(
                f"same_flops_as must name one SAE of the grid: {', '.join(known)}; got '{config.same_flops_as}'."
                f"{nearest(config.same_flops_as, known)}"
            )
        key = digest_of(to_dict(point.run) | {"saes": [], "seed": 0, "loop": {}})
        if key not in widths:
            widths[key] = Source(names[0].run).widths  # widths of the hooks of the named SAE
        loop = point.run.loop
        flops = training_flops(names[0].run.saes[0].shape(widths[key], point.run.hook), loop.steps * loop.batch_tokens)
        run = replace(point.run, loop=replace(loop, tokens=None, flops=flops))
        resolved.append(replace(point, run=run))
    return resolved


def plan_sweep(
    wanted: Sequence[Point], folder: Path, group_size: int = 16
) -> tuple[dict[str, dict[str, Any]], SweepPlan]:
    """Return the rows of finished and diverged points, by digest, and the plan of the remaining work.

    Raises:
        UserError: the folder holds other files, or a single SAE does not fit into memory.
    """
    check_count("group_size", group_size)
    _check_folder(folder)
    by_digest = {point.digest: point for point in wanted}
    runs = _runs(folder)
    done = [run for run in runs if run.finished and (run.folder / "evaluation.json").exists()]
    finished: dict[str, dict[str, Any]] = {}
    stale: list[Run] = []
    for run in done:
        finished |= (found := _rows_of(run, by_digest))
        if found and read_json(run.folder / "evaluation.json", "the evaluation")["requested_tokens"] != _eval_tokens(
            run, by_digest
        ):
            stale.append(run)
    diverged = {digest: row for digest, row in _diverged_rows(folder, wanted).items() if digest not in finished}
    begun: list[Group] = []
    taken = {*finished, *diverged}
    for run in (run for run in runs if run not in done):
        own = _digests(run.config)
        if all(digest in by_digest and digest not in taken for digest in own):
            pairs = zip(own, run.config.saes, strict=True)
            begun.append(Group(run.folder, tuple(_as_saved(by_digest[digest], run, one) for digest, one in pairs)))
            taken.update(own)
    rest = [point for point in wanted if point.digest not in taken]
    plans: dict[str, Plan] = {}
    new = list(_make_groups(rest, folder, group_size, plans))
    disk, memory = _needs(new, plans)
    plan = SweepPlan(
        (*begun, *new),
        len(finished),
        len(diverged),
        _seconds(new, plans),
        stale=tuple(stale),
        disk_bytes=disk,
        memory_bytes=memory,
        disk_free_bytes=free_disk_bytes(folder),
    )
    return finished | diverged, plan


def _check_folder(folder: Path) -> None:
    check_folder_place(folder)
    inside = list(folder.iterdir()) if folder.exists() else []
    if not (folder / CONFIG_FILE).exists() and any(not path.name.startswith(".") for path in inside):
        raise UserError(
            f"out must be a new or empty folder or a sweep; {folder} holds other files. Choose another one."
        )


def _digests(config: RunConfig) -> list[str]:
    return [
        Point(name="", kind="", settings={}, seed=0, run=replace(config, saes=(member,))).digest
        for member in config.saes
    ]


def _as_saved(point: Point, run: Run, member: MemberConfig) -> Point:
    """Return the point with the config in its run folder, which may differ in the name and the `UNTRAINED` fields."""
    return replace(point, run=replace(run.config, saes=(member,)))


def _eval_tokens(run: Run, by_digest: Mapping[str, Point]) -> int:
    """Return the number of held-out tokens on which to evaluate a run, from the grid."""
    return max(by_digest[digest].run.eval_tokens for digest in _digests(run.config) if digest in by_digest)


def _make_groups(rest: Sequence[Point], folder: Path, group_size: int, plans: dict[str, Plan]) -> Iterable[Group]:
    """Yield groups of points that share a stream, as large as ``group_size`` and the memory allow."""
    for shared in dict.fromkeys(point.shared for point in rest):
        alike = [point for point in rest if point.shared == shared]
        plan = _plan_of(alike, folder, plans)
        room = None if plan.memory_available_bytes is None else MEMORY_SHARE * plan.memory_available_bytes
        chunk: list[Point] = []
        members: tuple[MemberPlan, ...] = ()
        for point, member in zip(alike, plan.members, strict=True):
            needed = replace(plan, members=(*members, member)).memory_bytes
            if chunk and (len(chunk) == group_size or (room is not None and needed > room)):
                yield _new_group(folder, chunk)
                chunk, members = [], ()
            chunk.append(point)
            members = (*members, member)
        yield _new_group(folder, chunk)


def _new_group(folder: Path, chunk: Sequence[Point]) -> Group:
    group = Group(Path(), tuple(chunk))
    return Group(folder / "groups" / digest_of(to_dict(group.run_config)), group.points)


def _plan_of(alike: Sequence[Point], folder: Path, plans: dict[str, Plan]) -> Plan:
    """Return the plan, with times, of one run with all these points; other seeds reuse it."""
    key = _without_seed(alike)
    if key not in plans:
        source = Source(replace(alike[0].run, saes=tuple(point.run.saes[0] for point in alike)))
        plan = make_plan(source, folder)
        for member in plan.members:
            replace(plan, members=(member,)).check()
        plans[key] = with_times(plan, source) if plan.steps >= TIMED_FROM_STEPS else plan
    return plans[key]


def _without_seed(alike: Sequence[Point]) -> str:
    runs = [to_dict(point.run) | {"seed": 0, "saes": [to_dict(replace(point.run.saes[0], seed=0))]} for point in alike]
    return digest_of(runs)


def _planned(group: Group, plans: Mapping[str, Plan]) -> list[tuple[Plan, MemberPlan]]:
    """Return the requirements of each point of a group, with the plan that contains them."""
    known = {member.name: (plan, member) for plan in plans.values() for member in plan.members}
    return [known[point.name] for point in group.points]


def _needs(groups: Sequence[Group], plans: Mapping[str, Plan]) -> tuple[int, int]:
    """Return disk and memory requirements in bytes; checkpoints exist for one group at a time, SAEs for all."""
    saved, checkpoints, memory = 0, 0, 0
    for group in groups:
        found = _planned(group, plans)
        members = tuple(member for _, member in found)
        own = sum(member.saved_bytes for member in members)
        saved += own
        checkpoints = max(checkpoints, sum(member.disk_bytes for member in members) - own)
        memory = max(memory, replace(found[0][0], members=members).memory_bytes)
    return saved + checkpoints, memory


def _seconds(groups: Sequence[Group], plans: Mapping[str, Plan]) -> float | None:
    """Return the training time of all groups whose times were measured; None if there are none."""
    total, known = 0.0, False
    for group in groups:
        found = _planned(group, plans)
        if all(plan.batch_seconds is not None for plan, _ in found):
            known = True
            total += max(member.steps for _, member in found) * (found[0][0].batch_seconds or 0.0)
            total += sum(member.steps * (member.step_seconds or 0.0) for _, member in found)
    return total if known else None


def _say_single_lines(say: Callable[[str], None], text: str) -> None:
    """Pass on messages of one line; this drops the plan of each run, which the sweep's plan already covers."""
    if "\n" not in text:
        say(text)


def _results(
    run: Run, by_digest: Mapping[str, Point], show_progress: bool, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Evaluate a trained group and return its rows, by digest."""
    with progress_bar("evaluating", quiet=not show_progress) as progress:
        evaluate_run(run, tokens=_eval_tokens(run, by_digest), say=say, progress=progress)
    if not (run.folder / "provenance.json").exists():
        write_json(run.folder / "provenance.json", provenance())
    return _rows_of(run, by_digest)


def _rows_of(run: Run, by_digest: Mapping[str, Point]) -> dict[str, dict[str, Any]]:
    figures = {row["name"]: row for row in read_json(run.folder / "evaluation.json", "the evaluation")["saes"]}
    path = run.folder / "provenance.json"
    if not path.exists():  # the process stopped between the evaluation and this line
        write_json(path, provenance())
    about = read_json(path, "the group's provenance")
    rows = {}
    for digest, member in zip(_digests(run.config), run.config.saes, strict=True):
        if digest in by_digest:
            point = by_digest[digest]
            trained = replace(point, run=replace(point.run, loop=run.config.loop))  # log_every as it was in training
            row = result_row(trained, figures[member.name], about, run.folder.name)
            rows[digest] = row | {
                "name_in_group": member.name
            }  # another name than the grid's if an older grid trained it
    return rows


def _collect(folder: Path, wanted: Sequence[Point], finished: Mapping[str, dict[str, Any]]) -> Sweep:
    """Return the available rows, in the grid's order and with the grid's names."""
    rows = [
        finished[point.digest] | {"name": point.name, "seed": point.seed}
        for point in wanted
        if point.digest in finished
    ]
    settings = {point.name: {"kind": point.kind} | dict(point.settings) for point in wanted}
    return Sweep(folder, rows, settings)
