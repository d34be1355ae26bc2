"""SAEs in the format of SAELens (sae-lens >= 6): ``cfg.json`` and ``sae_weights.safetensors``."""

from __future__ import annotations

from pathlib import Path

from kronsae.interop.exportable import Exportable, Exported
from kronsae.support.errors import UserError

DESCRIPTION = "SAELens (sae-lens >= 6): SAE.load_from_disk reads the folder"


def check(saes: tuple[Exportable, ...]) -> None:
    """Refuse SAEs that SAELens has no architecture for."""
    raise UserError(f"{saes[0].name}: the export to SAELens is not written yet.")


def export(saes: tuple[Exportable, ...], out: Path) -> Exported:
    """Write each SAE as SAELens saves it."""
    raise NotImplementedError
