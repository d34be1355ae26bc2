"""The protocol of every stage: an iterable of ``(item, state)``.

A state is a small JSON-able dict. Building a stage again with ``state=`` goes on exactly after the item
that the state came with, on this machine or another. Stages that read from another stage take a function
that makes it (``functools.partial(TextStream, config)``), since only the outer stage knows from which of
the inner states to start.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Protocol, TypeAlias, TypeVar

from kronsae.support.errors import UserError

State: TypeAlias = dict[str, Any]
Item_co = TypeVar("Item_co", covariant=True)


class MakeStream(Protocol[Item_co]):
    """Makes a stage that goes on after ``state``; None starts from the beginning."""

    def __call__(self, *, state: State | None = None) -> Iterable[tuple[Item_co, State]]: ...


def check_state(state: State, keys: Collection[str]) -> None:
    """Refuse a state of another stage, or of this one in a version that served another order.

    Raises:
        UserError: The state has other keys.
    """
    if set(state) != set(keys):
        raise UserError(
            f"state must have the keys {', '.join(keys)}; got {', '.join(state)}. Another version of kronsae wrote it, "
            "which read the data in another order: go on with that version, or begin anew in another folder."
        )
