"""A sweep: the points of a grid, trained in groups on one stream each, evaluated, gathered in one CSV and one page.

A point is known by its content, not by its name or place. So a sweep that was stopped carries on, and one whose grid
was changed trains only what it has not trained yet.
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
from kronsae.runs.planning import TIMED_FROM_STEPS, MemberPlan, Plan, in_time, make_plan, with_times
from kronsae.runs.run import Run, execute
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError, nearest
from kronsae.support.files import check_folder_place, only_writer, read_json, write_json
from kronsae.support.progress import progress_bar
from kronsae.support.provenance import provenance
from kronsae.support.resources import free_disk_bytes, in_bytes
from kronsae.sweeps.grid import Point, SweepConfig, digest_of, points, seeds
from kronsae.sweeps.results import CONFIG_FILE, Sweep, result_row
from kronsae.training.config import MemberConfig
from kronsae.training.member import Diverged

MEMORY_SHARE = 0.8
"""Of the memory there is, so much is given to a group: evaluation and the estimate's error need the rest."""
DIVERGED_FOLDER = "diverged"
"""In a sweep's folder: a file for each point whose training diverged, named by its digest."""


@dataclass(frozen=True)
class Group:
    """Points that train on one stream, and the run folder for it."""

    folder: Path
    points: tuple[Point, ...]

    @property
    def run_config(self) -> RunConfig:
        """One run with all of them."""
        return replace(self.points[0].run, saes=tuple(point.run.saes[0] for point in self.points))


@dataclass(frozen=True)
class SweepPlan:
    """What is left to do; ``str()`` says it in lines.

    Args:
        groups: to train, in order.
        finished: points that need no training any more.
        diverged: points whose training diverged before; it is not tried again.
        seconds: of all training left, measured; None where it was not.
        stale: trained runs that are to be evaluated again, on as many held-out tokens as the grid says now.
        disk_bytes: the SAEs of all groups that are not begun, and the checkpoints of the largest.
        memory_bytes: of the largest of these groups, about.
        disk_free_bytes: what there is.
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
        """Refuse more SAEs than the disk can hold.

        Raises:
            UserError: that.
        """
        if self.disk_bytes > self.disk_free_bytes:
            raise UserError(
                f"the sweep must fit on the disk; about {in_bytes(self.disk_bytes)} are needed and "
                f"{in_bytes(self.disk_free_bytes)} are free. Make room, choose another --out, or a smaller grid."
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
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
            lines.append(f"{len(self.stale)} finished group(s) to evaluate again: the grid has other eval_tokens now.")
        if self.disk_bytes:
            disk, free = in_bytes(self.disk_bytes), in_bytes(self.disk_free_bytes)
            lines.append(f"Memory: about {in_bytes(self.memory_bytes)} at a time. Disk: about {disk} in all of {free}.")
        if self.seconds is not None:
            lines.append(f"Time: about {in_time(self.seconds)} of training, and the evaluation of each group.")
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
    """Train and evaluate every SAE of a grid; the same call carries on what was stopped.

    An SAE whose training diverges keeps a row that says so, and the others train on without it.

    Args:
        saes: as ``--sae`` takes them, ``{a,b}`` standing for each of several values:
            ``["topk d_sae=1024 k=16", "kron num_heads=128 d_base={1,2} d_extension=4 k=16"]``.
        out: the sweep's folder.
        recipe: a named run to start from; without one, ``model`` (or ``activations``), ``text`` and ``hook``.
        model, text, hook, activations: in the place of the recipe's.
        tokens: the budget, or several.
        flops: the same in FLOPs, in place of ``tokens``.
        same_flops_as: the SAE that trains on ``tokens``; each other one on as many as cost the same FLOPs.
        seeds: how many (0, 1, ...) or which ones: of the weights and of the order of the data.
        set: other fields of the runs, ``"loop.batch_tokens={1024,2048}"``; ``saes.*`` is every SAE.
        group_size: at most so many SAEs on one stream.
        show_progress: show live displays on stderr.

    Raises:
        UserError: anything given that cannot work, before anything is written.
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


_seeds = seeds  # the function, where an argument has its name


