from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import CAUSAL_KINDS, KINDS, LAYERS, TEXT, WIDTH
from torch import Tensor, nn

from kronsae.data.harvest import ActivationStream, forward, hidden_states, widths
from kronsae.data.model import LanguageModel, ModelConfig, load_model, resolve_hook
from kronsae.data.stream import MakeStream, State
from kronsae.data.text import TextStream
from kronsae.data.tokens import TokenBatch, TokenStream
from kronsae.support.errors import UserError

TEXTS = [TEXT[number % 4] * (1 + number % 3) for number in range(9)]
FolderOf = Callable[[str], Path]


@pytest.fixture
def gpt2(tiny_model_folder: FolderOf) -> LanguageModel:
    return load(tiny_model_folder("gpt2"))


def load(folder: Path, dtype: str = "float32") -> LanguageModel:
    return load_model(ModelConfig(name=str(folder), device="cpu", dtype=dtype))


def tokens(language_model: LanguageModel, texts: list[str] = TEXTS) -> MakeStream[TokenBatch]:
    text = partial(TextStream, texts, held_out_share=0.0, repeat=False)
    return partial(TokenStream, text, language_model.tokenizer, context_length=16, batch_sequences=3)


def first_batch(language_model: LanguageModel) -> TokenBatch:
    return next(iter(tokens(language_model)()))[0]


