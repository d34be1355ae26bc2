"""Random numbers that depend on a seed and on what they are for, and on nothing drawn before them."""

from __future__ import annotations

import numpy as np
import torch


def generator_for(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """A generator for one purpose, and for one of a series.

    The words are hashed to a seed, of which torch's generator takes 32 bits: two share their numbers with a chance of
    2^-32.
    """
    words = [seed, number, *purpose.encode()]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
