"""Attribution of a metric of the model's output to latents: gradient times activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kronsae import kernels
from kronsae.core.codes import SparseCodes
from kronsae.core.sae import SAE
from kronsae.data.model import resolve_hook, tap
from kronsae.support.errors import UserError

Metric = Callable[[Float[Tensor, "S T V"]], Float[Tensor, ""]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """First-order contributions of the latents of one SAE to a metric.

    Args:
        codes: the activations f, ``[S, T, K]``; 0 at padding.
        gradient: ``d metric / d f``, ``[S, T, K]``, with the reconstruction error and everything before the hook held
            fixed: the slope of the metric when `kronsae.interventions.intervene` changes the latent at this token.
        error: ``(x - x_hat) . d metric / d x``, ``[S, T]``: contribution of the SAE's reconstruction error.
    """

    codes: SparseCodes
    gradient: Float[Tensor, "S T K"]
    error: Float[Tensor, "S T"]

    @property
    def values(self) -> Float[Tensor, "S T K"]:
        """Return ``f * d metric / d f``, about the decrease of the metric if the latent were ablated at that token."""
        return self.codes.values * self.gradient

    def by_latent(self) -> Float[Tensor, " F"]:
        """Return the contributions summed over all tokens."""
        total_F = self.values.new_zeros(self.codes.d_sae)
        return total_F.index_add_(0, self.codes.indices.flatten(), self.values.flatten())

    def top(self, number: int = 10) -> list[tuple[int, float]]:
        """Return the latents with the largest absolute contributions, and the contributions, in descending order."""
        total_F = self.by_latent()
        best = total_F.abs().topk(min(number, len(total_F))).indices.tolist()
        return [(latent, float(total_F[latent])) for latent in best if total_F[latent] != 0]


def attribute(
    model: nn.Module,
    sites: Sequence[tuple[SAE, str | int]],
    inputs: Mapping[str, Tensor],
    metric: Metric,
) -> list[Attribution]:
    """Attribute a metric of the logits to the latents of one or more SAEs: ``f_i * d metric / d f_i``.

    This takes one forward and one backward pass for any number of latents. The activation is written as
    ``decode(f) + (x - x_hat)``, so ``d metric / d f_i = W_dec[i] . d metric / d x``.

    Args:
        model: a Hugging Face language model.
        sites: pairs of an SAE and the hook that it reconstructs. Gradients at an earlier hook include the effect
            through later ones.
        inputs: keyword arguments of the model: ``input_ids`` and, with padding, ``attention_mask``.
        metric: differentiable function of the logits ``[S, T, V]`` that returns one number, such as `logit_difference`.

    Returns:
        One `Attribution` per site, in the same order.

    Raises:
        UserError: an SAE is a transcoder or crosscoder, a hook names no module or does not run, or the metric does not
            return a single number with a gradient.
    """
    for sae, _ in sites:
        if sae.config.role:
            raise UserError(
                f"sites must hold SAEs that reconstruct the single hook they read; got a {sae.config.role}, whose "
                "decoder rows are not directions of the hook it reads. Use an SAE of that hook."
            )
    hooks = [resolve_hook(model, hook) for _, hook in sites]
    captured: dict[int, Tensor] = {}

    def capture(place: int, hidden_STD: Tensor) -> Tensor:
        captured[place] = hidden_STD if hidden_STD.requires_grad else hidden_STD.detach().requires_grad_()
        return captured[place]

    with ExitStack() as stack, torch.enable_grad():
        for place, hook in enumerate(hooks):
            stack.enter_context(tap(hook, partial(capture, place)))
        value = metric(model(**inputs).logits)
        for place, hook in enumerate(hooks):
            if place not in captured:
                raise UserError(f"hook must name a module that runs in a forward pass; '{hook.path}' does not run.")
        if value.numel() != 1 or not value.requires_grad:
            raise UserError(
                "metric must return one number that depends on the logits; got a tensor of shape "
                f"{tuple(value.shape)}{'' if value.requires_grad else ' without a gradient'}."
            )
        hidden = [captured[place] for place in range(len(hooks))]
        gradients = torch.autograd.grad(value.reshape(()), hidden, allow_unused=True)
    mask = inputs.get("attention_mask")
    return [
        _attribute_site(sae, x_STD.detach(), torch.zeros_like(x_STD) if gradient is None else gradient, mask)
        for (sae, _), x_STD, gradient in zip(sites, hidden, gradients, strict=True)
    ]


def logit_difference(target: int, other: int, position: int = -1) -> Metric:
    """Return the metric ``logit(target) - logit(other)`` at one position, summed over sequences.

    The default position is the last one; pad sequences on the left for it.
    """

    def metric(logits_STV: Tensor) -> Tensor:
        logits_SV = logits_STV[:, position].to(torch.promote_types(logits_STV.dtype, torch.float32))
        return (logits_SV[:, target] - logits_SV[:, other]).sum()

    return metric


@torch.no_grad()
def _attribute_site(sae: SAE, x_STD: Tensor, gradient_STD: Tensor, mask_ST: Tensor | None) -> Attribution:
    x_STD, gradient_STD = x_STD.to(sae.W_dec), gradient_STD.to(sae.W_dec)
    codes = sae.encode(x_STD)
    if mask_ST is not None:
        token_ST1 = mask_ST.to(x_STD.device).bool().unsqueeze(-1)
        codes = SparseCodes(torch.where(token_ST1, codes.values, 0.0), codes.indices, codes.d_sae)
        gradient_STD = torch.where(token_ST1, gradient_STD, 0.0)
    gradient_NK = kernels.sampled_products(gradient_STD.flatten(0, 1), sae.W_dec, codes.indices.flatten(0, 1))
    error_ST = ((x_STD - sae.decode(codes)) * gradient_STD).sum(-1)
    return Attribution(codes=codes, gradient=gradient_NK.view(codes.values.shape), error=error_ST)
