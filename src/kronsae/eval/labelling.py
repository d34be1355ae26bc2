"""Labelled text, mapped to the model's tokens by the tokenizer's character offsets."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kronsae.eval.hooked import Windows
from kronsae.support.errors import UserError

WINDOWS_PER_BATCH = 32

Frame = tuple[Sequence[int], Sequence[int]]
"""Special tokens before and after every window, as in the SAE's training."""

Place = Literal["last", "next"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A labelled span of a text: characters ``start <= c < end``."""

    start: int
    end: int
    label: str


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text with labelled spans, for scoring if ``held_out``, else for training."""

    text: str
    spans: tuple[Span, ...]
    held_out: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """The tokens of a text; token t covers the characters ``starts[t] <= c < ends[t]``."""

    ids: list[int]
    starts: np.ndarray
    ends: np.ndarray

    def covering(self, start: int, end: int) -> range:
        """Return the range of tokens that overlap the characters ``start <= c < end``."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        return range(first, max(first, int(np.searchsorted(self.starts, end, side="left"))))


def encode(text: str, tokenizer: Any) -> Encoded:
    """Tokenise a text without special tokens.

    Raises:
        UserError: the tokenizer does not give character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "the tokenizer must give the character offsets of its tokens (a 'fast' tokenizer); this model's does not. "
            "Convert it with transformers, or choose another model."
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # tokens that share the bytes of one character have equal offsets; offsets stay non-decreasing
    offsets = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return Encoded(ids=list(found["input_ids"]), starts=offsets[:, 0], ends=offsets[:, 1])


def content_length(frame: Frame, context_length: int) -> int:
    """Return the number of text tokens in a window."""
    content = context_length - len(frame[0]) - len(frame[1])
    if content < 1:
        raise UserError(
            f"context_length must be larger than the number of special tokens; got {context_length} with {frame}."
        )
    return content


def to_windows(rows: Sequence[Sequence[int]], keep: Sequence[Iterable[int]], frame: Frame, first: int) -> Windows:
    """Frame rows of text tokens with special tokens and pad on the right; ``keep`` indexes a row's text tokens."""
    prefix, suffix = list(frame[0]), list(frame[1])
    shape = (len(rows), max(map(len, rows)) + len(prefix) + len(suffix))
    ids_ST = torch.zeros(shape, dtype=torch.int32)
    mask_ST, keep_ST = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for number, (row, kept) in enumerate(zip(rows, keep, strict=True)):
        framed = [*prefix, *row, *suffix]
        ids_ST[number, : len(framed)] = torch.tensor(framed, dtype=torch.int32)
        mask_ST[number, : len(framed)] = True
        keep_ST[number, [len(prefix) + token for token in kept]] = True
    return Windows(ids_ST, mask_ST, keep_ST, first)


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A classification task: example tokens in windows, each with one class and the word it belongs to.

    Args:
        name: display name.
        classes: names of the C classes.
        windows: ``keep_ST`` marks the E example tokens; the fields below are in their order.
        labels_E: class index of each example.
        held_out_E: which examples are held out for scoring; the others are for training.
        words: the word of each example, for display.
        left_out: requested or found classes that have too few training or held-out examples.
    """

    name: str
    classes: tuple[str, ...]
    windows: tuple[Windows, ...]
    labels_E: Int[Tensor, " E"]
    held_out_E: Bool[Tensor, " E"]
    words: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def digest(self) -> str:
        """Return a hash of the content: tokens, positions, labels and split."""
        content = hashlib.blake2b("\0".join(self.classes).encode(), digest_size=16)
        for windows in self.windows:
            for tensor in (windows.input_ids_ST, windows.attention_mask_ST, windows.keep_ST):
                content.update(repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
        content.update(self.labels_E.numpy().tobytes() + self.held_out_E.numpy().tobytes())
        return content.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of examples. Only windows that contribute an example are run through the model.

    Args:
        windows: maximum number of training windows; a quarter as many are held out.
        per_class: maximum number of training examples per class; a quarter as many are held out.
        per_word: maximum number of examples per word and class in each split, so that a frequent word does not make up
            the whole class.
        at_least: a class with fewer examples in either split is left out.
    """

    windows: int = 800
    per_class: int = 600
    per_word: int = 3
    at_least: int = 10

    def __post_init__(self) -> None:
        for name in ("windows", "per_class", "per_word", "at_least"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}.")


def make_task(
    name: str,
    passages: Iterable[Passage],
    tokenizer: Any,
    *,
    frame: Frame,
    context_length: int,
    classes: Sequence[str] | None = None,
    sizes: Sizes | None = None,
    place: Place = "last",
    whole: bool = False,
    seed: int = 0,
) -> Task:
    """Draw windows of the passages, and examples among the labelled spans in them.

    The text is cut into windows as for training. A span is read at the last token that overlaps it, or one token later
    with ``place="next"``; if that token is outside the window, the span is skipped. Windows are visited in random order
    and contribute examples until the limits of `Sizes` per class and word are reached.

    Args:
        classes: the classes to use, in this order; None uses all labels in alphabetical order.
        whole: raise instead of cutting a passage that does not fit in one window, such as a prompt.

    Raises:
        UserError: fewer than two classes have enough examples, or with ``whole`` a passage is too long.
    """
    sizes = sizes or Sizes()
    content = content_length(frame, context_length)
    rows = [row for passage in passages for row in _rows(passage, tokenizer, content, place, classes, whole)]
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    chosen = [row for held_out in (False, True) for row in _wanted(rows, order, sizes, held_out)]
    counts = Counter((row.held_out, label) for row in chosen for label, _ in row.examples.values())
    names = sorted({label for _, label in counts}) if classes is None else list(classes)
    kept = tuple(name for name in names if min(counts[False, name], counts[True, name]) >= sizes.at_least)
    if len(kept) < 2:
        raise UserError(
            f"a task needs at least two classes with {sizes.at_least} training and {sizes.at_least} held-out examples "
            f"each; '{name}' has {len(kept)} of {len(names)}. Give more labelled text."
        )
    chosen = [row.only(kept) for row in chosen if any(label in kept for label, _ in row.examples.values())]
    examples = [(label, word, row.held_out) for row in chosen for label, word in row.examples.values()]
    windows = tuple(
        to_windows([row.ids for row in part], [row.examples for row in part], frame, number * WINDOWS_PER_BATCH)
        for number, part in enumerate(batches(chosen, WINDOWS_PER_BATCH))
    )
    return Task(
        name=name,
        classes=kept,
        windows=windows,
        labels_E=torch.tensor([kept.index(label) for label, _, _ in examples]),
        held_out_E=torch.tensor([held_out for _, _, held_out in examples]),
        words=tuple(word for _, word, _ in examples),
        left_out=tuple(name for name in names if name not in kept),
    )


@dataclass(frozen=True)
class _Row:
    """The text tokens of a window and its examples: (label, word) by token index, ascending."""

    ids: list[int]
    examples: dict[int, tuple[str, str]]
    held_out: bool

    def only(self, labels: Sequence[str]) -> _Row:
        return _Row(self.ids, {t: e for t, e in self.examples.items() if e[0] in labels}, self.held_out)


def _rows(
    passage: Passage, tokenizer: Any, content: int, place: Place, classes: Sequence[str] | None, whole: bool
) -> Iterator[_Row]:
    """Yield the windows of a passage that contain an example; of spans read at the same token, the first is used."""
    encoded = encode(passage.text, tokenizer)
    if whole and len(encoded.ids) > content:
        raise UserError(
            f"context_length must fit each prompt of this task; one has {len(encoded.ids)} tokens, and {content} fit. "
            "Choose another task, or a run with a longer context."
        )
    found: dict[int, dict[int, tuple[str, str]]] = defaultdict(dict)
    for span in passage.spans:
        tokens = encoded.covering(span.start, span.end)
        if not tokens or (classes is not None and span.label not in classes):
            continue
        row, token = divmod(tokens[-1] + (place == "next"), content)
        if row * content + token < len(encoded.ids) and row == tokens[-1] // content:
            word = passage.text[span.start : span.end].strip()
            found[row].setdefault(token, (span.label, word))
    for row, examples in sorted(found.items()):
        yield _Row(encoded.ids[row * content : (row + 1) * content], dict(sorted(examples.items())), passage.held_out)


def _wanted(rows: Sequence[_Row], order: Sequence[int], sizes: Sizes, held_out: bool) -> Iterator[_Row]:
    """Yield windows of one split with the examples selected from them, up to the limits of ``sizes``."""
    part = 4 if held_out else 1
    per_class, left = -(-sizes.per_class // part), -(-sizes.windows // part)
    of_class: Counter[str] = Counter()
    of_word: Counter[tuple[str, str]] = Counter()
    for row in (rows[index] for index in order):
        if row.held_out != held_out or left == 0:
            continue
        taken: dict[int, tuple[str, str]] = {}
        for token, example in row.examples.items():
            if of_class[example[0]] < per_class and of_word[example] < sizes.per_word:
                of_class[example[0]] += 1
                of_word[example] += 1
                taken[token] = example
        if taken:
            left -= 1
            yield _Row(row.ids, taken, held_out)


def batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield ``rows``, ``size`` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
