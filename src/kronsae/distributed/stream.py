"""The batches of one process, of which each process computes a part.

All processes read the same text in the same order, and compute the order of the activations; that is cheap. The passes
of the language model are dealt out in turn. A process keeps the activations that it computed itself, and its share of a
batch are the rows that it holds: nothing is sent, and the union of the shares is the batch of one process, whatever the
number of processes. Shares therefore differ in size. Harvested activations are read from disk, where each process reads
an equal part of every batch.

The processes of a row of the mesh, which hold the heads of one dictionary, need the same tokens: they exchange theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from kronsae.data.buffer import Activations, buffer_order
from kronsae.data.harvest import ActivationStream
from kronsae.data.shuffle import NOT_STORED, StaggeredShuffle
from kronsae.data.stored import StoredActivations
from kronsae.data.stream import MakeStream, State
from kronsae.data.tokens import TokenBatch
from kronsae.distributed.shares import TokenShares, in_order
from kronsae.distributed.team import Team


@dataclass(frozen=True)
class Part:
    """Rows of an item of a stream, of which this process holds some.

    Args:
        own: the own rows, by hook.
        holder_B: rank of the process that holds each row of the whole item, in order.
    """

    own: Mapping[str, Tensor]
    holder_B: Int[Tensor, " B"]


class DealtPasses:
    """Yield ``(Part, state)`` for each batch of tokens, whose activations one process computes, in turn.

    Args:
        harvest: computes activations.
        make_tokens: makes the stream of batches of tokens.
        team: the processes.
        state: state yielded with an item; iteration resumes after that item.
    """

    def __init__(
        self,
        harvest: ActivationStream,
        make_tokens: MakeStream[TokenBatch],
        team: Team,
        *,
        state: State | None = None,
    ) -> None:
        self._harvest, self._tokens, self._team = harvest, make_tokens(state=state), team

    def __iter__(self) -> Iterator[tuple[Part, State]]:
        for number, (batch, state) in enumerate(self._tokens):
            holder = number % self._team.size
            own = self._harvest.compute(batch, number) if holder == self._team.rank else {}
            yield Part(own, torch.full((batch.num_kept,), holder)), state


class OwnRows:
    """Store the own rows of activations, and who holds the others; implements `kronsae.data.shuffle.RowStore`.

    Args:
        capacity: number of slots. Only the slots of own rows take memory.
        widths: width of the activations, by hook.
        device: device of the activations.
    """

    def __init__(self, capacity: int, widths: Mapping[str, int], device: torch.device | str) -> None:
        self._holder = torch.full((capacity,), -1)
        self._place = torch.full((capacity,), -1)  # of the row in the storage; -1: another process holds it
        self._free = torch.zeros(0, dtype=torch.int64)
        self._storage: Activations = {hook: torch.empty(0, width, device=device) for hook, width in widths.items()}

    def count(self, item: Part) -> int:
        """Return the number of rows, of all processes."""
        return len(item.holder_B)

    def put(self, item: Part, start: int, slots: Int64[Tensor, "N"]) -> None:
        """Store the own rows from ``start`` on in the given slots, and who holds the others."""
        stored = slots != NOT_STORED
        slots_N = slots[stored]
        before_N = self._place[slots_N]  # a slot is filled anew only after its row has been yielded
        self._free = torch.cat([self._free, before_N[before_N >= 0]])
        self._place[slots_N] = -1
        self._holder[slots_N] = item.holder_B[start : start + len(slots)][stored]
        if item.own:
            self._place[slots_N] = places_N = self._places(len(slots_N))
            for hook, rows in item.own.items():
                arrived = rows[start : start + len(slots)][stored.to(rows.device)]
                self._storage[hook][places_N.to(rows.device)] = arrived

    def take(self, slots: Int64[Tensor, "N"]) -> Part:
        """Return a copy of the own rows in the given slots, and who holds each of the rows."""
        places_N = self._place[slots]
        places_N = places_N[places_N >= 0]
        own = {hook: rows[places_N.to(rows.device)] for hook, rows in self._storage.items()}
        return Part(own, self._holder[slots])

    def _places(self, number: int) -> Tensor:
        """Return free places of the storage, which grows if there are too few."""
        if len(self._free) < number:
            held = len(next(iter(self._storage.values())))
            more = number - len(self._free) + held // 4  # a quarter more, so that it grows seldom
            self._storage = {
                hook: torch.cat([rows, rows.new_empty(more, rows.shape[1])]) for hook, rows in self._storage.items()
            }
            self._free = torch.cat([self._free, torch.arange(held, held + more)])
        places, self._free = self._free[:number], self._free[number:]
        return places


def live_parts(
    harvest: ActivationStream,
    make_tokens: MakeStream[TokenBatch],
    team: Team,
    *,
    widths: Mapping[str, int],
    device: torch.device | str,
    batch_size: int,
    buffer_tokens: int,
    seed: int,
    state: State | None,
) -> Iterable[tuple[Part, State]]:
    """Return the batches of a `kronsae.data.buffer.ShuffleBuffer`, whose activations the processes compute in turn."""

    def make_passes(*, state: State | None = None) -> DealtPasses:
        return DealtPasses(harvest, make_tokens, team, state=state)

    order = buffer_order(batch_size, buffer_tokens, seed)
    return StaggeredShuffle(make_passes, OwnRows(order.held_rows, widths, device), order, state=state)


def stored_parts(stored: StoredActivations, batch_size: int, team: Team) -> Iterator[tuple[Part, State]]:
    """Yield batches of which ``stored`` reads every n-th row for each of n processes, as ``share=`` says."""
    holder_B = torch.arange(batch_size) % team.size
    for own, state in stored:
        yield Part(own, holder_B), state


class SharedBatches:
    """Yield ``({hook: rows}, state)``: the share of each batch that this process trains on.

    Args:
        parts: what each process holds of each batch.
        team: the processes; those of a row of the mesh get the same share, which they exchange.
        among: learns who holds which tokens, before the batch is yielded.
    """

    def __init__(self, parts: Iterable[tuple[Part, State]], team: Team, among: TokenShares) -> None:
        self._parts, self._team, self._among = parts, team, among

    def __iter__(self) -> Iterator[tuple[Activations, State]]:
        heads, row = self._team.heads, self._team.data.me
        for part, state in self._parts:
            row_B = part.holder_B // heads.size
            self._among.begin(row_B)
            member_B = part.holder_B[row_B == row] - row * heads.size
            counts = torch.bincount(member_B, minlength=heads.size).tolist()
            batch = {hook: in_order(heads.gather_rows(rows, counts), member_B) for hook, rows in part.own.items()}
            yield batch, state
