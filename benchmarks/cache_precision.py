"""Measure what the precision of stored activations costs in explained variance.

Activations of a model are harvested in float32 and rewritten in the other precisions. The same SAEs are trained on
each, with the same seeds and batches, and evaluated on the same held-out activations of the model, in float32.
``lost_variance`` is the share of the variance of the stored activations that rounding took. float16 changes them so
little that its differences show how far two trainings part that differ in their last bits.

    python benchmarks/cache_precision.py [--tokens 65536] [--out benchmarks/results/cache_precision.csv]
    python benchmarks/cache_precision.py --model smollm2 --text english.jsonl.gz --hook layers.15 --d-sae 4096 --k 32
        --lr 0.002 --tokens 32768 --seeds 3 --dtypes float16,int8 --context-length 128 --model-batch 8
        --out benchmarks/results/cache_precision_smollm2.csv
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

from kronsae.core.metrics import explained_variance, explained_variance_per_token
from kronsae.data.manifest import read_manifest
from kronsae.data.precision import PRECISIONS, token_bytes
from kronsae.data.store import write_activations
from kronsae.data.stored import HarvestedRows
from kronsae.runs.config import RunConfig
from kronsae.runs.harvest import harvest, with_activations
from kronsae.runs.parsing import RunOptions, parse_sae
from kronsae.runs.run import execute
from kronsae.support.files import write_csv
from kronsae.support.progress import progress_bar
from kronsae.support.provenance import provenance_columns

SAES = ("topk", "kron d_base=2 d_extension=4")
HELD_OUT_TOKENS = 16_384


def config_of(seed: int, arguments: argparse.Namespace) -> RunConfig:
    """Return the config of a run on the model, of which the folders take the place."""
    options = RunOptions(model=arguments.model, text=arguments.text, hook=arguments.hook)
    budget = {"tokens": arguments.epochs * arguments.tokens, "flops": None, "same_flops_as": None}
    settings = ["loop.batch_tokens=1024", "buffer_tokens=8192"]
    sizes = f"d_sae={arguments.d_sae} k={arguments.k}" + ("" if arguments.lr is None else f" lr={arguments.lr}")
    return options.run_config([parse_sae(f"{words} {sizes}", seed) for words in SAES], budget, seed, settings)


def main() -> None:
    """Print explained variances and their differences, and write them with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--text", default="bundled")
    parser.add_argument("--hook", default="layers.3")
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--lr", type=float, help="peak learning rate of the SAEs")
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--model-batch", type=int, default=32)
    parser.add_argument("--dtypes", default=",".join(PRECISIONS), help="after float32, with which they are compared")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    dtypes = ["float32", *(dtype for dtype in arguments.dtypes.split(",") if dtype != "float32")]
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        with progress_bar("harvesting") as progress:
            harvest(
                model=arguments.model,
                text=arguments.text,
                hook=arguments.hook,
                tokens=arguments.tokens,
                out=place / "float32",
                context_length=arguments.context_length,
                model_batch=arguments.model_batch,
                progress=progress,
            )
        exact = read_manifest(place / "float32")
        for dtype in dtypes[1:]:
            make = partial(HarvestedRows, place / "float32", repeat=False)
            about = {"d_in": exact.d_in, "tokens": exact.tokens, "metadata": exact.metadata}
            write_activations(make, place / dtype, dtype=dtype, **about)
        x_BD = None
        base: dict[tuple[str, int], float] = {}
        for dtype in dtypes:
            manifest = read_manifest(place / dtype)
            lost = sum(shard.tokens * (shard.lost_variance or {}).get(arguments.hook, 0.0) for shard in manifest.shards)
            for seed in range(arguments.seeds):
                config = with_activations(config_of(seed, arguments), place / dtype)
                run = execute(config, place / f"{dtype}-{seed}", show_progress=False)
                x_BD = run.activations(HELD_OUT_TOKENS) if x_BD is None else x_BD
                for sae in run.names:
                    x_hat_BD = run.load(sae)(x_BD)
                    ev = float(explained_variance(x_BD, x_hat_BD))
                    base.setdefault((sae, seed), ev)
                    row: dict[str, object] = {"dtype": dtype, "sae": sae, "explained_variance": round(ev, 6)}
                    per_token = float(explained_variance_per_token(x_BD, x_hat_BD, x_BD.mean(0)).mean())
                    row |= {"explained_variance_per_token": round(per_token, 6), "lr": arguments.lr}
                    row |= {"difference": round(ev - base[sae, seed], 6), "lost_variance": lost / manifest.tokens}
                    row |= {"bytes_per_token": token_bytes(manifest.d_in, dtype), "hook": arguments.hook}
                    row |= {"model": arguments.model, "text": Path(arguments.text).name}
                    row |= {"d_in": manifest.d_in[arguments.hook], "d_sae": arguments.d_sae, "k": arguments.k}
                    row |= {"tokens": arguments.tokens, "epochs": arguments.epochs}
                    rows.append(row | provenance_columns(seed))
                    print(f"{dtype:9s} {sae:5s} seed {seed}: EV {ev:.5f} ({ev - base[sae, seed]:+.5f})", flush=True)
    if arguments.out is not None:
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
