"""Plan of a run: tokens, steps, memory, disk space and time, checked and printed before the run starts."""

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
from kronsae.core.sae import SAEConfig
from kronsae.data.buffer import buffer_order
from kronsae.data.harvest import ActivationStream
from kronsae.data.prefetch import DEPTH
from kronsae.kernels.dispatch import DENSE_GRADIENTS, path_of
from kronsae.runs.config import RunConfig
from kronsae.runs.memory import ReadingBytes, largest_k_aux, model_bytes, sae_bytes
from kronsae.runs.pipeline import Source
from kronsae.support.errors import UserError
from kronsae.support.resources import available_memory_bytes, format_bytes, free_disk_bytes, size_bytes
from kronsae.training.budget import member_steps
from kronsae.training.config import MemberConfig
from kronsae.training.member import Member

TIMED_FROM_STEPS = 50
"""Minimum number of steps for which the time is measured; measuring takes three steps."""


@dataclass(frozen=True, kw_only=True)
class MemberPlan:
    """Requirements of one SAE.

    Args:
        name, architecture, d_sae, parameters: the SAE.
        tokens, steps, flops: length of its training; FLOPs as counted by `training_flops`.
        widths: widths of the activations that it reads and writes, by hook.
        state_bytes: size of weights, Adam's moments and, where a kernel path needs them in dense form, gradients.
        work_bytes: estimated additional memory of one step, or of the copy that is saved at the end, if that is larger.
        disk_bytes: size of the checkpoints (two at a time) and of the saved SAE.
        saved_bytes: size of the saved SAE.
        step_seconds: measured time of one step; None if it was not measured.
        note: a warning, or ``""``.
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
    """Requirements of a run; ``str()`` describes them. With a subset of the members, it is the plan of a run of these.

    Args:
        model, batch_tokens: the run.
        window_pool_tokens, buffer_tokens: numbers of tokens shuffled before and after the model; 0 for harvested
            activations, except that those read in the order of the harvest have a buffer.
        first_tokens: tokens that the model reads before the first step.
        steps_done: steps that an interrupted run has already done.
        members: the SAEs, each with its own number of steps; the longest determines the length of the run.
        language_model_bytes: size of the model's weights, which are already loaded; 0 for harvested activations.
        reading_bytes: estimated additional memory in which a batch of windows is read.
        memory_available_bytes: available memory of the device, including the model's weights; None: unknown.
        disk_free_bytes: free disk space, including the space of the run's own checkpoints; None: unknown.
        batch_seconds: measured time to compute or read one batch of activations; None if it was not measured.
        reading: how harvested activations are read; "" without them.
        ahead_bytes: size of the batches that are read ahead from harvested activations.
    """

    model: str
    batch_tokens: int
    window_pool_tokens: int
    buffer_tokens: int
    first_tokens: int
    steps_done: int
    members: tuple[MemberPlan, ...]
    language_model_bytes: int
    reading_bytes: ReadingBytes
    memory_available_bytes: int | None
    disk_free_bytes: int | None
    batch_seconds: float | None = None
    reading: str = ""
    ahead_bytes: int = 0

    @property
    def widths(self) -> dict[str, int]:
        """Return the widths of the activations of all hooks that members read or write."""
        return {hook: width for member in self.members for hook, width in member.widths.items()}

    @property
    def hook(self) -> str:
        """Return the names of these hooks, separated by commas."""
        return ", ".join(self.widths)

    @property
    def place(self) -> str:
        """Return a description of model and hooks with the width of each hook."""
        if len(self.widths) == 1:
            return f"{self.hook} of {self.model} (d_in {self.d_in})"
        return f"{', '.join(f'{hook} (width {width})' for hook, width in self.widths.items())} of {self.model}"

    @property
    def d_in(self) -> int:
        """Return the sum of the widths of all hooks: the number of values stored per token."""
        return sum(self.widths.values())

    @property
    def model_work_bytes(self) -> int:
        """Return the estimated additional memory in which a batch of windows is read at all hooks."""
        return self.reading_bytes.total(self.d_in)

    @property
    def buffer_bytes(self) -> int:
        """Return the size of the shuffle buffer."""
        return 4 * self.buffer_tokens * self.d_in

    @property
    def window_pool_bytes(self) -> int:
        """Return the size of the window pool."""
        return 4 * self.window_pool_tokens

    @property
    def start(self) -> str:
        """Return a sentence about the work before the first step."""
        if self.reading:
            return self.reading
        if self.steps_done:
            most = min(2 * self.buffer_tokens, self.tokens)
            return f"Running the model again to restore the shuffle buffer, on at most {most:,} tokens."
        return f"Running the model on the first {self.first_tokens:,} tokens."

    @property
    def disk_bytes(self) -> int:
        """Return the size of the checkpoints (two at a time) and the saved SAEs."""
        return sum(member.disk_bytes for member in self.members)

    @property
    def steps(self) -> int:
        """Return the number of steps of the longest training."""
        return max(member.steps for member in self.members)

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the longest training."""
        return self.steps * self.batch_tokens

    @property
    def memory_bytes(self) -> int:
        """Return the total memory; temporary memory is not used by several parts at once, so its maximum counts."""
        work = max(self.model_work_bytes, *(member.work_bytes for member in self.members))
        state = sum(member.state_bytes for member in self.members)
        kept = self.language_model_bytes + self.window_pool_bytes + self.buffer_bytes + self.ahead_bytes
        return kept + state + work

    @property
    def seconds(self) -> float | None:
        """Return the time of the remaining steps; None if it was not measured."""
        if self.batch_seconds is None:
            return None
        own = ((max(0, member.steps - self.steps_done), member.step_seconds or 0.0) for member in self.members)
        return (self.steps - self.steps_done) * self.batch_seconds + sum(steps * each for steps, each in own)

    @property
    def first_seconds(self) -> float:
        """Return the time before the first step of a new run; 0 if it was not measured or for harvested activations."""
        return (self.batch_seconds or 0.0) * self.first_tokens / self.batch_tokens

    @property
    def fits_memory(self) -> bool:
        """Return whether the run fits into the available memory; True if that is unknown."""
        return self.memory_available_bytes is None or self.memory_bytes <= self.memory_available_bytes

    def check(self) -> None:
        """Check memory and disk space.

        Raises:
            UserError: the run does not fit into memory or on the disk.
        """
        if not self.fits_memory:
            available = format_bytes(self.memory_available_bytes or 0)
            raise UserError(
                f"the run must fit into memory; it needs about {format_bytes(self.memory_bytes)} "
                f"({self._memory_parts()}), but only {available} are available. "
                "Lower buffer_tokens, train fewer or smaller SAEs at once, or use smaller batches."
            )
        if self.disk_free_bytes is not None and self.disk_bytes > self.disk_free_bytes:
            raise UserError(
                f"checkpoints and SAEs must fit on the disk; they need about {format_bytes(self.disk_bytes)}, but only "
                f"{format_bytes(self.disk_free_bytes)} are free. Free space, or choose another --out."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return all values, including derived ones, as JSON values."""
        sizes = ("buffer_bytes", "model_work_bytes", "memory_bytes", "disk_bytes")
        names = ("hook", "d_in", "steps", "tokens", *sizes, "seconds")
        return asdict(self) | {name: getattr(self, name) for name in names}

    @property
    def training_lines(self) -> list[str]:
        """Return lines that describe what is trained, and on how much."""
        lines = [f"{self.steps:,} steps of {self.batch_tokens:,} tokens at {self.place}: {self.tokens:,} tokens"]
        for member in self.members:
            own = "" if member.steps == self.steps else f"{member.tokens:,} tokens in {member.steps:,} steps; "
            lines.append(
                f"  {member.name}: {member.architecture}, {member.d_sae:,} latents, {member.parameters:,} parameters; "
                f"{own}{member.flops:.2e} FLOPs"
            )
            if member.note:
                lines.append(f"    {member.note}")
        return lines

    def __str__(self) -> str:
        lines = self.training_lines
        available = self.memory_available_bytes
        there = "" if available is None else f" of {format_bytes(available)}"
        lines.append(f"Memory: about {format_bytes(self.memory_bytes)}{there} ({self._memory_parts()}).")
        free = "" if self.disk_free_bytes is None else f" of {format_bytes(self.disk_free_bytes)}"
        lines.append(f"Disk: about {format_bytes(self.disk_bytes)}{free}.")
        if self.seconds is not None and self.batch_seconds is not None:
            share = (self.steps - self.steps_done) * self.batch_seconds / self.seconds
            first = (
                f" The first step starts after about {format_duration(self.first_seconds)}."
                if self.first_seconds
                else ""
            )
            lines.append(f"Time: about {format_duration(self.seconds)}, {share:.0%} of it for the activations.{first}")
        return "\n".join(lines)

    def _memory_parts(self) -> str:
        state = sum(member.state_bytes for member in self.members)
        kept = self.language_model_bytes + self.window_pool_bytes + self.buffer_bytes + self.ahead_bytes
        parts = {
            "SAEs with gradients and Adam's moments": state,
            "shuffle buffer": self.buffer_bytes,
            "window pool": self.window_pool_bytes,
            "batches read ahead": self.ahead_bytes,
            "language model": self.language_model_bytes,
            "work space": self.memory_bytes - state - kept,
        }
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)


def plan_run(config: RunConfig, folder: Path, *, timed: bool = True) -> Plan:
    """Return the plan of a run that has not started. The model is loaded, and nothing is written.

    Args:
        config: config of the run.
        folder: folder of the run.
        timed: measure the time on a batch of real activations, if the run fits into memory.
    """
    source = Source(config)
    plan = make_plan(source, folder)
    return with_times(plan, source) if timed and plan.fits_memory else plan


def make_plan(source: Source, folder: Path, steps_done: int = 0) -> Plan:
    """Return the plan, without times, of the run that reads ``source`` and writes to ``folder``."""
    live = source.config.activations is None
    weights = model_bytes(source.language_model.model) if live else 0
    available = _available_bytes(source.device)
    plan = plan_of(
        source.config,
        source.widths,
        language_model_bytes=weights,
        reading_bytes=_reading_bytes(source) if live else ReadingBytes(),
        dense_gradients=path_of("adamw", source.device, torch.float32) in DENSE_GRADIENTS,
    )
    return replace(
        plan,
        steps_done=steps_done,
        memory_available_bytes=None if available is None else available + weights,  # the model is already loaded
        disk_free_bytes=free_disk_bytes(folder) + size_bytes(folder / "checkpoint"),
        reading="" if live else source.describe_reading(plan.steps),
    )


def plan_of(
    config: RunConfig,
    widths: Mapping[str, int],
    *,
    language_model_bytes: int,
    reading_bytes: ReadingBytes,
    dense_gradients: bool,
) -> Plan:
    """Return the plan, without times, of a run on a machine of which nothing is known. Nothing is loaded.

    Args:
        config: config of the run.
        widths: width of the activations of each hook that SAEs read or write.
        language_model_bytes, reading_bytes: as for `Plan`.
        dense_gradients: as for `sae_bytes`.
    """
    shapes = {member.name: member.shape(widths, config.hook) for member in config.saes}
    steps = member_steps(config.loop, shapes)
    live = config.activations is None
    order = buffer_order(config.loop.batch_tokens, config.buffer_tokens, config.seed)
    return Plan(
        model=config.model.name,
        batch_tokens=config.loop.batch_tokens,
        window_pool_tokens=config.pool_tokens if live else 0,
        buffer_tokens=config.buffer_tokens if config.has_buffer else 0,
        first_tokens=order.block_rows if live else 0,
        steps_done=0,
        members=tuple(
            _member_plan(member, config, widths, shapes[member.name], steps[member.name], dense_gradients)
            for member in config.saes
        ),
        language_model_bytes=language_model_bytes,
        reading_bytes=reading_bytes,
        memory_available_bytes=None,
        disk_free_bytes=None,
        ahead_bytes=0 if live else (DEPTH + 1) * config.loop.batch_tokens * sum(widths.values()) * 4,
    )


def with_times(plan: Plan, source: Source) -> Plan:
    """Return ``plan`` with times measured on real activations: of the model or the disk, and of each SAE's step.

    This builds separate SAEs, one at a time, and does not affect the run's own. The time of AuxK for latents that die
    later is not included.
    """
    batch, token_seconds = _first_rows(source, plan.batch_tokens)
    timed = [
        replace(member, step_seconds=_step_seconds(config, batch, source.config.hook))
        for member, config in zip(plan.members, source.config.saes, strict=True)
    ]
    return replace(plan, members=tuple(timed), batch_seconds=token_seconds * plan.batch_tokens)


def format_duration(seconds: float) -> str:
    """Return a duration as text: ``2.5 hours``."""
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _member_plan(
    member: MemberConfig,
    config: RunConfig,
    widths: Mapping[str, int],
    shape: SAEConfig,
    steps: int,
    dense_gradients: bool,
) -> MemberPlan:
    hook, batch_tokens = config.hook, config.loop.batch_tokens
    needs = sae_bytes(shape, batch_tokens, largest_k_aux(member, shape), dense_gradients=dense_gradients)
    gate = gate_of(member.encoder)
    slow = f"gate {gate} has no bound by head: all latents of a token are computed, a chunk at a time"
    return MemberPlan(
        name=member.name,
        architecture=shape.architecture,
        d_sae=shape.d_sae,
        parameters=needs.parameters,
        tokens=steps * batch_tokens,
        steps=steps,
        flops=training_flops(shape, steps * batch_tokens),
        widths={name: widths[name] for name in (*member.reads(hook), *member.writes(hook))},
        state_bytes=needs.state,
        work_bytes=max(needs.work, needs.copy),
        disk_bytes=2 * (12 * needs.parameters + 8 * shape.d_sae) + needs.copy,
        saved_bytes=needs.copy,
        note=slow if gate is not None and GATES[gate].order == "none" else "",
    )


def _reading_bytes(source: Source) -> ReadingBytes:
    config, language_model = source.config, source.language_model
    embeddings: Any = language_model.model.get_input_embeddings()
    pass_tokens = language_model.pass_size.tokens(config.model_batch, config.context_length)
    batch_tokens = config.model_batch * config.context_length
    return ReadingBytes.of(batch_tokens, pass_tokens, embeddings.weight.shape[1], embeddings.weight.element_size())


def _available_bytes(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory_bytes()


def _first_rows(source: Source, count: int) -> tuple[dict[str, Tensor], float]:
    """Return ``count`` rows of the activations of every hook, from a new stream, and the time in seconds per token."""
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
