"""What the runner does before SAEBench is called; tests/interop_real/saebench runs it."""

from __future__ import annotations

from collections import Counter

from kronsae.interop.saebench_job import WORDS_PER_LETTER
from kronsae.interop.saebench_runner import _some_words

WORDS = [f" a{number}" for number in range(500)] + [f"Z{number}" for number in range(15)] + ["q1", " q2"]


def all_words(tokenizer: object, *, replace_special_chars: bool = True) -> list[str]:
    assert tokenizer == "tokenizer"
    return list(WORDS)


def test_a_selection_of_words_has_words_of_every_letter() -> None:
    found = _some_words(all_words, 40, 0, "tokenizer", replace_special_chars=True)
    assert len(found) == len(set(found)) == 40
    letters = Counter(word.strip()[0].lower() for word in found)
    assert letters["q"] == 2
    assert letters["z"] >= WORDS_PER_LETTER
    assert found == _some_words(all_words, 40, 0, "tokenizer")
    assert found != _some_words(all_words, 40, 1, "tokenizer")


def test_a_large_selection_is_all_words() -> None:
    assert sorted(_some_words(all_words, 10_000, 0, "tokenizer")) == sorted(WORDS)
