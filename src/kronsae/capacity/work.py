"""Operations, bytes moved and bytes sent: of a language model's pass, and of an SAE's training step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kronsae.capacity.devices import Device
from kronsae.capacity.models import ModelShape
from kronsae.core.encoders import KroneckerEncoderConfig
from kronsae.core.flops import encoder_multiply_adds
from kronsae.core.sae import SAEConfig
from kronsae.core.trunk import TrunkEncoderConfig
from kronsae.runs.memory import MODEL_WORK, PARAMETER_BYTES

ADAM_FLOPS = 10
"""Operations of AdamW per weight."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read from or written to memory."""

    flops: float
    bytes: float

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Return the time at these rates, in FLOP/s and bytes/s: the longer of arithmetic and memory (roofline)."""
        return max(self.flops / flops, self.bytes / bandwidth)

    def times(self, factor: float) -> Work:
        """Return this work done ``factor`` times."""
        return Work(self.flops * factor, self.bytes * factor)


def pass_work(model: ModelShape, layers_run: int, tokens: int, context_length: int) -> Work:
    """Return the work of one forward pass on ``tokens`` tokens through the first ``layers_run`` blocks.

    With p parameters per block and T tokens of context: ``2 p + 4 T D`` operations per token and block (products with
    weights; attention, without regard to its mask). Weights are read once per pass; `MODEL_WORK` vectors of width D
    per token and block are written and read.
    """
    block_flops = 2 * model.layer_parameters + 4 * context_length * model.d_in
    weights = model.layer_parameters * model.element_bytes
    vectors = 2 * MODEL_WORK * tokens * model.d_in * model.element_bytes
    return Work(layers_run * tokens * block_flops, layers_run * (weights + vectors))


def step_work(
    shape: SAEConfig, tokens: int, parameters: int, *, clipped: bool, own_share: float = 1.0
) -> dict[str, Work]:
    """Return the work of the phases of one training step, which follow each other; without AuxK.

    - encoder product: ``B D P`` multiply-adds with P rows of encoder weights; weights are read once, outputs are
      written and read. A skip connection adds its ``B D O``, three times;
    - rows: K decoder rows of a token are read for the reconstruction and for the latents' gradients. The gradients of
      decoder and encoder sum K and R vectors per token (R = 2K with parents, K without), which clipping does twice. A
      pursuit reads what it multiplies;
    - optimiser: weights and both moments are read and written, 24 bytes per parameter.

    Args:
        shape: the SAE, or the part of it that a device holds.
        tokens: B, tokens of the step that the device has.
        parameters: weights that the device updates.
        clipped: whether gradients are clipped.
        own_share: share of the selected latents that are in the device's part of a dictionary.
    """
    d_in, d_out, k = shape.d_in, shape.d_out, shape.sparsifier.k
    product = encoder_multiply_adds(shape) + (3 * d_in * d_out if shape.skip else 0)
    outputs = encoder_multiply_adds(shape) / d_in
    sums = (2 if clipped else 1) * (k * d_out + encoder_rows(shape) * d_in)
    pursued = 0 if shape.pursuit is None else shape.pursuit.multiply_adds(k, d_in)
    rows = own_share * tokens * (2 * k * d_out + sums + pursued)
    return {
        "encoder product": Work(2 * tokens * product, 4 * d_in * outputs + 8 * tokens * outputs),
        "rows": Work(2 * rows, 4 * rows),
        "optimiser": Work(ADAM_FLOPS * parameters, 6 * PARAMETER_BYTES * parameters),
    }


def encoder_rows(shape: SAEConfig) -> int:
    """Return R, the encoder rows per token that receive a gradient: two parents of each latent, or its one row.

    With a dense trunk it is an upper bound: how many of a token's latents are the trunk's is unknown before training.
    """
    parents = isinstance(shape.encoder, KroneckerEncoderConfig | TrunkEncoderConfig)
    return (2 if parents else 1) * shape.sparsifier.k


def seconds_of(phases: Iterable[Work], flops: float, bandwidth: float) -> float:
    """Return the time of phases that follow each other, at the peak rates."""
    return sum(phase.seconds(flops, bandwidth) for phase in phases)


@dataclass(frozen=True)
class Group:
    """Devices that send to each other: their number, and the number of neighbouring devices that they span."""

    size: int
    span: int

    @property
    def others(self) -> float:
        """Return ``(n - 1) / n``, the share of a ring's data that each device sends once."""
        return (self.size - 1) / self.size


@dataclass(frozen=True)
class Sent:
    """Bytes that each device sends, by the number of neighbouring devices that the group spans."""

    bytes: float
    span: int

    def seconds(self, device: Device) -> float:
        """Return the time at the device's peak rate."""
        return self.bytes / device.sending_bandwidth(self.span)


def gradient_sum(size: int, width: int, rows_per_token: int, batch_tokens: int, group: Group) -> tuple[float, bool]:
    """Return the bytes that each device sends to sum the gradient of a weight over a group, and whether it is dense.

    In a ring, the dense form takes ``2 (n - 1) / n * 4 size`` bytes. The terms of which it consists take
    ``(n - 1) / n`` of their own bytes (`term_bytes`). The smaller one is sent.

    Args:
        size: numbers in the weight.
        width: width of its rows.
        rows_per_token: R, rows of the weight to which a token contributes.
        batch_tokens: B, tokens of the batch over the whole group.
        group: the devices.
    """
    if group.size == 1:
        return 0.0, False
    dense, terms = 2 * PARAMETER_BYTES * size, term_bytes(width, rows_per_token, batch_tokens)
    return group.others * min(dense, terms), dense <= terms


def term_bytes(width: int, rows_per_token: int, batch_tokens: int) -> int:
    """Return the bytes of the terms of a gradient: R weights and row numbers, and one vector, of each token."""
    return batch_tokens * (8 * rows_per_token + 4 * width)


def merge_bytes(shape: SAEConfig, tokens: int, group: Group) -> float:
    """Return the bytes that each device sends to merge the codes and reconstructions of the parts of a dictionary.

    Each of n devices sends its K offers per token (value, index of 8 bytes and rank) to the others; the reconstructions
    are summed in a ring.
    """
    offers = (group.size - 1) * tokens * shape.sparsifier.k * (4 + 8 + 4)
    return offers + 2 * group.others * 4 * tokens * shape.d_out
