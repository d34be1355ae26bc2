"""One call of the vector maths before threads start, because the first call of a process may be wrong.

On x86, PyTorch passes ``sqrt``, ``exp``, ``log``, ``tanh`` and other elementwise functions to MKL. The first such call
of a process detects the processor and stores it in a variable shared by all threads, in two steps: a provisional
value, then the final one. A second thread whose first call falls in between reads the provisional value and takes a
low-accuracy routine: its part of the result is off by up to 3.2e-4 relative (float32 ``sqrt``); its next call is
correct. After any one call has returned, whichever function and dtype, the final value is stored and the error cannot
occur. Seen with PyTorch 2.13 (MKL 2024.2) on two cores; its frequency depends on the machine, from one process in six
to one in a thousand.
"""

from __future__ import annotations

import torch

_FUNCTIONS = (torch.sqrt, torch.exp, torch.log, torch.tanh)


def warm_up() -> None:
    """Make the process's first call of the vector maths on the calling thread alone; ``import kronsae`` runs it.

    Three elements are enough: PyTorch takes the same path for small tensors, and splits only tensors of more than
    32,768 elements over several threads. The number of threads, a setting of the whole process that this library should
    not change, therefore stays as it is. One call would be enough. Four functions in both dtypes cost next to nothing
    (1 ms the first time) and do not rely on MKL's functions sharing that variable. Repeated calls are harmless.
    """
    for dtype in (torch.float32, torch.float64):
        values = torch.full((3,), 0.5, dtype=dtype, device="cpu")
        for function in _FUNCTIONS:
            function(values)
