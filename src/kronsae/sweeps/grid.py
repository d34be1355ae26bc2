"""The grid of a sweep: words with braces, multiplied out into points, each one SAE with one seed."""

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
    """A grid. In ``saes`` and ``set``, a value ``{a,b,c}`` stands for each of a, b and c in turn.

    Args:
        saes: SAEs as ``--sae`` takes them, such as ``"kron num_heads=128 d_base={1,2,4} d_extension=4 k=16"``.
        recipe, config, activations, model, text, hook: what the runs start from, as for ``kronsae train``.
        tokens: budgets in tokens; none: the recipe's.
        flops: or budgets in FLOPs.
        same_flops_as: with ``tokens``, the SAE whose FLOPs all others spend.
        seeds: each is one of the weights and of the order of the data, so all SAEs of a seed see the same batches.
        set: other fields of the run, ``place=value``; ``saes.*`` is every SAE.
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
            raise UserError("give the budgets as tokens or as flops, not both.")
        if self.flops and self.same_flops_as is not None:
            raise UserError("same_flops_as goes with tokens, not with flops. Leave one out.")
        for name in ("saes", "tokens", "flops", "seeds", "set"):
            values = getattr(self, name)
            if twice := sorted({str(value) for value in values if values.count(value) > 1}):
                raise UserError(f"{name} must differ; {', '.join(twice)} stands there twice.")

    def run_options(self) -> RunOptions:
        """Return what the runs start from."""
        config, activations = (None if path is None else Path(path) for path in (self.config, self.activations))
        return RunOptions(
            recipe=self.recipe,
            config=config,
            activations=activations,
            model=self.model,
            text=self.text,
            hook=self.hook,
        )


UNTRAINED = ("eval_tokens", "loop.log_every", "loop.checkpoint_every")
"""Fields of a run that leave its weights as they are, to the last bit."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One SAE of a grid, with one seed.

    Args:
        name: tells it from the other points of its seed.
        kind: the name without what varies.
        settings: what its words say, by word; of the whole grid's words, so that points can be told apart.
        seed: of its weights and its data.
        run: the run with this SAE alone.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    seed: int
    run: RunConfig

    @cached_property
    def digest(self) -> str:
        """Equal for what trains to equal bits: everything but the name, and but how often the training is logged and
        saved and on how much text it is evaluated (`UNTRAINED`)."""
        data = to_dict(self.run)
        for member in data["saes"]:
            del member["name"]
        for place in UNTRAINED:
            inner, key = (data["loop"], place.removeprefix("loop.")) if "." in place else (data, place)
            del inner[key]
        return digest_of(data)

    @cached_property
    def shared(self) -> str:
        """Equal for points that can train on one stream."""
        return digest_of(to_dict(self.run) | {"saes": []})


def digest_of(data: Any) -> str:
    """A short name for JSON values, by content."""
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=6).hexdigest()


def points(sweep: SweepConfig) -> list[Point]:
    """All points of the grid, ordered by seed, then by budget and options, then as the SAEs are given.

    Raises:
        UserError: words that cannot be read, or two SAEs that nothing tells apart.
    """
    members = [one for spec in sweep.saes for one in _members(spec)]
    budgets = [{"tokens": value} for value in sweep.tokens] + [{"flops": value} for value in sweep.flops]
    options = [_expanded(option, "--set") for option in sweep.set]
    for option in sweep.set:
        if re.match(r"saes\.\d", option):
            raise UserError(f"--set in a sweep takes saes.* for every SAE, not one of them; got '{option}'.")
        if re.match(r"(saes\.\*\.)?(seed|name)\s*=", option):
            raise UserError(f"a sweep has its seeds from --seeds and its names from --sae; leave --set {option} out.")
    found = []
    run_options = sweep.run_options().with_own_hook(
        [member for member, _ in members]
    )  # one hook, or one stream for each SAE
    for seed, budget, chosen in itertools.product(sweep.seeds, budgets or [{}], itertools.product(*options)):
        around = budget | {place: json_value(value) for place, _, value in (one.partition("=") for one in chosen)}
        for member, settings in members:
            empty = {"tokens": None, "flops": None, "same_flops_as": None}
            run = run_options.run_config([replace(member, seed=seed)], empty | budget, seed, chosen)
            found.append(Point(name=member.name, kind=member.name, settings=settings | around, seed=seed, run=run))
    return _named(found)


