"""We read what sparsify saves, and sparsify reads what we export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sparsify
import torch
from torch import Tensor

import kronsae as ks
from kronsae.core.sae import SAE
from kronsae.interop import formats, sparsify_export
from kronsae.interop.exportable import Exportable

D_IN, D_SAE, K, TOLERANCE = 16, 40, 5, 1e-5
KINDS: dict[str, dict[str, bool]] = {
    "sae": {},
    "transcoder": {"transcode": True},
    "skip transcoder": {"transcode": True, "skip_connection": True},
}
MLP = {"read": "layers.3.mlp:input", "write": "layers.3.mlp"}


@torch.no_grad()
def difference(ours: SAE, theirs: Any, x: Tensor) -> float:
    """Return the largest difference of latents and reconstructions."""
    encoded = theirs.encode(x)
    dense = torch.zeros(len(x), theirs.num_latents).scatter(1, encoded.top_indices, encoded.top_acts)
    found = ours.encode(x)
    # forward adds the skip connection, as its training does
    pairs = ((found.to_dense(), dense), (ours.decode(found, x), theirs(x).sae_out))
    return max(float((one - other).abs().max()) for one, other in pairs)


def inputs() -> Tensor:
    return torch.randn(200, D_IN, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
def test_what_sparsify_saved_is_read(kind: str, tmp_path: Path, record: Callable[..., None]) -> None:
    theirs = sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(num_latents=D_SAE, k=K, **KINDS[kind]))
    randomize(theirs)
    theirs.save_to_disk(tmp_path / "layers.3.mlp")
    found = difference(formats.read(tmp_path / "layers.3.mlp").sae, theirs, inputs())
    assert found <= TOLERANCE
    record(
        "latents and reconstruction of a saved SAE",
        format=f"sparsify {kind}",
        direction="read",
        package="eai-sparsify",
        difference=found,
        tolerance=TOLERANCE,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_export_sparsify_reads(kind: str, tmp_path: Path, record: Callable[..., None]) -> None:
    places: dict[str, Any] = {} if kind == "sae" else MLP
    member = ks.topk(d_sae=D_SAE, k=K, skip=kind == "skip transcoder", **places)
    ours = member.shape(D_IN, "layers.3").build(1)
    randomize(ours)
    one = Exportable(name="x", sae=ours, hooks_read=member.reads("layers.3"), hooks_written=member.writes("layers.3"))
    sparsify_export.check((one,))
    folder = sparsify_export.export((one,), tmp_path).folders["x"]
    found = difference(ours, sparsify.SparseCoder.load_from_disk(folder), inputs())
    assert found <= TOLERANCE
    record(
        "latents and reconstruction of an exported SAE",
        format=f"sparsify {kind}",
        direction="write",
        package="eai-sparsify",
        difference=found,
        tolerance=TOLERANCE,
    )


def test_a_run_folder_is_read_as_sparsify_lists_it(tmp_path: Path, record: Callable[..., None]) -> None:
    """``load_many`` finds the hookpoints of an exported run by the names of its folders."""
    members = [ks.topk(d_sae=D_SAE, k=K, name=name, read=name) for name in ("layers.2", "layers.10")]
    saes = tuple(
        Exportable(name=one.name, sae=one.shape(D_IN).build(), hooks_read=one.reads(""), hooks_written=one.writes(""))
        for one in members
    )
    sparsify_export.export(saes, tmp_path)
    assert list(sparsify.SparseCoder.load_many(str(tmp_path), local=True)) == ["layers.2", "layers.10"]
    record("load_many of an exported run", format="sparsify sae", direction="write", package="eai-sparsify")
