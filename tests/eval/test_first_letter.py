"""Prompts that ask for a first letter."""

from __future__ import annotations

import pytest
from tests.tiny_models import make_tokenizer

from kronsae.eval.first_letter import first_letter_prompts, vocabulary_words
from kronsae.support.errors import UserError

TOKENIZER = make_tokenizer("gpt2")


def test_the_words_are_tokens_of_letters() -> None:
    words = vocabulary_words(TOKENIZER)
    assert " the" in words
    assert words == sorted(set(words))
    assert all(word.strip().isascii() and word.strip().isalpha() for word in words)


def test_a_prompt_solves_ten_examples_and_asks_for_the_word() -> None:
    prompts = list(first_letter_prompts(TOKENIZER, max_words=100, seed=0))
    assert len(prompts) == 100
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
            assert example.strip().lower() != word.strip().lower()
    sides = [{word.strip().lower() for word in side} for side in words.values()]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0]) == int(0.8 * len(sides[0] | sides[1]))
    assert len(words[False] | words[True]) == 100


class Spellings:
    """A tokenizer whose every word is there four times: with and without a space, with a capital and without."""

    words = tuple(f"{letter}{second}" for letter in "abcdefgh" for second in "opqrstuv")

    def get_vocab(self) -> dict[str, int]:
        spellings = [s for word in self.words for s in (word, f" {word}", word.title(), f" {word.title()}")]
        return {spelling: number for number, spelling in enumerate(spellings)}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def test_two_spellings_of_a_word_are_on_one_side() -> None:
    sides: dict[bool, set[str]] = {False: set(), True: set()}
    for prompt in first_letter_prompts(Spellings(), max_words=1000, seed=0):
        lines = [line.split(" has the first letter:")[0].strip().lower() for line in prompt.text.split("\n")[1:]]
        assert lines[-1] not in lines[:-1]  # an example in another spelling would solve the question
        sides[prompt.held_out].update(lines)
    assert sides[False].isdisjoint(sides[True])
    assert sides[False] | sides[True] == set(Spellings.words)
    assert len(sides[True]) == 13  # a fifth of the 64 words


def test_equal_seeds_give_equal_prompts() -> None:
    one, same, other = (
        [prompt.text for prompt in first_letter_prompts(TOKENIZER, max_words=80, seed=seed)] for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(UserError, match=r"template must contain \{word\} exactly once"):
        list(first_letter_prompts(TOKENIZER, max_words=80, seed=0, template="a word:"))
    with pytest.raises(
        UserError, match=r"more than 10 distinct held-out words; got .* after drawing 20 of the vocabulary's .* words"
    ):
        list(first_letter_prompts(TOKENIZER, max_words=20, seed=0))
