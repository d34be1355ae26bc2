from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import LAYERS, VOCABULARY, WIDTH, make_model
from torch import Tensor, nn

from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import BatchTopKConfig, JumpReLUConfig, TopKConfig
from kronsae.data.model import resolve_hook, tap
from kronsae.interventions import intervene as intervention_module
from kronsae.interventions.intervene import Change, Intervention, ablate, clamp, intervene, scale, steer
from kronsae.support.errors import UserError

KINDS = ("gpt_neox", "gpt2", "qwen2", "gemma2", "llama")
Ids = Tensor


def make_sae(seed: int = 0, *, kron: bool = True, dtype: torch.dtype = torch.float32) -> SAE:
    """Return an SAE with 24 latents and k = 5, on the scale of the tiny models' activations."""
    encoder = KroneckerEncoderConfig(num_heads=4, d_base=2, d_extension=3, init_norm=4.0)
    dense = DenseEncoderConfig(d_sae=24, init_norm=4.0)
    shape = SAEConfig(d_in=WIDTH, encoder=encoder if kron else dense, sparsifier=TopKConfig(k=5))
    return shape.build(seed).to(dtype).requires_grad_(False)


def model_of(kind: str = "gpt_neox", dtype: torch.dtype = torch.float32) -> Any:
    return make_model(kind).requires_grad_(False).eval().to(dtype)


def tokens(sequences: int = 2, length: int = 7, seed: int = 1) -> Ids:
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def hidden(model: nn.Module, hook: str, run: Callable[[], Any]) -> list[Tensor]:
    """Return the activation at the hook that the rest of the model sees, for each forward pass of ``run``."""
    found: list[Tensor] = []

    def capture(hidden_STD: Tensor) -> Tensor:
        found.append(hidden_STD.clone())
        return hidden_STD

    with tap(resolve_hook(model, hook), capture):
        run()
    return found


def by_definition(sae: SAE, x: Tensor, changes: list[Change]) -> Tensor:
    """Return ``x + decode(f') - decode(f)``, computed with dense f."""
    f = sae.encode(x).to_dense()
    after = f.clone()
    for change in changes:
        after[..., change.latent] = change(after[..., change.latent])
    everything = torch.arange(sae.d_sae).expand(after.shape)
    return x + sae.decode(SparseCodes(after, everything, sae.d_sae)) - sae.decode(SparseCodes(f, everything, sae.d_sae))


def test_changes_by_hand() -> None:
    f = torch.tensor([0.0, 2.0])
    for change, expected in [
        (steer(3, 1.5), [1.5, 3.5]),
        (scale(3, -2), [0, -4]),
        (clamp(3, 7), [7, 7]),
        (ablate(3), [0, 0]),
    ]:
        assert change.latent == 3
        assert change(f).tolist() == expected


