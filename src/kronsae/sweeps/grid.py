"""Grid of a sweep: specifications with braces, expanded into points of one SAE and one seed each."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kronsae.core.checks import check_count
from kronsae.runs.config import RunConfig
from kronsae.runs.parsing import RunOptions, json_value, parse_sae
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError
from kronsae.support.files import read_json
from kronsae.training.config import MemberConfig


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Config of a sweep. In ``saes`` and ``set``, ``{a,b,c}`` is replaced by each of a, b and c in turn.

    Args:
        saes: SAEs in the form of ``--sae``, such as ``"kron num_heads=128 d_base={1,2,4} d_extension=4 k=16"``.
        recipe, config, activations, model, text, hook: base of the runs, as for ``kronsae train``.
        tokens: budgets in tokens; empty: the recipe's budget.
        flops: budgets in FLOPs, instead of ``tokens``.
        same_flops_as: name of the SAE that trains on ``tokens``; every other SAE gets the same FLOPs.
        seeds: seeds of the weights and of the order of the data; all SAEs of a seed see the same batches.
        set: other fields of the run, ``field=value``; ``saes.*`` means every SAE.
    """

    saes: tuple[str, ...]
    recipe: str | None = None
    config: str | None = None
    activations: str | None = None
    model: str | None = None
    text: str | None = None
    hook: str | None = None
    tokens: tuple[int, ...] = ()
    flops: tuple[int | float, ...] = ()
    same_flops_as: str | None = None
    seeds: tuple[int, ...] = (0,)
    set: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.saes:
            raise UserError("saes must name at least one SAE; got none. Give --sae 'kron ...'.")
        if not self.seeds:
            raise UserError("seeds must name at least one seed; got none.")
        if self.tokens and self.flops:
            raise UserError("the budgets must be either tokens or flops; got both. Leave one out.")
        if self.flops and self.same_flops_as is not None:
            raise UserError("same_flops_as must be used with tokens; got flops. Leave one out.")
        for name in ("saes", "tokens", "flops", "seeds", "set"):
            values = getattr(self, name)
            if twice := sorted({str(value) for value in values if values.count(value) > 1}):
                raise UserError(f"{name} must have different values; got {', '.join(twice)} more than once.")

    def run_options(self) -> RunOptions:
        """Return the options that are common to all runs."""
        return RunOptions(
            recipe=self.recipe,
            config=None if self.config is None else Path(self.config),
            activations=self.activations,
            model=self.model,
            text=self.text,
            hook=self.hook,
        )


