"""Train SAEs on plain tensors, without a language model or a run folder.

python examples/plain_tensors.py
"""

import torch

import kronsae as ks
from kronsae.data.buffer import PLAIN, TensorStream
from kronsae.training.config import LoopConfig
from kronsae.training.member import Member
from kronsae.training.trainer import fit

# The true features are ANDs: each of 8 groups has 2 bases and 4 extensions, and each token has two active pairs. The
# direction of a pair is the sum of its base's and its extension's direction. (With independent directions per pair the
# latents of a head have nothing in common, and the dense encoder is better.)
torch.manual_seed(0)
groups, bases, extensions, d_in, tokens = 8, 2, 4, 32, 20_000
base_directions, extension_directions = torch.randn(groups, bases, 1, d_in), torch.randn(groups, 1, extensions, d_in)
directions = torch.nn.functional.normalize((base_directions + extension_directions).reshape(-1, d_in), dim=1)
active = torch.stack([torch.randperm(groups)[:2] for _ in range(tokens)])
cell = active * bases * extensions + torch.randint(bases * extensions, active.shape)
x = (directions[cell] * torch.rand(tokens, 2, 1).add(0.5)).sum(1)

loop = LoopConfig(tokens=400_000, batch_tokens=1000, log_every=100)
members = [
    Member(config, d_in, hook=PLAIN, steps=loop.steps)
    for config in (
        ks.topk(d_sae=64, k=2, lr=3e-3, dead_after_tokens=20_000),
        ks.kron(num_heads=8, d_base=2, d_extension=4, k=2, lr=3e-3, dead_after_tokens=20_000),
    )
]
fit(members, TensorStream(x, batch_size=loop.batch_tokens, seed=0), loop)

for member in members:
    sae = member.finished_sae()
    codes = sae.encode(x)
    x_hat = sae.decode(codes)
    found = (sae.W_dec @ directions.T).max(0).values.mean()
    print(
        f"{member.name}: explained variance {ks.explained_variance(x, x_hat):.3f}, l0 {codes.l0():.2f}, "
        f"mean cosine between true directions and nearest latents {found:.3f}"
    )
