from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from tests.eval import toys

from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoder
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.eval import Gallery, GalleryConfig
from kronsae.eval import contexts as contexts_module
from kronsae.eval.contexts import CANDIDATES, Context, GalleryMeter, near_copies
from kronsae.eval.display import TokenText
from kronsae.eval.hooked import hidden_states, kept, read_windows
from kronsae.eval.latents import LatentMeter
from kronsae.support.errors import UserError


def gallery(
    sae: SAE,
    model: toys.ToyLanguageModel,
    hook: toys.ToyHook,
    windows: list[list[int]],
    config: GalleryConfig,
    size: int = 2,
) -> Gallery:
    stream = read_windows(toys.batches(windows, size), 10_000)
    parts = [(part, kept(hidden_states(model, hook, part), part)) for part in stream]
    latents = LatentMeter(sae.d_sae)
    for _, x_ND in parts:
        latents.update(sae.encode(x_ND))
    meter = GalleryMeter(sae, latents.value(), config)
    for part, x_ND in parts:
        meter.update(part, x_ND, sae.encode(x_ND))
    return meter.value(TokenText(model.tokenizer))


def one_latent() -> tuple[SAE, toys.ToyLanguageModel, toys.ToyHook]:
    """Token n activates the only latent at n - 4, so tokens up to 4 leave it off."""
    sae = SAEConfig(d_in=1, encoder=DenseEncoderConfig(d_sae=1), sparsifier=TopKConfig(k=1)).build()
    with torch.no_grad():
        sae.encoder.weight.fill_(1.0)
        sae.encoder.bias.fill_(-4.0)
    embedding = torch.arange(20.0).unsqueeze(1)
    model = toys.ToyModel(embedding, torch.zeros(20, 1))
    return sae, toys.ToyLanguageModel(model), toys.ToyHook("block", model.block)


def test_by_hand() -> None:
    sae, model, hook = one_latent()
    windows = [[1, 2, 9, 3, 8], [1, 3, 3], [1, 19], [1, 2, 3, 4, 7, 2, 6, 2]]
    found = gallery(sae, model, hook, windows, GalleryConfig(top=2, sampled=0, window=2))
    assert found.tokens == 4 + 2 + 1 + 7
    assert found.heads == ()
    (latent,) = found.latents
    assert latent.latent == 0
    assert latent.frequency == pytest.approx(5 / 14, rel=1e-3)  # tokens 9, 8, 19, 7, 6
    assert latent.max_activation == 15
    assert latent.head is None
    best, second = latent.top  # one context per window: token 8 stands beside 9, not for itself
    assert (best.tokens, best.peak, best.values) == (("<bos>", " t19"), 1, (0.0, 15.0))
    assert second.tokens == ("<bos>", " t2", " t9", " t3", " t8")
    assert second.values == (0.0, 0.0, 5.0, 0.0, 4.0)
    assert second.peak == 2
    assert second.base == ()


def test_special_tokens_are_shown_but_never_active() -> None:
    """<bos> would be far the most active token if it counted."""
    sae, model, hook = one_latent()
    model.model.embedding.weight[toys.BOS] = 1000.0
    (latent,) = gallery(sae, model, hook, [[1, 9, 1, 9]], GalleryConfig(top=3)).latents
    assert latent.max_activation == 5
    assert latent.top[0].values == (0.0, 5.0, 0.0, 5.0)
    assert latent.top[0].peak == 1  # of equal activations the first


def test_sampled_contexts_are_of_active_tokens_and_repeat_no_top_one() -> None:
    sae, model, hook = one_latent()
    windows = toys.random_windows(60, 12, 20)
    config = GalleryConfig(top=2, sampled=20, window=3)
    (latent,) = gallery(sae, model, hook, windows, config).latents
    assert len(latent.top) == 2
    assert 10 < len(latent.sampled) <= 20
    for context in latent.sampled:
        assert context.values[context.peak] > 0
        assert context not in latent.top
    # drawn, and not the next in order of activation
    peaks = [context.values[context.peak] for context in latent.sampled]
    assert min(peaks) < 5 < max(peaks)
    (other,) = gallery(sae, model, hook, windows, replace(config, seed=1)).latents
    assert other.top == latent.top
    assert other.sampled != latent.sampled


def context(text: str) -> Context:
    tokens = tuple(text.split(" "))
    return Context(tokens=tokens, peak=0, values=(1.0,) * len(tokens))


