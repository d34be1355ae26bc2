from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny_models import CAUSAL_KINDS, KINDS, TEXT, WIDTH, make_model, make_tokenizer

from kronsae.data import harvest
from kronsae.data.harvest import ActivationStream, hidden_states, kept_rows, read_points_and_output
from kronsae.data.model import LanguageModel, ModelConfig, load_model, resolve_hook
from kronsae.data.passes import PassSize, depends_on_longest, is_out_of_memory, window_groups, window_lengths
from kronsae.data.prefetch import Prefetched
from kronsae.data.stream import MakeStream, State
from kronsae.data.text import TextStream
from kronsae.data.tokens import TokenBatch, TokenStream
from kronsae.support.errors import UserError

FolderOf = Callable[[str], Path]


def load(folder: Path, size: tuple[int | None, int]) -> LanguageModel:
    """Load a model whose passes are of a given size: most tokens, and the fixed tokens of a pass."""
    language_model = load_model(ModelConfig(name=str(folder), device="cpu"))
    language_model.pass_size.most_tokens, language_model.pass_size.fixed_tokens = size
    return language_model


def tokens(language_model: LanguageModel, windows: int = 8) -> MakeStream[TokenBatch]:
    texts = [TEXT[number % 4][: 9 + 11 * (number % 7)] + str(number) for number in range(40)]
    text = partial(TextStream, texts, held_out_share=0.0, repeat=False)
    return partial(
        TokenStream, text, language_model.tokenizer, context_length=24, batch_sequences=windows, pool_tokens=480
    )


def first_batch(language_model: LanguageModel) -> TokenBatch:
    return next(iter(tokens(language_model)()))[0]


@contextmanager
def passes(language_model: LanguageModel, memory_tokens: float = float("inf")) -> Iterator[list[tuple[int, ...]]]:
    """Record the shape of each pass; one of more than ``memory_tokens`` tokens runs out of memory."""
    shapes: list[tuple[int, ...]] = []

    def see(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))
        if kwargs["input_ids"].numel() > memory_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    handle = language_model.model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def divisions(items: list[int]) -> Iterator[list[list[int]]]:
    """Yield every division of items into groups."""
    if not items:
        yield []
        return
    for rest in divisions(items[1:]):
        yield [[items[0]], *rest]
        for at in range(len(rest)):
            yield [*rest[:at], [items[0], *rest[at]], *rest[at + 1 :]]


def groups_cost(groups: list[list[int]], lengths: list[int], most: int | None, fixed: int) -> float:
    cost = 0.0
    for group in groups:
        size = len(group) * max(lengths[index] for index in group)
        cost += float("inf") if most is not None and size > most and len(group) > 1 else size + fixed
    return cost


@pytest.mark.parametrize("most", [None, 10, 24, 7])
@pytest.mark.parametrize("fixed", [0, 3, 100])
def test_no_division_of_the_windows_takes_less_time(most: int | None, fixed: int) -> None:
    generator = torch.Generator().manual_seed(fixed)
    for count in (1, 2, 5, 7):
        lengths = torch.randint(1, 13, (count,), generator=generator).tolist()
        found = window_groups(lengths, most, fixed)
        assert sorted(index for group in found for index in group) == list(range(count))
        assert all(group == sorted(group) for group in found)
        least = min(groups_cost(division, lengths, most, fixed) for division in divisions(list(range(count))))
        assert groups_cost(found, lengths, most, fixed) == least


def test_windows_of_one_length_are_divided_by_the_size_only() -> None:
    assert window_groups([8] * 5, None, 3) == [[0, 1, 2, 3, 4]]
    assert sorted(map(len, window_groups([8] * 5, 16, 3))) == [1, 2, 2]
    assert window_groups([8, 8], 7, 3) == [[0], [1]]  # one window is never too much
    assert window_groups([8, 2, 8, 2], None, 3) == [[0, 2], [1, 3]]
    assert window_groups([8, 2, 8, 2], None, 100) == [[0, 1, 2, 3]]


