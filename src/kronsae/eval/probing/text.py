"""Tokens with any number of concepts each: the windows the model reads, and a table of what every token is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptText:
    """N tokens of text with L concepts.

    Args:
        concepts: their names.
        windows: ``keep_ST`` marks the N tokens of text; the rows below are in their order.
        labels_NL: which concepts each token has.
        held_out_N: which tokens are scored on; the others are learnt from.
    """

    concepts: tuple[str, ...]
    windows: tuple[Windows, ...]
    labels_NL: Bool[Tensor, "N L"]
    held_out_N: Bool[Tensor, " N"]

    def digest(self) -> str:
        """A name for the very content: tokens, labels and split."""
        content = hashlib.blake2b("\0".join(self.concepts).encode(), digest_size=16)
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
    seed: int = 0,
) -> ConceptText:
    """Draw windows of some passages; a token has a concept where it overlaps a span of it.

    Args:
        passages: texts with spans; those without any span count as well, as text without concepts.
        concepts: in this order, and no others; None takes all labels in alphabetical order.
        windows: to learn from; a quarter as many are scored on.
        at_least: a concept that fewer tokens have, or lack, on one side is left out.
        seed: of the windows drawn.

    Raises:
        UserError: no concept has enough tokens.
    """
    content = content_length(frame, context_length)
    rows: list[tuple[bool, list[int], np.ndarray]] = []
    texts = [(passage, encode(passage.text, tokenizer)) for passage in passages]
    names = tuple(concepts) if concepts is not None else tuple(sorted({s.label for p, _ in texts for s in p.spans}))
    for passage, encoded in texts:
        has_TL = _labels(passage, encoded, names)
        for start in range(0, len(encoded.ids), content):
            part = slice(start, start + content)
            rows.append((passage.held_out, encoded.ids[part], has_TL[part]))
    order = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    chosen = [row for row in order if not row[0]][:windows] + [row for row in order if row[0]][: -(-windows // 4)]
    if not chosen:
        raise UserError("labelled text must hold tokens; found none. Give more text.")
    labels_NL = np.concatenate([row[2] for row in chosen])
    held_out_N = np.concatenate([np.full(len(row[1]), row[0]) for row in chosen])
    usable = _usable(labels_NL, held_out_N, at_least)
    if not usable.any():
        raise UserError(
            f"a concept needs {at_least} tokens with it and without it to learn from, and as many to score on; none of "
            f"{len(names)} has them. Give more labelled text."
        )
    return ConceptText(
        concepts=tuple(name for name, use in zip(names, usable, strict=True) if use),
        windows=tuple(
            to_windows([row[1] for row in part], [range(len(row[1])) for row in part], frame, n * WINDOWS_PER_BATCH)
            for n, part in enumerate(batches(chosen, WINDOWS_PER_BATCH))
        ),
        labels_NL=torch.from_numpy(labels_NL[:, usable]),
        held_out_N=torch.from_numpy(held_out_N),
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
