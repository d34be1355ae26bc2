"""Harvesting: write the activations of a text at one or more hooks to disk, with the metadata that training needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from kronsae.core.checks import check_count, check_seed
from kronsae.data.buffer import Activations
from kronsae.data.harvest import ActivationStream, widths
from kronsae.data.manifest import Manifest, Progress, read_manifest, read_progress
from kronsae.data.model import LanguageModel, ModelConfig, check_hooks, load_model
from kronsae.data.places import open_place
from kronsae.data.store import SHARD_BYTES, harvest_settings, stored_bytes, write_activations
from kronsae.data.stream import State
from kronsae.data.text import TextConfig, TextStream
from kronsae.data.tokens import TokenStream
from kronsae.runs.config import RunConfig, check_held_out_share, check_window_pool, pool_tokens
from kronsae.runs.planning import format_duration
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import Interrupted, UserError
from kronsae.support.resources import format_bytes

TIMED_PASSES = 3
"""Passes of the model after the first, which allocates, from which the time is estimated."""


def harvest(
    *,
    model: str | ModelConfig,
    text: str | TextConfig,
    hook: str | int | Sequence[str | int],
    tokens: int,
    out: Path | str,
    dtype: str = "float32",
    context_length: int = 256,
    model_batch: int = 32,
    window_pool_tokens: int | None = None,
    held_out_share: float = 0.05,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write the activations of the training documents of a text into ``out``; return a summary.

    Held-out documents are left out, so that SAEs trained on the folder can be evaluated on them. The activations are
    those that a training with the same settings reads from the model, in the same order, before its shuffle buffer.

    The same call continues an interrupted harvest: the folder is then the same, byte for byte, as without the
    interruption (on a CPU). A finished one is left as it is.

    Args:
        model: Hub name, local folder, GGUF file, a name of `kronsae models` such as ``"bundled"``, or a config.
        text: Hub data set, local file or folder, ``"bundled"``, or a config.
        hook: one or more module paths or layers, such as ``"layers.6"`` or ``6``, read in the same pass. SAEs without
            hooks of their own use the first.
        tokens: number of tokens to harvest.
        out: a new or empty folder, or that of the same harvest: a local path or a URL that fsspec opens.
        dtype: precision on disk: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"int8"`` with a scale per token and
            hook.
        context_length: T, length of a sequence of the model in tokens.
        model_batch: S, windows of a batch, which the model reads in one or several passes.
        window_pool_tokens: tokens in the pool in which windows are shuffled before the model, as in `RunConfig`.
        held_out_share: share of documents held out for evaluation.
        seed: seed of the order of the windows.
        shard_bytes: size of a shard over all hooks.
        progress: called with the number of tokens done and of all tokens.
        say: receives size and time, and whether a harvest is continued.

    Raises:
        UserError: an argument is invalid; raised before the model is loaded where possible.
    """
    counts = {"tokens": tokens, "context_length": context_length, "model_batch": model_batch}
    for name, value in (counts | {"shard_bytes": shard_bytes}).items():
        check_count(name, value)
    check_held_out_share(held_out_share)
    check_seed(seed)
    check_window_pool(window_pool_tokens, model_batch, context_length)
    hooks = [str(one) for one in ([hook] if isinstance(hook, str | int) else hook)]
    if not hooks or len(set(hooks)) < len(hooks):
        raise UserError(f"hook must name different hooks, at least one; got {', '.join(hooks) or 'none'}.")
    model_config = ModelConfig(name=model) if isinstance(model, str) else model
    text_config = TextConfig(source=text) if isinstance(text, str) else text
    pool = pool_tokens(window_pool_tokens, model_batch, context_length)
    about = {
        # Parsed as training will parse it, so that an invalid config is not written.
        "model": to_dict(from_dict(ModelConfig, to_dict(model_config), where="model")),
        "text": to_dict(from_dict(TextConfig, to_dict(text_config), where="text")),
        "hook": hooks[0],
        "hooks": hooks,
        "context_length": context_length,
        "model_batch": model_batch,
        "window_pool_tokens": pool,
        "held_out_share": held_out_share,
        "seed": seed,
    }
    settings = harvest_settings(tokens=tokens, shard_bytes=shard_bytes, dtype=dtype, metadata=about)
    place = open_place(out)
    place.check(0)
    found = read_progress(place, settings)
    if isinstance(found, Manifest):
        say(f"The harvest in {place} is already finished; nothing is read from the model.")
        return _summary(found, str(out), model_config, 0.0, 0)
    language_model = load_model(model_config)
    check_hooks(language_model.model, hooks)
    language_model.check_context_length(context_length)
    d_in = widths(language_model, hooks)
    done = 0 if found is None else found.tokens
    place.check(_announce(d_in, dtype, tokens, shard_bytes, found, say))
    documents = partial(TextStream, text_config, held_out_share=held_out_share)
    windows = partial(
        TokenStream,
        documents,
        language_model.tokenizer,
        context_length=context_length,
        batch_sequences=model_batch,
        pool_tokens=pool,
        seed=seed,
    )
    started = perf_counter()
    try:
        manifest = write_activations(
            partial(_Told, language_model, hooks, windows, done=done, tokens=tokens, progress=progress, say=say),
            out,
            d_in=d_in,
            tokens=tokens,
            shard_bytes=shard_bytes,
            dtype=dtype,
            metadata=about,
        )
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped before the end of {tokens:,} tokens; the complete shards are kept in {place}. Run the same "
            "command again to resume."
        ) from None
    progress(tokens, tokens)
    return _summary(manifest, str(out), model_config, perf_counter() - started, tokens - done)


