from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import TEXT
from torch import Tensor

from kronsae.data.buffer import Activations, ShuffleBuffer, TensorStream
from kronsae.data.harvest import ActivationStream
from kronsae.data.model import ModelConfig, load_model
from kronsae.data.stream import State
from kronsae.data.text import TextStream
from kronsae.data.tokens import TokenStream
from kronsae.support.errors import UserError

SIZES = (7, 1, 12, 5, 9, 3, 11)


class CountingStream:
    """Yield items of different sizes with consecutively numbered rows; row n contains (n, document) and (-n)."""

    def __init__(self, items: int | None = None, *, state: State | None) -> None:
        self.items = items
        self.start = 0 if state is None else state["item"]

    def __iter__(self) -> Iterator[tuple[Activations, State]]:
        rows = itertools.count() if self.items is None else range(self.items)
        first = 0
        for number in rows:
            size = SIZES[number % len(SIZES)]
            numbers_N1 = torch.arange(first, first + size, dtype=torch.float32)[:, None]
            first += size
            if number >= self.start:
                document_N1 = torch.full((size, 1), float(number))
                yield {"a": torch.cat([numbers_N1, document_N1], 1), "b": -numbers_N1}, {"item": number + 1}


def buffer(items: int | None = None, state: State | None = None, **options: Any) -> ShuffleBuffer:
    sizes = {"batch_size": 4, "buffer_tokens": 30} | options
    return ShuffleBuffer(partial(CountingStream, items), state=state, **sizes)


def numbers(batches: list[tuple[Activations, State]]) -> list[int]:
    return [int(number) for values, _ in batches for number in values["a"][:, 0]]


