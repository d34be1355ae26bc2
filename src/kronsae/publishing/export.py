"""Export of a run's SAEs to the formats of other libraries; one module per target."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from kronsae.core import checkpoint
from kronsae.interop.exportable import Exportable, Exported, Target
from kronsae.runs.folder import RunFolder
from kronsae.support.errors import UserError, nearest
from kronsae.support.files import check_new_folder, whole_or_nothing

TARGETS: dict[str, str] = {
    "saelens": "kronsae.interop.saelens_export",
    "sparsify": "kronsae.interop.sparsify_export",
    "circuit-tracer": "kronsae.interop.circuit_tracer_export",
}
"""Names of the targets, and the module of each (`kronsae.interop.exportable.Target`)."""


def target_module(name: str) -> Target:
    """Return the module of a target, imported when it is needed.

    Raises:
        UserError: there is no such target.
    """
    if name not in TARGETS:
        known = [*TARGETS, "delphi"]
        raise UserError(f"--to must be one of {', '.join(known)}; got '{name}'.{nearest(name, known)}")
    module: Target = import_module(TARGETS[name])
    return module


def export_run(run: RunFolder, to: str, out: Path, names: Sequence[str] = ()) -> Exported:
    """Write SAEs of a finished run in the format of a target.

    Args:
        run: the run.
        to: a name in `TARGETS`.
        out: a new or empty folder. A single SAE is written into it, several into a folder per SAE, unless the format
            has a layout of its own.
        names: SAEs to export; none: all of the run.

    Raises:
        UserError: there is no such target or SAE, the run is not finished, ``out`` is in use or cannot be written, or
            the format cannot hold one of the SAEs exactly. Nothing has been written.
    """
    target = target_module(to)
    run.require_finished()
    saes = tuple(exportable(run, name) for name in dict.fromkeys(names or run.names))
    check_new_folder(out)
    target.check(saes)
    with whole_or_nothing(out):
        return target.export(saes, out)


def exportable(run: RunFolder, name: str) -> Exportable:
    """Return an SAE of a run with what its ``cfg.json`` states about it.

    An imported run's text and context length are those of its measurements, not of the training.
    """
    folder, sae = run.sae_folder(name), run.load(name)
    metadata: dict[str, Any] = checkpoint.read_config(folder).get("metadata", {})
    member = next(one for one in run.config.saes if one.name == name)
    return Exportable(
        name=name,
        sae=sae,
        model=run.config.model.name,
        hooks_read=member.reads(run.config.hook),
        hooks_written=member.writes(run.config.hook),
        context_length=None if run.imported else run.config.context_length,
        text=None if run.imported else run.config.text.source,
        metadata=metadata,
    )
