"""Sparse probing of a dictionary whose latents are the concepts, and of one that knows nothing."""

from __future__ import annotations

import json

import pytest
import torch
from tests.tiny_models import make_tokenizer

from kronsae.core.encoders import DenseEncoderConfig
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.eval.absorption import ProbeTraining
from kronsae.eval.hooked import Windows
from kronsae.eval.labelling import Passage, Span
from kronsae.eval.probing import ConceptText, Probing, ProbingConfig, concept_text, probing
from kronsae.support.errors import UserError

D, N = 8, 600
CONFIG = ProbingConfig(ks=(1, 2), ablated=(1,), sample=60, draws=3, probe=ProbeTraining(batch=16, epochs=60))
TOKENIZER = make_tokenizer("gpt2")


def text_and_activations() -> tuple[ConceptText, list[tuple[Windows, torch.Tensor]]]:
    """Concepts "a" and "b" along axes 0 and 1; "both" is their AND. Four batches of 150 tokens."""
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(N, 2, generator=generator) < 0.5
    labels = torch.cat([on, on.all(1, keepdim=True)], dim=1)
    x = 0.05 * torch.randn(N, D, generator=generator)
    x[:, :2] += on.float() * (1 + torch.rand(N, 2, generator=generator))
    mask = torch.ones(1, 150, dtype=torch.bool)
    windows = tuple(Windows(torch.zeros(1, 150, dtype=torch.int32), mask, mask, i) for i in range(4))
    text = ConceptText(
        concepts=("a", "b", "both"), windows=windows, labels_NL=labels, held_out_N=torch.arange(N) >= 400
    )
    return text, list(zip(windows, x.split(150), strict=True))


def dictionary(*, knows: bool) -> SAE:
    shape = SAEConfig(d_in=D, encoder=DenseEncoderConfig(d_sae=D), sparsifier=TopKConfig(k=4))
    sae = shape.build()
    with torch.no_grad():
        reads = torch.eye(D)
        reads[: 0 if knows else 2] = 0.0  # it sees nothing but noise
        sae.encoder.weight.copy_(reads)
        sae.encoder.bias.fill_(-0.1 if knows else 0.0)
        sae.W_dec.copy_(torch.eye(D))
    return sae


@pytest.fixture(scope="module")
def found() -> dict[str, Probing]:
    text, activations = text_and_activations()
    saes = {"knows": dictionary(knows=True), "random": dictionary(knows=False)}
    return probing(saes, text, activations, CONFIG)[0]


def test_latents_that_are_the_concepts_are_found(found: dict[str, Probing]) -> None:
    a, b, both = found["knows"].concepts
    assert (a.latent, a.f1, b.latent, b.f1) == (0, 1.0, 1, 1.0)
    assert a.share == pytest.approx(0.5, abs=0.1)
    assert a.accuracy_by_k == {1: 1.0, 2: 1.0}
    assert both.f1 < 0.8
    assert both.pair is not None
    assert (both.pair.operation, set(both.pair.latents), both.pair.f1) == ("and", {0, 1}, 1.0)
    assert both.accuracy_by_k[2] > both.accuracy_by_k[1]
    assert found["knows"].recall[0] == {"latents": 8.0, "recall_0.5": 1.0, "recall_0.7": pytest.approx(2 / 3, abs=0.34)}


def test_taking_a_concepts_latent_away_hurts_its_own_probe(found: dict[str, Probing]) -> None:
    [taken] = found["knows"].perturbation
    assert taken.own > 0.3
    assert taken.score > 0.1


def test_latents_of_noise_know_little(found: dict[str, Probing]) -> None:
    assert found["random"].mean_f1 < found["knows"].mean_f1 - 0.2
    assert found["random"].mean_accuracy_by_k[2] < 0.7
    assert abs(found["random"].perturbation[0].score) < 0.1


def test_equal_seeds_give_equal_digits_however_it_is_batched(found: dict[str, Probing]) -> None:
    text, activations = text_and_activations()
    again, accuracy = probing({"knows": dictionary(knows=True)}, text, activations, CONFIG)
    assert json.dumps(again["knows"].to_dict()) == json.dumps(found["knows"].to_dict())
    assert accuracy["a"] > 0.95


