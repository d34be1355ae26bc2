"""Tokenise documents into windows and yield batches of windows.

A window contains consecutive tokens of one document. If the tokenizer has ``cls`` and ``sep`` (BERT-style encoders),
every window is ``cls ... sep``. Otherwise a window starts with ``bos`` if the tokenizer has one. Batches are padded on
the right to their longest window. For training, windows of many documents are shuffled in a pool before the forward
pass.
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
from kronsae.data.shuffle import NOT_STORED, START, BlockReader, StaggeredOrder, StaggeredShuffle
from kronsae.data.stream import MakeStream, State, check_state
from kronsae.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")

# Documents tokenised in one call. Fast tokenizers use all cores within a call.
GROUP_DOCUMENTS = 16
# A repeating text never ends, so the stream raises after this many consecutive documents without a usable token.
PATIENCE_DOCUMENTS = 10_000


class Tokens(Protocol):
    """Token windows as input of a forward pass; `TokenBatch` documents the fields."""

    @property
    def input_ids_ST(self) -> Tensor: ...
    @property
    def attention_mask_ST(self) -> Tensor: ...
    @property
    def keep_ST(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """A batch of token windows, one per row.

    Args:
        input_ids_ST: Token ids, padded on the right.
        attention_mask_ST: 1 for tokens, 0 for padding.
        keep_ST: True for tokens whose activations are kept: those that are neither padding nor special tokens.
        documents: Document id of each row.
        offsets: For each row, the index within its document of the token in column 0, so that column t contains
            token ``offset + t``. It is -1 if column 0 is the ``bos`` before the document's first token.
    """

    input_ids_ST: Int[Tensor, "S T"]
    attention_mask_ST: Int[Tensor, "S T"]
    keep_ST: Bool[Tensor, "S T"]
    documents: tuple[str, ...]
    offsets: tuple[int, ...]

    @property
    def num_kept(self) -> int:
        """Number of tokens whose activations are kept."""
        return int(self.keep_ST.sum())


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens of one document, including the special tokens before and after them.

    Args:
        ids: Token ids, 4 bytes each because many windows are kept in memory.
        document: Document id.
        offset: As in `TokenBatch`.
    """

    ids: Int32[np.ndarray, "T"]
    document: str
    offset: int


class WindowStream:
    """Yield ``(windows, state)``: the windows of each document, in text order.

    The state is the text stream's. Windows that contain only special tokens are skipped.

    Args:
        make_text: Makes the stream of documents, such as ``partial(TextStream, config)``.
        tokenizer: Any Hugging Face tokenizer.
        context_length: Tokens in a full window, including special tokens.
        state: State yielded with a document's windows; iteration resumes after that document.

    Raises:
        UserError: If ``context_length`` leaves no room for text, or the text has no usable token.
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
                f"context_length must leave room for text besides {len(prefix + suffix)} special "
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
                verbose=False,  # no warning about documents longer than the model's context
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
    """Store windows; implements `kronsae.data.shuffle.RowStore`.

    Args:
        capacity: Number of slots.
    """

    def __init__(self, capacity: int) -> None:
        self._windows: list[Window | None] = [None] * capacity

    def count(self, item: list[Window]) -> int:
        """Return the number of windows."""
        return len(item)

    def put(self, item: list[Window], start: int, slots: Int64[Tensor, "N"]) -> None:
        """Store the windows from ``start`` on in the given slots."""
        for window, slot in zip(item[start:], slots.tolist(), strict=False):
            if slot != NOT_STORED:
                self._windows[slot] = window

    def take(self, slots: Int64[Tensor, "N"]) -> list[Window]:
        """Return the windows in the given slots."""
        return [window for slot in slots.tolist() if (window := self._windows[slot]) is not None]


class TokenStream:
    """Yield ``(TokenBatch, state)`` from a stream of documents, with windows in text order or shuffled.

    In text order the state is ``{"upstream": state before the last window's document, "rows": windows of that document
    already yielded}``. Shuffled windows have the order of `kronsae.data.shuffle.StaggeredOrder` and the state of
    `StaggeredShuffle`; resuming from it tokenises at most two pools again.

    Args:
        make_text: Makes the stream of documents, such as ``partial(TextStream, config)``.
        tokenizer: Any Hugging Face tokenizer.
        context_length: Tokens in a full window, including special tokens.
        batch_sequences: Windows in a batch; the last batch of a finite text may be smaller.
        pool_tokens: Tokens in the pool from which shuffled windows are drawn: at least a batch, or 0 for text order.
            The pool takes 4 bytes per token.
        seed: Seed of the shuffled order.
        state: State yielded with a batch; iteration resumes after that batch.

    Raises:
        UserError: If ``context_length`` leaves no room for text, the pool is smaller than a batch, the text has no
            usable token, or the state was written by an incompatible version.
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
                f"Give at least {16 * batch_tokens} to shuffle well."
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
    """Yield ``count`` windows at a time, in text order."""

    def __init__(self, make_windows: MakeStream[list[Window]], count: int, state: State | None) -> None:
        self._make_windows = make_windows
        self._count = count
        self._state = START if state is None else state
        check_state(self._state, tuple(START))

    def __iter__(self) -> Iterator[tuple[list[Window], State]]:
        rows, slots = WindowRows(self._count), torch.arange(self._count)
        reader = BlockReader(self._make_windows, rows, self._state)
        while found := reader.read(slots):
            yield rows.take(slots[:found]), reader.position


def special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that precede and follow the text of every window."""
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        return [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id], []
    return [], []


def _no_usable_tokens(documents: int) -> UserError:
    return UserError(
        "text must contain tokens that are neither padding nor special tokens; found none in "
        f"{documents} documents. Give another text, or a model whose tokenizer supports its script."
    )


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token's id; without one, any id works, because padding is masked in attention."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def _groups(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group
