"""Functions of SAELens work on our SAEs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from datasets import Dataset
from sae_lens.evals import EvalConfig, get_eval_everything_config, run_evals
from sae_lens.synthetic import (
    FeatureDictionary,
    FoldedNormalMagnitudeConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
)
from sae_lens.training.activation_scaler import ActivationScaler
from tests.interop.test_saelens_export import exportable
from tests.interop_real.saelens.lens import D_IN, TOLERANCE
from tests.tiny_models import make_tokenizer
from tests.tiny_runs import texts
from transformer_lens import HookedTransformerConfig
from transformers import AutoTokenizer

from kronsae.interop import saelens_export

KRON = "kron num_heads=6 d_base=2 d_extension=4 k=5"
SPECS = [KRON, "batch_topk num_heads=6 d_base=2 d_extension=4 k=5", "topk d_sae=48 k=5"]


def exported(spec: str, folder: Path, **metadata: Any) -> Any:
    """Export an SAE of a specification and open it with SAELens."""
    saelens_export.export((exportable(spec),), folder)
    sae = sae_lens.SAE.load_from_disk(folder)
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    return sae


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny transformer of TransformerLens with room for SAEs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer("gpt_neox").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = HookedTransformerConfig(
        n_layers=2, d_model=D_IN, n_ctx=32, d_head=4, n_heads=3, d_mlp=24, act_fn="gelu", d_vocab=len(tokenizer), seed=0
    )
    return sae_lens.HookedSAETransformer(config, tokenizer=tokenizer)


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_a_transformer_runs_with_our_sae(spec: str, model: Any, tmp_path: Path, record: Callable[..., None]) -> None:
    sae = exported(spec, tmp_path / "sae", hook_name="blocks.1.hook_resid_post")
    tokens = torch.randint(5, 40, (3, 16))
    plain = model(tokens)
    with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    assert torch.allclose(with_error, plain, atol=1e-4)
    replaced, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    assert not torch.allclose(replaced, plain, atol=1e-3)
    acts = cache["blocks.1.hook_resid_post.hook_sae_acts_post"]
    x = cache["blocks.1.hook_resid_post.hook_sae_input"]
    ours = exportable(spec).sae
    largest = float((ours.encode(x).to_dense() - acts).abs().max())
    assert largest <= 1e-5
    record(
        "HookedSAETransformer",
        format=f"SAELens {sae.cfg.architecture()}",
        direction="use",
        package="sae-lens",
        difference=largest,
        tolerance=1e-5,
    )


@pytest.mark.parametrize("spec", [KRON, "kron num_heads=6 d_base=2 d_extension=4 k=5 read=a write=b"])
@torch.no_grad()
def test_a_transcoder_replaces_an_mlp(spec: str, model: Any, tmp_path: Path, record: Callable[..., None]) -> None:
    """The model goes on with what our SAE makes of the MLP's input."""
    read, written = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
    sae = exported(spec, tmp_path / "sae", hook_name=read, hook_name_out=written)
    tokens = torch.randint(5, 40, (3, 16))
    plain, before = model.run_with_cache(tokens)
    replaced, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    ours = exportable(spec).sae
    expected = model.run_with_hooks(tokens, fwd_hooks=[(written, lambda _output, hook: ours(before[read]))])
    largest = float((replaced - expected).abs().max())
    assert largest <= TOLERANCE
    assert float((replaced - plain).abs().max()) > 1e-3
    acts = [key for key in cache if key.endswith("hook_sae_acts_post")]
    assert acts == [f"{written}.hook_sae_acts_post"]
    assert torch.equal(cache[acts[0]] != 0, ours.encode(before[read]).to_dense() != 0)
    record(
        "HookedSAETransformer: in place of an MLP",
        format=f"SAELens {sae.cfg.architecture()}",
        direction="use",
        package="sae-lens",
        difference=largest,
        tolerance=TOLERANCE,
    )


@pytest.mark.parametrize("spec", SPECS)
def test_the_evaluation_of_sae_lens_works(spec: str, model: Any, tmp_path: Path, record: Callable[..., None]) -> None:
    sae = exported(spec, tmp_path / "sae", hook_name="blocks.1.hook_resid_post")
    store = sae_lens.ActivationsStore(
        model,
        Dataset.from_dict({"text": texts(200)}),
        streaming=False,
        hook_name="blocks.1.hook_resid_post",
        hook_head_index=None,
        context_size=16,
        d_in=D_IN,
        n_batches_in_buffer=16,
        total_training_tokens=10_000,
        store_batch_size_prompts=4,
        train_batch_size_tokens=64,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )
    settings = get_eval_everything_config(4, 2, 2)
    if spec != SPECS[2]:
        only = EvalConfig(compute_featurewise_weight_based_metrics=True)
        with pytest.raises(AttributeError, match="its encoder is factorised"):
            run_evals(sae, store, model, ActivationScaler(), only)
        settings.compute_featurewise_weight_based_metrics = False
    metrics, _ = run_evals(sae, store, model, ActivationScaler(), settings)
    assert metrics["sparsity"]["l0"] > 0
    assert "ce_loss_score" in metrics["model_performance_preservation"]
    record("run_evals", format=f"SAELens {sae.cfg.architecture()}", direction="use", package="sae-lens")


def test_the_synthetic_benchmark_of_sae_lens_works(tmp_path: Path, record: Callable[..., None]) -> None:
    sae = exported(KRON, tmp_path / "sae")
    directions = FeatureDictionary(num_features=32, hidden_dim=D_IN, seed=1)
    synthetic = SyntheticModel(
        SyntheticModelConfig(
            num_features=32,
            hidden_dim=D_IN,
            firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=0.05),
            std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            seed=1,
        ),
        feature_dict=directions,
    )
    found = eval_sae_on_synthetic_data(sae, directions, synthetic.activation_generator, num_samples=500, batch_size=100)
    assert 0 < found.sae_l0 <= 5
    record("eval_sae_on_synthetic_data", format="SAELens kronsae_topk", direction="use", package="sae-lens")
