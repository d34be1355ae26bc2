"""Train the bundled language model: ``python -m kronsae.bundled.train --out DIR --tokens N``.

A byte-level BPE tokenizer and a GPT-NeoX causal language model, trained on the sources of the
running interpreter's standard library (tests included where they are installed), less the held-out
documents. The whole run is a function of the settings: the learning rate follows the tokens seen,
never the clock, and a run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from kronsae.data.corpus import Document, is_held_out, standard_library_documents
from kronsae.support.files import atomic_path, write_json
from kronsae.support.provenance import processor

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
STATE_FILE = "state.safetensors"
LOG_FILE = "log.jsonl"
STATE_KEY = "kronsae.bundled.train"
TRAINING_FILE = "training.json"
EXPORT_FOLDER = "model"
MONITOR_WINDOWS = 40
"""Held-out windows behind the loss in the log: enough to see a run go wrong, few enough to be quick."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a run depends on, besides the Python installation that it reads.

    Args:
        seed: Seed of the weights and of the order of the text.
        tokens: Training tokens in all; the learning rate reaches zero at the last one.
        vocab_size: Entries of the tokenizer, the two special ones included.
        hidden_size: Width of the residual stream.
        layers: Transformer blocks.
        heads: Attention heads in each block.
        intermediate_size: Width inside each MLP.
        max_positions: Longest context that the model takes, in tokens.
        context: Window for the first part of training, in tokens.
        long_share: Last share of the tokens, trained on windows of ``max_positions``.
        batch_tokens: Tokens per optimiser step.
        library_weight: How often an epoch sees the library for each time that it sees the tests.
        muon_learning_rate: Peak rate of Muon (block matrices), scaled to match AdamW's RMS.
        adamw_learning_rate: Peak rate of AdamW (embeddings, biases, norms).
        weight_decay: Decoupled decay of the block matrices.
        warmup_tokens: Tokens over which the learning rate rises from zero.
        decay_share: Last share of the tokens, over which the learning rate falls to zero.
    """

    seed: int = 0
    tokens: int = 5_000_000
    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 6
    heads: int = 4
    intermediate_size: int = 960
    max_positions: int = 512
    context: int = 256
    long_share: float = 0.1
    batch_tokens: int = 4096
    library_weight: int = 2
    muon_learning_rate: float = 0.005
    adamw_learning_rate: float = 0.003
    weight_decay: float = 0.05
    warmup_tokens: int = 200_000
    decay_share: float = 0.5

    def __post_init__(self) -> None:
        for name, length in (("context", self.context), ("max_positions", self.max_positions)):
            if self.batch_tokens % length != 0:
                raise ValueError(
                    f"batch_tokens must be a multiple of {name}; got {self.batch_tokens} and "
                    f"{length}. Choose batch_tokens = n * {length}."
                )
        if not 0 <= self.warmup_tokens < self.tokens:
            raise ValueError(
                f"warmup_tokens must lie between 0 and tokens; got {self.warmup_tokens} and "
                f"{self.tokens}. Lower warmup_tokens."
            )


def training_documents(include_tables: bool = False) -> tuple[list[Document], list[Document]]:
    """Return the library's and the tests' documents that may be trained on, without generated tables by default."""
    library_ids = {document.id for document in standard_library_documents(include_tables=include_tables)}
    documents = standard_library_documents(include_tests=True, include_tables=include_tables)
    kept = [document for document in documents if not is_held_out(document.id)]
    library = [document for document in kept if document.id in library_ids]
    tests = [document for document in kept if document.id not in library_ids]
    return library, tests


def train_tokenizer(documents: Iterable[Document], vocab_size: int, max_positions: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: no unknown token, and decoding gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=max_positions,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document]) -> Tensor:
    """Return all documents as one stream of tokens, each led by the end-of-text token."""
    ids: list[int] = []
    for document in documents:
        ids.append(tokenizer.eos_token_id)
        # The tokenizer proper: the wrapper would warn of texts longer than the context.
        ids.extend(tokenizer.backend_tokenizer.encode(document.text).ids)
    return torch.tensor(ids, dtype=torch.int32)


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> GPTNeoXForCausalLM:
    """Return the untrained model; its weights are a function of ``settings.seed``."""
    torch.manual_seed(settings.seed)
    config = GPTNeoXConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return GPTNeoXForCausalLM(config)


def optimisers(model: torch.nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside_block = ".layers." in name and parameter.ndim == 2
        (matrices if inside_block else rest).append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=settings.muon_learning_rate,
        weight_decay=settings.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(rest, lr=settings.adamw_learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def learning_rate_factor(seen: int, settings: Settings) -> float:
    """Return the share of the peak learning rate after ``seen`` tokens.

    Rises in a line over the warm-up, stays, then falls in a line to zero at ``settings.tokens``.
    Until the fall begins it does not depend on ``settings.tokens``, so that a run may still be
    made longer or shorter and equals one that had that length from the start.
    """
    rise = seen / settings.warmup_tokens if settings.warmup_tokens > 0 else 1.0
    fall = (settings.tokens - seen) / (settings.decay_share * settings.tokens)
    return max(0.0, min(1.0, rise, fall))


def batch_at(step: int, library: Tensor, tests: Tensor, settings: Settings) -> Tensor:
    """Return the batch of a step, ``[batch, length + 1]``: inputs and, one further, targets.

    Streams are cut into windows of ``max_positions`` at an offset that each epoch draws anew, in an
    order that it draws anew; a shorter context cuts the same windows further. A function of the
    step and the seed alone, so that an interrupted run goes on with the batch that was next.
    """
    per_batch = settings.batch_tokens // settings.max_positions
    span = settings.max_positions
    streams = [library] * settings.library_weight + [tests]
    # The offset (< span) and the last target are left free in each stream.
    counts = [max(0, (len(stream) - 1) // span - 1) for stream in streams]
    batches = sum(counts) // per_batch
    epoch, place = divmod(step, batches)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    offsets = torch.randint(span, (len(streams),), generator=generator).tolist()
    starts = [
        (stream, offset + span * index)
        for stream, offset, count in zip(range(len(streams)), offsets, counts, strict=True)
        for index in range(count)
    ]
    order = torch.randperm(len(starts), generator=generator)
    length = context_at(step * settings.batch_tokens, settings)
    rows = []
    for index in order[place * per_batch : (place + 1) * per_batch].tolist():
        stream, start = starts[index]
        for shift in range(0, span, length):
            rows.append(streams[stream][start + shift : start + shift + length + 1])
    return torch.stack(rows).long()


def context_at(seen: int, settings: Settings) -> int:
    """Return the window in tokens after ``seen`` tokens: short first, long at the end."""
    short = seen < (1.0 - settings.long_share) * settings.tokens
    return settings.context if short else settings.max_positions


def export(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in float16 and its tokenizer, as ``from_pretrained`` expects them."""
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a class name that 4 does not know; both know this one.
    config = folder / "tokenizer_config.json"
    write_json(config, json.loads(config.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"})
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files for the owner alone; a package is for everyone


@torch.no_grad()
def token_nats(model: GPTNeoXForCausalLM, stream: Tensor, length: int) -> Tensor:
    """Return the model's loss for each token of a stream but the first, in nats: ``[len(stream) - 1]``.

    The stream is cut into windows of ``length`` tokens; within one, each token is predicted from those
    before it.
    """
    was_training = model.training
    model.train(False)
    losses = []
    for start in range(0, len(stream) - 1, length):
        window = stream[start : start + length + 1].long()
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits, window[1:], reduction="none"))
    model.train(was_training)
    return torch.cat(losses)


