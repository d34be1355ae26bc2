"""The device that the checklist measures: its clock, its memory, and the kernel path that runs there."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from time import perf_counter

import torch

from kronsae.bench.measure import Timing
from kronsae.support.errors import UserError


@dataclass(frozen=True)
class Device:
    """A device with the path of kernels that is checked and timed on it.

    Args:
        name: as the driver gives it; block sizes are kept under it.
        place: the device for tensors.
        path: path of the kernels.
        memory_bytes: memory that is free.
    """

    name: str
    place: torch.device
    path: str
    memory_bytes: int

    def wait(self) -> None:
        """Wait until everything that was started on the device has ended."""
        if self.place.type == "cuda":
            torch.cuda.synchronize(self.place)

    def held_bytes(self) -> int | None:
        """Return the memory of all tensors on the device; None where it is not counted."""
        return torch.cuda.memory_allocated(self.place) if self.place.type == "cuda" else None

    def reset_peak(self) -> None:
        """Reset the peak of `peak_bytes` to what is held now."""
        if self.place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.place)

    def peak_bytes(self) -> int | None:
        """Return the largest `held_bytes` since `reset_peak`; None where it is not counted."""
        return torch.cuda.max_memory_allocated(self.place) if self.place.type == "cuda" else None

    def release(self) -> None:
        """Give memory that no tensor uses back to the device."""
        if self.place.type == "cuda":
            torch.cuda.empty_cache()

    def times(self, call: Callable[[], object], rounds: int, warmup: int = 2) -> Timing:
        """Return the durations of ``rounds`` calls, each waited for; ``warmup`` calls before do not count."""
        for _ in range(warmup):
            call()
        self.wait()
        milliseconds = []
        for _ in range(rounds):
            started = perf_counter()
            call()
            self.wait()
            milliseconds.append(1000 * (perf_counter() - started))
        return Timing.of(milliseconds)

    def seconds(self, call: Callable[[], object], calls: int, rounds: int = 3) -> float:
        """Return the median seconds of one call among ``calls`` in a row, so that starting them costs little."""
        call()
        self.wait()
        found = []
        for _ in range(rounds):
            started = perf_counter()
            for _ in range(calls):
                call()
            self.wait()
            found.append((perf_counter() - started) / calls)
        return statistics.median(found)


def find_gpu() -> Device:
    """Return the first GPU.

    Raises:
        UserError: there is none, or Triton is not installed.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "device must be a GPU that PyTorch can use; there is none here. Run this on a machine with a GPU and a "
            "build of PyTorch for it. --dry-run shows what it does; `kronsae bench compile` needs no GPU."
        )
    if find_spec("triton") is None:
        raise UserError("the GPU's kernels need Triton, which is not installed. Install it: pip install 'kronsae[gpu]'")
    place = torch.device("cuda", torch.cuda.current_device())
    free, _ = torch.cuda.mem_get_info(place)
    return Device(torch.cuda.get_device_name(place), place, "gpu", free)
