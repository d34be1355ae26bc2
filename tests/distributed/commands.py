"""What a process of `tests.distributed.test_command_line` does: the command line, with something going wrong in one."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from kronsae.cli.main import main
from kronsae.distributed import storage
from kronsae.support.errors import UserError
from kronsae.training.member import Member


def run_command(words: list[str], folder: Path, fault: str = "") -> tuple[object, str, str]:
    """Run ``kronsae``; return its exit status and what it wrote to stdout and stderr."""
    files = {name: folder / f"{name}-{os.environ['RANK']}" for name in ("out", "err")}
    for number, path in enumerate(files.values(), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["kronsae", *words]
    if fault and os.environ["RANK"] == "1":
        _break(fault)
    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    return status, files["out"].read_text(encoding="utf-8"), files["err"].read_text(encoding="utf-8")


def _full(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")


def _break(fault: str) -> None:
    """Let the third step of this process fail, or every writing of the state from then on."""
    plain = Member.step

    def broken(self: Member, *arguments: Any) -> Any:
        if arguments[1] == 2:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "full":
                storage.save_file = _full  # type: ignore[attr-defined, assignment]
                return plain(self, *arguments)
            if fault == "terminated":
                signal.raise_signal(signal.SIGTERM)
                return plain(self, *arguments)
            if fault == "slow":  # the others wait in the step; this is told apart from a hang by its message
                time.sleep(1)
            raise UserError("the lights must be on; they are off in process 1.")
        return plain(self, *arguments)

    Member.step = broken  # type: ignore[assignment, method-assign]
