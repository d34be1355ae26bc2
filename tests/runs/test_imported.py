"""Run folders of SAEs that were trained elsewhere: what they hold, and that everything works on them."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command_line import Kronsae
from tests.hub_stand_in import Hub, files_of
from tests.interop import sae_lens_folders
from tests.interop.foreign_saes import D_IN, D_SAE, dictionary_learning, gemma_scope, sparsify
from tests.tiny_runs import listing, write_jsonl

import kronsae as ks
from kronsae.interop.formats.convert import dense_sae, topk
from kronsae.publishing.export import exportable
from kronsae.runs.config import RunConfig
from kronsae.runs.imported import Import, Place, import_saes
from kronsae.runs.loading import read_sae
from kronsae.runs.run import Run
from kronsae.runs.saebench import find_subjects
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError

READS = "layers.3.mlp"


@pytest.fixture(scope="module")
def place(tiny_model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    text = write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", 200)
    return Place(model=str(tiny_model_folder("gpt_neox")), text=str(text))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an SAE of sparsify, one of dictionary_learning, and a transcoder."""
    folder = tmp_path_factory.mktemp("foreign")
    sparsify(folder / "run" / "layers.2")
    sparsify(folder / "run" / READS, transcode=True, skip_connection=True)
    dictionary_learning(folder / "gated", "GatedAutoEncoder")
    return folder


