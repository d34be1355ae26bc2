"""SAEBench's first-letter task: words of the model's own vocabulary in prompts that ask for their first letter."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any

import numpy as np

from kronsae.eval.labelling import Passage, Span
from kronsae.support.errors import UserError

TEMPLATE = "{word} has the first letter:"
EXAMPLES = 10
TRAIN_SHARE = 0.8


def vocabulary_words(tokenizer: Any) -> list[str]:
    """The tokens that are ASCII letters, with or without a space in front, in alphabetical order."""
    tokens = (tokenizer.convert_tokens_to_string([token]) for token in sorted(tokenizer.get_vocab()))
    words = {word for word in tokens if word.removeprefix(" ") and set(word.removeprefix(" ")) <= _LETTERS}
    return sorted(words)


_LETTERS = frozenset(string.ascii_letters)


def first_letter_prompts(tokenizer: Any, *, max_words: int, seed: int, template: str = TEMPLATE) -> Iterator[Passage]:
    """A prompt for each word: ten solved examples, then the word, whose last token is to be read.

    80% of the words are learnt from, the rest scored on; the solved examples are words of the same side, never the
    word itself. Spellings of one word (``" Word"``, ``"word"``) count as one here: they are on the same side, and none
    is a solved example for another. (In SAEBench the token is the sixth from the end: here it is found by the word's
    characters, which is the same token where the template's words are one token each, and right where they are not.)

    Args:
        max_words: how many words are drawn at random, each spelling counting; their order is random too.
        seed: of the words, the split and the solved examples.
        template: must hold ``{word}`` once.

    Raises:
        UserError: the template has no ``{word}``, or the vocabulary too few words.
    """
    if template.count("{word}") != 1:
        raise UserError(f"template must hold {{word}} once; got '{template}'.")
    rng = np.random.default_rng(seed)
    words = vocabulary_words(tokenizer)
    drawn = [words[i] for i in rng.permutation(len(words))[:max_words]]
    different = list(dict.fromkeys(map(_folded, drawn)))
    learnt = set(different[: int(len(different) * TRAIN_SHARE)])
    if len(different) - len(learnt) <= EXAMPLES:
        raise UserError(
            f"the first-letter task needs more than {EXAMPLES} held-out words; of the vocabulary's {len(words):,} "
            f"words of ASCII letters {len(drawn):,} were drawn, {len(different) - len(learnt)} different ones are held "
            "out. Ask for more, or choose another task."
        )
    for held_out in (False, True):
        side = [word for word in drawn if (_folded(word) in learnt) != held_out]
        for word in side:
            yield _prompt(word, _solved(word, side, rng), template, held_out)


def _folded(word: str) -> str:
    return word.strip().lower()


def _solved(word: str, side: list[str], rng: np.random.Generator) -> list[str]:
    """Ten different words of a side, none of them the word itself in another spelling."""
    found: dict[str, str] = {}
    while len(found) < EXAMPLES:
        for i in rng.integers(len(side), size=4 * EXAMPLES).tolist():
            if _folded(side[i]) != _folded(word):
                found.setdefault(_folded(side[i]), side[i])
    return list(found.values())[:EXAMPLES]


def _prompt(word: str, solved: list[str], template: str, held_out: bool) -> Passage:
    before = "".join(f"\n{template.replace('{word}', other)} {_letter(other).upper()}" for other in solved)
    head, tail = template.split("{word}")
    start = len(before) + 1 + len(head)
    span = Span(start=start, end=start + len(word), label=_letter(word))
    return Passage(text=f"{before}\n{head}{word}{tail}", spans=(span,), held_out=held_out)


def _letter(word: str) -> str:
    return word.strip()[0].lower()
