"""Compilation of every Triton kernel ahead of time, for devices that need not be there, and what each one uses.

The launches are those of a training step of `kronsae.kernels.gpu` on tensors without memory (device ``meta``), so that
signatures, alignment, constants and block sizes are the real ones. The NVIDIA assembler of Triton's package reports
registers and spills; for AMD they are in the assembly.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kronsae import kernels
from kronsae.bench.subjects import Shape
from kronsae.kernels.rows import AdamW, RowGradient
from kronsae.support.errors import UserError, nearest

SHAPE = Shape(d_in=2304, num_heads=4096, d_base=4, d_extension=8, k=50, batch=8192)
"""A training step at the width of Gemma 2 2B with 2^17 latents."""
WIDE = 8192
"""A second width, at which a row does not fit into one tile of the optimiser's kernel."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Target:
    """A device to compile for.

    Args:
        shared_limit: bytes of shared memory that a program can have.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024),
        Target("sm_90", "cuda", 90, 32, 227 * 1024),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
    )
}


@dataclass(frozen=True)
class Launched:
    """One launch as the GPU path makes it; ``variant`` names what distinguishes it from others of its kernel."""

    kernel: Any
    variant: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the kernel without ``_kernel``."""
        return str(self.kernel.__name__).removeprefix("_").removesuffix("_kernel")


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel uses per thread (registers, spills, local memory) and per program (shared memory).

    Args:
        spill_bytes: written to and read from local memory because registers ran out, in bytes of instructions.
        local_bytes: stack frame in local memory.
    """

    target: str
    kernel: str
    variant: str
    dtype: str
    width: int
    block: int
    rows: int
    num_warps: int
    registers: int
    spill_bytes: int
    local_bytes: int
    shared_bytes: int


def missing() -> str | None:
    """Return why nothing can be compiled here; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'kronsae[gpu]')"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 replaces the compiler; unset it"
    return None


def source_digest() -> str:
    """Return a digest of the source of all Triton kernels, which a kept result names; it needs no Triton."""
    source = (Path(str(kernels.__file__)).parent / "gpu.py").read_text(encoding="utf-8")
    parts = [
        ast.get_source_segment(source, node) or ""
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list)
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def launches(dtype: torch.dtype, shape: Shape = SHAPE, wide: int = WIDE) -> list[Launched]:
    """Return every distinct launch of the GPU path at one shape: selection, forward, backward, norm, optimiser."""
    from kronsae.kernels import gpu

    found: list[Launched] = []
    variant = ""

    def receive(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        found.append(Launched(kernel, variant, grid, arguments, constants))

    def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    long = torch.int64
    batch, d_in, d_sae, k = shape.batch, shape.d_in, shape.d_sae, shape.k
    values_BK, rows_BK = empty(batch, k), empty(batch, k, dtype=long)
    x_BD, weight_FD = empty(batch, d_in), empty(d_sae, d_in)
    with gpu.launches_to(receive):
        width = shape.d_base + shape.d_extension
        gpu.kronecker_topk(empty(batch, shape.num_heads, width), shape.d_base, k)
        variant = "bias"
        gpu.weighted_rows(values_BK, rows_BK, weight_FD, empty(d_in))
        variant = "no bias"
        gpu.weighted_rows(values_BK, rows_BK, weight_FD)
        variant = ""
        gpu.sampled_products(x_BD, weight_FD, rows_BK)
        gradient = _gradient(d_sae, x_BD, k)
        gpu.gradient_rows(gradient)
        gpu.squared_norm(gradient)
        for variant, unit_norm, only_touched in (
            ("plain", False, False), ("unit norm", True, False), ("unit norm, only touched", True, True),
        ):  # fmt: skip
            settings = AdamW(
                lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1,
                unit_norm=unit_norm, only_touched=only_touched,
            )  # fmt: skip
            gpu.adamw(weight_FD, weight_FD, weight_FD, gradient, settings)
            if unit_norm and not only_touched:
                variant = "unit norm, in parts"
                wide_FD = empty(d_sae, wide)
                gpu.adamw(wide_FD, wide_FD, wide_FD, _gradient(d_sae, empty(batch, wide), k), settings)
    return found


def _gradient(height: int, x_BD: torch.Tensor, k: int) -> RowGradient:
    entries = len(x_BD) * k
    offsets, tokens = (x_BD.new_empty(size, dtype=torch.int64) for size in (height + 1, entries))
    return RowGradient(offsets, tokens, x_BD.new_empty(entries), x_BD)


def compile_all(target: str, dtype: torch.dtype, shape: Shape = SHAPE, wide: int = WIDE) -> list[Compiled]:
    """Compile every launch for one target.

    Raises:
        UserError: Triton is missing or interprets, or no target has this name.
    """
    reason = missing()
    if reason is not None:
        raise UserError(f"kernels must be compiled by Triton: {reason}.")
    if target not in TARGETS:
        raise UserError(f"target must be one of {', '.join(TARGETS)}; got '{target}'.{nearest(target, TARGETS)}")
    with _compiling_for(TARGETS[target]):
        return [_compile(launch, TARGETS[target], dtype) for launch in launches(dtype, shape, wide)]


def _compile(launch: Launched, target: Target, dtype: torch.dtype) -> Compiled:
    kernel = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants)
    used = _used_on_amd(kernel.asm["amdgcn"]) if target.backend == "hip" else _used_on_nvidia(kernel.asm["ptx"])
    constants = launch.constants
    names = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    return Compiled(
        target=target.name,
        kernel=launch.name,
        variant=launch.variant,
        dtype=str(dtype).removeprefix("torch."),
        width=_width(launch.name, names, constants),
        block=constants["block_w" if "block_w" in constants else "block"],
        rows=constants.get("block_h", constants.get("block_r", 1)),
        num_warps=kernel.metadata.num_warps,
        shared_bytes=kernel.metadata.shared,
        **used,
    )


