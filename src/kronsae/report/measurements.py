"""The measurements of ``kronsae eval`` by name, and their results in a run folder.

`MEASUREMENTS` is the only list of measurements. The measurement ``some-name`` consists of

- ``kronsae/measures/some_name.py``: its settings, ``measure(run, settings)`` and the Typer app ``app`` of its verb;
- ``kronsae/report/sections/some_name.py``: ``section(kept, names)``, its section of the report, and ``REVISION``, which
  increases when the structure of the result or the meaning of a metric changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kronsae.support.config import differences
from kronsae.support.errors import UserError
from kronsae.support.files import read_json, write_json
from kronsae.support.provenance import provenance

MEASUREMENTS: tuple[str, ...] = (
    "latents",
    "interaction",
    "autointerp",
    "token-rule",
    "synthetic",
    "toy",
    "absorption",
    "probing",
    "ladder",
)
"""Names of all measurements, in the order of the command line's help and of the report."""


def module_name(measurement: str) -> str:
    """Return the name of a measurement's modules: ``token_rule`` for ``token-rule``."""
    return measurement.replace("-", "_")


def section_module(measurement: str) -> Any:
    """Return the module in ``report/sections`` that belongs to a measurement."""
    return import_module(f"kronsae.report.sections.{module_name(measurement)}")


def result_path(folder: Path, name: str) -> Path:
    """Return the path of the result of the measurement ``name`` in a run folder."""
    return folder / "measures" / f"{name}.json"


def keep_result(folder: Path, name: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> Path:
    """Write a result (JSON values) with its settings and provenance into a run folder; return its path."""
    path = result_path(folder, name)
    about = {"measure": name, "revision": section_module(name).REVISION, "kronsae_version": version("kronsae")}
    write_json(path, {**about, "settings": dict(settings), "provenance": provenance(), "result": dict(result)})
    return path


def known_result(folder: Path, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the stored result if it has exactly these settings and the current revision, else None.

    The SAEs of a finished run never change, so such a result need not be measured again.
    """
    path = result_path(folder, name)
    if not path.exists():
        return None
    known = _read(path)
    if not _is_current(known, name) or differences(known.get("settings"), dict(settings)):
        return None
    result = known.get("result")
    return result if isinstance(result, dict) else None


def kept_results(folder: Path) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Return the stored results of the current revision by name, and the names of the outdated ones.

    Each result is ``{"measure", "settings", "provenance", "result", ...}``. The metrics of an outdated result, written
    by another revision, may have another meaning.
    """
    paths = sorted((folder / "measures").glob("*.json"))
    found = {path.stem: _read(path) for path in paths if path.stem in MEASUREMENTS}
    current = {name: kept for name, kept in found.items() if _is_current(kept, name)}
    return current, tuple(name for name in found if name not in current)


def _read(path: Path) -> Any:
    try:
        return read_json(path, f"the result of '{path.stem}'")
    except UserError as error:
        raise UserError(f"{error} Delete it, and measure again.") from None


def _is_current(kept: Any, name: str) -> bool:
    return isinstance(kept, dict) and kept.get("revision") == section_module(name).REVISION
