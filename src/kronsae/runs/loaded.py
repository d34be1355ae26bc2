"""A finished run, loaded for measuring: its SAEs, language model and text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial

from jaxtyping import Float
from torch import Tensor

from kronsae.core.sae import SAE
from kronsae.data.model import HookPoint, LanguageModel, resolve_hook
from kronsae.eval.evaluation import Hooks
from kronsae.eval.hooked import MakeTokens, Windows, hidden_states, kept, read_windows
from kronsae.runs.folder import RunFolder
from kronsae.runs.pipeline import Source
from kronsae.support.errors import UserError
from kronsae.support.progress import Progress


class LoadedRun:
    """A finished run, opened for measuring; the model and the SAEs are loaded when they are first needed.

    Raises:
        UserError: the run is not finished.
    """

    def __init__(self, run: RunFolder) -> None:
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
        self, windows: list[Windows], progress: Progress | None = None
    ) -> Iterator[tuple[Windows, Float[Tensor, "N D"]]]:
        """The activations that count at the hook, float32, with their windows; each pass ends at the hook."""
        total = sum(one.num_kept for one in windows)
        done = 0
        for one in windows:
            yield one, kept(hidden_states(self.language_model, self.hook, one), one)
            done += one.num_kept
            if progress is not None:
                progress(done, total)


def expected_l0(sae: SAE) -> int:
    """Return about how many latents of an SAE are active per token: its k, or 64 where a threshold decides."""
    return min(getattr(sae.sparsifier.config, "k", 64), sae.d_sae)


def describe_tokens(counted: int, wanted: int) -> str:
    """Describe the held-out tokens of the whole windows that were read when ``wanted`` were asked for."""
    short = f", all that the text has where {wanted:,} were wanted" if counted < wanted else " (whole windows)"
    return f"{counted:,} held-out tokens{short if counted != wanted else ''}"