def _width(kernel: str, arguments: dict[str, Any], constants: dict[str, Any]) -> int:
    """Return what `kronsae.kernels.blocks` calls the width of a launch."""
    if kernel == "head_bounds":
        return int(constants["d_base"] + constants["d_extension"])
    if kernel == "expand":
        return int(arguments["expanded"] * constants["d_base"] * constants["d_extension"])
    return int(arguments["width"])


@contextmanager
def _compiling_for(target: Target) -> Iterator[None]:
    """Let Triton compile for ``target`` instead of the machine's device, if it has any."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Absent:
        def get_current_device(self) -> str:
            return f"ahead of time, {target.name}"  # the key of its compiled kernels; real devices have numbers

        def get_current_stream(self, device: str) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget(target.backend, target.arch, target.warp_size)

    before = driver._active
    driver.set_active(Absent())
    try:
        yield
    finally:
        driver.set_active(before)


def _used_on_nvidia(ptx: str) -> dict[str, int]:
    """Return what ptxas reports; units are bytes per thread."""
    import triton

    name = _number(r"\.target (sm_\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        options = ["-v", f"--gpu-name={name}", "-o", str(Path(folder) / "kernel.cubin")]
        command = [_assembler(triton), *options, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    report = done.stdout + done.stderr
    if done.returncode != 0:
        raise UserError(f"a kernel must be accepted by ptxas; it says: {report.strip()}")
    spills = [int(_number(rf"(\d+) bytes spill {what}", report)) for what in ("stores", "loads")]
    return {
        "registers": int(_number(r"Used (\d+) registers", report)),
        "spill_bytes": sum(spills),
        "local_bytes": int(_number(r"(\d+) bytes stack frame", report)),
    }


def _assembler(triton: ModuleType) -> str:
    named = os.environ.get("TRITON_PTXAS_PATH")
    return named or str(Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "ptxas")


def _used_on_amd(assembly: str) -> dict[str, int]:
    """Return what the metadata of the assembly says; a spilled register has 4 bytes per thread."""
    return {
        "registers": int(_number(r"\.vgpr_count:\s+(\d+)", assembly)),
        "spill_bytes": 4 * int(_number(r"\.vgpr_spill_count:\s+(\d+)", assembly)),
        "local_bytes": int(_number(r"\.private_segment_fixed_size:\s+(\d+)", assembly)),
    }


def _number(pattern: str, report: str) -> str:
    found = re.search(pattern, report)
    if found is None:
        raise UserError(f"the compiler's report must hold '{pattern}'. Use the Triton that torch requires.")
    return found.group(1)
