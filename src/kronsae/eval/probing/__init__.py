"""Sparse probing: how well single latents, pairs and few latents detect concepts, and the effect of ablating them."""

from kronsae.eval.probing.measure import ConceptProbing, Probing, ProbingConfig, probing
from kronsae.eval.probing.pairs import Pair
from kronsae.eval.probing.perturbation import Perturbation
from kronsae.eval.probing.text import ConceptText, Per, concept_text

__all__ = [
    "ConceptProbing",
    "ConceptText",
    "Pair",
    "Per",
    "Perturbation",
    "Probing",
    "ProbingConfig",
    "concept_text",
    "probing",
]
