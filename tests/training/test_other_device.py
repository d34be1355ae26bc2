"""Training on a device other than the CPU, without one: no step mixes tensors of two devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kronsae.kernels.dispatch import refuse

HEADS = "num_heads=16 d_base=2 d_extension=4 k=4"
SAES = (
    f"kron {HEADS}",
    f"kron {HEADS} null_symbols=true",
    f"kron {HEADS} gate=minimum",
    f"kron {HEADS} pursuit_rounds=2",
    "topk d_sae=128 k=4",
    f"batch_topk {HEADS}",
    "batch_topk d_sae=128 k=4",
    f"jumprelu {HEADS}",
    "jumprelu d_sae=128 k=4",
    f"matryoshka {HEADS} smallest=32",
    f"switch {HEADS} num_experts=4",
)
INTERPRETED = refuse("gpu", "adamw", torch.device("cpu"), torch.float32)
LARGEST = 1e-5  # of weights of about .1 after 2 steps of at most 1e-3: sums in another order


def trained(path: str) -> dict[str, Any]:
    """Return what `other_device` prints, from a process of its own: PyTorch keeps such a device for good."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.other_device", path, *SAES]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["mixed"] == "aten.add.Tensor: tensors on two devices"
    assert set(found["differences"]) == set(SAES)
    for name, difference in found["differences"].items():
        assert difference <= LARGEST, name
    return found


def test_no_step_mixes_devices() -> None:
    assert trained("portable")["launched"] == []


@pytest.mark.skipif(INTERPRETED is not None, reason=str(INTERPRETED))
def test_the_gpu_path_mixes_no_devices_and_launches_what_is_compiled() -> None:
    from kronsae.bench.compiled import launches

    compiled = set()
    for one in launches(torch.float32):
        types = [str(value.dtype) if isinstance(value, torch.Tensor) else "int" for value in one.arguments]
        chosen = {
            name: one.constants[name] for name in ("has_bias", "unit_norm", "only_touched") if name in one.constants
        }
        compiled.add(json.dumps([one.kernel.__name__, types, chosen]))
    launched = set(trained("gpu")["launched"])
    assert launched <= compiled
    kernels = {json.loads(one)[0] for one in launched}
    assert {one.name for one in launches(torch.float32)} - {name[1:].removesuffix("_kernel") for name in kernels} == {
        "gradient_rows"  # for optimisers that need a gradient as a tensor
    }