def _announce(
    d_in: Mapping[str, int],
    dtype: str,
    tokens: int,
    shard_bytes: int,
    found: Progress | None,
    say: Callable[[str], None],
) -> int:
    """Say the size, and where a harvest is continued; return the bytes that are still to be written."""
    shards, size = stored_bytes(d_in, dtype, tokens, shard_bytes)
    places = ", ".join(f"{hook} (width {width})" for hook, width in d_in.items())
    say(
        f"{tokens:,} tokens at {places} in {dtype}: {format_bytes(size)} ({size:,} bytes) in {shards:,} "
        f"shard{'s' if shards > 1 else ''}."
    )
    if found is None:
        return size
    say(f"Resuming after {found.tokens:,} of {tokens:,} tokens.")
    return size - sum(shard.bytes or 0 for shard in found.shards)


def _summary(manifest: Manifest, out: str, model: ModelConfig, seconds: float, tokens: int) -> dict[str, Any]:
    lost = {
        hook: sum(shard.tokens * (shard.lost_variance or {}).get(hook, 0.0) for shard in manifest.shards)
        / manifest.tokens
        for hook in manifest.d_in
    }
    return {
        "out": out,
        "model": model.name,
        "hooks": manifest.d_in,
        "tokens": manifest.tokens,
        "dtype": manifest.dtype,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes or 0 for shard in manifest.shards),
        "lost_variance": {hook: float(f"{share:.4g}") for hook, share in lost.items()},
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }


class _Told:
    """An `ActivationStream` that reports its progress, and after its first passes the time."""

    def __init__(
        self,
        language_model: LanguageModel,
        hooks: Sequence[str],
        windows: Callable[..., TokenStream],
        *,
        done: int,
        tokens: int,
        progress: Callable[[int, int], None],
        say: Callable[[str], None],
        state: State | None = None,
    ) -> None:
        self._stream = ActivationStream(language_model, hooks, windows, state=state)
        self._hook, self._done, self._tokens = hooks[0], done, tokens
        self._progress, self._say = progress, say

    def __iter__(self) -> Iterator[tuple[Activations, State]]:
        started, first = 0.0, 0
        for number, (values, state) in enumerate(self._stream):
            yield values, state
            self._done += len(values[self._hook])
            self._progress(min(self._done, self._tokens), self._tokens)
            if number == 0:
                started, first = perf_counter(), self._done
            if number == TIMED_PASSES and self._done < self._tokens:
                seconds = (perf_counter() - started) * (self._tokens - self._done) / max(1, self._done - first)
                self._say(f"Time: about {format_duration(seconds)} for the rest of the harvest.")


def with_activations(config: RunConfig, folder: Path | str) -> RunConfig:
    """Return ``config`` with harvested activations, and what determines them: model, text, first hook and windows."""
    about = read_manifest(folder).metadata
    if not {"model", "text", "hook", "context_length", "held_out_share"} <= about.keys():
        raise UserError(
            f"the manifest of harvested activations must name model, text and hook; that of {folder} does not. Harvest "
            "with `kronsae harvest`."
        )
    # The first format did not store these.
    windows = {key: about[key] for key in ("model_batch", "window_pool_tokens") if key in about}
    return replace(
        config,
        activations=str(folder),
        model=from_dict(ModelConfig, about["model"], where="the manifest's model"),
        text=from_dict(TextConfig, about["text"], where="the manifest's text"),
        hook=about["hook"],
        context_length=about["context_length"],
        held_out_share=about["held_out_share"],
        **windows,
    )
