"""Compare the cost of training eight SAEs together with the sum of its parts.

SAEs that are trained together share one forward pass of the model. The cost may be at most 1.25 times the sum of the
parts: training each SAE alone on existing activations, and harvesting the same number of tokens once. All parts are
measured in one process and alternate within each round, so that drift of the machine's speed affects all of them
equally. The ratio is computed per round.

    python benchmarks/group_cost.py [--rounds 7] [--out benchmarks/results/group_cost.csv]
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter

import torch

from kronsae.bench.measure import Timing
from kronsae.data.buffer import ActivationRows, Activations
from kronsae.data.harvest import ActivationStream
from kronsae.data.model import ModelConfig
from kronsae.data.shuffle import BlockReader
from kronsae.data.stream import State
from kronsae.data.text import TextConfig
from kronsae.runs.config import RunConfig
from kronsae.runs.parsing import parse_sae
from kronsae.runs.pipeline import Source
from kronsae.support.files import write_csv
from kronsae.support.provenance import provenance_columns
from kronsae.training.config import LoopConfig
from kronsae.training.member import Member
from kronsae.training.trainer import fit

LIMIT = 1.25
CONTEXT = 256  # tokens in a window
Block = list[tuple[Activations, State]]


def group(heads: int) -> list[str]:
    """Return the ``--sae`` strings of eight SAEs of equal size: four sparsifiers and losses, two encoders."""
    dense, kron = f"d_sae={8 * heads} k=32", f"num_heads={heads} d_base=2 d_extension=4 k=32"
    words = [f"topk {dense}", f"kron {kron}"]
    for kind in ("batch_topk", "matryoshka", "switch"):
        words += [f"{kind} {dense} name={kind}", f"{kind} {kron} name={kind}-kron"]
    return words


def parts(config: RunConfig) -> dict[str, Callable[[], object]]:
    """Return functions that process one block of tokens: the group, the model's forward pass, and each SAE alone."""
    source = Source(config)

    def members() -> list[Member]:
        steps = config.loop.steps  # of one block; each call repeats the schedule, which does not affect the cost
        return [Member(member, source.widths, config.hook, steps, source.device) for member in config.saes]

    def train(some: list[Member], batches: Iterator[tuple[Activations, State]]) -> None:
        fit(some, batches, config.loop)

    def of_group(whole: list[Member], stream: Iterator[tuple[Activations, State]]) -> None:
        train(whole, islice(stream, config.loop.steps))

    block: Block = list(islice(source.batches(None), config.loop.steps))
    make_activations = partial(ActivationStream, source.language_model, config.hooks, source.tokens(held_out=False))
    reader = BlockReader(make_activations, ActivationRows(config.buffer_tokens))
    found: dict[str, Callable[[], object]] = {
        "group": partial(of_group, members(), iter(source.batches(None))),
        "model pass": partial(reader.read, torch.arange(config.buffer_tokens)),
    }
    for member in members():
        found[member.name] = partial(lambda one: train([one], iter(block)), member)
    return found


def measure(contestants: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Return the milliseconds of each part in each round, without the first ``warmup`` rounds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    gc.disable()
    for turn in range(warmup + rounds):
        for name, call in contestants.items():
            started = perf_counter()
            call()
            if turn >= warmup:
                times[name].append(1000 * (perf_counter() - started))
        gc.collect()
    gc.enable()
    return times


def main() -> int:
    """Print the cost of each part and the ratio; return 1 if the median ratio exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--hook", default="layers.3")
    parser.add_argument("--heads", type=int, default=512, help="heads of two bases and four extensions")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8, help="steps in a block")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    block = arguments.steps * arguments.batch
    config = RunConfig(
        model=ModelConfig(name=arguments.model),
        text=TextConfig(source="bundled"),
        hook=arguments.hook,
        saes=tuple(parse_sae(words) for words in group(arguments.heads)),
        loop=LoopConfig(tokens=block, batch_tokens=arguments.batch),
        buffer_tokens=block,
        # several forward passes in a block, so that every round includes the same number of them
        model_batch=min(32, max(1, block // (8 * CONTEXT))),
        context_length=CONTEXT,
    )
    times = measure(parts(config), arguments.rounds)
    alone = [sum(times[name][turn] for name in times if name != "group") for turn in range(arguments.rounds)]
    ratios = [whole / sum_of_parts for whole, sum_of_parts in zip(times["group"], alone, strict=True)]
    shape = {
        "model": arguments.model,
        "hook": arguments.hook,
        "d_in": sum(Source(config).widths.values()),
        "d_sae": 8 * arguments.heads,
        "tokens": block,
        "batch": arguments.batch,
    }
    rows: list[dict[str, object]] = []
    for name, values in {**times, "sum of the parts": alone, "group / sum of the parts": ratios}.items():
        timing, unit = Timing.of(values), "ratio" if values is ratios else "ms"
        figures = (timing.median_ms, timing.low_ms, timing.high_ms)
        median, low, high = (round(figure, 4 if unit == "ratio" else 2) for figure in figures)
        rows.append(
            {"part": name, "median": median, "quartile_1": low, "quartile_3": high, "unit": unit}
            | {"rounds": timing.rounds, **shape, **provenance_columns(0)}
        )
        print(f"{name:26s} {median:10,.2f} {unit}  ({low:,.2f} to {high:,.2f})")
    if arguments.out is not None:
        write_csv(arguments.out, rows)
    return int(Timing.of(ratios).median_ms > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