@pytest.mark.parametrize(
    ("one", "other", "copies"),
    [
        ("a b c d", "a b c d", True),
        ("a b c d", "c b a x", True),  # three of four, in another order
        ("a b c d", "a b x y", False),  # half is not more than half
        ("' x41 ' # 0x 41", "' x5 ' # 0x 513", True),  # digits count as equal
        ("a a a b c d", "a x y z u v", False),  # a token counts as often as both have it
        ("a a a a b c", "a a a a x y", True),
        ("a b", "a b c d", False),  # of the longer one
        ("a b c", "a b c d", True),
    ],
)
def test_near_copies_share_most_of_their_tokens(one: str, other: str, copies: bool) -> None:
    assert near_copies(context(one), context(other)) is copies
    assert near_copies(context(other), context(one)) is copies


def test_near_copies_of_a_stronger_context_are_passed_over() -> None:
    sae, model, hook = one_latent()
    windows = [[1, 2, 19, 2], [1, 3, 18, 3], [1, 17], [1, 4, 4, 16, 4, 4, 4, 4, 4]]
    config = GalleryConfig(top=3, sampled=4, window=9)
    (latent,) = gallery(sae, model, hook, windows, config).latents
    assert [found.values[found.peak] for found in latent.top] == [15, 13, 12]  # 14 stands in a copy of the first
    assert [found.values[found.peak] for found in latent.sampled] == [14]  # a draw is a fair one: it may be a copy
    kept = CANDIDATES * max(config.top, config.cell_contexts)
    copies = [[1, 2, 19, 2]] * kept + [[1, 17]]
    (latent,) = gallery(sae, model, hook, copies, config).latents
    assert len(latent.top) == 1  # beyond so many copies nothing is kept
    (latent,) = gallery(sae, model, hook, copies[1:], config).latents
    assert [found.values[found.peak] for found in latent.top] == [15, 13]


