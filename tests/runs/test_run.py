"""A run: content of its folder, sources of activations, and atomic creation of the folder."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import pkgutil
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.stopping import ctrl_c, go, interrupt_at
from tests.stored_activations import change_manifest
from tests.tiny_models import WIDTH, make_model, make_tokenizer
from tests.tiny_runs import STEPS, assert_same_run, listing, rows, texts, weights, write_jsonl

import kronsae as ks
from kronsae.data.model import ModelConfig
from kronsae.data.text import TextConfig
from kronsae.runs import run as run_module
from kronsae.runs.config import RunConfig, with_overrides
from kronsae.runs.harvest import harvest, with_activations
from kronsae.runs.run import Interrupted, Run, open_run
from kronsae.support.errors import UserError
from kronsae.support.files import folder_lock
from kronsae.training.config import LoopConfig

FolderOf = Callable[[str], Path]


class TestAFinishedRun:
    def test_its_folder(self, finished_run: Run) -> None:
        inside = [path for path in listing(finished_run.folder) if not path.startswith(("evaluation", "latents"))]
        assert [path for path in inside if path not in ("summary.json", "report.html")] == [
            "metrics.jsonl",
            "run.json",
            "saes",
            "saes/kron",
            "saes/kron/cfg.json",
            "saes/kron/sae_weights.safetensors",
            "saes/topk",
            "saes/topk/cfg.json",
            "saes/topk/sae_weights.safetensors",
            "training.json",
        ]
        assert finished_run.finished
        assert finished_run.names == ["topk", "kron"]

    def test_what_print_shows(self, finished_run: Run, tmp_path: Path) -> None:
        of_kron = f"kronecker-topk, d_in={WIDTH}, d_sae=32, k=4, num_heads=8, d_base=2, d_extension=2"
        assert repr(finished_run).splitlines() == [
            f"Run('{finished_run.folder}'): finished, {finished_run.config.model.name} at layers.2",
            f"  topk: dense-topk, d_in={WIDTH}, d_sae=32, k=4",
            f"  kron: {of_kron}",
        ]
        assert repr(finished_run.load("kron")).splitlines()[:2] == ["SAE(", f"  {of_kron}"]
        assert repr(Run(tmp_path)) == f"Run('{tmp_path}'): not trained yet"
        shutil.copy(finished_run.folder / "run.json", tmp_path)
        assert repr(Run(tmp_path)).splitlines()[0].startswith(f"Run('{tmp_path}'): not finished, ")
        assert repr(Run(tmp_path)).splitlines()[2] == "  kron: kronecker-topk, d_sae=32, k=4"

    def test_its_config_comes_back(self, finished_run: Run, config: RunConfig) -> None:
        assert open_run(finished_run.folder).config == config

    def test_its_metrics(self, finished_run: Run) -> None:
        steps = [*range(3, STEPS, 3), STEPS]
        assert [(row["step"], row["sae"]) for row in finished_run.metrics()] == list(
            itertools.product(steps, ("topk", "kron"))
        )
        assert any(row["auxiliary_loss"] > 0 for row in finished_run.metrics()), "AuxK should have had work to do"

    def test_its_training_summary(self, finished_run: Run) -> None:
        training = json.loads((finished_run.folder / "training.json").read_text())
        assert (training["steps"], training["tokens"]) == (STEPS, 64 * STEPS)
        assert training["sae_seconds"].keys() == {"topk", "kron"}

    def test_its_saes_know_where_they_belong(self, finished_run: Run, config: RunConfig) -> None:
        metadata = json.loads((finished_run.folder / "saes" / "kron" / "cfg.json").read_text())["metadata"]
        assert metadata["model_name"] == config.model.name
        assert (metadata["hook_name"], metadata["tokens"]) == ("layers.2", 64 * STEPS)
        assert metadata["training"]["name"] == "kron"

    def test_its_saes_can_be_used(self, finished_run: Run) -> None:
        saes = finished_run.saes()
        assert {name: (sae.d_in, sae.d_sae) for name, sae in saes.items()} == {"topk": (WIDTH, 32), "kron": (WIDTH, 32)}
        with pytest.raises(
            UserError, match=r"^name must be one of the SAEs of .*, topk, kron; got 'korn'. Did you mean 'kron'\?$"
        ):
            finished_run.load("korn")

    def test_it_can_be_compared_reported_and_looked_into(self, finished_run: Run, tmp_path: Path) -> None:
        shutil.copytree(finished_run.folder, tmp_path / "r")
        run = open_run(tmp_path / "r")
        comparison = run.compare(tokens=60)
        assert [row["name"] for row in comparison.rows] == ["topk", "kron"]
        assert "CE recovered" in str(comparison)
        assert "kron" in str(comparison)
        assert run.report() == tmp_path / "r" / "report.html"
        x_BD = run.activations(50)
        assert (x_BD.shape, x_BD.dtype) == ((50, WIDTH), torch.float32)
        assert run.load("kron").encode(x_BD).l0() > 0
        assert torch.equal(run.activations(70)[:50], x_BD)

    def test_held_out_activations_are_never_given_twice(self, finished_run: Run) -> None:
        message = r"^tokens must be at most the \d+ tokens of the held-out text; got 100000\. Ask for fewer, "
        with pytest.raises(UserError, match=message) as caught:
            finished_run.activations(100_000)
        there_are = int(re.findall(r"at most the (\d+) tokens", str(caught.value))[0])
        assert len(finished_run.activations(there_are)) == there_are
        with pytest.raises(UserError):
            finished_run.activations(there_are + 1)
        for wrong in (0, -1, True):
            with pytest.raises(UserError, match=rf"^tokens must be a whole number above 0; got {wrong}.$"):
                finished_run.activations(wrong)

    def test_given_again_it_says_so_and_trains_nothing(
        self, finished_run: Run, config: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(run_module, "fit", None)
        before = {path: (finished_run.folder / path).stat().st_mtime_ns for path in listing(finished_run.folder)}
        said: list[str] = []
        assert go(config, finished_run.folder, say=said.append) == finished_run
        assert said == [f"The run in {finished_run.folder} is already finished; nothing is trained or logged."]
        assert before == {
            path: (finished_run.folder / path).stat().st_mtime_ns for path in listing(finished_run.folder)
        }

    def test_it_depends_on_nothing_but_its_config(self, finished_run: Run, config: RunConfig, tmp_path: Path) -> None:
        assert_same_run(finished_run, go(config, tmp_path / "again"))

    def test_another_seed_gives_other_weights(self, finished_run: Run, config: RunConfig, tmp_path: Path) -> None:
        other = weights(go(with_overrides(config, seed=1), tmp_path / "other"))
        assert not any(torch.equal(value, other[name]) for name, value in weights(finished_run).items())


class TestTheFolder:
    def test_a_different_run_is_reported_with_what_differs(self, finished_run: Run, config: RunConfig) -> None:
        before = listing(finished_run.folder)
        with pytest.raises(UserError) as caught:
            go(replace(config, hook="layers.1"), finished_run.folder)
        assert str(caught.value) == (
            f"out must be a new folder or hold a run with the same config; {finished_run.folder} holds a different run "
            "(hook: 'layers.2' -> 'layers.1'). Choose another --out, or remove the folder."
        )
        with pytest.raises(
            UserError, match=r"\(hook: .*; saes\[0\]\.seed: 0 -> 3; saes\[1\]\.seed: 0 -> 3; and 1 more\)"
        ):
            go(replace(with_overrides(config, seed=3), hook="layers.1"), finished_run.folder)
        assert listing(finished_run.folder) == before

    def test_a_file(self, config: RunConfig, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("mine")
        with pytest.raises(UserError, match=rf"^out must be a folder; {path} is a file. Name another one.$"):
            go(config, path)
        with pytest.raises(
            UserError, match=rf"^out must be a folder that can be created; {path}/x/y cannot be created in {path}\."
        ):
            go(config, path / "x" / "y")
        assert path.read_text() == "mine"

    def test_other_files(self, config: RunConfig, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(
            UserError,
            match=rf"^out must be a new or empty folder or a run; {tmp_path} holds other files. Choose another one.$",
        ):
            go(config, tmp_path)
        assert listing(tmp_path) == ["thesis.tex"]

    def test_a_foreign_run_json(self, config: RunConfig, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(UserError, match=r"run.json must be written by kronsae; it has no 'config' entry.$"):
            go(config, tmp_path)
        (tmp_path / "run.json").write_text("{")
        with pytest.raises(UserError, match="cannot be read as JSON"):
            open_run(tmp_path)

    def test_an_empty_folder_will_do(self, config: RunConfig, tmp_path: Path) -> None:
        (tmp_path / ".run.json.k3j2").touch()  # left by a process killed while it wrote run.json
        short = replace(config, loop=LoopConfig(tokens=64, batch_tokens=64))
        assert go(short, tmp_path).finished

    def test_another_process_is_at_work_in_it(self, finished_run: Run, config: RunConfig, tmp_path: Path) -> None:
        with folder_lock(tmp_path / "r"):
            with pytest.raises(UserError, match=rf"another kronsae process is writing to {tmp_path / 'r'}\."):
                go(config, tmp_path / "r")
            assert listing(tmp_path / "r") == [".lock"]
        with folder_lock(finished_run.folder):
            assert go(config, finished_run.folder) == finished_run  # it is only read

    def test_a_run_that_another_one_ended_meanwhile_is_left_alone(
        self, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other process starts and finishes the run after the first check of the folder."""
        short = replace(config, loop=LoopConfig(tokens=64, batch_tokens=64))

        def late(folder: Path) -> AbstractContextManager[None]:
            monkeypatch.setattr(run_module, "folder_lock", folder_lock)
            go(short, folder)
            monkeypatch.setattr(run_module, "fit", None)
            return folder_lock(folder)

        monkeypatch.setattr(run_module, "folder_lock", late)
        said: list[str] = []
        go(short, tmp_path / "r", say=said.append)
        assert said == [f"The run in {tmp_path / 'r'} is already finished; nothing is trained or logged."]

    def test_no_run_folder(self, tmp_path: Path) -> None:
        message = (
            rf"^the run folder must exist; there is no {tmp_path / 'x'}. Give the --out of an earlier `kronsae train`.$"
        )
        with pytest.raises(UserError, match=message):
            open_run(tmp_path / "x")

    @pytest.mark.parametrize("asked", [{"wandb": "project"}, {"tensorboard": True}])
    def test_a_sink_that_is_not_installed_leaves_nothing_behind(
        self, asked: dict[str, Any], config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in asked else find(name, *a))
        with pytest.raises(
            UserError, match=r"must be installed to log to it\. Install it with: pip install 'kronsae\["
        ):
            go(config, tmp_path / "r", **asked)
        assert not (tmp_path / "r").exists()

    def test_tensorboard_events_lie_in_the_run_folder(self, config: RunConfig, tmp_path: Path) -> None:
        run = go(replace(config, loop=LoopConfig(tokens=64, batch_tokens=64)), tmp_path / "r", tensorboard=True)
        assert len(list((run.folder / "tensorboard").glob("events.out.tfevents.*"))) == 1


