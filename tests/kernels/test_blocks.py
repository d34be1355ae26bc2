"""Block sizes: the rule, the table, what a table may hold, and that sizes do not change what is computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.helpers import operation, same_values

from kronsae.kernels import AdamW, blocks, reference
from kronsae.kernels.blocks import DTYPES, KERNELS, Blocks, Key, blocks_for, candidates, default_blocks
from kronsae.kernels.dispatch import refuse
from kronsae.kernels.rows import Term
from kronsae.support.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("KRONSAE_BLOCKS", raising=False)
    monkeypatch.setenv("KRONSAE_CACHE", str(tmp_path))
    blocks._kept.cache_clear()
    yield
    blocks._kept.cache_clear()


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_candidate_can_be_launched_and_kept(kernel: str, tmp_path: Path) -> None:
    for dtype in DTYPES:
        for width in (1, 2, 16, 64, 512, 1024, 2048, 4096, 16384):
            key = Key(kernel, dtype, width)
            found = candidates(key)
            assert found[0] == default_blocks(key)
            assert len(found) == len(set(found))
            for one in found:
                assert one.block <= width
                assert one.block * one.rows <= 32 * one.num_warps * 64 or one.num_warps == 16
    table = tmp_path / "table.json"
    key = Key(kernel, "float32", 1024)
    for one in candidates(key):
        blocks.write_table(table, "a device", {key: one})
        assert blocks.read_table(table) == {"a device": {key: one}}


def test_a_row_that_fits_is_one_tile_of_the_optimiser() -> None:
    assert default_blocks(Key("adamw", "float32", 4096)) == Blocks(4096, 1, 8)
    assert default_blocks(Key("adamw", "float32", 16384)) == Blocks(4096, 1, 8)
    assert default_blocks(Key("adamw", "float32", 64)) == Blocks(64, 1, 1)


def test_the_table_comes_before_the_rule_and_what_is_forced_before_the_table() -> None:
    width = 700  # kept under 1024
    key = Key("adamw", "float32", 1024)
    assert blocks_for("adamw", torch.float32, width, CPU) == default_blocks(key)
    blocks.write_table(blocks.table_path(), "cpu", {key: Blocks(512, 1, 2)})
    blocks.write_table(blocks.table_path(), "another", {key: Blocks(256, 1, 2)})
    assert blocks_for("adamw", torch.float32, width, CPU) == Blocks(512, 1, 2)
    assert blocks_for("adamw", torch.bfloat16, width, CPU) == default_blocks(key)
    assert blocks_for("adamw", torch.float32, 3000, CPU) == default_blocks(Key("adamw", "float32", 4096))
    assert blocks_for("adamw", torch.float32, width, torch.device("meta")) == default_blocks(key)
    with blocks.force({"adamw": Blocks(128)}):
        assert blocks_for("adamw", torch.float32, width, CPU) == Blocks(128)
        assert blocks_for("expand", torch.float32, width, CPU) == default_blocks(Key("expand", "float32", 1024))
    assert set(blocks.read_table(blocks.table_path())) == {"cpu", "another"}


def test_a_table_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "named.json"
    monkeypatch.setenv("KRONSAE_BLOCKS", str(named))
    with pytest.raises(UserError, match=r"KRONSAE_BLOCKS must name a table .*; there is no file '.*named\.json'"):
        blocks_for("adamw", torch.float32, 700, CPU)
    blocks.write_table(named, "cpu", {Key("adamw", "float32", 1024): Blocks(256, 1, 4)})
    assert blocks_for("adamw", torch.float32, 700, CPU) == Blocks(256, 1, 4)


GOOD = {"kernel": "adamw", "dtype": "float32", "width": 1024, "block": 512, "rows": 1, "num_warps": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "adam"}, "must have a kernel among .*; got 'adam'. Did you mean 'adamw'?"),
        ({"dtype": "int8"}, "must have a dtype among float32, bfloat16, float16, float64; got 'int8'"),
        ({"block": 500}, "must have a power of two up to 16,384 as block; got 500"),
        ({"block": True}, "must have a power of two up to 16,384 as block; got True"),
        ({"num_warps": 64}, "must have a power of two up to 32 as num_warps; got 64"),
        ({"width": 0}, "must have a power of two up to 1,048,576 as width; got 0"),
        ({"block": 16384, "rows": 2}, "must have a tile of at most 16,384 elements"),
        ({"kernel": "head_bounds"}, "must have block equal to width, a head; got 512 and 1024"),
        ({"colour": "red"}, "must have the keys kernel, dtype, width, block, rows, num_warps"),
    ],
)
def test_a_bad_entry_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"format": 1, "devices": {"cpu": [GOOD, GOOD | change]}}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"'.*table\.json', entry 1 of 'cpu', {message}") as error:
        blocks.read_table(table)
    assert str(error.value).endswith("Delete it, or measure again: kronsae bench gpu --only tune")


@pytest.mark.parametrize("content", ['{"format": 2, "devices": {}}', "[]", '{"format": 1, "devices": []}', "{"])
def test_a_damaged_table_is_refused(content: str, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"table of block sizes"):
        blocks.read_table(table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_do_not_change_what_the_gpus_kernels_compute(dtype: torch.dtype) -> None:
    """Tiles smaller than a row, a head list and a token's entries: every loop of the kernels runs more than once."""
    reason = refuse("gpu", "adamw", CPU, dtype)
    if reason is not None:
        pytest.skip(reason)
    small = {kernel: Blocks(16, 2, 1) for kernel in KERNELS if kernel != "head_bounds"}
    small["head_bounds"] = Blocks(8, 2, 1)
    weights_BR, rows_BR = torch.randn(5, 3).to(dtype), torch.randint(7, (5, 3))
    matrix_PD, x_BD = torch.randn(7, 37).to(dtype), torch.randn(5, 37).to(dtype)
    pre_BHP = torch.randn(5, 7, 5).to(dtype)
    gradient = reference.group_rows([Term(weights_BR, rows_BR, x_BD)], 7)
    with blocks.force(small):
        got = operation("gpu", "weighted_rows")(weights_BR, rows_BR, matrix_PD)
        same_values(got, reference.weighted_rows(weights_BR.double(), rows_BR, matrix_PD.double()))
        got = operation("gpu", "sampled_products")(x_BD, matrix_PD, rows_BR)
        same_values(got, reference.sampled_products(x_BD.double(), matrix_PD.double(), rows_BR))
        exact = reference.group_rows([Term(weights_BR.double(), rows_BR, x_BD.double())], 7)
        exact_PD = reference.gradient_rows(exact)
        same_values(operation("gpu", "gradient_rows")(gradient), exact_PD)
        squared = operation("gpu", "squared_norm")(gradient)
        torch.testing.assert_close(squared, exact_PD.square().sum(), rtol=1e-6, atol=0)
        chosen = operation("gpu", "kronecker_topk")(pre_BHP, 2, 4).indices_BK
        products_BF = reference.kronecker_products(pre_BHP, 2).flatten(1)
        same_values(products_BF.gather(1, chosen).sort(1).values, products_BF.topk(4).values.sort(1).values)
        for unit_norm, only_touched in ((False, False), (True, False), (True, True)):
            settings = AdamW(
                lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=7,
                unit_norm=unit_norm, only_touched=only_touched,
            )  # fmt: skip
            start = matrix_PD, torch.randn(7, 37).to(dtype), torch.rand(7, 37).to(dtype) + 0.1
            mine, want = [state.clone() for state in start], [state.double() for state in start]
            mine[0][3] = want[0][3] = 0
            operation("gpu", "adamw")(*mine, gradient, settings)
            reference.adamw(want[0], want[1], want[2], exact, settings)
            for state, expected in zip(mine, want, strict=True):
                same_values(state, expected)
