"""Test the choice of the kernel path by rule, name and environment, and its messages."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kronsae import kernels
from kronsae.kernels import dispatch, portable, reference
from kronsae.kernels.dispatch import OPERATIONS, PATHS, choose, refuse
from kronsae.support.errors import UserError


def test_every_path_but_the_gpus_knows_every_operation() -> None:
    for path in PATHS[1:]:
        if refuse(path, "adamw", torch.device("cpu"), torch.float32) is None:
            assert all(dispatch._load_function(path, operation) for operation in OPERATIONS)


def test_the_rule() -> None:
    cpu = pytest.importorskip("kronsae.kernels.cpu")
    for dtype in (torch.float32, torch.float64):
        assert choose("weighted_rows", torch.zeros(1, dtype=dtype)) is cpu.weighted_rows
    assert choose("weighted_rows", torch.zeros(1, dtype=torch.bfloat16)) is portable.weighted_rows
    assert choose("weighted_rows", torch.zeros(1, device="meta")) is portable.weighted_rows


def test_by_name_and_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(1)
    monkeypatch.setenv("KRONSAE_KERNELS", "portable")
    assert choose("weighted_rows", like) is portable.weighted_rows
    with kernels.use("reference"):
        assert choose("weighted_rows", like) is reference.weighted_rows
    assert choose("weighted_rows", like) is portable.weighted_rows


def test_a_name_that_cannot_do_it_raises_with_the_reason() -> None:
    if refuse("cpu", "adamw", torch.device("cpu"), torch.float32) is not None:
        pytest.skip("numba is not installed")
    with kernels.use("cpu"), pytest.raises(UserError) as error:
        choose("weighted_rows", torch.zeros(1, dtype=torch.bfloat16))
    assert str(error.value) == (
        "kernels path 'cpu' was forced but cannot run weighted_rows: bfloat16 tensors; its loops support "
        "float32 and float64. Remove kernels.use or KRONSAE_KERNELS, or name another of gpu, cpu, portable, "
        "reference."
    )


def test_an_unknown_name_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as error, kernels.use("portible"):
        pass
    assert str(error.value) == (
        "path must be one of gpu, cpu, portable, reference; got 'portible'. Did you mean 'portable'?"
    )
    monkeypatch.setenv("KRONSAE_KERNELS", "numba")
    with pytest.raises(UserError, match="KRONSAE_KERNELS must be one of gpu, cpu, portable, reference; got 'numba'"):
        choose("weighted_rows", torch.zeros(1))


def test_explain() -> None:
    lines = kernels.explain(dtype=torch.bfloat16).splitlines()
    assert lines[0] == "device cpu, dtype bfloat16"
    assert len(lines) == 1 + len(OPERATIONS)
    assert all(": portable (" in line for line in lines[1:])
    assert all("cpu: bfloat16 tensors; its loops support float32 and float64" in line for line in lines[1:])
    with kernels.use("reference"):
        assert all(line.endswith(": reference (forced by name)") for line in kernels.explain().splitlines()[1:])


def test_without_numba_the_package_works_and_says_so() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'numba' else find(name, *a)\n"
        "import torch; from kronsae import kernels\n"
        "kernels.kronecker_topk(torch.randn(3, 4, 5), 2, 3); print(kernels.explain().splitlines()[1])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "kronecker_topk: portable (" in out
    assert "cpu: numba is not installed (pip install 'kronsae[fast]')" in out


def test_importing_is_light() -> None:
    code = "import sys, kronsae.kernels; print([m for m in ('numba', 'triton', 'llvmlite') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