def _members(spec: str) -> list[tuple[MemberConfig, dict[str, Any]]]:
    """The SAEs of one ``--sae``, with what its words say."""
    found = []
    for words in _expanded(spec, "--sae"):
        member, settings = parse_sae(words), {}
        for word in shlex.split(words)[1:]:
            name, _, value = word.partition("=")
            settings[name] = json_value(value)
        if "seed" in settings:
            raise UserError(f"seeds of a sweep are given once, for weights and data; leave seed out of '{spec}'.")
        settings.pop("name", None)
        found.append((member, settings))
    return found


def _expanded(text: str, what: str) -> list[str]:
    """``"a={1,2} b={3,4}"`` as the four texts without braces, the last one varying fastest."""
    parts: list[list[str]] = []
    rest = text
    while (start := rest.find("{")) >= 0:
        end = _closing(rest, start, text, what)
        parts += [[rest[:start]], _values(rest[start + 1 : end])]
        rest = rest[end + 1 :]
    if "}" in rest:
        raise UserError(f"{what} must have its braces in pairs; got '{text}'.")
    return ["".join(chosen) for chosen in itertools.product(*parts, [rest])]


def _closing(rest: str, start: int, text: str, what: str) -> int:
    end = rest.find("}", start)
    if end < 0 or "{" in rest[start + 1 : end] or not rest[start + 1 : end].strip():
        raise UserError(f"{what} must have values between its braces, one pair in no other; got '{text}'.")
    return end


def _values(inside: str) -> list[str]:
    """Values parted by commas; those of a list, ``[1,2]``, stay together."""
    values = [value.strip() for value in re.split(r",(?![^\[]*\])", inside)]
    if "" in values:
        raise UserError(f"braces must hold values parted by commas; got '{{{inside}}}'.")
    return values


def _named(found: Sequence[Point]) -> list[Point]:
    """Names that say what varies: ``kron-d_base2-lr0.001-minimum``."""
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
            raise UserError(f"the grid must not hold an SAE twice; '{point.name}' is there again. Give it a name=.")
        seen[key] = point
    known: dict[str, Point] = {}
    for point in named:
        if (other := known.setdefault(point.digest, point)) is not point:
            raise UserError(
                f"the grid must not hold an SAE twice; '{point.name}' is the same training as '{other.name}'. "
                "Leave one out."
            )
    return named


def _tail(key: str, value: Any) -> str:
    """A value that is a word says itself what it is about."""
    return value if isinstance(value, str) else f"{key.removeprefix('saes.*.')}{value}"


def numbers(text: str, name: str) -> tuple[int | float, ...]:
    """``"1,2,3"`` or ``"{1,2,3}"`` as numbers, as ``--tokens``, ``--flops`` and ``--seeds`` of a sweep take them."""
    found: list[int | float] = []
    for value in text.strip().strip("{}").split(","):
        try:
            found.append(int(value) if re.fullmatch(r"\s*[\d_]+\s*", value) else float(value))
        except ValueError:
            raise UserError(f"{name} must be numbers parted by commas; got '{text}'.") from None
    return tuple(found)


def seeds(given: int | str | Sequence[int]) -> tuple[int, ...]:
    """3 (or ``"3"``) as 0, 1, 2; several (or ``"4,5"``, and one as ``"{4}"``) as they are."""
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
    """A sweep from a file and from what is given besides, which takes the place of the file's values."""
    data: dict[str, Any] = {}
    if path is not None:
        read = read_json(path, "the sweep")
        inner = read.get("sweep") if isinstance(read, dict) and "kronsae_version" in read else read
        if not isinstance(inner, dict):
            raise UserError(f"{path} must hold a sweep, as the sweep.json of a sweep's folder does; it holds none.")
        data = dict(inner)
    if "flops" in given or "tokens" in given:
        data.pop("tokens", None)
        data.pop("flops", None)
    values = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    return from_dict(SweepConfig, data | values, where=str(path or "the sweep"))
