"""Measure how much faster a training on stored activations is than one that runs the language model.

TopK and KronSAE are trained side by side, in turn on the model and on a folder of the same activations. The time is
that of the whole training, with loading the model or opening the folder, and without evaluation.

    python benchmarks/cached_training.py --model smollm2 --text english.jsonl [--rounds 3]
        [--out benchmarks/results/cached_training.csv]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import torch

from kronsae.bench.measure import Timing
from kronsae.runs.config import RunConfig
from kronsae.runs.harvest import harvest, with_activations
from kronsae.runs.parsing import RunOptions, parse_sae
from kronsae.runs.run import execute
from kronsae.support.files import write_csv
from kronsae.support.progress import progress_bar
from kronsae.support.provenance import provenance_columns

SAES = ("topk d_sae=4096 k=32", "kron d_sae=4096 d_base=2 d_extension=4 k=32")


def config_of(arguments: argparse.Namespace) -> RunConfig:
    """Return the config of a training on the model."""
    options = RunOptions(model=arguments.model, text=arguments.text, hook=arguments.hook)
    budget = {"tokens": arguments.tokens, "flops": None, "same_flops_as": None}
    settings = ["loop.batch_tokens=1024", "buffer_tokens=8192", "window_pool_tokens=16384"]
    settings += ["context_length=128", "model_batch=8"]
    return options.run_config([parse_sae(words, 0) for words in SAES], budget, 0, settings)


def main() -> None:
    """Print the times and their ratio, and write them with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--text", default="bundled")
    parser.add_argument("--hook", default="layers.15")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = config_of(arguments)
    times: dict[str, list[float]] = {"model": [], "stored": []}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        with progress_bar("harvesting") as progress:
            harvest(
                model=config.model,
                text=config.text,
                hook=arguments.hook,
                tokens=arguments.tokens,
                out=place / "activations",
                dtype="bfloat16",
                context_length=128,
                model_batch=8,
                window_pool_tokens=16_384,
                progress=progress,
            )
        stored = with_activations(config, place / "activations")
        for turn in range(arguments.rounds):
            for kind, one in (("model", config), ("stored", stored)):
                started = perf_counter()
                execute(one, place / f"{kind}-{turn}", show_progress=False)
                times[kind].append(perf_counter() - started)
                print(f"{kind}: {arguments.tokens / times[kind][-1]:,.0f} tokens/s", flush=True)
    ratio = Timing.of([live / read for live, read in zip(times["model"], times["stored"], strict=True)])
    row: dict[str, object] = {"model": arguments.model, "hook": arguments.hook, "tokens": arguments.tokens}
    row |= {"saes": len(SAES), "d_sae": 4096, "k": 32, "rounds": arguments.rounds, "threads": torch.get_num_threads()}
    for kind, seconds in times.items():
        row[f"{kind}_tokens_per_second"] = round(arguments.tokens / Timing.of(seconds).median_ms, 1)
    row |= {"ratio": round(ratio.median_ms, 2), "low_ratio": round(ratio.low_ms, 2)}
    row |= {"high_ratio": round(ratio.high_ms, 2)} | provenance_columns(0)
    print(f"{ratio.median_ms:.1f} times as fast (quartiles {ratio.low_ms:.1f} to {ratio.high_ms:.1f})")
    if arguments.out is not None:
        write_csv(arguments.out, [row])


if __name__ == "__main__":
    main()
