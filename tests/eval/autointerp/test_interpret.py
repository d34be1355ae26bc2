from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.eval.toys import ToyTokenizer

from kronsae.eval.autointerp.examples import Example, LatentExamples, draw_examples
from kronsae.eval.autointerp.interpret import (
    PLACEHOLDER,
    AutointerpConfig,
    LatentInterpretation,
    Score,
    Trial,
    detection_trials,
    fuzzing_trials,
    interpret_latent,
    score,
    summarise,
)
from kronsae.eval.autointerp.prompts import EXPLANATION, judgements
from kronsae.eval.display import TokenText
from kronsae.eval.firings import Firings, FlatText
from kronsae.support.errors import UserError

ROWS, LENGTH = 400, 20
CONFIG = AutointerpConfig(explained=4, tested=8, per_prompt=4, radius=2)


def text() -> FlatText:
    """400 windows of 20 tokens: token 3 at a random place in each, numbers from 10 on elsewhere."""
    rng = np.random.default_rng(0)
    ids = rng.integers(10, 100, (ROWS, LENGTH))
    ids[np.arange(ROWS), rng.integers(0, LENGTH, ROWS)] = 3
    starts = np.repeat(np.arange(ROWS) * LENGTH, LENGTH)
    return FlatText(ids.reshape(-1).astype(np.int32), starts, starts + LENGTH, np.arange(ROWS * LENGTH))


def firings(where: FlatText, token: int = 3) -> Firings:
    """Active on a token, ever stronger."""
    places = np.flatnonzero(where.ids_L == token)
    return Firings(7, places, np.arange(1.0, len(places) + 1, dtype=np.float32))


def drawn(seed: int = 0, **changes: int) -> LatentExamples:
    where = text()
    sizes = {"explained": 16, "positives": 30, "negatives": 20, "radius": 2} | changes
    return draw_examples(where, firings(where), TokenText(ToyTokenizer()), **sizes, seed=seed)


def test_examples_are_what_they_should_be() -> None:
    found = drawn()
    assert (found.latent, found.active_tokens) == (7, ROWS)
    assert [len(kind) for kind in (found.explained, found.positives, found.negatives)] == [16, 30, 20]
    for example in (*found.explained, *found.positives):
        assert example.active == tuple(token == " t3" for token in example.tokens)
        assert sum(example.active) == 1
        assert 3 <= len(example.tokens) <= 5  # cut off at the window's ends
    for example in found.negatives:
        assert " t3" not in example.tokens
        assert not any(example.active)


