from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.eval import toys
from torch.utils._python_dispatch import TorchDispatchMode

from kronsae.core.encoders import DenseEncoderConfig, EncoderConfig, KroneckerEncoderConfig
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.eval import GalleryConfig, Skipped, SplicedModel, evaluate, latent_statistics, reconstruction
from kronsae.eval.hooked import hidden_states, kept, read_windows
from kronsae.support.errors import UserError


def test_the_parts_agree_with_the_functions_that_stand_alone() -> None:
    model, hook = toys.language_model(30, 8)
    make = toys.batches(toys.random_windows(20, 12, 30), 4)
    saes = {"kron": toys.kron_sae(8), "perfect": toys.perfect_sae(8)}
    found = evaluate(saes, model, hook, make, tokens=50)
    x = [kept(hidden_states(model, hook, part), part) for part in read_windows(make, 50)]
    for name, sae in saes.items():
        assert found[name].reconstruction == reconstruction(sae, x)
        assert found[name].statistics == latent_statistics(sae, x)
    perfect = found["perfect"].language_model
    assert isinstance(perfect, SplicedModel)
    assert perfect.ce_recovered == pytest.approx(1, abs=1e-6)
    assert found["kron"].gallery.heads
    assert not found["perfect"].gallery.heads


def test_batches_do_not_matter() -> None:
    model, hook = toys.language_model(30, 8)
    windows = toys.random_windows(20, 12, 30)
    config = GalleryConfig(num_latents=3, num_heads=1)
    results = [
        evaluate(
            {"kron": toys.kron_sae(8, k=36)},
            model,
            hook,
            toys.batches(windows, size),
            tokens=60,
            language_model_tokens=25,
            gallery=config,
        )["kron"]
        for size in (1, 20)
    ]
    assert results[0].gallery == results[1].gallery
    assert results[0].statistics.active_tokens == results[1].statistics.active_tokens
    one_by_one, together = (result.figures() for result in results)
    assert one_by_one["reconstruction"] == pytest.approx(together["reconstruction"], rel=1e-5)
    assert one_by_one["language_model"].pop("kind") == together["language_model"].pop("kind")
    assert one_by_one["language_model"] == pytest.approx(together["language_model"], rel=1e-5)


def test_the_losses_may_be_measured_on_fewer_tokens() -> None:
    model, hook = toys.language_model(30, 8)
    make = toys.batches([[1, 2, 3, 4]] * 10, 2)
    found = evaluate({"a": toys.zero_sae(8)}, model, hook, make, tokens=30, language_model_tokens=7)["a"]
    assert found.reconstruction.tokens == 30
    assert isinstance(found.language_model, SplicedModel)
    assert found.language_model.tokens == 9  # three whole windows, three positions each
    assert model.model.passes_to_the_end == 2 * (1 + 2 + 1)


def test_results_are_json() -> None:
    model, hook = toys.language_model(30, 8)
    found = evaluate({"kron": toys.kron_sae(8)}, model, hook, toys.batches([[1, 2, 3, 4]] * 9, 2), tokens=20)["kron"]
    whole = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert whole == found.figures() | found.latents()
    assert set(whole) == {"reconstruction", "language_model", "statistics", "gallery"}
    assert whole["language_model"]["kind"] == "measured"


def test_progress_is_told_up_to_its_end() -> None:
    model, hook = toys.language_model(30, 8)
    told: list[tuple[int, int]] = []
    evaluate(
        {"a": toys.zero_sae(8)},
        model,
        hook,
        toys.batches([[1, 2, 3, 4]] * 9, 2),
        tokens=20,
        progress=lambda done, total: told.append((done, total)),
    )
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (40, 40)


def test_memory_does_not_know_the_dictionary() -> None:
    """No tensor of B x F: the largest one made is smaller than that."""
    model, hook = toys.language_model(30, 8)
    sae = toys.kron_sae(8, num_heads=64, d_base=8, d_extension=8, k=4)
    windows = [[1, *([2, 3, 4, 5] * 16)]] * 8
    largest = _Largest()
    with largest:
        evaluate({"kron": sae}, model, hook, toys.batches(windows, 8), tokens=512, gallery=GalleryConfig(num_heads=1))
    assert largest.elements < 512 * sae.d_sae / 2


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


