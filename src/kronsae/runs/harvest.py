"""Harvesting: write the activations of a text at one or more hooks to disk, with the metadata that training needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from kronsae.core.checks import check_count
from kronsae.data.buffer import Activations
from kronsae.data.harvest import ActivationStream, widths
from kronsae.data.model import DTYPES, ModelConfig, check_hooks, load_model
from kronsae.data.store import check_target, read_manifest, write_activations
from kronsae.data.stream import State
from kronsae.data.text import TextConfig, TextStream
from kronsae.data.tokens import TokenStream
from kronsae.runs.config import RunConfig, check_held_out_share
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError
from kronsae.support.resources import check_disk


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
    held_out_share: float = 0.05,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the activations of the training documents of a text into ``out``; return a summary.

    Held-out documents are left out, so that SAEs trained on the folder can be evaluated on them. The text is read in
    order, without a window pool, because training reads the folder in random order.

    Args:
        model: Hub name, local folder, GGUF file, a name of `kronsae models` such as ``"bundled"``, or a config.
        text: Hub data set, local file or folder, ``"bundled"``, or a config.
        hook: one or more module paths or layers, such as ``"layers.6"`` or ``6``, read in the same pass. SAEs without
            hooks of their own use the first.
        tokens: number of tokens to harvest.
        out: a new or empty folder.
        dtype: precision on disk: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        context_length: T, length of a sequence of the model in tokens.
        model_batch: S, sequences per forward pass of the model.
        held_out_share: share of documents held out for evaluation.
        progress: called with the number of tokens done and of all tokens.

    Raises:
        UserError: an argument is invalid; raised before the model is loaded where possible.
    """
    for name, value in (("tokens", tokens), ("context_length", context_length), ("model_batch", model_batch)):
        check_count(name, value)
    check_held_out_share(held_out_share)
    out = Path(out)
    hooks = [str(one) for one in ([hook] if isinstance(hook, str | int) else hook)]
    if not hooks or len(set(hooks)) < len(hooks):
        raise UserError(f"hook must name different hooks, at least one; got {', '.join(hooks) or 'none'}.")
    check_target(out, dtype)
    model_config = ModelConfig(name=model) if isinstance(model, str) else model
    text_config = TextConfig(source=text) if isinstance(text, str) else text
    about = {
        # Parsed as training will parse it, so that an invalid config is not written.
        "model": to_dict(from_dict(ModelConfig, to_dict(model_config), where="model")),
        "text": to_dict(from_dict(TextConfig, to_dict(text_config), where="text")),
        "hook": hooks[0],
        "context_length": context_length,
        "held_out_share": held_out_share,
    }
    language_model = load_model(model_config)
    check_hooks(language_model.model, hooks)
    language_model.check_context_length(context_length)
    documents = partial(TextStream, text_config, held_out_share=held_out_share)
    windows = partial(
        TokenStream,
        documents,
        language_model.tokenizer,
        context_length=context_length,
        batch_sequences=model_batch,
    )
    needed_bytes = tokens * sum(widths(language_model, hooks).values()) * DTYPES[dtype].itemsize
    check_disk(out, needed_bytes, "the activations", "Harvest fewer tokens, or in dtype bfloat16.")
    started = perf_counter()
    stream = ActivationStream(language_model, hooks, windows)
    manifest = write_activations(
        _told(stream, hooks[0], tokens, progress), out, tokens=tokens, dtype=dtype, metadata=about
    )
    seconds = perf_counter() - started
    return {
        "out": str(out),
        "model": model_config.name,
        "hooks": manifest.d_in,
        "tokens": manifest.tokens,
        "dtype": dtype,
        "shards": len(manifest.shards),
        "seconds": seconds,
        "tokens_per_second": manifest.tokens / seconds,
    }


def _told(
    stream: ActivationStream, hook: str, tokens: int, progress: Callable[[int, int], None]
) -> Iterator[tuple[Activations, State]]:
    done = 0
    for values, state in stream:
        yield values, state
        done += len(values[hook])
        progress(min(done, tokens), tokens)


def with_activations(config: RunConfig, folder: Path) -> RunConfig:
    """Return ``config`` with harvested activations, and the model, the text and the first hook of the harvest."""
    about = read_manifest(folder).metadata
    if not {"model", "text", "hook", "context_length", "held_out_share"} <= about.keys():
        raise UserError(
            f"the manifest of harvested activations must name model, text and hook; that of {folder} does not. Harvest "
            "with `kronsae harvest`."
        )
    return replace(
        config,
        activations=str(folder),
        model=from_dict(ModelConfig, about["model"], where="the manifest's model"),
        text=from_dict(TextConfig, about["text"], where="the manifest's text"),
        hook=about["hook"],
        context_length=about["context_length"],
        held_out_share=about["held_out_share"],
    )
