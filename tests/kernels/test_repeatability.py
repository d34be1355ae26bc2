"""Test for equal bits in every run; `benchmarks/fresh_processes.py` also detects races."""

from __future__ import annotations

import hashlib
import os
import threading

import pytest
import torch
from torch import Tensor

from kronsae import kernels
from kronsae.core.encoders import DenseEncoderConfig
from kronsae.core.objective import objective
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import JumpReLUConfig
from kronsae.kernels import AdamW, Choice, reference
from kronsae.kernels.rows import Term

cpu = pytest.importorskip("kronsae.kernels.cpu")


def digest() -> str:
    """Return a hash of all results of the CPU path for one seeded case."""
    generator = torch.Generator().manual_seed(11)
    x_BD = torch.randn(96, 40, generator=generator)
    weight_HPD = torch.randn(48, 12, 40, generator=generator)
    W_dec_FD = torch.randn(48 * 32, 40, generator=generator)
    among_C = torch.randperm(48 * 32, generator=generator)[:700]
    layer = x_BD, weight_HPD, torch.zeros(48, 12), 4, [Choice(16), Choice(30, among_C)]
    chosen = cpu.kronecker_linear_topk(*layer)
    with_null_symbols = cpu.kronecker_linear_topk(*layer, True)
    results = [tensor for pairs in (*chosen, *with_null_symbols) for tensor in (*pairs.selection, pairs.pre_BR)]
    values_BK = chosen[0].pre_BR[:, :16].relu()
    indices_BK = chosen[0].selection.indices_BK
    results.append(cpu.weighted_rows(values_BK, indices_BK, W_dec_FD))
    results.append(cpu.sampled_products(x_BD, W_dec_FD, indices_BK))
    gradient = cpu.group_rows([Term(values_BK, indices_BK, x_BD)], len(W_dec_FD))
    results.append(cpu.gradient_rows(gradient))
    moments = [torch.zeros_like(W_dec_FD), torch.zeros_like(W_dec_FD)]
    cpu.adamw(
        W_dec_FD, *moments, gradient,
        AdamW(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1, unit_norm=True),
    )  # fmt: skip
    results += [W_dec_FD, *moments]
    b_enc_F = torch.zeros(len(W_dec_FD))
    results += cpu.linear_above(x_BD, W_dec_FD, b_enc_F, torch.rand(len(W_dec_FD), generator=generator))
    results += cpu.linear_batch_topk(x_BD, W_dec_FD, b_enc_F, 96 * 16)
    pre_BHP = (x_BD @ weight_HPD.flatten(0, 1).T).view(96, 48, 12)
    batch, chosen_BK = cpu.kronecker_batch_topk(pre_BHP, 4, 96 * 16)
    results += [*batch, chosen_BK]
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in results)).hexdigest()


def test_two_hundred_runs_and_any_number_of_threads_give_the_same_bits() -> None:
    threads = torch.get_num_threads()
    want = digest()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert {digest() for _ in range(50)} == {want}
    finally:
        torch.set_num_threads(threads)


def test_what_thresholds_learn_from_is_added_in_one_order() -> None:
    """40,000 places share 400 thresholds: PyTorch's own gradient of ``tensor[indices]`` differs from run to run."""
    sae = SAEConfig(d_in=4, encoder=DenseEncoderConfig(d_sae=400), sparsifier=JumpReLUConfig(k=50)).build()
    x_BD = torch.randn(400, 4)
    threads = torch.get_num_threads()

    def gradient() -> Tensor:
        sae.zero_grad()
        objective(sae, x_BD, l0_weight=0.1).loss.backward()
        found = sae.get_parameter("sparsifier.log_threshold").grad
        assert found is not None
        return found

    try:
        torch.set_num_threads(4)
        want = gradient()
        assert all(torch.equal(gradient(), want) for _ in range(10))
        assert want.count_nonzero() > 300
    finally:
        torch.set_num_threads(threads)


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    want = digest()
    found: list[str] = []
    workers = [threading.Thread(target=lambda: found.extend(digest() for _ in range(10))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert set(found) == {want}
    assert len(found) == 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    want = cpu.weighted_rows(torch.ones(64, 2), torch.zeros(64, 2, dtype=torch.int64), torch.ones(1, 3))
    child = os.fork()
    if child == 0:
        got = cpu.weighted_rows(torch.ones(64, 2), torch.zeros(64, 2, dtype=torch.int64), torch.ones(1, 3))
        os._exit(0 if torch.equal(got, want) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_selection_does_not_depend_on_the_batch_it_is_in() -> None:
    pre_BHP = torch.randn(50, 30, 12)
    whole = kernels.kronecker_topk(pre_BHP, 4, 16).indices_BK
    alone = torch.cat([kernels.kronecker_topk(part, 4, 16).indices_BK for part in pre_BHP.split(1)])
    assert torch.equal(whole, alone)
    assert torch.equal(whole.sort().values, reference.kronecker_topk(pre_BHP, 4, 16).indices_BK.sort().values)
