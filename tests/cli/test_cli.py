"""The command line: every command, stdout that is pure JSON with --json, and short errors."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.command_line import KRON, Kronsae, Outcome, without
from tests.tiny_runs import assert_same_run, listing, tiny_config

from kronsae import __version__
from kronsae.cli import main as cli
from kronsae.data.model import ModelConfig
from kronsae.data.text import TextConfig
from kronsae.runs.config import RunConfig
from kronsae.runs.parsing import parse_sae, with_options
from kronsae.runs.recipes import QUICKSTARTS, kron, topk
from kronsae.runs.run import Run, execute, open_run
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError
from kronsae.training.config import LoopConfig
from kronsae.training.member import Member

FolderOf = Callable[[str], Path]
VERBS = ("quickstart", "train", "eval", "report", "harvest", "recipes")


class TestHelp:
    def test_the_whole(self, kronsae: Kronsae) -> None:
        shown = kronsae("--help")
        assert shown.status == 0
        assert all(verb in shown.out for verb in VERBS)
        assert "kronsae quickstart" in shown.out

    @pytest.mark.parametrize(
        ("verb", "options"),
        [
            ("quickstart", "--model --text --out --tokens --json --quiet"),
            (
                "train",
                "--out --recipe --config --model --text --hook --tokens --flops --same-flops-as --sae --seed --set "
                "--activations --dry-run "
                "--tensorboard --wandb --quiet --json",
            ),
            ("eval table", "--out --tokens --json"),
            ("report", "--out --json"),
            (
                "harvest",
                "--out --hook --tokens --model --revision --model-dtype --device --text --subset --split --column "
                "--dtype --context-length --model-batch --held-out-share --quiet --json",
            ),
            ("recipes", "--json"),
            (
                "sweep",
                "--out --grid --recipe --config --model --text --hook --activations --sae --tokens --flops "
                "--same-flops-as --seeds --set --group-size --dry-run --quiet --json",
            ),
        ],
    )
    def test_each_verb_names_its_options(
        self, verb: str, options: str, kronsae: Kronsae, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        shown = kronsae(*verb.split(), "--help")
        assert shown.status == 0
        assert [option for option in options.split() if option not in re.findall(r"--[a-z-]+", shown.out)] == []
        assert f"kronsae {verb}" in shown.out

    def test_the_version(self, kronsae: Kronsae) -> None:
        shown = kronsae("--version")
        assert (shown.status, shown.out.strip()) == (0, __version__)

    def test_without_a_verb_the_help_is_shown(self, kronsae: Kronsae) -> None:
        shown = kronsae()
        assert "quickstart" in shown.out + shown.err


class TestVerbs:
    def test_train_then_eval(self, base: list[str], kronsae: Kronsae, tmp_path: Path) -> None:
        out = tmp_path / "a run"
        trained = kronsae(*base, "--sae", KRON, "--sae", "topk d_sae=32 k=4 name=base", "--out", out, "--json")
        assert trained.status == 0
        assert trained.json["out"] == str(out)
        assert [(row["sae"], row["step"], row["tokens"]) for row in trained.json["saes"]] == [
            ("kron", 4, 256),
            ("base", 4, 256),
        ]
        assert "4 steps of 64 tokens at layers.2 of" in trained.err
        assert f"What now? kronsae eval '{out}'; kronsae report '{out}'" in trained.err

        evaluated = kronsae("eval", out, "--json")
        assert evaluated.status == 0
        for row in evaluated.json["saes"]:
            assert row["tokens"] == 256
            assert row["evaluation_tokens"] >= 100
            assert row["explained_variance"] <= 1
            assert row["ce_recovered"] is not None
        again = kronsae("eval", "--out", out, "--json")
        assert again.json == evaluated.json
        counted = evaluated.json["saes"][0]["evaluation_tokens"]
        assert f"Evaluated on {counted} held-out tokens (whole windows)." in evaluated.err
        assert f"Already evaluated on {counted} held-out tokens (whole windows)" in again.err
        assert kronsae("eval", out, "--tokens", 40, "--json").json != evaluated.json

        table = kronsae("eval", out)
        assert [word for word in ("kron", "base", "EV", "l0", "CE recovered") if word not in table.out] == []
        summary = json.loads((out / "summary.json").read_text())
        assert [row["name"] for row in summary["saes"]] == ["kron", "base"]

    def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
        self, base: list[str], kronsae: Kronsae, tmp_path: Path
    ) -> None:
        saes = ("--sae", "topk d_sae=64 k=4 name=base", "--sae", KRON)
        asked = (*base, *saes, "--same-flops-as", "base", "--out", tmp_path / "r", "--dry-run")
        shown = kronsae(*asked)
        assert (shown.status, "What now? the same command without --dry-run" in shown.err) == (0, True)
        for words in ("at layers.2 of", "base: dense-topk, 64 latents, ", "Memory: about ", "Disk: ", "Time: about "):
            assert words in shown.out
        figures = kronsae(*asked, "--json").json
        base_plan, kron_plan = figures["members"]
        assert (base_plan["tokens"], base_plan["steps"]) == (256, 4)
        assert kron_plan["steps"] == figures["steps"] > 4
        assert figures["seconds"] > 0
        in_flops = without([*base], "--tokens")
        budget = ("--flops", base_plan["flops"], *saes, "--out", tmp_path / "r", "--dry-run", "--json")
        assert [member["steps"] for member in kronsae(*in_flops, *budget).json["members"]] == [4, kron_plan["steps"]]
        assert listing(tmp_path) == []

    def test_a_finished_run_says_so_and_gives_the_same_figures(
        self, finished_run: Run, kronsae: Kronsae, tmp_path: Path
    ) -> None:
        given = kronsae("train", "--config", finished_run.folder / "run.json", "--out", finished_run.folder, "--json")
        assert given.status == 0
        assert "is already finished; nothing is trained or logged." in given.err
        assert given.json["saes"] == finished_run.metrics()[-2:]

    def test_stopped_and_given_again(
        self, finished_run: Run, kronsae: Kronsae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ("train", "--config", finished_run.folder / "run.json", "--out", tmp_path / "r", "--quiet")
        plain = Member.step

        def stopping(self: Member, x_BD: Any, step: int, want_metrics: bool) -> object:
            if step == 7 and self.name == "topk":
                signal.raise_signal(signal.SIGINT)
            return plain(self, x_BD, step, want_metrics)

        with monkeypatch.context() as patch:
            patch.setattr(Member, "step", stopping)
            stopped = kronsae(*command)
        assert stopped.status == 130
        assert stopped.err.splitlines()[-1].startswith("stopped after 512 of 1,280 tokens; a checkpoint is saved in ")
        assert "Traceback" not in stopped.err
        carried_on = kronsae(*command)
        assert carried_on.status == 0
        assert "Resuming after 512 of 1,280 tokens." in carried_on.err
        assert_same_run(finished_run, open_run(tmp_path / "r"))

    def test_sweep(self, base: list[str], kronsae: Kronsae, tmp_path: Path) -> None:
        words = ("sweep", *base[1:], "--sae", "topk d_sae=32 k={2,4}", "--seeds", "2", "--out", tmp_path / "s")
        planned = kronsae(*words, "--dry-run", "--json")
        assert [group["saes"] for group in planned.json["groups"]] == [["topk-k2", "topk-k4"]] * 2
        assert "4 SAEs to train in 2 group(s), seeds 0, 1" in kronsae(*words, "--dry-run").out
        assert listing(tmp_path) == []
        swept = kronsae(*words)
        assert swept.status == 0
        assert "topk-k4" in swept.out
        assert f"What now? open {tmp_path / 's' / 'sweep.html'} in a browser" in swept.err
        again = kronsae("sweep", "--grid", tmp_path / "s" / "sweep.json", "--out", tmp_path / "s", "--json")
        assert "4 are finished" in again.err
        assert [(row["name"], row["seed"]) for row in again.json["saes"]] == [
            (f"topk-k{k}", seed) for seed in (0, 1) for k in (2, 4)
        ]
        outcome = kronsae("sweep", "--recipe", "tiny", "--sae", "topk d_sae=32 k={2", "--out", tmp_path / "x")
        assert (outcome.status, outcome.sentence.startswith("--sae must have values between its braces")) == (2, True)

    def test_harvest_then_train_then_eval(
        self, tiny_model_folder: FolderOf, text_file: Path, kronsae: Kronsae, tmp_path: Path
    ) -> None:
        model = tiny_model_folder("gpt_neox")
        asked = f"--model {model} --text {text_file} --hook layers.1 --tokens 300 --context-length 32".split()
        harvested = kronsae("harvest", *asked, "--out", tmp_path / "acts", "--dtype", "bfloat16", "--json")
        assert harvested.status == 0
        figures = harvested.json
        assert figures.pop("seconds") > 0
        assert figures.pop("tokens_per_second") > 0
        assert 0 < figures.pop("lost_variance")["layers.1"] < 1e-4
        assert figures.pop("bytes") == (tmp_path / "acts" / "activations-00000.safetensors").stat().st_size
        assert "300 tokens at layers.1 (width 16) in bfloat16: " in harvested.err
        assert figures == {
            "out": str(tmp_path / "acts"),
            "model": str(model),
            "hooks": {"layers.1": 16},
            "tokens": 300,
            "dtype": "bfloat16",
            "shards": 1,
        }
        trained = kronsae(
            *("train", "--activations", tmp_path / "acts", "--sae", KRON, "--tokens", 640, "--quiet"),
            *("--set", "loop.batch_tokens=64", "--set", "buffer_tokens=128", "--out", tmp_path / "r", "--json"),
        )
        assert trained.status == 0
        assert trained.json["saes"][0]["tokens"] == 640
        evaluated = kronsae("eval", tmp_path / "r", "--tokens", 50, "--json")
        assert evaluated.status == 0
        assert evaluated.json["saes"][0]["ce_recovered"] is not None

    def test_harvest_for_a_person(
        self, tiny_model_folder: FolderOf, text_file: Path, kronsae: Kronsae, tmp_path: Path
    ) -> None:
        asked = ("--model", tiny_model_folder("gpt2"), "--text", text_file, "--hook", 0, "--tokens", 50)
        shown = kronsae("harvest", *asked, "--context-length", 32, "--out", tmp_path / "acts")
        assert "tokens: 50\n" in shown.out
        assert "What now? kronsae train --activations" in shown.err

    def test_harvest_passes_on_how_to_read_the_model_and_the_text(
        self, kronsae: Kronsae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: dict[str, Any] = {}
        monkeypatch.setattr("kronsae.runs.harvest.harvest", lambda **arguments: asked.update(arguments) or {})
        done = kronsae(
            *("harvest", "--out", "s3://bucket/acts", "--hook", 6, "--tokens", 50, "--model-batch", 8),
            *("--seed", 3, "--window-pool-tokens", 0, "--shard-mb", 2),
            *("--model", "google/gemma-2-2b", "--revision", "main", "--model-dtype", "bfloat16", "--device", "cuda:1"),
            *(
                "--text",
                "HuggingFaceFW/fineweb-edu",
                "--subset",
                "sample-10BT",
                "--split",
                "test",
                "--column",
                "content",
            ),
        )
        assert done.status == 0
        assert asked["model"] == ModelConfig(
            name="google/gemma-2-2b", revision="main", dtype="bfloat16", device="cuda:1"
        )
        assert asked["text"] == TextConfig(
            source="HuggingFaceFW/fineweb-edu", subset="sample-10BT", split="test", column="content"
        )
        assert (asked["hook"], asked["tokens"], asked["dtype"], asked["model_batch"]) == (["6"], 50, "float32", 8)
        assert (asked["seed"], asked["window_pool_tokens"], asked["shard_bytes"]) == (3, 0, 2**21)
        assert asked["out"] == "s3://bucket/acts"
        assert "What now? kronsae train --activations s3://bucket/acts --sae" in done.err

    def test_report(self, finished_run: Run, kronsae: Kronsae, tmp_path: Path) -> None:
        shutil.copytree(finished_run.folder, tmp_path / "r")
        written = kronsae("report", tmp_path / "r", "--json")
        assert written.status == 0
        assert [row["name"] for row in written.json["saes"]] == ["topk", "kron"]
        assert "<html" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")[:1000]
        assert f"What now? open {tmp_path / 'r' / 'report.html'} in a browser" in written.err
        assert kronsae("report", "--out", tmp_path / "r", "--json").json == written.json

    def test_quickstart(
        self, finished_run: Run, kronsae: Kronsae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(QUICKSTARTS, "bundled", lambda: finished_run.config)
        done = kronsae("quickstart", "--out", tmp_path / "q", "--tokens", 128, "--json", "--quiet")
        assert done.status == 0
        names = ("topk", "topk + pursuit", "kron", "kron + pursuit")
        assert [(row["name"], row["tokens"]) for row in done.json["saes"]] == [(name, 128) for name in names]
        own, pursued = (done.json["saes"][n]["explained_variance"] for n in (0, 1))
        assert own != pursued
        assert {"summary.json", "report.html", "run.json", "saes"} <= set(listing(tmp_path / "q"))
        summary = json.loads((tmp_path / "q" / "summary.json").read_text())["saes"]
        keys = (
            "name architecture parameters encoder_parameters training_flops tokens explained_variance l0 dead_share "
            "ce_recovered seconds"
        )
        assert [list(row) for row in summary] == [keys.split()] * 2
        again = kronsae("quickstart", "--out", tmp_path / "q", "--tokens", 128, "--json", "--quiet")
        assert "is already finished; nothing is trained or logged." in again.err
        assert again.json == done.json

    def test_architectures_name_the_options_of_encoders_and_codes(self, kronsae: Kronsae) -> None:
        shown = kronsae("architectures").out
        for option in ("null_symbols=true", "d_trunk=256", "pursuit_rounds=2"):
            assert option in shown
            parse_sae(f"kron num_heads=64 d_base=2 d_extension=4 k=8 {option}")

    def test_recipes(self, kronsae: Kronsae) -> None:
        assert {"quickstart", "tiny"} <= kronsae("recipes", "--json").json.keys()
        assert "tiny: A small KronSAE" in kronsae("recipes").out

    def test_the_seed_is_that_of_every_sae_that_names_none(
        self, base: list[str], kronsae: Kronsae, tmp_path: Path
    ) -> None:
        saes = ("--sae", KRON, "--sae", "topk d_sae=32 k=4 seed=9")
        assert kronsae(*base, *saes, "--seed", 5, "--out", tmp_path / "r").status == 0
        config = open_run(tmp_path / "r").config
        assert (config.seed, [member.seed for member in config.saes]) == (5, [5, 9])

    def test_a_recipe_s_saes_take_the_seed(self, monkeypatch: pytest.MonkeyPatch, kronsae: Kronsae) -> None:
        asked: list[RunConfig] = []

        def remember(config: RunConfig, out: Path, **_: Any) -> Run:
            asked.append(config)
            return Run(out)

        monkeypatch.setattr("kronsae.runs.run.execute", remember)
        words = ("train", "--recipe", "tiny", "--seed", 4, "--hook", "layers.1", "--tokens", 4096, "--out", "o")
        assert kronsae(*words, "--set", "saes.0.optimizer.lr=1e-3", "--set", "loop.log_every=1").status == 0
        (config,) = asked
        assert (config.seed, config.saes[0].seed, config.hook, config.loop.tokens) == (4, 4, "layers.1", 4096)
        assert (config.saes[0].optimizer.lr, config.loop.log_every) == (1e-3, 1)

    @pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "parquet"])
    def test_every_kind_of_text(self, suffix: str, base: list[str], kronsae: Kronsae, tmp_path: Path) -> None:
        texts = [f"Document {number} says that the fox has jumped over {number} dogs. " * 3 for number in range(12)]
        path = tmp_path / f"text.{suffix}"
        if suffix == "parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
        elif suffix == "jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        elif suffix == "json":
            path.write_text(json.dumps([{"text": text} for text in texts]))
        else:
            path.write_text("\n\n".join(texts * 20))
        asked = [*without(base, "--text"), "--text", str(path), "--sae", "topk d_sae=32 k=4"]
        assert kronsae(*asked, "--out", tmp_path / "r", "--json").json["saes"][0]["tokens"] == 256


class TestWords:
    def test_an_sae_in_words_is_the_call(self) -> None:
        words = "kron num_heads=512 d_base=2 d_extension=4 k=32 lr=1e-3 name=mine gate=mand_eps unit_norm_decoder=False"
        assert parse_sae(words) == kron(
            num_heads=512, d_base=2, d_extension=4, k=32, lr=1e-3, name="mine", gate="mand_eps", unit_norm_decoder=False
        )
        assert parse_sae("topk d_sae=8 k=2 init_norm=None", seed=4) == topk(d_sae=8, k=2, init_norm=None, seed=4)
        assert parse_sae("topk d_sae=8 k=2 seed=1", seed=4).seed == 1
        with pytest.raises(
            UserError, match=r"^--sae must have each argument once; got 'k' twice in 'topk d_sae=8 k=2 k=4'\.$"
        ):
            parse_sae("topk d_sae=8 k=2 k=4")

    def test_options_reach_every_place(self, tmp_path: Path) -> None:
        config = tiny_config(tmp_path, tmp_path)
        options = ["loop.log_every=7", "saes.1.optimizer.clip_norm=null", "hook=layers.1", "model.revision=main"]
        changed = with_options(config, options)
        assert (changed.loop.log_every, changed.saes[1].optimizer.clip_norm) == (7, None)
        assert (changed.hook, changed.model.revision) == ("layers.1", "main")
        assert with_options(config, []) == config
        with pytest.raises(
            UserError, match=r"^--set must name a field of the config; got 'saes\.²\.name', in which '²' is unknown"
        ):
            with_options(config, ["saes.².name=x"])

    def test_d_sae_follows_the_heads_that_are_set(self, tmp_path: Path) -> None:
        config = tiny_config(tmp_path, tmp_path)
        assert with_options(config, ["saes.1.encoder.num_heads=16"]).saes[1].encoder.d_sae == 64
        both = with_options(config, ["saes.1.encoder.num_heads=16", "saes.1.encoder.d_sae=64"])
        assert both.saes[1].encoder.d_sae == 64
        for wrong in (["saes.1.encoder.d_sae=33"], ["saes.1.encoder.d_sae=32", "saes.1.encoder.num_heads=16"]):
            with pytest.raises(
                UserError, match=r"^d_sae must equal num_heads \* d_base \* d_extension; got 3[23] with"
            ):
                with_options(config, wrong)

    def test_a_user_error_is_a_value_error(self) -> None:
        with pytest.raises(ValueError, match="--sae must begin with"):
            parse_sae("dense")
        assert issubclass(UserError, ValueError)


def test_as_a_process_of_its_own(finished_run: Run, tmp_path: Path) -> None:
    """With ``python -m kronsae``, stdout is pure JSON and everything else goes to stderr."""
    config = replace(finished_run.config, loop=LoopConfig(tokens=128, batch_tokens=64))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    command = [sys.executable, "-W", "error::DeprecationWarning:kronsae", "-m", "kronsae", "train"]
    asked = [*command, "--config", "config.json", "--out", "r", "--json"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert outcome.status == 0, outcome.err
    assert [row["tokens"] for row in outcome.json["saes"]] == [128, 128]
    assert "128 of 128 tokens, " in outcome.err
    assert_same_run(execute(config, tmp_path / "here", show_progress=False), open_run(tmp_path / "r"))


def test_a_process_that_is_given_nonsense() -> None:
    asked = [sys.executable, "-m", "kronsae", "eval", "/no/such/run"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: the run folder must exist; there is no /no/such/run. Give the --out of an earlier `kronsae train`.\n"
    )


def test_the_script_is_the_entry_point() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="kronsae")
    assert script.load() is cli.main
