"""Export to sparsify: read back, the same outputs; refused where sparsify has no such architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command_line import Kronsae

import kronsae as ks
from kronsae.core.sae import SAE
from kronsae.interop import formats, sparsify_export
from kronsae.interop.exportable import Exportable
from kronsae.support.errors import UserError
from kronsae.training.config import MemberConfig

MLP: dict[str, Any] = {"read": "layers.3.mlp:input", "write": "layers.3.mlp"}


def build(member: MemberConfig, width: int = 16) -> SAE:
    """Return an SAE with random biases and skip weights."""
    sae = member.shape(width, "layers.2").build(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.endswith(("bias", "b_dec", "W_skip")):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return sae


def exportable(member: MemberConfig, hook: str = "layers.2", width: int = 16) -> Exportable:
    read, written = member.reads(hook), member.writes(hook)
    return Exportable(name=member.name, sae=build(member, width), hooks_read=read, hooks_written=written)


@pytest.mark.parametrize(
    ("member", "point"),
    [
        (ks.topk(d_sae=32, k=4), "layers.2"),
        (ks.topk(d_sae=32, k=4, **MLP), "layers.3.mlp"),
        (ks.topk(d_sae=32, k=4, skip=True, **MLP), "layers.3.mlp"),
    ],
    ids=["sae", "transcoder", "skip transcoder"],
)
def test_read_back_it_computes_the_same(member: MemberConfig, point: str, tmp_path: Path) -> None:
    one = exportable(member)
    sparsify_export.check((one,))
    written = sparsify_export.export((one,), tmp_path)
    assert written.folders == {"topk": tmp_path / point}
    assert written.remarks == ()
    again = formats.read(tmp_path / point)
    assert again.hook_read == member.reads("layers.2")[0]
    x = torch.randn(50, 16)
    assert again.sae.config == one.sae.config
    torch.testing.assert_close(again.sae.encode(x).to_dense(), one.sae.encode(x).to_dense(), atol=1e-5, rtol=0)
    torch.testing.assert_close(again.sae(x), one.sae(x), atol=1e-5, rtol=0)


def test_the_bias_of_an_sae_is_that_of_the_shifted_input(tmp_path: Path) -> None:
    one = exportable(ks.topk(d_sae=32, k=4))
    sparsify_export.export((one,), tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "layers.2" / "sae.safetensors")
    expected = one.sae.encoder.get_parameter("bias") + one.sae.encoder.get_parameter("weight") @ one.sae.b_dec
    torch.testing.assert_close(saved["encoder.bias"], expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("hook", "point"),
    [("2", "layers.2"), ("gpt_neox.layers.2", "layers.2"), ("transformer.h.2.mlp", "h.2.mlp"), ("embed_in", "topk")],
)
def test_hookpoints(hook: str, point: str, tmp_path: Path) -> None:
    written = sparsify_export.export((exportable(ks.topk(d_sae=32, k=4), hook),), tmp_path)
    assert written.folders["topk"] == tmp_path / point
    assert len(written.remarks) == (point == "topk")


def test_two_saes_of_a_hookpoint_are_kept_apart(tmp_path: Path) -> None:
    saes = tuple(exportable(ks.topk(d_sae=32, k=4, name=name)) for name in ("a", "b"))
    assert sparsify_export.export(saes, tmp_path).folders == {name: tmp_path / name / "layers.2" for name in ("a", "b")}


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (
            ks.kron(num_heads=8, d_base=2, d_extension=2, k=4),
            "kron has a Kronecker encoder, whose AND of two parents is not linear, so no dense encoder equals it",
        ),
        (ks.jumprelu(d_sae=32, k=4), "jumprelu is a jumprelu SAE, which has thresholds in place of a fixed k"),
        (ks.switch(d_sae=32, k=4, num_experts=2), "switch has a switch encoder"),
        (ks.topk(d_sae=32, k=4, read="layers.1,layers.2"), "topk is a crosscoder"),
        (ks.topk(d_sae=32, k=4, pursuit_rounds=2), "topk pursues its codes"),
    ],
)
def test_refused(member: MemberConfig, reason: str) -> None:
    with pytest.raises(UserError) as error:
        sparsify_export.check((exportable(member),))
    assert str(error.value) == (
        f"the export to sparsify must be of TopK SAEs and transcoders with a dense encoder; {reason}. "
        "Give the names of those that are, or another format."
    )


def test_on_the_command_line(finished_run: ks.Run, kronsae: Kronsae, tmp_path: Path) -> None:
    outcome = kronsae("export", finished_run.folder, "topk", "--to", "sparsify", "--out", tmp_path / "out", "--json")
    assert outcome.status == 0
    folder = Path(outcome.json["topk"])
    assert json.loads((folder / "cfg.json").read_text())["k"] == 4
    x = finished_run.activations(50)
    torch.testing.assert_close(ks.load(folder)(x), ks.load(finished_run.folder, "topk")(x), atol=1e-5, rtol=0)
    refused = kronsae("export", finished_run.folder, "--to", "sparsify", "--out", tmp_path / "all")
    assert "kron has a Kronecker encoder" in refused.sentence
    assert not (tmp_path / "all").exists()
