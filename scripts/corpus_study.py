"""Measure the bundled corpus without generated tables; write docs/results/corpus.json.

.venv/bin/python scripts/corpus_study.py [--seeds 0 1] [--tokens 200000] [--threads 1]

What is measured: how much of the standard library stays; the held-out loss of the bundled model with and without the
tables; and that of small models trained on either text with the same seed, steps and settings. Each small model has a
tokenizer of its own text, so that they are compared by bits per byte.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from kronsae import bundled
from kronsae.bundled.evaluate import Loss, held_out_documents
from kronsae.bundled.train import Run, Settings, encode, token_nats
from kronsae.data.corpus import Document, is_held_out, standard_library_documents
from kronsae.support.files import write_json
from kronsae.support.provenance import provenance

RESULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "corpus.json"
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


def main() -> None:
    """Count, measure the bundled model, train the pairs; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = replace(SMALL, tokens=arguments.tokens)
    kept: dict[str, Any] = {
        "provenance": provenance() | {"threads": arguments.threads},
        "library": counts(include_tests=False),
        "library_and_tests": counts(include_tests=True),
        "settings": asdict(settings),
        "pairs": [],
    }
    for seed in arguments.seeds:
        for include_tables in (True, False):
            kept["pairs"].append(trained_loss(replace(settings, seed=seed), include_tables))
            write_json(RESULT, kept)
            print(kept["pairs"][-1], flush=True)
    model = GPTNeoXForCausalLM.from_pretrained(bundled.path(), dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bundled.path())
    everything = [d for d in standard_library_documents(include_tables=True) if is_held_out(d.id)]
    kept["bundled_model"] = {
        "with_tables": loss(model, tokenizer, everything),
        "without_tables": loss(model, tokenizer, held_out_documents()),
    }
    write_json(RESULT, kept)


if __name__ == "__main__":
    main()
