"""Operations, bytes moved and bytes sent, compared with sums computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kronsae.capacity.devices import find_device
from kronsae.capacity.models import GivenShape, find_model
from kronsae.capacity.work import Group, Sent, Work, gradient_sum, merge_bytes, pass_work, seconds_of, step_work
from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.pursuit import Pursuit
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.data.model import ModelConfig

DENSE = SAEConfig(d_in=6, encoder=DenseEncoderConfig(d_sae=24), sparsifier=TopKConfig(k=2))
KRON = SAEConfig(
    d_in=6, encoder=KroneckerEncoderConfig(num_heads=4, d_base=2, d_extension=3), sparsifier=TopKConfig(k=2)
)


def test_a_roofline_is_the_longer_of_arithmetic_and_memory() -> None:
    assert Work(100, 10).seconds(10, 10) == 10
    assert Work(100, 10).seconds(1000, 10) == 1
    assert Work(100, 10).times(3) == Work(300, 30)
    assert seconds_of([Work(100, 10), Work(10, 100)], 10, 10) == 20


def test_a_pass_by_hand() -> None:
    """2 of 4 layers of 25 parameters, D = 8, 12 tokens in windows of 3, float32."""
    model = find_model(ModelConfig(name="mine"), GivenShape(d_in=8, layers=4, parameters=180, vocabulary=10))
    assert model.layer_parameters == 25
    work = pass_work(model, 2, 12, 3)
    assert work.flops == 2 * 12 * (2 * 25 + 4 * 3 * 8)
    assert work.bytes == 2 * (25 * 4 + 2 * 16 * 12 * 8 * 4)
    half = replace(model, dtype="bfloat16")
    assert pass_work(half, 2, 12, 3) == Work(work.flops, work.bytes / 2)


def test_a_dense_step_by_hand() -> None:
    """F = 24, D = O = 6, k = 2, B = 5."""
    phases = step_work(DENSE, 5, 1000, clipped=False)
    assert phases["encoder product"] == Work(2 * 5 * 6 * 24, 4 * 6 * 24 + 8 * 5 * 24)
    entries = 5 * (2 * 2 * 6 + 2 * 6 + 2 * 6)  # decode and latents' gradients; decoder's and encoder's gradients
    assert phases["rows"] == Work(2 * entries, 4 * entries)
    assert phases["optimiser"] == Work(10_000, 24_000)


def test_a_kronecker_step_by_hand() -> None:
    """4 heads of 2 + 3 rows and 6 latents; each latent has two parents."""
    phases = step_work(KRON, 5, 1000, clipped=False)
    outputs = (6 * 20 + 24) / 6
    assert phases["encoder product"] == Work(2 * 5 * (6 * 20 + 24), 4 * 6 * outputs + 8 * 5 * outputs)
    entries = 5 * (2 * 2 * 6 + 2 * 6 + 4 * 6)
    assert phases["rows"] == Work(2 * entries, 4 * entries)
    clipped = step_work(KRON, 5, 1000, clipped=True)
    assert clipped["rows"].flops == 2 * (entries + 5 * (2 * 6 + 4 * 6))
    assert {name: clipped[name] for name in ("encoder product", "optimiser")} == {
        name: phases[name] for name in ("encoder product", "optimiser")
    }
    assert step_work(KRON, 5, 1000, clipped=False, own_share=0.5)["rows"] == Work(entries, 2 * entries)


def test_a_skip_connection_and_a_pursuit_add_their_own_work() -> None:
    plain = step_work(DENSE, 5, 1000, clipped=False)
    skip = step_work(replace(DENSE, write_widths=(6,), skip=True), 5, 1000, clipped=False)
    assert skip["encoder product"].flops - plain["encoder product"].flops == 2 * 5 * 3 * 36
    pursuit = Pursuit()
    pursued = step_work(replace(DENSE, pursuit=pursuit), 5, 1000, clipped=False)
    assert pursued["rows"].flops - plain["rows"].flops == 2 * 5 * pursuit.multiply_adds(2, 6)


def test_the_smaller_form_of_a_gradient_is_sent() -> None:
    pair = Group(2, 2)
    assert gradient_sum(100, 10, 3, 1000, pair) == (0.5 * 2 * 4 * 100, True)
    assert gradient_sum(10**6, 10, 3, 7, pair) == (0.5 * 7 * (8 * 3 + 4 * 10), False)
    assert gradient_sum(100, 10, 3, 1000, Group(1, 1)) == (0.0, False)
    assert gradient_sum(100, 10, 3, 1000, Group(4, 4))[0] == 0.75 * 2 * 4 * 100


def test_bytes_that_merge_a_dictionary() -> None:
    assert merge_bytes(DENSE, 5, Group(4, 4)) == 3 * 5 * 2 * 16 + 2 * 0.75 * 4 * 5 * 6
    assert merge_bytes(DENSE, 5, Group(1, 1)) == 0


def test_bytes_sent_take_the_time_of_the_slowest_link() -> None:
    h100 = find_device("h100")
    assert Sent(9e11, 8).seconds(h100) == 2
    assert Sent(9e11, 16).seconds(h100) == pytest.approx(18)
