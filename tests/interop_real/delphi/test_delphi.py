"""delphi's own cache of the same SAE and tokens, and its loader on ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from delphi.config import CacheConfig, ConstructorConfig, SamplerConfig
from delphi.latents import LatentCache, LatentDataset
from safetensors.numpy import load_file
from torch import Tensor

from kronsae.publishing.delphi_cache import export_delphi
from kronsae.runs.loaded import LoadedRun
from kronsae.runs.run import Run

Record = Callable[..., None]
HOOK = "gpt_neox.layers.2"
SPLITS = 3


@pytest.mark.parametrize("name", ["topk", "kron"])
def test_our_cache_is_the_one_that_delphi_makes(name: str, finished_run: Run, tmp_path: Path, record: Record) -> None:
    folder = export_delphi(finished_run, tmp_path / "ours", [name], tokens=200, splits=SPLITS).folders[name] / HOOK
    ours = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    tokens = torch.from_numpy(next(iter(ours.values()))["tokens"])
    loaded = LoadedRun(finished_run)

    def encode(x: Tensor) -> Tensor:
        dense = loaded.saes[name].encode(x).to_dense()
        dense[:, 0] = 0  # bos, on which our SAEs are not trained
        return dense

    cache = LatentCache(loaded.language_model.model, {HOOK: encode}, batch_size=1)
    cache.run(tokens.numel(), tokens)
    cache.save_splits(SPLITS, tmp_path / "theirs")
    config = CacheConfig(cache_ctx_len=tokens.shape[1], n_tokens=tokens.numel(), n_splits=SPLITS)
    cache.save_config(tmp_path / "theirs", config, "tiny")
    theirs = {path.name: load_file(path) for path in (tmp_path / "theirs" / HOOK).glob("*.safetensors")}
    assert ours.keys() == theirs.keys()
    difference = 0.0
    for file, split in theirs.items():
        assert (ours[file]["locations"] == split["locations"]).all()
        assert ours[file]["locations"].dtype == split["locations"].dtype
        assert (ours[file]["tokens"] == split["tokens"]).all()
        assert ours[file]["activations"].dtype == split["activations"].dtype
        gap = abs(ours[file]["activations"].astype(float) - split["activations"].astype(float))
        difference = max(difference, float(gap.max()))
    assert difference < 1e-3
    record("files of its LatentCache", format=f"delphi cache, {name}", direction="write", package="eai-delphi",
           difference=difference, tolerance=1e-3)  # fmt: skip


def test_its_loader_reads_our_cache(finished_run: Run, tmp_path: Path, record: Record) -> None:
    folder = export_delphi(finished_run, tmp_path / "ours", ["kron"], tokens=400, splits=SPLITS).folders["kron"]
    sampler = SamplerConfig(n_examples_train=2, n_examples_test=2, n_quantiles=1)
    examples = ConstructorConfig(example_ctx_len=16, min_examples=4, n_non_activating=2)
    dataset: Any = LatentDataset(folder, sampler, examples)
    found = list(dataset)
    assert found
    for latent in found:
        assert latent.latent.module_name == HOOK
        assert float(latent.max_activation) > 0
        assert len(latent.train) == 2
        assert all(isinstance(text, str) for text in latent.train[0].str_tokens)
    record("LatentDataset", format="delphi cache, kron", direction="use", package="eai-delphi")
