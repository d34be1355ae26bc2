"""Evaluation of the bundled language model: its figures and its model card.

``python -m kronsae.bundled.evaluate --run DIR`` evaluates the model of a finished training run and publishes it with
``evaluation.json`` and a ``README.md`` generated from that file alone. Without ``--run`` it evaluates the published
model again and rewrites both files.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from kronsae import bundled
from kronsae.bundled.train import (
    EXPORT_FOLDER,
    TRAINING_FILE,
    Settings,
    encode,
    token_nats,
    training_documents,
)
from kronsae.data.corpus import Document, is_held_out, standard_library_documents
from kronsae.support.files import read_json, write_json, write_text
from kronsae.support.provenance import processor

EVALUATION_FILE = "evaluation.json"
CARD_FILE = "README.md"
SLICE_DOCUMENT_BYTES = (2_000, 12_000)
SLICE_DOCUMENTS = 4
TUNING_STRIDE = 20
PSEUDO_COUNTS = tuple(2.0**power for power in range(13))


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Prediction loss of one model on one text.

    Args:
        nats_per_token: Mean of ``-ln p(token | previous tokens)``.
        perplexity: ``exp(nats_per_token)``.
        bits_per_byte: ``sum of -log2 p / bytes of the text``; unlike the other two it does not depend on the
            tokenizer.
    """

    nats_per_token: float
    perplexity: float
    bits_per_byte: float

    @classmethod
    def of(cls, token_nats: Tensor, text_bytes: int) -> Loss:
        """Return the loss of a text from the losses of its tokens, in nats."""
        mean = token_nats.double().mean().item()
        bits = token_nats.double().sum().item() / math.log(2)
        return cls(nats_per_token=mean, perplexity=math.exp(mean), bits_per_byte=bits / text_bytes)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Losses of the language model and its baselines on the same tokens.

    Args:
        documents: Number of documents in the text.
        document_ids: Names of the documents, if there are few.
        text_bytes: Total number of UTF-8 bytes.
        tokens: Number of predicted tokens, including the end-of-text token after each document but the last.
        model: Loss of the language model.
        bigram: Loss of the interpolated bigram, see `Bigram`.
        unigram: Loss of the add-one unigram, see `Bigram`.
    """

    documents: int
    document_ids: list[str] | None
    text_bytes: int
    tokens: int
    model: Loss
    bigram: Loss
    unigram: Loss


class Bigram:
    """Count models of the training tokens: a unigram, and a bigram interpolated with it.

    ``p(b) = (c(b) + 1) / (sum c + V)`` and ``p(b | a) = (c(a, b) + m p(b)) / (c(a) + m)``, with the pseudo-count ``m``
    of the Dirichlet prior (MacKay and Peto, 1995).

    Args:
        streams: Token streams, each with its weight in the counts.
        vocab_size: Number of tokens ``V``.
        pseudo_count: Weight ``m`` of the prior.
    """

    def __init__(self, streams: Sequence[tuple[Tensor, int]], vocab_size: int, pseudo_count: float) -> None:
        pairs = torch.zeros(vocab_size * vocab_size)
        for stream, weight in streams:
            ids = stream.long()
            pairs += weight * torch.bincount(ids[:-1] * vocab_size + ids[1:], minlength=vocab_size**2)
        self.pairs = pairs.view(vocab_size, vocab_size)
        self.firsts = self.pairs.sum(dim=1)
        counts = self.pairs.sum(dim=0) + 1.0
        self.unigram = counts / counts.sum()
        self.pseudo_count = pseudo_count

    def unigram_nats(self, stream: Tensor) -> Tensor:
        """Return ``-ln p(b)`` for each token of a stream except the first."""
        return -self.unigram[stream[1:].long()].log()

    def bigram_nats(self, stream: Tensor) -> Tensor:
        """Return ``-ln p(b | a)`` for each token of a stream except the first."""
        first, second = stream[:-1].long(), stream[1:].long()
        seen = self.pairs[first, second] + self.pseudo_count * self.unigram[second]
        return -(seen / (self.firsts[first] + self.pseudo_count)).log()


def fit_bigram(
    tokenizer: PreTrainedTokenizerFast, library_weight: int, vocab_size: int, include_tables: bool = False
) -> Bigram:
    """Fit the baselines on one epoch of the training tokens, weighted as for the language model.

    The pseudo-count is the power of two that best predicts every 20th library document from the others. With it, the
    counts are taken over all documents.
    """
    library, tests = training_documents(include_tables)
    test_stream = encode(tokenizer, tests)
    tuning = encode(tokenizer, library[::TUNING_STRIDE])
    rest = encode(tokenizer, [d for index, d in enumerate(library) if index % TUNING_STRIDE != 0])
    trial = Bigram([(rest, library_weight), (test_stream, 1)], vocab_size, pseudo_count=1.0)
    losses: dict[float, float] = {}
    for pseudo_count in PSEUDO_COUNTS:
        trial.pseudo_count = pseudo_count
        losses[pseudo_count] = trial.bigram_nats(tuning).mean().item()
    best = min(losses, key=losses.__getitem__)
    return Bigram([(encode(tokenizer, library), library_weight), (test_stream, 1)], vocab_size, best)


def held_out_documents() -> list[Document]:
    """Return the library's held-out documents without tests, which not every machine has."""
    return [document for document in standard_library_documents() if is_held_out(document.id)]


