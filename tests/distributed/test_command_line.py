"""Test `kronsae train` in several processes: one of them speaks and writes, and one tells of an error."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.command_line import Outcome
from tests.distributed.commands import run_command
from tests.distributed.processes import in_processes

from kronsae.distributed.heads import check_divisible
from kronsae.distributed.launch import VARIABLES
from kronsae.runs.config import RunConfig
from kronsae.runs.parsing import parse_sae
from kronsae.runs.trainers import Together
from kronsae.support.errors import UserError
from kronsae.support.files import folder_lock

KRON = ["--sae", "kron num_heads=8 d_base=2 d_extension=2 k=4"]


def outcomes(processes: int, folder: Path, words: list[str], fault: str = "") -> list[tuple[object, str, str]]:
    return in_processes(processes, run_command, folder, words, folder, fault)


def sentences(found: list[tuple[object, str, str]]) -> list[str]:
    """Return what our processes said of an error; torch's own log, which a busy machine makes longer, is left out."""
    lines = [line for _, _, err in found for line in err.splitlines()]
    return [line for line in lines if line.startswith(("Error: ", "a process of the training ended"))]


def test_one_process_speaks_and_writes(base: list[str], tmp_path: Path) -> None:
    out = tmp_path / "r"
    first, second = outcomes(2, tmp_path / "2", [*base, *KRON, "--out", str(out), "--head-parallel", "2", "--json"])
    assert first[0] == second[0] == 0, first
    assert second[1:] == ("", "")
    assert [row["sae"] for row in json.loads(first[1])["saes"]] == ["kron"]
    assert first[2].splitlines()[-1] == f"What now? kronsae eval {out}; kronsae report {out}"
    assert sorted(path.name for path in out.iterdir()) == ["metrics.jsonl", "run.json", "saes", "training.json"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--head-parallel", "3"],
            "Error: head_parallel must divide the number of processes; got 3 with 2. Start with torchrun "
            "--nproc-per-node 3, or a multiple of it, or leave --head-parallel out.",
        ),
        (
            ["--head-parallel", "2", "--sae", "kron num_heads=7 d_base=2 d_extension=2 k=4"],
            "Error: head_parallel must divide num_heads; got 2 with num_heads=7. Change one, or leave --head-parallel "
            "out: the processes then share the tokens.",
        ),
        (
            ["--nonsense"],
            "Error: `kronsae train` has no option --nonsense. Did you mean '--tokens'? See `kronsae train --help`.",
        ),
    ],
    ids=["processes", "heads", "usage"],
)
def test_an_error_of_all_is_told_once(more: list[str], message: str, base: list[str], tmp_path: Path) -> None:
    words = [*base, "--out", str(tmp_path / "r"), *more, *([] if "--sae" in more else KRON)]
    found = outcomes(2, tmp_path / "2", words)
    assert [status for status, _, _ in found] == [2, 2]
    assert sorted(err.strip() for _, _, err in found) == ["", message]
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("specification", "what"),
    [
        ("switch d_sae=64 k=4 num_experts=4", "a switch encoder"),
        ("kron num_heads=8 d_base=2 d_extension=2 k=4 d_trunk=8", "a trunk encoder"),
        ("jumprelu d_sae=64 k=4", "the sparsifier 'jumprelu'"),
        (
            "kron num_heads=8 d_base=2 d_extension=2 k=4 gate=power_mean",
            "the gate 'power_mean', whose parameter all heads share",
        ),
        (
            "kron num_heads=8 d_base=2 d_extension=2 k=4 null_symbols=true",
            "null_symbols",
        ),
    ],
)
def test_what_is_not_divided_is_refused(specification: str, what: str) -> None:
    shape = parse_sae(specification).shape(16, "h")
    why = " Only dense and Kronecker encoders are divided." if what.endswith("encoder") else ""
    instead = "Leave --head-parallel out: the processes then share the tokens."
    message = f"head_parallel must be 1 with {what}; got 2.{why} {instead}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_divisible(shape, 2)
    check_divisible(shape, 1)


