"""Define the protocol of the data stages: an iterable of ``(item, state)``.

A state is a small dict that can be written as JSON. A stage that is constructed with ``state=`` resumes exactly after
the item with that state, on any machine. A stage that reads another stage takes a function that makes it, such as
``functools.partial(TextStream, config)``, because only the outer stage knows at which inner state to start.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Protocol, TypeAlias, TypeVar

from kronsae.support.errors import UserError

State: TypeAlias = dict[str, Any]
Item_co = TypeVar("Item_co", covariant=True)


class MakeStream(Protocol[Item_co]):
    """Make a stage that resumes after ``state``; None starts at the beginning."""

    def __call__(self, *, state: State | None = None) -> Iterable[tuple[Item_co, State]]: ...


def check_state(state: State, keys: Collection[str]) -> None:
    """Check that a state belongs to this stage and to the current version of its order.

    Raises:
        UserError: If the state has other keys.
    """
    if set(state) != set(keys):
        raise UserError(
            f"state must have the keys {', '.join(keys)}; got {', '.join(state)}. It was written by a version of "
            "kronsae with another data order: continue with that version, or start again in a new folder."
        )
