"""Automated interpretability: a language model explains a latent from examples, and is tested on its explanation.

Explanation, detection and fuzzing after Paulo et al. 2024, *Automatically Interpreting Millions of Features in Large
Language Models* (arXiv 2410.13928), with the sizes of the KronSAE paper (arXiv 2505.22255). Whom to ask is the
caller's: anything that takes instructions and content and gives text.
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
