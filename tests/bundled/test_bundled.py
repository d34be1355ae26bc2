"""The packaged language model: it loads as any other, fits in the package, and beats a bigram."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from kronsae import bundled
from kronsae.bundled import evaluate, train
from kronsae.data.corpus import Document, is_held_out, standard_library_documents
from kronsae.support.files import read_json

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(bundled.path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(bundled.path())


@pytest.fixture(scope="module")
def figures() -> Any:
    return read_json(bundled.path() / evaluate.EVALUATION_FILE, "The bundled model's figures")


def test_folder_fits_in_the_package() -> None:
    sizes = {file.name: file.stat().st_size for file in bundled.path().iterdir()}
    assert sum(sizes.values()) <= 12 * MEGABYTE
    assert sizes["model.safetensors"] <= 11.5 * MEGABYTE


def test_loads_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")  # passes nothing on to the root, where caplog listens
    logger.addHandler(caplog.handler)
    try:
        AutoModelForCausalLM.from_pretrained(bundled.path(), dtype=torch.float32)
        AutoTokenizer.from_pretrained(bundled.path())
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_embeddings_are_tied(model: Any) -> None:
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.dtype == torch.float32


def test_tokenizer_gives_any_text_back(tokenizer: Any) -> None:
    for text in ("def f(x):\n    return  x\n", "naïve 漢字 🙂\t\x00", " lead", "a\r\n\n\nb  ", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_class_is_known_to_older_transformers() -> None:
    config = read_json(bundled.path() / "tokenizer_config.json", "The tokenizer's settings")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_special_tokens_are_distinct(tokenizer: Any, model: Any) -> None:
    assert tokenizer.eos_token == tokenizer.bos_token == train.END_OF_TEXT
    assert tokenizer.pad_token == train.PAD
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.encode(train.END_OF_TEXT) == [tokenizer.eos_token_id]


def test_generation_stays_within_the_vocabulary(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer("import os\n", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert ids.shape[1] <= prompt["input_ids"].shape[1] + 8
    assert tokenizer.decode(ids[0]).startswith("import os\n")


def test_held_out_slice_is_better_than_the_bigram(model: Any, tokenizer: Any, figures: Any) -> None:
    measured = figures["evaluation"]["slice"]
    documents = [d for d in standard_library_documents() if d.id in measured["document_ids"]]
    if not documents:
        pytest.skip("this Python's library has none of the slice's documents")
    assert all(is_held_out(document.id) for document in documents)
    measured_context = figures["evaluation"]["context"]
    nats = train.token_nats(model, train.encode(tokenizer, documents), measured_context).mean().item()
    assert nats < measured["bigram"]["nats_per_token"]
    if sum(len(d.text.encode()) for d in documents) == measured["text_bytes"]:
        assert nats == pytest.approx(measured["model"]["nats_per_token"], abs=1e-3)


def test_figures_rank_as_they_must(figures: Any) -> None:
    for part in ("held_out", "slice"):
        losses = [figures["evaluation"][part][name]["nats_per_token"] for name in ("model", "bigram", "unigram")]
        assert losses == sorted(losses)


def test_card_is_made_from_the_figures(figures: Any) -> None:
    text = (bundled.path() / evaluate.CARD_FILE).read_text(encoding="utf-8")
    assert text == evaluate.card(figures)


def test_bigram_is_a_distribution_and_prefers_what_it_saw() -> None:
    stream = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1], dtype=torch.int32)
    bigram = evaluate.Bigram([(stream, 2)], vocab_size=4, pseudo_count=0.5)
    nats = torch.stack([bigram.bigram_nats(torch.tensor([0, second])) for second in range(4)])
    torch.testing.assert_close(torch.exp(-nats).sum(), torch.tensor(1.0))
    assert nats.argmin() == 1
    # c(0, 1) = 2 * 3, and c(1) = 2 * 3 of 2 * 7 tokens that follow another one
    unigram = (6 + 1) / (14 + 4)
    expected = (6 + 0.5 * unigram) / (6 + 0.5)
    torch.testing.assert_close(torch.exp(-nats[1, 0]), torch.tensor(expected))


class TestTraining:
    """The parts of the training script, on settings that a test can afford."""

    settings = train.Settings(
        tokens=4096,
        vocab_size=300,
        hidden_size=16,
        layers=1,
        heads=2,
        intermediate_size=16,
        max_positions=32,
        context=16,
        batch_tokens=128,
        warmup_tokens=512,
        long_share=0.25,
    )

    @pytest.fixture
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library = [Document(id=f"library/{i}", text=f"def f{i}(x):\n    return x + {i}\n" * 40) for i in range(6)]
        tests = [Document(id=f"tests/{i}", text=f"assert f{i}(1) == {i + 1}\n" * 40) for i in range(3)]
        monkeypatch.setattr(train, "training_documents", lambda include_tables: (library, tests))
        monkeypatch.setattr(train, "standard_library_documents", lambda: iter(library))
        monkeypatch.setattr(train, "is_held_out", lambda name: name == "library/0")

    def test_learning_rate_rises_stays_and_falls(self) -> None:
        def factor(seen: int) -> float:
            return train.learning_rate_factor(seen, self.settings)

        assert factor(256) == 0.5
        assert factor(512) == factor(2048) == 1.0
        assert factor(3072) == 0.5
        assert factor(4096) == 0.0

    @pytest.mark.usefixtures("small")
    def test_an_interrupted_run_equals_a_whole_one(self, tmp_path: Path) -> None:
        whole = train.Run(self.settings, tmp_path / "whole")
        losses = dict(whole.losses(compiled=False))
        first = train.Run(self.settings, tmp_path / "parts")
        for step, _ in first.losses(compiled=False):
            if step == 10:
                first.save()
                break
        second = train.Run(self.settings, tmp_path / "parts")
        assert second.step == 10
        rest = dict(second.losses(compiled=False))
        assert rest == {step: loss for step, loss in losses.items() if step > 10}
        assert losses[32] < losses[1]

    @pytest.mark.usefixtures("small")
    def test_a_run_of_other_settings_is_refused(self, tmp_path: Path) -> None:
        run = train.Run(self.settings, tmp_path)
        next(run.losses(compiled=False))
        run.save()
        longer = replace(self.settings, tokens=8192)
        assert train.Run(longer, tmp_path).step == 1
        with pytest.raises(ValueError, match="settings must equal those of the checkpoint"):
            train.Run(replace(self.settings, seed=1), tmp_path)

    def test_windows_cover_an_epoch_without_repeats(self) -> None:
        library, tests = torch.arange(1000), torch.arange(5000, 5400)
        settings = replace(self.settings, library_weight=1)
        # 30 + 11 windows of 32 tokens, four to a batch
        batches = [train.batch_at(step, library, tests, settings) for step in range(10)]
        assert batches[0].shape == (8, 17)
        assert torch.equal(batches[0][:, 1:-1], batches[0][:, :-2] + 1)
        inputs = torch.cat([batch[:, :-1].flatten() for batch in batches])
        assert len(set(inputs.tolist())) == len(inputs)
        late = train.batch_at(31, library, tests, settings)
        assert late.shape == (4, 33)

    def test_settings_name_rule_value_and_remedy(self) -> None:
        with pytest.raises(ValueError, match=r"batch_tokens must be a multiple of context; got 100 and 256\."):
            train.Settings(batch_tokens=100)
        with pytest.raises(ValueError, match="warmup_tokens must lie between 0 and tokens"):
            train.Settings(tokens=100)

    def test_tokenizer_has_every_byte_and_both_special_tokens(self) -> None:
        made = train.train_tokenizer([Document(id="a", text="hello hello")], 300, 32)
        backend = made.backend_tokenizer
        assert isinstance(backend, Tokenizer)
        assert backend.decode(backend.encode("žluťoučký kůň").ids) == "žluťoučký kůň"
        assert (made.eos_token_id, made.pad_token_id) == (0, 1)