@pytest.mark.parametrize("kron", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_goes_on_from_the_changed_activation(kind: str, kron: bool) -> None:
    model, sae, ids = model_of(kind), make_sae(kron=kron), tokens()
    (x_STD,) = hidden(model, "layers.1", lambda: model(ids))
    active = int(sae.encode(x_STD).indices[0, 3, 0])
    changes = [scale(active, 3.0), steer(4, 2.0), clamp(7, 1.5), ablate(active), steer(active, 0.5)]
    intervention = Intervention(sae=sae, hook="layers.1", changes=changes)
    with intervene(model, intervention):
        (changed_STD,) = hidden(model, "layers.1", lambda: model(ids))
        logits = model(ids).logits
    torch.testing.assert_close(changed_STD, by_definition(sae, x_STD, changes), rtol=1e-5, atol=1e-5)
    with tap(resolve_hook(model, "layers.1"), lambda own: changed_STD):
        torch.testing.assert_close(model(ids).logits, logits)
    assert torch.equal(hidden(model, "layers.1", lambda: model(ids))[0], x_STD)  # the hook is gone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_change_not_a_bit_changes(dtype: torch.dtype) -> None:
    """The SAE has a large reconstruction error, which the intervention leaves unchanged."""
    model, sae, ids = model_of(dtype=dtype), make_sae(), tokens()
    expected = model(ids).logits
    silent = sorted(
        set(range(24)) - set(sae.encode(hidden(model, "1", lambda: model(ids))[0].float()).indices.flatten().tolist())
    )
    for changes in ([], [scale(n, 1.0) for n in range(24)], [ablate(n) for n in silent], [steer(2, 0.0)]):
        with intervene(model, Intervention(sae=sae, hook="layers.1", changes=changes)):
            assert torch.equal(model(ids).logits, expected)
    with intervene(model):
        assert torch.equal(model(ids).logits, expected)


def test_only_tokens_at_which_the_latent_is_active_change() -> None:
    model, sae, ids = model_of(), make_sae(), tokens()
    (x_STD,) = hidden(model, "layers.1", lambda: model(ids))
    codes = sae.encode(x_STD)
    latent = int(codes.indices[1, 2, 0])
    on_ST = ((codes.indices == latent) & codes.active).any(-1)
    assert 0 < int(on_ST.sum()) < on_ST.numel()
    with intervene(model, Intervention(sae=sae, hook="layers.1", changes=[ablate(latent)])):
        (changed_STD,) = hidden(model, "layers.1", lambda: model(ids))
    assert torch.equal((changed_STD != x_STD).any(-1), on_ST)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        ([1, 3, 99], [1, 3]),
        (slice(2, None), [2, 3, 4]),
        (slice(1, 4, 2), [1, 3]),
        ("last", [4]),
        ([], []),
    ],
)
@pytest.mark.parametrize("left", [True, False])
def test_positions_count_each_sequences_own_tokens(positions: Any, expected: list[int], left: bool) -> None:
    """Return a sequence of 7 tokens and one of 5 tokens with padding on the given side."""
    model, sae, ids = model_of(), make_sae(), tokens()
    mask = torch.ones_like(ids)
    padding = slice(0, 2) if left else slice(5, 7)
    mask[1, padding] = 0

    def run() -> Any:
        return model(input_ids=ids, attention_mask=mask)

    (x_STD,) = hidden(model, "layers.1", run)
    intervention = Intervention(sae=sae, hook="layers.1", changes=[steer(3, 5.0)], positions=positions)
    with intervene(model, intervention):
        (changed_STD,) = hidden(model, "layers.1", run)
    changed = [row.nonzero().flatten().tolist() for row in (changed_STD != x_STD).any(-1)]
    offset = 2 if left else 0
    assert changed[1] == [place + offset for place in expected]
    if positions == "last":
        assert changed[0] == [6]
    elif positions is None:
        assert changed[0] == list(range(7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", [None, slice(3, None), [0, 8, 9]])
def test_generation_with_a_cache_is_generation_without(kind: str, positions: Any) -> None:
    model, sae = model_of(kind), make_sae()
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    intervention = Intervention(sae=sae, hook="layers.2", changes=[steer(5, 4.0), scale(2, 3.0)], positions=positions)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, use_cache=True, **options)
    found: list[Tensor] = []
    with intervene(model, intervention):
        for use_cache in (True, False):

            def write(use_cache: bool = use_cache) -> None:
                found.append(model.generate(ids, use_cache=use_cache, **options))

            passes = hidden(model, "layers.2", write)
            assert passes[-1].shape[1] == (1 if use_cache else 11)
    assert torch.equal(found[0], found[1])
    if positions is None:
        assert not torch.equal(found[0], plain)


def test_last_is_the_last_token_of_each_pass() -> None:
    model, sae, ids = model_of(), make_sae(), tokens(1, 4)
    intervention = Intervention(sae=sae, hook="layers.1", changes=[steer(5, 4.0)], positions="last")

    def write() -> Any:
        return model.generate(ids, use_cache=True, max_new_tokens=3, do_sample=False, pad_token_id=0)

    with intervene(model, intervention):
        passes = hidden(model, "layers.1", write)
    written = write()
    (x_STD,) = hidden(model, "layers.1", lambda: model(ids))
    changed = (passes[0] != x_STD).any(-1)
    assert changed.tolist() == [[False, False, False, True]]
    assert [one.shape[1] for one in passes] == [4, 1, 1]
    assert written.shape == (1, 7)


def test_several_at_once() -> None:
    """Two SAEs at one hook and one at a later hook are applied in order, each to the result of the previous one."""
    model, ids = model_of(), tokens()
    saes = [make_sae(seed) for seed in range(3)]
    changes = [[steer(1, 3.0)], [scale(2, 4.0), steer(9, 1.0)], [clamp(3, 2.0)]]
    hooks = ["layers.1", "layers.1", "layers.2"]
    interventions = [
        Intervention(sae=sae, hook=hook, changes=one) for sae, hook, one in zip(saes, hooks, changes, strict=True)
    ]
    (x_STD,) = hidden(model, "layers.1", lambda: model(ids))
    with intervene(model, *interventions):
        (first_STD,) = hidden(model, "layers.1", lambda: model(ids))
        (later_STD,) = hidden(model, "layers.2", lambda: model(ids))
    expected = by_definition(saes[1], by_definition(saes[0], x_STD, changes[0]), changes[1])
    torch.testing.assert_close(first_STD, expected, rtol=1e-5, atol=1e-5)
    with intervene(model, *interventions[:2]):
        (before_STD,) = hidden(model, "layers.2", lambda: model(ids))
    torch.testing.assert_close(later_STD, by_definition(saes[2], before_STD, changes[2]), rtol=1e-5, atol=1e-5)
    with intervene(model, interventions[0]), intervene(model, *interventions[1:]):  # nested blocks are the same
        assert torch.equal(hidden(model, "layers.2", lambda: model(ids))[0], later_STD)


def test_gradients_pass_through() -> None:
    """Compare d loss / d activation at an earlier layer with finite differences, in float64."""
    model, sae, ids = model_of(dtype=torch.float64), make_sae(dtype=torch.float64), tokens(1, 5)
    intervention = Intervention(sae=sae, hook="layers.2", changes=[steer(4, 1.0), scale(6, 2.0)])
    (x_STD,) = hidden(model, "layers.1", lambda: model(ids))

    def figure(hidden_STD: Tensor) -> Tensor:
        with intervene(model, intervention), tap(resolve_hook(model, 1), lambda own: hidden_STD):
            logits: Tensor = model(ids).logits
        return logits[0, -1, 7]

    leaf = x_STD.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(figure(leaf), leaf)
    direction = torch.randn_like(x_STD)
    step = 1e-6
    slope = (figure(x_STD + step * direction) - figure(x_STD - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-5)


def test_the_hooks_go_even_after_an_error() -> None:
    model, ids = model_of(), tokens()
    expected = model(ids).logits
    with (
        pytest.raises(RuntimeError, match="stop"),
        intervene(model, Intervention(sae=make_sae(), hook="layers.1", changes=[steer(1, 9.0)])),
    ):
        raise RuntimeError("stop")
    assert torch.equal(model(ids).logits, expected)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_what_cannot_be() -> None:
    model, sae, ids = model_of(), make_sae(), tokens()
    with pytest.raises(UserError, match=r"latent must be from 0 to 23; got 24\."):
        Intervention(sae=sae, hook="layers.1", changes=[steer(24, 1.0)])
    with pytest.raises(UserError, match=r"value must be finite; got nan for latent 3\."):
        steer(3, float("nan"))
    for wrong in (slice(-1, None), slice(0, None, 0), [0, -2], "first", [1.5], 3):
        with pytest.raises(UserError, match=r"positions must be None, 'last', a slice .* or a list"):
            Intervention(sae=sae, hook="layers.1", changes=[], positions=wrong)  # type: ignore[arg-type]
    with (
        pytest.raises(UserError, match=f"from 0 to {LAYERS - 1}"),
        intervene(model, Intervention(sae=sae, hook="layers.9", changes=[])),
    ):
        pass
    narrow = SAEConfig(d_in=8, encoder=DenseEncoderConfig(d_sae=4), sparsifier=TopKConfig(k=1)).build()
    with (
        intervene(model, Intervention(sae=narrow, hook="layers.1", changes=[steer(1, 1.0)])),
        pytest.raises(
            UserError,
            match=re.escape("d_in of the SAE must equal the width of hook 'gpt_neox.layers.1', 16; got d_in=8"),
        ),
    ):
        model(ids)
    short = Intervention(sae=sae, hook="layers.1", changes=[steer(1, 1.0)])
    cache = model(ids, use_cache=True).past_key_values
    with (
        intervene(model, short),
        pytest.raises(UserError, match=r"attention_mask must be 2 x 8, covering cached and new tokens,.*got 2 x 1\."),
    ):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1))
    mask = torch.ones(2, 1, 7, 7)
    with (
        intervene(model, Intervention(sae=sae, hook="layers.1", changes=[steer(1, 1.0)])),
        pytest.raises(UserError, match=r"attention_mask must be a tensor \[sequences, tokens\].*Tensor\[2, 1, 7, 7\]"),
    ):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize("latent", [1.5, 2.0, -1, True, "3", None, torch.tensor(1.0)])
