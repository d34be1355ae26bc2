"""Who trains a run: this process alone, or a team of processes (`kronsae.distributed`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kronsae.core.shares import sharing
from kronsae.data.buffer import Activations
from kronsae.data.harvest import ActivationStream
from kronsae.data.stream import State
from kronsae.runs.config import RunConfig
from kronsae.runs.pipeline import Source
from kronsae.support.errors import UserError
from kronsae.training.member import Member
from kronsae.training.split import Split, Undivided
from kronsae.training.state import LAYOUT, Checkpoint, Progress, load_members, newest_checkpoint, save_state

if TYPE_CHECKING:
    from kronsae.distributed.shares import TokenShares
    from kronsae.distributed.team import Team


class Trainers(Protocol):
    """What of a training depends on whether several processes take part. All of them call every method."""

    @property
    def leads(self) -> bool:
        """Whether this process speaks and writes."""
        ...

    @property
    def description(self) -> str:
        """What to add to the plan of the run, which is that of a single process."""
        ...

    @property
    def split(self) -> Split:
        """Which latents of a dictionary this process holds."""
        ...

    def check(self, config: RunConfig) -> None:
        """Refuse a run that these processes cannot train."""
        ...

    def batches(self, source: Source, state: State | None) -> Iterable[tuple[Activations, State]]:
        """Return the own share of the shuffled batches of activations, resuming after ``state``."""
        ...

    def sharing(self) -> AbstractContextManager[None]:
        """Return the context in which these batches are trained on."""
        ...

    def agreed(self, flag: Callable[[], bool]) -> bool:
        """Return whether the flag is set in one of the processes."""
        ...

    def save(self, folder: Path, members: Sequence[Member], progress: Progress) -> None:
        """Write a checkpoint."""
        ...

    def newest(self, folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
        """Return the newest checkpoint that is not damaged, the same one for all; ``say`` receives what is damaged."""
        ...

    def load(self, checkpoint: Checkpoint, members: Sequence[Member]) -> None:
        """Load a checkpoint, whoever wrote it."""
        ...


class Alone:
    """Implements `Trainers`: one process."""

    leads = True
    description = ""
    split = Undivided()

    def check(self, config: RunConfig) -> None:
        """Do nothing: it can train every run."""

    def batches(self, source: Source, state: State | None) -> Iterable[tuple[Activations, State]]:
        return source.batches(state)

    def sharing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def agreed(self, flag: Callable[[], bool]) -> bool:
        return flag()

    def save(self, folder: Path, members: Sequence[Member], progress: Progress) -> None:
        save_state(folder, members, progress)

    def newest(self, folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
        return newest_checkpoint(folder, say)

    def load(self, checkpoint: Checkpoint, members: Sequence[Member]) -> None:
        _load(None, checkpoint, members)


class Together:
    """Implements `Trainers`: a team of processes."""

    def __init__(self, team: Team) -> None:
        self._team = team

    @property
    def leads(self) -> bool:
        return self._team.leads

    @property
    def description(self) -> str:
        shares, parts = self._team.data.size, self._team.heads.size
        return (
            f"\n{self._team.size} processes: {shares} share(s) of the tokens of each batch, {parts} part(s) of each "
            "dictionary. Memory and time above are those of a single one."
        )

    @cached_property
    def split(self) -> Split:
        from kronsae.distributed.heads import HeadSplit

        return HeadSplit(self._team.heads, self.among)

    def check(self, config: RunConfig) -> None:
        from kronsae.distributed.heads import check_divisible

        if config.activations is not None and config.activation_order != "random":
            raise UserError(
                "activation_order must be 'random' with several processes, which read a share of each batch each; got "
                f"'{config.activation_order}'. Leave it out, or train with one process."
            )
        parts = self._team.heads.size
        for member in config.saes:
            check_divisible(member.shape(1, config.hook), parts)
            if parts > 1 and member.revive_every_tokens is not None:
                raise UserError(
                    f"head_parallel must be 1 with revive_every_tokens, as in '{member.name}'; got {parts}. Leave "
                    "--head-parallel out, or leave revive_every_tokens out: AuxK revives latents too."
                )

    def batches(self, source: Source, state: State | None) -> Iterable[tuple[Activations, State]]:
        from kronsae.distributed.stream import SharedBatches, live_parts, stored_parts

        config, team = source.config, self._team
        if config.activations is not None:
            stored = source.stored(state, share=(team.rank, team.size))
            return SharedBatches(stored_parts(stored, config.loop.batch_tokens, team), team, self.among)
        tokens = source.tokens(held_out=False, shuffled=True)
        parts = live_parts(
            ActivationStream(source.language_model, config.hooks, tokens),
            tokens,
            team,
            widths=source.widths,
            device=source.device,
            batch_size=config.loop.batch_tokens,
            buffer_tokens=config.buffer_tokens,
            seed=config.seed,
            state=state,
        )
        return SharedBatches(parts, team, self.among)

    def sharing(self) -> AbstractContextManager[None]:
        return sharing(self.among)

    def agreed(self, flag: Callable[[], bool]) -> bool:
        return self._team.agreed(flag())

    def save(self, folder: Path, members: Sequence[Member], progress: Progress) -> None:
        from kronsae.distributed.checkpoint import save_shards

        save_shards(self._team, folder, members, progress)

    def newest(self, folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
        from kronsae.distributed.checkpoint import agreed_checkpoint

        return agreed_checkpoint(self._team, folder, say)

    def load(self, checkpoint: Checkpoint, members: Sequence[Member]) -> None:
        _load(self._team, checkpoint, members)

    @cached_property
    def among(self) -> TokenShares:
        from kronsae.distributed.shares import TokenShares

        return TokenShares(self._team.data)


def _load(team: Team | None, checkpoint: Checkpoint, members: Sequence[Member]) -> None:
    """Load a checkpoint; one of a single process into a single process without what several need."""
    if team is None and not (checkpoint.folder / LAYOUT).exists():
        load_members(checkpoint, members)
        return
    from kronsae.distributed.checkpoint import load_shards

    load_shards(team, checkpoint, members)
