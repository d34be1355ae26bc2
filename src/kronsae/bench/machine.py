"""What a number is worth nothing without: machine, versions, commit; and the process's memory."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

PACKAGES = ("torch", "numba", "numpy", "eai-sparsify", "sae-lens")


def cpu_model() -> str:
    """The processor's own name, its instruction sets that matter here, and the cores this process may use."""
    name, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        name = fields.get("model name", name)
        has = fields.get("flags", "").split()
        flags = " ".join(flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in has)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} ({flags}), {cores} cores" if flags else f"{name}, {cores} cores"


def commit() -> str:
    """The checkout's commit, with ``+`` where files differ from it; ``unknown`` outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        dirty = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + dirty
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance(seed: int) -> dict[str, str | int]:
    """The columns every result file ends with."""
    versions = [f"{package} {found}" for package in PACKAGES if (found := version(package)) is not None]
    return {
        "machine": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": ", ".join(versions),
        "commit": commit(),
        "seed": seed,
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows that share their keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


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