def test_the_length_of_a_window_ends_with_its_last_token() -> None:
    mask_ST = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    batch = TokenBatch(
        input_ids_ST=mask_ST,
        attention_mask_ST=mask_ST,
        keep_ST=mask_ST == 1,
        documents=("a",) * 4,
        offsets=(0,) * 4,
    )
    assert window_lengths(batch) == [4, 2, 3, 1]


def test_the_size_depends_on_device_and_threads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for threads in (1, 2, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        sizes.append(PassSize.on(torch.device("cpu")).most_tokens)
    assert sizes == [1024, 1024, 32_768]
    assert PassSize.on(torch.device("cuda")).most_tokens is None


@pytest.mark.parametrize("kind", KINDS)
def test_parts_give_what_the_whole_batch_gives(kind: str, tiny_model_folder: FolderOf) -> None:
    whole, divided = (load(tiny_model_folder(kind), size) for size in ((None, 10**6), (60, 0)))
    batch = first_batch(whole)
    hooks = ["layers.1", "layers.2.mlp:input" if kind in ("llama", "qwen2") else "layers.2"]
    with passes(whole) as once:
        expected = hidden_states(whole, hooks, batch)
    with passes(divided) as several:
        found = hidden_states(divided, hooks, batch)
    assert once == [tuple(batch.input_ids_ST.shape)]
    assert len(several) > 2
    assert all(windows * columns <= 60 or windows == 1 for windows, columns in several)
    assert sum(windows for windows, _ in several) == len(batch.input_ids_ST)
    assert sum(windows * columns for windows, columns in several) < batch.input_ids_ST.numel()
    assert list(found) == hooks
    for hook in hooks:
        assert found[hook].shape == (*batch.input_ids_ST.shape, WIDTH)
        torch.testing.assert_close(found[hook][batch.keep_ST], expected[hook][batch.keep_ST], rtol=1e-5, atol=1e-6)
    for language_model, hidden in ((whole, expected), (divided, found)):
        for hook, rows_ND in kept_rows(language_model, hooks, batch).items():
            assert torch.equal(rows_ND, hidden[hook][batch.keep_ST])


def test_windows_keep_the_columns_on_which_their_rotation_depends(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 12}
    rope |= {"factor": 64 / 12, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    model = make_model("llama")
    model.config.rope_parameters = rope
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 50  # attention depends on positions
    model.save_pretrained(tmp_path)
    make_tokenizer("llama").save_pretrained(tmp_path)
    whole, divided = (load(tmp_path, size) for size in ((None, 10**6), (60, 0)))
    assert divided.pass_size.all_columns
    batch = first_batch(whole)
    assert min(window_lengths(batch)) < 12 < batch.input_ids_ST.shape[1]
    expected = hidden_states(whole, 1, batch)["1"]
    with passes(divided) as several:
        found = hidden_states(divided, 1, batch)["1"]
    assert several == [(2, 24)] * 4
    torch.testing.assert_close(found[batch.keep_ST], expected[batch.keep_ST], rtol=1e-5, atol=1e-6)
    divided.pass_size.all_columns = False
    other = hidden_states(divided, 1, batch)["1"]
    assert not torch.allclose(other[batch.keep_ST], expected[batch.keep_ST], rtol=1e-3, atol=1e-4)


def test_which_rotations_depend_on_the_longest_window() -> None:
    for rope in ({"rope_type": "dynamic"}, {"type": "longrope"}, {"full": {"rope_type": "dynamic"}, "other": {}}):
        assert depends_on_longest(SimpleNamespace(rope_parameters=rope))
        assert depends_on_longest(SimpleNamespace(rope_scaling=rope))
    for config in (SimpleNamespace(), SimpleNamespace(rope_scaling=None), make_model("llama").config):
        assert not depends_on_longest(config)


@pytest.mark.parametrize("kind", CAUSAL_KINDS[:2])
def test_a_stream_in_parts_goes_on_with_the_same_bits(kind: str, tiny_model_folder: FolderOf) -> None:
    def items(state: State | None) -> list[tuple[Any, State]]:
        language_model = load(tiny_model_folder(kind), (60, 4))
        stream = ActivationStream(language_model, 1, tokens(language_model), state=state)
        return [(values["1"].tolist(), state) for values, state in stream]

    whole = items(None)
    assert len(whole) > 4
    for at in (0, 3):
        assert items(json.loads(json.dumps(whole[at][1]))) == whole[at + 1 :]


def test_a_pass_that_runs_out_of_memory_is_repeated_in_halves(
    tiny_model_folder: FolderOf, capsys: pytest.CaptureFixture[str]
) -> None:
    roomy, tight = (load(tiny_model_folder("llama"), (None, 10**6)) for _ in range(2))
    batches = [batch for batch, _ in itertools.islice(tokens(roomy)(), 2)]
    assert all(batch.input_ids_ST.shape == (8, 24) for batch in batches)
    with passes(tight, memory_tokens=50) as shapes:
        found = [hidden_states(tight, 2, batch)["2"] for batch in batches]
    assert shapes[:2] == [(8, 24), (4, 24)]
    assert len(shapes) == 2 + 4 + 4  # the second batch is not tried as a whole
    assert all(windows == 2 for windows, _ in shapes[2:])
    assert tight.pass_size.most_tokens == 48
    for batch, hidden_STD in zip(batches, found, strict=True):
        expected = hidden_states(roomy, 2, batch)["2"]
        torch.testing.assert_close(hidden_STD[batch.keep_ST], expected[batch.keep_ST], rtol=1e-5, atol=1e-6)
    assert capsys.readouterr().err.splitlines() == [
        "The model's pass over 8 windows of 24 tokens ran out of memory; it goes on with at most 96 tokens at once.",
        "The model's pass over 4 windows of 24 tokens ran out of memory; it goes on with at most 48 tokens at once.",
    ]


def test_only_the_windows_still_to_be_read_are_divided_anew(tiny_model_folder: FolderOf) -> None:
    language_model = load(tiny_model_folder("llama"), (96, 0))
    batch = first_batch(language_model)
    expected = hidden_states(load(tiny_model_folder("llama"), (None, 10**6)), 2, batch)["2"]
    read: list[int] = []

    def see(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        if len(read) == 1 and kwargs["input_ids"].shape[0] > 1:
            read.append(0)
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB")
        read.append(len(kwargs["input_ids"]))

    language_model.model.register_forward_pre_hook(see, with_kwargs=True)
    found = hidden_states(language_model, 2, batch)["2"]
    assert sum(read) == len(batch.input_ids_ST)  # no window twice
    torch.testing.assert_close(found[batch.keep_ST], expected[batch.keep_ST], rtol=1e-5, atol=1e-6)


def test_a_single_window_that_does_not_fit_is_an_error(tiny_model_folder: FolderOf) -> None:
    language_model = load(tiny_model_folder("gpt2"), (None, 10**6))
    with passes(language_model, memory_tokens=20), pytest.raises(UserError) as caught:
        hidden_states(language_model, 2, first_batch(language_model))
    assert str(caught.value) == (
        "context_length must be so small that the model can read one window; the memory of cpu does not suffice for "
        "one of 24 tokens. Give a smaller context_length, or dtype=bfloat16."
    )
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_half_of_an_odd_number_of_windows_is_rounded_up(tiny_model_folder: FolderOf) -> None:
    language_model = load(tiny_model_folder("llama"), (None, 10**6))
    with passes(language_model, memory_tokens=50) as shapes:
        hidden_states(language_model, 2, next(iter(tokens(language_model, windows=3)()))[0])
    assert shapes[:2] == [(3, 24), (2, 24)]
    assert language_model.pass_size.most_tokens == 48


@pytest.mark.parametrize("hooks", [[2], [1, 2]])
@pytest.mark.parametrize("function", ["new_zeros", "new_empty", "float"])
def test_activations_of_a_batch_that_do_not_fit_are_an_error(
    function: str, hooks: list[int], tiny_model_folder: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model = load(tiny_model_folder("llama"), (60, 4))
    batch = first_batch(language_model)
    read = hidden_states if function == "new_zeros" else kept_rows
    read(language_model, hooks, batch)

    real = harvest._read_part

    def refuse(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB")

    def read_part(*arguments: Any) -> Any:
        found = real(*arguments)
        monkeypatch.setattr(torch.Tensor, function, refuse)
        return found

    monkeypatch.setattr(harvest, "_read_part", read_part)
    with passes(language_model) as shapes, pytest.raises(UserError) as caught:
        read(language_model, hooks, batch)
    monkeypatch.undo()
    assert str(caught.value) == (
        "model_batch must be so small that the activations of one batch fit into memory; that of cpu does not suffice "
        f"for 8 windows of 24 tokens at {len(hooks)} hook(s). Give a smaller model_batch, or fewer hooks."
    )
    assert "1 TB" in str(caught.value.__cause__)
    assert len(shapes) == 1
    assert language_model.pass_size.most_tokens == 60


def test_an_undivided_pass_that_does_not_fit_is_an_error(tiny_model_folder: FolderOf) -> None:
    language_model = load(tiny_model_folder("llama"), (60, 4))
    points = {"2": resolve_hook(language_model.model, 2)}
    batch = first_batch(language_model)
    with passes(language_model, memory_tokens=100), pytest.raises(UserError, match=r"^model_batch must be so small"):
        read_points_and_output(language_model, points, batch)


def test_other_errors_of_the_model_are_not_taken_for_lack_of_memory(tiny_model_folder: FolderOf) -> None:
    language_model = load(tiny_model_folder("gpt2"), (None, 10**6))

    def fail(_module: object, _args: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    language_model.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        hidden_states(language_model, 2, first_batch(language_model))
    assert language_model.pass_size.most_tokens is None


def test_what_is_lack_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("not enough memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory that count allocations are Linux's")
def test_lack_of_memory_is_known_wherever_it_shows(tmp_path: Path) -> None:
    """Under each limit that allows less than GELU takes, which PyTorch leaves to oneDNN, or all that it takes."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = done.stdout.splitlines()
    assert "computed" in ends
    assert "refused: True" in ends
    assert not [end for end in ends if end.startswith("refused: False")]


# Each limit has a process of its own. Where even less is left than an exception takes, a process is killed.
LIMITED = """
import os, resource
import torch
from kronsae.data.passes import is_out_of_memory
torch.set_num_threads(1)

def try_with(more):
    x = torch.ones(100_000)
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    limit = 1024 * (int(status["VmData"].split()[0]) + more)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        torch.nn.functional.gelu(x)
        end = "computed"
    except (RuntimeError, MemoryError) as error:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        end = f"refused: {is_out_of_memory(error)} {'' if is_out_of_memory(error) else error}".strip()
    print(end, flush=True)

for more in (*range(0, 900, 60), 64_000):
    if not (child := os.fork()):
        try_with(more)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_reading_ahead_changes_nothing(tiny_model_folder: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = load(tiny_model_folder("gpt2"), (60, 4))
    used = []

    def ahead(stream: Iterable[Any]) -> Prefetched[Any]:
        used.append(stream)
        return Prefetched(stream)

    def items() -> list[tuple[Any, State]]:
        return [(v["1"].tolist(), state) for v, state in ActivationStream(language_model, 1, tokens(language_model))]

    monkeypatch.setattr(harvest, "Prefetched", ahead)
    expected = items()
    assert not used
    assert [harvest.reads_ahead(torch.device(name)) for name in ("cpu", "cuda")] == [False, True]
    monkeypatch.setattr(harvest, "reads_ahead", lambda device: True)
    assert items() == expected
    assert len(used) == 1
