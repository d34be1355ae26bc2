"""We read what dictionary_learning saves, as its own ``load_dictionary`` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dictionary_learning import dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.utils import load_dictionary
from torch import Tensor

from kronsae.core.sae import SAE
from kronsae.interop import formats

D_IN, D_SAE, K, TOLERANCE = 16, 40, 5, 1e-5

CLASSES: dict[str, Callable[[], Any]] = {
    "AutoEncoder": lambda: dictionary.AutoEncoder(D_IN, D_SAE),
    "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D_IN, D_SAE),
    "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D_IN, D_SAE),
    "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D_IN, D_SAE),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D_IN, D_SAE, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D_IN, D_SAE, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [8, D_SAE - 8]),
}


def inputs() -> Tensor:
    return torch.randn(200, D_IN, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def difference(ours: SAE, theirs: Any, x: Tensor) -> float:
    """Return the largest difference of latents and reconstructions."""
    acts, codes = theirs.encode(x), ours.encode(x)
    pairs = ((codes.to_dense(), acts), (ours.decode(codes), theirs.decode(acts)))
    return max(float((one - other).abs().max()) for one, other in pairs)


def save(theirs: Any, folder: Path, trainer: dict[str, Any]) -> Path:
    """Save as ``trainSAE`` of the package does when a training ends."""
    folder.mkdir()
    torch.save({name: tensor.cpu() for name, tensor in theirs.state_dict().items()}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_what_it_saved_is_read(name: str, tmp_path: Path, record: Callable[..., None]) -> None:
    theirs = CLASSES[name]()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            theirs.threshold.fill_(0.8)
    folder = save(theirs, tmp_path / "ae", {"dict_class": name} | ({"k": K} if "TopK" in name else {}))
    loaded, _ = load_dictionary(str(folder), "cpu")
    found = difference(formats.read(folder).sae, loaded, inputs())
    assert found <= TOLERANCE
    record(
        "latents and reconstruction of a saved SAE",
        format=f"dictionary_learning {name}",
        direction="read",
        package="dictionary-learning",
        difference=found,
        tolerance=TOLERANCE,
    )


def test_what_it_trained_is_read(tmp_path: Path, record: Callable[..., None]) -> None:
    """Trainers of the package write their own config; thresholds are learned after a few steps."""
    common: dict[str, Any] = {"steps": 20, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 2, "lm_name": "m"}
    common |= {"warmup_steps": 1, "device": "cpu", "submodule_name": "resid_post_layer_2", "seed": 0}
    topk = common | {"k": K, "threshold_start_step": 3}
    trainers = {
        "AutoEncoderTopK": TopKTrainer(**topk),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKTrainer(**topk, group_fractions=[0.25, 0.75]),
        "JumpReluAutoEncoder": JumpReluTrainer(**common, sparsity_warmup_steps=2),
    }
    for name, trainer in trainers.items():
        generator = torch.Generator().manual_seed(1)
        for step in range(20):
            trainer.update(step, torch.randn(64, D_IN, generator=generator))
        folder = save(trainer.ae, tmp_path / name, trainer.config)
        read = formats.read(folder)
        assert (read.model, read.hook_read) == ("m", "layers.2")
        found = difference(read.sae, load_dictionary(str(folder), "cpu")[0], inputs())
        assert found <= TOLERANCE
        record(
            "latents and reconstruction of a trained SAE",
            format=f"dictionary_learning {name}",
            direction="read",
            package="dictionary-learning",
            difference=found,
            tolerance=TOLERANCE,
        )
