"""Codes that are kept: encoded in parts, put together, a few latents as columns."""

from __future__ import annotations

import torch

from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import KroneckerEncoderConfig
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.eval.example_codes import columns, concatenated, encode_rows, rows_of


def test_parts_give_the_codes_of_the_whole() -> None:
    shape = KroneckerEncoderConfig(num_heads=4, d_base=2, d_extension=4)
    sae = SAEConfig(d_in=6, encoder=shape, sparsifier=TopKConfig(k=3)).build()
    x = torch.randn(11, 6)
    whole = sae.encode(x).to_dense()
    torch.testing.assert_close(encode_rows(sae, x, rows=4).to_dense(), whole)
    torch.testing.assert_close(columns(encode_rows(sae, x), [7, 0, 31]), whole[:, [7, 0, 31]].detach())


def test_codes_of_different_widths_are_filled_up() -> None:
    narrow = SparseCodes(torch.tensor([[2.0]]), torch.tensor([[1]]), 4)
    wide = SparseCodes(torch.tensor([[1.0, 3.0]]), torch.tensor([[0, 3]]), 4)
    both = concatenated([narrow, wide], 4)
    assert both.to_dense().tolist() == [[0.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 3.0]]
    assert rows_of(both, torch.tensor([False, True])).to_dense().tolist() == [[1.0, 0.0, 0.0, 3.0]]
    assert len(concatenated([], 4).values) == 0


def test_padding_is_no_activation() -> None:
    codes = SparseCodes(torch.tensor([[0.0, 5.0]]), torch.tensor([[2, 2]]), 3)
    assert columns(codes, [2]).tolist() == [[5.0]]
