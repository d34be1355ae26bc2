"""Training configs: one per SAE, one for the loop."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from kronsae.core.checks import check_count, check_positive, check_seed
from kronsae.core.experts import AnyEncoderConfig
from kronsae.core.losses import LossConfig, SquaredErrorConfig
from kronsae.core.normalization import NormalizationName, check_foldable
from kronsae.core.objective import AuxKConfig
from kronsae.core.pursuit import Pursuit, PursuitLearning
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import SparsifierConfig
from kronsae.support.errors import UserError
from kronsae.training.sparsity import SparsityConfig


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Config of AdamW with linear warm-up and cosine decay (as in the paper).

    Args:
        lr: peak learning rate.
        final_lr: learning rate at the last step.
        warmup_share: share of all steps over which the rate increases linearly to ``lr``.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: Adam's epsilon.
        weight_decay: decoupled weight decay.
        clip_norm: global norm to which the gradients of one SAE are clipped; None: no clipping.
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
    """Config of one SAE of a group: its architecture, without the widths that the model determines, and its training.

    The hooks read and written make it an SAE (one hook, read and written), a transcoder (one hook read, another
    written) or a crosscoder (several hooks). The activations of several hooks are concatenated.

    Args:
        name: name of the SAE in tables, and of its folder in the run.
        encoder: dense, Kronecker or switch.
        sparsifier: how active latents are selected.
        optimizer: learning rate and schedule.
        aux_k: loss that revives dead latents, and the number of tokens after which a latent counts as dead.
        loss: of the whole dictionary, or of nested prefixes (Matryoshka).
        sparsity: weight of l0 in the loss, for a sparsifier that learns from it (JumpReLU).
        unit_norm_decoder: keep every row of W_dec at norm 1 after each step.
        normalize_activations: ``"center_and_scale"`` trains on activations of mean 0 and norm sqrt(width), measured on
            the first batch and separately for each hook. The normalisation is folded into the weights at the end, so
            that a saved SAE takes raw activations. ``"none"``, as in the paper, trains on raw activations.
        revive_every_tokens: during the first half of training, reinitialise the encoder rows that have only dead
            latents every so many tokens (`kronsae.training.revival`); None: never, only AuxK revives.
        seed: seed of the initial weights.
        read: hooks read; None: the run's hook.
        write: hooks reconstructed; None: the hooks read.
        skip: add ``W_skip x`` to the reconstruction; for a transcoder.
        pursuit: how the codes are pursued, in training and afterwards (`kronsae.core.pursuit`); None: not at all.
        pursuit_learning: what learns from the pursued codes (`kronsae.core.pursuit.PursuitLearning`).
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
    revive_every_tokens: int | None = None
    seed: int = 0
    read: tuple[str, ...] | None = None
    write: tuple[str, ...] | None = None
    skip: bool = False
    pursuit: Pursuit | None = None
    pursuit_learning: PursuitLearning = "two_losses"

    def __post_init__(self) -> None:
        for name in ("read", "write"):
            object.__setattr__(self, name, _check_hooks(name, getattr(self, name)))
        if self.skip and self.write in (None, self.read):
            raise UserError(
                f"skip must be used with output hooks that differ from the input hooks; '{self.name}' writes the hooks "
                "it reads. Give write=, or leave skip out."
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UserError(
                f"name must be letters, digits, '.', '_' or '-', because it names a folder; got {self.name!r}."
            )
        check_seed(self.seed)
        if self.revive_every_tokens is not None:
            check_count("revive_every_tokens", self.revive_every_tokens)
            if self.encoder.kind == "switch" or self.write not in (None, self.read):
                raise UserError(
                    "revive_every_tokens must be used with SAEs without experts that write the hooks they read; "
                    f"'{self.name}' is not one. Leave it out: AuxK revives there too."
                )
        if self.sparsifier.kind != "jumprelu" and self.sparsity != SparsityConfig():
            raise UserError(
                f"sparsity must be used with the sparsifier 'jumprelu'; got {self.sparsity} with "
                f"'{self.sparsifier.kind}' in '{self.name}'. Leave it out."
            )
        check_foldable(self.normalize_activations, self.encoder)
        self.sparsifier.check(self.encoder)
        self.loss.check(self.encoder)
        known = get_args(PursuitLearning)
        if self.pursuit_learning not in known:
            raise UserError(f"pursuit_learning must be one of {', '.join(known)}; got {self.pursuit_learning!r}.")
        if self.pursuit is None and self.pursuit_learning != "two_losses":
            raise UserError(
                f"pursuit_learning must be used with a pursuit; '{self.name}' has none. Give pursuit_rounds=2, or "
                "leave it out."
            )
        if self.pursuit is not None:
            if (
                self.pursuit_learning == "unrolled" and not self.unit_norm_decoder
            ):  # norms are constants of the gradient
                raise UserError(
                    f"pursuit_learning 'unrolled' must be used with unit_norm_decoder; '{self.name}' has none. Turn it "
                    "on, or learn with 'two_losses'."
                )
            self.shape(1, "hook").check_pursuit(self.pursuit)

    def reads(self, hook: str) -> tuple[str, ...]:
        """Return the hooks read, in a run whose hook is ``hook``."""
        return (hook,) if self.read is None else self.read

    def writes(self, hook: str) -> tuple[str, ...]:
        """Return the hooks written, in a run whose hook is ``hook``."""
        return self.reads(hook) if self.write is None else self.write

    def reconstructs(self, hook: str) -> str | None:
        """Return the single hook that it reads and writes, in a run whose hook is ``hook``; None for other roles."""
        read = self.reads(hook)
        return read[0] if len(read) == 1 and self.writes(hook) == read else None

    def shape(self, d_in: int | Mapping[str, int], hook: str = "") -> SAEConfig:
        """Return the SAE's config, given the width of the activations.

        Args:
            d_in: width of the activations, by hook; one number: the width of every hook.
            hook: hook of the run.
        """
        read, write = (
            tuple(d_in if isinstance(d_in, int) else d_in[name] for name in names)
            for names in (self.reads(hook), self.writes(hook))
        )
        return SAEConfig(
            d_in=sum(read),
            encoder=self.encoder,
            sparsifier=self.sparsifier,
            read_widths=read if len(read) > 1 else (),
            write_widths=() if self.writes(hook) == self.reads(hook) else write,
            skip=self.skip,
            pursuit=self.pursuit,
        )


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Config of the loop: its length, and how often it logs and saves.

    The budget is ``tokens`` or ``flops``, rounded down to whole batches; see `kronsae.training.budget.member_steps`.

    Args:
        tokens: tokens to train on.
        flops: training budget of each SAE, instead of tokens; counted by `kronsae.core.flops.training_flops`.
        same_flops_as: name of the SAE that trains on ``tokens``; every other SAE gets the same FLOPs.
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
            raise UserError(f"the budget must be either tokens or flops; got tokens={self.tokens}, flops={self.flops}.")
        if self.flops is not None and self.same_flops_as is not None:
            raise UserError(
                "same_flops_as must be used with tokens, the budget of the SAE that it names; got "
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
        """Number of optimiser steps of an SAE that trains on all ``tokens``."""
        if self.tokens is None:
            raise UserError("steps differ between SAEs for a budget in flops; call member_steps instead.")
        return self.tokens // self.batch_tokens


def _check_hooks(name: str, hooks: object) -> tuple[str, ...] | None:
    """Return hooks as a tuple of different names; None stays None."""
    if hooks is None:
        return None
    if not isinstance(hooks, list | tuple) or not hooks or not all(isinstance(hook, str) and hook for hook in hooks):
        raise UserError(f"{name} must list hooks, such as ['layers.2', 'layers.3']; got {hooks!r}.")
    if len(set(hooks)) < len(hooks):
        raise UserError(f"{name} must list different hooks; got {', '.join(hooks)}. Name each once.")
    return tuple(hooks)
