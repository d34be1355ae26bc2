"""Labels on characters, found again on the model's tokens; examples drawn as asked."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny_models import make_tokenizer

from kronsae.eval.labelling import Frame, Passage, Sizes, Span, Task, encode, make_task
from kronsae.support.errors import UserError

TOKENIZER = make_tokenizer("gpt2")
FRAME: Frame = ([5], [])


def passage(words: str, label: str, *, held_out: bool = False) -> Passage:
    """A text whose last word is labelled."""
    start = words.rindex(" ") + 1
    return Passage(text=words, spans=(Span(start=start, end=len(words), label=label),), held_out=held_out)


def passages(number: int = 40) -> list[Passage]:
    """Animals and acts, a fourth of them held out, each with a number of its own in front."""
    words = (("fox", "animal"), ("dog", "animal"), ("jumps", "act"), ("writes", "act"))
    return [passage(f"{i} the {words[i % 4][0]}", words[i % 4][1], held_out=i // 4 % 4 == 0) for i in range(number)]


def task(given: list[Passage] | None = None, **changes: Any) -> Task:
    options: dict[str, Any] = {"frame": FRAME, "context_length": 16, "sizes": Sizes(per_word=20, at_least=2)} | changes
    return make_task("words", passages() if given is None else given, TOKENIZER, **options)


def test_a_prompt_is_not_cut() -> None:
    longest = max(len(encode(passage.text, TOKENIZER).ids) for passage in passages())
    frame = len(FRAME[0]) + len(FRAME[1])
    assert task(whole=True, context_length=longest + frame).classes == task(context_length=longest + frame).classes
    with pytest.raises(UserError, match=f"each prompt of this task; one has .* tokens, and {longest - 1} fit"):
        task(whole=True, context_length=longest + frame - 1)


def test_tokens_cover_their_characters() -> None:
    text = "the quick brown füx"
    encoded = encode(text, TOKENIZER)
    for word in ("quick", "brown", "füx"):
        start = text.index(word)
        tokens = encoded.covering(start, start + len(word))
        covered = text[encoded.starts[tokens[0]] : encoded.ends[tokens[-1]]]
        assert covered.strip() == word
    assert encoded.covering(0, 0) == range(0)


def test_an_example_is_the_last_token_of_its_word() -> None:
    found = task()
    texts = []
    for windows in found.windows:
        for row, keep in zip(windows.input_ids_ST, windows.keep_ST, strict=True):
            assert int(row[0]) == 5  # the frame
            place = int(keep.nonzero()[0])
            assert int(keep.sum()) == 1
            texts.append(str(TOKENIZER.decode(row[1 : place + 1].tolist())).split()[-1])
    assert texts == list(found.words)
    assert [found.classes[label] for label in found.labels_E] == [
        "animal" if word in ("fox", "dog") else "act" for word in found.words
    ]


def test_classes_without_enough_examples_are_named() -> None:
    rare = [passage(f"{i} the quick", "manner", held_out=i == 0) for i in range(9)]
    found = task([*passages(), *rare])
    assert found.classes == ("act", "animal")
    assert found.left_out == ("manner",)
    assert task().left_out == ()
    assert task(classes=("act", "animal", "colour")).left_out == ("colour",)


def test_the_next_token_may_be_read_instead() -> None:
    given = [Passage(text=f"{p.text} sum", spans=p.spans, held_out=p.held_out) for p in passages()]
    last, following = task(given), task(given, place="next")
    moved = last.windows[0].keep_ST.roll(1, dims=1)
    assert torch.equal(following.windows[0].keep_ST, moved)
    with pytest.raises(UserError, match="at least two classes"):
        task(place="next")  # nothing follows the last word


def test_windows_are_cut_as_for_training() -> None:
    long = [Passage(text="the fox " * 30, spans=p.spans, held_out=p.held_out) for p in passages()]
    spans = tuple(Span(start=8 * i + 4, end=8 * i + 7, label=("a", "b")[i % 2]) for i in range(30))
    given = [Passage(text=p.text, spans=spans, held_out=p.held_out) for p in long]
    found = task(given, sizes=Sizes(windows=8, per_word=100, at_least=2))
    ids = encode(long[0].text, TOKENIZER).ids
    rows = {tuple(row[1:].tolist()) for windows in found.windows for row in windows.input_ids_ST}
    whole = {tuple(ids[i : i + 15]) for i in range(0, len(ids), 15)}
    assert {row[: len(next(iter(whole)))] for row in rows} & whole
    held_out = found.held_out_E.sum()
    assert 0 < held_out < len(found.held_out_E)
    assert sum(len(windows) for windows in found.windows) <= 8 + 2


def test_no_more_of_a_word_than_asked() -> None:
    found = task(sizes=Sizes(per_word=2, at_least=2))
    sides = Counter(zip(found.words, found.held_out_E.tolist(), strict=True))
    assert set(sides.values()) == {2}
    fewer = task(sizes=Sizes(per_class=8, per_word=20, at_least=2))
    assert Counter(fewer.labels_E[~fewer.held_out_E].tolist()) == {0: 8, 1: 8}
    assert Counter(fewer.labels_E[fewer.held_out_E].tolist()) == {0: 2, 1: 2}


def test_equal_seeds_draw_equal_examples() -> None:
    small = Sizes(windows=20, per_word=20, at_least=1)
    one, same, other = (task(seed=seed, sizes=small) for seed in (0, 0, 1))
    assert one.digest() == same.digest()
    assert one.digest() != other.digest()


def test_a_class_with_too_few_examples_is_left_out() -> None:
    rare = [passage("a lazy quick", "how"), *passages()]
    assert task(rare).classes == ("act", "animal")
    assert task(rare, classes=("animal", "how", "act")).classes == ("animal", "act")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"given": passages(4)}, "'words' has 0 of 2"),
        ({"context_length": 1}, "context_length must be larger than the number of special tokens"),
    ],
)
def test_what_gives_no_task_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(**changes)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(UserError, match="the tokenizer must give the character offsets of its tokens"):
        encode("x", SimpleNamespace(is_fast=False))
    with pytest.raises(UserError, match="per_word must be at least 1"):
        Sizes(per_word=0)
