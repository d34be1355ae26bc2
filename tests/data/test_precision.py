from __future__ import annotations

import pytest
import torch

from kronsae.data.precision import PRECISIONS, narrow, token_bytes, widen


def test_int8_has_a_scale_per_token() -> None:
    """By hand: the largest value becomes 127, and the step is a 127th of it."""
    rows = torch.tensor([[127.0, -1.0, 0.4], [0.0, 0.0, 0.0], [-2.54, 1.27, 0.019]])
    stored = narrow(rows, "h", "int8")
    assert stored["h"].tolist() == [[127, -1, 0], [0, 0, 0], [-127, 64, 1]]  # 63.5 is rounded to even
    assert stored["h:scale"].tolist() == pytest.approx([1.0, 0.0, 0.02])
    assert widen(stored, "h")[2].tolist() == pytest.approx([-2.54, 1.28, 0.02])


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_error_is_within_half_a_step(dtype: str) -> None:
    rows = torch.randn(100, 32) * torch.logspace(-6, 3, 100)[:, None]
    error = (widen(narrow(rows, "h", dtype), "h") - rows).abs()
    largest = rows.abs().amax(1, keepdim=True)
    # half of the last place: 2^-9 and 2^-12 of the value, plus the smallest float16; 1/254 of the row's largest
    bound = {
        "float32": 0 * rows,
        "bfloat16": rows.abs() / 2**8,
        "float16": rows.abs() / 2**11 + 2**-25,
        "int8": (largest / 254).expand_as(rows) * (1 + 1e-5),
    }[dtype]
    assert bool((error <= bound).all())


def test_bytes_of_a_token() -> None:
    widths = {"a": 10, "b:input": 6}
    assert [token_bytes(widths, dtype) for dtype in PRECISIONS] == [64, 32, 32, 24]
