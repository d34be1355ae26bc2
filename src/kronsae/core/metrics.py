"""Explained variance and squared error, defined once for training and evaluation."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from kronsae.core.shares import batch_mean, shares

ROUNDING = 1e-28  # share of ||mean||^2 per token: float64 rounding error of the deviation of constant activations


class ExplainedVariance:
    """Explained variance over any number of batches, computed in float64 and one pass.

    ``EV = 1 - sum(||x - x_hat||^2) / sum(||x - mean||^2)``. The sums run over tokens and dimensions; ``mean`` is over
    all tokens seen. It is a ratio of sums, and the mean reconstruction error is not subtracted. 1 is perfect, 0 equals
    predicting the mean, negative is worse. `explained_variance_per_token` is the other definition in the literature.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._error = 0.0
        self._deviation = 0.0  # sum of ||x - mean||^2 about the running mean
        self._mean: Tensor | None = None

    def update(self, x_BD: Float[Tensor, "B D"], x_hat_BD: Float[Tensor, "B D"]) -> None:
        """Add one batch (Chan's parallel update of mean and deviation)."""
        tokens = shares().tokens(len(x_BD))
        if tokens == 0:
            return
        x_BD, x_hat_BD = x_BD.detach().double(), x_hat_BD.detach().double()
        batch_mean_D = batch_mean(x_BD)
        self._error += float(shares().sum((x_BD - x_hat_BD).square().sum()))
        self._deviation += float(shares().sum((x_BD - batch_mean_D).square().sum()))
        before, self.tokens = self.tokens, self.tokens + tokens
        if self._mean is None:
            self._mean = batch_mean_D
            return
        shift_D = batch_mean_D - self._mean
        self._deviation += float(shift_D.square().sum()) * before * tokens / self.tokens
        self._mean = self._mean + shift_D * (tokens / self.tokens)

    def value(self) -> float:
        """Return the explained variance so far; NaN if the activations do not vary."""
        if self._mean is None or self._deviation <= ROUNDING * self.tokens * float(self._mean.square().sum()):
            return float("nan")
        return 1 - self._error / self._deviation

    def mean_squared_error(self) -> float:
        """Return ``||x - x_hat||^2``, summed over dimensions, mean over tokens: the plain reconstruction loss."""
        return self._error / self.tokens

    @property
    def mean_D(self) -> Float[Tensor, " D"]:
        """Mean activation over the tokens seen, float64."""
        if self._mean is None:
            raise ValueError("mean_D needs at least one batch; got none.")
        return self._mean


def explained_variance(x_BD: Float[Tensor, "B D"], x_hat_BD: Float[Tensor, "B D"]) -> float:
    """Return the `ExplainedVariance` of one batch."""
    accumulator = ExplainedVariance()
    accumulator.update(x_BD, x_hat_BD)
    return accumulator.value()


def explained_variance_per_token(
    x_BD: Float[Tensor, "B D"], x_hat_BD: Float[Tensor, "B D"], mean_D: Float[Tensor, " D"]
) -> Float[Tensor, " B"]:
    """Return ``1 - ||x - x_hat||^2 / ||x - mean||^2`` of each token; the paper's listing averages it over tokens."""
    x_BD, x_hat_BD = x_BD.double(), x_hat_BD.double()
    return 1 - (x_BD - x_hat_BD).square().sum(-1) / (x_BD - mean_D.double()).square().sum(-1)
