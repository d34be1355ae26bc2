"""SAEs put into a running model: what the model computes then, and the gradients."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny_models import LAYERS, VOCABULARY, WIDTH, make_model
from torch import Tensor, nn

import kronsae as ks
from kronsae.core.codes import SparseCodes
from kronsae.core.sae import SAE
from kronsae.data.model import resolve_hook, tap
from kronsae.interventions import attach as attach_module
from kronsae.interventions.attach import Attached, attach
from kronsae.interventions.intervene import Intervention, ablate, intervene
from kronsae.support.errors import UserError
from kronsae.training.config import MemberConfig

SAES: dict[str, MemberConfig] = {
    "kron": ks.kron(num_heads=4, d_base=2, d_extension=3, k=5, init_norm=4.0),
    "topk": ks.topk(d_sae=24, k=5, init_norm=4.0),
    "jumprelu": ks.jumprelu(d_sae=24, k=5, init_norm=4.0),
}
TRANSCODER = ks.topk(d_sae=24, k=5, init_norm=4.0, read="a", write="b", skip=True)


def make_sae(kind: str = "kron", dtype: torch.dtype = torch.float32, seed: int = 0) -> SAE:
    return SAES[kind].shape(WIDTH).build(seed).to(dtype)


def make_transcoder(dtype: torch.dtype = torch.float32) -> SAE:
    sae = TRANSCODER.shape(WIDTH).build(1).to(dtype)
    assert sae.skip is not None
    nn.init.normal_(sae.skip.W_skip, std=0.3)
    return sae


def model_of(kind: str = "gpt_neox", dtype: torch.dtype = torch.float32) -> Any:
    return make_model(kind).requires_grad_(False).eval().to(dtype)


def tokens(sequences: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> list[tuple[str, int]]:
    """Return the number of hooks of every module."""
    return [(name, len(one._forward_hooks) + len(one._forward_pre_hooks)) for name, one in model.named_modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "gemma2"])
def test_with_the_error_kept_not_a_bit_changes(kind: str, dtype: torch.dtype) -> None:
    """Whatever the dtype of the model; the SAE computes in float32 and is far from a good reconstruction."""
    model, sae, ids = model_of(kind, dtype), make_sae(), tokens()
    before, plain = state(model), model(ids).logits
    with attach(model, sae, "layers.1") as attached:
        assert torch.equal(model(ids).logits, plain)
    assert attached.codes.values.shape == (2, 7, 5)
    assert attached.codes.values.dtype == torch.float32
    assert float(attached.error_node.detach().norm()) > 0.1 * float(plain.norm()) / plain.numel() ** 0.5
    assert state(model) == before
    with torch.no_grad(), attach(model, sae, "layers.1"):
        assert torch.equal(model(ids).logits, plain)


def test_with_the_error_dropped_the_reconstruction_goes_on() -> None:
    model, sae, ids = model_of(), make_sae(), tokens()
    with tap(resolve_hook(model, "layers.1"), lambda x: sae(x)):
        expected = model(ids).logits
    with attach(model, sae, "layers.1", error="drop") as attached:
        assert torch.equal(model(ids).logits, expected)
    with pytest.raises(UserError) as caught:
        _ = attached.error_node
    assert str(caught.value) == ('the error node is known after a forward pass that keeps it; error="drop".')


def reference(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``decode(f) + e``, f and e by plain dense autograd."""
    dense = sae.encode(x).to_dense()
    dense.retain_grad()
    error = (x - dense @ sae.W_dec - sae.b_dec).detach().requires_grad_()
    return dense @ sae.W_dec + sae.b_dec + error, dense, error


@pytest.mark.parametrize("kind", SAES)
def test_gradients_are_those_of_the_definition(kind: str) -> None:
    """In float64: of the codes, of the error node, of the SAE's weights, and of what lies before the hook."""
    model, sae, ids = model_of(dtype=torch.float64), make_sae(kind, torch.float64), tokens()
    embedded = model.get_input_embeddings()(ids).detach()
    kept: list[tuple[Tensor, Tensor]] = []

    def by_definition(x: Tensor) -> Tensor:
        out, dense, error = reference(sae, x)
        kept.append((dense, error))
        return out

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        start = embedded.clone().requires_grad_()
        sae.zero_grad()
        (run(start)[:, -1, 7].sum()).backward()
        found = [start.grad, *(weight.grad for weight in sae.parameters() if weight.grad is not None)]
        return [gradient.clone() for gradient in found if gradient is not None]

    with tap(resolve_hook(model, "layers.1"), by_definition):
        expected = gradients(lambda start: model(inputs_embeds=start).logits)
    with attach(model, sae, "layers.1") as attached:
        found = gradients(lambda start: model(inputs_embeds=start).logits)
    assert len(found) == len(expected) >= 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    ((dense, error),) = kept
    assert dense.grad is not None
    assert error.grad is not None
    codes = attached.codes
    expected_codes = dense.grad.gather(-1, codes.indices)
    active = codes.active
    assert codes.values.grad is not None
    torch.testing.assert_close(codes.values.grad[active], expected_codes[active], rtol=1e-9, atol=1e-12)
    assert attached.error_node.grad is not None
    torch.testing.assert_close(attached.error_node.grad, error.grad, rtol=1e-9, atol=1e-12)
    assert bool(error.grad.any())


