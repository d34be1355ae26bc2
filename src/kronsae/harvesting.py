"""Harvesting as a verb: one hook's activations of a text, on disk, with all that a later training must know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from kronsae.config import from_dict, to_dict
from kronsae.data.buffer import Activations
from kronsae.data.harvest import ActivationStream
from kronsae.data.model import ModelConfig, load_model
from kronsae.data.store import read_manifest, write_activations
from kronsae.data.stream import State
from kronsae.data.text import TextConfig, TextStream
from kronsae.data.tokens import TokenStream
from kronsae.errors import UserError
from kronsae.run_config import RunConfig


def harvest(
    *,
    model: str,
    text: str,
    hook: str,
    tokens: int,
    out: Path | str,
    dtype: str = "float32",
    context_length: int = 256,
    model_batch: int = 32,
    held_out_share: float = 0.05,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the activations of the training part of a text into ``out``; return what was written.

    Held-out documents are left out, so that SAEs trained on the folder can be evaluated on them.
    """
    model_config, text_config = ModelConfig(name=model), TextConfig(source=text)
    language_model = load_model(model_config)
    language_model.check_context_length(context_length)
    documents = partial(TextStream, text_config, held_out_share=held_out_share)
    windows = partial(
        TokenStream,
        documents,
        language_model.tokenizer,
        context_length=context_length,
        batch_sequences=model_batch,
    )
    about = {
        "model": to_dict(model_config),
        "text": to_dict(text_config),
        "hook": hook,
        "context_length": context_length,
        "held_out_share": held_out_share,
    }
    started = perf_counter()
    stream = ActivationStream(language_model, hook, windows)
    manifest = write_activations(_told(stream, hook, tokens, progress), out, tokens=tokens, dtype=dtype, metadata=about)
    seconds = perf_counter() - started
    return {
        "out": str(out),
        "model": model,
        "hook": hook,
        "d_in": manifest.d_in[hook],
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
    """``config`` reading harvested activations; model, text and hook are those of the harvest."""
    about = read_manifest(folder).metadata
    if not {"model", "text", "hook", "context_length", "held_out_share"} <= about.keys():
        raise UserError(f"{folder} does not say which model and hook it holds. Harvest it with `kronsae harvest`.")
    return replace(
        config,
        activations=str(folder),
        model=from_dict(ModelConfig, about["model"], where="the manifest's model"),
        text=from_dict(TextConfig, about["text"], where="the manifest's text"),
        hook=about["hook"],
        context_length=about["context_length"],
        held_out_share=about["held_out_share"],
    )
