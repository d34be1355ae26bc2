"""SAEBench's own functions and evaluations on SAEs of ours and the bundled language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_bench.custom_saes.topk_sae import TopKSAE
from sae_bench.evals.core.main import get_featurewise_weight_based_metrics
from sae_bench.sae_bench_utils.activation_collection import collect_sae_activations, get_feature_activation_sparsity
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from transformer_lens import HookedTransformer

from kronsae import bundled
from kronsae.core import checkpoint
from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.interop.saebench import NoLinearEncoder, SAEBenchConfig, SAEBenchSAE, parents
from kronsae.interop.saebench_job import JOB_FILE, Job, JobSAE
from kronsae.interop.saebench_runner import load_model, run
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError
from kronsae.support.files import write_json

Record = Callable[..., None]
D_IN, D_SAE, K, LAYER = 256, 128, 8, 2
HOOK = f"blocks.{LAYER}.hook_resid_post"
ENCODERS: dict[str, DenseEncoderConfig | KroneckerEncoderConfig] = {
    "dense": DenseEncoderConfig(d_sae=D_SAE),
    "kronecker": KroneckerEncoderConfig(num_heads=16, d_base=2, d_extension=4),
}


def build(name: str) -> SAE:
    sae = SAEConfig(d_in=D_IN, encoder=ENCODERS[name], sparsifier=TopKConfig(k=K)).build(3)
    with torch.no_grad():
        sae.decoder.b_dec.normal_(std=0.1)
        sae.decoder.W_dec.mul_(torch.rand(D_SAE, 1) + 0.5)
    return sae


def adapter_of(sae: SAE) -> SAEBenchSAE:
    about = SAEBenchConfig(
        model_name="bundled", d_in=D_IN, d_sae=D_SAE, hook_layer=LAYER, hook_name=HOOK, architecture=""
    )
    return SAEBenchSAE(sae, about)


def job(folder: Path, names: tuple[str, ...], **changes: Any) -> Path:
    """Write a job for SAEs of ours; return its folder."""
    saes = tuple(
        JobSAE(name=name, folder=str(checkpoint.save(build(name), folder / "saes" / name)), hook=HOOK, layer=LAYER)
        for name in names
    )
    described = Job(saes=saes, model="bundled", location=str(bundled.path()), out=str(folder / "out"), **changes)
    write_json(folder / JOB_FILE, to_dict(described))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HookedTransformer:
    place = JobSAE(name="dense", folder="", hook=HOOK, layer=LAYER)
    return load_model(
        Job(saes=(place,), model="bundled", location=str(bundled.path()), out="out", evals=()),
        tmp_path_factory.mktemp("model"),
    )


def test_a_topk_sae_is_saebenchs_own(record: Record) -> None:
    sae = build("dense")
    sae.decoder.normalize()  # theirs selects by the values of W_enc, which the adapter scales by the norms
    adapter = adapter_of(sae)
    theirs = TopKSAE(D_IN, D_SAE, K, "bundled", LAYER, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        theirs.W_enc.copy_(adapter.W_enc)
        theirs.W_dec.copy_(adapter.W_dec)
        theirs.b_dec.copy_(adapter.b_dec)
        theirs.b_enc.copy_(adapter.b_enc + adapter.b_dec @ adapter.W_enc)  # they subtract b_dec from x
    x = torch.randn(4, 9, D_IN)
    with torch.no_grad():
        difference = max(
            float((adapter.encode(x) - theirs.encode(x)).abs().max()), float((adapter(x) - theirs(x)).abs().max())
        )
    assert difference < 1e-5
    record("latents and reconstruction of its own TopK class", format="SAEBench topk", direction="use",
           package="sae-bench", difference=difference, tolerance=1e-5)  # fmt: skip


@pytest.mark.parametrize("name", list(ENCODERS))
def test_its_checked_functions_take_our_activations(name: str, model: HookedTransformer, record: Record) -> None:
    sae_id, sae, sparsity = load_and_format_sae("ours", adapter_of(build(name)), "cpu")
    assert (sae_id, sparsity) == ("custom_sae", None)
    tokens = model.to_tokens(["def f(x):\n    return x", "import os\nimport sys"])
    acts = collect_sae_activations(tokens, model, sae, 2, LAYER, HOOK)
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    torch.testing.assert_close(acts, sae.encode(cache[HOOK]))
    assert float((acts > 0).float().sum(-1).mean()) == K
    shares = get_feature_activation_sparsity(tokens, model, sae, 2, LAYER, HOOK)
    assert float(shares.sum()) == pytest.approx(K)
    record("activations by its type-checked functions", format=f"SAEBench {name}", direction="use", package="sae-bench")


def test_what_needs_a_linear_encoder_gets_it_or_a_clear_refusal(record: Record) -> None:
    dense, kronecker = adapter_of(build("dense")), adapter_of(build("kronecker"))
    dense.cfg.architecture_str = kronecker.cfg.architecture_str = ""  # type: ignore[attr-defined]
    assert len(get_featurewise_weight_based_metrics(dense)["encoder_norm"]) == D_SAE
    with pytest.raises(NoLinearEncoder, match="W_enc exists only for linear encoders"):
        get_featurewise_weight_based_metrics(kronecker)
    assert parents(kronecker.sae).base_cosine.shape == (D_SAE,)
    record("W_enc refused in words", format="SAEBench kronecker", direction="use", package="sae-bench")


QUICK = {
    "meta_structure": ("meta_structure.train_steps=5", "meta_structure.train_batch_size=32"),
    "sparse_probing_sae_probes": (
        'sparse_probing_sae_probes.dataset_names=["87_glue_cola"]',
        "sparse_probing_sae_probes.ks=[1]",
        "sparse_probing_sae_probes.include_llm_baseline=false",
    ),
    "absorption": (
        "absorption.max_k_value=2",
        "absorption.k_sparse_probe_num_epochs=2",
        "absorption.min_feats_for_eval=1",  # the bundled model cannot spell
        "absorption.min_GT_probe_f1=0.0",
    ),
}


@pytest.mark.parametrize("evaluation", list(QUICK))
def test_an_offline_evaluation_has_results_in_its_schema(evaluation: str, tmp_path: Path, record: Record) -> None:
    rows = run(job(tmp_path, tuple(ENCODERS), evals=(evaluation,), words=260, settings=QUICK[evaluation]))
    assert [row["reason"] for row in rows] == [None] * 2
    for row in rows:
        result = json.loads(Path(row["file"]).read_text())
        assert result["eval_type_id"].startswith(evaluation)
        assert result["sae_cfg_dict"]["hook_name"] == HOOK
        assert result["eval_config"]["random_seed"] == 42
        assert row["metrics"]
        record(f"evaluation {evaluation}", format=f"SAEBench {row['sae']}", direction="use", package="sae-bench")


def test_an_evaluation_is_seeded_whatever_ran_before_it(tmp_path: Path) -> None:
    settings = QUICK["meta_structure"]
    both = run(job(tmp_path / "both", tuple(ENCODERS), evals=("meta_structure",), settings=settings))
    alone = run(job(tmp_path / "alone", ("kronecker",), evals=("meta_structure",), settings=settings))
    score = "decoder_fraction_variance_explained"
    assert alone[0]["metrics"][score] == pytest.approx(both[1]["metrics"][score], rel=1e-4)


def test_a_model_that_cannot_spell_has_no_result_and_says_so(tmp_path: Path) -> None:
    quick = ("absorption.max_k_value=1", "absorption.k_sparse_probe_num_epochs=1")
    (row,) = run(job(tmp_path, ("dense",), evals=("absorption",), words=260, settings=quick))
    assert row["file"] is None
    assert "too few letters have a probe with a sufficient F1 on bundled" in row["reason"]


def test_settings_that_saebench_does_not_know_are_refused(tmp_path: Path) -> None:
    (row,) = run(job(tmp_path, ("dense",), evals=("meta_structure",), settings=("meta_structure.widht_ratio=1",)))
    assert "has no field 'widht_ratio'. Did you mean 'width_ratio'?" in row["reason"]


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'Qwen/Qwen-7B' needs code of its own, and such code is never run"):
        load_model(Job(saes=(), model="Qwen/Qwen-7B", location="Qwen/Qwen-7B", out="out", evals=()), tmp_path)


def test_a_model_that_transformer_lens_cannot_load_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]})
    )
    place = JobSAE(name="dense", folder="", hook=HOOK, layer=LAYER)
    wrong = Job(saes=(place,), model="mamba", location=str(tmp_path / "model"), out="out", evals=())
    with pytest.raises(UserError, match="model: TransformerLens, with which SAEBench runs models, cannot load 'mamba'"):
        load_model(wrong, tmp_path)
