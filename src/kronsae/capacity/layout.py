"""Which parallelism a training needs, and its memory per device and traffic per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from kronsae.capacity.models import ModelShape
from kronsae.capacity.work import Group, Sent, encoder_rows, gradient_sum, merge_bytes, term_bytes
from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.experts import gate_of
from kronsae.core.gates import GATES
from kronsae.core.sae import SAEConfig
from kronsae.runs.config import RunConfig
from kronsae.runs.memory import PARAMETER_BYTES, SAEBytes, largest_k_aux, sae_bytes
from kronsae.runs.planning import Plan
from kronsae.support.resources import format_bytes
from kronsae.training.config import MemberConfig

SUM_COPIES = 2
"""Copies of the dense gradients while they are summed in one piece: joined, and received."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Division of a training over devices.

    Args:
        data: d, shares of the tokens of a batch.
        heads: h, parts of every dictionary; ``data * heads`` devices.
        model_parts: m, devices over which the layers of each copy of the language model are divided.
    """

    data: int = 1
    heads: int = 1
    model_parts: int = 1

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.data * self.heads

    @property
    def data_group(self) -> Group:
        """Devices that hold the same part of the dictionaries: they sum gradients. Neighbours hold different parts."""
        return Group(self.data, 1 if self.data == 1 else self.devices)

    @property
    def head_group(self) -> Group:
        """Devices that hold the parts of one copy of the dictionaries."""
        return Group(self.heads, self.heads)

    def __str__(self) -> str:
        parts = []
        if self.heads > 1:
            parts.append(f"head parallel over {self.heads}")
        if self.data > 1:
            parts.append(f"data parallel over {self.data}")
        text = " x ".join(parts) or "none"
        if self.model_parts > 1:
            text += f"; each copy of the language model over {self.model_parts} devices"
        return text


def part_of(shape: SAEConfig, heads: int) -> SAEConfig | None:
    """Return the part of an SAE that one of ``heads`` devices holds; None if the SAE cannot be divided so.

    Dense encoders are divided by latents and Kronecker encoders by heads. JumpReLU, experts, a dense trunk and a gate
    with a parameter of its own are not divided, nor may a part have fewer than k latents.
    """
    if heads == 1:
        return shape
    encoder, gate = shape.encoder, gate_of(shape.encoder)
    if shape.sparsifier.kind == "jumprelu" or (gate is not None and GATES[gate].start is not None):
        return None
    if shape.d_sae % heads or shape.d_sae // heads < shape.sparsifier.k:
        return None
    if isinstance(encoder, DenseEncoderConfig):
        return replace(shape, encoder=replace(encoder, d_sae=encoder.d_sae // heads))
    if isinstance(encoder, KroneckerEncoderConfig) and encoder.num_heads % heads == 0:
        return replace(shape, encoder=replace(encoder, num_heads=encoder.num_heads // heads))
    return None


@dataclass(frozen=True)
class DividedMember:
    """One SAE on one device of a layout.

    Args:
        member: its config.
        shape: the whole SAE.
        part: the part of it that the device holds.
        layout: the division.
        batch_tokens: tokens of a batch, over all devices.
    """

    member: MemberConfig
    shape: SAEConfig
    part: SAEConfig
    layout: Layout
    batch_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of a batch that the device trains on, rounded up."""
        return -(-self.batch_tokens // self.layout.data)

    @cached_property
    def bytes(self) -> SAEBytes:
        """Memory on the device, without the sum of gradients."""
        k_aux = largest_k_aux(self.member, self.shape)
        return sae_bytes(self.part, self.tokens, k_aux, dense_gradients=False)

    @cached_property
    def summed(self) -> tuple[tuple[float, bool], ...]:
        """Bytes sent for the gradients of the encoder (with all else) and the decoder, and whether they are dense."""
        batch, group = self.batch_tokens, self.layout.data_group
        return tuple(gradient_sum(*weight, batch, group) for weight in self._weights)

    @property
    def _weights(self) -> tuple[tuple[int, int, int], ...]:
        """Numbers, width and rows per token of the gradient, of the encoder (with all else) and the decoder."""
        part = self.part
        decoder = part.d_sae * part.d_out
        encoder = self.bytes.parameters - decoder
        return (encoder, part.d_in, encoder_rows(part)), (decoder, part.d_out, part.sparsifier.k)

    @property
    def gradient_bytes(self) -> int:
        """Memory of gradients that are summed over the shares of a batch: dense with copies, or gathered terms."""
        if self.layout.data == 1:
            return 0
        return sum(
            (1 + SUM_COPIES) * PARAMETER_BYTES * size if dense else term_bytes(width, rows, self.batch_tokens)
            for (_, dense), (size, width, rows) in zip(self.summed, self._weights, strict=True)
        )

    @property
    def work_bytes(self) -> int:
        """Temporary memory of a step, or of the copy that is saved at the end, if that is larger."""
        own = self.bytes.work + self.gradient_bytes
        return own if self.layout.heads > 1 else max(own, self.bytes.copy)

    @property
    def sent(self) -> tuple[Sent, ...]:
        """What the device sends in a step of this SAE."""
        layout = self.layout
        found = (
            Sent(sum(size for size, _ in self.summed), layout.data_group.span),
            Sent(merge_bytes(self.shape, self.tokens, layout.head_group), layout.head_group.span),
        )
        return tuple(one for one in found if one.bytes)


@dataclass(frozen=True, kw_only=True)
class Division:
    """A training divided over devices.

    Args:
        layout: the division.
        plan: requirements of the training on one device.
        members: the SAEs on one device.
        model: the language model; None for harvested activations.
    """

    layout: Layout
    plan: Plan
    members: tuple[DividedMember, ...]
    model: ModelShape | None = field(repr=False)

    @property
    def kept_bytes(self) -> dict[str, int]:
        """Memory per device that is held all the time, by part."""
        plan, layout = self.plan, self.layout
        return {
            "language model's weights": -(-plan.language_model_bytes // layout.model_parts),
            "SAE weights": sum(member.bytes.weights for member in self.members),
            "Adam's moments": sum(member.bytes.moments for member in self.members),
            "shuffle buffer": -(-plan.buffer_bytes // layout.devices),
            "window pool": plan.window_pool_bytes,
            "batches read ahead": -(-plan.ahead_bytes // layout.devices),
        }

    @property
    def work_bytes(self) -> dict[str, int]:
        """Temporary memory per device by use, of which the largest counts."""
        uses = {"language model's pass": self.plan.model_work_bytes}
        return uses | {f"step or copy of {member.member.name}": member.work_bytes for member in self.members}

    @property
    def largest(self) -> DividedMember:
        """The SAE whose step needs the most memory."""
        return max(self.members, key=lambda member: member.work_bytes)

    @property
    def step_bytes(self) -> dict[str, int]:
        """Temporary memory of the step that needs the most, by part."""
        member = self.largest
        return {
            "vectors": member.bytes.vectors,
            "codes": member.bytes.codes,
            "encoder product": member.bytes.product,
            "gradients": member.gradient_bytes,
        }

    @property
    def memory_bytes(self) -> int:
        """Memory per device."""
        return sum(self.kept_bytes.values()) + max(self.work_bytes.values())

    @property
    def batch_sent(self) -> tuple[Sent, ...]:
        """What a device sends per batch apart from the SAEs' steps: activations within the language model and heads.

        A row of the mesh needs the same tokens, of which each device computed a part.
        """
        layout, batch, found = self.layout, self.plan.batch_tokens, []
        if layout.heads > 1:
            rows = layout.head_group.others * batch / layout.data * 4 * self.plan.d_in
            found.append(Sent(rows, layout.heads))
        if layout.model_parts > 1 and self.model is not None:
            tokens = batch * layout.model_parts / layout.devices
            ends = Group(layout.model_parts, layout.model_parts)
            found.append(Sent(ends.others * tokens * self.model.d_in * self.model.element_bytes, ends.span))
        return tuple(found)

    @property
    def notes(self) -> list[str]:
        """Limits of what kronsae itself can do with this division."""
        layout, notes = self.layout, []
        if layout.model_parts > 1:
            notes.append(
                f"The language model ({format_bytes(self.plan.language_model_bytes)}) must be divided over "
                f"{layout.model_parts} devices; kronsae does not divide one. Harvest its activations with a program "
                "that does, or use a smaller model or dtype."
            )
        if layout.heads > 1:
            whole = max(PARAMETER_BYTES * member.parameters for member in self.plan.members)
            notes.append(
                f"A divided SAE is gathered when it is saved: {format_bytes(whole)} in the memory of a process, which "
                "is not in the memory per device."
            )
        return notes


def divide(config: RunConfig, plan: Plan, model: ModelShape | None, layout: Layout) -> Division | None:
    """Return the training under a layout; None if one of its SAEs or batches cannot be divided so."""
    if layout.data > plan.batch_tokens:
        return None
    members = []
    for member in config.saes:
        shape = member.shape(plan.widths, config.hook)
        part = part_of(shape, layout.heads)
        if part is None:
            return None
        members.append(DividedMember(member, shape, part, layout, plan.batch_tokens))
    return Division(layout=layout, plan=plan, members=tuple(members), model=model)


def names_of(parts: Mapping[str, int] | Sequence[tuple[str, int]]) -> str:
    """Return sizes by name as text, without those of 0."""
    items = parts.items() if isinstance(parts, Mapping) else parts
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in items if size)