def test_the_gradient_of_a_code_is_the_slope_of_the_metric() -> None:
    """Central differences with a step of 1e-5 in float64: error of about 1e-9."""
    model, sae, ids = model_of(dtype=torch.float64), make_sae(dtype=torch.float64).requires_grad_(False), tokens()

    def metric(step: float) -> tuple[Tensor, Attached]:
        def edit(codes: SparseCodes) -> SparseCodes:
            change = torch.zeros_like(codes.values)
            change[1, 3, 0] = step
            return SparseCodes(codes.values + change, codes.indices, codes.d_sae)

        with attach(model, sae, "layers.1", edit=edit) as attached:
            return model(ids).logits[1, -1, 7], attached

    value, attached = metric(0.0)
    value.backward()
    slope = (metric(1e-5)[0] - metric(-1e-5)[0]) / 2e-5
    assert attached.codes.values.grad is not None
    assert float(attached.codes.values.grad[1, 3, 0]) == pytest.approx(float(slope.detach()), rel=1e-6, abs=1e-12)
    assert abs(float(slope.detach())) > 1e-8


def test_an_edit_agrees_with_an_intervention() -> None:
    """Ablation of one latent in both ways, to 1e-5 in float32; other tokens keep their bits."""
    model, sae, ids = model_of(), make_sae(), tokens()
    with attach(model, sae, "layers.1") as attached:
        model(ids)
    latent = int(attached.codes.indices[1, 2, 0])

    def without(codes: SparseCodes) -> SparseCodes:
        return SparseCodes(codes.values * (codes.indices != latent), codes.indices, codes.d_sae)

    seen: list[Tensor] = []
    with attach(model, sae, "layers.1", edit=without), tap(resolve_hook(model, "layers.1"), seen.append):
        edited = model(ids).logits
    with intervene(model, Intervention(sae=sae, hook="layers.1", changes=[ablate(latent)])):
        expected = model(ids).logits
    torch.testing.assert_close(edited, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(edited, model(ids).logits)
    with tap(resolve_hook(model, "layers.1"), seen.append):
        model(ids)
    active = ((attached.codes.indices == latent) & attached.codes.active).any(-1)
    assert torch.equal((seen[0] != seen[1]).any(-1), active)


def test_an_edit_may_add_latents() -> None:
    model, sae, ids = model_of(), make_sae(), tokens()

    def more(codes: SparseCodes) -> SparseCodes:
        one = torch.ones_like(codes.values[..., :1])
        return SparseCodes(
            torch.cat([codes.values, 3 * one], -1), torch.cat([codes.indices, 7 * one.long()], -1), codes.d_sae
        )

    seen: list[Tensor] = []
    with tap(resolve_hook(model, "layers.1"), seen.append):
        model(ids)
    with attach(model, sae, "layers.1", edit=more) as attached, tap(resolve_hook(model, "layers.1"), seen.append):
        model(ids)
    torch.testing.assert_close(seen[1] - seen[0], (3 * sae.W_dec[7]).expand_as(seen[0]), rtol=0, atol=1e-5)
    assert attached.codes.values.shape[-1] == 6


def test_several_saes_and_their_order() -> None:
    model, ids = model_of(), tokens()
    one, other = make_sae(), make_sae("topk", seed=2)
    plain = model(ids).logits
    with attach(model, one, "layers.0") as first, attach(model, other, "layers.1") as second:
        assert torch.equal(model(ids).logits, plain)
        model(ids).logits.sum().backward()
        assert first.codes.values.grad is not None
        assert second.codes.values.grad is not None
    with attach(model, one, "layers.0", error="drop"), attach(model, other, "layers.1") as second:
        model(ids)
    seen: list[Tensor] = []
    with tap(resolve_hook(model, "layers.0"), lambda x: one(x)), tap(resolve_hook(model, "layers.1"), seen.append):
        model(ids)
    assert torch.equal(second.codes.values, other.encode(seen[0]).values)


def test_a_transcoder_replaces_what_the_mlp_gives() -> None:
    model, sae, ids = model_of(), make_transcoder(), tokens()
    hooks: dict[str, Any] = {"hook": "layers.1.mlp:input", "write": "layers.1.mlp"}
    plain = model(ids).logits
    with attach(model, sae, **hooks) as attached:
        logits = model(ids).logits
    assert torch.equal(logits, plain)
    logits[0, -1, 7].backward()
    assert attached.codes.values.grad is not None
    assert bool(attached.codes.values.grad.any())
    assert sae.skip is not None
    assert sae.skip.W_skip.grad is not None
    read: list[Tensor] = []
    with (
        tap(resolve_hook(model, "layers.1.mlp:input"), read.append),
        tap(resolve_hook(model, "layers.1.mlp"), lambda y: sae(read[-1])),
    ):
        expected = model(ids).logits
    with attach(model, sae, error="drop", **hooks):
        assert torch.equal(model(ids).logits, expected)
    assert not torch.allclose(expected, plain)


def test_a_handle_can_be_removed_by_hand() -> None:
    model, sae, ids = model_of(), make_sae(), tokens()
    before = state(model)
    attached = attach(model, sae, "layers.1", error="drop")
    changed = model(ids).logits
    attached.remove()
    attached.remove()
    assert state(model) == before
    assert not torch.equal(model(ids).logits, changed)
    with pytest.raises(RuntimeError, match="stop"), attach(model, sae, "layers.1"):
        raise RuntimeError("stop")
    assert state(model) == before


def test_generation_goes_on_with_a_cache() -> None:
    model, sae, ids = model_of(), make_sae(), tokens()
    plain = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
    with attach(model, sae, "layers.1") as attached:
        assert torch.equal(
            model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0), plain
        )
    assert attached.codes.values.shape == (2, 1, 5)


