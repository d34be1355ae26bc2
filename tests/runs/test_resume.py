"""A run that is stopped, killed or fails, and is resumed with the same bits."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.stopping import ctrl_c, go, interrupt_at
from tests.tiny_runs import STEPS, assert_same_run, listing

from kronsae.runs import run as run_module
from kronsae.runs.config import RunConfig
from kronsae.runs.run import Interrupted, Run, open_run
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError


class TestResume:
    def test_stopped_after_every_step(
        self, finished_run: Run, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C in each of the 20 steps: 19 interruptions, 20 starts, the same bits."""
        for step in range(STEPS - 1):
            with monkeypatch.context() as patch:
                interrupt_at(patch, step, ctrl_c)
                with pytest.raises(Interrupted) as caught:
                    go(config, tmp_path / "r")
            assert str(caught.value) == (
                f"stopped after {64 * (step + 1):,} of {64 * STEPS:,} tokens; a checkpoint is saved in "
                f"{tmp_path / 'r'}. Run the same command again to resume."
            )
            assert listing(tmp_path / "r" / "checkpoint") == [
                f"step-{number:08d}{file}"
                for number in range(max(1, step), step + 2)
                for file in ("", "/progress.json", "/state.safetensors")
            ]
        assert_same_run(finished_run, go(config, tmp_path / "r"))
        assert not (tmp_path / "r" / "checkpoint").exists()

    @pytest.mark.parametrize("step", [2, 11])
    def test_broken_off_between_checkpoints(
        self, step: int, finished_run: Run, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The steps since the last checkpoint (or the beginning) are repeated."""

        def fail() -> None:
            raise RuntimeError("the lights went out")

        with monkeypatch.context() as patch:
            interrupt_at(patch, step, fail)
            with pytest.raises(RuntimeError):
                go(config, tmp_path / "r")
        said: list[str] = []
        resumed = go(config, tmp_path / "r", say=said.append)
        expected = ["Resuming after 640 of 1,280 tokens."] if step == 11 else []
        assert [line for line in said if line.startswith("Resuming")] == expected
        assert_same_run(finished_run, resumed)

    def test_ctrl_c_twice_stops_at_once(
        self, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        outside = signal.getsignal(signal.SIGINT)  # SIGINT is ignored if the tests run in the background
        handler = signal.default_int_handler
        signal.signal(signal.SIGINT, handler)

        def twice() -> None:
            ctrl_c()
            while (
                signal.getsignal(signal.SIGINT) is not handler
            ):  # wait until the first is handled: two simultaneous signals would be merged
                pass
            ctrl_c()

        interrupt_at(monkeypatch, 3, twice)
        try:
            with pytest.raises(KeyboardInterrupt):
                go(config, tmp_path / "r")
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, outside)

    def test_sigterm_stops_like_ctrl_c(
        self, finished_run: Run, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        outside = signal.getsignal(signal.SIGTERM)
        with monkeypatch.context() as patch:
            interrupt_at(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Interrupted, match=r"^stopped after 512 of 1,280 tokens; a checkpoint "):
                go(config, tmp_path / "r")
        assert signal.getsignal(signal.SIGTERM) is outside
        assert_same_run(finished_run, go(config, tmp_path / "r"))

    def test_stopped_after_the_last_step_before_the_saes_are_saved(
        self, finished_run: Run, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "write_sealed", fail_at("training.json"))
            with pytest.raises(KeyboardInterrupt):
                go(config, tmp_path / "r")
        with pytest.raises(
            UserError,
            match=r"^the run must be finished; .* is not. Run the command that started it again to resume it.$",
        ):
            open_run(tmp_path / "r").load("kron")
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "fit", fail)  # nothing is left to train
            finished = go(config, tmp_path / "r")
        assert_same_run(finished_run, finished)
        assert not (tmp_path / "r" / "checkpoint").exists()

    def test_killed_in_training_and_again_while_it_saves(
        self, finished_run: Run, config: RunConfig, tmp_path: Path
    ) -> None:
        """SIGKILL in step 9, and again while the checkpoint of step 15 is written."""
        (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
        script = tmp_path / "killed.py"
        script.write_text(KILLED, encoding="utf-8")
        command = [sys.executable, str(script), str(tmp_path / "config.json"), str(tmp_path / "r")]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        inside = listing(tmp_path / "r" / "checkpoint")
        assert [name for name in inside if name.startswith("step-") and "/" not in name] == ["step-00000010"]
        assert any(name.startswith(".partial-00000015") for name in inside)
        assert_same_run(finished_run, go(config, tmp_path / "r"))

    def test_the_seconds_add_up(self, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            interrupt_at(patch, 9, ctrl_c)
            with pytest.raises(Interrupted):
                go(config, tmp_path / "r")
        seconds = [row["seconds"] for row in go(config, tmp_path / "r").metrics()]
        assert seconds == sorted(seconds)

    def test_the_checkpoint_before_a_damaged_one_gives_the_same_bits(
        self, stopped: Path, finished_run: Run, config: RunConfig
    ) -> None:
        (older, newer) = sorted((stopped / "checkpoint").glob("*/state.safetensors"))
        newer.write_bytes(newer.read_bytes()[:1000])
        said: list[str] = []
        resumed = go(config, stopped, say=said.append)
        assert said[0].startswith(f"Warning: the checkpoint {newer} is damaged (it has 1,000 bytes instead of ")
        assert said[0].endswith(f"The training continues from the one before it, {older.parent.name}.")
        assert "Resuming after 320 of 1,280 tokens." in said
        assert_same_run(finished_run, resumed)

    def test_without_a_good_checkpoint_nothing_is_trained(self, stopped: Path, config: RunConfig) -> None:
        for path in (stopped / "checkpoint").glob("*/state.safetensors"):
            path.write_bytes(path.read_bytes()[:1000])
        before = contents(stopped)
        with pytest.raises(
            UserError, match=r"^the checkpoint .*step-00000007.* is damaged .* Remove the run folder and start again.$"
        ):
            go(config, stopped)
        assert contents(stopped) == before

    def test_a_damaged_config_is_named(self, stopped: Path, config: RunConfig) -> None:
        path = stopped / "run.json"
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1', 1))
        with pytest.raises(
            UserError, match=rf"^the run folder: {path} is damaged: its content does not have the sha256 "
        ):
            go(config, stopped)
        path.write_text(path.read_text().replace('"sha256"', '"rha256"'))
        with pytest.raises(UserError, match=rf"^the run folder: {path} has unknown keys rha256; remove them\.$"):
            go(config, stopped)

    def test_damaged_metrics_are_named_and_need_not_end_the_run(
        self, stopped: Path, finished_run: Run, config: RunConfig
    ) -> None:
        path = stopped / "metrics.jsonl"
        whole = path.read_text()
        path.write_text(whole.replace('"step": 3', '"step": 2', 1))
        with pytest.raises(
            UserError, match=rf"^'{path}' must be unchanged since it was written; it is damaged\. Resto"
        ):
            go(config, stopped)
        path.unlink()
        said: list[str] = []
        resumed = go(config, stopped, say=said.append)
        assert said[0] == f"Warning: {path} is missing; the metrics of the first 7 steps are lost."
        assert [row["step"] for row in resumed.metrics()] == [
            row["step"] for row in finished_run.metrics() if row["step"] > 7
        ]

    def test_damaged_files_of_a_finished_run_are_named(self, finished_run: Run, tmp_path: Path) -> None:
        shutil.copytree(finished_run.folder, tmp_path / "r")
        path = tmp_path / "r" / "metrics.jsonl"
        path.write_text(path.read_text().replace('"step": 3', '"step": 2', 1))
        with pytest.raises(UserError, match=rf"^'{path}' must be unchanged since it was written; it is damaged"):
            open_run(tmp_path / "r").metrics()
        path = tmp_path / "r" / "training.json"
        path.write_text(path.read_text().replace("1280", "1281", 1))
        with pytest.raises(UserError, match=rf"^the training's summary: {path} is damaged: its content does not have"):
            open_run(tmp_path / "r").sae_tokens("kron")


@pytest.fixture
def stopped(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped after 7 steps, with checkpoints of 5 and 7."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6, ctrl_c)
        with pytest.raises(Interrupted):
            go(config, tmp_path / "r")
    return tmp_path / "r"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def fail_at(name: str) -> Callable[[Path, Any], None]:
    """Return a ``write_sealed`` that stops before it writes the file with this name."""
    from kronsae.support.sealed import write_sealed

    def write(path: Path, value: Any) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        write_sealed(path, value)

    return write


# One process start for both kills: the first one befalls a child, forked before a thread was started.
KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from kronsae.support.config import from_dict
from kronsae.runs.run import execute
from kronsae.runs.config import RunConfig
from kronsae.training import state
from kronsae.training.member import Member

config = from_dict(RunConfig, json.loads(Path(sys.argv[1]).read_text()))
out = Path(sys.argv[2])
if os.fork() == 0:
    step = Member.step
    def killed(self, x, number, want):
        if number == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, x, number, want)
    Member.step = killed
    execute(config, out, show_progress=False)
_, status = os.wait()
assert os.WTERMSIG(status) == signal.SIGKILL
assert [path.name for path in (out / "checkpoint").iterdir()] == ["step-00000005"]

write_sealed = state.write_sealed
def killed_while_writing(path, value):
    if value["step"] == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    write_sealed(path, value)
state.write_sealed = killed_while_writing
execute(config, out, show_progress=False)
"""
