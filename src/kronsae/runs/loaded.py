"""Access to the SAEs, language model and text of a finished run, for measurements."""

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
    """A finished run; the language model and the SAEs are loaded on first use.

    Raises:
        UserError: the run is not finished.
    """

    def __init__(self, run: RunFolder) -> None:
        run.require_finished()
        self.run = run

    @cached_property
    def source(self) -> Source:
        """Return the source of the run's text and activations."""
        return Source(self.run.config)

    @property
    def language_model(self) -> LanguageModel:
        """Return the run's language model, in evaluation mode."""
        return self.source.language_model

    @cached_property
    def saes(self) -> dict[str, SAE]:
        """Return the run's SAEs by name, on the language model's device, in evaluation mode; they take raw activations.

        Raises:
            UserError: weights of an SAE are not finite.
        """
        for name, sae in (saes := self.run.saes()).items():
            if (weight := sae.unsound_weight()) is not None:
                raise UserError(
                    f"weights must be finite; {weight} of '{name}' holds NaN or infinity. If its training diverged, "
                    "train it again with a lower learning rate, or measure a run without it."
                )
        return {name: sae.to(self.language_model.device).eval() for name, sae in saes.items()}

    @cached_property
    def places(self) -> dict[str, Hooks]:
        """Return the hooks that each SAE reads and writes, by name."""
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
        """Return the single hook that every SAE of the run reads and reconstructs.

        Raises:
            UserError: the SAEs have different hooks, or one is a transcoder or crosscoder.
        """
        config = self.run.config
        first = config.hooks[0]
        for member in config.saes:
            if member.reconstructs(config.hook) != first:
                raise UserError(
                    f"all SAEs of the run must reconstruct the same single hook for this measurement; '{member.name}' "
                    f"reads {' + '.join(member.reads(config.hook))} and writes "
                    f"{' + '.join(member.writes(config.hook))} in a run with the hooks {', '.join(config.hooks)}. "
                    "Train SAEs of one hook in a separate run."
                )
        return resolve_hook(self.language_model.model, first)

    def make_tokens(self, *, held_out: bool = True) -> MakeTokens:
        """Return a function that creates the stream of token windows of the held-out or training documents."""
        return partial(self.source.tokens(held_out=held_out, repeat=False), state=None)

    def windows(self, tokens: int, *, held_out: bool = True) -> list[Windows]:
        """Return whole windows of text with at least ``tokens`` counted tokens in total, if the text has as many."""
        return read_windows(self.make_tokens(held_out=held_out), tokens)

    def activations(
        self, windows: list[Windows], progress: Progress | None = None
    ) -> Iterator[tuple[Windows, Float[Tensor, "N D"]]]:
        """Yield the activations of counted tokens at the hook, float32, with their windows; the model runs up to it."""
        total = sum(one.num_kept for one in windows)
        done = 0
        for one in windows:
            yield one, kept(hidden_states(self.language_model, self.hook, one), one)
            done += one.num_kept
            if progress is not None:
                progress(done, total)


def expected_l0(sae: SAE) -> int:
    """Return the approximate number of active latents per token: k, or 64 for a sparsifier with thresholds."""
    return min(getattr(sae.sparsifier.config, "k", 64), sae.d_sae)


def describe_tokens(counted: int, wanted: int) -> str:
    """Describe the number of held-out tokens that were read in whole windows, given the requested number."""
    short = f" ({wanted:,} requested; the text has no more)" if counted < wanted else " (whole windows)"
    return f"{counted:,} held-out tokens{short if counted != wanted else ''}"