class Named(nn.Module):
    """A model with TransformerLens' dictionary of hook points: identities, by name and by alias."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Identity()

    @property
    def hook_dict(self) -> dict[str, nn.Module]:
        return {"blocks.0.hook_out": self.point, "blocks.0.hook_resid_post": self.point}

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.point(x)
        return found


def test_hook_points_by_name() -> None:
    model, sae, x = Named(), make_sae(), torch.randn(2, 3, WIDTH)
    for hook in ("blocks.0.hook_resid_post", "blocks.0.hook_out", 0, "0"):
        with attach(model, sae, hook, error="drop"):
            assert torch.equal(model(x), sae(x))
    with pytest.raises(UserError) as caught:
        attach(model, sae, "blocks.0.hook_resid_pots")
    assert str(caught.value) == (
        "hook must name a hook point of the TransformerLens model, such as 'blocks.0.hook_resid_post'; got "
        "'blocks.0.hook_resid_pots'. Did you mean 'blocks.0.hook_resid_post'?"
    )


@pytest.mark.parametrize(
    ("kind", "theirs", "hook"),
    [
        ("gpt_neox", "blocks.1.hook_resid_post", "layers.1"),
        ("gpt2", "blocks.1.hook_resid_pre", "layers.1:input"),
        ("gpt2", "blocks.1.hook_mlp_out", "layers.1.mlp"),
        ("llama", "blocks.1.hook_attn_out", "layers.1.self_attn"),
        ("gemma2", "blocks.1.hook_mlp_out", "layers.1.post_feedforward_layernorm"),
        ("gpt_neox", "hook_embed", "gpt_neox.embed_in"),
    ],
)
def test_names_of_transformer_lens_in_a_hugging_face_model(kind: str, theirs: str, hook: str) -> None:
    model, sae, ids = model_of(kind), make_sae(), tokens()
    with attach(model, sae, hook, error="drop") as ours:
        expected = model(ids).logits
    with attach(model, sae, theirs, error="drop") as attached:
        assert torch.equal(model(ids).logits, expected)
    assert attached.read_site.name == ours.read_site.name
    assert not torch.allclose(expected, model(ids).logits)


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_mid", "blocks.1.ln2.hook_normalized", "blocks.1.attn.hook_q"])
def test_names_of_transformer_lens_that_no_module_gives(hook: str) -> None:
    assert refusal(make_sae(), hook) == (
        f"hook must be an activation that a module of the model gives or is given, such as 'layers.0'; "
        f"TransformerLens' '{hook}' is not known to be one in this model. Give the path of a module."
    )
    model = model_of()
    model.config.model_type = "mamba"
    said = refusal(make_sae(), "blocks.1.hook_mlp_out", model=model)
    assert "'blocks.1.hook_mlp_out' is not known to be one in a model of this architecture. Give the path of a " in said


def test_an_attachment_says_what_it_is() -> None:
    model = model_of()
    about = f"kronecker-topk, d_in={WIDTH}, d_sae=24, at gpt_neox.layers.1"
    with attach(model, make_sae(), "layers.1") as attached:
        assert repr(attached) == f"Attached({about}: error kept)"
    assert repr(attached) == f"Attached({about}: removed)"
    with attach(model, make_sae(), 1, error="drop", edit=lambda codes: codes) as attached:
        assert repr(attached) == f"Attached({about}: error dropped, codes edited)"
    with attach(model, make_transcoder(), "layers.1.mlp:input", write="layers.1.mlp") as attached:
        assert repr(attached) == (
            f"Attached(dense-topk-skip_transcoder, d_in={WIDTH}, d_sae=24, at gpt_neox.layers.1.mlp:input -> "
            "gpt_neox.layers.1.mlp: error kept)"
        )


def refusal(sae: SAE, hook: str = "layers.1", run: bool = False, model: Any = None, **options: Any) -> str:
    model = model_of() if model is None else model
    before = state(model) if isinstance(model, nn.Module) else []

    def attempt() -> None:
        with attach(model, sae, hook, **options):
            assert run, "must be refused before the forward pass"
            model(tokens())

    with pytest.raises(UserError) as caught:
        attempt()
    assert isinstance(model, nn.Module) is False or state(model) == before
    return str(caught.value)


def test_what_is_refused() -> None:
    sae = make_sae()
    assert refusal(sae, "layers.9") == (
        f"hook must name a layer from 0 to {LAYERS - 1}; got 'layers.9'. The model has {LAYERS} layers."
    )
    assert refusal(sae, error="kepe") == "error must be one of keep, drop; got 'kepe'. Did you mean 'keep'?"
    assert refusal(sae, write="layers.2") == (
        "write is for transcoders; got 'layers.2' with an SAE that writes the hook it reads. Leave it out."
    )
    assert refusal(make_transcoder()) == (
        "write must name the hook that a skip_transcoder writes; got none. Give write=, such as 'layers.6.mlp'."
    )
    crosscoder = ks.topk(d_sae=24, k=3, read=("a", "b")).shape({"a": WIDTH, "b": WIDTH}, "a").build()
    assert refusal(crosscoder).startswith(
        "sae must read a single hook and write a single hook; got a crosscoder, whose"
    )
    assert refusal(sae, model="gpt2") == (
        "model must be a torch module, a TransformerLens model or an nnsight model; got str."
    )
    wide = ks.topk(d_sae=24, k=3).shape(2 * WIDTH).build()
    assert refusal(wide, run=True) == (
        f"d_in of the SAE must equal the width of hook '{resolve_hook(model_of(), 'layers.1').name}', {WIDTH}; got "
        f"d_in={2 * WIDTH}. Give the hook that the SAE was trained on."
    )
    assert refusal(make_transcoder(), "layers.2", run=True, write="layers.1").startswith(
        "the transcoder's hook 'gpt_neox.layers.2' must run before 'gpt_neox.layers.1'; it did not."
    )


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda codes: codes.values, "edit must return SparseCodes; got Tensor."),
        (
            lambda codes: codes.reshape(-1),
            "edit must return codes of the same tokens and dictionary, [2, 7] tokens and",
        ),
        (lambda codes: SparseCodes(codes.values, codes.indices, 7), "edit must return codes of the same tokens and"),
        (lambda codes: SparseCodes(codes.values, codes.indices + 24, 24), "edit must return an index from 0 to 23 for"),
    ],
)
def test_edits_that_do_not_fit(edit: Any, said: str) -> None:
    assert refusal(make_sae(), run=True, edit=edit).startswith(said)


def test_values_before_the_first_pass() -> None:
    attached = attach(model_of(), make_sae(), "layers.1")
    for name in ("codes", "error_node"):
        with pytest.raises(UserError, match=r"(are|is) known after a forward pass"):
            getattr(attached, name)


def test_examples() -> None:
    assert doctest.testmod(attach_module).failed == 0
