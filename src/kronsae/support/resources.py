"""Free memory and disk space of the machine."""

from __future__ import annotations

import shutil
from pathlib import Path

from kronsae.support.errors import UserError

CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Files with a container's memory limit and use, newer form first; ``memory.stat`` beside them details the use."""


def available_memory_bytes() -> int | None:
    """Return the memory available to new allocations, within a container's limit; None if it is not reported."""
    found = [_meminfo(Path("/proc/meminfo"))]
    found += [_below_limit(Path(limit), Path(used)) for limit, used in CGROUP_FILES]
    return min((value for value in found if value is not None), default=None)


def free_address_bytes() -> int | None:
    """Return how much of its limit of address space (`ulimit -v`) the process has left; None without a limit."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not pages.exists():
        return None
    used = int(pages.read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    return max(0, limit - used)


def free_disk_bytes(folder: Path) -> int:
    """Return the free disk space at ``folder``, which need not exist yet."""
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(above).free


def size_bytes(folder: Path) -> int:
    """Return the total size of the files in a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_disk(folder: Path, needed_bytes: int, what: str, remedy: str) -> None:
    """Raise if more would be written than fits on the disk."""
    if needed_bytes > (free := free_disk_bytes(folder)):
        raise UserError(
            f"{what} must fit on the disk; about {format_bytes(needed_bytes)} are needed at {folder} and "
            f"{format_bytes(free)} are free. {remedy}"
        )


def check_memory(needed_bytes: int, what: str, remedy: str) -> None:
    """Raise if more would be allocated than is available; passes where that is not reported."""
    available = available_memory_bytes()
    if available is not None and needed_bytes > available:
        raise UserError(
            f"{what} must fit into memory; {format_bytes(needed_bytes)} are needed and {format_bytes(available)} are "
            f"available. {remedy}"
        )


def format_bytes(count: float) -> str:
    """Format a number of bytes: ``1.5 GB`` (1 GB is 2^30 bytes)."""
    for size, unit in ((2**40, "TB"), (2**30, "GB"), (2**20, "MB")):
        if count >= size:
            return f"{count / size:,.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count / 2**20:.2g} MB"


def _meminfo(path: Path) -> int | None:
    if not path.exists():
        return None
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return next((1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"), None)


def _below_limit(limit: Path, used: Path) -> int | None:
    try:
        most, now = limit.read_text(encoding="utf-8").strip(), used.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    if not most.isdigit():
        return None
    return min(int(most), max(0, int(most) - int(now) + _cached_files(used.with_name("memory.stat"))))


def _cached_files(stat: Path) -> int:
    """Return the bytes of the kernel's file cache, which are counted as used but freed for allocations.

    After a few shards of activations were read, these are most of what a container "uses".
    """
    if not stat.exists():
        return 0
    counters = dict(line.split()[:2] for line in stat.read_text(encoding="utf-8").splitlines())
    prefix = "total_" if "total_inactive_file" in counters else ""  # the older form; it includes nested groups
    return sum(int(counters.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
