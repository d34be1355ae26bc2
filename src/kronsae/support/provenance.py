"""Provenance of measured figures: machine, versions and commit, stored with every result."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "kronsae",
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "numba",
    "triton",
    "transformers",
    "eai-sparsify",
    "sae-lens",
)
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def provenance() -> dict[str, Any]:
    """Return machine (processor, cores, memory), versions, commit (``-dirty`` if files were changed) and date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "instruction_sets": instruction_sets(),
        "cores": _cores(),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "commit": commit(),
    }


def provenance_columns(seed: int) -> dict[str, str | int]:
    """Return `provenance` as a few columns for each row of a table; ``threads`` is the number that torch uses now."""
    import torch

    about = provenance()
    sets = f" ({' '.join(about['instruction_sets'])})" if about["instruction_sets"] else ""
    return {
        "machine": f"{about['processor']}{sets}, {about['cores']} cores",
        "threads": torch.get_num_threads(),
        "python": about["python"],
        "versions": ", ".join(f"{name} {found}" for name, found in about["versions"].items()),
        "commit": about["commit"] or "unknown",
        "seed": seed,
        "date": about["date"],
    }


def processor() -> str:
    """Return the processor's model name, as far as the system reports it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Return those of `INSTRUCTION_SETS` that the processor has, as far as the system reports them."""
    has = _cpuinfo("flags").split()
    return [name for name in INSTRUCTION_SETS if name in has]


def commit() -> str | None:
    """Return the commit of the checkout, ``-dirty`` if files of the package were changed; None outside a checkout."""
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        dirty = "-dirty" if git("status", "--porcelain", "--", ".") else ""
        return git("rev-parse", "--short=12", "HEAD") + dirty
    except (OSError, subprocess.SubprocessError):
        return None


def _cpuinfo(key: str) -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_gb() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