@contextmanager
def counted(modules: list[nn.Module]) -> Iterator[list[int]]:
    """Count the calls of each module in the context."""
    calls = [0] * len(modules)

    def counter(index: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            calls[index] += 1

        return count

    handles = [module.register_forward_pre_hook(counter(index)) for index, module in enumerate(modules)]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_of_the_model(kind: str, tiny_model_folder: FolderOf) -> None:
    language_model = load(tiny_model_folder(kind))
    batch = first_batch(language_model)
    with torch.no_grad():
        expected = language_model.model(
            input_ids=batch.input_ids_ST, attention_mask=batch.attention_mask_ST, output_hidden_states=True
        ).hidden_states
    found = hidden_states(language_model, [2, 0], batch)
    assert list(found) == ["2", "0"]
    assert torch.equal(found["0"], expected[1])
    assert torch.equal(found["2"], expected[3])
    assert not found["0"].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_after_the_last_needed_module_is_run(kind: str, tiny_model_folder: FolderOf) -> None:
    language_model = load(tiny_model_folder(kind))
    blocks = [resolve_hook(language_model.model, layer).module for layer in range(LAYERS)]
    model: Any = language_model.model
    head = model.get_output_embeddings()
    modules = blocks if head is None else [*blocks, head]
    batch = first_batch(language_model)
    with counted(modules) as calls:
        hidden_states(language_model, [2, "layers.1"], batch)
    assert calls == [1, 1, 1, 0, 0][: len(modules)]
    assert not any(module._forward_hooks for module in language_model.model.modules())
    forward(language_model, batch)  # a stopped pass leaves the model as it was


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_gives_the_kept_rows_in_order(kind: str, tiny_model_folder: FolderOf) -> None:
    language_model = load(tiny_model_folder(kind))
    make_tokens = tokens(language_model)
    stream = ActivationStream(language_model, ["layers.1", 3], make_tokens)
    for (values, state), (batch, token_state) in zip(stream, make_tokens(), strict=True):
        hidden = hidden_states(language_model, ["layers.1", 3], batch)
        assert list(values) == ["layers.1", "3"]
        for hook, rows_ND in values.items():
            assert rows_ND.shape == (batch.num_kept, WIDTH)
            assert torch.equal(rows_ND, hidden[hook][batch.keep_ST])
        assert state == token_state


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_the_kept_rows(kind: str, tiny_model_folder: FolderOf) -> None:
    language_model = load(tiny_model_folder(kind))
    batch = first_batch(language_model)
    short, long = 6, batch.input_ids_ST.shape[1]
    cut = TokenBatch(
        input_ids_ST=batch.input_ids_ST[:1, :short],
        attention_mask_ST=torch.ones(1, short, dtype=torch.int64),
        keep_ST=torch.ones(1, short, dtype=torch.bool),
        documents=("a",),
        offsets=(0,),
    )
    mask_ST = torch.arange(long)[None] < short
    padded = TokenBatch(
        input_ids_ST=batch.input_ids_ST[:1].masked_fill(~mask_ST, 0),
        attention_mask_ST=mask_ST.long(),
        keep_ST=mask_ST,
        documents=("a",),
        offsets=(0,),
    )
    alone = hidden_states(language_model, 2, cut)["2"][0]
    among_padding = hidden_states(language_model, 2, padded)["2"][0, :short]
    torch.testing.assert_close(among_padding, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_are_float32_whatever_the_model_computes_in(dtype: str, tiny_model_folder: FolderOf) -> None:
    language_model = load(tiny_model_folder("llama"), dtype)
    values, _ = next(iter(ActivationStream(language_model, 1, tokens(language_model))))
    assert values["1"].dtype == torch.float32


def test_each_state_goes_on_exactly_after_its_item(gpt2: LanguageModel) -> None:
    def items(state: State | None, count: int = 3) -> list[tuple[Any, Any]]:
        stream = ActivationStream(gpt2, 1, tokens(gpt2), state=state)
        return [(values["1"].tolist(), state) for values, state in itertools.islice(stream, count)]

    whole = items(None, 1000)
    for at, (_, state) in enumerate(whole):
        assert items(json.loads(json.dumps(state))) == whole[at + 1 : at + 4]


@pytest.mark.parametrize("kind", KINDS)
def test_d_in_is_the_width_of_any_module(kind: str, tiny_model_folder: FolderOf) -> None:
    assert widths(load(tiny_model_folder(kind)), "layers.1") == {"layers.1": WIDTH}


# The module whose output is what the MLP of a block is given, by architecture; GPT-NeoX norms it beside attention.
NORM_BEFORE_MLP = {
    "qwen2": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gpt_neox": "post_attention_layernorm",
    "gpt2": "ln_2",
    "llama": "post_attention_layernorm",
}


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_inputs_of_modules(kind: str, tiny_model_folder: FolderOf) -> None:
    """The input of a block is the previous block's output, and that of an MLP the preceding norm's output."""
    language_model = load(tiny_model_folder(kind))
    norm = f"layers.2.{NORM_BEFORE_MLP[kind]}"
    hooks = ["layers.1", "layers.2:input", norm, "layers.2.mlp:input", "layers.2.mlp", "layers.2.mlp:output"]
    found = hidden_states(language_model, hooks, first_batch(language_model))
    assert list(found) == hooks
    assert torch.equal(found["layers.2:input"], found["layers.1"])
    assert torch.equal(found["layers.2.mlp:input"], found[norm])
    assert torch.equal(found["layers.2.mlp:output"], found["layers.2.mlp"])
    mlp = resolve_hook(language_model.model, "layers.2.mlp").module
    assert torch.equal(mlp(found["layers.2.mlp:input"]), found["layers.2.mlp"])
    for hook in ("layers.2.mlp:input", "layers.2.mlp"):  # alone as among others
        assert torch.equal(hidden_states(language_model, hook, first_batch(language_model))[hook], found[hook])
    assert widths(language_model, hooks) == dict.fromkeys(hooks, WIDTH)


def test_a_pass_that_reads_an_input_does_not_run_the_module(gpt2: LanguageModel) -> None:
    mlp = resolve_hook(gpt2.model, "layers.2.mlp.c_fc").module
    with counted([mlp]) as calls:
        hidden_states(gpt2, ["layers.1", "layers.2.mlp:input"], first_batch(gpt2))
    assert calls == [0]


def test_what_is_read_early_is_safe_from_layers_that_write_into_it(gpt2: LanguageModel) -> None:
    def write(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].add_(1.0)

    batch = first_batch(gpt2)
    expected = hidden_states(gpt2, 1, batch)["1"]
    handle = resolve_hook(gpt2.model, 2).module.register_forward_pre_hook(write)
    assert torch.equal(hidden_states(gpt2, [1, 2], batch)["1"], expected)
    handle.remove()


def test_d_in_inside_a_block(gpt2: LanguageModel) -> None:
    assert widths(gpt2, "layers.1.mlp.c_fc") == {"layers.1.mlp.c_fc": 4 * WIDTH}


def test_the_values_can_be_trained_on(gpt2: LanguageModel) -> None:
    values, _ = next(iter(ActivationStream(gpt2, 1, tokens(gpt2))))
    weight = torch.ones(WIDTH, requires_grad=True)
    (values["1"] @ weight).sum().backward()  # inference tensors would refuse
    assert weight.grad is not None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_located(poison: float, gpt2: LanguageModel) -> None:
    make_tokens = tokens(gpt2)
    batches = [batch for batch, _ in make_tokens()]
    calls = itertools.count()

    def spoil(_module: nn.Module, _inputs: object, output: Any) -> Any:
        hidden_STD = (output[0] if isinstance(output, tuple) else output).clone()
        if next(calls) == 2:
            hidden_STD[1, 3, 5] = poison
        return (hidden_STD, *output[1:]) if isinstance(output, tuple) else hidden_STD

    handle = resolve_hook(gpt2.model, 1).module.register_forward_hook(spoil)
    expected = (
        rf"activations must be finite; hook 'layers\.1' gave NaN or infinity in batch 2, document "
        rf"'{batches[2].documents[1]}', token {batches[2].offsets[1] + 3}\."
    )
    with pytest.raises(UserError, match=expected):
        list(ActivationStream(gpt2, "layers.1", make_tokens))
    handle.remove()


def test_what_is_not_finite_in_padding_does_no_harm(gpt2: LanguageModel) -> None:
    make_tokens = tokens(gpt2)
    batches = iter([batch for batch, _ in make_tokens()])

    def spoil(_module: nn.Module, _inputs: object, output: Any) -> Any:
        hidden_STD = (output[0] if isinstance(output, tuple) else output).clone()
        hidden_STD[~next(batches).keep_ST] = float("nan")
        return (hidden_STD, *output[1:]) if isinstance(output, tuple) else hidden_STD

    handle = resolve_hook(gpt2.model, 1).module.register_forward_hook(spoil)
    for values, _ in ActivationStream(gpt2, 1, make_tokens):
        assert values["1"].isfinite().all()
    handle.remove()


def test_hooks_are_checked_before_anything_runs(gpt2: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"got 'layres\.1'\. Did you mean 'layers\.1'\?"):
        ActivationStream(gpt2, "layres.1", tokens(gpt2))
    with pytest.raises(UserError, match=r"hooks must name at least one module; got none"):
        ActivationStream(gpt2, [], tokens(gpt2))


@pytest.mark.parametrize(
    ("kind", "hook", "message"),
    [
        (
            "gpt2",
            "transformer.h",
            r"hook must name a module that is called .*; 'transformer\.h' is not",
        ),
        ("gpt2", "h", r"hook must name a module that is called .*; 'h' \(transformer\.h\) is not"),
        (
            "gpt2",
            "wte:input",
            r"one vector per token as input; 'transformer\.wte:input' gives a tensor of 2 dimensions",
        ),
        ("bert", "pooler", r"one vector per token as output; 'pooler' gives a tensor of 2 dimensions"),
        ("llama", "model", r"one vector per token as output; 'model' gives BaseModelOutputWithPast"),
        ("llama", "rotary_emb", r"'rotary_emb' gives \(1, 16, 8\) for tokens \(3, 16\)"),
    ],
)
def test_modules_without_a_vector_per_token(kind: str, hook: str, message: str, tiny_model_folder: FolderOf) -> None:
    language_model = load(tiny_model_folder(kind))
    with pytest.raises(UserError, match=message):
        hidden_states(language_model, hook, first_batch(language_model))
    assert not any(module._forward_hooks for module in language_model.model.modules())
