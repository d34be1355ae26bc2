"""Reading of a run folder: config, metrics and SAEs."""

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
from kronsae.core.sae import SAE, describe_config
from kronsae.runs.config import RunConfig
from kronsae.runs.pipeline import Source
from kronsae.support.config import from_dict
from kronsae.support.errors import UserError, nearest
from kronsae.support.sealed import read_sealed
from kronsae.training.sinks import check_history, read_metrics

METRICS = "metrics.jsonl"
RUN_KEYS = frozenset({"kronsae_version", "config", "imported"})
TRAINING_KEYS = frozenset({"steps", "tokens", "seconds", "sae_tokens", "sae_seconds", "gate_exponents", "history"})


@dataclass(frozen=True)
class RunFolder:
    """A run folder: ``run.json``, ``metrics.jsonl``, ``saes/<name>/`` and, if they exist, evaluation and report."""

    folder: Path

    @cached_property
    def config(self) -> RunConfig:
        """Return the config of the run."""
        return from_dict(RunConfig, self.about["config"], where=f"{self.folder / 'run.json'}: config")

    @property
    def about(self) -> dict[str, Any]:
        """Return the contents of ``run.json``: version, config, and for imported SAEs where they come from."""
        if not (self.folder / "run.json").exists():
            raise UserError(
                f"{self.folder} must hold a run; it has no run.json. If a training was interrupted before its first "
                "step, run the same `kronsae train` command again; for a sweep, give one of the folders in groups/."
            )
        about = read_sealed(self.folder / "run.json", "the run folder", RUN_KEYS)
        if not isinstance(about, dict) or "config" not in about:
            raise UserError(f"{self.folder / 'run.json'} must be written by kronsae; it has no 'config' entry.")
        return about

    @property
    def names(self) -> list[str]:
        """Return the names of the SAEs."""
        return [member.name for member in self.config.saes]

    @property
    def imported(self) -> dict[str, Any]:
        """Return where each SAE comes from if all were imported (`kronsae.runs.imported`); empty for a training."""
        about = self.about.get("imported")
        return about if isinstance(about, dict) else {}

    @property
    def finished(self) -> bool:
        """Return whether the training is finished."""
        return (self.folder / "training.json").exists()

    def __repr__(self) -> str:
        """Return a summary with a line per SAE; sizes that are not known yet are left out."""
        if not (self.folder / "run.json").exists():
            return f"{type(self).__name__}('{self.folder}'): not trained yet"
        state = "imported" if self.imported else "finished" if self.finished else "not finished"
        config = self.config
        lines = [f"{type(self).__name__}('{self.folder}'): {state}, {config.model.name} at {', '.join(config.hooks)}"]
        for member in config.saes:
            shape = member.shape(1, config.hook)
            if self.finished:
                saved = checkpoint.read_shape(self.sae_folder(member.name))
                lines.append(f"  {member.name}: {describe_config(replace(saved, sparsifier=member.sparsifier))}")
            else:  # the width of the activations is not stored in the config
                lines.append(f"  {member.name}: {shape.architecture}, d_sae={shape.d_sae}, k={shape.sparsifier.k}")
        return "\n".join(lines)

    def sae_folder(self, name: str) -> Path:
        """Return the folder of the SAE with this name."""
        if name not in self.names:
            raise UserError(
                f"name must be one of the SAEs of {self.folder}, {', '.join(self.names)}; got '{name}'."
                f"{nearest(name, self.names)}"
            )
        return self.folder / "saes" / name

    def load(self, name: str) -> SAE:
        """Load the SAE with this name."""
        self.require_finished()
        return checkpoint.load(self.sae_folder(name))

    def saes(self) -> dict[str, SAE]:
        """Load all SAEs, by name."""
        return {name: self.load(name) for name in self.names}

    def activations(self, tokens: int, hook: str | None = None) -> Float[Tensor, "B D"]:
        """Return activations of held-out text at one hook: ``[tokens, width]``, float32, in the order of the text.

        Args:
            tokens: number of tokens, without repetition; row n is the same token at every hook.
            hook: hook to read; None: the run's hook.

        Raises:
            UserError: the held-out text has fewer tokens.
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
            f"tokens must be at most the {count} tokens of the held-out text; got {tokens}. Ask for fewer, or train on "
            "a longer text."
        )

    def sae_tokens(self, name: str) -> int | None:
        """Return the tokens that an SAE of a finished run was trained on; None: imported, and not stated."""
        tokens: int | None = self.training.get("sae_tokens", {}).get(name, self.training["tokens"])
        return tokens

    @cached_property
    def training(self) -> dict[str, Any]:
        """Return the summary of the training of a finished run."""
        path = self.folder / "training.json"
        found = read_sealed(path, "the training's summary", TRAINING_KEYS)
        if not isinstance(found, dict) or "tokens" not in found:
            raise UserError(f"{path} must be written by kronsae; it has no 'tokens' entry.")
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of ``metrics.jsonl``.

        Raises:
            UserError: the run is finished, and they are not those that its training wrote.
        """
        if self.finished:
            check_history(self.folder / METRICS, self.training.get("history"))
        return read_metrics(self.folder / METRICS)

    def require_finished(self) -> None:
        """Raise a `UserError` if the training is not finished."""
        if not self.finished:
            raise UserError(
                f"the run must be finished; {self.folder} is not. Run the command that started it again to resume it."
            )
