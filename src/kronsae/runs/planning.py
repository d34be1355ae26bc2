"""What a run will take - tokens, steps, memory, disk, hours - said before it begins, and refused if it is too much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kronsae.core.experts import gate_of
from kronsae.core.flops import training_flops
from kronsae.core.gates import GATES
from kronsae.core.sae import SAEConfig, count_parameters
from kronsae.data.buffer import buffer_order
from kronsae.data.harvest import ActivationStream
from kronsae.kernels.portable import PRODUCT_ELEMENTS
from kronsae.runs.config import RunConfig
from kronsae.runs.pipeline import Source
from kronsae.support.errors import UserError
from kronsae.support.resources import available_memory_bytes, free_disk_bytes, in_bytes, size_bytes
from kronsae.training.budget import member_steps
from kronsae.training.config import MemberConfig
from kronsae.training.member import Member

TIMED_FROM_STEPS = 50
"""Timing a step takes three of them: below this many it would cost more than it tells."""

STATE_BYTES = 16
"""Per parameter: the weight, its gradient and Adam's two moments, 4 bytes each."""

MODEL_WORK = 16
"""Vectors of the model's width that one layer of a transformer holds per token at a time, about: the residual stream,
its norm, queries, keys, values and output of the attention, and the two or three wider ones of the MLP."""


