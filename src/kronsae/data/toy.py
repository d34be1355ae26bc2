"""Generate the toy model of correlated features: sparse features with known covariance, compressed by an autoencoder.

The features are ``s = L TopK(ReLU(x))`` with ``x ~ N(0, 1)`` and L the Cholesky factor of a block-structured
covariance. An autoencoder ``ReLU(W^T W s + b)`` (Elhage et al. 2022) represents them in superposition, and SAEs are
trained on its hidden state ``W s``. Method: section 5.1 and appendix B of arXiv 2505.22255.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kronsae.data.random import generator_for
from kronsae.data.stream import State
from kronsae.support.errors import UserError

HIDDEN = "hidden"
"""Hook name of the hidden states."""


@dataclass(frozen=True, kw_only=True)
class BlockSetup:
    """A block correlation matrix: ``across`` between blocks, ``within`` in blocks, ``inner_within`` in inner blocks.

    ``S = across 1 1^T + (within - across) B + (inner_within - within) I_B + (1 - largest) I``, where B and I_B are 1 in
    the blocks and the inner blocks, and 0 elsewhere. It is a sum of positive semi-definite matrices.

    Args:
        name: Name of the setup in tables.
        blocks: Block sizes, in order. Their sum is the number of features.
        within: Correlation of two features of the same block.
        across: Correlation of two features of different blocks.
        inner: Size of the inner blocks into which each block is divided; None for no inner blocks.
        inner_within: Correlation of two features of the same inner block.
    """

    name: str
    blocks: tuple[int, ...]
    within: float
    across: float = 0.0
    inner: int | None = None
    inner_within: float | None = None

    def __post_init__(self) -> None:
        if not self.blocks or min(self.blocks) < 1:
            raise UserError(f"blocks must be one or more sizes above 0; got {self.blocks} in setup '{self.name}'.")
        if (self.inner is None) != (self.inner_within is None):
            raise UserError(
                f"inner and inner_within must be given together; got inner={self.inner} and inner_within="
                f"{self.inner_within} in setup '{self.name}'."
            )
        if self.inner is not None and self.inner < 1:
            raise UserError(f"inner must be above 0; got {self.inner} in setup '{self.name}'.")
        levels = [self.across, self.within, *([] if self.inner_within is None else [self.inner_within])]
        if levels != sorted(levels) or levels[0] < 0 or levels[-1] >= 1:
            raise UserError(
                "across, within and inner_within must satisfy 0 <= across <= within <= inner_within < 1; got "
                f"{', '.join(map(str, levels))} in setup '{self.name}'."
            )

    @property
    def features(self) -> int:
        """G, the number of features."""
        return sum(self.blocks)

    def covariance(self) -> Float[Tensor, "G G"]:
        """Return S in float64, with ones on its diagonal."""
        matrix_GG = torch.full((self.features, self.features), self.across, dtype=torch.float64)
        for end, size in zip(accumulate(self.blocks), self.blocks, strict=True):
            start = end - size
            matrix_GG[start:end, start:end] = self.within
            if self.inner is not None and self.inner_within is not None:
                for first in range(start, end, self.inner):
                    last = min(first + self.inner, end)
                    matrix_GG[first:last, first:last] = self.inner_within
        return matrix_GG.fill_diagonal_(1.0)


SETUPS = (
    BlockSetup(name="blocks of 8", blocks=(8,) * 32, within=0.9),
    BlockSetup(name="blocks of 32", blocks=(32,) * 8, within=0.9),
    BlockSetup(name="blocks of 64", blocks=(64,) * 4, within=0.9),
    BlockSetup(name="mixed sizes", blocks=(96, 64, 32, 32, 16, 8, 8), within=0.9),
    BlockSetup(name="odd sizes", blocks=(47, 43, 41, 37, 31, 29, 23, 5), within=0.9),
    BlockSetup(name="weak blocks of 32", blocks=(32,) * 8, within=0.5),
    BlockSetup(name="blocks of 32, crossed", blocks=(32,) * 8, within=0.9, across=0.3),
    BlockSetup(name="blocks of 16 in 64", blocks=(64,) * 4, within=0.5, inner=16, inner_within=0.9),
)
"""Eight setups of our own, because the paper's table of its eight covariances was not available. They cover block sizes
equal to a head's (32, 64) and different from any head's (odd sizes, 8), equal and mixed sizes, strong and weak
correlation, correlation across blocks, and blocks within blocks. With a correlation of 0.9 the effective rank of the
true covariance is about 15, as implied by the paper's results (63.3 - 47.9)."""

