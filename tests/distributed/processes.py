"""Runs a function in several processes, forked from one server that has imported the library once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SECONDS = 240
"""How long the processes of a test may take."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.distributed.preloaded"])


def in_processes(number: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Return what ``function(*arguments)`` returns in each of ``number`` processes, in order of their ranks.

    Each has the environment that ``torchrun`` gives it, one thread, and the portable kernels, which need no compiling.
    An exception of a process is returned in the place of its result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        _server.Process(target=_work, args=(rank, number, port, function, folder, arguments)) for rank in range(number)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(SECONDS)
    stuck = [process for process in started if process.is_alive()]
    for process in stuck:
        process.kill()
        process.join()
    assert not stuck, f"{len(stuck)} of {number} processes did not end within {SECONDS} s"
    return [_result(folder / f"result-{rank}.pt", process.exitcode) for rank, process in enumerate(started)]


def _result(path: Path, status: int | None) -> Any:
    """Return what a process left; if it was killed, its exit status."""
    return torch.load(path, weights_only=False) if path.exists() else (status, "", "")


def _work(
    rank: int, number: int, port: int, function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ["KRONSAE_KERNELS"] = "portable"
    torch.set_num_threads(1)
    try:
        result = function(*arguments)
    except (Exception, SystemExit) as error:
        error.add_note(traceback.format_exc())
        result = error
    torch.save(result, folder / f"result-{rank}.pt")