def test_explained_are_the_stronger_half() -> None:
    """Activations rise along the text, so the stronger half is its second half."""
    where = text()
    strong = replace(where, ids_L=np.where(np.arange(len(where.ids_L)) < len(where.ids_L) // 2, 5, 6).astype(np.int32))
    found = draw_examples(
        strong, firings(where), TokenText(ToyTokenizer()), explained=50, positives=50, negatives=0, radius=2, seed=0
    )
    assert {token for example in found.explained for token in example.tokens} == {" t6"}
    assert {token for example in found.positives for token in example.tokens} == {" t5", " t6"}


def test_no_token_is_drawn_twice() -> None:
    """Every token has a name of its own, and there is less text than is asked for."""
    starts = np.zeros(300, dtype=np.int64)
    where = FlatText(np.arange(300, dtype=np.int32) + 10, starts, starts + 300, np.arange(300))
    often = Firings(0, np.arange(0, 150), np.ones(150, dtype=np.float32))
    found = draw_examples(
        where, often, TokenText(ToyTokenizer()), explained=10, positives=100, negatives=100, radius=3, seed=1
    )
    tokens = [t for kind in (found.explained, found.positives, found.negatives) for e in kind for t in e.tokens]
    assert len(tokens) == len(set(tokens))
    assert len(found.explained) == 10
    assert 5 < len(found.positives) < 12
    assert 8 < len(found.negatives) < 22


def test_drawing_is_seeded() -> None:
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_latent_without_activations_or_without_silence() -> None:
    where = text()
    never = Firings(1, np.array([], dtype=np.int64), np.array([], dtype=np.float32))
    always = Firings(2, where.kept_N, np.ones(len(where.kept_N), dtype=np.float32))
    sizes = {"explained": 4, "positives": 6, "negatives": 5, "radius": 2, "seed": 0}
    found = draw_examples(where, never, TokenText(ToyTokenizer()), **sizes)
    assert [len(kind) for kind in (found.explained, found.positives, found.negatives)] == [0, 0, 5]
    found = draw_examples(where, always, TokenText(ToyTokenizer()), **sizes)
    assert [len(kind) for kind in (found.explained, found.positives, found.negatives)] == [4, 6, 0]


def test_detection_shows_as_many_of_either_kind_without_highlights() -> None:
    trials = detection_trials(drawn(), 16, np.random.default_rng(0))
    assert sum(trial.truth for trial in trials) == 16
    assert len(trials) == 32
    for trial in trials:
        tokens, marked = trial.example
        assert not any(marked)
        assert (" t3" in tokens) is trial.truth
    assert len({trial.truth for trial in trials[:8]}) == 2  # in random order


def test_fuzzing_is_half_right_a_quarter_mislabelled_a_quarter_not_active() -> None:
    trials = fuzzing_trials(drawn(), 16, np.random.default_rng(0))
    assert len(trials) == 32
    right = [trial for trial in trials if trial.truth]
    mislabelled = [trial for trial in trials if not trial.truth and " t3" in trial.example[0]]
    silent = [trial for trial in trials if not trial.truth and " t3" not in trial.example[0]]
    assert (len(right), len(mislabelled), len(silent)) == (16, 8, 8)
    for trial in right:
        assert [token for token, mark in zip(*trial.example, strict=True) if mark] == [" t3"]
    for trial in (*mislabelled, *silent):
        assert " t3" not in [token for token, mark in zip(*trial.example, strict=True) if mark]
        assert sum(trial.example[1]) == 1
    assert {trial.example[0] for trial in right}.isdisjoint(trial.example[0] for trial in mislabelled)


def test_examples_active_everywhere_are_never_mislabelled() -> None:
    full, part = Example(tokens=("a", "b"), active=(True, True)), Example(tokens=("c", "d"), active=(True, False))
    silent = Example(tokens=("e", "f"), active=(False, False))
    examples = LatentExamples(
        latent=0, active_tokens=9, explained=(full,), positives=(full,) * 8 + (part,), negatives=(silent,) * 9
    )
    trials = fuzzing_trials(examples, 64, np.random.default_rng(0))
    wrong = [trial.example for trial in trials if not trial.truth]
    assert len(trials) == 4
    assert (("c", "d"), (False, True)) in wrong
    assert fuzzing_trials(replace(examples, positives=(full,) * 9), 64, np.random.default_rng(0)) == []


def trials_of(*truths: bool) -> list[Trial]:
    return [Trial((("a",), (False,)), truth) for truth in truths]


def test_score_by_hand() -> None:
    """Batches: all judged; too short, dropped; nonsense, dropped; no answer; judged."""
    batches = [
        trials_of(True, False, True),
        trials_of(True, False),
        trials_of(True),
        trials_of(False),
        trials_of(False),
    ]
    found = score(batches, ["[1, 1, 0]", "[1]", "yes", None, "[0]"])
    assert found == Score(
        balanced_accuracy=(1 / 2 + 1 / 2) / 2,
        true_positives=1,
        positives=2,
        true_negatives=1,
        negatives=2,
        batches=5,
        dropped=2,
        failed=1,
    )
    assert score([trials_of(True, True)], ["[1, 1]"]).balanced_accuracy is None
    assert score([], []) == Score()


def interpreted(
    answer: Callable[[str, str], str | None], examples: LatentExamples | None = None
) -> LatentInterpretation:
    async def ask(instructions: str, content: str, schema: Mapping[str, Any] | None = None) -> str | None:
        assert schema in (EXPLANATION, judgements(len(json.loads(content)["excerpts"])))
        return answer(instructions, content)

    return asyncio.run(interpret_latent(drawn() if examples is None else examples, ask, CONFIG))


def oracle(instructions: str, content: str) -> str | None:
    document = json.loads(content)
    if "explanation" not in document:
        return '{"explanation": "the token t3"}'
    assert document["explanation"] == "the token t3"
    judged = []
    for excerpt in document["excerpts"]:
        marked = [token for segment in excerpt if isinstance(segment, list) for token in segment]
        judged.append(int(all(token == " t3" for token in marked) if marked else " t3 " in f"{excerpt[0]} "))
    return json.dumps(judged)


def test_a_good_explanation_scores_one() -> None:
    found = interpreted(oracle)
    assert found.explanation == "the token t3"
    assert found.detection == Score(
        balanced_accuracy=1.0, true_positives=8, positives=8, true_negatives=8, negatives=8, batches=4
    )
    assert found.fuzzing.balanced_accuracy == 1.0
    assert found.fuzzing.batches == 4


def test_a_useless_judge_scores_a_half() -> None:
    def yes(instructions: str, content: str) -> str:
        document = json.loads(content)
        return json.dumps([1] * len(document["excerpts"])) if "explanation" in document else '{"explanation": "x"}'

    found = interpreted(yes)
    assert found.detection.balanced_accuracy == 0.5
    assert found.fuzzing.balanced_accuracy == 0.5


def test_only_the_explained_examples_are_shown_first() -> None:
    shown: list[str] = []

    def remember(instructions: str, content: str) -> None:
        shown.append(content)

    found = interpreted(remember)
    assert found.problem == "no answer from the language model"
    assert found.detection == found.fuzzing == Score()
    assert len(shown) == 1
    assert len(json.loads(shown[0])["excerpts"]) == 16


def test_problems_are_named() -> None:
    assert interpreted(lambda *_: "fox!").problem == "an answer that cannot be read"
    dead = LatentExamples(latent=0, active_tokens=0, explained=(), positives=(), negatives=())
    assert interpreted(oracle, dead).problem == "never active in the text"


def test_the_placeholder_leads_through_all_questions() -> None:
    asked = []

    def count(instructions: str, content: str) -> str:
        asked.append(content)
        return PLACEHOLDER

    found = interpreted(count)
    assert len(asked) == 1 + 4 + 4
    assert found.detection.dropped == found.fuzzing.dropped == 4


def test_a_summary_by_hand() -> None:
    scores = [Score(balanced_accuracy=value, dropped=1, failed=2) for value in (0.5, 1.0, None)]
    latents = [LatentInterpretation(latent=9 - i, active_tokens=1, detection=one) for i, one in enumerate(scores)]
    latents.append(LatentInterpretation(latent=1, active_tokens=1, problem="x"))
    found = summarise("a", latents, living=40, eligible=20)
    assert [latent.latent for latent in found.latents] == [1, 7, 8, 9]
    assert (found.detection.mean, found.detection.n, found.fuzzing.n) == (0.75, 2, 0)
    assert (found.unexplained, found.dropped, found.failed) == (1, 3, 6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latents": 0}, "latents must be a whole number above 0; got 0"),
        ({"radius": -1}, "radius must be at least 0; got -1"),
        ({"chosen": (3, 3)}, "latents must be distinct indices from 0; got 3, 3"),
        ({"chosen": (-1,)}, "latents must be distinct indices from 0; got -1"),
    ],
)
def test_a_config_that_makes_no_sense(values: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AutointerpConfig(**values)  # type: ignore[arg-type]
