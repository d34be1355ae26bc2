"""AND fidelity: how closely a trained gate implements a binary AND of its parents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.eval.interaction.sample import HeadSample, HeadValues
from kronsae.eval.interaction.spread import significant

TOP_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
RATIOS = (1, 2, 4, 16, 64, 256)
SAMPLED_TOKENS = 16_384  # tokens for each parent's quantiles: the top 1% is then accurate to within 0.1%
_BINS, _REACH = 512, 32.0  # histogram of log2(u / v)


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Comparison of the kept activations of the sampled heads with a binary AND of their parents.

    Args:
        activations: number of kept activations (pairs of a token and a latent).
        both_top: for each share s of `TOP_SHARES`, the share of these activations at which base and extension are both
            among the top s of their own activations over all tokens. 1 for an AND of two detectors that are active on
            a share s of the tokens.
        false_positive_mass: for each threshold t of `THRESHOLDS`, the share of the summed activation at which one
            parent is at most t times the mean of its own positive activations. A binary AND of the parents with that
            threshold would be 0 there. At t = 0 the parent is not positive.
        false_positive_share: as ``false_positive_mass``, with each activation counted as 1.
        log2_imbalance: quantiles (5, 25, 50, 75, 95%, resolution 1/8) of ``log2(u / v)`` where both parents are
            positive.
        balance_mean, balance_deviation: mean and standard deviation of ``gate(u, v) / gate(g, g)`` with
            ``g = sqrt(u v)``: the gate's output relative to that for equal parents with the same product. They are 1
            and 0 if the gate depends on the product only.
        at_product: ``(r, gate(g sqrt(r), g / sqrt(r)) / gate(g, g))`` for the ratios r of `RATIOS`, at the mean g of
            these activations: the gate's output at a fixed product.
    """

    activations: int
    both_top: tuple[tuple[float, float], ...]
    false_positive_mass: tuple[tuple[float, float], ...]
    false_positive_share: tuple[tuple[float, float], ...]
    log2_imbalance: tuple[float, ...] | None
    balance_mean: float | None
    balance_deviation: float | None
    at_product: tuple[tuple[float, float], ...]


class ParentScale:
    """Accumulator of each parent's scale in a first pass: quantiles and the mean of the positive activations.

    Quantiles are over every n-th token, at most `SAMPLED_TOKENS`; the mean is over all tokens.
    """

    def __init__(self, sample: HeadSample, tokens: int) -> None:
        self._stride = max(1, math.ceil(tokens / SAMPLED_TOKENS))
        self._seen = 0
        self._sampled: list[Tensor] = []
        parents = sample.bias_RP.numel()
        self._sum_P = torch.zeros(parents, dtype=torch.float64)
        self._count_P = torch.zeros(parents, dtype=torch.int64)
        self._sample = sample

    def update(self, values: HeadValues) -> None:
        """Add a batch."""
        active_BP = torch.cat([values.u_BRM, values.v_BRN], dim=-1).flatten(1).relu()
        self._sum_P += active_BP.sum(0, dtype=torch.float64)
        self._count_P += (active_BP > 0).sum(0)
        self._sampled.append(active_BP[-self._seen % self._stride :: self._stride].clone())
        self._seen += len(active_BP)

    def mean(self) -> Float[Tensor, "R P"]:
        """Return the mean of each parent's positive activations; 0 if there is none."""
        mean_P = self._sum_P / self._count_P.clamp_min(1)
        return mean_P.float().view(self._sample.bias_RP.shape)

    def at_top(self, *shares: float) -> Float[Tensor, "S R P"]:
        """Return the threshold that each parent exceeds on each share of tokens, or on fewer if it is rarely active."""
        sampled_BP = torch.cat(self._sampled).sort(dim=0, descending=True).values
        places = [min(len(sampled_BP) - 1, round(share * len(sampled_BP))) for share in shares]
        return sampled_BP[places].view(len(shares), *self._sample.bias_RP.shape)


