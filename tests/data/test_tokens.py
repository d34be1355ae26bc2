from __future__ import annotations

import itertools
import json
from functools import partial
from typing import Any

import pytest
import torch
from tests.tiny_models import KINDS, TEXT, make_tokenizer
from transformers import PreTrainedTokenizerFast

from kronsae.data import tokens as tokens_module
from kronsae.data.stream import State
from kronsae.data.text import TextStream
from kronsae.data.tokens import TokenBatch, TokenStream, WindowStream
from kronsae.support.errors import UserError

TEXTS = [TEXT[number % 4] * (1 + number % 3) + str(number) for number in range(11)]


def stream(
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str] | None = None,
    *,
    repeat: bool = False,
    context_length: int = 12,
    batch_sequences: int = 3,
    pool_tokens: int = 0,
    seed: int = 0,
    state: State | None = None,
) -> TokenStream:
    return TokenStream(
        partial(TextStream, TEXTS if texts is None else texts, held_out_share=0.0, repeat=repeat),
        tokenizer,
        context_length=context_length,
        batch_sequences=batch_sequences,
        pool_tokens=pool_tokens,
        seed=seed,
        state=state,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_are_the_documents_tokens_in_order(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    found: dict[str, list[int]] = {}
    for batch, _ in stream(tokenizer):
        for row, document in enumerate(batch.documents):
            ids = found.setdefault(document, [])
            columns = batch.keep_ST[row].nonzero()[:, 0].tolist()
            assert [batch.offsets[row] + column for column in columns] == list(range(len(ids), len(ids) + len(columns)))
            ids += batch.input_ids_ST[row, columns].tolist()
    assert list(found.values()) == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize(
    ("kind", "first", "last"),
    [
        ("qwen2", None, None),
        ("gemma2", "<bos>", None),
        ("gpt_neox", "<|endoftext|>", None),
        ("gpt2", "<|endoftext|>", None),
        ("llama", "<s>", None),
        ("bert", "[CLS]", "[SEP]"),
    ],
)
def test_every_window_is_framed_as_the_architecture_expects(kind: str, first: str | None, last: str | None) -> None:
    tokenizer = make_tokenizer(kind)
    for batch, _ in stream(tokenizer):
        for row in range(len(batch.documents)):
            length = int(batch.attention_mask_ST[row].sum())
            window = tokenizer.convert_ids_to_tokens(batch.input_ids_ST[row, :length].tolist())
            assert (window[0] == first) is (first is not None)
            assert (window[-1] == last) is (last is not None)
            inner = batch.keep_ST[row, first is not None : length - (last is not None)]
            assert inner.all()
            assert batch.num_kept == int(batch.keep_ST.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_on_the_right_masked_and_never_kept(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    batches = [batch for batch, _ in stream(tokenizer)]
    assert any((batch.attention_mask_ST == 0).any() for batch in batches)
    for batch in batches:
        lengths = batch.attention_mask_ST.sum(1)
        assert lengths.max() == batch.input_ids_ST.shape[1] <= 12
        expected = torch.arange(batch.input_ids_ST.shape[1]) < lengths[:, None]
        assert torch.equal(batch.attention_mask_ST.bool(), expected)
        assert not (batch.keep_ST & ~expected).any()
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        assert (batch.input_ids_ST[~expected] == padding).all()


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("pool_tokens", [0, 100, 300])
def test_each_state_goes_on_exactly_after_its_batch(kind: str, repeat: bool, pool_tokens: int) -> None:
    tokenizer = make_tokenizer(kind)

    def items(state: State | None, count: int) -> list[tuple[list[Any], Any]]:
        batches = itertools.islice(stream(tokenizer, repeat=repeat, pool_tokens=pool_tokens, state=state), count)
        return [([batch.input_ids_ST.tolist(), batch.documents, batch.offsets], state) for batch, state in batches]

    whole = items(None, 30 if repeat else 1000)
    for at, (_, state) in enumerate(whole[:-3]):
        assert items(json.loads(json.dumps(state)), 3) == whole[at + 1 : at + 4]
    if not repeat:
        assert items(whole[-1][1], 1) == []


def test_special_tokens_written_in_a_text_are_not_kept() -> None:
    tokenizer = make_tokenizer("llama")
    batch, _ = next(iter(stream(tokenizer, ["a</s>b"])))
    kept = batch.input_ids_ST[0][batch.keep_ST[0]].tolist()
    assert tokenizer.convert_ids_to_tokens(kept) == ["a", "b"]


def test_windows_without_a_usable_token_are_left_out() -> None:
    tokenizer = make_tokenizer("qwen2")
    batches = [batch for batch, _ in stream(tokenizer, ["<|endoftext|>" * 30 + "a"], batch_sequences=99)]
    assert [len(batch.documents) for batch in batches] == [1]


def test_text_without_usable_tokens_is_an_error() -> None:
    texts = ["<|endoftext|>", "<|endoftext|><|endoftext|>"]
    message = r"text must contain tokens that are neither padding nor special tokens; found none in 2 documents"
    with pytest.raises(UserError, match=message):
        list(stream(make_tokenizer("qwen2"), texts))


def test_text_without_usable_tokens_is_an_error_even_if_it_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "PATIENCE_DOCUMENTS", 50)
    with pytest.raises(UserError, match=r"found none in 50 documents"):
        next(iter(stream(make_tokenizer("qwen2"), ["<|endoftext|>"], repeat=True)))


@pytest.mark.parametrize(("kind", "least"), [("qwen2", 1), ("llama", 2), ("bert", 3)])
def test_a_context_without_room_for_text_is_an_error(kind: str, least: int) -> None:
    tokenizer = make_tokenizer(kind)
    assert isinstance(next(iter(stream(tokenizer, context_length=least)))[0], TokenBatch)
    with pytest.raises(
        UserError,
        match=rf"context_length must leave room for text besides {least - 1} special tokens; got {least - 1}\. "
        rf"Give at least {least}\.",
    ):
        stream(tokenizer, context_length=least - 1)


def test_a_batch_holds_at_least_one_window() -> None:
    with pytest.raises(UserError, match=r"batch_sequences must be at least 1; got 0"):
        stream(make_tokenizer("gpt2"), batch_sequences=0)


def rows(batches: list[TokenBatch]) -> list[tuple[str, int, tuple[int, ...], tuple[bool, ...]]]:
    """Return every window without padding."""
    return [
        (
            document,
            offset,
            tuple(batch.input_ids_ST[row][: int(batch.attention_mask_ST[row].sum())].tolist()),
            tuple(batch.keep_ST[row][: int(batch.attention_mask_ST[row].sum())].tolist()),
        )
        for batch in batches
        for row, (document, offset) in enumerate(zip(batch.documents, batch.offsets, strict=True))
    ]


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("pool_tokens", [36, 100, 101, 300, 10_000])
def test_a_pool_serves_the_windows_of_the_text_each_once_in_another_order(kind: str, pool_tokens: int) -> None:
    tokenizer = make_tokenizer(kind)
    in_order = rows([batch for batch, _ in stream(tokenizer)])
    shuffled = rows([batch for batch, _ in stream(tokenizer, pool_tokens=pool_tokens)])
    assert sorted(shuffled) == sorted(in_order)
    assert shuffled != in_order
    other = rows([batch for batch, _ in stream(tokenizer, pool_tokens=pool_tokens, seed=1)])
    assert sorted(other) == sorted(in_order)
    assert other != shuffled


def test_a_pool_mixes_documents() -> None:
    """The number of a document's windows in a batch varies as under random sampling of windows.

    There are 40 documents of 30 windows each and batches of 20. In text order a batch has windows of one or two
    documents, and the variance of a document's count is near 20 * (mean of its squared share). Under random sampling it
    is about 20 / 40.
    """
    tokenizer = make_tokenizer("gpt2")
    document = " ".join(TEXT)
    length = len(tokenizer(document, add_special_tokens=False)["input_ids"])
    texts = [document * (30 * 7 // length + 1) + str(number) for number in range(40)]

    def variance(pool_tokens: int) -> float:
        counts = [
            [batch.documents.count(one) for one in set(all_documents)]
            for batch, _ in stream(tokenizer, texts, context_length=8, batch_sequences=20, pool_tokens=pool_tokens)
            if len(batch.documents) == 20
        ]
        return float(torch.tensor(counts).double().var())

    all_documents = [document for batch, _ in stream(tokenizer, texts) for document in batch.documents]
    assert variance(0) > 5
    assert variance(8 * 20 * 200) < 1


def test_ids_of_a_pool_take_four_bytes_each() -> None:
    make = partial(TextStream, TEXTS, held_out_share=0.0, repeat=False)
    windows = [window for some, _ in WindowStream(make, make_tokenizer("bert"), context_length=12) for window in some]
    assert len(windows) > 20
    for window in windows:
        assert window.ids.dtype == "int32"
        assert window.ids.base is None, "a view would keep the ids of the whole document"


def test_the_pool_is_checked() -> None:
    with pytest.raises(
        UserError,
        match=r"^pool_tokens must be 0 or at least the 36 tokens of a batch; got 35\. Give at least 576 to "
        r"shuffle well\.$",
    ):
        stream(make_tokenizer("gpt2"), pool_tokens=35)
    with pytest.raises(UserError, match=r"^state must have the keys upstream, rows; got upstream, window\. It was"):
        stream(make_tokenizer("gpt2"), state={"upstream": None, "window": 3})
