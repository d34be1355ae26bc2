"""SAELens' own runner trains our architectures, from its own command line, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from tests.interop_real.saelens.lens import TOLERANCE, difference
from tests.tiny_models import make_tiny_model
from tests.tiny_runs import write_jsonl

import kronsae.interop.saelens as ours
from kronsae.core.metrics import explained_variance
from kronsae.core.sae import SAE
from kronsae.interop import formats

TOKENS, BATCH = 16_384, 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the GPT-NeoX family and its tokenizer."""
    return make_tiny_model("gpt_neox", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set of short documents."""
    folder = tmp_path_factory.mktemp("text")
    write_jsonl(folder / "train.jsonl", 400)
    return folder


def command(architecture: str, model: Path, text: Path, out: Path, d_in: int) -> list[str]:
    """Return the arguments of SAELens' training runner."""
    settings: dict[str, Any] = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": 64,
        "k": 4,
        "model_class_name": "AutoModelForCausalLM",
        "model_name": model,
        "hook_name": "gpt_neox.layers.2",
        "dataset_path": text,
        "is_dataset_tokenized": False,
        "streaming": False,
        "context_size": 16,
        "prepend_bos": False,
        "n_batches_in_buffer": 64,
        "store_batch_size_prompts": 4,
        "train_batch_size_tokens": BATCH,
        "training_tokens": TOKENS,
        "lr": 3e-3,
        "dead_feature_window": 20,
        "log_to_wandb": False,
        "checkpoint_path": out / "checkpoints",
        "n_checkpoints": 1,
        "output_path": out / "sae",
        "device": "cpu",
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("architecture", ["kronsae_topk", "kronsae_batchtopk", "kronsae_matryoshka_batchtopk"])
def test_the_command_line_of_sae_lens_trains_a_kronsae(
    architecture: str, model: Path, text: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    d_in = json.loads((model / "config.json").read_text("utf-8"))["hidden_size"]
    words = command(architecture, model, text, tmp_path, d_in)
    torch.manual_seed(0)
    ours.main(words)
    found = formats.read(tmp_path / "sae")
    assert found.hook_read == "gpt_neox.layers.2"
    sae = found.sae
    x = activations(model, text)
    before, after = ev(shape_like(sae), x), ev(sae, x)
    assert after > before + 0.1
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)
    l0 = float(sae.encode(x).l0())
    assert l0 == pytest.approx(4, rel=0 if architecture == "kronsae_topk" else 0.5)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    largest = difference(sae, theirs, x)
    checkpoint = next((tmp_path / "checkpoints").glob("*/*/cfg.json")).parent
    assert bool(formats.read(checkpoint).sae(x).isfinite().all())
    assert largest <= TOLERANCE
    record(
        "trained by SAELens' runner from its command line, read by us",
        format=f"SAELens {architecture}",
        direction="train",
        package="sae-lens",
        difference=largest,
        tolerance=TOLERANCE,
    )


@pytest.mark.timeout(1200)  # a process that imports sae-lens
def test_the_module_is_a_command(model: Path, text: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    """``python -m kronsae.interop.saelens`` in a process of its own, which knows our architectures by nothing else."""
    d_in = json.loads((model / "config.json").read_text("utf-8"))["hidden_size"]
    words = command("kronsae_topk", model, text, tmp_path, d_in)
    words[words.index("--training_tokens") + 1] = str(8 * BATCH)
    done = subprocess.run(
        [sys.executable, "-m", "kronsae.interop.saelens", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sae = formats.read(tmp_path / "sae")
    assert sae.architecture == "kronsae_topk"
    assert float(sae.sae.encode(activations(model, text)).l0()) == 4
    done = subprocess.run(
        [sys.executable, "-m", "kronsae.interop.saelens", "--architecture", "kronsae_tpok"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "kronsae_tpok" in done.stderr
    record(
        "`python -m kronsae.interop.saelens` in a process of its own",
        format="SAELens kronsae_topk",
        direction="train",
        package="sae-lens",
    )


def shape_like(sae: SAE) -> SAE:
    """Return an untrained SAE of the same shape."""
    return sae.config.build(seed=3)


@torch.no_grad()
def ev(sae: SAE, x: torch.Tensor) -> float:
    """Return the explained variance."""
    return float(explained_variance(x, sae(x)))


@torch.no_grad()
def activations(model: Path, text: Path) -> torch.Tensor:
    """Return activations of the model at the hook, as transformers computes them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    lines = (text / "train.jsonl").read_text("utf-8").splitlines()[:40]
    ids = tokenizer(" ".join(json.loads(line)["text"] for line in lines))["input_ids"]
    rows = torch.tensor(ids[: 16 * (len(ids) // 16)]).view(-1, 16)
    states: torch.Tensor = lm(rows, output_hidden_states=True).hidden_states[3]
    return states.reshape(-1, lm.config.hidden_size)


@pytest.mark.parametrize("normalize", ["expected_average_only_in", "covariance_whitening"])
def test_normalised_activations_are_folded_when_the_training_ends(
    normalize: str, model: Path, text: Path, tmp_path: Path
) -> None:
    d_in = json.loads((model / "config.json").read_text("utf-8"))["hidden_size"]
    words = command("kronsae_topk", model, text, tmp_path, d_in)
    ours.main([*words, "--normalize_activations", normalize, "--n_batches_for_norm_estimate", "10"])
    sae, x = formats.read(tmp_path / "sae").sae, activations(model, text)
    assert ev(sae, x) > 0.3