class FidelityMeter:
    """Accumulator of a `Fidelity` in a second pass; stores a few numbers per threshold."""

    def __init__(self, sample: HeadSample, scale: ParentScale) -> None:
        self._sample, self._mean_RP = sample, scale.mean()
        self._top_SRP = scale.at_top(*TOP_SHARES)
        self._number = self._positive = 0
        self._mass = self._balance = self._balance_squared = self._geometric = 0.0
        self._both_top_S = torch.zeros(len(TOP_SHARES), dtype=torch.int64)
        self._below_T = torch.zeros(len(THRESHOLDS), dtype=torch.int64)
        self._below_mass_T = torch.zeros(len(THRESHOLDS), dtype=torch.float64)
        self._imbalance = torch.zeros(_BINS, dtype=torch.int64)

    @torch.no_grad()
    def update(self, values: HeadValues) -> None:
        """Add a batch."""
        token_E, column_E = (values.kept_BC > 0).nonzero(as_tuple=True)
        grid = self._sample.grid
        head_E, cell_E = column_E // grid.cells, column_E % grid.cells
        base_E, extension_E = cell_E // grid.d_extension, cell_E % grid.d_extension
        u_E, v_E = values.u_BRM[token_E, head_E, base_E], values.v_BRN[token_E, head_E, extension_E]
        kept_E = values.kept_BC[token_E, column_E].double()
        rows = (head_E, base_E), (head_E, grid.d_base + extension_E)
        self._number += len(kept_E)
        self._mass += float(kept_E.sum())
        for place, top_RP in enumerate(self._top_SRP):
            self._both_top_S[place] += ((u_E > top_RP[rows[0]]) & (v_E > top_RP[rows[1]])).sum()
        for place, threshold in enumerate(THRESHOLDS):
            below_E = (u_E <= threshold * self._mean_RP[rows[0]]) | (v_E <= threshold * self._mean_RP[rows[1]])
            self._below_T[place] += below_E.sum()
            self._below_mass_T[place] += kept_E[below_E].sum()
        self._update_balance(u_E, v_E)

    def _update_balance(self, u_E: Tensor, v_E: Tensor) -> None:
        both_E = (u_E > 0) & (v_E > 0)
        u_E, v_E = u_E[both_E].double(), v_E[both_E].double()
        bin_E = (((u_E / v_E).log2() + _REACH) * (_BINS / (2 * _REACH))).floor().clamp(0, _BINS - 1).long()
        self._imbalance += torch.bincount(bin_E, minlength=_BINS)
        g_E = u_E.sqrt() * v_E.sqrt()
        ratio_E = self._gate(u_E, v_E) / self._gate(g_E, g_E)
        self._positive += len(u_E)
        self._geometric += float(g_E.sum())
        self._balance += float(ratio_E.sum())
        self._balance_squared += float((ratio_E - 1).square().sum())  # centred at 1 to avoid cancellation

    def _gate(self, u: Tensor, v: Tensor) -> Tensor:
        device = self._sample.bias_RP.device
        return self._sample.encoder.compose(u.to(device), v.to(device)).double().cpu()

    @torch.no_grad()
    def value(self) -> Fidelity:
        """Return the fidelity of the activations added."""
        number, mass, positive = max(1, self._number), self._mass or 1.0, self._positive
        about_one = (self._balance / positive - 1) if positive else 0.0
        variance = max(0.0, self._balance_squared / positive - about_one**2) if positive else 0.0
        return Fidelity(
            activations=self._number,
            both_top=_curve(TOP_SHARES, self._both_top_S / number),
            false_positive_mass=_curve(THRESHOLDS, self._below_mass_T / mass),
            false_positive_share=_curve(THRESHOLDS, self._below_T / number),
            log2_imbalance=self._imbalance_quantiles() if positive else None,
            balance_mean=significant(1 + about_one) if positive else None,
            balance_deviation=significant(math.sqrt(variance)) if positive else None,
            at_product=self._at_product(self._geometric / positive) if positive else (),
        )

    def _at_product(self, g: float) -> tuple[tuple[float, float], ...]:
        root = torch.tensor(RATIOS, dtype=torch.float64).sqrt()
        equal = torch.full_like(root, g)
        return _curve(RATIOS, self._gate(g * root, g / root) / self._gate(equal, equal))

    def _imbalance_quantiles(self) -> tuple[float, ...]:
        counts = self._imbalance.cumsum(0)
        wanted = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64) * float(counts[-1])
        bins = torch.searchsorted(counts.double(), wanted)
        return tuple((bins * (2 * _REACH / _BINS) - _REACH).tolist())


def _curve(xs: tuple[float, ...], ys: Tensor) -> tuple[tuple[float, float], ...]:
    return tuple((float(x), significant(y)) for x, y in zip(xs, ys.tolist(), strict=True))
