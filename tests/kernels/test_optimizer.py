"""The row optimiser against torch.optim.AdamW, over many steps, with rows that get no gradient."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.helpers import operation, same_values
from torch import Tensor
from torch.nn.functional import normalize

from kronsae import kernels
from kronsae.kernels import AdamW, RowAdamW, reference
from kronsae.kernels.rows import RowGradient, Term
from kronsae.support.errors import UserError


def entries(height: int, width: int, dtype: torch.dtype, step: int) -> Term:
    generator = torch.Generator().manual_seed(step)
    return Term(
        torch.randn(8, 3, dtype=dtype, generator=generator),
        torch.randint(0, height // 2, (8, 3), generator=generator),  # the upper half never gets a gradient
        torch.randn(8, width, dtype=dtype, generator=generator),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("as_entries", [True, False])
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("only_touched", [True, False])
def test_one_operation_against_its_formula(
    path: str, dtype: torch.dtype, as_entries: bool, unit_norm: bool, only_touched: bool
) -> None:
    states = [torch.randn(20, 37, dtype=dtype), torch.randn(20, 37, dtype=dtype), torch.rand(20, 37, dtype=dtype)]
    states[0][3] = 0  # a row of zeros has no direction, and stays
    others = [state.clone() for state in states]
    gradient: Tensor | RowGradient = reference.group_rows([entries(20, 37, dtype, 0)], 20)
    if not as_entries:
        assert isinstance(gradient, RowGradient)
        gradient = reference.gradient_rows(gradient)
    settings = AdamW(
        lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=7, grad_scale=0.3,
        unit_norm=unit_norm, only_touched=only_touched,
    )  # fmt: skip
    reference.adamw(states[0], states[1], states[2], gradient, settings)
    operation(path, "adamw")(others[0], others[1], others[2], gradient, settings)
    for name, want, got in zip(("weight", "moment", "second"), states, others, strict=True):
        assert not got.isnan().any(), name
        same_values(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fifty_steps_follow_torch(path: str, dtype: torch.dtype) -> None:
    height, width = 24, 19
    start_FD = normalize(torch.randn(height, width, dtype=dtype), dim=1)
    mine, theirs = (torch.nn.Parameter(start_FD.clone()) for _ in range(2))
    ours = RowAdamW([{"params": [mine], "unit_norm": True}], lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01)
    torchs = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01)
    with kernels.use(path):
        for step in range(50):
            collected = kernels.RowGradients()
            collected.add(mine, entries(height, width, dtype, step))
            ours.step(row_gradients=collected)
            gradient = reference.group_rows([entries(height, width, dtype, step)], height)
            theirs.grad = reference.gradient_rows(gradient)
            torchs.step()
            with torch.no_grad():
                theirs.div_(theirs.norm(dim=1, keepdim=True))
    same_values(mine.detach(), theirs.detach(), factor=5)
    for key in ("exp_avg", "exp_avg_sq"):
        same_values(ours.state[mine][key], torchs.state[theirs][key], factor=5)
    assert float(ours.state[mine]["step"]) == 50
    torch.testing.assert_close(mine.norm(dim=1), torch.ones(height, dtype=dtype), rtol=1e-6, atol=0)


def test_dense_gradients_of_any_shape(path: str) -> None:
    shapes = [(3, 4, 5), (7,), (6, 2)]
    mine, theirs = (
        [torch.nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel()).view(s)) for s in shapes] for _ in "ab"
    )
    ours = RowAdamW(mine, lr=0.01, weight_decay=0.1)
    torchs = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    with kernels.use(path):
        for _ in range(5):
            for parameters, optimizer in ((mine, ours), (theirs, torchs)):
                optimizer.zero_grad()
                sum((p.sin() * (p + 1)).sum() for p in parameters).backward()  # type: ignore[union-attr]
                optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        same_values(a.detach(), b.detach())


def test_state_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    parameter.grad = torch.randn(4, 3)
    mine, theirs = RowAdamW([parameter], lr=0.1), torch.optim.AdamW([parameter], lr=0.1)
    mine.step()
    assert set(mine.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
    theirs.load_state_dict(theirs.state_dict() | {"state": mine.state_dict()["state"]})
    assert torch.equal(theirs.state[parameter]["exp_avg"], mine.state[parameter]["exp_avg"])


def test_clipping_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(5, 4))
    parameter.grad = torch.randn(5, 4)
    norm = kernels.grad_norm([parameter])
    for limit in (0.1, 100.0, None):
        scaled = parameter.grad * kernels.clip_scale(norm, limit)
        copy = torch.nn.Parameter(torch.zeros(5, 4))
        copy.grad = parameter.grad.clone()
        torch.nn.utils.clip_grad_norm_([copy], float("inf") if limit is None else limit)
        same_values(scaled, copy.grad)


def test_what_it_refuses() -> None:
    parameter = torch.nn.Parameter(torch.zeros(5, 4))
    optimizer = RowAdamW([parameter], lr=0.1)
    with pytest.raises(UserError, match="closure must be None"):
        optimizer.step(lambda: 0.0)
    collected = kernels.RowGradients()
    collected.add(parameter, entries(4, 4, torch.float32, 0))
    parameter.grad = torch.zeros(5, 4)
    with pytest.raises(
        UserError,
        match=r"^a parameter must have its gradient in row_gradients or in \.grad; got both\. Call .*materialize",
    ):
        optimizer.step(row_gradients=collected)
