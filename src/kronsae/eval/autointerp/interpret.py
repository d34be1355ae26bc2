"""Interpretation of one latent at a time: explain it, score the explanation by two tests, count failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from kronsae.core.checks import check_count, check_seed
from kronsae.eval.autointerp.examples import Example, LatentExamples
from kronsae.eval.autointerp.prompts import (
    DETECT,
    EXPLANATION,
    FUZZ,
    Highlighted,
    explain_prompt,
    judge_prompt,
    judgements,
    read_explanation,
    read_judgements,
)
from kronsae.eval.scores import Mean, balanced_accuracy, mean_of
from kronsae.support.errors import UserError

PLACEHOLDER = json.dumps({"explanation": "x" * 240})
"""A placeholder answer for estimating the number of prompts: an explanation of typical length, and no judgements."""


class Ask(Protocol):
    """Callable that answers a prompt, whose answer has a JSON schema; returns None if there is no answer."""

    async def __call__(
        self, instructions: str, content: str, schema: Mapping[str, Any] | None = None
    ) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class AutointerpConfig:
    """Settings of automated interpretation.

    Args:
        latents: number of latents per SAE, drawn at random from those active on at least ``min_active_tokens`` tokens.
        chosen: indices of latents to use instead, in every SAE.
        tokens: maximum number of held-out tokens to search for examples.
        radius: tokens on either side of the place an example is drawn for (paper: 15, so 31 in total).
        explained: number of examples for an explanation, at or above the median activation (paper: 16).
        tested: maximum number of positive examples, and of negative ones, per test (paper: 64).
        per_prompt: number of examples judged in one prompt (paper: 8).
        min_active_tokens: latents active on fewer tokens are not drawn, because they have too few examples.
        seed: seed of the choice and order of latents and examples.
    """

    latents: int = 20
    chosen: tuple[int, ...] = ()
    tokens: int = 500_000
    radius: int = 15
    explained: int = 16
    tested: int = 64
    per_prompt: int = 8
    min_active_tokens: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("latents", "tokens", "explained", "tested", "per_prompt", "min_active_tokens"):
            check_count(name, getattr(self, name))
        check_seed(self.seed)
        if self.radius < 0:
            raise UserError(f"radius must be at least 0; got {self.radius!r}.")
        if len(set(self.chosen)) != len(self.chosen) or any(latent < 0 for latent in self.chosen):
            raise UserError(f"latents must be distinct indices from 0; got {', '.join(map(str, self.chosen))}.")

    @property
    def positives(self) -> int:
        """Number of positive examples drawn for the tests: those of detection, and half as many again for fuzzing."""
        return self.tested + self.tested // 2


@dataclass(frozen=True, kw_only=True)
class Score:
    """Result of a test.

    Args:
        balanced_accuracy: `kronsae.eval.scores.balanced_accuracy` of the judged examples.
        true_positives, positives, true_negatives, negatives: the counts behind it.
        batches: number of prompts of the test.
        dropped: number of prompts whose answer was unreadable, too short or too long; these are dropped entirely.
        failed: number of prompts without an answer.
    """

    balanced_accuracy: float | None = None
    true_positives: int = 0
    positives: int = 0
    true_negatives: int = 0
    negatives: int = 0
    batches: int = 0
    dropped: int = 0
    failed: int = 0


@dataclass(frozen=True, kw_only=True)
class LatentInterpretation:
    """A latent, its explanation, and the scores of the explanation.

    Args:
        latent: index of the latent.
        active_tokens: number of tokens of the text on which it is active.
        explanation: the language model's explanation; "" if there is none.
        problem: the reason why there is no explanation; "" if there is one.
        detection: score of distinguishing active examples from inactive ones.
        fuzzing: score of distinguishing correctly highlighted examples from incorrectly highlighted ones.
    """

    latent: int
    active_tokens: int
    explanation: str = ""
    problem: str = ""
    detection: Score = Score()
    fuzzing: Score = Score()


@dataclass(frozen=True, kw_only=True)
class Interpretation:
    """The interpreted latents of one SAE.

    Args:
        sae: name of the SAE.
        latents: the interpretations, ordered by latent.
        eligible: number of latents of the SAE that are active on at least ``min_active_tokens`` tokens.
        living: number of latents that are active on at least one token.
        detection, fuzzing: mean balanced accuracy over the latents that have the score.
        unexplained: number of latents without an explanation.
        dropped, failed: number of prompts of both tests without a readable answer, and without any answer.
    """

    sae: str
    latents: tuple[LatentInterpretation, ...]
    living: int
    eligible: int
    detection: Mean
    fuzzing: Mean
    unexplained: int
    dropped: int
    failed: int


@dataclass(frozen=True)
class Trial:
    """An example to be judged, its highlighted tokens, and the correct judgement."""

    example: Highlighted
    truth: bool


def detection_trials(examples: LatentExamples, tested: int, rng: np.random.Generator) -> list[Trial]:
    """Return equal numbers of active and inactive examples, up to ``tested`` each, unhighlighted, in random order."""
    n = min(tested, len(examples.positives), len(examples.negatives))
    trials = [Trial(_plain(example), True) for example in examples.positives[:n]]
    trials += [Trial(_plain(example), False) for example in examples.negatives[:n]]
    return _shuffled(trials, rng)


def fuzzing_trials(examples: LatentExamples, tested: int, rng: np.random.Generator) -> list[Trial]:
    """Return fuzzing examples: half correct, a quarter active with other tokens highlighted, a quarter inactive.

    At most ``tested`` are highlighted correctly. An incorrect example has as many tokens highlighted at random as are
    active in it; an inactive one, as many as are active in one of the correct examples. Examples that are active on
    every token cannot be highlighted incorrectly.
    """
    pool = examples.positives
    mislabelable = [place for place, example in enumerate(pool) if not all(example.active)]
    quarter = min(tested // 2, len(mislabelable), len(pool) // 3, len(examples.negatives))
    wrong_places = set(mislabelable[len(mislabelable) - quarter :])
    wrong = [example for place, example in enumerate(pool) if place in wrong_places]
    right = [example for place, example in enumerate(pool) if place not in wrong_places][: 2 * quarter]
    trials = [Trial((example.tokens, example.active), True) for example in right]
    trials += [Trial((example.tokens, _elsewhere(example, rng)), False) for example in wrong]
    for example in examples.negatives[:quarter]:
        number = sum(right[int(rng.integers(len(right)))].active)
        trials.append(Trial((example.tokens, _at_random(len(example.tokens), number, rng)), False))
    return _shuffled(trials, rng)


async def interpret_latent(examples: LatentExamples, ask: Ask, config: AutointerpConfig) -> LatentInterpretation:
    """Ask for an explanation, then run both tests concurrently."""
    found = LatentInterpretation(latent=examples.latent, active_tokens=examples.active_tokens)
    if not examples.explained:
        return replace(found, problem="never active in the text")
    prompt = explain_prompt([(example.tokens, example.active) for example in examples.explained])
    answer = await ask(*prompt, EXPLANATION)
    explanation = None if answer is None else read_explanation(answer)
    if explanation is None:
        problem = "no answer from the language model" if answer is None else "an answer that cannot be read"
        return replace(found, problem=problem)
    rng = np.random.default_rng([config.seed, examples.latent, 1])
    detection = detection_trials(examples, config.tested, rng)
    fuzzing = fuzzing_trials(examples, config.tested, rng)
    scores = await asyncio.gather(
        _judged(DETECT, explanation, detection, ask, config.per_prompt),
        _judged(FUZZ, explanation, fuzzing, ask, config.per_prompt),
    )
    return replace(found, explanation=explanation, detection=scores[0], fuzzing=scores[1])


def summarise(sae: str, latents: Sequence[LatentInterpretation], *, living: int, eligible: int) -> Interpretation:
    """Collect the interpretations of an SAE's latents, with the means over them."""
    scores = [score for latent in latents for score in (latent.detection, latent.fuzzing)]
    return Interpretation(
        sae=sae,
        latents=tuple(sorted(latents, key=lambda latent: latent.latent)),
        living=living,
        eligible=eligible,
        detection=mean_of(latent.detection.balanced_accuracy for latent in latents),
        fuzzing=mean_of(latent.fuzzing.balanced_accuracy for latent in latents),
        unexplained=sum(latent.problem != "" for latent in latents),
        dropped=sum(score.dropped for score in scores),
        failed=sum(score.failed for score in scores),
    )