@pytest.mark.parametrize("size", [1, 7, 40])
def test_batches_do_not_matter(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hook = toys.language_model(30, 8)
    sae, windows = toys.kron_sae(8, k=36), toys.random_windows(40, 14, 30)
    config = GalleryConfig(num_latents=5, num_heads=2, window=4)
    whole = gallery(sae, model, hook, windows, config, size=3)
    monkeypatch.setattr(contexts_module, "MAX_SIGNALS", 500)  # a window or two at a time
    assert gallery(sae, model, hook, windows, config, size=size) == whole


def test_a_head_is_shown_whole_with_its_parents() -> None:
    model, hook = toys.language_model(30, 8)
    sae, windows = toys.kron_sae(8, k=36), toys.random_windows(40, 14, 30)  # k = d_sae: nothing is pruned
    encoder = sae.encoder
    assert isinstance(encoder, KroneckerEncoder)
    found = gallery(sae, model, hook, windows, GalleryConfig(num_latents=0, num_heads=1, cell_contexts=3))
    assert found.latents == ()
    (head,) = found.heads
    assert [cell.latent for cell in head.cells] == [head.head * 6 + cell for cell in range(6)]
    assert [(cell.base, cell.extension) for cell in head.cells] == [(i, j) for i in range(2) for j in range(3)]
    assert [base.number for base in head.bases] == [0, 1]
    assert [extension.number for extension in head.extensions] == [0, 1, 2]

    stream = read_windows(toys.batches(windows, 40), 10_000)
    (part,) = stream
    x_ND = kept(hidden_states(model, hook, part), part)
    u_BHM, v_BHN = (pre.detach().relu() for pre in encoder.pre_latents(x_ND))
    for base in head.bases:
        activations_B = u_BHM[:, head.head, base.number]
        assert base.frequency == pytest.approx(float((activations_B > 0).double().mean()), rel=1e-3)
        assert base.max_activation == pytest.approx(float(activations_B.max()), rel=1e-3)
        assert base.top[0].values[base.top[0].peak] == base.max_activation
        assert base.top[0].base == ()
    for extension in head.extensions:
        assert extension.max_activation == pytest.approx(float(v_BHN[:, head.head, extension.number].max()), rel=1e-3)
    for cell in head.cells:
        assert cell.parents_frequency == cell.frequency  # unpruned: on exactly where both parents are
        for context in cell.top:
            assert len(context.tokens) == len(context.values) == len(context.base) == len(context.extension)
            for value, base_value, extension_value in zip(context.values, context.base, context.extension, strict=True):
                assert value == pytest.approx(math.sqrt(base_value * extension_value), rel=1e-3)


def test_a_parent_alone_has_the_other_at_0() -> None:
    model, hook = toys.language_model(30, 8)
    sae, windows = toys.kron_sae(8, k=66, null_symbols=True), toys.random_windows(40, 14, 30)  # k = d_sae
    found = gallery(sae, model, hook, windows, GalleryConfig(num_latents=3, num_heads=1, cell_contexts=3))
    assert len(found.latents) == 3
    (head,) = found.heads
    assert [cell.latent for cell in head.cells] == [head.head * 11 + cell for cell in range(11)]
    places = [(i, j) for i in (0, 1, None) for j in (0, 1, 2, None) if (i, j) != (None, None)]
    assert [(cell.base, cell.extension) for cell in head.cells] == places
    for cell in head.cells:
        assert cell.top
        alone = None in (cell.base, cell.extension)
        assert (cell.parents_frequency is None) == alone
        for context in cell.top:
            own, absent = (context.extension, context.base) if cell.base is None else (context.base, context.extension)
            assert (set(absent) == {0.0}) == alone
            for value, of_parent in zip(context.values, own, strict=True):
                assert not alone or value <= of_parent * 1.001, "what a parent has above its rivals"
                assert of_parent > 0 or value == 0


def test_the_number_of_heads_is_bounded_by_their_cells() -> None:
    model, hook = toys.language_model(30, 8)
    sae, windows = toys.kron_sae(8), toys.random_windows(40, 14, 30)
    for max_cells, heads in ((1, 1), (12, 2), (13, 2), (18, 3)):
        config = GalleryConfig(num_latents=0, num_heads=3, max_cells=max_cells)
        assert len(gallery(sae, model, hook, windows, config).heads) == heads
    assert gallery(sae, model, hook, windows, GalleryConfig(num_heads=0)).heads == ()


def test_an_sae_that_is_dead_has_an_empty_gallery() -> None:
    sae, model, hook = one_latent()
    found = gallery(sae, model, hook, [[1, 2, 3]], GalleryConfig())
    assert found.to_dict() == {"tokens": 2, "latents": [], "heads": []}


def test_bands_part_the_drawn_by_activation() -> None:
    sae, model, hook = one_latent()
    windows = toys.random_windows(60, 12, 20)
    config = GalleryConfig(top=1, sampled=0, window=3, quantiles=3, quantile_contexts=2)
    (latent,) = gallery(sae, model, hook, windows, config).latents
    assert latent.sampled == ()
    assert len(latent.quantiles) == 3
    for band, above in itertools.pairwise(latent.quantiles):
        assert band.high <= above.low
    for band in latent.quantiles:
        assert len(band.contexts) == 2
        for context in band.contexts:
            assert band.low <= context.values[context.peak] <= band.high
    assert latent.quantiles[0].low < 5 < latent.quantiles[-1].high


def test_fewer_activations_than_bands() -> None:
    sae, model, hook = one_latent()
    config = GalleryConfig(top=1, window=0, quantiles=4)
    (latent,) = gallery(sae, model, hook, [[1, 9, 2], [1, 7]], config).latents
    assert [(band.low, band.high, len(band.contexts)) for band in latent.quantiles] == [(3, 3, 1), (5, 5, 1)]


def test_negatives_are_windows_without_any_activation() -> None:
    sae, model, hook = one_latent()
    windows = [[1, 2, 3], [1, 2, 9], [1, 3], [1], [1, 4, 4, 4], [1, 8]]
    config = GalleryConfig(top=1, window=9, negatives=10)
    (latent,) = gallery(sae, model, hook, windows, config).latents
    found = {context.tokens for context in latent.negatives}
    assert found == {("<bos>", " t2", " t3"), ("<bos>", " t3"), ("<bos>", " t4", " t4", " t4")}
    for context in latent.negatives:
        assert set(context.values) == {0.0}
        assert context.tokens[context.peak] != "<bos>"


def test_named_latents_are_shown_first_dead_or_not() -> None:
    model, hook = toys.language_model(30, 8)
    sae, windows = toys.kron_sae(8), toys.random_windows(40, 14, 30)
    sae.encoder.bias.data[0, 0] = -1e6  # base 0 of head 0, so latents 0 to 2, never fires
    shown = gallery(sae, model, hook, windows, GalleryConfig(num_latents=2, num_heads=0, latents=(20, 0)))
    assert [latent.latent for latent in shown.latents][:2] == [20, 0]
    assert shown.latents[1].top == ()
    assert len(shown.latents) in (3, 4)
    with pytest.raises(UserError, match=r"latents must be numbers from 0 to 35; got 36\."):
        gallery(sae, model, hook, windows, GalleryConfig(latents=(36,)))