def test_revival_is_refused_where_heads_are_divided(config: RunConfig) -> None:
    member = replace(config.saes[1], revive_every_tokens=100)
    team = SimpleNamespace(heads=SimpleNamespace(size=2))
    with pytest.raises(UserError, match=r"^head_parallel must be 1 with revive_every_tokens, as in 'kron'; got 2\. "):
        Together(team).check(replace(config, saes=(member,)))  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", ["slow", "killed"])
def test_an_error_of_one_ends_all_and_is_told_once(fault: str, base: list[str], tmp_path: Path) -> None:
    words = [*base, *KRON, "--out", str(tmp_path / "r")]
    found = outcomes(3, tmp_path / "3", words, fault)
    told = sentences(found)
    if fault == "killed":
        assert told == [
            "a process of the training ended without a message; the others cannot go on. Run the same command again to "
            "resume from the last checkpoint."
        ]
    else:
        assert told == ["Error: the lights must be on; they are off in process 1."]
    assert not any("Traceback" in err for _, _, err in found)


def test_sigterm_of_one_ends_all_with_a_checkpoint(base: list[str], tmp_path: Path) -> None:
    out = tmp_path / "r"
    found = outcomes(2, tmp_path / "2", [*base, *KRON, "--out", str(out)], "terminated")
    assert [status for status, _, _ in found] == [130, 130]
    assert [line for _, _, err in found for line in err.splitlines() if line.startswith("stopped")] == [
        f"stopped after 192 of 256 tokens; a checkpoint is saved in {out}. Run the same command again to resume."
    ]
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["step-00000003"]


def test_a_full_disk_of_one_ends_all_and_is_told_once(base: list[str], tmp_path: Path) -> None:
    out = tmp_path / "r"
    words = [*base, *KRON, "--out", str(out), "--set", "loop.checkpoint_every=2"]
    found = outcomes(2, tmp_path / "2", words, "full")
    assert [status for status, _, _ in found] == [2, 2]
    (told,) = sentences(found)
    assert told.startswith(
        f"Error: the checkpoint in {out / 'checkpoint'} could not be written ('{out}/checkpoint/.part"
    )
    assert "No space left on device" in told
    assert not any("Traceback" in err for _, _, err in found)
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["step-00000002"]


def test_another_process_is_at_work_in_the_folder(base: list[str], tmp_path: Path) -> None:
    with folder_lock(tmp_path / "r"):
        found = outcomes(2, tmp_path / "2", [*base, *KRON, "--out", str(tmp_path / "r")])
    assert all(status in (1, 2) for status, _, _ in found)  # the one that is refused ends the other
    (told,) = sentences(found)
    assert told.startswith("Error: out must be a folder without another writer; another kronsae process is writing to ")


def test_other_commands_run_alone(kronsae: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("0", "2", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    outcome = kronsae("sweep", "--out", "r")
    assert (outcome.status, outcome.err.strip()) == (
        2,
        "Error: only `kronsae train` runs over several processes; torchrun started `kronsae sweep`. Start it alone.",
    )


def test_head_parallel_needs_a_launcher(base: list[str], kronsae: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = kronsae(*base, *KRON, "--out", tmp_path / "r", "--head-parallel", "2")
    assert outcome.status == 2
    assert outcome.err.strip() == (
        "Error: head_parallel must divide the number of processes; got 2 with 1. Start with torchrun --nproc-per-node "
        "2, or a multiple of it, or leave --head-parallel out."
    )


@pytest.mark.slow  # two processes import everything
def test_torchrun(base: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "kronsae"]
    done = subprocess.run(
        [*command, *base, *KRON, "--out", str(tmp_path / "r"), "--json"], capture_output=True, text=True, check=True
    )
    assert len(json.loads(done.stdout)["saes"]) == 1
