"""Comparison of the operations with their definitions on small cases, before they are timed."""

from __future__ import annotations

import torch
from torch import Tensor

from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.objective import objective
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import BatchTopK, BatchTopKConfig, JumpReLU, JumpReLUConfig, TopKConfig, jump
from kronsae.kernels import collect_row_gradients, kronecker_topk, reference
from kronsae.support.errors import UserError


def check_operations(seed: int = 0, device: torch.device | str = "cpu") -> None:
    """Check selection, values and every gradient of all encoders on a device against the definition in float64.

    Raises:
        UserError: one of them is wrong; do not report results then.
    """
    generator = torch.Generator().manual_seed(seed)
    pre_BHP = torch.randn(64, 40, 12, generator=generator).to(device)
    got = kronecker_topk(pre_BHP, 4, 16).indices_BK.sort().values
    if not torch.equal(got, reference.kronecker_topk(pre_BHP, 4, 16).indices_BK.sort().values):
        raise UserError(_MESSAGE.format(what="kronecker_topk", where="its selection"))
    encoders = (
        KroneckerEncoderConfig(num_heads=12, d_base=2, d_extension=4, init_norm=1.0),
        KroneckerEncoderConfig(num_heads=12, d_base=2, d_extension=4, init_norm=1.0, null_symbols=True),
        DenseEncoderConfig(d_sae=96, init_norm=1.0),
    )
    for encoder in encoders:
        for sparsifier in (TopKConfig(k=5), BatchTopKConfig(k=5), JumpReLUConfig(k=5)):
            sae = SAEConfig(d_in=24, encoder=encoder, sparsifier=sparsifier).build(seed).double().to(device)
            x_BD = torch.randn(32, 24, generator=generator, dtype=torch.float64).to(device)
            null = " and null symbols" if getattr(encoder, "null_symbols", False) else ""
            _check_gradients(sae, x_BD, f"{encoder.kind} with {sparsifier.kind}{null}")


_MESSAGE = "operations must be correct before they are timed; got a wrong {what} in {where}. Run pytest tests/kernels."


def _check_gradients(sae: SAE, x_BD: Tensor, kind: str) -> None:
    parameters = dict(sae.named_parameters())
    if isinstance(sae.sparsifier, JumpReLU):  # thresholds that equal no latent, so that rounding cannot matter
        sae.sparsifier.choose_in_training(sae.encoder(x_BD))
        sae.sparsifier.rescale(x_BD.new_tensor(0.9))
    with collect_row_gradients() as rows:
        loss = objective(sae, x_BD).loss
    loss.backward()
    rows.materialize()
    fast = {name: parameter.grad for name, parameter in parameters.items()}
    dense_BF = _keep_selected(sae, sae.encoder(x_BD).materialize())
    x_hat_BD = dense_BF @ sae.W_dec + sae.b_dec
    expected = (x_BD - x_hat_BD).square().sum(-1).mean()
    slow = torch.autograd.grad(expected, list(parameters.values()))
    if not torch.allclose(loss, expected, rtol=1e-9):
        raise UserError(_MESSAGE.format(what="loss", where=kind))
    for (name, got), want in zip(fast.items(), slow, strict=True):
        if got is None or not torch.allclose(got, want, rtol=1e-8, atol=1e-10):
            raise UserError(_MESSAGE.format(what=f"gradient of {name}", where=kind))


def _keep_selected(sae: SAE, dense_BF: Tensor) -> Tensor:
    """Return the activations that the sparsifier must keep, with zeros elsewhere."""
    if isinstance(sae.sparsifier, JumpReLU):
        kept_BF, _ = jump(dense_BF, sae.sparsifier.log_threshold.expand_as(dense_BF), sae.sparsifier.config.bandwidth)
        return kept_BF
    if isinstance(sae.sparsifier, BatchTopK):
        largest = dense_BF.flatten().topk(5 * len(dense_BF)).indices
        return dense_BF * torch.zeros_like(dense_BF).flatten().scatter(0, largest, 1.0).view_as(dense_BF)
    return dense_BF * torch.zeros_like(dense_BF).scatter(1, dense_BF.topk(5, dim=1).indices, 1.0)