@dataclass(frozen=True, kw_only=True)
class MemberPlan:
    """What one SAE will take.

    Args:
        name, architecture, d_sae, parameters: the SAE.
        tokens, steps, flops: its own training; FLOPs as `training_flops` counts them.
        widths: of the activations that it reads and writes, by hook.
        state_bytes: weights, gradients and Adam's moments.
        work_bytes: what one step needs besides, about.
        disk_bytes: checkpoints (two at a time) and the saved SAE.
        saved_bytes: of these, the saved SAE, which stays.
        step_seconds: of one step, measured; None where it was not.
        note: what else to know, or ``""``.
    """

    name: str
    architecture: str
    d_sae: int
    parameters: int
    tokens: int
    steps: int
    flops: int
    widths: dict[str, int]
    state_bytes: int
    work_bytes: int
    disk_bytes: int
    saved_bytes: int
    step_seconds: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take; ``str()`` says it in lines. With fewer of its members it is the plan of these alone.

    Args:
        model, batch_tokens: the run.
        window_pool_tokens, buffer_tokens: what is shuffled together before and after the model; 0 for harvested
            activations.
        first_tokens: tokens that the model reads before the first step.
        steps_done: steps that an interrupted run has behind it.
        members: the SAEs, each with its own number of steps; the run is as long as the longest.
        language_model_bytes: its weights, loaded by now; 0 for harvested activations.
        model_work_bytes: what one pass of it needs besides, about.
        memory_available_bytes: what there is for all of these, on the device they live on; None: not known.
        disk_free_bytes: what there is, with what checkpoints of the run itself take up by now.
        batch_seconds: to have one batch of activations, measured; None where it was not.
    """

    model: str
    batch_tokens: int
    window_pool_tokens: int
    buffer_tokens: int
    first_tokens: int
    steps_done: int
    members: tuple[MemberPlan, ...]
    language_model_bytes: int
    model_work_bytes: int
    memory_available_bytes: int | None
    disk_free_bytes: int
    batch_seconds: float | None = None

    @property
    def widths(self) -> dict[str, int]:
        """Of the activations of every hook that some member reads or writes."""
        return {hook: width for member in self.members for hook, width in member.widths.items()}

    @property
    def hook(self) -> str:
        """These hooks, in a line."""
        return ", ".join(self.widths)

    @property
    def place(self) -> str:
        """Where it trains, with the width of each hook."""
        if len(self.widths) == 1:
            return f"{self.hook} of {self.model} (d_in {self.d_in})"
        return f"{', '.join(f'{hook} (width {width})' for hook, width in self.widths.items())} of {self.model}"

    @property
    def d_in(self) -> int:
        """Width of the activations of all of them: what is kept of a token."""
        return sum(self.widths.values())

    @property
    def buffer_bytes(self) -> int:
        """Of the shuffle buffer."""
        return 4 * self.buffer_tokens * self.d_in

    @property
    def window_pool_bytes(self) -> int:
        """Of the pool of windows."""
        return 4 * self.window_pool_tokens

    @property
    def start(self) -> str:
        """What happens before the first step, in a sentence."""
        if self.buffer_tokens == 0:
            return (
                "Checking the harvested activations against their checksums; they are read in a random order over all "
                "of them, without window pool or shuffle buffer."
            )
        if self.steps_done:
            most = min(2 * self.buffer_tokens, self.tokens)
            return f"Running the model again on what the shuffle buffer held, at most {most:,} tokens."
        return f"Running the model on the first {self.first_tokens:,} tokens."

    @property
    def disk_bytes(self) -> int:
        """Checkpoints (two at a time) and the saved SAEs."""
        return sum(member.disk_bytes for member in self.members)

    @property
    def steps(self) -> int:
        """Steps of the longest training."""
        return max(member.steps for member in self.members)

    @property
    def tokens(self) -> int:
        """Tokens of the longest training."""
        return self.steps * self.batch_tokens

    @property
    def memory_bytes(self) -> int:
        """Memory for everything at once; the work spaces are used in turn."""
        work = max(self.model_work_bytes, *(member.work_bytes for member in self.members))
        state = sum(member.state_bytes for member in self.members)
        return self.language_model_bytes + self.window_pool_bytes + self.buffer_bytes + state + work

    @property
    def seconds(self) -> float | None:
        """Time for the steps that are left; None where nothing was measured."""
        if self.batch_seconds is None:
            return None
        own = ((max(0, member.steps - self.steps_done), member.step_seconds or 0.0) for member in self.members)
        return (self.steps - self.steps_done) * self.batch_seconds + sum(steps * each for steps, each in own)

    @property
    def first_seconds(self) -> float:
        """Time before the first step of a run that begins, as far as it is known; 0 for harvested activations."""
        return (self.batch_seconds or 0.0) * self.first_tokens / self.batch_tokens

    @property
    def fits_memory(self) -> bool:
        """Whether there is memory for it, as far as is known."""
        return self.memory_available_bytes is None or self.memory_bytes <= self.memory_available_bytes

    def check(self) -> None:
        """Refuse what the machine cannot hold.

        Raises:
            UserError: memory or disk.
        """
        if not self.fits_memory:
            available = in_bytes(self.memory_available_bytes or 0)
            raise UserError(
                f"the run must fit into memory; about {in_bytes(self.memory_bytes)} are needed "
                f"({self._memory_parts()}) and {available} are available. "
                "Lower buffer_tokens, train fewer or smaller SAEs at once, or take smaller batches."
            )
        if self.disk_bytes > self.disk_free_bytes:
            raise UserError(
                f"checkpoints and SAEs must fit on the disk; about {in_bytes(self.disk_bytes)} are needed and "
                f"{in_bytes(self.disk_free_bytes)} are free. Make room, or choose another --out."
            )

    def to_dict(self) -> dict[str, Any]:
        """All figures, derived ones included, as JSON values."""
        names = ("hook", "d_in", "steps", "tokens", "buffer_bytes", "memory_bytes", "disk_bytes", "seconds")
        return asdict(self) | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        lines = [f"{self.steps:,} steps of {self.batch_tokens:,} tokens at {self.place}: {self.tokens:,} tokens"]
        for member in self.members:
            own = "" if member.steps == self.steps else f"{member.tokens:,} tokens in {member.steps:,} steps; "
            lines.append(
                f"  {member.name}: {member.architecture}, {member.d_sae:,} latents, {member.parameters:,} parameters; "
                f"{own}{member.flops:.2e} FLOPs"
            )
            if member.note:
                lines.append(f"    {member.note}")
        available = self.memory_available_bytes
        there = "" if available is None else f" of {in_bytes(available)}"
        lines.append(f"Memory: about {in_bytes(self.memory_bytes)}{there} ({self._memory_parts()}).")
        lines.append(f"Disk: about {in_bytes(self.disk_bytes)} of {in_bytes(self.disk_free_bytes)}.")
        if self.seconds is not None and self.batch_seconds is not None:
            share = (self.steps - self.steps_done) * self.batch_seconds / self.seconds
            first = f" The first step comes after about {in_time(self.first_seconds)}." if self.first_seconds else ""
            lines.append(f"Time: about {in_time(self.seconds)}, {share:.0%} of it for the activations.{first}")
        return "\n".join(lines)

    def _memory_parts(self) -> str:
        state = sum(member.state_bytes for member in self.members)
        rest = self.memory_bytes - state - self.buffer_bytes - self.window_pool_bytes - self.language_model_bytes
        parts = {
            "SAEs with gradients and Adam's moments": state,
            "shuffle buffer": self.buffer_bytes,
            "window pool": self.window_pool_bytes,
            "language model": self.language_model_bytes,
            "work space": rest,
        }
        return ", ".join(f"{name} {in_bytes(size)}" for name, size in parts.items() if size)


def plan_run(config: RunConfig, folder: Path, *, timed: bool = True) -> Plan:
    """The plan of a run that is not begun; the model is loaded, and nothing is written.

    Args:
        config: the run.
        folder: where it would go.
        timed: whether to measure how long it will take, on a batch of real activations; what does not fit into memory
            is not tried.
    """
    source = Source(config)
    plan = make_plan(source, folder)
    return with_times(plan, source) if timed and plan.fits_memory else plan


def make_plan(source: Source, folder: Path, steps_done: int = 0) -> Plan:
    """What the run that reads ``source`` and lives in ``folder`` will take, without the times."""
    config = source.config
    shapes = {member.name: member.shape(source.widths, config.hook) for member in config.saes}
    steps = member_steps(config.loop, shapes)
    members = tuple(_member_plan(member, source, shapes[member.name], steps[member.name]) for member in config.saes)
    live = config.activations is None
    weights, work = _language_model_bytes(source) if live else (0, 0)
    order = buffer_order(config.loop.batch_tokens, config.buffer_tokens, config.seed)
    available = _available_bytes(source.device)
    return Plan(
        model=config.model.name,
        batch_tokens=config.loop.batch_tokens,
        window_pool_tokens=config.window_pool_tokens if live else 0,
        buffer_tokens=config.buffer_tokens if live else 0,
        first_tokens=order.block_rows if live else 0,
        steps_done=steps_done,
        members=members,
        language_model_bytes=weights,
        model_work_bytes=work,
        memory_available_bytes=None if available is None else available + weights,  # the model is there already
        disk_free_bytes=free_disk_bytes(folder) + size_bytes(folder / "checkpoint"),
    )


def with_times(plan: Plan, source: Source) -> Plan:
    """``plan`` with times measured on real activations: of the model or the disk, and of each SAE's step.

    The SAEs are built for it and let go again, one at a time; the run's own are not touched. Latents that die later
    on, and AuxK with them, are not in it.
    """
    batch, token_seconds = _first_rows(source, plan.batch_tokens)
    timed = [
        replace(member, step_seconds=_step_seconds(config, batch, source.config.hook))
        for member, config in zip(plan.members, source.config.saes, strict=True)
    ]
    return replace(plan, members=tuple(timed), batch_seconds=token_seconds * plan.batch_tokens)


def in_time(seconds: float) -> str:
    """A duration in words: ``2.5 hours``."""
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _member_plan(config: MemberConfig, source: Source, shape: SAEConfig, steps: int) -> MemberPlan:
    hook, batch_tokens = source.config.hook, source.config.loop.batch_tokens
    with torch.device("meta"):
        parameters = count_parameters(shape.build_empty())
    gate = gate_of(config.encoder)
    slow = f"gate {gate} has no bound by head: all latents of a token are computed, a chunk at a time"
    return MemberPlan(
        name=config.name,
        architecture=shape.architecture,
        d_sae=shape.d_sae,
        parameters=parameters,
        tokens=steps * batch_tokens,
        steps=steps,
        flops=training_flops(shape, steps * batch_tokens),
        widths={name: source.widths[name] for name in (*config.reads(hook), *config.writes(hook))},
        state_bytes=STATE_BYTES * parameters,
        work_bytes=_step_work_bytes(shape, batch_tokens),
        disk_bytes=2 * (12 * parameters + 8 * shape.d_sae) + 4 * parameters,
        saved_bytes=4 * parameters,
        note=slow if gate is not None and GATES[gate].order == "none" else "",
    )


def _step_work_bytes(shape: SAEConfig, batch_tokens: int) -> int:
    """What a step holds besides the state, about: vectors as wide as x and target, the codes, a chunk of the product.

    Four of each of the first (normalised, reconstruction, residual, their gradients and copies); index, value,
    pre-latents and gradients of the k codes and of AuxK's d_out / 2. BatchTopK looks at the
    pre-latents of the whole batch, JumpReLU at those of its first.
    """
    rows = max(1, shape.encoder.multiply_adds(shape.d_in) // shape.d_in)
    product = max(min(batch_tokens * rows, PRODUCT_ELEMENTS), 64 * rows)
    if shape.sparsifier.kind in ("batch_topk", "jumprelu"):
        product = max(product, batch_tokens * rows)
    codes = shape.sparsifier.k + shape.d_out // 2
    return 4 * (batch_tokens * (4 * (shape.d_in + shape.d_out) + 8 * codes) + product)


def _language_model_bytes(source: Source) -> tuple[int, int]:
    """Of its weights, and of one pass of it."""
    model: Any = source.language_model.model
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    width = model.get_input_embeddings().weight.shape[1]
    tokens = source.config.model_batch * source.config.context_length
    return weights, MODEL_WORK * tokens * width * tensors[0].element_size()


def _available_bytes(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory_bytes()


def _first_rows(source: Source, count: int) -> tuple[dict[str, Tensor], float]:
    """So many rows of every hook's activations, on a stream of their own, and the seconds that one token took."""
    config = source.config
    if config.activations is not None:
        stream = iter(source.batches(None))
        next(stream)  # the first one checks all files
        started = perf_counter()
        batch, _ = next(stream)
        return dict(batch), (perf_counter() - started) / config.loop.batch_tokens
    items = (
        values for values, _ in ActivationStream(source.language_model, config.hooks, source.tokens(held_out=False))
    )
    rows = [next(items)]  # the first pass allocates and compiles
    started, timed = perf_counter(), 0
    while timed == 0 or _num_rows(rows[0]) + timed < count:
        rows.append(next(items))
        timed += _num_rows(rows[-1])
    _wait_for(source.device)
    batch = {hook: torch.cat([values[hook] for values in rows])[:count] for hook in config.hooks}
    return batch, (perf_counter() - started) / timed


def _num_rows(values: Mapping[str, Tensor]) -> int:
    return len(next(iter(values.values())))


def _step_seconds(config: MemberConfig, batch: Mapping[str, Tensor], hook: str) -> float:
    device = next(iter(batch.values())).device
    member = Member(config, {name: values.shape[1] for name, values in batch.items()}, hook, 3, device)
    member.step_on(batch, 0, want_metrics=False)  # compiles and allocates
    _wait_for(device)
    started = perf_counter()
    for step in (1, 2):
        member.step_on(batch, step, want_metrics=False)
    _wait_for(device)
    return (perf_counter() - started) / 2


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
