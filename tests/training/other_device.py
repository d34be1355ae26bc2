"""A device that is not there: tensors that say so hold their values on the CPU, and mixing them with CPU tensors fails.

PyTorch's place for backends written in Python lends the device (its name, its place in autograd). Run as a program with
a path of kernels and ``--sae`` strings, it trains each on this device and on the CPU and compares the weights. Triton's
kernels run in its interpreter, and each launch is reported. As on a GPU, backward passes run in another thread.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from kronsae import kernels
from kronsae.core.objective import AuxKConfig
from kronsae.kernels import dispatch
from kronsae.runs.parsing import parse_sae
from kronsae.training.member import Member

PLACE = "far:0"
BETWEEN = ("_to_copy", "copy_")  # what moves values from one device to another
D_IN, TOKENS, STEPS = 16, 6, 2


class Far(torch.Tensor):
    """A tensor of the other device."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Far:
        sizes = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        make: Any = torch.Tensor._make_wrapper_subclass
        made: Far = make(cls, held.size(), dtype=held.dtype, device=PLACE, **sizes)
        return made

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def tolist(self) -> Any:
        """PyTorch refuses this for all tensors of a subclass."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(func, args, kwargs or {})


def is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == "far"


def held(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, Far) else leaf, tree)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values; refuse tensors of two devices and the CPU's random numbers for this one."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, Far)]
    name = func.name().split("::")[1].split(".")[0]
    numbers = [tensor for tensor in tensors if not isinstance(tensor, Far) and tensor.dim() > 0]
    if far and numbers and name not in BETWEEN:
        raise RuntimeError(f"{func}: tensors on two devices")
    makes_far = bool(far)
    if kwargs.get("device") is not None:
        makes_far = is_far(kwargs["device"])
        kwargs = {**kwargs, "device": "cpu"}
    if makes_far and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{func}: a generator of the CPU for another device")
    with _disable_current_modes():
        out = func(*held(args), **held(kwargs))
    if not makes_far:
        return out
    if name == "copy_":
        return args[0]
    own = {id(tensor.held): tensor for tensor in far}  # what changes in place stays the same tensor

    def back(leaf: Any) -> Any:
        return own.get(id(leaf), leaf) if id(leaf) in own else Far(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(back, out)


class OtherDevice(TorchDispatchMode):
    """Make tensors of this device inside the block."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_far(kwargs.get("device")) or any(isinstance(leaf, Far) for leaf in tree_leaves((args, kwargs))):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


def set_up() -> None:
    """Make the device known to this process, for good; and `torch.tensor`, whose making no mode sees."""
    _setup_privateuseone_for_python_backend("far")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    make = torch.tensor

    def tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        return Far(make(data, dtype=dtype)) if is_far(device) else make(data, dtype=dtype, device=device)

    def new_tensor(self: torch.Tensor, data: Any) -> torch.Tensor:
        made = make(data, dtype=self.dtype)
        return Far(made) if isinstance(self, Far) else made

    torch.tensor = tensor  # type: ignore[assignment]
    torch.Tensor.new_tensor = new_tensor  # type: ignore[method-assign, assignment]
    refuse = dispatch.refuse
    dispatch.refuse = lambda path, *about: None if path == "gpu" else refuse(path, *about)  # type: ignore[assignment]


def train(specification: str, place: str) -> list[torch.Tensor]:
    """Return the weights after a few steps in which latents die and, without experts, are revived."""
    config = parse_sae(f"{specification} lr=1e-3")
    config = replace(config, aux_k=AuxKConfig(dead_after_tokens=TOKENS))
    if not specification.startswith("switch"):
        config = replace(config, revive_every_tokens=TOKENS)
    member = Member(config, D_IN, "hook", 10, device=place)
    steps = torch.randn(STEPS, TOKENS, D_IN, generator=torch.Generator().manual_seed(0))
    for step, x_BD in enumerate(steps):
        member.step(x_BD.to(place), step, want_metrics=True)
    return [held(weight.data) for weight in member.sae.parameters()]


def main(path: str, specifications: list[str]) -> None:
    """Print one line of JSON: the largest difference of each SAE, and the launches of Triton's kernels."""
    set_up()
    launched = set()
    differences = {}

    def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        types = [str(one.dtype) if isinstance(one, torch.Tensor) else "int" for one in arguments]
        chosen = {name: constants[name] for name in ("has_bias", "unit_norm", "only_touched") if name in constants}
        launched.add(json.dumps([kernel.__name__, types, chosen]))
        if 0 not in grid:
            with _disable_current_modes():
                kernel[grid](*held(list(arguments)), **constants)

    for specification in specifications:
        with kernels.use("portable"):
            want = train(specification, "cpu")
        with kernels.use(path), OtherDevice():
            if path == "gpu":
                from kronsae.kernels import gpu

                with gpu.launches_to(launch):
                    got = train(specification, PLACE)
            else:
                got = train(specification, PLACE)
        differences[specification] = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
    try:
        with OtherDevice():
            torch.ones(3, device=PLACE) + torch.ones(3)
        mixed = "no error"
    except RuntimeError as error:
        mixed = str(error)
    sys.stdout.write(json.dumps({"differences": differences, "launched": sorted(launched), "mixed": mixed}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
