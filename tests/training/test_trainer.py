"""Test the loop: its length, metrics, checkpoints and end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kronsae.runs.architectures import jumprelu
from kronsae.runs.recipes import kron, topk
from kronsae.support.errors import UserError
from kronsae.training.config import LoopConfig
from kronsae.training.member import Diverged, Member
from kronsae.training.state import Progress, load_members, newest_checkpoint
from kronsae.training.trainer import fit

D_IN = 8
BATCH = 16


class Memory:
    """A sink that records its rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.flushed_after: list[int] = []

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))

    def flush(self) -> None:
        self.flushed_after.append(len(self.rows))

    def close(self) -> None:
        """Do nothing: nothing is open."""


def stream(first: int = 0, last: int = 1000) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    for index in range(first, last):
        generator = torch.Generator().manual_seed(index)
        yield {"h": torch.randn(BATCH, D_IN, generator=generator)}, {"batch": index + 1}


def members(steps: int) -> list[Member]:
    configs = [topk(d_sae=16, k=2), kron(num_heads=2, d_base=2, d_extension=4, k=2)]
    return [Member(config, D_IN, "h", steps) for config in configs]


def loop(steps: int, **changes: Any) -> LoopConfig:
    return LoopConfig(tokens=steps * BATCH, batch_tokens=BATCH, **changes)


def test_rows_come_every_so_often_and_at_the_end() -> None:
    sink = Memory()
    progress = fit(members(7), stream(), loop(7, log_every=3), [sink])
    assert [(row["step"], row["tokens"], row["sae"]) for row in sink.rows] == [
        (step, step * BATCH, name) for step in (3, 6, 7) for name in ("topk", "kron")
    ]
    assert (progress.step, progress.tokens, progress.stream) == (7, 7 * BATCH, {"batch": 7})
    assert sink.rows[0]["seconds"] <= sink.rows[-1]["seconds"] <= progress.seconds
    assert list(sink.rows[0])[:4] == ["step", "tokens", "seconds", "sae"]
    assert {"loss", "explained_variance", "l0", "dead_share", "lr"} <= sink.rows[0].keys()


def test_a_remainder_of_tokens_is_not_used() -> None:
    assert fit(members(2), stream(), LoopConfig(tokens=2 * BATCH + 5, batch_tokens=BATCH)).tokens == 2 * BATCH


def test_checkpoints_come_every_so_often_and_sinks_are_safe_before(tmp_path: Path) -> None:
    seen: list[tuple[int, list[str]]] = []

    class Watching(Memory):
        def flush(self) -> None:
            super().flush()
            seen.append((self.rows[-1]["step"], sorted(path.name for path in tmp_path.glob("step-*"))))

    fit(members(5), stream(), loop(5, log_every=1, checkpoint_every=2), [Watching()], tmp_path)
    assert seen == [(2, []), (4, ["step-00000002"]), (5, ["step-00000002", "step-00000004"])]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_a_stop_saves_and_the_rest_gives_the_same_bits(tmp_path: Path) -> None:
    whole = members(6)
    fit(whole, stream(), loop(6))
    group = members(6)
    answers = iter([False, False, True])  # before the first step, after it, after the second
    stopped = fit(group, stream(), loop(6), (), tmp_path, should_stop=lambda: next(answers))
    assert stopped.step == 2
    again = members(6)
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    assert saved.progress == stopped
    assert stopped.stream is not None
    load_members(saved, again)
    assert fit(again, stream(stopped.stream["batch"]), loop(6), (), tmp_path, stopped).step == 6
    for one, other in zip(whole, again, strict=True):
        for key, value in one.sae.state_dict().items():
            assert torch.equal(value, other.sae.state_dict()[key])


def test_a_stop_asked_for_before_the_first_step(tmp_path: Path) -> None:
    assert fit(members(3), stream(), loop(3), (), tmp_path, should_stop=lambda: True) == Progress()
    assert list(tmp_path.iterdir()) == []


def test_a_stop_is_asked_once_per_step_so_that_none_ends_the_loop_unsaved(tmp_path: Path) -> None:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    progress = fit(members(9), stream(), loop(9, checkpoint_every=100), (), tmp_path, should_stop=should_stop)
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    assert (progress.step, saved.progress) == (2, progress)


def test_a_stop_at_the_last_step_is_an_end(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    assert fit(members(2), stream(), loop(2), (), tmp_path, should_stop=lambda: next(asked)).step == 2


def test_nothing_is_left_to_do() -> None:
    done = Progress(step=4, tokens=4 * BATCH, seconds=1.5, stream={"batch": 4})
    assert fit(members(4), iter(()), loop(4), progress=done) == done


def test_a_stream_that_ends_early_is_told() -> None:
    message = "^the stream must hold 48 tokens; it ended after 32. Train on fewer tokens or give more text.$"
    with pytest.raises(UserError, match=message):
        fit(members(3), stream(last=2), loop(3))


def test_what_is_not_defined_is_null() -> None:
    """With equal activations the explained variance is undefined, and JSON has no NaN."""
    sink = Memory()
    constant = (({"h": torch.ones(BATCH, D_IN)}, {"batch": index}) for index in range(1, 3))
    as_they_are = Member(topk(d_sae=16, k=2, normalize_activations="none"), D_IN, "h", 2)
    fit([as_they_are], constant, loop(2, log_every=1), [sink])
    assert {row["explained_variance"] for row in sink.rows} == {None}
    assert all(row["loss"] > 0 for row in sink.rows)


def test_weights_that_the_last_step_made_infinite_are_neither_kept_nor_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite, so only a check of the weights detects the failure."""
    (member, _) = members(3)
    plain, taken = member.optimizer.step, []

    def overflows(**arguments: Any) -> None:
        plain(**arguments)
        taken.append(1)
        if len(taken) == 3:
            member.sae.W_dec.data[0, 0] = math.inf

    monkeypatch.setattr(member.optimizer, "step", overflows)
    with pytest.raises(Diverged, match=r"^training of 'topk' diverged: the weights decoder.W_dec are not finite"):
        fit([member], stream(), loop(3), checkpoints=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_threshold_of_0_is_no_divergence() -> None:
    """JumpReLU keeps its logarithm, minus infinity, until a batch has an active latent."""
    member = Member(jumprelu(d_sae=16, k=2), D_IN, "h", 1)
    assert bool(member.sae.get_parameter("sparsifier.log_threshold").isinf().all())
    member.check_weights(1)
    member.sae.get_parameter("sparsifier.log_threshold").data[3] = math.nan
    with pytest.raises(Diverged, match=r"the weights sparsifier\.log_threshold are not finite"):
        member.check_weights(1)
