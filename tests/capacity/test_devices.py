"""Devices by name, and with figures given by hand."""

from __future__ import annotations

import pytest

from kronsae.capacity.devices import DEVICES, GB, find_device
from kronsae.support.errors import UserError


def test_units_of_the_table() -> None:
    """Figures of one data sheet, in bytes, FLOP/s and bytes/s."""
    h100 = DEVICES["h100"]
    assert (h100.memory_bytes, h100.flops, h100.float32_flops) == (80 * 2**30, 989e12, 67e12)
    assert (h100.bandwidth, h100.link_bandwidth, h100.network_bandwidth) == (3.35e12, 450e9, 50e9)
    for device in DEVICES.values():  # a figure in another unit would be out of these ranges
        assert 2**35 < device.memory_bytes < 2**38
        assert 1e14 < device.flops < 1e16
        assert 1e13 < device.float32_flops < device.flops
        assert 5e11 < device.bandwidth < 1e13
        assert 3e10 < device.link_bandwidth < device.bandwidth


def test_rates_by_dtype_and_by_group() -> None:
    a100 = find_device("a100")
    assert [a100.flops_of(dtype) for dtype in ("float32", "bfloat16", "float16")] == [19.5e12, 312e12, 312e12]
    assert [a100.sending_bandwidth(size) for size in (2, 8, 9)] == [300e9, 300e9, 50e9]
    assert a100.usable_bytes == int(0.9 * 80 * GB)


def test_given_figures_replace_known_ones() -> None:
    assert find_device("h100", device_memory=1e9).flops == 989e12
    assert find_device("h100", device_memory=1e9).memory_bytes == 1e9
    rates = find_device("h100", flops=5e12)
    assert (rates.flops, rates.float32_flops, rates.name) == (5e12, 5e12, "h100")
    assert rates.source.startswith("given: flops; else data sheet")
    own = find_device("h100", device_memory=1e9, flops=1e12, bandwidth=1e11, link_bandwidth=1e10)
    assert (own.name, own.bandwidth, own.link_bandwidth) == ("given", 1e11, 1e10)


def test_refusals() -> None:
    with pytest.raises(UserError) as caught:
        find_device("h10")
    assert str(caught.value) == (
        "gpu must be one of a100-40gb, a100, h100, h200, b200, l40s, mi300x; got 'h10'. Did you mean 'h100'? For "
        "another device, name the most similar one and give --device-memory, --flops, --bandwidth and --link-bandwidth."
    )
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"^device_memory must be (above 0|finite); got "):
            find_device("h100", device_memory=value)
