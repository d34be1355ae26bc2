"""The campaign of `kronsae doctor crash`: kills at random moments, and random damages of stored files."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

from kronsae.core.checks import check_count, check_seed
from kronsae.doctor.damage import HOW, damage, victims
from kronsae.doctor.kills import Bench, kill, reference
from kronsae.doctor.processes import check_system
from kronsae.doctor.work import KINDS, Kind, harvest_a_part, harvest_activations, write_text_file
from kronsae.support.errors import UserError, nearest
from kronsae.support.files import check_new_folder
from kronsae.support.provenance import provenance


def campaign(
    *,
    kills: int = 50,
    damages: int = 200,
    kinds: Sequence[str] = tuple(KINDS),
    seed: int = 0,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Kill tiny runs at random moments and damage their files at random places; return what was found.

    Args:
        kills: SIGKILLs in all, shared by the kinds.
        damages: flipped bits, and as many truncations, in all.
        kinds: what is killed and whose files are damaged, names in `kronsae.doctor.work.KINDS`.
        seed: seed of the moments and places. Which step a moment hits depends on the machine.
        folder: a new or empty folder to work in, on the disk to be checked; None: a temporary one.
        say: receives a line per stage.
        progress: called with the kills and damages done and in all.

    Returns:
        ``{"kills": [...], "damages": [...], "failures": [...], "seed", "seconds", "provenance"}`` with the fields of
        `kronsae.doctor.kills.Kills` and `kronsae.doctor.damage.Damages`.

    Raises:
        UserError: an argument is invalid, or a run fails without being killed.
    """
    check_count("kills", kills)
    check_count("damages", damages)
    check_seed(seed)
    for name in kinds:
        if name not in KINDS:
            raise UserError(f"kinds must be among {', '.join(KINDS)}; got '{name}'.{nearest(name, KINDS)}")
    if not kinds:
        raise UserError(f"kinds must name at least one of {', '.join(KINDS)}; got none.")
    check_system()
    if folder is not None:
        check_new_folder(folder)
    with ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory())) if folder is None else folder
        where.mkdir(parents=True, exist_ok=True)
        return _campaign(kills, damages, kinds, seed, where.absolute(), say, progress)


def _campaign(
    kills: int,
    damages: int,
    kinds: Sequence[str],
    seed: int,
    folder: Path,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    started, total = monotonic(), kills + 2 * damages
    draw = random.Random(seed)
    bench = Bench(folder, folder / "text.jsonl", folder / "activations")
    write_text_file(bench.text)
    _finished(bench, Kind("harvest", harvest_activations), bench.activations)
    wholes = {name: reference(bench, name) for name in kinds}
    shares = [len(range(number, kills, len(kinds))) for number in range(len(kinds))]
    killed: list[dict[str, Any]] = []
    before = 0
    for name, share in zip(kinds, shares, strict=True):
        say(f"Killing {KINDS[name].about} at {share} random moments.")
        found = kill(bench, name, *wholes[name], share, draw, _after(before, total, progress))
        killed.append({"about": KINDS[name].about, "tolerance": KINDS[name].tolerance} | asdict(found))
        before += share
    unfinished = folder / "unfinished"
    _finished(bench, Kind("part of a harvest", harvest_a_part), unfinished)
    files = victims(
        folder / "damaged",
        stored=bench.activations,
        unfinished=unfinished,
        runs={KINDS[name].checkpoint: wholes[name][0] for name in kinds if KINDS[name].checkpoint},
    )
    damaged: list[dict[str, Any]] = []
    for how in HOW:
        say(f"Damaging {damages} files: {how}.")
        damaged += [asdict(one) for one in damage(files, how, damages, draw, _after(before, total, progress))]
        before += damages
    return {
        "kills": killed,
        "damages": damaged,
        "failures": [failure for one in (*killed, *damaged) for failure in one["failures"]],
        "seed": seed,
        "seconds": round(monotonic() - started, 1),
        "provenance": provenance(),
    }


def _finished(bench: Bench, kind: Kind, out: Path) -> None:
    ended = bench.start(kind, out)
    if not ended.finished:
        raise UserError(f"the {kind.about} of the campaign must succeed; it ended with: {ended.said.strip()[-300:]}")


def _after(before: int, total: int, progress: Callable[[int, int], None]) -> Callable[[int], None]:
    return lambda done: progress(before + done, total)
