"""Evaluation of SAEs that belong to different hooks: each at its own, in as few passes as possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.eval import toys
from tests.tiny_models import TEXT, WIDTH
from torch import Tensor

from kronsae.core.encoders import DenseEncoderConfig
from kronsae.core.metrics import ExplainedVariance
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.data.model import LanguageModel, ModelConfig, load_model, resolve_hook
from kronsae.data.text import TextStream
from kronsae.data.tokens import TokenStream
from kronsae.eval import Hooks, SplicedModel, evaluate, reconstruction, spliced_models
from kronsae.eval.hooked import MakeTokens, all_hidden_states, hidden_states, kept, logits_with, read_windows, splice
from kronsae.support.errors import UserError

MLP_IN, MLP_OUT = "layers.1.mlp:input", "layers.1.mlp"


@pytest.fixture
def model(tiny_model_folder: Callable[[str], Path]) -> LanguageModel:
    return load_model(ModelConfig(name=str(tiny_model_folder("gpt_neox")), device="cpu"))


def windows_of(model: LanguageModel) -> MakeTokens:
    make_text = partial(TextStream, TEXT, held_out_share=0.0, repeat=False)
    return partial(TokenStream, make_text, model.tokenizer, context_length=16, batch_sequences=4)


def places(model: LanguageModel, read: list[str], write: list[str] | None = None) -> Hooks:
    points = {hook: resolve_hook(model.model, hook) for hook in (*read, *(write or []))}
    return Hooks(read=tuple(points[hook] for hook in read), write=tuple(points[hook] for hook in write or read))


def random_sae(d_in: int, seed: int = 0, *, reads: tuple[int, ...] = (), writes: tuple[int, ...] = ()) -> SAE:
    shape = DenseEncoderConfig(d_sae=40)
    config = SAEConfig(
        d_in=d_in, encoder=shape, sparsifier=TopKConfig(k=6), read_widths=reads, write_widths=writes, skip=bool(writes)
    )
    sae = config.build(seed)
    if sae.skip is not None:
        torch.nn.init.normal_(sae.skip.W_skip, std=0.1, generator=torch.Generator().manual_seed(seed))
    return sae


@contextmanager
def passes_of(model: LanguageModel) -> Iterator[list[int]]:
    """Passes begun, and of these the ones that came to the last block."""
    counts = [0, 0]

    def count(place: int) -> Callable[..., None]:
        def counter(*_: object) -> None:
            counts[place] += 1

        return counter

    handles = [resolve_hook(model.model, layer).module.register_forward_hook(count(n)) for n, layer in ((0, 0), (1, 3))]
    yield counts
    for handle in handles:
        handle.remove()


def group(model: LanguageModel) -> tuple[dict[str, SAE], dict[str, Hooks]]:
    saes = {
        "residual": random_sae(WIDTH, 0),
        "deeper": random_sae(WIDTH, 1),
        "transcoder": random_sae(WIDTH, 2, writes=(WIDTH,)),
        "crosscoder": random_sae(2 * WIDTH, 3, reads=(WIDTH, WIDTH)),
    }
    hooks = {
        "residual": places(model, ["layers.0"]),
        "deeper": places(model, ["layers.2"]),
        "transcoder": places(model, [MLP_IN], [MLP_OUT]),
        "crosscoder": places(model, ["layers.0", "layers.2"]),
    }
    return saes, hooks


def test_each_is_measured_as_if_alone(model: LanguageModel) -> None:
    saes, hooks = group(model)
    make = windows_of(model)
    together = evaluate(saes, model, hooks, make, tokens=100)
    for name, sae in saes.items():
        alone = evaluate({name: sae}, model, {name: hooks[name]}, make, tokens=100)[name]
        assert alone == together[name]
    plain = evaluate({"residual": saes["residual"]}, model, hooks["residual"].read[0], make, tokens=100)
    assert plain["residual"] == together["residual"]


def test_one_pass_for_all(model: LanguageModel) -> None:
    """First pass: each batch once. Second: one clean, two ablated for each of four written sets, one for each SAE."""
    saes, hooks = group(model)
    make = windows_of(model)
    batches = len(read_windows(make, 100))
    with passes_of(model) as passes:
        evaluate(saes, model, hooks, make, tokens=100)
    assert passes == [batches * (1 + 1 + 4 * 2 + 4), batches * (1 + 4 * 2 + 4)]
    shared = {"a": saes["residual"], "b": random_sae(WIDTH, 9)}
    with passes_of(model) as passes:
        evaluate(shared, model, dict.fromkeys(shared, hooks["residual"]), make, tokens=100)
    assert passes == [batches * (1 + 1 + 2 + 2), batches * (1 + 2 + 2)]


def test_a_transcoder_is_measured_against_its_target(model: LanguageModel) -> None:
    """Every figure by hand, from the activations at the two hooks."""
    saes, hooks = group(model)
    make = windows_of(model)
    found = evaluate({"t": saes["transcoder"]}, model, {"t": hooks["transcoder"]}, make, tokens=100)["t"]
    read, write = hooks["transcoder"].read[0], hooks["transcoder"].write[0]
    parts = read_windows(make, 100)
    x_ND = torch.cat([kept(hidden_states(model, read, part), part) for part in parts])
    y_ND = torch.cat([kept(hidden_states(model, write, part), part) for part in parts])
    y_hat_ND = saes["transcoder"](x_ND).detach()
    error, deviation = (y_ND - y_hat_ND).square().sum(), (y_ND - y_ND.mean(0)).square().sum()
    assert found.reconstruction.explained_variance == pytest.approx(float(1 - error / deviation), rel=1e-5)
    assert found.reconstruction.mean_squared_error == pytest.approx(float(error) / len(x_ND), rel=1e-5)
    spliced = found.language_model
    assert isinstance(spliced, SplicedModel)

    def cross_entropy(put_in: Callable[[Tensor], Tensor] | None) -> float:
        total, count = 0.0, 0
        for part in parts:
            x_STD, y_STD = hidden_states(model, read, part), hidden_states(model, write, part)
            new = [] if put_in is None else [(write, splice(y_STD, part, put_in(kept(x_STD, part))))]
            log_p = logits_with(model, new, part)[:, :-1].log_softmax(-1)
            scored = part.attention_mask_ST[:, 1:]
            target = part.input_ids_ST[:, 1:].long().unsqueeze(-1)
            total -= float(log_p.gather(-1, target).squeeze(-1)[scored].sum())
            count += int(scored.sum())
        return total / count

    assert spliced.ce_clean == pytest.approx(cross_entropy(None), rel=1e-5)
    assert spliced.ce_spliced == pytest.approx(cross_entropy(saes["transcoder"]), rel=1e-5)
    assert spliced.ce_zero == pytest.approx(cross_entropy(torch.zeros_like), rel=1e-5)
    assert spliced.ce_mean == pytest.approx(cross_entropy(lambda rows: y_ND.mean(0).expand_as(rows)), rel=1e-5)


def test_a_perfect_transcoder_and_a_perfect_crosscoder_change_nothing(model: LanguageModel) -> None:
    """A block's input is the output of the one before: writing it from there is the identity, which can be made."""
    perfect = toys.perfect_sae(WIDTH)
    transcoder = SAE(perfect.encoder, perfect.sparsifier, perfect.decoder, write_widths=(WIDTH,))
    wide = toys.perfect_sae(2 * WIDTH)
    crosscoder = SAE(wide.encoder, wide.sparsifier, wide.decoder, read_widths=(WIDTH, WIDTH))
    hooks = {
        "t": places(model, ["layers.0"], ["layers.1:input"]),
        "c": places(model, ["layers.0", "layers.2"]),
        "zero": places(model, ["layers.0", "layers.2"]),
    }
    with torch.no_grad():
        nothing = toys.zero_sae(2 * WIDTH)
    zero = SAE(nothing.encoder, nothing.sparsifier, nothing.decoder, read_widths=(WIDTH, WIDTH))
    found = evaluate({"t": transcoder, "c": crosscoder, "zero": zero}, model, hooks, windows_of(model), tokens=100)
    for name in ("t", "c"):
        spliced = found[name].language_model
        assert isinstance(spliced, SplicedModel)
        assert found[name].reconstruction.explained_variance == pytest.approx(1)
        assert spliced.ce_recovered == pytest.approx(1, abs=1e-5)
        assert spliced.kl_recovered == pytest.approx(1, abs=1e-5)
    of_zero = found["zero"].language_model
    assert isinstance(of_zero, SplicedModel)
    assert of_zero.kl_spliced == pytest.approx(of_zero.kl_zero, rel=1e-6)
    assert of_zero.kl_zero > 0


