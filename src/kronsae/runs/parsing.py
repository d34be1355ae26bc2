"""Parse ``--sae``, ``--set``, ``--recipe`` and ``--config`` into configs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

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
    """The config of a recipe."""
    if name not in RECIPES:
        raise UserError(f"recipe must be one of {', '.join(RECIPES)}; got '{name}'.{nearest(name, RECIPES)}")
    return RECIPES[name]()


def config_file(path: Path) -> RunConfig:
    """A run's config from JSON: a ``run.json``, or the config alone."""
    data = read_json(path, "the config")
    inner = data.get("config", data) if isinstance(data, dict) and "kronsae_version" in data else data
    return from_dict(RunConfig, inner, where=str(path))


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run starts from: a recipe, a config file, or a model (or harvested activations), a text and a hook."""

    recipe: str | None = None
    config: Path | None = None
    activations: Path | None = None
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
        """The whole config of the run.

        Args:
            members: the SAEs; none leaves those of the recipe or file.
            budget: ``tokens``, ``flops`` and ``same_flops_as``, each of them or None.
            seed: of the order of the activations, and of the weights of a recipe's SAEs.
            options: ``place=value``, as ``--set`` takes them.

        Raises:
            UserError: something is missing, contradicts or is not known.
        """
        options_with_hook = self.with_own_hook(members)
        if options_with_hook is not self:
            return options_with_hook.run_config(members, budget, seed, options)
        if self.recipe is not None and self.config is not None:
            raise UserError("give --recipe or --config, not both.")
        named = {"--model": self.model, "--text": self.text}
        if self.activations is not None and (given := [name for name, value in named.items() if value is not None]):
            raise UserError(f"--activations has a model and a text of its own; leave out {', '.join(given)}.")
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
                f"without --recipe or --config, give also {', '.join(missing)}; see `kronsae train --help`."
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
    """``"kron num_heads=512 d_base=2 d_extension=4 k=32"`` as the call ``kron(num_heads=512, ...)``.

    ``seed`` is that of an SAE which names none.
    """
    try:
        kind, *words = shlex.split(spec) or [""]
    except ValueError as error:
        raise UserError(f"--sae must have its quotes in pairs; got '{spec}' ({error}).") from None
    if kind not in SAE_KINDS:
        raise UserError(f"--sae must begin with one of {', '.join(SAE_KINDS)}; got '{spec}'.{nearest(kind, SAE_KINDS)}")
    hints, required = keyword_arguments(kind)
    values: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--sae takes name=value pairs after its kind; got '{word}' in '{spec}'.")
        if name not in hints:
            raise UserError(f"'{name}' is not an argument of {kind}.{nearest(name, hints)} In '{spec}'.")
        if name in values:
            raise UserError(f"--sae must say each thing once; '{name}' is there twice in '{spec}'.")
        hint = hints[name]
        values[name] = checked(hint, value if str in (hint, *get_args(hint)) else json_value(value), name)
    if missing := [name for name in required if name not in values]:
        raise UserError(f"--sae {kind} needs {', '.join(missing)}; got '{spec}'.")
    return SAE_KINDS[kind](**({} if seed is None else {"seed": seed}) | values)


def with_options(config: RunConfig, options: Sequence[str]) -> RunConfig:
    """Apply ``loop.batch_tokens=4096``: any field of the config by its place; ``saes.*`` is every SAE."""
    shown, data = to_dict(config), to_dict(config, derived=False)  # what is derived may be named, but is not kept
    for option in options:
        place, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--set takes place=value, such as loop.batch_tokens=4096; got '{option}'.")
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
    rest = f"{nearest(key, known)} Known: {', '.join(known)}." if known else " That place has no parts."
    raise UserError(f"--set {place}: there is no '{key}' in the config.{rest}")


def json_value(text: str) -> Any:
    """JSON, Python's True, False and None, or else the text itself."""
    as_in_python = {"True": True, "False": False, "None": None}
    if text in as_in_python:
        return as_in_python[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
