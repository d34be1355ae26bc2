from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from tests.eval import toys
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import KroneckerEncoder
from kronsae.eval import profiles
from kronsae.eval.hooked import Windows, hidden_states, kept, read_windows, vocabulary_size
from kronsae.eval.profiles import PreLatentMeter, ProfileMeter, pre_latent_rows

VOCABULARY = 30


def test_by_hand() -> None:
    """Two windows: tokens 2 3 2 (after a token that does not count) and 3; latent 3 never, latent 0 on token 2."""
    ids_ST = torch.tensor([[1, 2, 3, 2], [3, 0, 0, 0]], dtype=torch.int32)
    keep_ST = torch.tensor([[False, True, True, True], [True, False, False, False]])
    windows = Windows(ids_ST, ids_ST > 0, keep_ST, 0)
    values_NK = torch.tensor([[4.0, 1.0], [2.0, 0.0], [4.0, 1.0], [1.0, 3.0]])
    indices_NK = torch.tensor([[0, 1], [2, 3], [0, 1], [1, 2]])
    meter = ProfileMeter(4, 5)
    meter.update(windows, SparseCodes(values_NK, indices_NK, 4))
    found = meter.value()
    assert found.activity.tokens == found.entropy_tokens == 4
    assert list(found.activity.active_tokens) == [2, 3, 2, 0]
    assert list(found.activity.min_activation) == [4, 1, 2, 0]
    assert list(found.activity.mean_activation) == [4, 1, 2.5, 0]
    assert list(found.activity.max_activation) == [4, 1, 3, 0]
    # latent 1: 2/3 of it on token 2, 1/3 on token 3; latents 0 and 2 on one token alone
    third = math.log(3) - 2 / 3 * math.log(2)
    assert list(found.token_entropy) == [0, pytest.approx(third, rel=1e-3), 0, None]
    # latent 1: on 2 of 3 tokens and on 1 of 1; latent 2: on 1 of 3 and on 1 of 1
    assert list(found.multitoken_ratio) == [0.6667, 0.8333, 0.6667, None]
    summary = found.summary()
    assert (summary.units, summary.living) == (4, 3)
    assert summary.frequency == 0.5
    assert summary.mean_activation == 2.5
    assert summary.token_entropy == 0


def material(size: int) -> Iterator[tuple[Windows, Tensor]]:
    model, hook = toys.language_model(VOCABULARY, 8)
    assert vocabulary_size(model) == VOCABULARY
    for windows in read_windows(toys.batches(toys.random_windows(40, 14, VOCABULARY), size), 10_000):
        yield windows, kept(hidden_states(model, hook, windows), windows)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_batches_do_not_matter(size: int) -> None:
    sae = toys.kron_sae(8)
    meters = [ProfileMeter(sae.d_sae, VOCABULARY) for _ in range(2)]
    for meter, each in zip(meters, (size, 3), strict=True):
        for windows, x_ND in material(each):
            meter.update(windows, sae.encode(x_ND))
    assert meters[0].value() == meters[1].value()


@pytest.mark.parametrize("most", [1, 5, 512])
def test_pre_latents_are_like_latents_of_their_dense_activations(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense meter against the sparse one, given all activations as codes."""
    monkeypatch.setattr(profiles, "DENSE_TOKENS", most)  # a window at a time, or all
    monkeypatch.setattr(profiles, "DENSE_UNITS", most)
    sae = toys.kron_sae(8)
    encoder = sae.encoder
    assert isinstance(encoder, KroneckerEncoder)
    for which, rows_R in enumerate(pre_latent_rows(encoder)):
        dense = PreLatentMeter(encoder, rows_R, VOCABULARY)
        sparse = ProfileMeter(len(rows_R), VOCABULARY)
        for windows, x_ND in material(7):
            value_NR = encoder.pre_latents(x_ND)[which].detach().flatten(1).relu()
            indices_NR = torch.arange(len(rows_R)).expand(value_NR.shape)
            dense.update(windows, x_ND)
            sparse.update(windows, SparseCodes(value_NR, indices_NR, len(rows_R)))
        assert dense.value() == sparse.value()


def test_where_the_table_is_bound_some_pre_latents_are_drawn_for_the_entropy() -> None:
    encoder = toys.kron_sae(8).encoder
    assert isinstance(encoder, KroneckerEncoder)
    rows_R = pre_latent_rows(encoder)[1]
    whole, drawn, other = (
        PreLatentMeter(encoder, rows_R, VOCABULARY, seed=seed, max_table=most)
        for seed, most in [(0, 2**20), (0, 5 * VOCABULARY), (1, 5 * VOCABULARY)]
    )
    for windows, x_ND in material(40):
        for meter in (whole, drawn, other):
            meter.update(windows, x_ND)
    everything, some = whole.value().token_entropy, drawn.value().token_entropy
    assert drawn.value().entropy_units == 5
    assert whole.value().entropy_units == len(rows_R)
    places = [place for place, value in enumerate(some) if value is not None]
    assert len(places) == 5
    assert [some[place] for place in places] == [everything[place] for place in places]
    assert other.value().token_entropy != some