def test_a_crosscoder_is_told_hook_by_hook(model: LanguageModel) -> None:
    saes, hooks = group(model)
    make = windows_of(model)
    found = evaluate({"c": saes["crosscoder"]}, model, {"c": hooks["crosscoder"]}, make, tokens=100)["c"]
    expected = [ExplainedVariance(), ExplainedVariance()]
    rows = []
    for part in read_windows(make, 100):
        hidden = all_hidden_states(model, hooks["crosscoder"].read, part)
        x_ND = torch.cat([kept(hidden[point.name], part) for point in hooks["crosscoder"].read], dim=1)
        rows.append(x_ND)
        pairs = zip(x_ND.split(WIDTH, dim=1), saes["crosscoder"](x_ND).split(WIDTH, dim=1), strict=True)
        for variance, (own, own_hat) in zip(expected, pairs, strict=True):
            variance.update(own, own_hat)
    assert found.reconstruction.explained_variance_by_hook == tuple(variance.value() for variance in expected)
    assert found.figures()["reconstruction"]["explained_variance_by_hook"] == [v.value() for v in expected]
    alone = reconstruction(saes["crosscoder"], rows)
    assert alone == found.reconstruction
    assert not any(map(math.isnan, alone.explained_variance_by_hook))  # type: ignore[arg-type]


def test_bad_input(model: LanguageModel) -> None:
    saes, hooks = group(model)
    make = windows_of(model)
    with pytest.raises(UserError) as error:
        evaluate({"c": saes["crosscoder"]}, model, {"c": hooks["deeper"]}, make, tokens=9)
    assert str(error.value) == (
        "SAE 'c' must have the width of hook 'gpt_neox.layers.2', 16; got d_in=32. "
        "Use the model and the hook that it was trained on."
    )
    wrong = Hooks(read=hooks["residual"].read, write=hooks["crosscoder"].write)
    with pytest.raises(UserError, match=r"hook 'gpt_neox.layers.0' and 'gpt_neox.layers.2', 32; got d_out=16"):
        evaluate({"t": saes["transcoder"]}, model, {"t": wrong}, make, tokens=9)
    with pytest.raises(UserError, match="reconstruction needs an SAE that writes the hook it reads"):
        reconstruction(saes["transcoder"], [torch.zeros(2, WIDTH)])
    with pytest.raises(UserError, match="needs SAEs that read and write one hook; 'c' is a crosscoder"):
        spliced_models({"c": saes["crosscoder"]}, model, hooks["residual"].read[0], make, tokens=9)
