"""Interaction within heads: correlations, inheritance from parents, and how closely the gate implements an AND."""

from __future__ import annotations

from kronsae.eval.interaction.correlation import ByKind, CorrelationMeter, cosines
from kronsae.eval.interaction.fidelity import Fidelity, FidelityMeter, ParentScale
from kronsae.eval.interaction.sample import HeadSample, HeadValues, sample_heads
from kronsae.eval.interaction.spread import Spread, effective_number, pearson
from kronsae.eval.interaction.structure import (
    Inheritance,
    LivingCells,
    Meanings,
    ShownGrid,
    activation_mass,
    inheritance,
    living_cells,
    meanings,
    shown_grids,
)

__all__ = [
    "ByKind",
    "CorrelationMeter",
    "Fidelity",
    "FidelityMeter",
    "HeadSample",
    "HeadValues",
    "Inheritance",
    "LivingCells",
    "Meanings",
    "ParentScale",
    "ShownGrid",
    "Spread",
    "activation_mass",
    "cosines",
    "effective_number",
    "inheritance",
    "living_cells",
    "meanings",
    "pearson",
    "sample_heads",
    "shown_grids",
]
