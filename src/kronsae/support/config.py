"""Strict conversion between configs (frozen dataclasses) and JSON.

A dataclass in a union has a ``kind: ClassVar[str]``, which is written with its fields and selects the class on reading.
An unknown key, a missing key or a value of the wrong type raises `UserError` with the key, its place and the nearest
known key. Nothing is ignored silently.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin

from kronsae.support.errors import UserError, nearest, shown, shown_text

C = TypeVar("C")

_ADDED: dict[type, dict[str, type]] = {}
"""Classes, by kind, that are read wherever a union lists the class that is the key."""


def add_to_unions(cls: type, beside: type) -> None:
    """Let `from_dict` read ``cls``, by its ``kind``, wherever a union lists ``beside``.

    A later class of the same kind, name and module takes the place of an earlier one, as when a module is reloaded.

    Raises:
        UserError: another class has this kind.
    """
    kind, added = cls.kind, _ADDED.setdefault(beside, {})  # type: ignore[attr-defined]
    before = added.get(kind)
    if before is not None and (before.__module__, before.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UserError(
            f"kind must belong to one class; '{kind}' of {cls.__name__} is that of {before.__name__}. Rename one."
        )
    added[kind] = cls


def to_dict(config: Any, *, derived: bool = True) -> dict[str, Any]:
    """Return ``config`` (a dataclass, possibly nested) as plain JSON values.

    Args:
        config: the dataclass.
        derived: whether to include fields computed from others (``field(init=False)``, such as a Kronecker encoder's
            d_sae). They help readers; without them, single fields can be changed.
    """
    tag = {"kind": config.kind} if hasattr(config, "kind") else {}
    fields = [field.name for field in dataclasses.fields(config) if derived or field.init]
    return tag | {name: _plain(getattr(config, name), derived) for name in fields}


def from_dict(cls: type[C], data: Any, where: str = "config") -> C:
    """Build ``cls`` from the output of `to_dict`; ``where`` names the place in messages.

    Raises:
        UserError: not a mapping, unknown or missing key, wrong type, or a value that ``cls`` itself refuses.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where} must be a mapping of {cls.__name__} fields; got {shown(data)}.")
    values = dict(data)
    kind = values.pop("kind", None)
    if kind != getattr(cls, "kind", None):
        raise UserError(f"{where}.kind must be {getattr(cls, 'kind', None)!r}; got {shown(kind)}.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    for name in values:
        if name not in fields:
            raise UserError(
                f"{where}.{shown_text(name)} is not a known key of {cls.__name__}.{nearest(shown_text(name), fields)} "
                f"Known keys: {', '.join(fields)}."
            )
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name not in values and no_default:
            raise UserError(f"{where}.{name} is missing; {cls.__name__} needs it.")
    return cls(**{name: checked(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Return ``"place: old -> new"`` for each leaf in which two outputs of `to_dict` differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    both_lists = isinstance(old, list) and isinstance(new, list)
    if both_lists and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


def _plain(value: Any, derived: bool) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value, derived=derived)
    if isinstance(value, tuple | list):
        return [_plain(item, derived) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, derived) for key, item in value.items()}
    return value


def checked(hint: Any, value: Any, where: str) -> Any:
    """Return ``value``, read from JSON, as the type ``hint``; ``where`` names the place in messages.

    Raises:
        UserError: it has another type, or `from_dict` refuses a nested value.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _union_value(get_args(hint), value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value, where)
    if origin is tuple and len(get_args(hint)) == 2 and get_args(hint)[1] is Ellipsis:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise UserError(f"{where} must be a list; got {shown(value)}.")
        return tuple(checked(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is typing.Literal:
        if value not in get_args(hint):
            raise UserError(f"{where} must be one of {', '.join(map(repr, get_args(hint)))}; got {shown(value)}.")
        return value
    return _scalar(hint, value, where)


def _union_value(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    tagged = {option.kind: option for option in options if hasattr(option, "kind")}
    tagged |= {kind: cls for option in options for kind, cls in _ADDED.get(option, {}).items()}
    if tagged:
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if not isinstance(kind, str) or kind not in tagged:
            known = ", ".join(map(repr, tagged))
            raise UserError(
                f"{where}.kind must be one of {known}; got {shown(kind)}.{nearest(shown_text(kind), tagged)}"
            )
        return from_dict(tagged[kind], value, where)
    problems = []
    for option in options:
        try:
            return checked(option, value, where)
        except UserError as error:
            problems.append(str(error))
    raise UserError(problems[0])


def _scalar(hint: Any, value: Any, where: str) -> Any:
    right = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{where} must be a number below 1e308; got {shown(value)}.") from None
    if not right:
        raise UserError(f"{where} must be {hint.__name__}; got {shown(value)}.")
    return value
