"""Config of a run: model, text, hooks, SAEs and training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kronsae.core.checks import check_count
from kronsae.data.model import ModelConfig
from kronsae.data.text import TextConfig
from kronsae.support.errors import UserError
from kronsae.training.budget import check_reference
from kronsae.training.config import LoopConfig, MemberConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Config of a run: SAEs trained on the activations of one model over one text.

    Args:
        model: the language model.
        text: source of the text.
        hook: hook of the SAEs that have no hooks of their own: a module path or layer, such as ``layers.6``;
            ``layers.6.mlp:input`` is the input of a module instead of its output.
        saes: the SAEs, trained side by side on the same tokens.
        loop: budget, batch size, logging and checkpoints.
        activations: folder or URL of harvested activations to train on; None: run the model.
        activation_order: order in which harvested activations are read: ``"random"``, a new random order of all rows in
            every epoch; or ``"harvested"``, the order of the harvest, through the shuffle buffer, which gives the
            batches of a run on the model with the same seed.
        context_length: T, length of a sequence of the model in tokens.
        model_batch: S, windows of a batch, which the model reads in one or several passes.
        window_pool_tokens: tokens in the pool in which windows are shuffled before the model, 4 bytes each; None:
            2**20, or 16 of these batches if they are more; 0: read the windows in the order of the text.
        buffer_tokens: tokens whose activations are shuffled together; memory is ``buffer_tokens * 4`` bytes times the
            sum of the widths of all `hooks`. A run that reads harvested `activations` in random order has neither
            pool nor buffer.
        eval_tokens: held-out tokens to evaluate on.
        eval_ce_tokens: the first of these tokens, on which CE and KL recovered are measured; the whole model runs on
            them once per SAE, which takes most of an evaluation's time.
        held_out_share: share of documents held out for evaluation.
        seed: seed of the order of the activations.
    """

    model: ModelConfig
    text: TextConfig
    hook: str
    saes: tuple[MemberConfig, ...]
    loop: LoopConfig
    activations: str | None = None
    activation_order: Literal["random", "harvested"] = "random"
    context_length: int = 256
    model_batch: int = 32
    window_pool_tokens: int | None = None
    buffer_tokens: int = 2**18
    eval_tokens: int = 262_144
    eval_ce_tokens: int = 32_768
    held_out_share: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("context_length", "model_batch", "buffer_tokens", "eval_tokens", "eval_ce_tokens"):
            check_count(name, getattr(self, name))
        if not self.saes:
            raise UserError("saes must name at least one SAE; got none. Add kronsae.topk(...) or kronsae.kron(...).")
        names = [member.name for member in self.saes]
        if len(set(names)) < len(names):
            raise UserError(f"saes must have different names; got {', '.join(names)}. Give name= to each.")
        check_reference(self.loop.same_flops_as, names)
        check_window_pool(self.window_pool_tokens, self.model_batch, self.context_length)
        if self.activation_order != "random" and self.activations is None:
            raise UserError(
                f"activation_order must be given only with harvested activations; got {self.activation_order!r} "
                "without. Give activations, or leave it out."
            )
        if self.has_buffer and self.buffer_tokens < self.loop.batch_tokens:
            raise UserError(
                f"buffer_tokens must be at least batch_tokens; got {self.buffer_tokens} with "
                f"batch_tokens={self.loop.batch_tokens}. Enlarge the buffer or shrink the batch."
            )
        check_held_out_share(self.held_out_share)

    @property
    def pool_tokens(self) -> int:
        """Tokens in the pool of windows: `window_pool_tokens`, or its default for this context length and batch."""
        return pool_tokens(self.window_pool_tokens, self.model_batch, self.context_length)

    @property
    def has_buffer(self) -> bool:
        """Whether batches come out of a shuffle buffer: always except from harvested activations in random order."""
        return self.activations is None or self.activation_order == "harvested"

    @property
    def hooks(self) -> tuple[str, ...]:
        """Return all hooks that SAEs read or write, each once."""
        needed = (hook for member in self.saes for hook in (*member.reads(self.hook), *member.writes(self.hook)))
        return tuple(dict.fromkeys(needed))


def own_hook(saes: Sequence[MemberConfig]) -> str | None:
    """Return the first hook that the SAEs read if every SAE has its own hooks, otherwise None."""
    reads = [member.read for member in saes if member.read is not None]
    return reads[0][0] if reads and len(reads) == len(saes) else None


def pool_tokens(window_pool_tokens: int | None, model_batch: int, context_length: int) -> int:
    """Return the tokens in the pool of windows, of which None means 2**20, or 16 of these batches if they are more."""
    if window_pool_tokens is None:
        return max(2**20, 16 * model_batch * context_length)
    return window_pool_tokens


def check_window_pool(window_pool_tokens: int | None, model_batch: int, context_length: int) -> None:
    """Raise unless the pool is None, 0, or holds the windows of a forward pass."""
    if window_pool_tokens not in (None, 0):
        check_count("window_pool_tokens", window_pool_tokens)
    batch_of_windows = model_batch * context_length
    if 0 < pool_tokens(window_pool_tokens, model_batch, context_length) < batch_of_windows:
        raise UserError(
            "window_pool_tokens must be 0 or at least model_batch * context_length; "
            f"got {window_pool_tokens} with {batch_of_windows}. Enlarge the pool, or give 0 to read the "
            "windows in the order of the text."
        )


def check_held_out_share(share: float) -> None:
    """Raise if the share leaves no documents for training or for evaluation."""
    if not 0 < share < 1:
        raise UserError(f"held_out_share must be between 0 and 1; got {share!r}.")


def with_overrides(
    config: RunConfig,
    *,
    model: str | None = None,
    text: str | None = None,
    hook: str | None = None,
    tokens: int | None = None,
    flops: float | None = None,
    same_flops_as: str | None = None,
    seed: int | None = None,
    saes: Sequence[MemberConfig] = (),
) -> RunConfig:
    """Return the config with some fields replaced; None, and no SAEs, keep the config's values.

    ``tokens`` replaces a budget in FLOPs, and ``flops`` a budget in tokens.
    """
    if model is not None:
        config = replace(config, model=replace(config.model, name=model, revision=None))
    if text is not None:
        config = replace(config, text=TextConfig(source=text))
    if hook is not None:
        config = replace(config, hook=hook)
    if seed is not None:
        members = tuple(replace(member, seed=seed) for member in config.saes)
        config = replace(config, seed=seed, saes=members)
    loop = config.loop
    if tokens is not None or flops is not None:
        loop = replace(loop, tokens=tokens, flops=flops, same_flops_as=None if tokens is None else loop.same_flops_as)
    if same_flops_as is not None:
        loop = replace(loop, same_flops_as=same_flops_as)
    return replace(config, loop=loop, saes=tuple(saes) or config.saes)
