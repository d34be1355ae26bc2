"""Automated interpretability: a language model explains a latent from examples, and its explanation is scored.

Explanation, detection and fuzzing follow Paulo et al. 2024, *Automatically Interpreting Millions of Features in Large
Language Models* (arXiv 2410.13928), with the sizes of the KronSAE paper (arXiv 2505.22255). The caller supplies the
language model: any callable that takes instructions and content and returns text.
"""

from kronsae.eval.autointerp.examples import Example, LatentExamples, draw_examples
from kronsae.eval.autointerp.interpret import (
    PLACEHOLDER,
    Ask,
    AutointerpConfig,
    Interpretation,
    LatentInterpretation,
    Score,
    interpret_latent,
    summarise,
)

__all__ = [
    "PLACEHOLDER",
    "Ask",
    "AutointerpConfig",
    "Example",
    "Interpretation",
    "LatentExamples",
    "LatentInterpretation",
    "Score",
    "draw_examples",
    "interpret_latent",
    "summarise",
]
