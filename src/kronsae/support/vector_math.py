"""Call the vector maths once before two threads do, because the first call of a process may be wrong.

On x86, PyTorch hands ``sqrt``, ``exp``, ``log``, ``tanh`` and other elementwise functions to MKL. The first such call
of a process finds out which processor it runs on and notes it in a variable shared by all threads, in two steps: a
provisional value, then the final one. A second thread that makes its first call in between reads the provisional
value and takes a low-accuracy routine: its part of the result is off by up to 3.2e-4 relative (float32 ``sqrt``; the
next call is right). After any one call that has returned, whichever function and dtype, the final value stands, and
the fault cannot occur. Seen with PyTorch 2.13 (MKL 2024.2) on two cores; how often depends on the machine, from one
process in six to one in a thousand.
"""

from __future__ import annotations

import torch

_FUNCTIONS = (torch.sqrt, torch.exp, torch.log, torch.tanh)


def warm_up() -> None:
    """Make the process's first call of the vector maths, on the calling thread alone; ``import kronsae`` does it.

    Three elements are enough, PyTorch has no lower limit below which it would take another path; and it cuts only
    tensors above 32,768 elements into parts for several threads. So the number of threads, which is a setting of the
    whole process and not this library's to touch, can stay as it is. One call would do; four functions in both
    dtypes still cost next to nothing (1 ms the first time) and do not rest on MKL's functions sharing that variable.
    Calling it again is harmless.
    """
    for dtype in (torch.float32, torch.float64):
        values = torch.full((3,), 0.5, dtype=dtype, device="cpu")
        for function in _FUNCTIONS:
            function(values)
