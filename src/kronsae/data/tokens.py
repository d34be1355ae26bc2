"""Text as batches of token windows.

A window holds consecutive tokens of one document, never of two. Encoders in the manner of BERT (a tokenizer
with ``cls`` and ``sep``) get ``cls ... sep`` around every window; other models get ``bos`` in front where the
tokenizer has one, and nothing where it has none. Batches are padded on the right to their longest window.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kronsae.data.corpus import Document
from kronsae.data.stream import MakeStream, State
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


@dataclass(frozen=True)
class _Window:
    ids: list[int]
    keep: list[bool]
    document: str
    offset: int


class TokenStream:
    """Yield ``(TokenBatch, state)`` from a stream of documents.

    The state is ``{"upstream": state before the last window's document, "window": windows taken of it}``.

    Args:
        make_text: Makes the stream of documents, such as ``partial(TextStream, config)``.
        tokenizer: Any Hugging Face tokenizer.
        context_length: Tokens in a full window, special ones included.
        batch_sequences: Windows in a batch; the last batch of a text that ends may hold fewer.
        state: Go on after the batch that this state came with.

    Raises:
        UserError: If a window has no room for text, or the text has no usable token.
    """

    def __init__(
        self,
        make_text: MakeStream[Document],
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int,
        batch_sequences: int,
        state: State | None = None,
    ) -> None:
        self._make_text = make_text
        self._tokenizer = tokenizer
        self._prefix, self._suffix = special_frame(tokenizer)
        self._content = context_length - len(self._prefix) - len(self._suffix)
        if self._content < 1:
            raise UserError(
                f"context_length must leave room for text beside {len(self._prefix + self._suffix)} special "
                f"tokens; got {context_length}. Give at least {context_length - self._content + 1}."
            )
        if batch_sequences < 1:
            raise UserError(f"batch_sequences must be at least 1; got {batch_sequences}.")
        self._batch_sequences = batch_sequences
        self._special = frozenset(tokenizer.all_special_ids)
        self._padding = _padding_id(tokenizer)
        self._state: State = {"upstream": None, "window": 0} if state is None else state

    def __iter__(self) -> Iterator[tuple[TokenBatch, State]]:
        for group in _groups(self._windows(), self._batch_sequences):
            yield self._batch([window for window, _ in group]), group[-1][1]

    def _windows(self) -> Iterator[tuple[_Window, State]]:
        before = self._state["upstream"]
        done = self._state["window"]
        resumed = before is not None or done > 0
        documents = barren = 0
        for document, ids, after in self._tokenised(before):
            documents += 1
            barren += 1
            windows = enumerate(self._cut(document.id, ids), 1)
            for number, window in itertools.islice(windows, done, None):
                if any(window.keep):
                    barren = 0
                    yield window, {"upstream": before, "window": number}
            if barren == PATIENCE_DOCUMENTS:
                raise _no_usable_tokens(documents)
            before, done = after, 0
        if documents == barren and not resumed:
            raise _no_usable_tokens(documents)

    def _tokenised(self, state: State | None) -> Iterator[tuple[Document, list[int], State]]:
        for group in _groups(self._make_text(state=state), GROUP_DOCUMENTS):
            encoded = self._tokenizer(
                [document.text for document, _ in group],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # no warning of documents longer than the model's context
            )
            for (document, after), ids in zip(group, encoded["input_ids"], strict=True):
                yield document, ids, after

    def _cut(self, document: str, ids: list[int]) -> Iterator[_Window]:
        for start in range(0, len(ids), self._content):
            content = ids[start : start + self._content]
            framed = [*self._prefix, *content, *self._suffix]
            keep = [token not in self._special for token in framed]
            yield _Window(framed, keep, document, start - len(self._prefix))

    def _batch(self, windows: list[_Window]) -> TokenBatch:
        shape = (len(windows), max(len(window.ids) for window in windows))
        input_ids_ST = torch.full(shape, self._padding)
        attention_mask_ST = torch.zeros(shape, dtype=torch.int64)
        keep_ST = torch.zeros(shape, dtype=torch.bool)
        for row, window in enumerate(windows):
            length = len(window.ids)
            input_ids_ST[row, :length] = torch.tensor(window.ids)
            attention_mask_ST[row, :length] = 1
            keep_ST[row, :length] = torch.tensor(window.keep)
        return TokenBatch(
            input_ids_ST=input_ids_ST,
            attention_mask_ST=attention_mask_ST,
            keep_ST=keep_ST,
            documents=tuple(window.document for window in windows),
            offsets=tuple(window.offset for window in windows),
        )


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
