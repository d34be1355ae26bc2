"""Construction of the stream of activations from a run's config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from kronsae.data.buffer import Activations, ShuffleBuffer, buffer_order
from kronsae.data.harvest import ActivationStream, widths
from kronsae.data.manifest import read_manifest
from kronsae.data.model import LanguageModel, check_hooks, find_device, load_model
from kronsae.data.prefetch import Prefetched
from kronsae.data.stored import HarvestedRows, StoredActivations
from kronsae.data.stream import MakeStream, State
from kronsae.data.text import TextStream
from kronsae.data.tokens import TokenBatch, TokenStream
from kronsae.runs.config import RunConfig
from kronsae.support.errors import UserError


@dataclass(frozen=True)
class Source:
    """Source of activations: a model with hooks, or a folder of harvested activations.

    The model is loaded on first use, so training on harvested activations never loads it.
    """

    config: RunConfig

    @cached_property
    def language_model(self) -> LanguageModel:
        """Load the model; check that it has the hooks and enough positions for a window."""
        language_model = load_model(self.config.model)
        check_hooks(language_model.model, self.config.hooks)
        language_model.check_context_length(self.config.context_length)
        return language_model

    @cached_property
    def device(self) -> torch.device:
        """Return the device of the activations and the SAEs."""
        return find_device(self.config.model.device)

    @cached_property
    def widths(self) -> dict[str, int]:
        """Return the width of the activations of each hook that SAEs read or write."""
        config = self.config
        if config.activations is None:
            return widths(self.language_model, config.hooks)
        harvested = read_manifest(config.activations).d_in
        for hook in config.hooks:
            if hook not in harvested:
                raise UserError(
                    f"hook must be one of those harvested into {config.activations}: {', '.join(harvested)}; "
                    f"got '{hook}'. Leave hook out, or harvest it."
                )
        return {hook: harvested[hook] for hook in config.hooks}

    @property
    def d_in(self) -> int:
        """Return the sum of the widths of all hooks: the number of values stored per token."""
        return sum(self.widths.values())

    def tokens(self, *, held_out: bool, repeat: bool = True, shuffled: bool = False) -> MakeStream[TokenBatch]:
        """Return a function that creates the stream of token batches of the training or held-out documents.

        Args:
            held_out, repeat: as for `TextStream`.
            shuffled: shuffle the windows in the run's pool, as for training; otherwise keep the order of the text.
        """
        config = self.config
        text = partial(
            TextStream,
            config.text,
            held_out=held_out,
            held_out_share=config.held_out_share,
            repeat=repeat,
        )
        return partial(
            TokenStream,
            text,
            self.language_model.tokenizer,
            context_length=config.context_length,
            batch_sequences=config.model_batch,
            pool_tokens=config.pool_tokens if shuffled else 0,
            seed=config.seed,
        )

    def activations(self, *, held_out: bool, repeat: bool = True, hook: str | None = None) -> ActivationStream:
        """Return the activations of one hook (default: the run's) in text order, one item per forward pass."""
        hook = self.config.hook if hook is None else hook
        return ActivationStream(self.language_model, hook, self.tokens(held_out=held_out, repeat=repeat))

    def describe_reading(self, steps: int) -> str:
        """Return how a training of ``steps`` steps reads the harvested activations, in one or more sentences."""
        config = self.config
        assert config.activations is not None
        if not config.has_buffer:
            return (
                "Verifying the checksums of the harvested activations. They are read from disk in random order, "
                "without window pool or shuffle buffer."
            )
        manifest = read_manifest(config.activations)
        seed = manifest.metadata.get("seed")
        order = buffer_order(config.loop.batch_tokens, config.buffer_tokens, config.seed)
        same = min(steps, order.whole_batches(manifest.tokens))
        if seed is None:
            like = "It is the order of the text, because the harvest had no window pool."
        elif seed != config.seed:
            like = f"The harvest has seed {seed} and this run {config.seed}, so no run on the model has these batches."
        elif same == steps:
            like = "The batches are those of the same run on the model."
        else:
            like = (
                f"The first {same:,} of {steps:,} batches are those of the same run on the model; then the harvest "
                "ends and is read again."
            )
        return (
            "Reading the harvested activations in the order of the harvest, through the shuffle buffer; the checksum "
            f"of each shard is verified when it is opened. {like}"
        )

    def batches(self, state: State | None) -> Iterable[tuple[Activations, State]]:
        """Return shuffled batches of activations for training, resuming after ``state``.

        They do not depend on the length of the training, so an SAE sees the same batches in every group. Harvested
        activations in the order of the harvest give the batches of the model, as far as they reach.
        """
        config = self.config
        if config.activations is not None and config.activation_order == "random":
            return self.stored(state)
        activations: MakeStream[Activations] = (
            partial(ActivationStream, self.language_model, config.hooks, self.tokens(held_out=False, shuffled=True))
            if config.activations is None
            else partial(HarvestedRows, config.activations, hooks=config.hooks, device=self.device)
        )
        shuffled = ShuffleBuffer(
            activations,
            batch_size=config.loop.batch_tokens,
            buffer_tokens=config.buffer_tokens,
            seed=config.seed,
            state=state,
        )
        return shuffled if config.activations is None else Prefetched(shuffled)

    def stored(self, state: State | None, share: tuple[int, int] = (0, 1)) -> StoredActivations:
        """Return shuffled batches of the harvested activations, or a share of each (`StoredActivations`)."""
        config = self.config
        assert config.activations is not None
        return StoredActivations(
            config.activations,
            batch_size=config.loop.batch_tokens,
            seed=config.seed,
            device=self.device,
            hooks=config.hooks,
            share=share,
            state=state,
        )
