"""Start and end of the processes that ``torchrun`` starts, and one message where one of them fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from kronsae.distributed.team import Team, check_head_parallel
from kronsae.support.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What ``torchrun``, and other launchers, set for each process."""

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: as long as the longest work of one of them, such as verifying files."""


def launched() -> bool:
    """Return whether this is one of several processes that a launcher started."""
    return all(name in os.environ for name in VARIABLES)


_joined = False


def speaks() -> bool:
    """Return whether this process tells of its error: the first of the team to fail; before there is one, process 0."""
    return _joined or not launched() or os.environ["RANK"] == "0"


def check_command(words: Sequence[str]) -> None:
    """Refuse a command line that a launcher started and that several processes cannot run.

    Raises:
        UserError: it is not ``train``.
    """
    command = next((word for word in words if not word.startswith("-")), None)
    if launched() and command not in (None, "train"):
        raise UserError(
            f"only `kronsae train` runs over several processes; torchrun started `kronsae {command}`. Start it alone."
        )


@contextmanager
def team(head_parallel: int = 1) -> Iterator[Team | None]:
    """Join the processes of the launcher for the block; None: there is no launcher.

    An error of one process ends the others, which say nothing: the first to fail tells why.

    Args:
        head_parallel: number of processes that hold one dictionary.

    Raises:
        UserError: ``head_parallel`` does not divide the number of processes.
    """
    global _joined
    if not launched():
        check_head_parallel(head_parallel, 1)
        yield None
        return
    check_head_parallel(head_parallel, int(os.environ["WORLD_SIZE"]))
    backend = "gloo"
    if torch.cuda.is_available():  # tensors on the CPU go through gloo, those on the GPU through NCCL
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    _joined = True
    try:
        with _one_message():
            processes = Team.of(head_parallel)
            processes.wait()  # no process may fail while another one is still joining
            yield processes
    finally:
        dist.destroy_process_group()


class Failed(UserError):
    """The training ended because a process was lost; what it computed since the last checkpoint is lost too."""

    exit_status = 1


@contextmanager
def _one_message() -> Iterator[None]:
    """Let the error of the first process that fails through; the others exit with its status and say nothing."""
    try:
        yield
    except Exception as error:
        if not _is_first_to_fail():
            sys.exit(getattr(error, "exit_status", 1))
        if isinstance(error, UserError):
            raise
        if _lost_contact(error):
            raise Failed(
                "a process of the training ended without a message; the others cannot go on. Run the same command "
                "again to resume from the last checkpoint."
            ) from None
        raise


def _is_first_to_fail() -> bool:
    try:
        return int(dist.distributed_c10d._get_default_store().add("kronsae/failed", 1)) == 1
    except RuntimeError:  # the process that keeps the store is gone: it failed before
        return False


def _lost_contact(error: Exception) -> bool:
    """Return whether this is the error of a process whose peer is gone, as gloo and NCCL raise it."""
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("gloo", "Connection", "peer"))
    )
