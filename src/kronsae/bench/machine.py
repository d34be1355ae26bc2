"""The memory that this process holds."""

from __future__ import annotations

from pathlib import Path


def resident_bytes() -> int | None:
    """Memory this process holds now; None where the system does not tell."""
    return _status("VmRSS:")


def peak_bytes() -> int | None:
    """The most memory this process has held since `reset_peak`; None where the system does not tell."""
    return _status("VmHWM:")


def reset_peak() -> None:
    """Begin anew (Linux)."""
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
