"""A run folder: the config, the metrics and the SAEs of a run, read from disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.core import checkpoint
from kronsae.core.checks import check_count
from kronsae.core.sae import SAE, in_words
from kronsae.runs.config import RunConfig
from kronsae.runs.pipeline import Source
from kronsae.support.config import from_dict
from kronsae.support.errors import UserError, nearest
from kronsae.support.files import read_json
from kronsae.training.sinks import read_metrics


@dataclass(frozen=True)
class RunFolder:
    """A run folder: ``run.json``, ``metrics.jsonl``, ``saes/<name>/`` and, once made, evaluation and report."""

    folder: Path

    @cached_property
    def config(self) -> RunConfig:
        """The config it was made with."""
        return from_dict(RunConfig, self._about["config"], where=f"{self.folder / 'run.json'}: config")

    @property
    def _about(self) -> dict[str, Any]:
        if not (self.folder / "run.json").exists():
            raise UserError(
                f"{self.folder} holds no run yet (it has no run.json). Give the `kronsae train` command that "
                "was to fill it again; of a sweep, give one of its groups/."
            )
        about = read_json(self.folder / "run.json", "the run folder")
        if not isinstance(about, dict) or "config" not in about:
            raise UserError(f"{self.folder / 'run.json'} was not written by kronsae: it has no 'config' entry.")
        return about

    @property
    def names(self) -> list[str]:
        """The names of its SAEs."""
        return [member.name for member in self.config.saes]

    @property
    def finished(self) -> bool:
        """Whether the training came to its end."""
        return (self.folder / "training.json").exists()

    def __repr__(self) -> str:
        """What was trained: a line per SAE, with its sizes as far as they are known."""
        if not (self.folder / "run.json").exists():
            return f"{type(self).__name__}('{self.folder}'): nothing is trained yet"
        state, config = "finished" if self.finished else "not finished", self.config
        lines = [f"{type(self).__name__}('{self.folder}'): {state}, {config.model.name} at {', '.join(config.hooks)}"]
        for member in config.saes:
            shape = member.shape(1, config.hook)
            if self.finished:
                saved = checkpoint.read_shape(self.sae_folder(member.name))
                lines.append(f"  {member.name}: {in_words(replace(saved, sparsifier=member.sparsifier))}")
            else:  # the model's width is in no file
                lines.append(f"  {member.name}: {shape.architecture}, d_sae={shape.d_sae}, k={shape.sparsifier.k}")
        return "\n".join(lines)

    def sae_folder(self, name: str) -> Path:
        """Where the SAE of that name is saved."""
        if name not in self.names:
            raise UserError(
                f"name must be an SAE of {self.folder}: {', '.join(self.names)}; got '{name}'."
                f"{nearest(name, self.names)}"
            )
        return self.folder / "saes" / name

    def load(self, name: str) -> SAE:
        """One of its SAEs."""
        self.require_finished()
        return checkpoint.load(self.sae_folder(name))

    def saes(self) -> dict[str, SAE]:
        """All of its SAEs, by name."""
        return {name: self.load(name) for name in self.names}

    def activations(self, tokens: int, hook: str | None = None) -> Float[Tensor, "B D"]:
        """Activations of held-out text at one hook: ``[tokens, width]``, float32, in the text's order.

        Args:
            tokens: how many; row n belongs to the same token whatever the hook.
            hook: None: the run's.

        Raises:
            UserError: the held-out text has fewer tokens; none is given twice.
        """
        check_count("tokens", tokens)
        hook = self.config.hook if hook is None else hook
        parts, count = [], 0
        for values, _ in Source(self.config).activations(held_out=True, repeat=False, hook=hook):
            parts.append(values[hook].cpu())
            count += len(parts[-1])
            if count >= tokens:
                return torch.cat(parts)[:tokens]
        raise UserError(
            f"tokens must not exceed what the held-out text gives; got {tokens}, and it ended after {count}. "
            "Ask for fewer, or train on a longer text."
        )

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``."""
        return read_metrics(self.folder / "metrics.jsonl")

    def require_finished(self) -> None:
        """Raise a UserError if there is training left to do."""
        if not self.finished:
            raise UserError(
                f"the run in {self.folder} is not finished. Give the command that started it again: it carries on."
            )