class TestShuffleBuffer:
    def test_each_row_is_served_once(self) -> None:
        """A capacity of 30 rows fits 7 batches of 4, so that a block has 3 batches."""
        served = numbers(list(itertools.islice(buffer(), 40)))
        assert len(set(served)) == len(served)
        assert set(range(40 * 4 - 24)) <= set(served)
        assert served != sorted(served)

    def test_all_hooks_are_permuted_alike(self) -> None:
        for values, _ in itertools.islice(buffer(), 20):
            assert list(values) == ["a", "b"]
            assert torch.equal(values["a"][:, :1], -values["b"])

    def test_a_batch_mixes_documents(self) -> None:
        batches = itertools.islice(buffer(buffer_tokens=200, batch_size=20), 30)
        assert all(len(set(values["a"][:, 1].tolist())) > 5 for values, _ in batches)

    def test_a_batch_outlives_its_block(self) -> None:
        batches = list(itertools.islice(buffer(), 30))
        again = itertools.islice(buffer(), 30)
        assert all(torch.equal(kept["a"], fresh["a"]) for (kept, _), (fresh, _) in zip(batches, again, strict=True))

    def test_the_seed_decides_the_order(self) -> None:
        orders = [tuple(numbers(list(itertools.islice(buffer(seed=seed), 7)))) for seed in (0, 1, 0)]
        assert orders[0] == orders[2] != orders[1]

    def test_two_units_are_permuted_differently(self) -> None:
        order = numbers(list(itertools.islice(buffer(), 12)))
        assert [number + 12 for number in order[36:48]] != order[24:36]

    @pytest.mark.parametrize("sizes", [(4, 30), (4, 4), (5, 100), (30, 40)])
    @pytest.mark.parametrize("items", [None, 20])
    def test_each_state_goes_on_exactly_after_its_batch(self, sizes: tuple[int, int], items: int | None) -> None:
        def batches(state: State | None, count: int) -> list[tuple[list[int], State]]:
            stream = buffer(items, state, batch_size=sizes[0], buffer_tokens=sizes[1])
            return [(numbers([item]), item[1]) for item in itertools.islice(stream, count)]

        whole = batches(None, 40)
        for at, (_, state) in enumerate(whole[: 40 - 9]):
            assert batches(json.loads(json.dumps(state)), 9) == whole[at + 1 : at + 10]

    def test_a_served_block_is_not_read_again(self) -> None:
        states = [state for _, state in itertools.islice(buffer(), 9)]
        assert [(state["unit"], state["batch"]) for state in states] == [
            *((1, 0), (1, 1), (2, 0), (2, 1), (2, 2)),  # units of 1, 2 and then always 3 batches
            *((3, 0), (3, 1), (3, 2), (4, 0)),
        ]
        assert all(state["upstream"] is None for state in states[:5])
        assert states[5] == {
            "upstream": {"item": 2},
            "rows": 4,
            "unit": 3,
            "batch": 0,
        }  # row 12

    def test_a_stream_that_ends_drops_less_than_a_batch(self) -> None:
        total = sum(SIZES[number % len(SIZES)] for number in range(10))
        served = numbers(list(buffer(10)))
        assert len(served) == len(set(served)) == total // 4 * 4

    def test_a_stream_without_a_full_batch_is_an_error(self) -> None:
        with pytest.raises(
            UserError,
            match=r"batch_size must not exceed the number of activations; got 30 with 20\. Give more text or a smaller",
        ):
            list(buffer(3, batch_size=30))
        with pytest.raises(UserError, match=r"got 4 with 0\."):
            list(buffer(0))

    def test_sizes_are_checked(self) -> None:
        with pytest.raises(
            UserError, match=r"buffer_tokens must be at least batch_size; got 3 with 4\. Give at least 64"
        ):
            buffer(buffer_tokens=3)
        with pytest.raises(UserError, match=r"batch_size must be at least 1; got 0"):
            buffer(batch_size=0)

    def test_memory_is_allocated_once_and_no_more_than_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        allocated: list[tuple[int, ...]] = []
        new_empty = Tensor.new_empty

        def watched(self: Tensor, shape: tuple[int, ...]) -> Tensor:
            allocated.append(tuple(shape))
            return new_empty(self, shape)

        monkeypatch.setattr(Tensor, "new_empty", watched)
        list(itertools.islice(buffer(), 60))
        assert allocated == [(24, 2), (24, 1)]  # of 30 rows, 24 in whole batches of a staggered order

    def test_the_whole_pipeline_goes_on_bit_for_bit(self, tiny_model_folder: Callable[[str], Path]) -> None:
        language_model = load_model(ModelConfig(name=str(tiny_model_folder("gpt_neox")), device="cpu"))
        text = partial(TextStream, [text + str(n) for n in range(6) for text in TEXT], held_out_share=0.3)
        make_tokens = partial(
            TokenStream,
            text,
            language_model.tokenizer,
            context_length=16,
            batch_sequences=3,
            pool_tokens=300,
            seed=3,
        )
        activations = partial(ActivationStream, language_model, ["layers.1", "layers.2"], make_tokens)

        def batches(state: State | None, count: int) -> list[tuple[list[Tensor], State]]:
            stream = ShuffleBuffer(activations, batch_size=16, buffer_tokens=100, seed=3, state=state)
            return [(list(values.values()), state) for values, state in itertools.islice(stream, count)]

        whole = batches(None, 16)
        for at in range(12):
            resumed = batches(json.loads(json.dumps(whole[at][1])), 3)
            for (found, found_state), (expected, state) in zip(resumed, whole[at + 1 : at + 4], strict=True):
                assert found_state == state
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class TestTensorStream:
    def test_a_state_of_the_earlier_order_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"^state must have the keys epoch, next_batch; got epoch, batch\. It was"):
            TensorStream(torch.zeros(12, 1), batch_size=3, state={"epoch": 0, "batch": 1})

    def test_an_epoch_serves_each_row_once(self) -> None:
        values_ND = torch.arange(24.0).reshape(12, 2)
        stream = TensorStream(values_ND, batch_size=4, repeat=False)
        rows = torch.cat([values["values"] for values, _ in stream])
        assert torch.equal(rows.sort(0).values, values_ND)
        assert not torch.equal(rows, values_ND)

    def test_epochs_differ_and_hooks_agree(self) -> None:
        values_N1 = torch.arange(12.0)[:, None]
        stream = TensorStream({"a": values_N1, "b": -values_N1}, batch_size=12)
        (first, _), (second, _) = itertools.islice(stream, 2)
        assert not torch.equal(first["a"], second["a"])
        assert torch.equal(first["a"], -first["b"])

    @pytest.mark.parametrize("repeat", [True, False])
    def test_each_state_goes_on_exactly_after_its_batch(self, repeat: bool) -> None:
        values_N1 = torch.arange(14.0)[:, None]

        def batches(state: State | None, count: int) -> list[tuple[list[float], State]]:
            stream = TensorStream(values_N1, batch_size=4, seed=1, repeat=repeat, state=state)
            return [(values["values"][:, 0].tolist(), state) for values, state in itertools.islice(stream, count)]

        whole = batches(None, 12)
        assert len(whole) == (12 if repeat else 3)
        for at, (_, state) in enumerate(whole[:9]):
            assert batches(json.loads(json.dumps(state)), 3) == whole[at + 1 : at + 4]

    def test_memory_mapped_arrays_are_read_by_row(self, tmp_path: Path) -> None:
        values_ND = np.arange(24, dtype=np.float16).reshape(12, 2)
        np.save(tmp_path / "values.npy", values_ND)
        mapped = np.load(tmp_path / "values.npy", mmap_mode="r")
        rows = torch.cat([values["values"] for values, _ in TensorStream(mapped, batch_size=4, repeat=False)])
        assert rows.dtype == torch.float32
        assert torch.equal(rows.sort(0).values, torch.from_numpy(values_ND).float())

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (torch.zeros(3, 4, 5), r"values must be \[tokens, d_in\] .*; got {'values': \(3, 4, 5\)}\. Flatten"),
            (
                {"a": torch.zeros(8, 1), "b": torch.zeros(9, 1)},
                r"the same number of tokens for every hook; got {'a': \(8, 1\), 'b'",
            ),
            ({}, r"values must be \[tokens, d_in\] .*; got {}"),
            (torch.zeros(3, 4), r"batch_size must not exceed the number of activations; got 4 with 3\."),
        ],
    )
    def test_shapes_are_checked(self, values: Any, message: str) -> None:
        with pytest.raises(UserError, match=message):
            TensorStream(values, batch_size=4)
