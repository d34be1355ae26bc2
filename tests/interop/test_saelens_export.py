"""Folders that SAELens reads, read back by our own reader; `tests/interop_real/saelens` reads them with SAELens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kronsae.core.pursuit import Pursuit
from kronsae.core.sae import SAE, SAEConfig
from kronsae.interop import formats, saelens_export
from kronsae.interop.exportable import Exportable
from kronsae.runs.parsing import parse_sae
from kronsae.support.errors import UserError

D_IN = 12
SPECS = {
    "topk d_sae=48 k=5": "topk",
    "batch_topk d_sae=48 k=5": "jumprelu",
    "jumprelu d_sae=48 k=5": "jumprelu",
    "matryoshka d_sae=48 k=5 smallest=12": "topk",
    "topk d_sae=48 k=5 read=a write=b": "topk",
    "batch_topk d_sae=48 k=5 read=a write=b": "jumprelu_transcoder",
    "jumprelu d_sae=48 k=5 read=a write=b skip=true": "jumprelu_skip_transcoder",
    "kron num_heads=6 d_base=2 d_extension=4 k=5": "kronsae_topk",
    "batch_topk num_heads=6 d_base=2 d_extension=4 k=5": "kronsae_jumprelu",
    "matryoshka num_heads=8 d_base=2 d_extension=4 k=5 smallest=16": "kronsae_topk",
    "kron num_heads=6 d_base=2 d_extension=4 k=5 gate=power_mean": "kronsae_topk",
    "kron num_heads=6 d_base=2 d_extension=4 k=5 read=a write=b skip=true": "kronsae_topk_transcoder",
    "jumprelu num_heads=6 d_base=2 d_extension=4 k=5 read=a write=b": "kronsae_jumprelu_transcoder",
}
"""Our specifications, and the architecture that each is written as."""


def finished(spec: str) -> SAE:
    """Return a finished SAE of a specification with random weights."""
    sae = parse_sae(spec).shape(D_IN, "a").build(seed=1).trained()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sae.state_dict().items():
            if "threshold" in name:
                weight.copy_(torch.rand(weight.shape, generator=generator).log())
            elif weight.ndim == 1 or "skip" in name or "bias" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return sae


def exportable(spec: str, sae: SAE | None = None) -> Exportable:
    """Return an SAE of a specification, ready for export."""
    role = "transcoder" if "write=" in spec else ""
    return Exportable(
        name="one",
        sae=finished(spec) if sae is None else sae,
        model="EleutherAI/pythia-70m",
        hooks_read=("layers.3.mlp:input" if role else "layers.3",),
        hooks_written=("layers.3.mlp" if role else "layers.3",),
        context_length=128,
        text="text.jsonl",
        metadata={"trained_as": "x", "tokens": 1000},
    )


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_an_export_is_read_back_with_the_same_latents(spec: str, tmp_path: Path) -> None:
    one = exportable(spec)
    exported = saelens_export.export((one,), tmp_path / "out")
    assert exported.folders == {"one": tmp_path / "out"}
    found = formats.read(tmp_path / "out")
    assert found.architecture == SPECS[spec]
    assert (found.model, found.settings["context_size"], found.settings["dataset_path"]) == (one.model, 128, one.text)
    x = torch.randn(64, D_IN)
    ours, theirs = one.sae.encode(x).to_dense(), found.sae.encode(x).to_dense()
    assert torch.equal(ours != 0, theirs != 0)
    assert float((ours - theirs).abs().max()) <= 1e-6  # a threshold passes through its logarithm
    assert found.sae.config.role == one.sae.config.role
    assert found.hook_write == ("blocks.3.hook_mlp_out" if "write" in spec else None)
    assert float((found.sae(x) - one.sae(x)).abs().max()) <= 1e-6


def test_hooks_have_the_names_of_transformer_lens(tmp_path: Path) -> None:
    saelens_export.export((exportable("jumprelu d_sae=48 k=5 read=a write=b"),), tmp_path / "out")
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text("utf-8"))["metadata"]
    assert (metadata["hook_name"], metadata["hook_name_out"]) == ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")
    assert (metadata["kronsae_hook_name"], metadata["model_class_name"]) == ("layers.3.mlp:input", "HookedTransformer")
    assert metadata["sae_lens_version"] >= "6"


def test_several_saes_get_a_folder_each(tmp_path: Path) -> None:
    first, second = exportable("topk d_sae=48 k=5"), exportable("kron num_heads=6 d_base=2 d_extension=4 k=5")
    second = Exportable(name="two", sae=second.sae)
    exported = saelens_export.export((first, second), tmp_path / "out")
    assert exported.folders == {"one": tmp_path / "out" / "one", "two": tmp_path / "out" / "two"}
    assert "import kronsae.interop.saelens" in exported.remarks[0]
    assert {formats.read(folder).architecture for folder in exported.folders.values()} == {"topk", "kronsae_topk"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("switch d_sae=48 k=5 num_experts=4", "no architecture with experts. Export an SAE with a dense"),
        ("topk d_sae=48 k=5 read=a,b", "no crosscoders"),
        ("topk d_sae=48 k=5 pursuit_rounds=2", "no pursuit"),
        ("kron num_heads=6 d_base=2 d_extension=2 k=5 null_symbols=true", "no null symbols"),
        ("topk d_sae=48 k=5 read=a write=b skip=true", "no TopK transcoder with a skip connection"),
    ],
)
def test_what_sae_lens_cannot_compute_is_refused_before_anything_is_written(
    spec: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        saelens_export.export((exportable(spec, finished(spec)),), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_topk_transcoder_of_two_widths_is_refused() -> None:
    config = parse_sae("topk d_sae=48 k=5 read=a write=b").shape({"a": 12, "b": 10}, "a")
    assert isinstance(config, SAEConfig)
    with pytest.raises(UserError, match="or with another output width"):
        saelens_export.check((Exportable(name="one", sae=config.build()),))


def test_codes_of_an_sae_with_a_pursuit_are_not_exported() -> None:
    sae = finished("topk d_sae=48 k=5")
    sae.pursuit = Pursuit(rounds=2)
    with pytest.raises(UserError, match="one: SAELens has no pursuit"):
        saelens_export.check((exportable("topk d_sae=48 k=5", sae),))
