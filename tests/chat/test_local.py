from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kronsae.chat.local import LocalModel, fingerprint
from kronsae.chat.question import Answer, Question
from kronsae.data.model import ModelConfig, load_model
from kronsae.support.errors import UserError

QUESTION = Question(instructions="Be brief.", content="How are you?")


def local(folder: Path, *, max_answer_tokens: int = 8) -> LocalModel:
    loaded = load_model(ModelConfig(name=str(folder), device="cpu"))
    return LocalModel(loaded, folder=folder, max_answer_tokens=max_answer_tokens)


def answer(model: LocalModel, question: Question = QUESTION) -> Answer:
    return asyncio.run(model.answer(question))


def test_greedy_answers_are_the_same_and_leave_the_seed_alone(tiny_model_folder: Callable[[str], Path]) -> None:
    model = local(tiny_model_folder("llama"))
    before = torch.random.get_rng_state()
    first, second = answer(model), answer(model)
    assert first == second
    assert torch.equal(before, torch.random.get_rng_state())
    assert 1 <= first.tokens_out <= 8
    assert first.tokens_in > 10


def test_greedy_is_the_largest_logit_each_time(tiny_model_folder: Callable[[str], Path]) -> None:
    folder = tiny_model_folder("gpt_neox")
    loaded = load_model(ModelConfig(name=str(folder), device="cpu"))
    found = answer(LocalModel(loaded, folder=folder, max_answer_tokens=4))
    ids = loaded.tokenizer("Be brief.\n\nHow are you?\n\nAnswer: ", return_tensors="pt")["input_ids"]
    assert found.tokens_in == ids.shape[1]
    for _ in range(found.tokens_out):
        ids = torch.cat([ids, loaded.model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert found.text == loaded.tokenizer.decode(ids[0, found.tokens_in :], skip_special_tokens=True)


@pytest.mark.parametrize("system_role", [True, False])
def test_a_chat_template_is_used(system_role: bool, tiny_model_folder: Callable[[str], Path]) -> None:
    folder = tiny_model_folder("gpt2")
    loaded = load_model(ModelConfig(name=str(folder), device="cpu"))
    refusal = "" if system_role else "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = "{% for m in messages %}" + refusal + "({{ m.role }}){{ m.content }}{% endfor %}(assistant)"
    loaded.tokenizer.chat_template = template
    asked: list[str] = []
    tokenize = loaded.tokenizer

    class Listening:
        """The tokenizer, remembering what text it was given."""

        def __getattr__(self, name: str) -> object:
            return getattr(tokenize, name)

        def __call__(self, text: str, **options: object) -> object:
            asked.append(text)
            return tokenize(text, **options)

    object.__setattr__(loaded, "tokenizer", Listening())
    answer(LocalModel(loaded, folder=folder, max_answer_tokens=2))
    expected = "(system)Be brief.(user)How are you?" if system_role else "(user)Be brief.\n\nHow are you?"
    assert asked == [f"{expected}(assistant)"]


def test_a_question_that_is_too_long_is_told(tiny_model_folder: Callable[[str], Path]) -> None:
    long = Question(instructions="", content="word " * 100)
    with pytest.raises(UserError, match=r"takes 64 tokens, but a question needs \d+ and 8 for its answer"):
        answer(local(tiny_model_folder("llama")), long)


def test_an_encoder_cannot_answer(tiny_model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="must answer questions, but cannot"):
        local(tiny_model_folder("bert"))


def test_the_identity_tells_models_and_settings_apart(tiny_model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model_folder("llama")
    one, other = local(folder), local(folder, max_answer_tokens=9)
    assert one.identity != other.identity
    assert one.identity == local(folder).identity
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert fingerprint(tmp_path) != before
