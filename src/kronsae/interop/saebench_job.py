"""What SAEBench is to evaluate, as a JSON file: written by `kronsae saebench`, read in SAEBench's environment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kronsae.support.errors import UserError, nearest

JOB_FILE, OUTCOME_FILE = "job.json", "outcome.json"

EVALUATIONS: dict[str, str] = {
    "absorption": "first-letter absorption; needs a model that can spell, and the output of a transformer block",
    "sparse_probing_sae_probes": "probes on single latents and on few, 113 data sets that come with sae-probes",
    "meta_structure": "how well a smaller SAE reconstructs the decoder's directions; runs no language model",
}
"""Evaluations of SAEBench that are offered: they need no download besides the model."""

REFUSED: dict[str, str] = {
    "core": "it runs code that comes with its data set; `kronsae eval RUN` gives explained variance, l0, CE and KL",
    "sparse_probing": "one of its data sets runs code that comes with it; sparse_probing_sae_probes is its successor",
    "scr": "it downloads its data sets",
    "tpp": "it downloads its data sets",
    "autointerp": "it needs a key of one company's API; `kronsae eval autointerp` takes any endpoint or a local model",
    "ravel": "it reads the layers of Gemma 2 and GPT-NeoX alone, and downloads its data",
    "mdl": "it runs code that comes with its data set",
    "unlearning": "it needs gemma-2-2b-it and a data set that is given on request",
}
"""Evaluations of SAEBench that are not offered, and why; SAEBench's own functions take a `SAEBenchSAE` too."""

KNOWN = (*EVALUATIONS, *REFUSED)


@dataclass(frozen=True, kw_only=True)
class JobSAE:
    """One SAE of a job.

    Args:
        name: its name in the results.
        folder: where it is saved.
        hook: hook in TransformerLens' names.
        layer: transformer block of the hook.
        training_tokens: tokens that it was trained on; -1: not known.
    """

    name: str
    folder: str
    hook: str
    layer: int
    training_tokens: int = -1


@dataclass(frozen=True, kw_only=True)
class Job:
    """SAEs, language model, evaluations and their settings.

    Args:
        saes: the SAEs.
        model: name of the language model in the results.
        location: folder of the model, or its name on the Hub.
        evals: names in `EVALUATIONS`.
        settings: ``EVAL.FIELD=VALUE`` for fields of SAEBench's configs; VALUE is JSON, or text.
        words: words of the vocabulary that absorption uses, drawn at random; None: all, as in SAEBench.
        context_length: length of the windows that the SAEs were trained on; None: not known.
        text: the text that they were trained on.
        seed: of all random numbers.
        device: of model and SAEs.
        out: folder for ``eval_results/EVAL/SAE_custom_sae_eval_results.json``.
    """

    saes: tuple[JobSAE, ...]
    model: str
    location: str
    evals: tuple[str, ...]
    out: str
    settings: tuple[str, ...] = ()
    words: int | None = None
    context_length: int | None = None
    text: str = ""
    seed: int = 42
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in self.evals:
            check_evaluation(name)
        for assignment in self.settings:
            split_setting(assignment)
        if "absorption" in self.evals:
            for sae in self.saes:
                if sae.hook != f"blocks.{sae.layer}.hook_resid_post":
                    raise UserError(
                        f"hook must be the output of a transformer block for absorption, which reads no other place; "
                        f"'{sae.name}' is at {sae.hook}. Leave absorption out, or use `kronsae eval absorption`."
                    )
        if self.words is not None and self.words < MIN_WORDS:
            raise UserError(f"words must be at least {MIN_WORDS}; got {self.words}.")

    def settings_of(self, evaluation: str) -> dict[str, Any]:
        """Return the settings of one evaluation, by field."""
        split = (split_setting(assignment) for assignment in self.settings)
        return {field: value for name, field, value in split if name == evaluation}


WORDS_PER_LETTER = 10
"""Words of each letter in a selection: a fifth is held out at random, and SAEBench trains a probe for every letter."""

MIN_WORDS = 26 * WORDS_PER_LETTER


def check_evaluation(name: str) -> None:
    """Raise a `UserError` unless the evaluation is offered; it says why, and what to use instead."""
    if name in REFUSED:
        raise UserError(f"evals: SAEBench's {name} is not offered: {REFUSED[name]}.")
    if name not in EVALUATIONS:
        raise UserError(f"evals must be of {', '.join(EVALUATIONS)}; got '{name}'.{nearest(name, KNOWN)}")


def split_setting(assignment: str) -> tuple[str, str, Any]:
    """Return evaluation, field and value of ``EVAL.FIELD=VALUE``.

    Raises:
        UserError: it has another form, or names an evaluation that is not offered.
    """
    target, equals, text = assignment.partition("=")
    name, dot, field = target.partition(".")
    if not (equals and dot and field):
        raise UserError(f"settings must be EVAL.FIELD=VALUE, such as absorption.max_k_value=5; got '{assignment}'.")
    check_evaluation(name)
    try:
        return name, field, json.loads(text)
    except ValueError:
        return name, field, text
