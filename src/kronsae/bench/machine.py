"""Memory use of this process."""

from __future__ import annotations

from pathlib import Path


def resident_bytes() -> int | None:
    """Return the memory that this process holds now; None if the system does not report it."""
    return _status("VmRSS:")


def peak_bytes() -> int | None:
    """Return the peak memory of this process since `reset_peak`; None if the system does not report it."""
    return _status("VmHWM:")


def reset_peak() -> None:
    """Reset the peak to the current memory (Linux)."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def _status(key: str) -> int | None:
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    return None
