"""SAEDashboard shows KronSAEs that SAELens has loaded, and writes them for Neuronpedia."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.neuronpedia import neuronpedia_runner
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from tests.interop.test_saelens_export import D_IN, exportable
from tests.tiny_models import make_tokenizer
from tests.tiny_runs import write_jsonl
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformers import AutoTokenizer

import kronsae.interop.saelens  # noqa: F401 (SAELens knows our architectures after this)
from kronsae.interop import saelens_export

SPECS = ["kron num_heads=6 d_base=2 d_extension=4 k=5", "batch_topk num_heads=6 d_base=2 d_extension=4 k=5"]
HOOK = "blocks.1.hook_resid_post"
ROUNDING = 6e-5
"""Of activations in a dashboard, which have four decimals, beside the 1e-5 of float32."""

CONTEXT = 16


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


def export(spec: str, folder: Path) -> Path:
    """Export an SAE of a specification, and let its files name the hook of the tiny model."""
    saelens_export.export((exportable(spec),), folder)
    config = json.loads((folder / "cfg.json").read_text("utf-8"))
    config["metadata"] |= {"hook_name": HOOK, "prepend_bos": False}
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@torch.no_grad()
def latents(spec: str, model: Any, tokens: Tensor) -> Tensor:
    """Return the latents ``[sequences, positions, d_sae]`` of our SAE."""
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    return exportable(spec).sae.encode(cache[HOOK]).to_dense()


@pytest.mark.parametrize("spec", SPECS)
def test_a_dashboard(spec: str, model: Any, tmp_path: Path, record: Callable[..., None]) -> None:
    """The latents that it shows are ours; the page is written."""
    sae = sae_lens.SAE.load_from_disk(export(spec, tmp_path / "sae"))
    tokens = torch.randint(5, 40, (64, CONTEXT), generator=torch.Generator().manual_seed(1))
    ours = latents(spec, model, tokens)
    features = ours.amax((0, 1)).topk(6).indices.tolist()
    config = SaeVisConfig(hook_point=HOOK, features=features, minibatch_size_features=3, minibatch_size_tokens=20)
    data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    largest = 0.0
    for feature in features:
        shown = data.feature_data_dict[feature]
        found = ours[..., feature]
        share = float((found > 0).float().mean())
        assert shown.acts_histogram_data.title == f"ACTIVATIONS<br>DENSITY = {share:.3%}"
        for sequence in shown.sequence_data.seq_group_data[0].seq_data:  # the largest activations, in windows
            ids, acts = torch.tensor(sequence.token_ids), torch.tensor(sequence.feat_acts)
            places = (tokens[sequence.original_index].unfold(0, len(ids), 1) == ids).all(1)
            candidates = found[sequence.original_index].unfold(0, len(ids), 1)[places]
            assert len(candidates) >= 1
            largest = max(largest, float((candidates - acts).abs().amax(1).min()))
        most = shown.sequence_data.seq_group_data[0].max_feat_act  # of windows with 6 tokens before and 5 after
        assert float(found[:, 6:-5].max()) - ROUNDING <= most <= float(found.max()) + ROUNDING
    assert largest <= ROUNDING
    save_feature_centric_vis(sae_vis_data=data, filename=tmp_path / "page.html")
    assert "DENSITY" in (tmp_path / "page.html").read_text("utf-8")
    record(
        "SaeVisRunner: activations and page",
        format=f"SAEDashboard {sae.cfg.architecture()}",
        direction="use",
        package="sae-dashboard",
        difference=largest,
        tolerance=ROUNDING,
    )


@pytest.mark.parametrize("spec", SPECS)
def test_files_for_neuronpedia(
    spec: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    """Its runner, with the tiny model in place of one that it would download."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    write_jsonl(tmp_path / "text" / "train.jsonl", 400)
    hooked = neuronpedia_runner.HookedSAETransformer
    monkeypatch.setattr(hooked, "from_pretrained", staticmethod(lambda **_: model))
    runner = neuronpedia_runner.NeuronpediaRunner(
        NeuronpediaRunnerConfig(
            sae_set="kron",
            sae_path=str(export(spec, tmp_path / "sae")),
            outputs_dir=str(tmp_path / "out"),
            from_local_sae=True,
            huggingface_dataset_path=str(tmp_path / "text"),
            n_prompts_total=32,
            n_tokens_in_prompt=CONTEXT,
            n_prompts_in_forward_pass=16,
            n_features_at_a_time=16,
        )
    )
    runner.run()
    (written,) = (tmp_path / "out").rglob("batch-0.json")
    tokens = torch.load(next((tmp_path / "out").rglob("tokens_*.pt")), weights_only=True)
    ours = latents(spec, model, tokens)
    features = json.loads(written.read_text("utf-8"))["features"]
    assert [one["feature_index"] for one in features] == list(range(16))
    largest = 0.0
    for one in features:
        most = max((max(shown["values"]) for shown in one["activations"]), default=0.0)
        largest = max(largest, abs(most - float(ours[..., one["feature_index"]].max())))
    assert largest <= 1e-3  # it writes three decimals
    record(
        "NeuronpediaRunner: batch files",
        format=f"SAEDashboard {runner.sae.cfg.architecture()}",
        direction="use",
        package="sae-dashboard",
        difference=largest,
        tolerance=1e-3,
    )