async def _judged(instructions: str, explanation: str, trials: list[Trial], ask: Ask, per_prompt: int) -> Score:
    batches = [trials[start : start + per_prompt] for start in range(0, len(trials), per_prompt)]
    prompts = [judge_prompt(instructions, explanation, [trial.example for trial in batch]) for batch in batches]
    forms = [judgements(len(batch)) for batch in batches]
    answers = await asyncio.gather(*(ask(*prompt, form) for prompt, form in zip(prompts, forms, strict=True)))
    return score(batches, answers)


def score(batches: Sequence[Sequence[Trial]], answers: Sequence[str | None]) -> Score:
    """Compare answers with the labels, batch by batch; a batch without a readable answer is dropped entirely."""
    judged: list[tuple[bool, bool]] = []
    dropped = 0
    for batch, answer in zip(batches, answers, strict=True):
        found = None if answer is None else read_judgements(answer, len(batch))
        if found is not None:
            judged += [(trial.truth, judgement) for trial, judgement in zip(batch, found, strict=True)]
        elif answer is not None:
            dropped += 1
    counts = {
        "true_positives": sum(truth and judgement for truth, judgement in judged),
        "positives": sum(truth for truth, _ in judged),
        "true_negatives": sum(not truth and not judgement for truth, judgement in judged),
        "negatives": sum(not truth for truth, _ in judged),
    }
    return Score(
        balanced_accuracy=balanced_accuracy(**counts),
        **counts,
        batches=len(batches),
        dropped=dropped,
        failed=sum(answer is None for answer in answers),
    )


def _plain(example: Example) -> Highlighted:
    return example.tokens, (False,) * len(example.tokens)


def _elsewhere(example: Example, rng: np.random.Generator) -> tuple[bool, ...]:
    """Highlight inactive tokens at random, as many as are active, or all inactive ones if these are fewer."""
    silent = [place for place, active in enumerate(example.active) if not active]
    drawn = set(rng.permutation(silent)[: sum(example.active)].tolist())
    return tuple(place in drawn for place in range(len(example.active)))


def _at_random(length: int, number: int, rng: np.random.Generator) -> tuple[bool, ...]:
    drawn = set(rng.permutation(length)[:number].tolist())
    return tuple(place in drawn for place in range(length))


def _shuffled(trials: list[Trial], rng: np.random.Generator) -> list[Trial]:
    return [trials[place] for place in rng.permutation(len(trials))]