class TestActivations:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_reported_with_its_place_before_anything_is_written(
        self, value: float, config: RunConfig, tmp_path: Path
    ) -> None:
        model: Any = make_model("gpt_neox")
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.bias.data[3] = value
        model.save_pretrained(tmp_path / "m")
        make_tokenizer("gpt_neox").save_pretrained(tmp_path / "m")
        # without a pool of windows, the first token is that of the text
        config = replace(config, model=ModelConfig(name=str(tmp_path / "m"), device="cpu"), window_pool_tokens=0)
        with pytest.raises(UserError) as caught:
            go(config, tmp_path / "r")
        message = str(caught.value)
        assert message.startswith(
            "activations must be finite; hook 'layers.2' gave NaN or infinity in batch 0, document '"
        )
        assert "', token 0. Check the model's weights" in message
        assert not (tmp_path / "r").exists()

    def test_a_text_shorter_than_the_buffer_is_repeated(self, config: RunConfig, tmp_path: Path) -> None:
        """Some 300 tokens, a buffer of 4,096, and 1,280 to train on: epoch after epoch."""
        text = TextConfig(source=str(write_jsonl(tmp_path / "short.jsonl", 8)))
        run = go(replace(config, text=text, buffer_tokens=4096), tmp_path / "r")
        assert run.metrics()[-1]["tokens"] == 64 * STEPS

    def test_a_text_that_leaves_nothing_to_evaluate_on_is_reported_before_training(
        self, config: RunConfig, tmp_path: Path
    ) -> None:
        text = TextConfig(source=str(write_jsonl(tmp_path / "short.jsonl", 3)))
        said: list[str] = []
        changes: dict[str, Any] = {"text": text, "held_out_share": 0.001}
        go(replace(config, loop=LoopConfig(tokens=64, batch_tokens=64), **changes), tmp_path / "r", say=said.append)
        assert said[-2].startswith(
            "Warning: `kronsae eval` will have no held-out text: held_out_share must leave a document"
        )

    def test_a_text_without_a_usable_token(self, config: RunConfig, tmp_path: Path) -> None:
        path = tmp_path / "empty.txt"
        path.write_text(" \n\n")
        with pytest.raises(
            UserError, match=r"^text: a source must contain text; .*empty.txt has none. Give another source.$"
        ):
            go(replace(config, text=TextConfig(source=str(path))), tmp_path / "r")
        path.write_text("<|endoftext|>")
        with pytest.raises(UserError, match=r"^text must contain tokens that are neither padding nor special"):
            go(replace(config, text=TextConfig(source=str(path))), tmp_path / "r")
        assert not (tmp_path / "r").exists()


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: FolderOf, text_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("harvest") / "acts"
    about = harvest(
        model=str(tiny_model_folder("gpt_neox")),
        text=str(text_file),
        hook="layers.2",
        tokens=600,
        out=folder,
        context_length=32,
        held_out_share=0.2,
    )
    assert (about["tokens"], about["hooks"], about["shards"]) == (600, {"layers.2": WIDTH}, 1)
    return folder


