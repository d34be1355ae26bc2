"""Write your own encoder in 30 lines: a low-rank one, ``relu(U (V x) + b)``, trained beside TopK on the bundled model.

python examples/own_encoder.py
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import kronsae as ks
from kronsae.core.encoders import DenseLatents


# --- the encoder ------------------------------------------------------------------------------------------------------
@ks.register_encoder
@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    kind: ClassVar[str] = "low_rank"
    block: ClassVar[int] = 1
    d_sae: int
    rank: int

    @property
    def latents_per_token(self):
        return self.d_sae

    def build(self, d_in):
        return LowRank(self, d_in)

    def multiply_adds(self, d_in):
        return self.rank * (d_in + self.d_sae)


class LowRank(nn.Module):
    def __init__(self, config, d_in):
        super().__init__()
        self.config, self.d_in, self.d_sae = config, d_in, config.d_sae
        self.V = nn.Parameter(torch.empty(config.rank, d_in))
        self.U = nn.Parameter(torch.empty(config.d_sae, config.rank))
        self.bias = nn.Parameter(torch.zeros(config.d_sae))

    def forward(self, x):  # lazy latents: only those that the sparsifier selects get a gradient
        return DenseLatents(x @ self.V.T, self.U, self.bias)

    @torch.no_grad()
    def initialize(self, generator):
        self.V.copy_(torch.randn(self.V.shape, generator=generator) / self.d_in**0.5)
        self.U.copy_(torch.randn(self.U.shape, generator=generator) / (4 * self.config.rank) ** 0.5)

    @torch.no_grad()
    def initial_decoder_rows(self):
        return self.U @ self.V

    @torch.no_grad()
    def fold(self, mean, scale, latent_scale):  # for raw x instead of (x - mean) / scale, latents times latent_scale
        self.V.div_(scale)
        self.U.mul_(latent_scale)
        self.bias.mul_(latent_scale).sub_(self.U @ (self.V @ mean))


# ----------------------------------------------------------------------------------------------------------------------
run = ks.train(
    model="bundled",
    text="bundled",
    hook="layers.3",
    tokens=32_768,
    batch_tokens=512,
    buffer_tokens=8192,
    window_pool_tokens=16_384,
    saes=[
        ks.topk(d_sae=512, k=16, lr=4e-3),
        ks.MemberConfig(
            name="low_rank",
            encoder=LowRankConfig(d_sae=512, rank=64),
            sparsifier=ks.TopKConfig(k=16),
            optimizer=ks.OptimizerConfig(lr=4e-3),
        ),
    ],
    eval_tokens=2048,
    out="runs/own_encoder",
)
print(run.compare())  # the same table, report and measurements as for any SAE

sae = ks.load("runs/own_encoder", "low_rank")  # in another process: register the encoder first
x = run.activations(500)
print(f"{sae.config.architecture}: explained variance {ks.explained_variance(x, sae(x)):.3f}")