def test_a_latent_is_a_whole_number(latent: Any) -> None:
    with pytest.raises(UserError, match="latent must be a whole number of at least 0; got "):
        steer(latent, 1.0)


def test_whole_numbers_of_other_libraries_are_latents() -> None:
    for change in (ablate(np.int64(3)), ablate(torch.tensor(3))):  # type: ignore[arg-type]
        assert change == ablate(3)
        assert type(change.latent) is int


@pytest.mark.parametrize("value", ["much", None, torch.ones(2), 1j])
def test_a_change_is_by_a_number(value: Any) -> None:
    with pytest.raises(UserError, match=r"value must be a number; got .* for latent 3"):
        clamp(3, value)


def test_changes_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match=r"kind must be one of add, scale, set; got 'sett'\. Did you mean 'set'"):
        Change(1, "sett", 1.0)  # type: ignore[arg-type]
    for wrong in (steer(1, 1.0), [(1, 1.0)], [1]):
        with pytest.raises(UserError, match=r"changes must be a list of results of steer, scale, clamp and ablate"):
            Intervention(sae=make_sae(), hook="layers.1", changes=wrong)  # type: ignore[arg-type]


def test_nothing_goes_on_that_is_not_finite() -> None:
    broken = make_sae()
    broken.W_dec[2, 3] = torch.nan
    for sae, changes, dtype in (
        (broken, [steer(2, 1.0)], torch.float32),
        (make_sae(), [steer(2, 1e6)], torch.float16),
    ):
        intervention = Intervention(sae=sae, hook="layers.1", changes=changes)
        with pytest.raises(UserError, match=rf"changed activations must be finite in {dtype}; latents \[2\] give"):
            intervention.apply(torch.zeros(2, WIDTH, dtype=dtype))