def slice_documents(documents: Sequence[Document]) -> list[Document]:
    """Return a few held-out documents of medium length, for a check that takes seconds."""
    low, high = SLICE_DOCUMENT_BYTES
    middling = [document for document in documents if low <= len(document.text) <= high]
    return middling[:: max(1, len(middling) // SLICE_DOCUMENTS)][:SLICE_DOCUMENTS]


def compare(
    model: GPTNeoXForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    bigram: Bigram,
    documents: Sequence[Document],
    *,
    name_documents: bool,
) -> Comparison:
    """Measure the model and its baselines on the same documents."""
    stream = encode(tokenizer, documents)
    text_bytes = sum(len(document.text.encode("utf-8")) for document in documents)
    return Comparison(
        documents=len(documents),
        document_ids=[document.id for document in documents] if name_documents else None,
        text_bytes=text_bytes,
        tokens=len(stream) - 1,
        model=Loss.of(token_nats(model, stream, model.config.max_position_embeddings), text_bytes),
        bigram=Loss.of(bigram.bigram_nats(stream), text_bytes),
        unigram=Loss.of(bigram.unigram_nats(stream), text_bytes),
    )


def measure(
    folder: Path, library_weight: int = Settings.library_weight, include_tables: bool = False
) -> dict[str, Any]:
    """Return the held-out figures of the model in a folder, and what they were measured on.

    The split depends only on the documents' names, so the measurement can be repeated on any machine. The figures
    differ slightly between Python versions, because the library is the text.

    Args:
        folder: Folder with a model and its tokenizer.
        library_weight: Weight of the library in the baselines' counts; tests have weight 1.
        include_tables: Whether the baselines count generated tables too. Held-out text never has them.
    """
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    bigram = fit_bigram(tokenizer, library_weight, model.config.vocab_size, include_tables)
    documents = held_out_documents()
    chosen = slice_documents(documents)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(),
        "include_tables": False,
        "context": model.config.max_position_embeddings,
        "bigram_pseudo_count": bigram.pseudo_count,
        "held_out": asdict(compare(model, tokenizer, bigram, documents, name_documents=False)),
        "slice": asdict(compare(model, tokenizer, bigram, chosen, name_documents=True)),
    }


def card(figures: dict[str, Any]) -> str:
    """Return the model card; every number in it comes from ``figures`` (`EVALUATION_FILE`)."""
    training, evaluation = figures["training"], figures["evaluation"]
    settings, held_out = training["settings"], evaluation["held_out"]
    names = {"model": "this model", "bigram": "bigram", "unigram": "unigram"}
    rows = "\n".join(
        f"| {name} | {held_out[key]['nats_per_token']:.3f} | {held_out[key]['perplexity']:.1f} "
        f"| {held_out[key]['bits_per_byte']:.3f} |"
        for key, name in names.items()
    )
    epoch = settings["library_weight"] * training["library_tokens"] + training["test_tokens"]
    optimisers = [_describe(optimiser) for optimiser in training["optimisers"]]
    tables = "Generated tables are included." if training["include_tables"] else "Generated tables are left out."
    left_out = "tests" if evaluation["include_tables"] else "tests and generated tables"
    return f"""---
license: other
license_name: python-software-foundation-license
license_link: https://docs.python.org/3/license.html
language: [code]
library_name: transformers
pipeline_tag: text-generation
---

# The bundled language model of kronsae

A GPT-NeoX language model of {training["parameters"] / 1e6:.1f} million parameters, trained on Python source code.
It is part of the package, so that sparse autoencoders can be trained, measured and inspected without a download, an
account or a GPU.

<!-- Generated by `python -m kronsae.bundled.evaluate` from {EVALUATION_FILE}; do not edit by hand. -->

| | |
|---|---|
| layers | {settings["layers"]} |
| hidden size (`d_in` of a residual-stream SAE) | {settings["hidden_size"]} |
| attention heads | {settings["heads"]} |
| MLP width | {settings["intermediate_size"]} |
| vocabulary (byte-level BPE) | {settings["vocab_size"]} |
| longest context | {settings["max_positions"]} tokens |
| weights | float16, input and output embeddings tied |

## Use

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from kronsae import bundled

model = AutoModelForCausalLM.from_pretrained(bundled.path(), dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(bundled.path())
```

`<|endoftext|>` begins, ends and separates documents; padding has its own token, `<|pad|>`. The tokenizer adds neither
automatically.

## Training

- Text: the sources of Python {training["python"]}'s standard library, tests included: {training["library_tokens"]:,}
  tokens of library and {training["test_tokens"]:,} of tests. Each epoch contains the library
  {settings["library_weight"]} times. About one document in twenty is held out, chosen by a hash of its name
  (`kronsae.data.corpus.is_held_out`). {tables} The tokenizer was trained on the training documents.
- Seed {settings["seed"]}; {training["tokens_seen"]:,} tokens ({training["tokens_seen"] / epoch:.2f} epochs) in
  {training["steps"]:,} steps of {settings["batch_tokens"]:,} tokens. Windows have {settings["context"]} tokens, and
  {settings["max_positions"]} for the last {settings["long_share"]:.0%} of the tokens.
- Optimisers: {optimisers[0]} for the matrices inside the blocks; {optimisers[1]} for the rest.
- The learning rates are peak values: linear warm-up over {settings["warmup_tokens"]:,} tokens, linear decay to zero
  over the last {settings["decay_share"]:.0%}.
- Machine: {training["processor"]}, threads: {training["threads"]}, no GPU; PyTorch {training["torch"]},
  transformers {training["transformers"]}; {training["date"]}.

To train it again: `python -m kronsae.bundled.train --out DIR --seed {settings["seed"]} --tokens {settings["tokens"]}`
(with `--compile` for faster steps). Another machine or number of threads rounds differently: the losses will agree,
but not every bit of the weights.

## Figures

On the {held_out["documents"]} held-out documents of the standard library without its {left_out}
({held_out["tokens"]:,} tokens, {held_out["text_bytes"]:,} bytes, Python {evaluation["python"]}), in windows of
{evaluation["context"]} tokens:

| | nats per token | perplexity | bits per byte |
|---|---|---|---|
{rows}

The baselines are fitted on one whole epoch of the training text: an add-one unigram, and a bigram interpolated with it
by a Dirichlet prior (pseudo-count {evaluation["bigram_pseudo_count"]:g}, tuned on a slice of the training text).
The sources of another Python version give slightly different figures.

## Intended use and limits

For demos, examples and tests of kronsae. It is far too small, and trained on far too little text, to write code or to
draw conclusions about language models in general. It may repeat passages of its training text.

## Licence of the data

The training text is the Python standard library, under the
[PSF licence](https://docs.python.org/3/license.html); some of its modules carry their own notices. No other text
was used.
"""


def _describe(optimiser: dict[str, Any]) -> str:
    """Return ``name (setting value, ...)``, without switches that are off."""
    switched = {key: value for key, value in optimiser.items() if key != "name" and value is not False}
    return f"{optimiser['name']} (" + ", ".join(f"{key} {value}" for key, value in switched.items()) + ")"


def publish(run: Path | None, folder: Path) -> None:
    """Copy a run's model to a folder, measure it there, and write the figures and the model card.

    Args:
        run: Folder of the training run; None to measure the model that ``folder`` already holds.
        folder: Folder of the published model.
    """
    if run is None:
        training = read_json(folder / EVALUATION_FILE, "The published model's figures")["training"]
    else:
        training = read_json(run / TRAINING_FILE, "The training run's record")
        shutil.copytree(run / EXPORT_FOLDER, folder, dirs_exist_ok=True)
    evaluation = measure(folder, training["settings"]["library_weight"], training["include_tables"])
    figures = {"training": training, "evaluation": evaluation}
    write_json(folder / EVALUATION_FILE, figures)
    write_text(folder / CARD_FILE, card(figures))


def main() -> None:
    """Read the folders from the command line and publish the model."""
    parser = argparse.ArgumentParser(description="Publish the model of a training run with its figures.")
    parser.add_argument("--run", type=Path, help="folder of the training run; without it, the model in --to")
    parser.add_argument("--to", type=Path, default=bundled.path(), help="folder of the published model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    publish(arguments.run, arguments.to)


if __name__ == "__main__":
    main()
