"""Answers of a form that the model cannot leave, against its own logits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kronsae.chat.local import LocalModel
from kronsae.chat.question import Question
from kronsae.chat.structured import structured_answer
from kronsae.data.model import LanguageModel, ModelConfig, load_model
from kronsae.support.errors import UserError

LIST = {"type": "array", "items": {"type": "integer", "enum": [0, 1]}, "minItems": 3, "maxItems": 3}
OBJECT = {"type": "object", "properties": {"explanation": {"type": "string"}}, "required": ["explanation"]}


@pytest.fixture(params=["llama", "gpt2"])
def loaded(request: pytest.FixtureRequest, tiny_model_folder: Callable[[str], Path]) -> LanguageModel:
    return load_model(ModelConfig(name=str(tiny_model_folder(request.param)), device="cpu"))


def ids(loaded: LanguageModel, text: str) -> torch.Tensor:
    found: torch.Tensor = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return found


def test_a_list_has_the_preferred_number_at_each_place(loaded: LanguageModel) -> None:
    """Compare with the logits of the whole text, read at once, at the first token in which 0 and 1 differ."""
    for prompt in ("the quick fox", "jumps over", "a lazy dog sleeps"):
        text, tokens = structured_answer(loaded.model, loaded.tokenizer, ids(loaded, prompt), LIST, 1)
        found = json.loads(text)
        assert tokens == len(found) == 3
        assert set(found) <= {0, 1}
        for place, number in enumerate(found):
            start = "[" + "".join(f"{one}, " for one in found[:place])
            options = [loaded.tokenizer(f"{start}{one}", add_special_tokens=False)["input_ids"] for one in (0, 1)]
            shared = next(i for i, pair in enumerate(zip(*options, strict=True)) if pair[0] != pair[1])
            read = torch.cat([ids(loaded, prompt), torch.tensor([options[0][:shared]], dtype=torch.int64)], dim=1)
            logits = loaded.model(read).logits[0, -1]
            zero, one = (float(logits[option[shared]]) for option in options)
            assert number == int(one > zero), (zero, one)


def test_a_string_is_the_greedy_continuation_without_quotes_and_lines(loaded: LanguageModel) -> None:
    prompt = ids(loaded, "the quick fox")
    text, tokens = structured_answer(loaded.model, loaded.tokenizer, prompt, OBJECT, 6)
    [(key, value)] = json.loads(text).items()
    assert key == "explanation"
    assert 1 <= tokens <= 6
    opened = torch.cat([prompt, ids(loaded, '{"explanation": "')], dim=1)
    for _ in range(tokens):
        opened = torch.cat([opened, loaded.model(opened).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    free = str(loaded.tokenizer.decode(opened[0, -tokens:], skip_special_tokens=True))
    assert value == free.split("\n")[0].split('"')[0]


def test_a_local_model_is_structured_only_if_asked(loaded: LanguageModel, tmp_path: Path) -> None:
    question = Question(instructions="Be brief.", content="How?", schema=LIST)
    models = [LocalModel(loaded, folder=tmp_path, max_answer_tokens=4, structured=on) for on in (True, False)]
    answers = [asyncio.run(model.answer(question)) for model in models]
    assert len(json.loads(answers[0].text)) == 3
    assert models[0].identity == {**models[1].identity, "structured": True}
    without = asyncio.run(models[0].answer(replace(question, schema=None)))
    assert without == answers[1]


def test_another_schema_is_refused(loaded: LanguageModel) -> None:
    with pytest.raises(UserError, match="a structured answer must be a list of fixed length or an object with one str"):
        structured_answer(loaded.model, loaded.tokenizer, ids(loaded, "the"), {"type": "number"}, 1)
