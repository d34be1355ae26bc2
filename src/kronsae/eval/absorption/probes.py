"""One-vs-rest linear probes on activations or on sparse codes, trained with Adam as in SAEBench."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, embedding_bag

from kronsae.core.codes import SparseCodes
from kronsae.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ProbeTraining:
    """Training settings of a probe; the defaults are SAEBench's for the probe on activations.

    Args:
        batch: number of examples per step.
        epochs: number of passes over the examples, each in a new random order.
        lr, final_lr: learning rate of the first epoch, and the rate to which it decays exponentially after the last.
        weight_decay: Adam's weight decay (added to the gradient), also on biases.
        l1: weight of ``mean over classes of sum |w|`` in the loss.
    """

    batch: int = 64
    epochs: int = 50
    lr: float = 1e-2
    final_lr: float = 1e-5
    weight_decay: float = 1e-4
    l1: float = 0.0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.epochs < 1:
            raise UserError(f"batch and epochs must be at least 1; got {self.batch} and {self.epochs}.")
        if not 0 < self.final_lr <= self.lr:
            raise UserError(f"final_lr must be above 0 and at most lr; got {self.final_lr} with lr={self.lr}.")


ON_LATENTS = ProbeTraining(batch=4096, weight_decay=1e-6, l1=0.01)
"""SAEBench's settings for the probe on latents; its weights select the latents of a class."""


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Linear probe ``score = x W^T + b``; it predicts a class where the score is above 0."""

    weight_CI: Float[Tensor, "C I"]
    bias_C: Float[Tensor, " C"]

    def scores(self, x_EI: Float[Tensor, "E I"]) -> Float[Tensor, "E C"]:
        """Return the scores of activations."""
        return x_EI.to(self.weight_CI) @ self.weight_CI.T + self.bias_C


def train_probe(
    x_EI: Float[Tensor, "E I"],
    y_EC: Bool[Tensor, "E C"],
    training: ProbeTraining,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> LinearProbe:
    """Train one linear probe per class on activations.

    ``loss = BCE(x W^T + b, y)`` with ``pos_weight = negatives / positives`` of each class, mean over examples and
    classes. Weights are initialised as torch initialises a linear layer; equal seeds give equal probes.

    Args:
        x_EI: activations, in the dtype to train in.
        y_EC: classes of each example.
        progress: called with (epochs done, total epochs).
    """

    def logits(weight_CI: Tensor, bias_C: Tensor, rows_B: Tensor) -> Tensor:
        return x_EI[rows_B] @ weight_CI.T + bias_C

    return _train(logits, x_EI.shape[1], x_EI.dtype, y_EC, training, seed, progress)


def train_latent_probe(
    codes: SparseCodes,
    y_EC: Bool[Tensor, "E C"],
    training: ProbeTraining,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> LinearProbe:
    """Train probes as `train_probe` does, on sparse codes, never dense: ``score = b + sum_k value_k W[:, index_k]``."""

    def logits(weight_CF: Tensor, bias_C: Tensor, rows_B: Tensor) -> Tensor:
        values_BK, indices_BK = codes.values[rows_B], codes.indices[rows_B]
        return embedding_bag(indices_BK, weight_CF.T, per_sample_weights=values_BK, mode="sum") + bias_C

    return _train(logits, codes.d_sae, codes.values.dtype, y_EC, training, seed, progress)


def _train(
    logits: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: int,
    dtype: torch.dtype,
    y_EC: Tensor,
    training: ProbeTraining,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> LinearProbe:
    examples, classes = y_EC.shape
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(inputs)
    # drawn in float32 for every dtype, as in torch's linear layer
    weight_CI = torch.empty(classes, inputs).uniform_(-bound, bound, generator=generator).to(dtype)
    bias_C = torch.empty(classes).uniform_(-bound, bound, generator=generator).to(dtype)
    positives_C = y_EC.sum(0)
    # the weight of a class without positives has no effect
    pos_weight_C = ((examples - positives_C) / positives_C.clamp_min(1)).to(dtype)
    y_EC = y_EC.to(dtype)
    parameters = (weight_CI.requires_grad_(), bias_C.requires_grad_())
    optimizer = torch.optim.Adam(parameters, lr=training.lr, weight_decay=training.weight_decay)
    decay = (training.final_lr / training.lr) ** (1 / training.epochs)
    with torch.enable_grad():
        for epoch in range(training.epochs):
            optimizer.param_groups[0]["lr"] = training.lr * decay**epoch
            for rows_B in torch.randperm(examples, generator=generator).split(training.batch):
                optimizer.zero_grad()
                loss = binary_cross_entropy_with_logits(
                    logits(*parameters, rows_B), y_EC[rows_B], pos_weight=pos_weight_C
                )
                if training.l1:
                    loss = loss + training.l1 * weight_CI.abs().sum(-1).mean()
                loss.backward()
                optimizer.step()
            if progress is not None:
                progress(epoch + 1, training.epochs)
    return LinearProbe(weight_CI.detach(), bias_C.detach())


def f1(predicted_E: Bool[Tensor, " E"], true_E: Bool[Tensor, " E"]) -> float:
    """Return ``2 tp / (2 tp + fp + fn)``; 0 if there is neither a prediction nor a positive."""
    total = int(predicted_E.sum()) + int(true_E.sum())
    return 2 * int((predicted_E & true_E).sum()) / total if total else 0.0