def test_bad_input() -> None:
    model, hook = toys.language_model(30, 8)
    make = toys.batches([[1, 2, 3]], 1)
    with pytest.raises(UserError, match="SAE 'wide' must have the width of hook 'block', 8; got d_in=9"):
        evaluate({"wide": toys.zero_sae(9)}, model, hook, make, tokens=2)
    with pytest.raises(UserError, match="tokens must be above 0"):
        evaluate({"a": toys.zero_sae(8)}, model, hook, make, tokens=0)
    with pytest.raises(UserError, match="found none"):
        evaluate({"a": toys.zero_sae(8)}, model, hook, toys.batches([[1]], 1), tokens=2)


def tiny_saes(d_in: int) -> dict[str, SAE]:
    shapes: dict[str, EncoderConfig] = {
        "topk": DenseEncoderConfig(d_sae=32),
        "kron": KroneckerEncoderConfig(num_heads=4, d_base=2, d_extension=4),
    }
    return {
        name: SAEConfig(d_in=d_in, encoder=shape, sparsifier=TopKConfig(k=4)).build() for name, shape in shapes.items()
    }


def test_six_architectures(any_model_folder: Path) -> None:
    """The same call on Qwen2, Gemma-2, GPT-NeoX, GPT-2, Llama and BERT."""
    from tests.tiny_models import TEXT, WIDTH

    from kronsae.data.model import ModelConfig, load_model, resolve_hook
    from kronsae.data.text import TextStream
    from kronsae.data.tokens import TokenStream

    model = load_model(ModelConfig(name=str(any_model_folder), device="cpu"))
    make_text = partial(TextStream, TEXT, held_out_share=0.0, repeat=False)
    make = partial(TokenStream, make_text, model.tokenizer, context_length=16, batch_sequences=4)
    found = evaluate(tiny_saes(WIDTH), model, resolve_hook(model.model, "layers.1"), make, tokens=150)
    for evaluation in found.values():
        assert 150 <= evaluation.reconstruction.tokens < 166
        assert evaluation.reconstruction.l0 <= 4
        if model.has_lm_head:
            assert isinstance(evaluation.language_model, SplicedModel)
            assert evaluation.language_model.kl_spliced > 0
        else:
            assert isinstance(evaluation.language_model, Skipped)
            assert "Bert" in evaluation.language_model.reason
    context = found["kron"].gallery.latents[0].top[0]
    assert context.values[context.peak] > 0
    assert any(context.tokens[context.peak].strip() in text for text in TEXT)


def test_a_perfect_sae_in_a_real_model_changes_nothing(tiny_model_folder: Callable[[str], Path]) -> None:
    from tests.tiny_models import TEXT, WIDTH

    from kronsae.data.model import ModelConfig, load_model, resolve_hook
    from kronsae.data.text import TextStream
    from kronsae.data.tokens import TokenStream

    model = load_model(ModelConfig(name=str(tiny_model_folder("gpt_neox")), device="cpu"))
    make_text = partial(TextStream, TEXT, held_out_share=0.0, repeat=False)
    make = partial(TokenStream, make_text, model.tokenizer, context_length=16, batch_sequences=4)
    saes = {"perfect": toys.perfect_sae(WIDTH), "zero": toys.zero_sae(WIDTH)}
    found = evaluate(saes, model, resolve_hook(model.model, "layers.1"), make, tokens=150)
    perfect, zero = found["perfect"].language_model, found["zero"].language_model
    assert isinstance(perfect, SplicedModel)
    assert isinstance(zero, SplicedModel)
    assert perfect.kl_spliced == pytest.approx(0, abs=1e-9)
    assert perfect.ce_spliced == pytest.approx(perfect.ce_clean, rel=1e-6)
    assert zero.kl_spliced == pytest.approx(zero.kl_zero, rel=1e-6)
    assert zero.ce_spliced == pytest.approx(zero.ce_zero, rel=1e-6)
