"""Measure the bundled corpus without generated tables; write docs/results/corpus.json and its table.

.venv/bin/python scripts/corpus_study.py [--seeds 0 1] [--tokens 200000] [--threads 1] [--table-only]

What is measured: how much of the standard library remains, and the held-out loss of small models trained on either text
with the same seed, number of steps and settings. Each has a tokenizer of its own text, so they are compared by bits per
byte. The bundled model's own figures are those of its card (`python -m kronsae.bundled.evaluate`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from kronsae.bundled.evaluate import Loss, held_out_documents
from kronsae.bundled.train import Run, Settings, encode, token_nats
from kronsae.data.corpus import Document, is_held_out, standard_library_documents
from kronsae.support.files import write_json, write_marked
from kronsae.support.provenance import provenance

RESULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "corpus.json"
PAGE = RESULT.parent / "README.md"
START, END = "<!-- results:corpus -->", "<!-- /results -->"
SMALL = Settings(
    hidden_size=128, layers=2, intermediate_size=480, max_positions=256, batch_tokens=2048, warmup_tokens=20_000
)


def counts(include_tests: bool) -> dict[str, dict[str, int]]:
    """Documents and characters of the corpus with the tables and without."""
    found = {}
    for name, include_tables in (("with_tables", True), ("without_tables", False)):
        documents = list(standard_library_documents(include_tests, include_tables))
        found[name] = {
            "documents": len(documents),
            "characters": sum(len(document.text) for document in documents),
            "held_out_documents": sum(is_held_out(document.id) for document in documents),
        }
    return found


def loss(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> dict[str, Any]:
    """The model's loss on documents, in windows of its longest context."""
    text_bytes = sum(len(document.text.encode("utf-8")) for document in documents)
    nats = token_nats(model, encode(tokenizer, documents), model.config.max_position_embeddings)
    return {
        "documents": len(documents),
        "text_bytes": text_bytes,
        "tokens": len(nats),
        **asdict(Loss.of(nats, text_bytes)),
    }


def trained_loss(settings: Settings, include_tables: bool) -> dict[str, Any]:
    """Train a small model; its loss on the held-out documents without tables."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(settings, Path(folder), include_tables=include_tables)
        started = perf_counter()
        train_losses = [value for _, value in run.losses(compiled=False)]
        return {
            "seed": settings.seed,
            "include_tables": include_tables,
            "seconds": perf_counter() - started,
            "steps": run.step,
            "training_tokens_available": len(run.library) * settings.library_weight + len(run.tests),
            "last_training_loss": sum(train_losses[-10:]) / len(train_losses[-10:]),
            "held_out": loss(run.model, run.tokenizer, held_out_documents()),
        }


def markdown(kept: dict[str, Any]) -> str:
    """Return the table of the pairs, and what they were measured on."""
    by_seed: dict[int, dict[bool, float]] = {}
    for row in kept["pairs"]:
        by_seed.setdefault(row["seed"], {})[row["include_tables"]] = row["held_out"]["bits_per_byte"]
    lines = ["| seed | trained with tables | without tables | difference |", "|---|---|---|---|"]
    for seed, bits in by_seed.items():
        difference = f"{bits[False] / bits[True] - 1:+.1%}".replace("-", "−")
        lines.append(f"| {seed} | {bits[True]:.3f} | {bits[False]:.3f} | {difference} |")
    before, after = kept["library"]["with_tables"], kept["library"]["without_tables"]
    about, first = kept["provenance"], kept["pairs"][0]
    lines += [
        "",
        f"Bits per byte on the {first['held_out']['documents']} held-out documents without tables, after "
        f"{first['steps']} steps of {kept['settings']['batch_tokens']:,} tokens. In Python {about['python']}, "
        f"{after['documents']} of {before['documents']} documents and {after['characters'] / before['characters']:.0%} "
        f"of the characters remain. On {about['threads']} core(s) of {about['processor']}, commit "
        f"{about['commit']} ([all figures](corpus.json); again by `python scripts/corpus_study.py`).",
    ]
    return "\n".join(lines)


def measure(seeds: list[int], tokens: int, threads: int) -> None:
    """Count, then train the pairs; the file is written after each."""
    torch.set_num_threads(threads)
    settings = replace(SMALL, tokens=tokens)
    kept: dict[str, Any] = {
        "provenance": provenance() | {"threads": threads},
        "library": counts(include_tests=False),
        "library_and_tests": counts(include_tests=True),
        "settings": asdict(settings),
        "pairs": [],
    }
    for seed in seeds:
        for include_tables in (True, False):
            kept["pairs"].append(trained_loss(replace(settings, seed=seed), include_tables))
            write_json(RESULT, kept)
            print(kept["pairs"][-1], flush=True)


def main() -> None:
    """Measure, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table-only", action="store_true", help="only write the table from the result file")
    arguments = parser.parse_args()
    if not arguments.table_only:
        measure(arguments.seeds, arguments.tokens, arguments.threads)
    write_marked(PAGE, START, END, markdown(json.loads(RESULT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