def execute_sweep(
    config: SweepConfig,
    out: Path | str,
    *,
    group_size: int = 16,
    show_progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Sweep:
    """Carry out a whole sweep: what `sweep` does once its arguments are in one piece."""
    folder = Path(out)
    config = from_dict(SweepConfig, to_dict(config))
    wanted = sweep_points(config)
    _check_folder(folder)
    with only_writer(folder):
        return _carry_out(config, wanted, folder, group_size, show_progress, say)


def _carry_out(
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
    _clear(folder)
    write_json(folder / CONFIG_FILE, {"kronsae_version": version("kronsae"), "sweep": to_dict(config)})
    by_digest = {point.digest: point for point in wanted}
    for run in plan.stale:
        finished |= _results(run, by_digest, show_progress, say)
    for number, group in enumerate(plan.groups, 1):
        say(f"Group {number} of {len(plan.groups)}, seed {group.points[0].seed}, {len(group.points)} SAE(s):")
        if (trained := _trained(group, folder, show_progress, say)) is not None:
            finished |= _results(trained, by_digest, show_progress, say)
        finished |= _diverged_rows(folder, wanted)
        _gathered(folder, wanted, finished).write(to_dict(config))  # what there is can be looked at
    found = _gathered(folder, wanted, finished)
    found.write(to_dict(config))
    return found


def _trained(group: Group, folder: Path, show_progress: bool, say: Callable[[str], None]) -> Run | None:
    """Train a group. Who diverges is noted, and the others start anew without it; None where nobody is left."""
    while True:
        try:
            brief = partial(_say_lines, say)
            return execute(group.run_config, group.folder, show_progress=show_progress, say=brief)
        except Diverged as error:
            (lost,) = (point for point in group.points if point.run.saes[0].name == error.member)
            write_json(_note_of(lost.digest, folder), {"what": error.what, "provenance": provenance()})
            shutil.rmtree(group.folder)
            others = [point for point in group.points if point is not lost]
            say(f"{error} The sweep goes on without it.")
            if not others:
                return None
            group = _group(folder, others)


def _note_of(digest: str, folder: Path) -> Path:
    return folder / DIVERGED_FOLDER / f"{digest}.json"


def _clear(folder: Path) -> None:
    """Remove the groups that can never be finished: stopped after a divergence was noted, before they were removed."""
    for run in _runs(folder):
        if not run.finished and any(_note_of(digest, folder).exists() for digest in _digests(run.config)):
            shutil.rmtree(run.folder)


def _runs(folder: Path) -> list[Run]:
    return [Run(path.parent) for path in sorted((folder / "groups").glob("*/run.json"))]


def _diverged_rows(folder: Path, wanted: Iterable[Point]) -> dict[str, dict[str, Any]]:
    """The rows, without figures, of the points whose training diverged, by digest."""
    rows = {}
    for point in wanted:
        if (path := _note_of(point.digest, folder)).exists():
            note = read_json(path, "the note of a divergence")
            sentence = str(Diverged(point.name, note["what"]))
            rows[point.digest] = result_row(point, {}, note["provenance"], "", diverged=sentence)
    return rows


def sweep_points(config: SweepConfig) -> list[Point]:
    """The points of the grid, their budgets in FLOPs where they are to be those of one of them."""
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
            widths[key] = Source(names[0].run).widths  # the hooks of the SAE that is counted
        loop = point.run.loop
        flops = training_flops(names[0].run.saes[0].shape(widths[key], point.run.hook), loop.steps * loop.batch_tokens)
        run = replace(point.run, loop=replace(loop, tokens=None, flops=flops))
        resolved.append(replace(point, run=run))
    return resolved


def plan_sweep(
    wanted: Sequence[Point], folder: Path, group_size: int = 16
) -> tuple[dict[str, dict[str, Any]], SweepPlan]:
    """What is finished or diverged, by digest of the point as rows of the CSV, and what is left to do.

    Raises:
        UserError: the folder holds something else, or a single SAE does not fit into memory.
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
        if found and read_json(run.folder / "evaluation.json", "the evaluation")["requested_tokens"] != _asked(
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
    new = list(_grouped(rest, folder, group_size, plans))
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
        raise UserError(f"out must be a new or empty folder or a sweep; {folder} holds other files.")


def _digests(config: RunConfig) -> list[str]:
    return [
        Point(name="", kind="", settings={}, seed=0, run=replace(config, saes=(member,))).digest
        for member in config.saes
    ]


def _as_saved(point: Point, run: Run, member: MemberConfig) -> Point:
    """The point as a run folder has it: made for a grid with another name for it, or other `UNTRAINED` fields."""
    return replace(point, run=replace(run.config, saes=(member,)))


def _asked(run: Run, by_digest: Mapping[str, Point]) -> int:
    """On how many held-out tokens a run is to be evaluated: as many as the grid says of its points."""
    return max(by_digest[digest].run.eval_tokens for digest in _digests(run.config) if digest in by_digest)


def _grouped(rest: Sequence[Point], folder: Path, group_size: int, plans: dict[str, Plan]) -> Iterable[Group]:
    """Points with one stream together, so many at a time as ``group_size`` and the memory allow."""
    for shared in dict.fromkeys(point.shared for point in rest):
        alike = [point for point in rest if point.shared == shared]
        plan = _plan_of(alike, folder, plans)
        room = None if plan.memory_available_bytes is None else MEMORY_SHARE * plan.memory_available_bytes
        chunk: list[Point] = []
        members: tuple[MemberPlan, ...] = ()
        for point, member in zip(alike, plan.members, strict=True):
            needed = replace(plan, members=(*members, member)).memory_bytes
            if chunk and (len(chunk) == group_size or (room is not None and needed > room)):
                yield _group(folder, chunk)
                chunk, members = [], ()
            chunk.append(point)
            members = (*members, member)
        yield _group(folder, chunk)


def _group(folder: Path, chunk: Sequence[Point]) -> Group:
    group = Group(Path(), tuple(chunk))
    return Group(folder / "groups" / digest_of(to_dict(group.run_config)), group.points)


def _plan_of(alike: Sequence[Point], folder: Path, plans: dict[str, Plan]) -> Plan:
    """The plan of one run with all these points, timed; that of another seed is the same."""
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
    """What each point of a group takes, with the plan it is from."""
    known = {member.name: (plan, member) for plan in plans.values() for member in plan.members}
    return [known[point.name] for point in group.points]


def _needs(groups: Sequence[Group], plans: Mapping[str, Plan]) -> tuple[int, int]:
    """Bytes on the disk, where SAEs stay and checkpoints are those of one group at a time, and in memory."""
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
    """Of all groups whose times were measured; one that is carried on is not among them."""
    total, known = 0.0, False
    for group in groups:
        found = _planned(group, plans)
        if all(plan.batch_seconds is not None for plan, _ in found):
            known = True
            total += max(member.steps for _, member in found) * (found[0][0].batch_seconds or 0.0)
            total += sum(member.steps * (member.step_seconds or 0.0) for _, member in found)
    return total if known else None


def _say_lines(say: Callable[[str], None], text: str) -> None:
    """Hand on single lines: a run's own plan has many, and the sweep's was said before."""
    if "\n" not in text:
        say(text)


def _results(
    run: Run, by_digest: Mapping[str, Point], show_progress: bool, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Evaluate a trained group and return its rows by digest."""
    with progress_bar("evaluating", quiet=not show_progress) as progress:
        evaluate_run(run, tokens=_asked(run, by_digest), say=say, progress=progress)
    if not (run.folder / "provenance.json").exists():
        write_json(run.folder / "provenance.json", provenance())
    return _rows_of(run, by_digest)


def _rows_of(run: Run, by_digest: Mapping[str, Point]) -> dict[str, dict[str, Any]]:
    figures = {row["name"]: row for row in read_json(run.folder / "evaluation.json", "the evaluation")["saes"]}
    path = run.folder / "provenance.json"
    if not path.exists():  # stopped between the evaluation and this
        write_json(path, provenance())
    about = read_json(path, "the group's provenance")
    rows = {}
    for digest, member in zip(_digests(run.config), run.config.saes, strict=True):
        if digest in by_digest:
            asked = by_digest[digest]
            trained = replace(asked, run=replace(asked.run, loop=run.config.loop))  # logged as often as it was
            rows[digest] = result_row(trained, figures[member.name], about, run.folder.name)
    return rows


def _gathered(folder: Path, wanted: Sequence[Point], finished: Mapping[str, dict[str, Any]]) -> Sweep:
    """The rows there are, in the grid's order and under the grid's names."""
    rows = [
        finished[point.digest] | {"name": point.name, "seed": point.seed}
        for point in wanted
        if point.digest in finished
    ]
    settings = {point.name: {"kind": point.kind} | dict(point.settings) for point in wanted}
    return Sweep(folder, rows, settings)
