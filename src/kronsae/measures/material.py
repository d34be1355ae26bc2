"""What every measurement starts from: a finished run's SAEs, language model and text; and where results are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from kronsae.core.sae import SAE
from kronsae.data.model import HookPoint, LanguageModel, resolve_hook
from kronsae.eval.evaluation import Hooks
from kronsae.eval.hooked import MakeTokens, Windows, hidden_states, kept, read_windows
from kronsae.runs.pipeline import Source
from kronsae.runs.run import Run
from kronsae.support.config import differences
from kronsae.support.errors import UserError
from kronsae.support.files import read_json, write_json
from kronsae.support.provenance import provenance

Report = Callable[[int, int], None]
"""Told ``(done, total)``."""


class Material:
    """A finished run, opened for measuring; the model and the SAEs are loaded when they are first needed.

    Raises:
        UserError: the run is not finished.
    """

    def __init__(self, run: Run) -> None:
        run.require_finished()
        self.run = run

    @cached_property
    def source(self) -> Source:
        """The run's way from text to activations."""
        return Source(self.run.config)

    @property
    def language_model(self) -> LanguageModel:
        """The run's language model, in evaluation mode."""
        return self.source.language_model

    @cached_property
    def saes(self) -> dict[str, SAE]:
        """The run's SAEs by name, on the language model's device, in evaluation mode; they take raw activations.

        Raises:
            UserError: weights of one are not finite: its figures would mean nothing.
        """
        for name, sae in (saes := self.run.saes()).items():
            if (weight := sae.unsound_weight()) is not None:
                raise UserError(
                    f"'{name}' cannot be measured: {weight} holds NaN or infinity. If its training diverged, lower its "
                    "learning rate; measure a run without it."
                )
        return {name: sae.to(self.language_model.device).eval() for name, sae in saes.items()}

    @cached_property
    def places(self) -> dict[str, Hooks]:
        """What each SAE reads and writes, by its name."""
        config, model = self.run.config, self.language_model.model
        points = {hook: resolve_hook(model, hook) for hook in config.hooks}
        return {
            member.name: Hooks(
                read=tuple(points[hook] for hook in member.reads(config.hook)),
                write=tuple(points[hook] for hook in member.writes(config.hook)),
            )
            for member in config.saes
        }

    @cached_property
    def hook(self) -> HookPoint:
        """The one hook that every SAE of the run reads and reconstructs.

        Raises:
            UserError: they belong to different hooks, or one is a transcoder or crosscoder.
        """
        config = self.run.config
        first = config.hooks[0]
        for member in config.saes:
            if member.reconstructs(config.hook) != first:
                raise UserError(
                    f"this measurement takes SAEs that all reconstruct one hook; '{member.name}' reads "
                    f"{' + '.join(member.reads(config.hook))} and writes {' + '.join(member.writes(config.hook))} in a "
                    f"run with the hooks {', '.join(config.hooks)}. Train those to be measured in a run of their own."
                )
        return resolve_hook(self.language_model.model, first)

    def make_tokens(self, *, held_out: bool = True) -> MakeTokens:
        """Makes the stream of token windows of the held-out or the training documents, from its beginning, once."""
        return partial(self.source.tokens(held_out=held_out, repeat=False), state=None)

    def windows(self, tokens: int, *, held_out: bool = True) -> list[Windows]:
        """Windows of text with about so many tokens that count; the last one is whole."""
        return read_windows(self.make_tokens(held_out=held_out), tokens)

    def activations(
        self, windows: list[Windows], progress: Report | None = None
    ) -> Iterator[tuple[Windows, Float[Tensor, "N D"]]]:
        """The activations that count at the hook, float32, with their windows; each pass ends at the hook."""
        total = sum(one.num_kept for one in windows)
        done = 0
        for one in windows:
            yield one, kept(hidden_states(self.language_model, self.hook, one), one)
            done += one.num_kept
            if progress is not None:
                progress(done, total)


REVISIONS = {
    "latents": 1,
    "interaction": 3,
    "autointerp": 1,
    "token-rule": 1,
    "synthetic": 1,
    "toy": 1,
    "absorption": 2,
    "probing": 1,
}
"""Of each measurement's result: rises when its shape changes, or what a figure in it means."""


def part_of(progress: Report | None, number: int, parts: int) -> Report | None:
    """Progress of one of several equal parts, counted from 0, as progress of the whole."""
    return None if progress is None else lambda done, total: progress(number * total + done, parts * total)


def beyond(progress: Report | None, before: int, total: int) -> Report | None:
    """Progress of what begins when ``before`` of ``total`` is done."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def kept_per_token(sae: SAE) -> int:
    """About how many latents an SAE's codes hold for a token: its k, or what is usual where a threshold decides."""
    return min(getattr(sae.sparsifier.config, "k", 64), sae.d_sae)


def held_out_tokens(counted: int, wanted: int) -> str:
    """How many tokens count in the whole windows that were read when so many were wanted, in words."""
    short = f", all that the text has where {wanted:,} were wanted" if counted < wanted else " (whole windows)"
    return f"{counted:,} held-out tokens{short if counted != wanted else ''}"


def result_path(run: Run, name: str) -> Path:
    """Where the result of the measurement ``name`` is kept."""
    return run.folder / "measures" / f"{name}.json"


def known_result(run: Run, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The kept result of these very settings, unless an older revision; a finished run's SAEs never change."""
    path = result_path(run, name)
    if not path.exists():
        return None
    known = _kept(path)
    if not _is_current(known, name) or differences(known.get("settings"), dict(settings)):
        return None
    result = known.get("result")
    return result if isinstance(result, dict) else None


def keep_result(run: Run, name: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> Path:
    """Write a result (JSON values) with its settings and what it depends on; return where."""
    path = result_path(run, name)
    about = {"measure": name, "revision": REVISIONS[name], "kronsae_version": version("kronsae")}
    write_json(path, {**about, "settings": dict(settings), "provenance": provenance(), "result": dict(result)})
    return path


def kept_results(run: Run) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """All kept results by name, each ``{"measure", "settings", "provenance", "result", ...}``; and which are outdated.

    An outdated one is of another revision and not among the results: its figures may mean something else.
    """
    paths = sorted((run.folder / "measures").glob("*.json"))
    found = {path.stem: _kept(path) for path in paths if path.stem in REVISIONS}
    current = {name: kept for name, kept in found.items() if _is_current(kept, name)}
    return current, tuple(name for name in found if name not in current)


def _kept(path: Path) -> Any:
    try:
        return read_json(path, f"the result of '{path.stem}'")
    except UserError as error:
        raise UserError(f"{error} Delete it, and measure again.") from None


def _is_current(kept: Any, name: str) -> bool:
    return isinstance(kept, dict) and kept.get("revision") == REVISIONS[name]
