"""Parse ``--sae``, ``--set``, ``--recipe`` and ``--config`` into configs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from kronsae.core.pursuit import Pursuit
from kronsae.data.model import ModelConfig
from kronsae.data.text import TextConfig
from kronsae.runs.architectures import SAE_KINDS, keyword_arguments
from kronsae.runs.config import RunConfig, own_hook, with_overrides
from kronsae.runs.harvest import with_activations
from kronsae.runs.recipes import RECIPES
from kronsae.support.config import checked, from_dict, to_dict
from kronsae.support.errors import UserError, nearest
from kronsae.support.files import read_json
from kronsae.training.config import LoopConfig, MemberConfig


def named_recipe(name: str) -> RunConfig:
    """Return the config of the recipe with this name."""
    if name not in RECIPES:
        raise UserError(f"recipe must be one of {', '.join(RECIPES)}; got '{name}'.{nearest(name, RECIPES)}")
    return RECIPES[name]()


def config_file(path: Path) -> RunConfig:
    """Read a run's config from JSON: a ``run.json``, or only the config."""
    data = read_json(path, "the config")
    if isinstance(data, dict) and data.get("imported"):
        raise UserError(
            f"--config must describe a training; {path} describes imported SAEs, whose training is not known. Give the "
            "run.json of a run that kronsae trained."
        )
    # The checksum of a run.json is not compared: the file serves here as a start for changes.
    inner = data.get("config", data) if isinstance(data, dict) and "kronsae_version" in data else data
    return from_dict(RunConfig, inner, where=str(path))


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Base of a run: a recipe, a config file, or a model (or harvested activations), a text and a hook."""

    recipe: str | None = None
    config: Path | None = None
    activations: Path | str | None = None
    model: str | None = None
    text: str | None = None
    hook: str | None = None

    def run_config(
        self,
        members: Sequence[MemberConfig],
        budget: Mapping[str, Any],
        seed: int | None = None,
        options: Sequence[str] = (),
    ) -> RunConfig:
        """Return the complete config of the run.

        Args:
            members: the SAEs; empty: those of the recipe or file.
            budget: ``tokens``, ``flops`` and ``same_flops_as``, each with a value or None.
            seed: seed of the order of the activations, and of the weights of a recipe's SAEs.
            options: ``field=value`` strings, as for ``--set``.

        Raises:
            UserError: options are missing, contradictory or unknown.
        """
        options_with_hook = self.with_own_hook(members)
        if options_with_hook is not self:
            return options_with_hook.run_config(members, budget, seed, options)
        if self.recipe is not None and self.config is not None:
            raise UserError("--recipe and --config must not be given together; got both. Leave one out.")
        named = {"--model": self.model, "--text": self.text}
        if self.activations is not None and (given := [name for name, value in named.items() if value is not None]):
            raise UserError(
                "--model and --text must not be given with --activations, which determines them; got "
                f"{', '.join(given)}. Leave them out."
            )
        if self.recipe is not None:
            whole = named_recipe(self.recipe)
        elif self.config is not None:
            whole = config_file(self.config)
        else:
            whole = self._from_parts(members, budget)
        if self.activations is not None:
            whole = with_activations(whole, self.activations)
        whole = with_overrides(
            whole, model=self.model, text=self.text, hook=self.hook, **budget, seed=seed, saes=members
        )
        return with_options(whole, options)

    def with_own_hook(self, members: Sequence[MemberConfig]) -> RunOptions:
        """Return these options with the first hook of the SAEs, if no hook is given and every SAE names its own."""
        given = (self.recipe, self.config, self.activations, self.hook)
        hook = own_hook(members) if all(value is None for value in given) else None
        return self if hook is None else replace(self, hook=hook)

    def _from_parts(self, members: Sequence[MemberConfig], budget: Mapping[str, Any]) -> RunConfig:
        tokens = budget["tokens"]
        needed: dict[str, object] = {
            "--tokens": tokens if budget["flops"] is None else 0,
            "--sae": members or None,
        }
        if self.activations is None:
            needed |= {"--model": self.model, "--text": self.text, "--hook": self.hook}
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise UserError(
                f"{', '.join(missing)} must be given without --recipe or --config. See `kronsae train --help`."
            )
        batch = {} if tokens is None else {"batch_tokens": min(LoopConfig.batch_tokens, tokens)}
        return RunConfig(
            model=ModelConfig(name=self.model or "bundled"),
            text=TextConfig(source=self.text or "bundled"),
            hook=self.hook or "0",
            saes=tuple(members),
            loop=LoopConfig(**budget, **batch),
        )


def parse_sae(spec: str, seed: int | None = None) -> MemberConfig:
    """Parse a specification: ``"kron num_heads=512 d_base=2 k=32 ..."`` gives ``kron(num_heads=512, ...)``.

    ``seed`` is used if the specification has no seed.
    """
    try:
        kind, *pairs = shlex.split(spec) or [""]
    except ValueError as error:
        raise UserError(f"--sae must have matching quotes; got '{spec}' ({error}).") from None
    if kind not in SAE_KINDS:
        raise UserError(f"--sae must begin with one of {', '.join(SAE_KINDS)}; got '{spec}'.{nearest(kind, SAE_KINDS)}")
    hints, required = keyword_arguments(kind)
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--sae must have name=value pairs after its kind; got '{pair}' in '{spec}'.")
        if name not in hints:
            raise UserError(f"'{name}' is not an argument of {kind}; got '{spec}'.{nearest(name, hints)}")
        if name in values:
            raise UserError(f"--sae must have each argument once; got '{name}' twice in '{spec}'.")
        hint = hints[name]
        values[name] = checked(hint, value if str in (hint, *get_args(hint)) else json_value(value), name)
    if missing := [name for name in required if name not in values]:
        raise UserError(f"--sae {kind} must have {', '.join(missing)}; got '{spec}'.")
    return SAE_KINDS[kind](**({} if seed is None else {"seed": seed}) | values)


def parse_pursuit(spec: str) -> Pursuit:
    """``"rounds=2 candidates=2"`` as ``Pursuit(rounds=2, candidates=2)``."""
    values: dict[str, Any] = {}
    for word in spec.split():
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--pursuit takes name=value pairs, such as 'rounds=2 candidates=2'; got '{word}'.")
        if name in values:
            raise UserError(f"--pursuit must say each thing once; '{name}' is there twice in '{spec}'.")
        values[name] = json_value(value)
    return from_dict(Pursuit, values, where="--pursuit")


def with_options(config: RunConfig, options: Sequence[str]) -> RunConfig:
    """Apply options such as ``loop.batch_tokens=4096``, for any field of the config; ``saes.*`` means every SAE."""
    shown, data = to_dict(config), to_dict(config, derived=False)  # derived fields may be set, but are not carried over
    for option in options:
        place, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--set must be field=value, such as loop.batch_tokens=4096; got '{option}'.")
        *path, last = place.split(".")
        numbers: list[str | None] = [None]
        if path[:2] == ["saes", "*"]:
            numbers = [str(number) for number in range(len(data["saes"]))]
        for number in numbers:
            outer: Any = shown
            inner: Any = data
            for key in path if number is None else ["saes", number, *path[2:]]:
                outer, inner = _step_into(outer, key, place), _step_into(inner, key, place)
            _step_into(outer, last, place)
            for parts in (outer, inner):
                parts[int(last) if isinstance(parts, list) else last] = json_value(value)
    return from_dict(RunConfig, data)


def _step_into(inner: Any, key: str, place: str) -> Any:
    if isinstance(inner, dict) and key in inner:
        return inner[key]
    if isinstance(inner, list) and key.isdecimal() and int(key) < len(inner):
        return inner[int(key)]
    known = list(inner) if isinstance(inner, dict) else []
    if isinstance(inner, list):
        known = [str(number) for number in range(len(inner))]
    rest = f"{nearest(key, known)} Known: {', '.join(known)}." if known else " This value has no fields."
    raise UserError(f"--set must name a field of the config; got '{place}', in which '{key}' is unknown.{rest}")


def json_value(text: str) -> Any:
    """Return the value of a text that is JSON or Python's True, False or None; otherwise the text itself."""
    python_values = {"True": True, "False": False, "None": None}
    if text in python_values:
        return python_values[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
