"""Sums of gradients over the shares of a batch: dense, or as the lists of which they consist.

The weight gradient of a decoder or an encoder is a sum of few terms ``sum_b sum_r w[b, r] x[b]`` per row
(`kronsae.kernels.rows`). To add up the shares of N processes in its dense form, a ring all-reduce sends
``2 (N - 1) / N * 4 P D`` bytes from each process. To gather the terms instead, it sends ``(N - 1) / N`` times the bytes
of all terms: ``B (8 R + 4 D)`` for each backward pass on B tokens with R rows a token. Each weight takes the smaller
one; everything else is summed in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kronsae.distributed.team import Group
from kronsae.kernels import RowGradients, Term

MAX_TERMS = 8
"""Terms of one weight that are gathered; more, as an unrolled pursuit has, are summed in the dense form."""


class Layout(NamedTuple):
    """Sizes of the terms of one weight in one process, in the order in which they are sent; `dense`: it has `.grad`."""

    dense: bool
    terms: int
    shapes: tuple[tuple[int, int], ...]  # tokens and rows a token of each term

    def bytes(self, width: int, element: int) -> int:
        """Bytes of the terms: weights, row numbers of 4 bytes, and vectors."""
        return sum(tokens * (rows * (element + 4) + width * element) for tokens, rows in self.shapes)


def add_gradients(group: Group, parameters: Sequence[Tensor], rows: RowGradients) -> None:
    """Replace gradients by their sums over the group; see `kronsae.core.shares.Shares.add_gradients`."""
    if group.size == 1:
        return
    own = {parameter: joined_terms(rows.terms(parameter)) for parameter in parameters}
    layouts = _exchange_layouts(group, parameters, own)
    dense: list[Tensor] = []
    for number, parameter in enumerate(parameters):
        of_all = [layout[number] for layout in layouts]
        if not any(layout.dense or layout.terms for layout in of_all):
            continue  # nobody has a gradient, as in a single process
        sparse = not any(layout.dense or layout.terms > MAX_TERMS for layout in of_all)
        if sparse and traffic_of_terms(of_all, parameter) < traffic_of_sum(parameter):
            rows.replace(parameter, _gather(group, own[parameter], of_all, parameter))
        else:
            rows.materialize_one(parameter)
            if parameter.grad is None:  # this process had no token for it
                parameter.grad = torch.zeros_like(parameter)
            dense.append(parameter)
    for kind in dict.fromkeys(parameter.grad.dtype for parameter in dense if parameter.grad is not None):
        _sum_dense(group, [p.grad for p in dense if p.grad is not None and p.grad.dtype == kind])


def traffic_of_sum(parameter: Tensor) -> int:
    """Bytes that a ring all-reduce of the dense gradient sends, times ``N / (N - 1)``."""
    return 2 * parameter.numel() * parameter.element_size()


def traffic_of_terms(of_all: Sequence[Layout], parameter: Tensor) -> int:
    """Bytes that gathering the terms sends, times ``N / (N - 1)``; every process sends as much as the largest."""
    return len(of_all) * max(layout.bytes(parameter.shape[-1], parameter.element_size()) for layout in of_all)


def joined_terms(terms: Sequence[Term]) -> list[Term]:
    """Return the same gradient with one term for all those that share their vectors, which are then sent once."""
    by_vectors: dict[tuple[int, torch.Size], list[Term]] = {}
    for term in terms:
        by_vectors.setdefault((term.x_BD.data_ptr(), term.x_BD.shape), []).append(term)
    return [
        Term(torch.cat([t.weights_BR for t in same], 1), torch.cat([t.rows_BR for t in same], 1), same[0].x_BD)
        for same in by_vectors.values()
    ]


def _exchange_layouts(group: Group, parameters: Sequence[Tensor], own: dict[Tensor, list[Term]]) -> list[list[Layout]]:
    """Return the layouts of all parameters in each process."""
    table = torch.zeros(len(parameters), 2 + 2 * MAX_TERMS, dtype=torch.int64)
    for line, parameter in zip(table, parameters, strict=True):
        line[0], line[1] = int(parameter.grad is not None), len(own[parameter])
        for place, term in enumerate(own[parameter][:MAX_TERMS]):
            line[2 + 2 * place : 4 + 2 * place] = torch.tensor(term.weights_BR.shape)
    tables = group.gather(table)  # on the CPU: what is known of shapes need not wait for the device
    return [[_layout(line) for line in one.tolist()] for one in tables]


def _layout(line: list[int]) -> Layout:
    shapes = [(line[2 + 2 * place], line[3 + 2 * place]) for place in range(min(line[1], MAX_TERMS))]
    return Layout(bool(line[0]), line[1], tuple(shapes))


def _gather(group: Group, own: Sequence[Term], of_all: Sequence[Layout], parameter: Tensor) -> list[Term]:
    """Return the terms of all processes."""
    width = parameter.shape[-1]
    entries = [sum(tokens * rows for tokens, rows in layout.shapes) for layout in of_all]
    vectors = [sum(tokens for tokens, _ in layout.shapes) for layout in of_all]
    empty = parameter.new_zeros(0)
    weights = group.gather_rows(torch.cat([empty, *(term.weights_BR.flatten() for term in own)]), entries)
    numbers = torch.cat([empty.int(), *(term.rows_BR.flatten().int() for term in own)])
    places = group.gather_rows(numbers, entries)
    x = group.gather_rows(torch.cat([empty.view(0, width), *(term.x_BD for term in own)]), vectors)
    found = []
    for layout, *flat, vectors_ND in zip(of_all, weights, places, x, strict=True):
        sizes = [tokens * rows for tokens, rows in layout.shapes]
        parts = zip(*(one.split(sizes) for one in flat), vectors_ND.split([b for b, _ in layout.shapes]), strict=True)
        for shape, (w, r, x_BD) in zip(layout.shapes, parts, strict=True):
            found.append(Term(w.view(shape), r.long().view(shape), x_BD))
    return found


def _sum_dense(group: Group, gradients: Sequence[Tensor]) -> None:
    """Replace gradients of one dtype by their sums, sent in one piece."""
    summed = group.sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
