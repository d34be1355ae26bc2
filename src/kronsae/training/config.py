"""How an SAE is trained: one config per SAE, one for the loop."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from kronsae.core.checks import check_count, check_positive, check_seed
from kronsae.core.experts import AnyEncoderConfig
from kronsae.core.losses import LossConfig, SquaredErrorConfig
from kronsae.core.normalization import NormalizationName, check_foldable
from kronsae.core.objective import AuxKConfig
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import SparsifierConfig
from kronsae.support.errors import UserError
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
    """One SAE of a group: its shape (but for its widths, which the model tells) and its training.

    What is read and what is written make it an SAE (one hook, read and written), a transcoder (one hook read, another
    written) or a crosscoder (several). Several hooks stand side by side: an activation is as wide as all of them.

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
            Of several hooks each is measured on its own.
        revive_every_tokens: in the first half of the training, start the encoder rows that only dead latents have
            anew, each time so many tokens have been seen (`kronsae.training.revival`); None: never, AuxK alone revives.
        seed: of the initial weights.
        read: hooks read; None: the run's hook.
        write: hooks reconstructed; None: those read.
        skip: add ``W_skip x`` to the reconstruction; for a transcoder.
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

    def __post_init__(self) -> None:
        for name in ("read", "write"):
            object.__setattr__(self, name, _hooks(name, getattr(self, name)))
        if self.skip and self.write in (None, self.read):
            raise UserError(
                f"skip needs other hooks to write than those read; '{self.name}' writes what it reads. "
                "Give write=, or leave skip out."
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UserError(
                f"name must be letters, digits, '.', '_' or '-', since it names a folder; got {self.name!r}."
            )
        check_seed(self.seed)
        if self.revive_every_tokens is not None:
            check_count("revive_every_tokens", self.revive_every_tokens)
            if self.encoder.kind == "switch" or self.write not in (None, self.read):
                raise UserError(
                    f"revive_every_tokens is for SAEs without experts that write what they read, unlike '{self.name}'. "
                    "Leave it out: AuxK revives there too."
                )
        if self.sparsifier.kind != "jumprelu" and self.sparsity != SparsityConfig():
            raise UserError(
                f"sparsity is for the sparsifier 'jumprelu'; got {self.sparsity} with '{self.sparsifier.kind}' in "
                f"'{self.name}'. Leave it out."
            )
        check_foldable(self.normalize_activations, self.encoder)
        self.sparsifier.check(self.encoder)
        self.loss.check(self.encoder)

    def reads(self, hook: str) -> tuple[str, ...]:
        """The hooks read, in a run whose hook is ``hook``."""
        return (hook,) if self.read is None else self.read

    def writes(self, hook: str) -> tuple[str, ...]:
        """The hooks written, in a run whose hook is ``hook``."""
        return self.reads(hook) if self.write is None else self.write

    def reconstructs(self, hook: str) -> str | None:
        """The one hook that it reads and writes, in a run whose hook is ``hook``; None for any other role."""
        read = self.reads(hook)
        return read[0] if len(read) == 1 and self.writes(hook) == read else None

    def shape(self, d_in: int | Mapping[str, int], hook: str = "") -> SAEConfig:
        """The SAE's config once the width of the activations is known.

        Args:
            d_in: width of the activations, by hook; one number: of every hook.
            hook: the run's.
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
        )


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


def _hooks(name: str, hooks: object) -> tuple[str, ...] | None:
    """Hooks as a member keeps them: a tuple of different names, or None."""
    if hooks is None:
        return None
    if not isinstance(hooks, list | tuple) or not hooks or not all(isinstance(hook, str) and hook for hook in hooks):
        raise UserError(f"{name} must list hooks, such as ['layers.2', 'layers.3']; got {hooks!r}.")
    if len(set(hooks)) < len(hooks):
        raise UserError(f"{name} must list different hooks; got {', '.join(hooks)}. Name each once.")
    return tuple(hooks)
