"""The first vectorised call of a process is made by ``import kronsae``, alone; so the first one that counts is right.

The fault itself is a race that no test can call up at will, so two things are held: the deterministic one (which call
is first, and how big it is) and the observed one (many processes, every one right).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from kronsae.support.vector_math import warm_up

PYTORCH_GRAIN = 32_768
"""Elements from which PyTorch cuts an elementwise operation into parts for several threads."""


def run_fresh(script: str) -> str:
    """Run ``script`` in a new interpreter and return what it wrote."""
    # Numpy's own threads would stand in the way of os.fork.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# A first big sqrt on two threads; its largest relative error must be rounding (3e-8), where the fault makes 3e-4.
FIRST_BIG_SQRT = """
import os, warnings
import torch

def first_big_sqrt():
    import kronsae
    torch.set_num_threads(2)
    x = torch.linspace(0.01, 0.99, 200_000)
    ours = torch.sqrt(x).double()
    right = torch.sqrt(x.double())
    return ((ours - right).abs() / right).max().item()
"""


def test_importing_makes_the_first_call_on_one_thread() -> None:
    out = run_fresh(
        """
        import json
        import torch
        from torch.overrides import TorchFunctionMode

        calls = []

        class Recorder(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                calls.extend([function.__name__, a.numel(), str(a.dtype)] for a in args if torch.is_tensor(a))
                return function(*args, **(kwargs or {}))

        before = torch.get_num_threads(), torch.random.get_rng_state()
        with Recorder():
            import kronsae
        assert torch.get_num_threads() == before[0]
        assert torch.equal(torch.random.get_rng_state(), before[1])
        print(json.dumps(calls))
        """
    )
    calls = json.loads(out)
    assert calls[0][0] == "sqrt"
    assert {dtype for name, _, dtype in calls if name == "sqrt"} == {"torch.float32", "torch.float64"}
    assert all(0 < size < PYTORCH_GRAIN for _, size, _ in calls)


def test_calling_it_again_changes_nothing() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    with torch.device("meta"):
        warm_up()
    warm_up()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs a safe os.fork")
def test_the_first_big_sqrt_is_right_in_forked_processes() -> None:
    # The parent has called nothing yet, so each child is as new as a fresh process, at a fiftieth of the price.
    out = run_fresh(
        FIRST_BIG_SQRT
        + """
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of os.fork with threads about
wrong = 0
for _ in range(40):
    child = os.fork()
    if child == 0:
        status = 3  # an exception must not pass for an answer
        try:
            status = int(not first_big_sqrt() < 1e-6)
        finally:
            os._exit(status)
    wrong += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
print(wrong)
"""
    )
    assert int(out) == 0


@pytest.mark.parametrize("processes", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_the_first_big_sqrt_is_right_in_fresh_processes(processes: int) -> None:
    errors = [float(run_fresh(FIRST_BIG_SQRT + "print(first_big_sqrt())")) for _ in range(processes)]
    assert max(errors) < 1e-6
