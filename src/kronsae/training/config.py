"""How an SAE is trained: one config per SAE, one for the loop."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from kronsae.core.checks import check_count, check_positive
from kronsae.core.experts import AnyEncoderConfig
from kronsae.core.losses import LossConfig, SquaredErrorConfig
from kronsae.core.normalization import NormalizationName, check_foldable
from kronsae.core.objective import AuxKConfig
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import SparsifierConfig
from kronsae.errors import UserError
from kronsae.training.sparsity import SparsityConfig


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (the paper's recipe).

    Args:
        lr: peak learning rate.
        final_lr: learning rate at the last step.
        warmup_share: share of all steps over which the rate rises linearly to ``lr``.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: Adam's epsilon.
        weight_decay: decoupled weight decay.
        clip_norm: gradients of one SAE are scaled down to this global norm; None: not clipped.
    """

    lr: float = 8e-4
    final_lr: float = 1e-6
    warmup_share: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip_norm"):
            check_positive(f"optimizer.{name}", getattr(self, name))
        for name in ("warmup_share", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} must be in [0, 1); got {getattr(self, name)!r}.")
        for name in ("final_lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name} must be finite and at least 0; got {getattr(self, name)!r}.")


@dataclass(frozen=True, kw_only=True)
class MemberConfig:
    """One SAE of a group: its shape (but for d_in, which the model tells) and its training.

    Args:
        name: names the SAE in tables and its folder in the run.
        encoder: dense or Kronecker.
        sparsifier: which latents stay.
        optimizer: learning rate and schedule.
        aux_k: the loss that revives dead latents, and after how many tokens a latent counts as dead.
        loss: of the whole dictionary, or of nested prefixes (Matryoshka).
        sparsity: the weight of l0 in the loss, for a sparsifier that learns from it (JumpReLU).
        unit_norm_decoder: keep every row of W_dec at norm 1 after each step.
        normalize_activations: ``"center_and_scale"`` trains on activations of mean 0 and norm sqrt(d_in), measured on
            the first batch, and folds that into the biases at the end: a saved SAE takes raw activations. ``"none"``,
            as in the paper, trains on them as they are.
        seed: of the initial weights.
    """

    name: str
    encoder: AnyEncoderConfig
    sparsifier: SparsifierConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    aux_k: AuxKConfig = field(default_factory=AuxKConfig)
    loss: LossConfig = field(default_factory=SquaredErrorConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    unit_norm_decoder: bool = True
    normalize_activations: NormalizationName = "center_and_scale"
    seed: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UserError(
                f"name must be letters, digits, '.', '_' or '-', since it names a folder; got {self.name!r}."
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be from 0 to 2**63 - 1; got {self.seed!r}.")
        check_foldable(self.normalize_activations, self.encoder)
        self.sparsifier.check(self.encoder)
        self.loss.check(self.encoder)

    def shape(self, d_in: int) -> SAEConfig:
        """The SAE's config once the width of the activations is known."""
        return SAEConfig(d_in=d_in, encoder=self.encoder, sparsifier=self.sparsifier)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long the loop runs and how often it tells and saves.

    The budget is ``tokens`` or ``flops``, rounded down to whole batches; see `kronsae.training.budget.member_steps`.

    Args:
        tokens: tokens to train on.
        flops: what the training of each SAE may cost instead, counted by `kronsae.core.flops.training_flops`.
        same_flops_as: name of the SAE that trains on ``tokens``; the others train on as many as cost the same.
        batch_tokens: B, tokens per step.
        log_every: steps between metrics.
        checkpoint_every: steps between checkpoints.
    """

    tokens: int | None = None
    flops: int | float | None = None
    same_flops_as: str | None = None
    batch_tokens: int = 8192
    log_every: int = 10
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.flops is None):
            raise UserError(
                f"give the budget as tokens or as flops, one of them; got tokens={self.tokens}, flops={self.flops}."
            )
        if self.flops is not None and self.same_flops_as is not None:
            raise UserError(
                "same_flops_as goes with tokens, those of the SAE that it names; got "
                f"flops={self.flops:g}. Give tokens, or leave same_flops_as out."
            )
        check_positive("flops", self.flops)
        for name in ("tokens", "batch_tokens", "log_every", "checkpoint_every"):
            if name != "tokens" or self.tokens is not None:
                check_count(name, getattr(self, name))
        if self.tokens is not None and self.tokens < self.batch_tokens:
            raise UserError(
                f"tokens must be at least one batch; got tokens={self.tokens} with batch_tokens="
                f"{self.batch_tokens}. Ask for more tokens or smaller batches."
            )

    @property
    def steps(self) -> int:
        """Optimiser steps of an SAE that trains on all ``tokens``."""
        if self.tokens is None:
            raise UserError("a budget in flops is another number of steps for each SAE; ask member_steps.")
        return self.tokens // self.batch_tokens
