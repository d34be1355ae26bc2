"""Full disks, folders without rights, SIGTERM and Ctrl-C: one sentence, nothing lost, and the same command goes on."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.command_line import Outcome
from tests.tiny_runs import assert_same_run

from kronsae.data.harvest import ActivationStream
from kronsae.runs.run import Run
from kronsae.sweeps import sweep as sweeping
from kronsae.training.member import Member

Kronsae = Callable[..., Outcome]
SAE = ("--sae", "kron num_heads=8 d_base=2 d_extension=2 k=4", "--set", "loop.checkpoint_every=1")
TRAINED = ("run.json", "metrics.jsonl", "state.safetensors", "progress.json", "sae_weights.safetensors", "cfg.json")


@pytest.fixture
def commands(base: list[str], tmp_path: Path) -> dict[str, list[str]]:
    """A command line of each kind, without ``--out``."""
    model, text = base[base.index("--model") + 1], base[base.index("--text") + 1]
    harvest = ["harvest", "--model", model, "--text", text, "--hook", "layers.2", "--tokens", "400", "--quiet"]
    return {
        "train": [*base, *SAE],
        "sweep": ["sweep", *base[1:], *SAE],
        "harvest": [*harvest, "--context-length", "32", "--model-batch", "4"],
    }


def failing_at(name: str, after: int, code: int) -> Callable[..., Any]:
    """Return a ``mkstemp`` that fails at files of this name, after so many of them."""
    plain, seen = tempfile.mkstemp, 0

    def mkstemp(prefix: str, **options: Any) -> Any:
        nonlocal seen
        if prefix == f".{name}.":
            seen += 1
            if seen > after:
                raise OSError(code, os.strerror(code))
        return plain(prefix=prefix, **options)

    return mkstemp


@pytest.mark.parametrize(
    ("kind", "name", "after"),
    [
        *(("train", name, after) for name, after in zip(TRAINED, (0, 0, 2, 1, 0, 0), strict=True)),
        ("train", "training.json", 0),
        ("sweep", "sweep.json", 0),
        ("sweep", "state.safetensors", 2),
        ("sweep", "evaluation.json", 0),
        ("sweep", "sweep.csv", 0),
        ("harvest", "activations-00000.safetensors", 0),
        ("harvest", "manifest.json", 0),
    ],
)
def test_a_disk_that_fills_up(
    kind: str,
    name: str,
    after: int,
    commands: dict[str, list[str]],
    kronsae: Kronsae,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("kronsae.support.files.tempfile.mkstemp", failing_at(name, after, errno.ENOSPC))
        outcome = kronsae(*commands[kind], "--out", out)
    assert outcome.status == 2
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith(f"Error: '{out}"), outcome.err
    assert last.endswith(
        f"{name}' must be writable; got OSError ([Errno 28] No space left on device). Free space or correct the "
        "folder's rights, and run the same command again."
    )
    assert "Traceback" not in outcome.err
    resumed = kronsae(*commands[kind], "--out", out)
    assert resumed.status == 0, resumed.err
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    if kind == "train":
        whole = kronsae(*commands[kind], "--out", tmp_path / "whole")
        assert whole.status == 0
        assert_same_run(Run(tmp_path / "whole"), Run(out))
        if name == "state.safetensors":
            assert "Resuming after 128 of 256 tokens." in resumed.err


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("kind", ["train", "sweep", "harvest"])
def test_a_folder_that_becomes_read_only(
    kind: str,
    code: int,
    commands: dict[str, list[str]],
    kronsae: Kronsae,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = {"train": "run.json", "sweep": "sweep.json", "harvest": "activations-00000.safetensors"}[kind]
    with monkeypatch.context() as patch:
        patch.setattr("kronsae.support.files.tempfile.mkstemp", failing_at(name, 0, code))
        outcome = kronsae(*commands[kind], "--out", tmp_path / "out")
    assert outcome.status == 2
    assert outcome.err.strip().splitlines()[-1].startswith(f"Error: '{tmp_path / 'out'}/{name}' must be writable; got ")
    assert not (tmp_path / "out").exists()  # it held nothing yet


@pytest.mark.parametrize("kind", ["train", "sweep", "harvest"])
def test_a_folder_that_is_read_only(
    kind: str, commands: dict[str, list[str]], kronsae: Kronsae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rights of root, with which these tests may run, know no read-only folder; so the question is answered."""
    plain = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and plain(path, mode))
    outcome = kronsae(*commands[kind], "--out", tmp_path / "out")
    assert outcome.status == 2
    assert outcome.err.strip() == (
        f"Error: out must be a folder that can be created; {tmp_path / 'out'} cannot be created in {tmp_path}. Name "
        "another one."
    )
    (tmp_path / "out").mkdir()
    outcome = kronsae(*commands[kind], "--out", tmp_path / "out")
    assert outcome.err.strip() == (
        f"Error: out must be a writable folder; {tmp_path / 'out'} is not. Name another one."
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_a_limit_of_the_system_on_the_size_of_files(
    commands: dict[str, list[str]], kronsae: Kronsae, tmp_path: Path
) -> None:
    """A real failure of the system's own writing, in the library that writes tensors."""
    resource = pytest.importorskip("resource")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        outcome = kronsae(*commands["train"], "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert outcome.status == 2
    assert "/state.safetensors' must be writable; got " in outcome.err.strip().splitlines()[-1]
    assert "File too large" in outcome.err
    assert not list((tmp_path / "out" / "checkpoint").iterdir())


@pytest.fixture(params=["SIGINT", "SIGTERM"])
def stop(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Return a function that sends the signal to this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
    yield lambda: signal.raise_signal(getattr(signal, request.param))
    signal.signal(signal.SIGINT, before)


def at_call(owner: Any, name: str, number: int, stop: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call ``stop`` before the call of a function with this number, from 1."""
    plain, calls = getattr(owner, name), 0

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            stop()
        return plain(*arguments, **options)

    monkeypatch.setattr(owner, name, watched)


@pytest.mark.parametrize(
    ("kind", "owner", "name", "number", "message"),
    [
        ("train", Member, "step", 2, "stopped after 128 of 256 tokens; a checkpoint is saved in OUT."),
        ("sweep", Member, "step", 2, "stopped after 128 of 256 tokens; a checkpoint is saved in OUT/groups/GROUP."),
        ("sweep", sweeping, "evaluate_run", 1, "stopped; the finished groups are kept in OUT."),
        (
            "harvest",
            ActivationStream,
            "__iter__",
            1,
            "stopped before the end of 400 tokens; the complete shards are kept in OUT.",
        ),
    ],
)
def test_a_signal(
    kind: str,
    owner: Any,
    name: str,
    number: int,
    message: str,
    stop: Callable[[], None],
    commands: dict[str, list[str]],
    kronsae: Kronsae,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_call(owner, name, number, stop, patch)
        outcome = kronsae(*commands[kind], "--out", out)
    assert outcome.status == 130, outcome.err
    group = next((path.name for path in (out / "groups").glob("*")), "")
    message = message.replace("OUT", str(out)).replace("GROUP", group)
    assert outcome.err.strip().splitlines()[-1] == f"{message} Run the same command again to resume."
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert kronsae(*commands[kind], "--out", out).status == 0
