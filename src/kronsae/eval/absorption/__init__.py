"""Absorption: how often the latents of a class are inactive because more specific latents carry the class."""

from kronsae.eval.absorption.measure import (
    Absorption,
    AbsorptionConfig,
    ClassAbsorption,
    Examples,
    absorption,
    probe_classes,
)
from kronsae.eval.absorption.probes import ProbeTraining
from kronsae.eval.absorption.words import AbsorptionRule, word_absorption

__all__ = [
    "Absorption",
    "AbsorptionConfig",
    "AbsorptionRule",
    "ClassAbsorption",
    "Examples",
    "ProbeTraining",
    "absorption",
    "probe_classes",
    "word_absorption",
]
