"""What the machine has left: memory and disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from kronsae.support.errors import UserError

CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Where a container's limit and use are told, newer form first; ``memory.stat`` beside them says what the use is of."""


def available_memory_bytes() -> int | None:
    """Memory that new allocations may take, within a container's limit; None where the system does not tell."""
    found = [_meminfo(Path("/proc/meminfo"))]
    found += [_below_limit(Path(limit), Path(used)) for limit, used in CGROUP_FILES]
    return min((value for value in found if value is not None), default=None)


def free_disk_bytes(folder: Path) -> int:
    """Space left where ``folder`` is, or will be made."""
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(above).free


def size_bytes(folder: Path) -> int:
    """What the files in a folder take up; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_disk(folder: Path, needed_bytes: int, what: str, remedy: str) -> None:
    """Refuse to write more than fits."""
    if needed_bytes > (free := free_disk_bytes(folder)):
        raise UserError(
            f"{what} must fit on the disk; about {in_bytes(needed_bytes)} are needed at {folder} and {in_bytes(free)} "
            f"are free. {remedy}"
        )


def in_bytes(count: float) -> str:
    """A number of bytes in short: ``1.5 GB`` (a GB being 2^30 bytes)."""
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
    """Bytes of files that the kernel keeps in memory and lets go for an allocation: counted as used, but free.

    After reading a few shards of activations these are most of what a container "uses".
    """
    if not stat.exists():
        return 0
    told = dict(line.split()[:2] for line in stat.read_text(encoding="utf-8").splitlines())
    whole = "total_" if "total_inactive_file" in told else ""  # the older form: with the groups below
    return sum(int(told.get(f"{whole}{kind}_file", 0)) for kind in ("active", "inactive"))
