"""What a process of `tests.distributed.test_parts` does: single operations on its part of the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import KroneckerEncoder, KroneckerEncoderConfig, Ranked
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.distributed import gradients
from kronsae.distributed.heads import HeadSplit, largest_of_batch
from kronsae.distributed.launch import team
from kronsae.distributed.shares import TokenShares
from kronsae.kernels import Choice, RowGradients, Term, use

F, D, TOKENS = 20, 6, 12
TIED = SAEConfig(
    d_in=4, encoder=KroneckerEncoderConfig(num_heads=8, d_base=2, d_extension=2), sparsifier=TopKConfig(k=5)
)


def terms(dtype: torch.dtype = torch.float64) -> tuple[Term, Term, Term]:
    """Return three backward passes of one weight; the first two share their vectors."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, TOKENS, D, generator=generator, dtype=dtype)
    shapes = ((3, x), (2, x), (4, y))
    first, second, third = (
        Term(
            torch.randn(TOKENS, rows, generator=generator, dtype=dtype),
            torch.randint(F, (TOKENS, rows), generator=generator),
            of,
        )
        for rows, of in shapes
    )
    return first, second, third


def dense_of(some: tuple[Term, ...]) -> Tensor:
    """Return the gradient of the terms, summed by hand."""
    out = torch.zeros(F, D, dtype=torch.float64)
    for term in some:
        for weights_R, rows_R, x_D in zip(term.weights_BR, term.rows_BR, term.x_BD, strict=True):
            out.index_add_(0, rows_R, weights_R[:, None] * x_D)
    return out


def sum_gradients(gathered: bool) -> dict[str, Any]:
    """Return the sums of gradients of which each process has some tokens, and one has a weight without tokens."""
    with team() as processes:
        assert processes is not None
        me, size = processes.data.me, processes.data.size
        bounds = [0, 5, 5, TOKENS] if size == 3 else [0, 5, TOKENS]  # the second of three has no token
        own = slice(bounds[me], bounds[me + 1])
        weight, bias, only_first, unused = (
            nn.Parameter(torch.zeros(*shape, dtype=torch.float64)) for shape in ((F, D), (F,), (3,), (2,))
        )
        rows = RowGradients()
        cut: dict[int, Tensor] = {}
        for term in terms():
            x_BD = cut.setdefault(term.x_BD.data_ptr(), term.x_BD[own].clone())
            rows.add(weight, Term(term.weights_BR[own], term.rows_BR[own], x_BD))
        bias.grad = torch.arange(F, dtype=torch.float64) * (me + 1)
        if me == 0:
            only_first.grad = torch.ones(3, dtype=torch.float64)
        gradients.traffic_of_sum = lambda parameter: 10**9 if gathered else 0
        sent = rows.terms(weight)
        gradients.add_gradients(processes.data, [weight, bias, only_first, unused], rows)
        kept = len(rows.terms(weight))
        rows.materialize()
        found = {"weight": weight, "bias": bias, "only_first": only_first}
        assert unused.grad is None
        return {name: p.grad for name, p in found.items()} | {"sent": len(sent), "kept": kept}


def tied_sae() -> tuple[KroneckerEncoder, Tensor]:
    """Return an encoder and activations of small whole numbers, so that most products are equal to others."""
    generator = torch.Generator().manual_seed(0)
    encoder = TIED.build().encoder
    assert isinstance(encoder, KroneckerEncoder)
    with torch.no_grad():
        encoder.weight.copy_(torch.randint(0, 2, encoder.weight.shape, generator=generator))
    return encoder, torch.randint(0, 3, (50, 4), generator=generator).float()


def choose_among_ties() -> list[Tensor]:
    """Return the latents chosen from all and from some, whose encoder is divided."""
    with team(2) as processes, use("reference"):
        assert processes is not None
        encoder, x_BD = tied_sae()
        split = HeadSplit(processes.heads, TokenShares(processes.data))
        sae = split.build(TIED, 0)
        sae.encoder.load_state_dict(
            {name: weight.chunk(2)[processes.heads.me] for name, weight in encoder.state_dict().items()}
        )
        chosen = sae.encoder(x_BD).choose(Choice(5), Choice(3, DEAD), Choice(2, DEAD[DEAD < 16]))
        return [active(codes) for codes in chosen]


DEAD = torch.tensor([1, 2, 3, 8, 9, 17, 18, 30, 31])


def active(codes: SparseCodes) -> Tensor:
    """Return which latents are active on which tokens."""
    return codes.to_dense() > 0


def ties_of_batch(total: int) -> Tensor:
    """Return which of the tied entries of a batch are kept; tokens are dealt out in turn."""
    with team() as processes:
        assert processes is not None
        among = TokenShares(processes.data)
        holder_B = torch.arange(6) % processes.size
        among.begin(holder_B)
        own = offer_with_ties(holder_B == processes.rank)
        kept_BK = largest_of_batch(own, total, among)
        return torch.cat(list(among.gather(own.codes.indices[kept_BK])))


def offer_with_ties(own_B: Tensor) -> Ranked:
    """Return entries of which four are 2.0, nine 1.0 and five 0: padding."""
    rank_BK = torch.tensor([[2.0, 1, 1], [0, 1, 0], [1, 2, 1], [1, 0, 0], [1, 2, 1], [2, 0, 1]])
    indices_BK = torch.arange(18).view(6, 3)
    return Ranked(SparseCodes(rank_BK[own_B], indices_BK[own_B], 18), rank_BK[own_B])