def test_tokens_have_the_concepts_of_the_spans_they_overlap() -> None:
    spans = (Span(start=4, end=9, label="how"), Span(start=0, end=19, label="start"))
    passages = [Passage(text="the quick brown fox jumps over", spans=spans, held_out=i % 2 == 0) for i in range(8)]
    found = concept_text(
        passages, TOKENIZER, frame=([5], []), context_length=9, windows=100, at_least=3, concepts=("start", "how")
    )
    assert found.concepts == ("start", "how")
    ids = torch.cat([windows.input_ids_ST[windows.keep_ST] for windows in found.windows]).tolist()
    assert len(ids) == len(found.labels_NL) == len(found.held_out_N)
    kept = {
        c: {str(TOKENIZER.decode([t])) for t, has in zip(ids, found.labels_NL[:, c], strict=True) if has}
        for c in (0, 1)
    }
    whole = TOKENIZER("the quick brown fox jumps over", add_special_tokens=False, return_offsets_mapping=True)
    expected = {
        str(TOKENIZER.decode([t]))
        for t, (a, b) in zip(*(whole[key] for key in ("input_ids", "offset_mapping")), strict=True)
        if a < 9 and b > 4
    }
    assert kept[1] == expected
    assert not any("jumps" in token or "over" in token for token in kept[0])


def test_texts_are_scored_by_the_means_over_their_tokens() -> None:
    """Texts of 1 to 5 tokens whose means are the activations of the other tests: every figure must be the same."""
    text, activations = text_and_activations()
    x_SD = torch.cat([x for _, x in activations])
    tokens_S = [1 + number % 5 for number in range(N)]
    windows, x_TD = [], []
    for number in range(0, N, 150):
        sizes = torch.tensor(tokens_S[number : number + 150])
        keep_ST = torch.arange(5) < sizes[:, None]
        windows.append(Windows(torch.zeros(150, 5, dtype=torch.int32), keep_ST, keep_ST, number))
        # token t of a text has the share w_t of its sum: 1 for one token, else 0.5, 1.5, 1, ...
        weights = torch.where(sizes[:, None] > 1, torch.tensor([0.5, 1.5, 1.0, 1.0, 1.0]), 1.0)[keep_ST]
        x_TD.append(weights[:, None] * x_SD[number : number + 150].repeat_interleave(sizes, 0))
    texts = ConceptText(
        concepts=text.concepts,
        windows=tuple(windows),
        labels_NL=text.labels_NL,
        held_out_N=text.held_out_N,
        per="text",
    )
    sae = dictionary(knows=True)
    with torch.no_grad():
        sae.encoder.bias.zero_()  # then codes are linear in the share, and means of codes are codes of means
    by_text, accuracy = probing({"knows": sae}, texts, zip(windows, x_TD, strict=True), CONFIG)
    by_token, expected = probing({"knows": sae}, text, activations, CONFIG)
    assert accuracy == expected
    assert texts.digest() != text.digest()
    for one, other in zip(by_text["knows"].concepts, by_token["knows"].concepts, strict=True):
        assert (one.latent, one.f1, one.accuracy_by_k) == (other.latent, other.f1, other.accuracy_by_k)
        assert one.threshold == pytest.approx(other.threshold, rel=1e-5)
    assert by_text["knows"].perturbation == by_token["knows"].perturbation


def test_a_text_has_its_labels_and_ends_with_its_first_window() -> None:
    long, short = "the quick brown fox jumps over the lazy dog " * 3, "the quick fox"
    passages = [
        Passage(text=text, spans=(Span(start=0, end=len(text), label=label),), held_out=number % 2 == 0)
        for number in range(8)
        for text, label in ((long, "long"), (short, "short"))
    ]
    late = Passage(text=long, spans=(Span(start=len(long) - 4, end=len(long), label="short"),), held_out=True)
    found = concept_text([*passages, late], TOKENIZER, frame=([5], []), context_length=9, at_least=3, per="text")
    assert (found.per, found.concepts) == ("text", ("long", "short"))
    rows = torch.cat([windows.keep_ST.sum(1) for windows in found.windows])
    assert len(rows) == len(found.labels_NL) == len(found.held_out_N) == 17
    whole = len(TOKENIZER(short, add_special_tokens=False)["input_ids"])
    assert sorted(rows.tolist()) == [whole] * 8 + [8] * 9
    assert found.labels_NL.sum(0).tolist() == [8, 8]  # the last passage has its label behind the first window
    with pytest.raises(UserError, match="a concept needs 10 texts with it and 10 without it"):
        concept_text(passages, TOKENIZER, frame=([], []), context_length=9, at_least=10, per="text")


def test_text_without_enough_of_any_concept_is_refused() -> None:
    passages = [
        Passage(text="the quick fox", spans=(Span(start=0, end=3, label="x"),), held_out=i % 2 == 0) for i in (0, 1)
    ]
    with pytest.raises(
        UserError, match="a concept needs 50 tokens with it and 50 without it, both for training and held out"
    ):
        concept_text(passages, TOKENIZER, frame=([], []), context_length=9)
    with pytest.raises(UserError, match="labelled text must contain tokens; found none"):
        concept_text([], TOKENIZER, frame=([], []), context_length=9)
    with pytest.raises(UserError, match="ks must contain at least one number, all above 0"):
        ProbingConfig(ks=())