@pytest.mark.parametrize("sparsifier", [TopKConfig(k=5), BatchTopKConfig(k=5), JumpReLUConfig(k=5)])
def test_training_mode_makes_no_difference(sparsifier: Any) -> None:
    encoder = KroneckerEncoderConfig(num_heads=4, d_base=2, d_extension=3, init_norm=4.0)
    sae = SAEConfig(d_in=WIDTH, encoder=encoder, sparsifier=sparsifier).build().requires_grad_(False)
    intervention = Intervention(sae=sae, hook="layers.1", changes=[scale(n, 2.0) for n in range(24)])
    x_ND = torch.randn(6, WIDTH)
    in_training = intervention.apply(x_ND)
    assert sae.training
    sae.eval()
    assert torch.equal(intervention.apply(x_ND), in_training)
    torch.testing.assert_close(
        intervention.apply(x_ND[:1]), in_training[:1]
    )  # independent of the other tokens in the batch


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(intervention_module).failed == 0


def test_it_can_be_had_from_the_package() -> None:
    import kronsae

    assert kronsae.intervene is intervene


@pytest.mark.parametrize(
    ("shape", "role"),
    [({"d_in": 32, "read_widths": (16, 16)}, "crosscoder"), ({"d_in": 16, "write_widths": (16,)}, "transcoder")],
)
def test_other_roles_are_refused_where_they_are_given(shape: dict[str, Any], role: str) -> None:
    sae = SAEConfig(**shape, encoder=DenseEncoderConfig(d_sae=4), sparsifier=TopKConfig(k=1)).build()
    with pytest.raises(UserError, match=f"sae must reconstruct the single hook it reads; got a {role}"):
        Intervention(sae=sae, hook="layers.1", changes=[])
