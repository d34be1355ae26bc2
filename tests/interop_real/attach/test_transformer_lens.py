"""`kronsae.attach` on models of TransformerLens: the bridge (4.x and 3.x) and ``HookedTransformer`` (3.x)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import WIDTH, make_model, make_tokenizer
from torch import Tensor

import kronsae as ks
from kronsae.core.sae import SAE
from kronsae.support.errors import UserError

IDS = torch.tensor([[5, 9, 100, 7, 31, 44]])
Record = Callable[..., None]


def make_sae(dtype: torch.dtype = torch.float32) -> SAE:
    return ks.kron(num_heads=4, d_base=2, d_extension=3, k=5, init_norm=4.0).shape(WIDTH).build().to(dtype)


def bridge(folder: Path) -> Any:
    """The bridge of a tiny GPT-2."""
    from transformer_lens.model_bridge import TransformerBridge

    make_model("gpt2").save_pretrained(folder)
    make_tokenizer("gpt2").save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu")


def hooked(folder: Path) -> Any:
    """A tiny ``HookedTransformer``, which TransformerLens 4 no longer has."""
    if int(version("transformer-lens").partition(".")[0]) >= 4:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    transformer_lens: Any = importlib.import_module("transformer_lens")
    config = transformer_lens.HookedTransformerConfig(
        n_layers=2, d_model=WIDTH, n_ctx=32, d_head=8, n_heads=2, d_vocab=320, act_fn="gelu", seed=0, device="cpu"
    )
    return transformer_lens.HookedTransformer(config)


@pytest.mark.parametrize("make", [bridge, hooked], ids=lambda one: one.__name__)
def test_attach(make: Callable[[Path], Any], tmp_path: Path, record: Record) -> None:
    """Error kept: the same bits. Error dropped, and gradients: as by the library's own hooks."""
    model, sae, name = make(tmp_path), make_sae(), "blocks.1.hook_resid_post"
    plain = model(IDS)
    with ks.attach(model, sae, name) as attached:
        logits = model(IDS)
    assert torch.equal(logits, plain)
    logits[0, -1, 7].backward()
    gradient = attached.codes.values.grad
    assert gradient is not None

    def reconstruct(x: Tensor, hook: Any) -> Tensor:
        found: Tensor = sae(x)
        return found

    expected = model.run_with_hooks(IDS, fwd_hooks=[(name, reconstruct)])
    with ks.attach(model, sae, name, error="drop"):
        found = model(IDS)
    difference = float((found - expected).detach().abs().max())
    assert difference == 0.0
    assert not torch.allclose(found, plain)

    kept: list[Tensor] = []

    def by_definition(x: Tensor, hook: Any) -> Tensor:
        dense = sae.encode(x).to_dense()
        dense.retain_grad()
        kept.append(dense)
        out = dense @ sae.W_dec + sae.b_dec
        return out + (x - out).detach()

    model.run_with_hooks(IDS, fwd_hooks=[(name, by_definition)])[0, -1, 7].backward()
    assert kept[0].grad is not None
    active = attached.codes.active
    theirs = kept[0].grad.gather(-1, attached.codes.indices)[active]
    deviation = float((gradient[active] - theirs).abs().max())
    assert deviation <= 1e-5
    assert float(theirs.abs().max()) > 1e-3
    assert torch.equal(model(IDS), plain)
    package = "transformer-lens"
    row = {"bridge": "TransformerLens bridge", "hooked": "TransformerLens HookedTransformer"}[make.__name__]
    record("attach: logits", format=row, direction="use", package=package, difference=difference, tolerance=0.0)
    record("attach: gradients", format=row, direction="use", package=package, difference=deviation, tolerance=1e-5)


@pytest.mark.parametrize("make", [bridge, hooked], ids=lambda one: one.__name__)
def test_a_transcoder_and_unknown_hooks(make: Callable[[Path], Any], tmp_path: Path) -> None:
    model = make(tmp_path)
    transcoder = ks.topk(d_sae=24, k=5, init_norm=4.0, read="a", write="b").shape(WIDTH).build()
    plain = model(IDS)
    hooks: dict[str, Any] = {"hook": "blocks.1.hook_resid_mid", "write": "blocks.1.hook_mlp_out"}
    with ks.attach(model, transcoder, **hooks) as attached:
        assert torch.equal(model(IDS), plain)
    assert attached.codes.values.shape == (1, 6, 5)
    with ks.attach(model, transcoder, error="drop", **hooks):
        assert not torch.equal(model(IDS), plain)
    with pytest.raises(UserError, match=r"Did you mean 'blocks\.1\.hook_resid_post'\?"):
        ks.attach(model, make_sae(), "blocks.1.hook_resid_pots")


@pytest.mark.skipif(importlib.util.find_spec("nnsight") is None, reason="nnsight is not installed")
@pytest.mark.parametrize("wrap", ["NNsight", "Language model"])
def test_nnsight(wrap: str, tmp_path: Path, record: Record) -> None:
    """Inside a trace and outside: bits kept with the error, and nnsight's own edit with the error dropped."""
    import nnsight

    hf = make_model("gpt2").eval()
    if wrap == "NNsight":
        model: Any = nnsight.NNsight(hf)
        layers = model.transformer.h
    else:
        hf.save_pretrained(tmp_path)
        make_tokenizer("gpt2").save_pretrained(tmp_path)
        model = nnsight.TransformersModel(str(tmp_path), task="text-generation", dispatch=True)
        layers = model.transformer.h
    sae = make_sae()
    with model.trace(IDS):
        plain = model.output.logits.save()
    with ks.attach(model, sae, "layers.1") as attached, model.trace(IDS):
        kept = model.output.logits.save()
    assert torch.equal(kept, plain)
    assert attached.codes.values.shape == (1, 6, 5)
    with model.trace(IDS):
        output = layers[1].output
        is_tuple = isinstance(output, tuple)
        hidden = output[0] if is_tuple else output
        layers[1].output = (sae(hidden), *output[1:]) if is_tuple else sae(hidden)
        expected = model.output.logits.save()
    with ks.attach(model, sae, "layers.1", error="drop"), model.trace(IDS):
        dropped = model.output.logits.save()
    difference = float((dropped - expected).abs().max())
    assert difference == 0.0
    assert not torch.allclose(dropped, plain)
    record("attach: logits", format="nnsight", direction="use", package="nnsight", difference=difference, tolerance=0.0)


@pytest.mark.skipif(importlib.util.find_spec("nnsight") is None, reason="nnsight is not installed")
def test_nnsight_without_weights() -> None:
    import nnsight

    with torch.device("meta"):
        model = nnsight.NNsight(make_model("gpt2"))
    with pytest.raises(UserError) as caught:
        ks.attach(model, make_sae(), "layers.1")
    assert str(caught.value) == "the nnsight model must have its weights loaded. Load it with dispatch=True."