@pytest.fixture(scope="module")
def imported(foreign: Path, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run of two SAEs of one hook; tests must not change it."""
    out = tmp_path_factory.mktemp("imported") / "run"
    return import_saes([foreign / "run" / "layers.2", foreign / "gated"], out, place, options=["eval_tokens=100"])


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        import_saes(*arguments, **options)
    return str(error.value)


class TestTheRun:
    def test_it_is_finished_and_says_what_it_is(self, imported: Run) -> None:
        assert listing(imported.folder) == [
            "run.json",
            "saes",
            *(
                f"saes/{name}{file}"
                for name in ("gated", "layers.2")
                for file in ("", "/cfg.json", "/sae_weights.safetensors")
            ),
            "training.json",
        ]
        assert imported.finished
        assert repr(imported).splitlines()[0].endswith("imported, " + imported.config.model.name + " at layers.2")
        assert imported.imported["gated"]["format"] == "dictionary_learning"
        assert imported.imported["gated"]["architecture"] == "GatedAutoEncoder"
        assert imported.imported["layers.2"]["settings"] == {}

    def test_its_config_makes_a_round_trip(self, imported: Run) -> None:
        config = imported.config
        assert from_dict(RunConfig, to_dict(config)) == config
        assert config.context_length == 64  # as many as the model takes
        assert config.eval_tokens == 100
        assert [member.reads(config.hook) for member in config.saes] == [("layers.2",), ("layers.2",)]

    def test_the_saes_are_those_of_the_files(self, imported: Run, foreign: Path) -> None:
        x = torch.randn(20, D_IN)
        for name, source in (("layers.2", foreign / "run" / "layers.2"), ("gated", foreign / "gated")):
            assert torch.equal(imported.load(name)(x), ks.load(source)(x))
            assert torch.equal(ks.load(imported.folder, name)(x), ks.load(source)(x))

    def test_what_is_not_known_has_no_figure(self, imported: Run) -> None:
        row = imported.compare().rows[0]
        assert (row["tokens"], row["training_flops"], row["seconds"]) == (None, None, None)
        assert 0 < row["l0"] <= 5
        assert "-" in str(imported.compare())

    def test_the_measurements_text_and_budget_are_not_stated_as_the_trainings(self, imported: Run) -> None:
        one = exportable(imported, "gated")
        assert (one.text, one.context_length) == (None, None)
        subjects = find_subjects(str(imported.folder), [], None, None)
        assert (subjects.tokens, subjects.text, subjects.context_length) == ({}, "", None)

    def test_tokens_that_saelens_states(self, imported: Run, foreign: Path) -> None:
        of = replace(read_sae(foreign / "gated"), settings={"training_tokens": 70})
        assert Import("gated", "x", of).tokens == 70

    def test_a_transcoder(self, foreign: Path, place: Place, tmp_path: Path) -> None:
        run = import_saes([foreign / "run" / READS], tmp_path / "run", place, names=["mine"])
        member = run.config.saes[0]
        assert (member.name, member.read, member.write) == ("mine", (f"{READS}:input",), (READS,))
        assert member.skip
        assert run.load("mine").config.role == "skip_transcoder"

    def test_an_sae_of_ours_keeps_what_its_files_state(self, finished_run: Run, place: Place, tmp_path: Path) -> None:
        source = finished_run.folder / "saes" / "kron"
        run = import_saes([source], tmp_path / "run", Place(text=place.text))
        assert run.config.model.name == finished_run.config.model.name
        assert run.imported["kron"] | {"source": "", "settings": {}} == {
            "source": "",
            "format": "kronsae",
            "architecture": "kronecker-topk",
            "model": finished_run.config.model.name,
            "hook_read": "layers.2",
            "hook_write": None,
            "settings": {},
            "remarks": [],
        }
        assert run.compare(50).rows[0]["tokens"] == 64 * 20
        x = torch.randn(20, D_IN)
        assert torch.equal(run.load("kron")(x), finished_run.load("kron")(x))


def sae_lens(folder: Path, *, changes: dict[str, Any] | None = None, **metadata: Any) -> Path:
    """Write an SAE of SAELens with these statements."""
    config, weights = sae_lens_folders.make("standard")
    weights = {
        "W_enc": torch.randn(D_IN, D_SAE),
        "b_enc": torch.zeros(D_SAE),
        "W_dec": torch.randn(D_SAE, D_IN),
        "b_dec": torch.zeros(D_IN),
    }
    config |= {"d_in": D_IN, "d_sae": D_SAE} | (changes or {})
    stated = {"hook_name": "blocks.2.hook_resid_post", "sae_lens_version": "6.54.12"}
    config["metadata"] = stated | metadata
    return sae_lens_folders.write(folder, config, weights)


class TestWhatTheFilesState:
    def test_what_changes_the_figures_is_said(self, place: Place, tmp_path: Path, kronsae: Kronsae) -> None:
        sae = sae_lens(
            tmp_path / "sae",
            changes={"normalize_activations": "expected_average_only_in"},
            model_from_pretrained_kwargs={"center_writing_weights": True, "fold_ln": False, "center_unembed": True},
            seqpos_slice=[1, None],
        )
        out = tmp_path / "run"
        outcome = kronsae("import", sae, "--model", place.model, "--text", place.text, "--out", out)
        assert outcome.status == 0, outcome.err
        (about,) = Run(out).imported.values()
        scale, processed, positions = about["remarks"]
        assert scale.startswith(f"{sae / 'cfg.json'}: the SAE was trained on activations that were scaled to a mean ")
        assert processed == (
            f"{sae} was trained on activations of a model that TransformerLens had processed (center_writing_weights); "
            "those of the Hugging Face model, on which it is measured here, can differ by this processing."
        )
        assert positions == (
            f"{sae} was trained on some positions of a window only (seqpos_slice = [1, None]); it is measured here on "
            "all of them."
        )
        assert about["settings"]["model_from_pretrained_kwargs"]["center_writing_weights"] is True
        assert about["settings"]["seqpos_slice"] == [1, None]
        for remark in about["remarks"]:
            assert remark in outcome.err.splitlines()
        assert "Warning" not in outcome.err

    def test_it_is_said_by_each_command_and_in_the_report(
        self, place: Place, tmp_path: Path, kronsae: Kronsae, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        sae_lens(tmp_path / "sae", model_from_pretrained_kwargs={"fold_ln": True})
        for _ in range(2):
            outcome = kronsae("eval", "sae", "--model", place.model, "--text", place.text, "--tokens", 50)
            assert outcome.status == 0, outcome.err
            assert outcome.err.count("TransformerLens had processed (fold_ln)") == 1
        (folder,) = Path("runs/imported").iterdir()
        assert "TransformerLens had processed (fold_ln)" in Run(folder).report().read_text(encoding="utf-8")

    @pytest.mark.parametrize("metadata", [{"seqpos_slice": [None]}, {"model_from_pretrained_kwargs": {"fold_ln": 0}}])
    def test_what_changes_nothing_is_not_said(self, place: Place, tmp_path: Path, metadata: dict[str, Any]) -> None:
        lines: list[str] = []
        import_saes([sae_lens(tmp_path / "sae", **metadata)], tmp_path / "run", place, say=lines.append)
        assert lines == []

    @pytest.mark.parametrize(
        ("stated", "options", "used"),
        [(16, (), 16), (16, ("context_length=24",), 24), (1000, (), 64), ("many", (), 64), (-1, (), 64)],
    )
    def test_the_context(
        self, place: Place, tmp_path: Path, stated: object, options: tuple[str, ...], used: int
    ) -> None:
        sae = sae_lens(tmp_path / "sae", context_size=stated)
        assert import_saes([sae], tmp_path / "run", place, options=options).config.context_length == used

    def test_hooks_follow_the_type_of_the_model(self, place: Place, tmp_path: Path) -> None:
        sae = sae_lens(tmp_path / "sae", hook_name="blocks.2.hook_attn_out")
        named = shutil.copytree(str(place.model), tmp_path / "gpt2-small")  # a GPT-NeoX, whatever its folder is called
        run = import_saes([sae], tmp_path / "run", Place(model=str(named), text=place.text))
        assert run.config.hook == "layers.2.attention"

    def test_a_model_that_cannot_be_loaded(self, place: Place, tmp_path: Path) -> None:
        sae = sae_lens(tmp_path / "sae", model_name="no/such/model")
        assert refusal([sae], tmp_path / "run", Place(text=place.text)).startswith(
            "--model must be given: the files name the language model 'no/such/model', which cannot be loaded. "
        )


class TestRefused:
    def test_what_is_not_stated(self, foreign: Path, place: Place, tmp_path: Path) -> None:
        sae, out = foreign / "run" / "layers.2", tmp_path / "run"
        shutil.copytree(sae, tmp_path / "mine")
        assert refusal([sae], out, Place(text="x")) == (
            f"--model must be given: the files of {sae} do not state a language model."
        )
        assert refusal([tmp_path / "mine"], out, place) == (
            f"--hook must be given: the files of {tmp_path / 'mine'} do not state which hook it reads."
        )
        assert refusal([sae], out, Place(model=place.model)) == "--text must be given: what to measure the SAEs on."
        assert not out.exists()

    def test_another_width(self, place: Place, tmp_path: Path) -> None:
        sae = dense_sae(torch.randn(8, 4), torch.zeros(8), torch.randn(8, 4), torch.zeros(4), topk(2))
        ks.save(sae, tmp_path / "narrow")
        assert refusal(
            [tmp_path / "narrow"], tmp_path / "out", Place(model=place.model, text=place.text, hook="layers.1")
        ) == (
            f"{tmp_path / 'narrow'} reads 4 numbers per token; layers.1 of model '{place.model}' has 16. Give the "
            "model and the hook that it was trained on."
        )
        assert listing(tmp_path) == ["narrow", "narrow/cfg.json", "narrow/sae_weights.safetensors"]

    def test_hooks_that_do_not_fit_the_role(self, foreign: Path, place: Place, tmp_path: Path) -> None:
        at = {"model": place.model, "text": place.text, "hook": "layers.1"}
        sae, transcoder = foreign / "run" / "layers.2", foreign / "run" / READS
        assert refusal([sae], tmp_path / "out", Place(**at, write="layers.2")) == (
            f"--write must be left out for {sae}, which reconstructs the hook that it reads."
        )
        assert refusal([transcoder], tmp_path / "out", Place(**at)) == (
            f"--write must be given: {transcoder} is a transcoder, which writes another hook than it reads."
        )
        assert "hook must name a layer from 0 to 3" in refusal(
            [sae], tmp_path / "out", Place(model=place.model, text=place.text, hook="layers.9")
        )

    def test_a_folder_in_use(self, imported: Run, foreign: Path, place: Place) -> None:
        assert refusal([foreign / "gated"], imported.folder, place).startswith("out must be a new or empty folder; ")

    def test_a_full_disk(self, foreign: Path, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(path: Path, value: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("kronsae.runs.imported.write_sealed", full)
        with pytest.raises(UserError, match=r"must be writable; .*No space left"):
            import_saes([foreign / "gated"], tmp_path / "new" / "run", place)
        assert list((tmp_path / "new").iterdir()) == []

    def test_a_name_per_sae(self, foreign: Path, place: Place, tmp_path: Path) -> None:
        message = refusal([foreign / "gated"], tmp_path / "out", place, names=["a", "b"])
        assert message == "--name must be given once per SAE; got 2 names for 1 SAEs."

    def test_training(self, imported: Run, kronsae: Kronsae, tmp_path: Path) -> None:
        outcome = kronsae("train", "--config", imported.folder / "run.json", "--out", tmp_path / "new")
        assert outcome.sentence == (
            f"--config must describe a training; {imported.folder / 'run.json'} describes imported SAEs, whose "
            "training is not known. Give the run.json of a run that kronsae trained."
        )
        outcome = kronsae("train", "--recipe", "tiny", "--out", imported.folder)
        assert outcome.sentence == (
            f"out must be a new folder or one of a training; {imported.folder} holds imported SAEs (layers.2, gated), "
            "which kronsae can measure but not train or resume. Choose another --out."
        )


class TestEverythingWorks:
    """Measurements, report and interventions need nothing of a training."""

    @pytest.fixture
    def run(self, imported: Run, tmp_path: Path) -> Run:
        return Run(Path(shutil.copytree(imported.folder, tmp_path / "run")))

    @pytest.mark.parametrize(
        "words",
        [
            ["eval", "RUN", "--tokens", 60],
            ["eval", "ladder", "RUN", "--tokens", 40, "--sae", "layers.2"],
            ["eval", "latents", "RUN", "--tokens", 60],
            ["eval", "token-rule", "RUN"],
            ["steer", "RUN", "--sae", "gated", "--latent", 3, "--prompt", "the quick", "--new-tokens", 2],
            ["report", "RUN"],
        ],
        ids=lambda words: " ".join(map(str, words[:2])),
    )
    def test_a_command(self, run: Run, kronsae: Kronsae, words: list[object]) -> None:
        outcome = kronsae(*(run.folder if word == "RUN" else word for word in words))
        assert outcome.status == 0, outcome.err
        assert "What now? " in outcome.err

    def test_the_ladder_refuses_thresholds(self, run: Run, kronsae: Kronsae) -> None:
        shutil.rmtree(run.folder / "saes")  # nothing is loaded
        for words in ((), ("--sae", "gated")):
            assert kronsae("eval", "ladder", run.folder, *words).sentence == (
                "the ladder needs SAEs with sparsifier 'topk', as it compares codes of equal k; 'gated' has "
                "'jumprelu', with thresholds. Choose an SAE with TopK by --sae."
            )

    def test_the_report_says_where_they_come_from(self, run: Run) -> None:
        page = run.report().read_text(encoding="utf-8")
        assert "imported from" in page
        assert "(dictionary_learning)" in page


class TestASingleSAEInPlaceOfARun:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.copytree(foreign, tmp_path / "foreign")
        monkeypatch.chdir(tmp_path)

    def test_it_is_imported_once(self, place: Place, kronsae: Kronsae, tmp_path: Path) -> None:
        at = ["--model", place.model, "--text", place.text]
        first = kronsae("eval", "foreign/run/layers.2", *at, "--tokens", 50, "--pursuit", "rounds=2", "--json", "-q")
        assert first.status == 0, first.err
        (folder,) = Path("runs/imported").iterdir()
        assert folder.name.startswith("layers.2-")
        assert f"Imported foreign/run/layers.2 into the run folder {folder}." in first.err
        assert [row["name"] for row in first.json["saes"]] == ["layers.2", "layers.2 + pursuit"]
        again = kronsae("eval", "ladder", "foreign/run/layers.2", "--tokens", 30, *at, "--json", "-q")
        assert again.json["saes"][0]["sae"] == "layers.2"
        assert f"Using {folder}, into which this SAE was imported before." in again.err
        other = kronsae("report", "foreign/run/layers.2", *at, "--hook", "layers.1", "-q")
        assert other.status == 0, other.err
        assert len(list(Path("runs/imported").iterdir())) == 2

    def test_a_folder_that_holds_saes(self, place: Place, kronsae: Kronsae) -> None:
        """A folder of a run of sparsify holds one here, and the folder above it several."""
        at = ["--model", place.model, "--text", place.text, "--tokens", 50, "-q"]
        shutil.rmtree("foreign/run/layers.3.mlp")
        done = kronsae("eval", "foreign/run", *at, "--json")
        assert done.status == 0, done.err
        assert [row["name"] for row in done.json["saes"]] == ["run"]
        assert kronsae("eval", "foreign", *at).sentence.startswith("foreign holds ")
        Path("empty").mkdir()
        assert kronsae("report", "empty", "--text", place.text).sentence.startswith("empty must hold an SAE; ")

    def test_what_is_missing_is_said(self, place: Place, kronsae: Kronsae, imported: Run) -> None:
        assert kronsae("eval", "foreign/gated").sentence == (
            "--text must be given to measure foreign/gated, an SAE: no file says what to measure it on."
        )
        missing = kronsae("eval", "latents", "foreign/run/layers.2", "--text", place.text)
        assert (
            missing.sentence
            == "--model must be given: the files of foreign/run/layers.2 do not state a language model."
        )
        given = kronsae("eval", "ladder", imported.folder, "--hook", "layers.1")
        assert given.sentence == (
            f"--hook must be left out for a run, whose run.json has them; got {imported.folder}. They are for the "
            "folder of a single SAE."
        )
        assert kronsae("report", "--text", "x").sentence.startswith("--text must be given with an SAE: ")
        assert not Path("runs").exists()

    def test_an_sae_of_ours_names_its_text_and_its_run(
        self, finished_run: Run, kronsae: Kronsae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = finished_run.config.text.source
        start = f"it was trained on '{text}'. Give --text {text}"
        shutil.copytree(finished_run.folder, tmp_path / "a run")
        sae = "a run/saes/kron"
        assert kronsae("eval", sae).sentence == (
            f"--text must be given to measure {sae}, an SAE; {start}, or measure its run: kronsae eval 'a run'."
        )
        monkeypatch.chdir(tmp_path / "a run" / "saes")
        assert kronsae("eval", "kron").sentence.endswith(f"measure its run: kronsae eval '{tmp_path / 'a run'}'.")
        shutil.copytree("kron", tmp_path / "alone")
        assert kronsae("eval", tmp_path / "alone").sentence == (
            f"--text must be given to measure {tmp_path / 'alone'}, an SAE; {start}."
        )

    def test_one_of_a_repository_of_the_hub(self, hub: Hub, place: Place, kronsae: Kronsae, tmp_path: Path) -> None:
        """Of dictionary_learning, and of Gemma Scope, whose files name no model and no hook here."""
        gemma_scope(tmp_path / "layer_2")
        dictionary_learning(tmp_path / "trainer_1", "BatchTopKSAE")
        files = files_of(tmp_path / "layer_2", "sub/layer_2/") | files_of(tmp_path / "trainer_1", "sub/trainer_1/")
        hub.add("user/repo", files)
        at = ["--model", place.model, "--text", place.text]
        run = tmp_path / "run"
        outcome = kronsae("import", "user/repo/sub/trainer_1", "user/repo/sub/layer_2", *at, "--out", run)
        assert (
            outcome.sentence
            == "--hook must be given: the files of user/repo/sub/layer_2 do not state which hook it reads."
        )
        outcome = kronsae("import", "user/repo/sub/trainer_1", "user/repo/sub/layer_2", *at, "--hook", 2, "--out", run)
        assert outcome.status == 0, outcome.err
        about = Run(run).imported
        assert {name: (one["source"], one["format"]) for name, one in about.items()} == {
            "trainer_1": ("user/repo/sub/trainer_1", "dictionary_learning"),
            "layer_2": ("user/repo/sub/layer_2", "gemma_scope"),
        }
        outcome = kronsae("eval", "user/repo/sub/trainer_1", *at, "--tokens", 50, "--json", "-q")
        assert outcome.status == 0, outcome.err
        assert [row["name"] for row in outcome.json["saes"]] == ["trainer_1"]
        assert kronsae("eval", "latents", "user/repo/sub/trainer_2", *at).sentence.startswith(
            "name must be one of sub/layer_2, sub/trainer_1 for user/repo at commit "
        )

    def test_a_path_that_does_not_exist_is_no_sae(self, kronsae: Kronsae) -> None:
        assert kronsae("eval", "no/run").sentence.startswith("the run folder must exist; there is no no/run.")

    def test_help_names_the_options(self, kronsae: Kronsae) -> None:
        for words in (["eval", "ladder"], ["eval", "table"], ["report"]):
            assert "--hook" in kronsae(*words, "--help").out


def test_the_command(foreign: Path, place: Place, kronsae: Kronsae, tmp_path: Path) -> None:
    at = ["--model", place.model, "--text", place.text, "--out", tmp_path / "run"]
    outcome = kronsae("import", foreign / "gated", foreign / "run" / "layers.2", *at, "--name", "a", "--name", "b")
    assert outcome.status == 0, outcome.err
    assert "a: dense-jumprelu, d_in=16, d_sae=40" in outcome.out
    assert f"What now? kronsae eval {tmp_path / 'run'}" in outcome.err
    told = json.loads((tmp_path / "run" / "run.json").read_text())["imported"]
    assert told["b"]["source"] == str(foreign / "run" / "layers.2")
    assert ks.load(tmp_path / "run", "b").d_sae == D_SAE
