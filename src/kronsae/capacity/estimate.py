"""Memory, speed, disk space, time and cost of a training on given devices, from its config alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from kronsae.capacity.devices import EFFICIENCY, Device
from kronsae.capacity.layout import Division, Layout, divide, names_of
from kronsae.capacity.models import GivenShape, ModelShape, find_model, hook_widths
from kronsae.capacity.work import Sent, Work, pass_work, seconds_of, step_work
from kronsae.core.checks import check_count
from kronsae.data.model import DTYPES
from kronsae.runs.config import RunConfig
from kronsae.runs.memory import ReadingBytes
from kronsae.runs.pipeline import Source
from kronsae.runs.planning import Plan, format_duration, plan_of
from kronsae.support.errors import UserError
from kronsae.support.resources import format_bytes

MOST_DEVICES = 2**14
"""Largest number of devices that is planned for."""

NOTED_GAIN = 1.1
"""Ratio of speeds from which a faster division is named."""

INT8_SCALE_BYTES = 4
"""Bytes of the scale of each token and hook of activations in int8."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Time of a step by part, at the efficiency of the estimate.

    Args:
        language_model: the language model's pass on the tokens of one batch.
        saes: steps of all SAEs.
        communication: what the devices send to each other.
    """

    language_model: float
    saes: float
    communication: float

    @property
    def total(self) -> float:
        """Time of a step; its parts do not overlap."""
        return self.language_model + self.saes + self.communication


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A training on a number of equal devices; ``str()`` describes it.

    Args:
        config: config of the run.
        division: the run divided over the devices.
        device: one of them.
        efficiency: share of the peak rates that is reached.
        price_per_hour: price of one device for an hour, in any currency; None: unknown.
        faster: the same training on as many devices, with dictionaries divided further than memory requires, if that
            is predicted to be faster.
    """

    config: RunConfig
    division: Division
    device: Device
    efficiency: float = EFFICIENCY
    price_per_hour: float | None = None
    faster: Estimate | None = None

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.division.layout.devices

    @cached_property
    def layers_run(self) -> int:
        """Blocks of the language model that run until the last hook is read; 0 for harvested activations."""
        model = self.division.model
        return 0 if model is None else model.layers_run(self.config.hooks)

    @property
    def pass_seconds(self) -> float:
        """Time of the language model on one batch, dealt out to all devices."""
        model, config = self.division.model, self.config
        if model is None:
            return 0.0
        tokens = config.model_batch * config.context_length
        work = pass_work(model, self.layers_run, tokens, config.context_length)
        one = work.seconds(self.device.flops_of(model.dtype), self.device.bandwidth)
        return one * config.loop.batch_tokens / tokens / self.devices / self.efficiency

    @cached_property
    def phases(self) -> dict[str, dict[str, Work]]:
        """Work of the phases of each SAE's step on one device."""
        return {
            own.member.name: step_work(
                own.part,
                own.tokens,
                own.bytes.parameters,
                clipped=own.member.optimizer.clip_norm is not None,
                own_share=1 / self.division.layout.heads,
            )
            for own in self.division.members
        }

    def _step_seconds(self, name: str) -> float:
        rates = self.device.float32_flops, self.device.bandwidth
        return seconds_of(self.phases[name].values(), *rates) / self.efficiency

    def _sending_seconds(self, sent: Iterable[Sent]) -> float:
        return sum(one.seconds(self.device) for one in sent) / self.efficiency

    @cached_property
    def seconds(self) -> Seconds:
        """Time of a step on which all SAEs train."""
        sent = [one for member in self.division.members for one in member.sent]
        return Seconds(
            language_model=self.pass_seconds,
            saes=sum(self._step_seconds(name) for name in self.phases),
            communication=self._sending_seconds([*self.division.batch_sent, *sent]),
        )

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run with predicted times, and the requirements of a single device."""
        members = tuple(
            replace(plan, step_seconds=self._step_seconds(plan.name) + self._sending_seconds(own.sent))
            for plan, own in zip(self.division.plan.members, self.division.members, strict=True)
        )
        batch = self.pass_seconds + self._sending_seconds(self.division.batch_sent)
        return replace(self.division.plan, members=members, batch_seconds=batch)

    @property
    def run_seconds(self) -> float:
        """Time of the run."""
        return self.plan.seconds or 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all devices, in the mean over the run."""
        return self.plan.tokens / self.run_seconds

    @property
    def hours(self) -> float:
        """Time of the run in hours."""
        return self.run_seconds / 3600

    @property
    def cost(self) -> float | None:
        """Price of all devices for the time of the run; None if the price is unknown."""
        return None if self.price_per_hour is None else self.price_per_hour * self.devices * self.hours

    @property
    def harvested_bytes(self) -> dict[str, int]:
        """Size of the activations of all tokens of the run, if they were harvested, by dtype."""
        return {dtype: self.plan.tokens * token_bytes(self.plan.widths, dtype) for dtype in (*DTYPES, "int8")}

    @property
    def fits(self) -> bool:
        """Whether the training fits into the memory of the devices."""
        return self.division.memory_bytes <= self.device.usable_bytes

    @property
    def notes(self) -> list[str]:
        """What the figures leave out, and what kronsae cannot do itself."""
        notes = [
            f"Speed, time and cost are predictions at {self.efficiency:.0%} of the device's peak rates, not "
            "measurements. They include neither evaluation nor AuxK for latents that die."
        ]
        if self.division.model is None:
            notes.append("Activations are read from disk; the time of reading is not included.")
        if self.faster is not None and self.faster.tokens_per_second > NOTED_GAIN * self.tokens_per_second:
            notes.append(
                f"{str(self.faster.division.layout).capitalize()} might be faster: "
                f"{self.faster.tokens_per_second:,.0f} tokens/s."
            )
        return notes + self.division.notes

    def check(self) -> None:
        """Check that the training fits into the memory of the devices.

        Raises:
            UserError: it does not.
        """
        if self.fits:
            return
        needed, usable = format_bytes(self.division.memory_bytes), format_bytes(self.device.usable_bytes)
        enough = smallest(self.config, self.division.plan, self.division.model, self.device, self.efficiency)
        remedy = "Use smaller SAEs or batches." if enough is None else f"Give --gpus {enough.devices}."
        raise UserError(
            f"the training must fit into the memory of the devices; it needs about {needed} of the usable {usable} on "
            f"each of {self.devices} {self.device.name} ({self.division.layout}). {remedy}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON values; sizes in bytes, times in seconds where no other unit is named."""
        model, division = self.division.model, self.division
        return {
            "model": None if model is None else asdict(model) | {"layers_run": self.layers_run},
            "device": asdict(self.device) | {"usable_bytes": self.device.usable_bytes},
            "devices": self.devices,
            "efficiency": self.efficiency,
            "parallelism": {"kind": str(division.layout), **asdict(division.layout)},
            "fits": self.fits,
            "memory_per_device": {
                "total": division.memory_bytes,
                "kept": division.kept_bytes,
                "temporary": division.work_bytes,
                "step": division.step_bytes,
            },
            "step_seconds": asdict(self.seconds) | {"total": self.seconds.total},
            "tokens_per_second": self.tokens_per_second,
            "disk": {"checkpoints_and_saes": self.plan.disk_bytes, "harvested_activations": self.harvested_bytes},
            "hours": self.hours,
            "price_per_hour": self.price_per_hour,
            "cost": self.cost,
            "notes": self.notes,
            "run": self.plan.to_dict(),
        }

    def __str__(self) -> str:
        division, step, lines = self.division, self.seconds, []
        if (model := division.model) is not None:
            lines.append(
                f"Model: {model.name}, width {model.d_in:,}, {model.layers} layers of which {self.layers_run} run, "
                f"{model.parameters:,} parameters in {model.dtype} ({model.source})."
            )
        lines += self.plan.training_lines
        lines.append(f"Devices: {self.devices} x {self.device.name} ({self.device.source}).")
        lines.append(f"Parallelism: {division.layout}.")
        lines.append(
            f"Memory per device: about {format_bytes(division.memory_bytes)} of the usable "
            f"{format_bytes(self.device.usable_bytes)}: {names_of(division.kept_bytes)}; largest temporary use: "
            f"{names_of([self._largest_use])}."
        )
        lines.append(f"  step of {division.largest.member.name}: {names_of(division.step_bytes)}.")
        lines.append(
            f"Speed: about {self.tokens_per_second:,.0f} tokens/s; a step takes {_milliseconds(step.total)}: language "
            f"model {_milliseconds(step.language_model)}, SAEs {_milliseconds(step.saes)}, communication "
            f"{_milliseconds(step.communication)}."
        )
        harvested = names_of(self.harvested_bytes)
        lines.append(
            f"Disk: about {format_bytes(self.plan.disk_bytes)} for checkpoints and SAEs. If the activations are "
            f"harvested: {harvested}."
        )
        price = "" if self.cost is None else f" Cost: {self.cost:,.2f} at {self.price_per_hour:g} per device and hour."
        lines.append(f"Time: about {format_duration(self.run_seconds)} ({self.hours:,.1f} hours).{price}")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    @property
    def _largest_use(self) -> tuple[str, int]:
        return max(self.division.work_bytes.items(), key=lambda use: use[1])


def token_bytes(widths: Mapping[str, int], dtype: str) -> int:
    """Return the bytes of a token on disk, over all hooks; int8 has a scale per token and hook."""
    if dtype == "int8":
        return sum(width + INT8_SCALE_BYTES for width in widths.values())
    return sum(widths.values()) * DTYPES[dtype].itemsize


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def single_plan(config: RunConfig, given: GivenShape | None = None) -> tuple[Plan, ModelShape | None]:
    """Return the requirements of a run on one device, and its language model; nothing is downloaded or loaded.

    Raises:
        UserError: the shape of the language model or the width of a hook is not known.
    """
    given = GivenShape() if given is None else given
    if config.activations is not None:
        if given != GivenShape():
            raise UserError(
                "d_in, layers, parameters and vocabulary must not be given with harvested activations, which no model "
                "reads; leave them out."
            )
        widths: Mapping[str, int] = Source(config).widths
        nothing = ReadingBytes()
        return plan_of(config, widths, language_model_bytes=0, reading_bytes=nothing, dense_gradients=False), None
    model = find_model(config.model, given)
    model.layers_run(config.hooks)
    tokens = config.model_batch * config.context_length
    plan = plan_of(
        config,
        hook_widths(model, config.hooks, given.d_in),
        language_model_bytes=model.weights_bytes,
        reading_bytes=ReadingBytes.of(tokens, tokens, model.d_in, model.element_bytes),
        dense_gradients=False,
    )
    return plan, model


def estimate(
    config: RunConfig,
    device: Device,
    devices: int | None = None,
    *,
    given: GivenShape | None = None,
    efficiency: float = EFFICIENCY,
    price_per_hour: float | None = None,
) -> Estimate:
    """Return the estimate of a training on so many devices, under the division that `best` chooses.

    Args:
        config: config of the run.
        device: one of the devices.
        devices: number of devices; None: the smallest power of two that fits.
        given: sizes of the language model, instead of known ones.
        efficiency: share of the peak rates that is reached.
        price_per_hour: price of one device for an hour.

    Raises:
        UserError: an argument is invalid, the model is not known, or the training cannot be divided so.
    """
    if not 0 < efficiency <= 1:
        raise UserError(f"efficiency must be above 0 and at most 1; got {efficiency!r}.")
    if price_per_hour is not None and not 0 <= price_per_hour < float("inf"):
        raise UserError(f"price_per_hour must be finite and at least 0; got {price_per_hour!r}.")
    if devices is not None:
        check_count("gpus", devices)
        if devices > MOST_DEVICES:
            raise UserError(f"gpus must be at most {MOST_DEVICES:,}; got {devices:,}. Plan for fewer.")
    plan, model = single_plan(config, given)
    found = smallest(config, plan, model, device, efficiency) if devices is None else None
    if found is None:
        devices = 1 if devices is None else devices
        found = best(config, plan, model, device, devices, efficiency)
    if found is None:
        raise UserError(
            f"gpus must allow a division of batches of {plan.batch_tokens:,} tokens and of all SAEs; got {devices:,}. "
            "Give fewer, or a number that divides the heads or latents of every SAE."
        )
    return replace(found, price_per_hour=price_per_hour)


def smallest(
    config: RunConfig, plan: Plan, model: ModelShape | None, device: Device, efficiency: float
) -> Estimate | None:
    """Return the best estimate for the smallest power of two of devices that fits; None if none does."""
    devices = 1
    while devices <= MOST_DEVICES:
        found = best(config, plan, model, device, devices, efficiency)
        if found is None or found.fits:
            return found
        devices *= 2
    return None


def best(
    config: RunConfig, plan: Plan, model: ModelShape | None, device: Device, devices: int, efficiency: float
) -> Estimate | None:
    """Return the estimate that divides least of those that fit, or the one with the least memory if none fits.

    The language model is divided only if nothing fits otherwise, and dictionaries only as far as memory requires, since
    the merging of their parts costs more than the bytes that are counted. None: the training cannot be divided over so
    many devices.
    """
    found: list[Estimate] = []
    for model_parts in divisors(devices):
        if model_parts > 1 and (model is None or model_parts > model.layers):
            break
        for heads in divisors(devices):
            layout = Layout(data=devices // heads, heads=heads, model_parts=model_parts)
            division = divide(config, plan, model, layout)
            if division is not None:
                found.append(Estimate(config=config, division=division, device=device, efficiency=efficiency))
        fitting = [one for one in found if one.fits]
        if fitting:
            fastest = min(fitting, key=lambda one: one.run_seconds)
            return replace(fitting[0], faster=None if fastest is fitting[0] else fastest)
    return min(found, key=lambda one: one.division.memory_bytes, default=None)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, smallest first."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