INDEPENDENT = BlockSetup(name="independent", blocks=(256,), within=0.0)
"""Control setup without correlation."""


class CorrelatedFeatures:
    """Sample ``s = L TopK(ReLU(x))``, for which ``Cov(s)`` is approximately a multiple of S.

    Args:
        covariance_GG: S, positive definite.
        active: Number of entries of ReLU(x) that are kept per token.
    """

    def __init__(self, covariance_GG: Float[Tensor, "G G"], active: int) -> None:
        if not 0 < active <= len(covariance_GG):
            raise UserError(f"active must be from 1 to the number of features, {len(covariance_GG)}; got {active}.")
        self.factor_GG: Tensor = torch.linalg.cholesky(covariance_GG.double()).float()
        self.active = active

    def sample(self, tokens: int, generator: torch.Generator) -> Float[Tensor, "B G"]:
        """Return the features of ``tokens`` new tokens."""
        x_BG = torch.randn(tokens, len(self.factor_GG), generator=generator).relu()
        largest = x_BG.topk(self.active, dim=1)
        sparse_BG = torch.zeros_like(x_BG).scatter(1, largest.indices, largest.values)
        return sparse_BG @ self.factor_GG.T


class ToyAutoencoder(nn.Module):
    """``s_hat = ReLU(W^T h + b)`` with ``h = W s`` and ``W [hidden, features]`` (Elhage et al. 2022).

    W is initialised with Normal(0, `START`^2 / hidden). A large initialisation would remain in the directions in which
    the correlated features hardly vary, and hide the correlation that the rows learn.
    """

    START = 0.1

    def __init__(self, features: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(hidden, features, generator=generator) * (self.START / hidden**0.5))
        self.b = nn.Parameter(torch.zeros(features))

    def hidden(self, s_BG: Float[Tensor, "B G"]) -> Float[Tensor, "B D"]:
        """Return the hidden state h, on which SAEs are trained."""
        return s_BG @ self.W.T

    def forward(self, s_BG: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
        s_hat_BG: Tensor = (self.hidden(s_BG) @ self.W + self.b).relu()
        return s_hat_BG

    @property
    def rows(self) -> Float[Tensor, "G D"]:
        """A copy of the feature directions, in the order of the features."""
        return self.W.detach().T.clone()

    def fit(self, s_NG: Float[Tensor, "N G"], *, steps: int, batch: int, lr: float, seed: int) -> ToyAutoencoder:
        """Train on ``s_NG`` with squared error, Adam and a learning rate that decays linearly to 0; return self."""
        generator = generator_for(seed, "batches of the autoencoder")
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            s_BG = s_NG[torch.randint(len(s_NG), (batch,), generator=generator)]
            loss = (self(s_BG) - s_BG).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self.requires_grad_(False)


class HiddenStates:
    """Yield ``({HIDDEN: [batch, hidden]}, {"batch": number})``: hidden states, sampled with replacement.

    Args:
        hidden_ND: Hidden states of the training tokens.
        batch: Tokens in each batch.
        seed: Seed of the sampling.
        state: State of the last batch used; None starts at the first batch.
    """

    def __init__(self, hidden_ND: Float[Tensor, "N D"], *, batch: int, seed: int, state: State | None = None) -> None:
        self.hidden_ND, self.batch, self.seed = hidden_ND, batch, seed
        self.start = 0 if state is None else state["batch"] + 1

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], State]]:
        for number in count(self.start):
            generator = generator_for(self.seed, "batches of hidden states", number)
            rows_B = torch.randint(len(self.hidden_ND), (self.batch,), generator=generator)
            yield {HIDDEN: self.hidden_ND[rows_B]}, {"batch": number}
