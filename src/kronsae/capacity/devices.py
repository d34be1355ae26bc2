"""Memory, peak rates and links of devices, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kronsae.core.checks import check_positive
from kronsae.support.errors import UserError, nearest

GB = 2**30

USABLE_SHARE = 0.9
"""Share of a device's memory that a plan uses; the rest is for the driver, the context and fragmentation."""

EFFICIENCY = 0.4
"""Assumed share of the peak rates that is reached on a GPU: the share of peak FLOPs of large trainings, 0.38 to 0.43
(Llama 3, arXiv 2407.21783, table 4). It is not measured with this library."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator.

    Args:
        name: what it is asked for by.
        memory_bytes: size of its memory.
        flops: peak rate of matrix products in bfloat16 and float16, without sparsity, in FLOP/s.
        float32_flops: the same in float32, in which SAEs are trained; without TF32, which PyTorch leaves off.
        bandwidth: peak rate of its memory, in bytes/s.
        link_bandwidth: rate at which it sends to devices of its node, in bytes/s.
        network_bandwidth: rate at which it sends to other nodes, in bytes/s.
        node_devices: devices in a node.
        source: where the figures are from.
    """

    name: str
    memory_bytes: float
    flops: float
    float32_flops: float
    bandwidth: float
    link_bandwidth: float
    network_bandwidth: float = 50e9  # 400 Gbit/s per device, as in NVIDIA's DGX A100 to B200 with current adapters
    node_devices: int = 8
    source: str

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "flops", "float32_flops", "bandwidth", "link_bandwidth", "network_bandwidth"):
            check_positive(name, getattr(self, name))

    @property
    def usable_bytes(self) -> int:
        """Memory that a plan uses."""
        return int(USABLE_SHARE * self.memory_bytes)

    def flops_of(self, dtype: str) -> float:
        """Return the peak rate of matrix products in ``float32``, ``bfloat16`` or ``float16``."""
        return self.float32_flops if dtype == "float32" else self.flops

    def sending_bandwidth(self, devices: int) -> float:
        """Return the rate at which it sends within a group that spans this many neighbouring devices."""
        return self.link_bandwidth if devices <= self.node_devices else self.network_bandwidth


def _sheet(name: str, memory: float, flops: float, float32: float, memory_tb_s: float, link: float, of: str) -> Device:
    """Return a device from the figures of a data sheet: GB, TFLOP/s, TB/s and GB/s per direction."""
    return Device(
        name=name,
        memory_bytes=memory * GB,
        flops=flops * 1e12,
        float32_flops=float32 * 1e12,
        bandwidth=memory_tb_s * 1e12,
        link_bandwidth=link * 1e9,
        source=f"data sheet of {of}",
    )


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _sheet("a100-40gb", 40, 312, 19.5, 1.555, 300, "NVIDIA A100 SXM 40 GB"),
        _sheet("a100", 80, 312, 19.5, 2.039, 300, "NVIDIA A100 SXM 80 GB"),
        _sheet("h100", 80, 989, 67, 3.35, 450, "NVIDIA H100 SXM"),
        _sheet("h200", 141, 989, 67, 4.8, 450, "NVIDIA H200 SXM"),
        _sheet("b200", 180, 2250, 75, 8.0, 900, "NVIDIA HGX B200"),
        _sheet("l40s", 48, 362, 91.6, 0.864, 32, "NVIDIA L40S, which has PCI Express and no NVLink"),
        _sheet("mi300x", 192, 1307, 163.4, 5.3, 448, "AMD Instinct MI300X"),
    )
}
"""Devices by name. Links: NVLink or Infinity Fabric, half of the sheet's figure for both directions."""


def find_device(
    name: str,
    *,
    device_memory: float | None = None,
    flops: float | None = None,
    bandwidth: float | None = None,
    link_bandwidth: float | None = None,
) -> Device:
    """Return the device with this name, with the figures that are given instead of its own.

    ``flops`` replaces both rates of matrix products.

    Raises:
        UserError: no device has this name, or a figure is not above 0.
    """
    if name not in DEVICES:
        raise UserError(
            f"gpu must be one of {', '.join(DEVICES)}; got '{name}'.{nearest(name, DEVICES)} For another device, name "
            "the most similar one and give --device-memory, --flops, --bandwidth and --link-bandwidth."
        )
    given = {
        "device_memory": device_memory,
        "flops": flops,
        "bandwidth": bandwidth,
        "link_bandwidth": link_bandwidth,
    }
    changed = {option: value for option, value in given.items() if value is not None}
    for option, value in changed.items():
        check_positive(option, value)
    if not changed:
        return DEVICES[name]
    known = DEVICES[name]
    return replace(
        known,
        name="given" if len(changed) == len(given) else name,
        memory_bytes=changed.get("device_memory", known.memory_bytes),
        flops=changed.get("flops", known.flops),
        float32_flops=changed.get("flops", known.float32_flops),
        bandwidth=changed.get("bandwidth", known.bandwidth),
        link_bandwidth=changed.get("link_bandwidth", known.link_bandwidth),
        source=f"given: {', '.join(changed)}" + ("" if len(changed) == len(given) else f"; else {known.source}"),
    )
