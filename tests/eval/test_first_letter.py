"""Prompts that ask for a first letter."""

from __future__ import annotations

import pytest
from tests.tiny_models import make_tokenizer

from kronsae.errors import UserError
from kronsae.eval.first_letter import first_letter_prompts, vocabulary_words

TOKENIZER = make_tokenizer("gpt2")


def test_the_words_are_tokens_of_letters() -> None:
    words = vocabulary_words(TOKENIZER)
    assert " the" in words
    assert words == sorted(set(words))
    assert all(word.strip().isascii() and word.strip().isalpha() for word in words)


def test_a_prompt_solves_ten_examples_and_asks_for_the_word() -> None:
    prompts = list(first_letter_prompts(TOKENIZER, max_words=100, seed=0))
    assert len(prompts) == 100
    assert sum(prompt.held_out for prompt in prompts) == 20
    words: dict[bool, set[str]] = {False: set(), True: set()}
    for prompt in prompts:
        [span] = prompt.spans
        word = prompt.text[span.start : span.end]
        words[prompt.held_out].add(word)
        assert prompt.text.endswith(f"\n{word} has the first letter:")
        assert span.label == word.strip()[0].lower()
        *solved, _ = prompt.text.split("\n")[1:]
        assert len(solved) == 10
        for line in solved:
            example, letter = line.split(" has the first letter: ")
            assert letter == example.strip()[0].upper()
            assert example != word
    assert len(words[False]) == 80
    assert words[False].isdisjoint(words[True])


def test_equal_seeds_give_equal_prompts() -> None:
    one, same, other = (
        [prompt.text for prompt in first_letter_prompts(TOKENIZER, max_words=80, seed=seed)] for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(UserError, match=r"template must hold \{word\} once"):
        list(first_letter_prompts(TOKENIZER, max_words=80, seed=0, template="a word:"))
    with pytest.raises(UserError, match="needs more than 10 held-out words"):
        list(first_letter_prompts(TOKENIZER, max_words=20, seed=0))
