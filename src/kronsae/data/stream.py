"""The protocol of every stage: an iterable of ``(item, state)``.

A state is a small JSON-able dict. Building a stage again with ``state=`` goes on exactly after the item
that the state came with, on this machine or another. Stages that read from another stage take a function
that makes it (``functools.partial(TextStream, config)``), since only the outer stage knows from which of
the inner states to start.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias, TypeVar

State: TypeAlias = dict[str, Any]
Item_co = TypeVar("Item_co", covariant=True)


class MakeStream(Protocol[Item_co]):
    """Makes a stage that goes on after ``state``; None starts from the beginning."""

    def __call__(self, *, state: State | None = None) -> Iterable[tuple[Item_co, State]]: ...