UNTRAINED = ("eval_tokens", "eval_ce_tokens", "loop.log_every", "loop.checkpoint_every")
"""Fields of a run that do not affect the trained weights, not even their last bit."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One SAE of a grid with one seed.

    Args:
        name: name of the SAE, unique among the points of its seed.
        kind: the name without the varying settings.
        settings: values of all settings given in the grid for this point.
        seed: seed of its weights and data.
        run: config of the run with this SAE alone.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    seed: int
    run: RunConfig

    @cached_property
    def digest(self) -> str:
        """Return a hash that identifies a training: all of its config except the name and the fields in `UNTRAINED`."""
        data = to_dict(self.run)
        for member in data["saes"]:
            del member["name"]
        for place in UNTRAINED:
            inner, key = (data["loop"], place.removeprefix("loop.")) if "." in place else (data, place)
            del inner[key]
        if data["activation_order"] == "random":  # sweeps of earlier versions did not have the field
            del data["activation_order"]
        return digest_of(data)

    @cached_property
    def shared(self) -> str:
        """Return a hash that is equal for points that can train on one stream."""
        return digest_of(to_dict(self.run) | {"saes": []})


def digest_of(data: Any) -> str:
    """Return a short hash of JSON values."""
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=6).hexdigest()


def points(sweep: SweepConfig) -> list[Point]:
    """Return all points of the grid, ordered by seed, then by budget and options, then by SAE as given.

    Raises:
        UserError: a specification is invalid, or two SAEs are identical.
    """
    members = [one for spec in sweep.saes for one in _members(spec)]
    budgets = [{"tokens": value} for value in sweep.tokens] + [{"flops": value} for value in sweep.flops]
    options = [_expand(option, "--set") for option in sweep.set]
    for option in sweep.set:
        if re.match(r"saes\.\d", option):
            raise UserError(f"--set in a sweep must use saes.*, which means every SAE; got '{option}'.")
        if re.match(r"(saes\.\*\.)?(seed|name)\s*=", option):
            raise UserError(
                f"seeds must be given with --seeds and names with --sae in a sweep; got --set {option}. Leave it out."
            )
    found = []
    run_options = sweep.run_options().with_own_hook(
        [member for member, _ in members]
    )  # without a common hook, each SAE would need its own stream
    for seed, budget, chosen in itertools.product(sweep.seeds, budgets or [{}], itertools.product(*options)):
        around = budget | {place: json_value(value) for place, _, value in (one.partition("=") for one in chosen)}
        for member, settings in members:
            empty = {"tokens": None, "flops": None, "same_flops_as": None}
            run = run_options.run_config([replace(member, seed=seed)], empty | budget, seed, chosen)
            found.append(Point(name=member.name, kind=member.name, settings=settings | around, seed=seed, run=run))
    return _named(found)


def _members(spec: str) -> list[tuple[MemberConfig, dict[str, Any]]]:
    """Return the SAEs of one ``--sae`` argument, each with the settings given for it."""
    found = []
    for expanded in _expand(spec, "--sae"):
        member, settings = parse_sae(expanded), {}
        for pair in shlex.split(expanded)[1:]:
            name, _, value = pair.partition("=")
            settings[name] = json_value(value)
        if "seed" in settings:
            raise UserError(f"seeds must be given with --seeds in a sweep; got '{spec}'. Leave seed out of it.")
        settings.pop("name", None)
        found.append((member, settings))
    return found


def _expand(text: str, what: str) -> list[str]:
    """Return all expansions of the braces in a text: four for ``"a={1,2} b={3,4}"``, the last pair varying fastest."""
    parts: list[list[str]] = []
    rest = text
    while (start := rest.find("{")) >= 0:
        end = _closing(rest, start, text, what)
        parts += [[rest[:start]], _values(rest[start + 1 : end])]
        rest = rest[end + 1 :]
    if "}" in rest:
        raise UserError(f"{what} must have matching braces; got '{text}'.")
    return ["".join(chosen) for chosen in itertools.product(*parts, [rest])]


def _closing(rest: str, start: int, text: str, what: str) -> int:
    end = rest.find("}", start)
    if end < 0 or "{" in rest[start + 1 : end] or not rest[start + 1 : end].strip():
        raise UserError(f"{what} must have values between its braces, and no nested braces; got '{text}'.")
    return end


def _values(inside: str) -> list[str]:
    """Return the values between commas; commas inside a list, ``[1,2]``, do not separate."""
    values = [value.strip() for value in re.split(r",(?![^\[]*\])", inside)]
    if "" in values:
        raise UserError(f"braces must contain comma-separated values; got '{{{inside}}}'.")
    return values


def _named(found: Sequence[Point]) -> list[Point]:
    """Return the points with names that contain the varying settings: ``kron-d_base2-lr0.001-minimum``."""
    named = []
    for point in found:
        alike = [other for other in found if other.kind == point.kind]
        keys = dict.fromkeys(key for other in alike for key in other.settings)
        varying = [key for key in keys if len({repr(other.settings.get(key)) for other in alike}) > 1]
        tail = [_tail(key, point.settings[key]) for key in varying if key in point.settings]
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join([point.kind, *tail])).rstrip("_")
        run = replace(point.run, saes=(replace(point.run.saes[0], name=name),))
        named.append(replace(point, name=name, run=run))
    seen: dict[tuple[str, int], Point] = {}
    for point in named:
        if (key := (point.name, point.seed)) in seen:
            raise UserError(f"SAEs of the grid must have different names; got '{point.name}' twice. Give one a name=.")
        seen[key] = point
    known: dict[str, Point] = {}
    for point in named:
        if (other := known.setdefault(point.digest, point)) is not point:
            raise UserError(
                f"SAEs of the grid must differ; got the same training as '{point.name}' and as '{other.name}'. "
                "Leave one out."
            )
    return named


def _tail(key: str, value: Any) -> str:
    """Return the part of a point's name for one setting; a string value needs no key."""
    return value if isinstance(value, str) else f"{key.removeprefix('saes.*.')}{value}"


def numbers(text: str, name: str) -> tuple[int | float, ...]:
    """Parse ``"1,2,3"`` or ``"{1,2,3}"``, the form of ``--tokens``, ``--flops`` and ``--seeds`` of a sweep."""
    found: list[int | float] = []
    for value in text.strip().strip("{}").split(","):
        try:
            found.append(int(value) if re.fullmatch(r"\s*[\d_]+\s*", value) else float(value))
        except ValueError:
            raise UserError(f"{name} must be comma-separated numbers; got '{text}'.") from None
    return tuple(found)


def seeds(given: int | str | Sequence[int]) -> tuple[int, ...]:
    """Return seeds: 0, 1, 2 for 3 or ``"3"``; a sequence, ``"4,5"`` and ``"{4}"`` are taken as given."""
    if isinstance(given, str):
        several = numbers(given, "--seeds")
        if any(not isinstance(seed, int) for seed in several):
            raise UserError(f"--seeds must be whole numbers; got '{given}'.")
        given = [int(seed) for seed in several] if {",", "{"} & {*given} else int(several[0])
    if isinstance(given, int):
        check_count("seeds", given)
        return tuple(range(given))
    return tuple(given)


def sweep_config(path: Path | None, given: Mapping[str, Any]) -> SweepConfig:
    """Return the config from a file and from other options, which override the file's values."""
    data: dict[str, Any] = {}
    if path is not None:
        read = read_json(path, "the sweep")
        inner = read.get("sweep") if isinstance(read, dict) and "kronsae_version" in read else read
        if not isinstance(inner, dict):
            raise UserError(f"{path} must hold the config of a sweep, like the sweep.json of a sweep's folder.")
        data = dict(inner)
    if "flops" in given or "tokens" in given:
        data.pop("tokens", None)
        data.pop("flops", None)
    values = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    return from_dict(SweepConfig, data | values, where=str(path or "the sweep"))