class Run:
    """A training run in a folder: what it has learned so far, and how it goes on.

    Args:
        settings: What to train.
        out: Folder for the checkpoint, the log and the exported model.
        include_tables: Train on generated tables too, as the first release of the model did.
    """

    def __init__(self, settings: Settings, out: Path, *, include_tables: bool = False) -> None:
        self.settings = settings
        self.out = out
        self.include_tables = include_tables
        out.mkdir(parents=True, exist_ok=True)
        library, tests = training_documents(include_tables)
        self.tokenizer = train_tokenizer([*library, *tests], settings.vocab_size, settings.max_positions)
        self.library = encode(self.tokenizer, library)
        self.tests = encode(self.tokenizer, tests)
        self.held_out = encode(self.tokenizer, (d for d in standard_library_documents() if is_held_out(d.id)))
        self.model = build_model(settings, self.tokenizer)
        self.optimisers = optimisers(self.model, settings)
        self.step = 0
        self._resume()

    def _resume(self) -> None:
        state_file = self.out / STATE_FILE
        if not state_file.exists():
            return
        with safe_open(state_file, framework="pt") as file:
            described = json.loads(file.metadata()[STATE_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        self.step = int(described["step"])
        self._check_same_run(Settings(**described["settings"]))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model/{name}"])
        for place, optimiser in enumerate(self.optimisers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                owner, _, rest = name.partition("/")
                if owner == f"optimiser{place}":
                    parameter_index, _, key = rest.partition("/")
                    state.setdefault(int(parameter_index), {})[key] = tensor
            optimiser.load_state_dict(optimiser.state_dict() | {"state": state})

    def _check_same_run(self, before: Settings) -> None:
        """Refuse settings under which the steps taken would have been other ones."""
        seen = self.step * self.settings.batch_tokens
        tail = max(self.settings.decay_share, self.settings.long_share)
        same = replace(before, tokens=self.settings.tokens) == self.settings
        undecayed = all(seen <= (1.0 - tail) * s.tokens for s in (before, self.settings))
        if not same or (before.tokens != self.settings.tokens and not undecayed):
            raise ValueError(
                f"settings must equal those of the checkpoint in {self.out} (tokens may change "
                f"until the decay begins); got {self.settings}, there {before}. "
                "Repeat them, or give another --out."
            )

    def save(self) -> None:
        """Write the checkpoint and export the model; a run killed meanwhile loses neither."""
        tensors = {f"model/{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        for place, optimiser in enumerate(self.optimisers):
            for index, entries in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser{place}/{index}/{key}": value for key, value in entries.items()}
        described = json.dumps({"step": self.step, "settings": asdict(self.settings)})
        with atomic_path(self.out / STATE_FILE) as partial:
            save_file(tensors, partial, metadata={STATE_KEY: described})
        export(self.model, self.tokenizer, self.out / EXPORT_FOLDER)
        write_json(self.out / TRAINING_FILE, self.provenance())

    def held_out_loss(self) -> float:
        """Return the loss on the first held-out windows, in nats per token; a glance, not the published figure."""
        length = self.settings.context
        return token_nats(self.model, self.held_out[: MONITOR_WINDOWS * length + 1], length).mean().item()

    def provenance(self) -> dict[str, Any]:
        """Return what the run depends on and what it has read so far, ready for JSON."""
        return {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "parameters": self.model.num_parameters(),
            "steps": self.step,
            "tokens_seen": self.step * self.settings.batch_tokens,
            "include_tables": self.include_tables,
            "library_tokens": len(self.library),
            "test_tokens": len(self.tests),
            "settings": asdict(self.settings),
            "optimisers": [
                {"name": type(optimiser).__name__} | _plain(optimiser.defaults) for optimiser in self.optimisers
            ],
        }

    def window_loss(self, window: Tensor) -> Tensor:
        """Return the mean loss in nats per token of windows ``[batch, length + 1]``."""
        logits = self.model(input_ids=window[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())

    def losses(self, compiled: bool) -> Iterator[tuple[int, float]]:
        """Train to the end; yield the step and its training loss in nats per token."""
        settings = self.settings
        window_loss = torch.compile(self.window_loss, dynamic=False) if compiled else self.window_loss
        last = settings.tokens // settings.batch_tokens
        self.model.train()
        while self.step < last:
            window = batch_at(self.step, self.library, self.tests, settings)
            loss = window_loss(window)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            factor = learning_rate_factor((self.step + 1) * settings.batch_tokens, settings)
            peaks = (settings.muon_learning_rate, settings.adamw_learning_rate)
            for optimiser, peak in zip(self.optimisers, peaks, strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = peak * factor
                optimiser.step()
                optimiser.zero_grad()
            self.step += 1
            yield self.step, loss.item()


def train(settings: Settings, out: Path, *, save_every: int, log_every: int, compiled: bool) -> None:
    """Run the training in a folder, from its checkpoint if it holds one.

    Args:
        settings: What to train.
        out: Folder for the checkpoint, the log (JSON lines) and the exported model.
        save_every: Steps between two checkpoints.
        log_every: Steps between two lines of the log.
        compiled: Train through ``torch.compile``: faster steps after a minute's start.
    """
    run = Run(settings, out)
    started, first = time.monotonic(), run.step
    recent: list[float] = []
    with (out / LOG_FILE).open("a") as log:
        for step, loss in run.losses(compiled):
            recent.append(loss)
            if step % log_every == 0:
                done = (step - first) * settings.batch_tokens
                record: dict[str, Any] = {
                    "step": step,
                    "tokens": step * settings.batch_tokens,
                    "loss": sum(recent) / len(recent),
                    "tokens_per_second": done / (time.monotonic() - started),
                }
                recent.clear()
                if step % save_every == 0:
                    record["held_out"] = run.held_out_loss()
                    run.save()
                log.write(json.dumps(record) + "\n")
                log.flush()
    run.save()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, str | int | float | list | tuple)}


def main() -> None:
    """Read the settings from the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--log-every", type=int, default=20, help="steps between log lines")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    defaults = Settings()
    for field in fields(Settings):
        default = getattr(defaults, field.name)
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default)
    arguments = vars(parser.parse_args())
    settings = replace(defaults, **{f.name: arguments[f.name] for f in fields(Settings)})
    torch.set_num_threads(arguments["threads"])
    train(
        settings,
        arguments["out"],
        save_every=arguments["save_every"],
        log_every=arguments["log_every"],
        compiled=arguments["compile"],
    )


if __name__ == "__main__":
    main()
