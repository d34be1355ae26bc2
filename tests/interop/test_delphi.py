"""The cache of delphi by its format; tests/interop_real/delphi reads it with delphi itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from kronsae.core.codes import SparseCodes
from kronsae.interop import delphi
from kronsae.interop.delphi import CacheWriter, boundaries
from kronsae.support.errors import UserError

TOKENS = torch.tensor([[5, 6, 7], [8, 9, 10]])
KEEP = torch.tensor([[False, True, True], [False, True, True]])
CODES = SparseCodes(  # of the four kept tokens; the indices within a token are in no order
    torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.0, 1e-6], [0.25, 3.0, 1.5], [0.0, 0.0, 0.0]]),
    torch.tensor([[9, 2, 1], [4, 0, 7], [7, 0, 3], [1, 2, 3]]),
    10,
)


def write(folder: Path, splits: int = 3) -> dict[str, dict[str, np.ndarray]]:
    with CacheWriter(folder, "layers.1", d_sae=10, splits=splits, config={"model_name": "tiny"}) as writer:
        writer.add(TOKENS, KEEP, CODES)
        writer.add(TOKENS + 10, KEEP, CODES)
    assert writer.entries == 12
    return {path.stem: load_file(path) for path in sorted((folder / "layers.1").glob("*.safetensors"))}


def test_boundaries_are_those_of_delphi() -> None:
    assert boundaries(10, 3) == [(0, 2), (3, 5), (6, 9)]
    assert boundaries(8, 1) == [(0, 7)]


def test_every_activation_is_in_its_split_in_delphis_order(tmp_path: Path) -> None:
    found = write(tmp_path)
    assert list(found) == ["0_2", "3_5", "6_9"]
    assert found["0_2"]["locations"].tolist() == [[0, 1, 2], [1, 1, 0], [2, 1, 2], [3, 1, 0]]
    assert found["3_5"]["locations"].tolist() == [[0, 2, 1], [1, 1, 0], [2, 2, 1], [3, 1, 0]]
    assert found["6_9"]["locations"].tolist() == [[0, 1, 3], [1, 1, 1], [2, 1, 3], [3, 1, 1]]
    assert found["0_2"]["activations"].tolist() == [2.0, 3.0, 2.0, 3.0]
    assert found["6_9"]["activations"].tolist() == [0.5, 0.25, 0.5, 0.25]
    for split in found.values():
        assert split["activations"].dtype == np.float16
        assert split["locations"].dtype == np.uint16
        assert split["tokens"].dtype == np.int64
        assert split["tokens"].tolist() == torch.cat([TOKENS, TOKENS + 10]).tolist()


def test_the_dense_activations_can_be_had_back(tmp_path: Path) -> None:
    dense = torch.zeros(4, 3, 10)
    for name, split in write(tmp_path).items():
        rows, positions, latents = split["locations"].astype(np.int64).T
        dense[rows, positions, latents + int(name.split("_")[0])] = torch.from_numpy(split["activations"]).float()
    expected = CODES.to_dense()
    expected[expected <= delphi.LEAST] = 0
    assert torch.equal(dense[:, 1:].reshape(8, 10), expected.repeat(2, 1))
    assert not dense[:, 0].any()  # special tokens


def test_the_config_is_what_delphi_keeps(tmp_path: Path) -> None:
    write(tmp_path)
    about = json.loads((tmp_path / "layers.1" / "config.json").read_text())
    expected = {"model_name": "tiny", "cache_ctx_len": 3, "ctx_len": 3, "n_tokens": 12, "n_splits": 3}
    assert about == expected


def test_a_split_without_activations_is_an_empty_file(tmp_path: Path) -> None:
    found = write(tmp_path, splits=10)
    assert len(found) == 10
    assert found["1_1"]["locations"].shape == (0, 3)
    assert found["1_1"]["tokens"].shape == (4, 3)


def test_many_windows_need_wide_numbers(tmp_path: Path) -> None:
    tokens, keep = torch.zeros(2**16 + 1, 1, dtype=torch.long), torch.zeros(2**16 + 1, 1, dtype=torch.bool)
    keep[-1] = True
    codes = SparseCodes(torch.tensor([[1.0]]), torch.tensor([[3]]), 4)
    with CacheWriter(tmp_path, "m", d_sae=4, splits=1, config={}) as writer:
        writer.add(tokens, keep, codes)
    found = load_file(tmp_path / "m" / "0_3.safetensors")
    assert found["locations"].dtype == np.uint32
    assert found["locations"].tolist() == [[2**16, 0, 3]]


def interrupted(folder: Path) -> None:
    with CacheWriter(folder, "m", d_sae=10, splits=3, config={}) as writer:
        writer.add(TOKENS, KEEP, CODES)
        raise RuntimeError("stopped")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        interrupted(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    large = SparseCodes(CODES.values * 1e5, CODES.indices, 10)
    with (
        pytest.raises(UserError, match="activations must be at most 65504, because delphi keeps them in float16; got"),
        CacheWriter(tmp_path, "m", d_sae=10, splits=3, config={}) as writer,
    ):
        writer.add(TOKENS, KEEP, large)
    assert list(tmp_path.iterdir()) == []


def test_wrong_splits_and_existing_caches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="splits must be at most the 10 latents; got 11"):
        CacheWriter(tmp_path, "m", d_sae=10, splits=11, config={})
    with pytest.raises(UserError, match="splits must be a whole number above 0; got 0"):
        CacheWriter(tmp_path, "m", d_sae=10, splits=0, config={})
    write(tmp_path)
    with pytest.raises(UserError, match=r"out must hold no cache of layers.1 yet; .* exists"):
        CacheWriter(tmp_path, "layers.1", d_sae=10, splits=2, config={})


def test_an_empty_cache_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="must hold at least one window; got none"),
        CacheWriter(tmp_path, "m", d_sae=10, splits=2, config={}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
