"""Measure the language model's pass: how its windows are divided, and alternatives of its computation.

Each round reads one batch of real windows with every variant in turn. What counts is the processor time of one thread,
which other load of the machine changes little. ``ratio`` is the speed relative to the whole batch at once, per round.
The variants other than the division (attention, compilation, precision) divide as kronsae does, and are measured where
a batch has at most ``ALTERNATIVES_TOKENS`` tokens. Every batch is read once beforehand; ``first_seconds`` is the time
of that beyond a second reading, which is that of compiling.

    python benchmarks/model_pass.py --model smollm2 --text english.jsonl.gz --hook layers.15 [--rounds 5]
        [--out benchmarks/results/model_pass_smollm2.csv]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter, process_time

import torch
from torch import nn

from kronsae.bench.measure import Timing
from kronsae.data.harvest import hidden_states
from kronsae.data.model import LanguageModel, ModelConfig, load_model, resolve_hook
from kronsae.data.passes import CPU_FIXED_TOKENS, CPU_TOKENS
from kronsae.data.text import TextConfig, TextStream
from kronsae.data.tokens import TokenBatch, TokenStream
from kronsae.support.files import write_csv
from kronsae.support.provenance import provenance_columns

SHAPES = ((128, 8), (256, 32), (512, 16))
"""Tokens of a window, and windows of a batch."""

ALTERNATIVES_TOKENS = 1024
NO_DIVISION = 10**9
"""Tokens that no batch reaches."""

BEFORE, AFTER = "whole batch", "divided"


def loaded(arguments: argparse.Namespace, most: int, fixed: int, *, dtype: str = "float32") -> LanguageModel:
    """Return a model of its own, with the size of its passes."""
    language_model = load_model(ModelConfig(name=arguments.model, dtype=dtype, device="cpu"))
    language_model.pass_size.most_tokens, language_model.pass_size.fixed_tokens = most, fixed
    return language_model


def with_attention(language_model: LanguageModel, name: str) -> LanguageModel:
    """Return the model, now with another implementation of attention."""
    language_model.model.set_attn_implementation(name)
    return language_model


def compiled(language_model: LanguageModel, hook: str) -> LanguageModel:
    """Return the model, whose blocks `torch.compile` compiles for any size."""
    path = resolve_hook(language_model.model, hook).path.rpartition(".")[0]
    for block in language_model.model.get_submodule(path).children():
        nn.Module.compile(block, dynamic=True)
    return language_model


def variants(arguments: argparse.Namespace) -> dict[str, Callable[[], LanguageModel]]:
    """Return the models by the variant's name; the names of alternatives begin with ``divided,``."""
    own = partial(loaded, arguments, CPU_TOKENS, CPU_FIXED_TOKENS)
    return {
        BEFORE: partial(loaded, arguments, NO_DIVISION, NO_DIVISION),
        "by length": partial(loaded, arguments, NO_DIVISION, CPU_FIXED_TOKENS),
        "by number of tokens": partial(loaded, arguments, CPU_TOKENS, NO_DIVISION),
        AFTER: own,
        f"{AFTER}, eager attention": lambda: with_attention(own(), "eager"),
        f"{AFTER}, flex attention": lambda: with_attention(own(), "flex_attention"),
        f"{AFTER}, torch.compile": lambda: compiled(own(), arguments.hook),
        f"{AFTER}, bfloat16": lambda: own(dtype="bfloat16"),
    }


def seconds(language_model: LanguageModel, hook: str, batch: TokenBatch) -> tuple[float, float]:
    """Read a batch; return the processor time, and the time."""
    started, busy = perf_counter(), process_time()
    hidden_states(language_model, hook, batch)
    return process_time() - busy, perf_counter() - started


def main() -> None:
    """Print the speeds and their ratios, and write them with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--text", default="bundled")
    parser.add_argument("--hook", default="layers.3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make = variants(arguments)
    models = {name: make[name]() for name in make if "," not in name}
    rows: list[dict[str, object]] = []
    for context_length, windows in SHAPES:
        alternatives = context_length * windows <= ALTERNATIVES_TOKENS
        shown = models | ({name: make[name]() for name in make if "," in name} if alternatives else {})
        stream = TokenStream(
            partial(TextStream, TextConfig(source=arguments.text)),
            models[BEFORE].tokenizer,
            context_length=context_length,
            batch_sequences=windows,
            pool_tokens=2**17,
        )
        batches = [batch for batch, _ in islice(stream, arguments.rounds)]
        first = dict.fromkeys(shown, 0.0)
        if alternatives:
            for name, language_model in shown.items():
                first[name] = sum(seconds(language_model, arguments.hook, batch)[1] for batch in batches)
        busy: dict[str, list[float]] = {name: [] for name in shown}
        elapsed: dict[str, list[float]] = {name: [] for name in shown}
        for batch in batches:
            for name, language_model in shown.items():
                used, taken = seconds(language_model, arguments.hook, batch)
                busy[name].append(used)
                elapsed[name].append(taken)
        padding = 1 - sum(batch.num_kept for batch in batches) / sum(batch.input_ids_ST.numel() for batch in batches)
        for name in shown:
            ratio = Timing.of([one / own for one, own in zip(busy[BEFORE], busy[name], strict=True)])
            speed = Timing.of([batch.num_kept / used for batch, used in zip(batches, busy[name], strict=True)])
            row: dict[str, object] = {"model": arguments.model, "hook": arguments.hook, "variant": name}
            row |= {"context_length": context_length, "windows": windows, "rounds": arguments.rounds}
            row |= {"padding": round(padding, 4), "tokens_per_second": round(speed.median_ms, 1)}
            row |= {"ratio": round(ratio.median_ms, 3), "low_ratio": round(ratio.low_ms, 3)}
            row |= {"high_ratio": round(ratio.high_ms, 3)}
            row |= {"first_seconds": round(max(0.0, first[name] - sum(elapsed[name])), 1) if alternatives else ""}
            rows.append(row | {"text": Path(arguments.text).name} | provenance_columns(0))
            print(
                f"{windows} x {context_length} {name:26s} {speed.median_ms:8,.0f} tokens/s, ratio "
                f"{ratio.median_ms:.3f} ({ratio.low_ms:.3f} to {ratio.high_ms:.3f})",
                flush=True,
            )
    if arguments.out is not None:
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
