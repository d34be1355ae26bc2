"""Text with any number of concepts, of its tokens or as a whole: the windows for the model, and a table of labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from kronsae.eval.hooked import Windows
from kronsae.eval.labelling import (
    WINDOWS_PER_BATCH,
    Encoded,
    Frame,
    Passage,
    batches,
    content_length,
    encode,
    to_windows,
)
from kronsae.support.errors import UserError

Per = Literal["token", "text"]
"""What an example is: a token, or a text with the means over its tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptText:
    """N examples with L concepts: tokens of text, or whole texts.

    Args:
        concepts: names of the concepts.
        windows: ``keep_ST`` marks the tokens of text, in the order of the examples; per text, a row is an example.
        labels_NL: concepts of each example.
        held_out_N: which examples are held out for scoring; the others are for training.
        per: what an example is.
    """

    concepts: tuple[str, ...]
    windows: tuple[Windows, ...]
    labels_NL: Bool[Tensor, "N L"]
    held_out_N: Bool[Tensor, " N"]
    per: Per = "token"

    def digest(self) -> str:
        """Return a hash of the content: tokens, labels, split, and what an example is."""
        content = hashlib.blake2b("\0".join((self.per, *self.concepts)).encode(), digest_size=16)
        for windows in self.windows:
            content.update(repr(tuple(windows.input_ids_ST.shape)).encode() + windows.input_ids_ST.numpy().tobytes())
        content.update(self.labels_NL.numpy().tobytes() + self.held_out_N.numpy().tobytes())
        return content.hexdigest()


def concept_text(
    passages: Iterable[Passage],
    tokenizer: Any,
    *,
    frame: Frame,
    context_length: int,
    concepts: Sequence[str] | None = None,
    windows: int = 300,
    at_least: int = 50,
    per: Per = "token",
    seed: int = 0,
) -> ConceptText:
    """Draw windows of the passages; a token has a concept if it overlaps a span with that label.

    Per text, each passage is one example: its first window, which has a concept if one of its tokens has.

    Args:
        passages: texts with spans; passages without spans are used too, as text without concepts.
        concepts: the concepts to use, in this order; None uses all labels in alphabetical order.
        windows: number of training windows; a quarter as many are held out.
        at_least: a concept is left out if, in either split, fewer examples have it or fewer lack it.
        per: what an example is.
        seed: seed of the windows drawn.

    Raises:
        UserError: no concept has enough examples.
    """
    content = content_length(frame, context_length)
    rows: list[tuple[bool, list[int], np.ndarray]] = []
    texts = [(passage, encode(passage.text, tokenizer)) for passage in passages]
    names = tuple(concepts) if concepts is not None else tuple(sorted({s.label for p, _ in texts for s in p.spans}))
    for passage, encoded in texts:
        has_TL = _labels(passage, encoded, names)
        read = len(encoded.ids) if per == "token" else min(len(encoded.ids), content)
        for start in range(0, read, content):
            part = slice(start, start + content)
            rows.append((passage.held_out, encoded.ids[part], has_TL[part]))
    order = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    chosen = [row for row in order if not row[0]][:windows] + [row for row in order if row[0]][: -(-windows // 4)]
    if not chosen:
        raise UserError("labelled text must contain tokens; found none. Give more text.")
    labels_NL = np.concatenate([row[2] if per == "token" else row[2].any(0, keepdims=True) for row in chosen])
    held_out_N = np.concatenate([np.full(len(row[1]) if per == "token" else 1, row[0]) for row in chosen])
    usable = _usable(labels_NL, held_out_N, at_least)
    if not usable.any():
        raise UserError(
            f"a concept needs {at_least} {per}s with it and {at_least} without it, both for training and held out; "
            f"none of {len(names)} has them. Give more labelled text, or a larger number of windows."
        )
    return ConceptText(
        concepts=tuple(name for name, use in zip(names, usable, strict=True) if use),
        windows=tuple(
            to_windows([row[1] for row in part], [range(len(row[1])) for row in part], frame, n * WINDOWS_PER_BATCH)
            for n, part in enumerate(batches(chosen, WINDOWS_PER_BATCH))
        ),
        labels_NL=torch.from_numpy(labels_NL[:, usable]),
        held_out_N=torch.from_numpy(held_out_N),
        per=per,
    )


def _labels(passage: Passage, encoded: Encoded, names: Sequence[str]) -> np.ndarray:
    number = {name: index for index, name in enumerate(names)}
    has_TL = np.zeros((len(encoded.ids), len(names)), dtype=bool)
    for span in passage.spans:
        if span.label in number:
            tokens = encoded.covering(span.start, span.end)
            has_TL[tokens.start : tokens.stop, number[span.label]] = True
    return has_TL


def _usable(labels_NL: np.ndarray, held_out_N: np.ndarray, at_least: int) -> np.ndarray:
    fewest = [
        count
        for side in (labels_NL[~held_out_N], labels_NL[held_out_N])
        for count in (side.sum(0), len(side) - side.sum(0))
    ]
    usable: np.ndarray = np.minimum.reduce(fewest) >= at_least
    return usable
