"""One latent at a time: explain it, test the explanation twice, count what went wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from kronsae.core.checks import check_count, check_seed
from kronsae.eval.autointerp.examples import Example, LatentExamples
from kronsae.eval.autointerp.prompts import (
    DETECT,
    FUZZ,
    Highlighted,
    explain_prompt,
    judge_prompt,
    read_explanation,
    read_judgements,
)
from kronsae.eval.scores import Mean, balanced_accuracy, mean_of
from kronsae.support.errors import UserError

PLACEHOLDER = json.dumps({"explanation": "x" * 240})
"""An answer for whoever only counts what would be asked: an explanation of common length, and no judgement."""


class Ask(Protocol):
    """Whoever answers; None where no answer is to be had."""

    async def __call__(self, instructions: str, content: str) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class AutointerpConfig:
    """Which latents are interpreted, from how much text.

    Args:
        latents: per SAE, drawn at random from those active on at least ``min_active_tokens`` tokens.
        chosen: these instead, in every SAE.
        tokens: of held-out text to find examples in; fewer where the text ends.
        radius: tokens on either side of the place an example is drawn for (paper: 15, so 31 in all).
        explained: examples an explanation is made from, at or above the median activation (paper: 16).
        tested: examples of either kind per test, at most (paper: 64).
        per_prompt: examples judged in one prompt (paper: 8).
        min_active_tokens: a rarer latent is not drawn; it would have too few examples.
        seed: of the choice of latents and examples, and of their order.
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
            raise UserError(f"latents must be different numbers from 0 on; got {', '.join(map(str, self.chosen))}.")

    @property
    def positives(self) -> int:
        """Active examples drawn for the tests: detection's, and half as many again to be mislabelled in fuzzing."""
        return self.tested + self.tested // 2


@dataclass(frozen=True, kw_only=True)
class Score:
    """A test's outcome.

    Args:
        balanced_accuracy: `kronsae.eval.scores.balanced_accuracy` of the examples that were judged.
        true_positives, positives, true_negatives, negatives: the counts it rests on.
        batches: prompts of the test.
        dropped: of these, how many came back unreadable, too short or too long; dropped whole.
        failed: of these, how many came back not at all.
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
    """A latent, its explanation, and how well that stands its tests.

    Args:
        latent: its number.
        active_tokens: on how many tokens of the text it is active.
        explanation: what the language model says it is active on; "" where there is none.
        problem: why there is none; "" where there is.
        detection: told active examples from others.
        fuzzing: told rightly highlighted examples from wrongly highlighted ones.
    """

    latent: int
    active_tokens: int
    explanation: str = ""
    problem: str = ""
    detection: Score = Score()
    fuzzing: Score = Score()


@dataclass(frozen=True, kw_only=True)
class Interpretation:
    """The latents of one SAE that were interpreted.

    Args:
        sae: its name.
        latents: one by one, by number.
        eligible: how many latents of the SAE are active on at least ``min_active_tokens`` tokens.
        living: how many are active at all.
        detection, fuzzing: mean balanced accuracy over the latents that have one.
        unexplained: latents without an explanation.
        dropped, failed: batches of both tests without a readable answer, and without any.
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
    """An example to be judged, what is highlighted in it, and the right judgement."""

    example: Highlighted
    truth: bool


def detection_trials(examples: LatentExamples, tested: int, rng: np.random.Generator) -> list[Trial]:
    """As many active examples as others, up to ``tested`` each, nothing highlighted, in random order."""
    n = min(tested, len(examples.positives), len(examples.negatives))
    trials = [Trial(_plain(example), True) for example in examples.positives[:n]]
    trials += [Trial(_plain(example), False) for example in examples.negatives[:n]]
    return _shuffled(trials, rng)


def fuzzing_trials(examples: LatentExamples, tested: int, rng: np.random.Generator) -> list[Trial]:
    """Half rightly highlighted, a quarter active with other tokens highlighted, a quarter not active.

    At most ``tested`` are rightly highlighted. In the wrong ones as many tokens are highlighted, at random, as are
    active in the example, or in one of the right ones. Of examples active on every token none can be mislabelled.
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
    """Ask for an explanation, then put it to both tests at once."""
    found = LatentInterpretation(latent=examples.latent, active_tokens=examples.active_tokens)
    if not examples.explained:
        return replace(found, problem="never active in the text")
    answer = await ask(*explain_prompt([(example.tokens, example.active) for example in examples.explained]))
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
    """The latents of an SAE, with the means over them."""
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
    answers = await asyncio.gather(*(ask(*prompt) for prompt in prompts))
    return score(batches, answers)


def score(batches: Sequence[Sequence[Trial]], answers: Sequence[str | None]) -> Score:
    """Compare answers with the truth, batch by batch; a batch that has no readable answer is dropped whole."""
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
    """As many tokens as are active, drawn from those that are not (all of these, where they are fewer)."""
    silent = [place for place, active in enumerate(example.active) if not active]
    drawn = set(rng.permutation(silent)[: sum(example.active)].tolist())
    return tuple(place in drawn for place in range(len(example.active)))


def _at_random(length: int, number: int, rng: np.random.Generator) -> tuple[bool, ...]:
    drawn = set(rng.permutation(length)[:number].tolist())
    return tuple(place in drawn for place in range(length))


def _shuffled(trials: list[Trial], rng: np.random.Generator) -> list[Trial]:
    return [trials[place] for place in rng.permutation(len(trials))]
