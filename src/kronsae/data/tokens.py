"""Text as batches of token windows.

A window holds consecutive tokens of one document, never of two. Encoders in the manner of BERT (a tokenizer
with ``cls`` and ``sep``) get ``cls ... sep`` around every window; other models get ``bos`` in front where the
tokenizer has one, and nothing where it has none. Batches are padded on the right to their longest window.
For training, windows of many documents are shuffled in a pool before the model sees them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int, Int32, Int64
from torch import Tensor

from kronsae.data.corpus import Document
from kronsae.data.shuffle import LET_GO, START, BlockReader, StaggeredOrder, StaggeredShuffle
from kronsae.data.stream import MakeStream, State, check_state
from kronsae.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")

# Documents tokenised in one call: fast tokenizers use all cores within a call.
GROUP_DOCUMENTS = 16
# A text that repeats has no end to wait for: after so many documents without a token there is none.
PATIENCE_DOCUMENTS = 10_000


class Tokens(Protocol):
    """Windows of tokens as a forward pass needs them; `TokenBatch` says what the fields hold."""

    @property
    def input_ids_ST(self) -> Tensor: ...
    @property
    def attention_mask_ST(self) -> Tensor: ...
    @property
    def keep_ST(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """Windows of tokens, one in each row.

    Args:
        input_ids_ST: Token ids, padded on the right.
        attention_mask_ST: 1 where there is a token, 0 where there is padding.
        keep_ST: True where an activation counts: neither padding nor a special token.
        documents: The document of each row, by id.
        offsets: For each row, the index within its document of the token in column 0 (-1 where column 0 is
            the ``bos`` before the document's first token), so that column t holds token ``offset + t``.
    """

    input_ids_ST: Int[Tensor, "S T"]
    attention_mask_ST: Int[Tensor, "S T"]
    keep_ST: Bool[Tensor, "S T"]
    documents: tuple[str, ...]
    offsets: tuple[int, ...]

    @property
    def num_kept(self) -> int:
        """Number of tokens whose activations count."""
        return int(self.keep_ST.sum())


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens of one document, with the special tokens around them.

    Args:
        ids: Token ids; 4 bytes each, since many windows are held at once.
        document: The document's id.
        offset: As in `TokenBatch`.
    """

    ids: Int32[np.ndarray, "T"]
    document: str
    offset: int


class WindowStream:
    """Yield ``(windows, state)``: the windows of one document after another, in order.

    The state is the text stream's. Windows without a token whose activation counts are left out.

    Args:
        make_text: Makes the stream of documents, such as ``partial(TextStream, config)``.
        tokenizer: Any Hugging Face tokenizer.
        context_length: Tokens in a full window, special ones included.
        state: Go on after the document that this state came with.

    Raises:
        UserError: If a window has no room for text, or the text has no usable token.
    """

    def __init__(
        self,
        make_text: MakeStream[Document],
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int,
        state: State | None = None,
    ) -> None:
        self._make_text = make_text
        self._tokenizer = tokenizer
        prefix, suffix = special_frame(tokenizer)
        self._content = context_length - len(prefix) - len(suffix)
        if self._content < 1:
            raise UserError(
                f"context_length must leave room for text beside {len(prefix + suffix)} special "
                f"tokens; got {context_length}. Give at least {context_length - self._content + 1}."
            )
        self._prefix, self._suffix = np.array(prefix, dtype=np.int32), np.array(suffix, dtype=np.int32)
        self._special = np.array(tokenizer.all_special_ids, dtype=np.int32)
        self._state = state

    def __iter__(self) -> Iterator[tuple[list[Window], State]]:
        documents = barren = 0
        for document, ids, after in self._tokenised():
            documents += 1
            windows = list(self._cut(document.id, ids))
            barren = 0 if windows else barren + 1
            yield windows, after
            if barren == PATIENCE_DOCUMENTS:
                raise _no_usable_tokens(documents)
        if documents == barren and self._state is None:
            raise _no_usable_tokens(documents)

    def _tokenised(self) -> Iterator[tuple[Document, Int32[np.ndarray, "T"], State]]:
        for group in _groups(self._make_text(state=self._state), GROUP_DOCUMENTS):
            encoded = self._tokenizer(
                [document.text for document, _ in group],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # no warning of documents longer than the model's context
            )
            for (document, after), ids in zip(group, encoded["input_ids"], strict=True):
                yield document, np.array(ids, dtype=np.int32), after

    def _cut(self, document: str, ids: Int32[np.ndarray, "T"]) -> Iterator[Window]:
        for start in range(0, len(ids), self._content):
            content = ids[start : start + self._content]
            if not np.isin(content, self._special).all():
                framed = np.concatenate([self._prefix, content, self._suffix])
                yield Window(framed, document, start - len(self._prefix))


class WindowRows:
    """Keeps windows: a `kronsae.data.shuffle.RowStore`.

    Args:
        capacity: Number of places.
    """

    def __init__(self, capacity: int) -> None:
        self._windows: list[Window | None] = [None] * capacity

    def count(self, item: list[Window]) -> int:
        """Number of windows."""
        return len(item)

    def put(self, item: list[Window], start: int, places: Int64[Tensor, "N"]) -> None:
        """Keep the windows from ``start`` on at these places."""
        for window, place in zip(item[start:], places.tolist(), strict=False):
            if place != LET_GO:
                self._windows[place] = window

    def take(self, places: Int64[Tensor, "N"]) -> list[Window]:
        """Return the windows at these places."""
        return [window for place in places.tolist() if (window := self._windows[place]) is not None]


class TokenStream:
    """Yield ``(TokenBatch, state)`` from a stream of documents: windows in the order of the text, or shuffled.

    In the order of the text the state is ``{"upstream": state before the last window's document, "rows": windows taken
    of it}``. Shuffled windows are served in a `kronsae.data.shuffle.StaggeredOrder`, and the state is that of a
    `StaggeredShuffle`: going on from it tokenises at most two pools again.

    Args:
        make_text: Makes the stream of documents, such as ``partial(TextStream, config)``.
        tokenizer: Any Hugging Face tokenizer.
        context_length: Tokens in a full window, special ones included.
        batch_sequences: Windows in a batch; the last batch of a text that ends may hold fewer.
        pool_tokens: Tokens in the pool from which shuffled windows are drawn, at least a batch; 0: no pool, the order
            of the text. Takes 4 bytes a token.
        seed: Seed of the order of shuffled windows.
        state: Go on after the batch that this state came with.

    Raises:
        UserError: If a window has no room for text, the pool is smaller than a batch, the text has no usable token, or
            the state is of another version.
    """

    def __init__(
        self,
        make_text: MakeStream[Document],
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int,
        batch_sequences: int,
        pool_tokens: int = 0,
        seed: int = 0,
        state: State | None = None,
    ) -> None:
        if batch_sequences < 1:
            raise UserError(f"batch_sequences must be at least 1; got {batch_sequences}.")
        batch_tokens = batch_sequences * context_length
        if pool_tokens != 0 and pool_tokens < batch_tokens:
            raise UserError(
                f"pool_tokens must be 0 or at least the {batch_tokens} tokens of a batch; got {pool_tokens}. "
                f"Give at least {16 * batch_tokens} to mix well."
            )
        make_windows = partial(WindowStream, make_text, tokenizer, context_length=context_length)
        make_windows(state=None)  # checks the context length
        self._special = np.array(tokenizer.all_special_ids, dtype=np.int32)
        self._padding = _padding_id(tokenizer)
        if pool_tokens == 0:
            self._groups: Iterable[tuple[list[Window], State]] = _InOrder(make_windows, batch_sequences, state)
            return
        order = StaggeredOrder(
            batch_size=batch_sequences, capacity=pool_tokens // context_length, seed=seed, purpose="windows"
        )
        self._groups = StaggeredShuffle(
            make_windows, WindowRows(order.held_rows), order, drop_remainder=False, state=state
        )

    def __iter__(self) -> Iterator[tuple[TokenBatch, State]]:
        for windows, state in self._groups:
            yield self._batch(windows), state

    def _batch(self, windows: list[Window]) -> TokenBatch:
        shape = (len(windows), max(len(window.ids) for window in windows))
        input_ids_ST = np.full(shape, self._padding, dtype=np.int64)
        attention_mask_ST = np.zeros(shape, dtype=np.int64)
        for row, window in enumerate(windows):
            input_ids_ST[row, : len(window.ids)] = window.ids
            attention_mask_ST[row, : len(window.ids)] = 1
        keep_ST = (attention_mask_ST == 1) & ~np.isin(input_ids_ST, self._special)
        return TokenBatch(
            input_ids_ST=torch.from_numpy(input_ids_ST),
            attention_mask_ST=torch.from_numpy(attention_mask_ST),
            keep_ST=torch.from_numpy(keep_ST),
            documents=tuple(window.document for window in windows),
            offsets=tuple(window.offset for window in windows),
        )


class _InOrder:
    """Yield so many windows at a time, in the order of the text."""

    def __init__(self, make_windows: MakeStream[list[Window]], count: int, state: State | None) -> None:
        self._make_windows = make_windows
        self._count = count
        self._state = START if state is None else state
        check_state(self._state, tuple(START))

    def __iter__(self) -> Iterator[tuple[list[Window], State]]:
        rows, places = WindowRows(self._count), torch.arange(self._count)
        reader = BlockReader(self._make_windows, rows, self._state)
        while found := reader.read(places):
            yield rows.take(places[:found]), reader.position


def special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens put before and after every window."""
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        return [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id], []
    return [], []


def _no_usable_tokens(documents: int) -> UserError:
    return UserError(
        "text must hold tokens that are neither padding nor special to the tokenizer; found none in "
        f"{documents} documents. Give another text, or a model whose tokenizer knows its writing."
    )


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with; the attention mask hides it, so that any id of the vocabulary will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def _groups(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group
