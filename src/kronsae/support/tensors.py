"""Tensors that own their memory, at addresses that give the same bits everywhere.

MKL's matrix products sum in another order when an operand does not start at a multiple of 16 bytes (AVX2) or 64 bytes
(AVX-512), so the last bits of a result depend on where its inputs lie. PyTorch's own allocations start at multiples of
64 bytes. Memory from elsewhere does not: safetensors maps files into memory at any multiple of 8 bytes (and such
tensors change or crash when the file does), a slice ``x[1:]`` starts wherever a row ends, and a transposed or strided
matrix takes another path through MKL. So weights are aligned where they are loaded (`read_tensors`), and activations
where they enter an SAE (`aligned`). Weights that a caller assigns to an SAE are used as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT_BYTES = 64
"""The largest alignment that a vector unit of x86 asks for, and that of PyTorch's CPU allocator."""


def aligned(tensor: Tensor) -> Tensor:
    """Return a CPU tensor itself if it is contiguous and starts at a multiple of 64 bytes, else a copy that is.

    The copy is differentiable. Tensors of other devices, and those without memory of their own (under `torch.compile`
    and `torch.func`), are returned as they are.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return tensor
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a tensor of torch.func
        return tensor
    if tensor.is_contiguous() and address % ALIGNMENT_BYTES == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of the floating-point types in a safetensors file in which an SAE computes; float8 and float4 are storage."""


class TensorHeader(NamedTuple):
    """What the header of a safetensors file says about a tensor: the file's name of its type, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Return type and shape of each tensor of a safetensors file without reading a tensor.

    Raises:
        SafetensorError, OSError: the file is damaged or cannot be read.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it has no __iter__)
        return {name: TensorHeader(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, copied out of the file: owned and aligned.

    Raises:
        SafetensorError, OSError: the file is damaged or cannot be read.
    """
    from safetensors.torch import load_file

    found = load_file(path, device=str(device))
    return {name: tensor.clone() if tensor.device.type == "cpu" else tensor for name, tensor in found.items()}
