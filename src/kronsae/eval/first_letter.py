"""SAEBench's first-letter task: words of the model's vocabulary in prompts that ask for their first letter."""

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
    """Return the tokens that consist of ASCII letters, with or without a leading space, sorted."""
    tokens = (tokenizer.convert_tokens_to_string([token]) for token in sorted(tokenizer.get_vocab()))
    words = {word for word in tokens if word.removeprefix(" ") and set(word.removeprefix(" ")) <= _LETTERS}
    return sorted(words)


_LETTERS = frozenset(string.ascii_letters)


def first_letter_prompts(tokenizer: Any, *, max_words: int, seed: int, template: str = TEMPLATE) -> Iterator[Passage]:
    """Yield a prompt for each word: ten solved examples, then the word, whose last token is read.

    80% of the words are for training, the rest are held out. The solved examples are other words of the same split.
    Spellings of one word (``" Word"``, ``"word"``) are treated as one word: they are in the same split, and none is a
    solved example for another. SAEBench reads the sixth token from the end. Here the token is found by the word's
    character offsets. Both are the same token if each word of the template is one token; otherwise only the offsets
    are correct.

    Args:
        max_words: maximum number of words to draw, in random order; each spelling counts as one.
        seed: seed of the words, the split and the solved examples.
        template: must contain ``{word}`` exactly once.

    Raises:
        UserError: the template does not contain ``{word}`` exactly once, or the vocabulary has too few words.
    """
    if template.count("{word}") != 1:
        raise UserError(f"template must contain {{word}} exactly once; got '{template}'.")
    rng = np.random.default_rng(seed)
    words = vocabulary_words(tokenizer)
    drawn = [words[i] for i in rng.permutation(len(words))[:max_words]]
    different = list(dict.fromkeys(map(_folded, drawn)))
    learnt = set(different[: int(len(different) * TRAIN_SHARE)])
    if len(different) - len(learnt) <= EXAMPLES:
        raise UserError(
            f"the first-letter task needs more than {EXAMPLES} distinct held-out words; got "
            f"{len(different) - len(learnt)} after drawing {len(drawn):,} of the vocabulary's {len(words):,} words of "
            "ASCII letters. Draw more words, or choose another task."
        )
    for held_out in (False, True):
        side = [word for word in drawn if (_folded(word) in learnt) != held_out]
        for word in side:
            yield _prompt(word, _solved(word, side, rng), template, held_out)


def _folded(word: str) -> str:
    return word.strip().lower()


def _solved(word: str, side: list[str], rng: np.random.Generator) -> list[str]:
    """Return ten distinct words of a split; none is another spelling of the word itself."""
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
