"""Our transcoders in circuit-tracer: its own loader, and a graph of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.tiny_models import make_tokenizer
from torch import Tensor

import kronsae as ks
from kronsae.core.sae import SAE
from kronsae.interop import circuit_tracer_export as target
from kronsae.interop.circuit_tracer import transcoder_set
from kronsae.interop.exportable import Exportable
from kronsae.training.config import MemberConfig

WIDTH, LAYERS = 16, 2
HOOKS: dict[str, Any] = {"read": "layers.0.mlp:input", "write": "layers.0.mlp"}
Record = Callable[..., None]


def filled(member: MemberConfig, seed: int) -> SAE:
    sae = member.shape(WIDTH).build(seed).trained()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sae.state_dict().items():
            noise = torch.randn(weight.shape, generator=generator)
            if "threshold" in name:
                weight.copy_(noise * 0.3 - 1.5)
            else:
                weight.add_(noise, alpha=0.2)
    return sae.requires_grad_(False)


def exported(folder: Path, skip: bool) -> tuple[list[SAE], dict[int, str], dict[str, Any]]:
    saes = [filled(ks.jumprelu(d_sae=24, k=4, skip=skip, **HOOKS), seed) for seed in range(LAYERS)]
    things = tuple(
        Exportable(
            name=f"t{layer}",
            sae=sae,
            model="tiny",
            hooks_read=(f"layers.{layer}.mlp:input",),
            hooks_written=(f"layers.{layer}.mlp",),
        )
        for layer, sae in enumerate(saes)
    )
    target.check(things)
    done = target.export(things, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return saes, {layer: str(done.folders[f"t{layer}"]) for layer in range(LAYERS)}, config


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_its_own_loader(skip: bool, lazy: bool, tmp_path: Path, record: Record) -> None:
    from circuit_tracer.utils.hf_utils import load_transcoders

    saes, paths, config = exported(tmp_path / "set", skip)
    config["transcoders"] = [paths[layer] for layer in range(LAYERS)]
    loaded = load_transcoders(config, torch.device("cpu"), torch.float32, lazy_encoder=lazy, lazy_decoder=lazy)
    assert (loaded.n_layers, loaded.d_transcoder, loaded.skip_connection) == (LAYERS, 24, skip)
    assert (loaded.feature_input_hook, loaded.feature_output_hook) == ("mlp.hook_in", "mlp.hook_out")
    difference = 0.0
    for layer, sae in enumerate(saes):
        x = torch.randn(40, WIDTH)
        codes = sae.encode(x).to_dense()
        assert bool(codes.any())
        with torch.no_grad():
            difference = max(
                difference,
                float((loaded[layer].encode(x) - codes).abs().max()),
                float((loaded[layer](x) - sae(x)).abs().max()),
            )
    assert difference <= 1e-5
    record(
        "its loader: latents and outputs",
        format=f"circuit-tracer transcoders{', skip' if skip else ''}",
        direction="write",
        package="circuit-tracer",
        difference=difference,
        tolerance=1e-5,
    )


def replacement_model(transcoders: Any, folder: Path) -> Any:
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from transformer_lens import HookedTransformerConfig
    from transformers import AutoTokenizer

    config = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=WIDTH,
        n_ctx=32,
        d_head=8,
        n_heads=2,
        d_vocab=320,
        act_fn="gelu",
        seed=0,
        device="cpu",
        init_weights=True,
    )
    make_tokenizer("gpt2").save_pretrained(folder)  # TransformerLens loads it again
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TransformerLensReplacementModel.from_config(config, transcoders, tokenizer=tokenizer)


KINDS: dict[str, MemberConfig] = {
    "dense topk": ks.topk(d_sae=24, k=4, **HOOKS),
    "dense jumprelu": ks.jumprelu(d_sae=24, k=4, **HOOKS),
    "kronecker topk": ks.kron(num_heads=4, d_base=2, d_extension=3, k=4, **HOOKS),
    "kronecker jumprelu": ks.jumprelu(num_heads=4, d_base=2, d_extension=3, k=4, **HOOKS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph(kind: str, tmp_path: Path, record: Record) -> None:
    """Its attribution runs on our transcoders, with our latents as nodes; errors are what we leave unexplained."""
    from circuit_tracer import attribute

    saes = {layer: filled(KINDS[kind], layer) for layer in range(LAYERS)}
    model = replacement_model(transcoder_set(saes, scan="ours"), tmp_path)
    tokens = torch.tensor([0, 9, 100, 7, 31, 44])  # 0 is the special token that circuit-tracer wants first
    graph = attribute(tokens, model, max_n_logits=3, batch_size=16, verbose=False)
    seen: dict[str, Tensor] = {}
    names = [f"blocks.{layer}.mlp.hook_in" for layer in range(LAYERS)]
    model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: seen.__setitem__(hook.name, x)) for name in names])
    dense = torch.stack([saes[layer].encode(seen[name][0]).to_dense() for layer, name in enumerate(names)])
    dense[:, 0] = 0  # circuit-tracer leaves out the first position
    expected = dense.nonzero()
    assert graph.active_features.shape == expected.shape
    assert torch.equal(graph.active_features.cpu(), expected)
    assert len(expected) > 10
    found = graph.activation_values.cpu()
    difference = float((found - dense[tuple(expected.T)]).detach().abs().max())
    assert difference <= 1e-5
    assert bool(graph.adjacency_matrix.isfinite().all())
    assert bool(graph.adjacency_matrix.any())
    record(
        "attribution graph",
        format=f"circuit-tracer, our {kind} in Python",
        direction="use",
        package="circuit-tracer",
        difference=difference,
        tolerance=1e-5,
    )