class TestHarvested:
    def test_the_model_is_not_loaded_and_resume_is_exact(
        self, harvested: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stored = with_activations(replace(config, hook="layers.0", context_length=16), harvested)
        assert (stored.hook, stored.context_length, stored.text) == ("layers.2", 32, config.text)
        monkeypatch.setattr("kronsae.runs.pipeline.load_model", None)
        whole = go(stored, tmp_path / "whole")
        with monkeypatch.context() as patch:
            interrupt_at(patch, 10, ctrl_c)
            with pytest.raises(Interrupted):
                go(stored, tmp_path / "r")
        assert_same_run(whole, go(stored, tmp_path / "r"))

    def test_its_hook_cannot_be_another_one(self, harvested: Path, config: RunConfig, tmp_path: Path) -> None:
        stored = replace(with_activations(config, harvested), hook="layers.1")
        with pytest.raises(UserError) as caught:
            go(stored, tmp_path / "r")
        assert str(caught.value) == (
            f"hook must be one of those harvested into {harvested}: layers.2; got 'layers.1'. "
            "Leave hook out, or harvest it."
        )
        assert not (tmp_path / "r").exists()

    def test_a_folder_that_is_none(self, config: RunConfig, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"has no manifest.json. Harvest into it first"):
            with_activations(config, tmp_path)

    def test_a_folder_that_was_written_otherwise(self, harvested: Path, config: RunConfig, tmp_path: Path) -> None:
        shutil.copytree(harvested, tmp_path / "acts")
        change_manifest(tmp_path / "acts", metadata={})
        with pytest.raises(
            UserError, match=r"must name model, text and hook; that of .* does not. Harvest with `kronsae harvest`"
        ):
            with_activations(config, tmp_path / "acts")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"held_out_share": 0}, r"^held_out_share must be between 0 and 1; got 0.$"),
            ({"held_out_share": 1.0}, r"^held_out_share must be between 0 and 1; got 1.0.$"),
            ({"held_out_share": float("nan")}, r"^held_out_share must be between 0 and 1; got nan.$"),
            ({"tokens": 0}, r"^tokens must be a whole number above 0; got 0.$"),
            ({"context_length": 1.5}, r"^context_length must be a whole number above 0; got 1.5.$"),
            ({"model_batch": 0}, r"^model_batch must be a whole number above 0; got 0.$"),
            ({"seed": -1}, r"^seed must be from 0 to 2\*\*63 - 1; got -1.$"),
            ({"shard_bytes": 0}, r"^shard_bytes must be a whole number above 0; got 0.$"),
            ({"dtype": "flaot32"}, r"^dtype must be one of .*; got 'flaot32'. Did you mean 'float32'\?$"),
            ({"out": Path(os.devnull) / "x"}, rf"^out must be a folder that can be created; {os.devnull}/x cannot"),
            ({"out": Path(__file__)}, r"^out must be a folder; .*test_run.py is a file. Name another one.$"),
            ({"out": Path(__file__).parent}, r"^out must be a new or empty folder, or hold a harvest; .*runs contains"),
            ({"text": TextConfig(split=cast("Any", 3))}, r"^text.split must be str; got 3.$"),
        ],
    )
    def test_a_harvest_that_cannot_work_is_refused_before_the_model_is_loaded(
        self, changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kronsae.runs.harvest.load_model", None)
        asked: dict[str, Any] = {"model": "bundled", "text": "bundled", "hook": 1, "tokens": 9, "out": tmp_path / "h"}
        with pytest.raises(UserError, match=message):
            harvest(**asked | changes)
        assert listing(tmp_path) == []

    def test_a_harvest_takes_configs(self, config: RunConfig, tmp_path: Path) -> None:
        rows = [json.dumps({"content": text}) for text in texts()]
        (tmp_path / "t.jsonl").write_text("\n".join(rows))
        text = TextConfig(source=str(tmp_path / "t.jsonl"), column="content")
        model = replace(config.model, dtype="bfloat16")
        about = harvest(model=model, text=text, hook=2, tokens=50, out=str(tmp_path / "h"), context_length=32)
        assert (about["model"], about["hooks"], about["tokens"]) == (model.name, {"2": WIDTH}, 50)
        stored = with_activations(config, tmp_path / "h")
        assert (stored.model, stored.text, stored.hook) == (model, text, "2")

    def test_a_harvest_that_fails_leaves_nothing(self, tiny_model_folder: FolderOf, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text(" ".join(texts(30)))
        arguments: dict[str, Any] = {"text": str(tmp_path / "t.txt"), "hook": "layers.9", "tokens": 50}
        with pytest.raises(UserError, match="hook must name a layer from 0 to 3"):
            harvest(model=str(tiny_model_folder("gpt2")), out=tmp_path / "h", context_length=32, **arguments)
        assert not (tmp_path / "h").exists()


class TestInPython:
    def test_train(self, tiny_model_folder: FolderOf, text_file: Path, tmp_path: Path) -> None:
        run = ks.train(
            model=str(tiny_model_folder("gpt2")),
            text=str(text_file),
            hook=1,
            tokens=256,
            batch_tokens=64,
            saes=[ks.topk(d_sae=32, k=4), ks.kron(num_heads=4, d_base=2, d_extension=4, k=4)],
            out=tmp_path / "r",
            show_progress=False,
            context_length=32,
            buffer_tokens=128,
            held_out_share=0.2,
        )
        sae = ks.load(tmp_path / "r", "kron")
        codes = sae.encode(torch.randn(3, WIDTH))
        assert sae.decode(codes).shape == (3, WIDTH)
        assert (run.config.hook, run.config.loop.tokens) == ("1", 256)
        assert (run.folder, ks.open_run(run.folder)) == (tmp_path / "r", run)

    def test_no_module_hides_a_public_name(self) -> None:
        """Importing ``kronsae.x`` binds ``x`` in the package, so a module must not have a public function's name."""
        modules = {module.name for module in pkgutil.iter_modules(ks.__path__)}
        assert modules.isdisjoint(ks.__all__)
        assert ks.train is run_module.train

    def test_an_unknown_argument_names_the_nearest(self, tmp_path: Path) -> None:
        with pytest.raises(
            UserError, match=r"^'contxt_length' is not an argument of train. Did you mean 'context_length'\?$"
        ):
            ks.train(
                model="bundled",
                text="bundled",
                hook="layers.1",
                tokens=9000,
                saes=[ks.topk(d_sae=8, k=2)],
                out=tmp_path / "r",
                contxt_length=3,
            )

    def test_a_hook_is_needed_unless_every_sae_reads_its_own(
        self, config: RunConfig, text_file: Path, tmp_path: Path
    ) -> None:
        asked: dict[str, Any] = {"model": config.model.name, "text": str(text_file), "tokens": 128, "batch_tokens": 64}
        asked |= {"buffer_tokens": 128, "context_length": 32, "held_out_share": 0.2, "show_progress": False}
        own = ks.topk(d_sae=8, k=2, read="layers.3,layers.1")
        run = ks.train(saes=[own], out=tmp_path / "r", **asked)
        assert (run.config.hook, run.config.hooks) == ("layers.3", ("layers.3", "layers.1"))
        with pytest.raises(
            UserError, match=r"^hook, such as 'layers.6', or read= of every SAE must be given; got neither"
        ):
            ks.train(saes=[own, ks.topk(d_sae=8, k=2, name="b")], out=tmp_path / "s", **asked)

    def test_what_could_not_be_read_back_is_not_written(self, config: RunConfig, tmp_path: Path) -> None:
        wrong: Any = "yes"
        broken = replace(config, saes=(ks.topk(d_sae=8, k=2, unit_norm_decoder=wrong),))
        with pytest.raises(UserError, match=r"^config.saes\[0\].unit_norm_decoder must be bool; got 'yes'.$"):
            go(broken, tmp_path / "r")
        assert not (tmp_path / "r").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"saes": ()}, r"^saes must name at least one SAE; got none. Add kronsae.topk"),
            (
                {"saes": (ks.topk(d_sae=8, k=2), ks.topk(d_sae=4, k=2))},
                r"^saes must have different names; got topk, topk. Give name= to each.$",
            ),
            ({"buffer_tokens": 63}, r"^buffer_tokens must be at least batch_tokens; got 63 with batch_tokens=64\."),
            ({"context_length": 0}, r"^context_length must be a whole number above 0; got 0.$"),
            ({"eval_tokens": 1.5}, r"^eval_tokens must be a whole number above 0; got 1.5.$"),
            ({"held_out_share": 1.0}, r"^held_out_share must be between 0 and 1; got 1.0.$"),
        ],
    )
    def test_a_run_that_cannot_work(self, changes: dict[str, Any], message: str, config: RunConfig) -> None:
        with pytest.raises(UserError, match=message):
            replace(config, **changes)

    def test_overrides(self, config: RunConfig) -> None:
        one = (ks.topk(d_sae=8, k=2, seed=7),)
        changed = with_overrides(config, model="m", text="t", hook="h", tokens=640, seed=3, saes=one)
        assert (changed.model, changed.text.source) == (replace(config.model, name="m"), "t")
        assert (changed.hook, changed.loop.tokens, changed.seed) == ("h", 640, 3)
        assert changed.saes == one
        assert with_overrides(config) == config
        assert [member.seed for member in with_overrides(config, seed=3).saes] == [3, 3]


def test_rows_leave_out_the_times_alone(finished_run: Run) -> None:
    assert set(finished_run.metrics()[0]) - set(rows(finished_run)[0]) == {"seconds", "member_seconds"}
    assert os.environ["HF_HUB_OFFLINE"] == "1"
