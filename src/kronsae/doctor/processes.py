"""Processes that work until they end or are killed, forked from a server that has imported the library once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from kronsae.support.errors import UserError

GRACE_SECONDS = 5.0
"""How long the others of a killed process may take to notice, before they get a SIGTERM as from ``torchrun``."""

PATIENCE_SECONDS = 300.0
"""How long a process may take to end by itself; the tiny runs of a campaign take seconds."""

PRELOADED = ("kronsae.doctor.preloaded",)
"""Modules that the server imports before it forks."""


@dataclass(frozen=True)
class Ended:
    """How processes ended.

    Args:
        killed: whether a victim was killed before it ended by itself.
        hung: whether one that was not killed did not end within `PATIENCE_SECONDS`.
        statuses: exit status of each, in order of their ranks; -9 after a SIGKILL.
        seconds: time from the start.
        said: last lines of what they wrote to stderr.
    """

    killed: bool
    hung: bool
    statuses: tuple[int | None, ...]
    seconds: float
    said: str

    @property
    def finished(self) -> bool:
        """Whether all ended without an error."""
        return not self.hung and all(status == 0 for status in self.statuses)


def check_system() -> None:
    """Raise if this system cannot fork processes."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise UserError(f"a campaign needs a system that forks processes, such as Linux; this is {sys.platform}.")


def run(
    work: Callable[..., Any],
    *arguments: Any,
    log: Path,
    ranks: int = 1,
    kill_after: float | None = None,
    victims: Sequence[int] = (),
) -> Ended:
    """Call ``work(*arguments)`` in a process, or in several that ``torchrun`` could have started.

    Args:
        work: a function of a module.
        arguments: its arguments.
        log: file for stderr of all.
        ranks: number of processes; more than one have the environment that ``torchrun`` gives them.
        kill_after: seconds after which the victims get a SIGKILL; None: never.
        victims: ranks that are killed. The others must end by themselves, or at a SIGTERM.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    port = _free_port()
    log.unlink(missing_ok=True)
    started = time.monotonic()
    processes: list[BaseProcess] = [
        context.Process(target=_work, args=(rank, ranks, port, str(log), work, arguments)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    if kill_after is not None:
        _wait(processes, started + kill_after)
        for rank in victims:
            processes[rank].kill()
            processes[rank].join()
    killed = any(processes[rank].exitcode == -signal.SIGKILL for rank in victims)
    if killed and len(victims) < ranks:
        _wait(processes, time.monotonic() + GRACE_SECONDS)
        for process in processes:  # torchrun does so at once; one that waits for a dead one to join would not notice
            process.terminate()
    _wait(processes, time.monotonic() + PATIENCE_SECONDS)
    hung = any(process.is_alive() for process in processes)
    for process in processes:
        process.kill()
        process.join()
    seconds = time.monotonic() - started
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return Ended(killed, hung, tuple(process.exitcode for process in processes), seconds, said[-2000:])


def victims_of(ranks: int, draw: random.Random) -> tuple[int, ...]:
    """Return which of the processes to kill: all of them, or one."""
    everyone = tuple(range(ranks))
    return everyone if draw.random() < 0.5 else (draw.choice(everyone),)


def _wait(processes: Sequence[BaseProcess], until: float) -> None:
    while time.monotonic() < until and any(process.is_alive() for process in processes):
        next(process for process in processes if process.is_alive()).join(min(0.01, max(0.0, until - time.monotonic())))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _work(rank: int, ranks: int, port: int, log: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    os.dup2(handle, 1)
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the campaign, which ends these
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    status = 0
    try:
        work(*arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        status = error.exit_status
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # threads of a broken team must not hold the process
