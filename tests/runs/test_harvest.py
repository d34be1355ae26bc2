"""Harvests of a model: killed and continued with the same bytes; trainings on them that equal those on the model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stopping import ctrl_c, go, interrupt_at
from tests.stored_activations import as_first_format, contents
from tests.tiny_models import WIDTH
from tests.tiny_runs import STEPS, rows, weights

from kronsae.data.harvest import ActivationStream
from kronsae.data.manifest import PROGRESS, read_manifest
from kronsae.runs.config import RunConfig
from kronsae.runs.harvest import harvest, with_activations
from kronsae.runs.pipeline import Source
from kronsae.runs.planning import make_plan
from kronsae.runs.run import Interrupted, Run
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError

ROW_BYTES = 4 * WIDTH
SHARD_ROWS = 150


def arguments(config: RunConfig, out: Path | str, **changes: Any) -> dict[str, Any]:
    """Return the harvest that a training with this config reads from the model."""
    return {
        "model": config.model,
        "text": config.text.source,
        "hook": config.hook,
        "tokens": config.loop.batch_tokens * STEPS + config.buffer_tokens,
        "out": str(out),
        "context_length": config.context_length,
        "model_batch": config.model_batch,
        "window_pool_tokens": config.window_pool_tokens,
        "held_out_share": config.held_out_share,
        "seed": config.seed,
        "shard_bytes": SHARD_ROWS * ROW_BYTES,
    } | changes


def in_order(config: RunConfig, folder: Path | str, **changes: Any) -> RunConfig:
    return replace(with_activations(config, folder), activation_order="harvested", **changes)


def assert_same_training(one: Run, other: Run) -> None:
    """Assert bit-identical weights and metrics of runs whose configs differ."""
    expected, found = weights(one), weights(other)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert rows(one) == rows(other)


class TestLikeTheModel:
    @pytest.mark.parametrize("where", ["disk", "url"])
    def test_training_on_the_disk_equals_training_on_the_model(
        self, where: str, finished_run: Run, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bit for bit, with several shards, also after an interruption, and without the model."""
        folder = str(tmp_path / "acts") if where == "disk" else "memory://like-the-model/acts"
        about = harvest(**arguments(config, folder))
        assert about["shards"] == 11
        config = in_order(config, folder)
        monkeypatch.setattr("kronsae.runs.pipeline.load_model", None)
        with monkeypatch.context() as patch:
            interrupt_at(patch, 8, ctrl_c)
            with pytest.raises(Interrupted):
                go(config, tmp_path / "r")
        run = go(config, tmp_path / "r")
        assert_same_training(finished_run, run)
        assert run.config == replace(finished_run.config, activations=folder, activation_order="harvested")

    def test_a_hook_of_several_and_another_batch(self, config: RunConfig, tmp_path: Path) -> None:
        """The folder knows neither the buffer nor the batch of the training."""
        config = replace(config, loop=replace(config.loop, batch_tokens=32), buffer_tokens=200)
        harvest(**arguments(config, tmp_path / "acts", hook=["layers.1", "layers.2"], tokens=900))
        stored = in_order(replace(config, hook="layers.2"), tmp_path / "acts", hook="layers.2")
        live = islice(Source(config).batches(None), 20)
        for (expected, _), (found, _) in zip(live, Source(stored).batches(None), strict=False):
            assert list(found) == ["layers.2"]
            assert torch.equal(expected["layers.2"], found["layers.2"])

    def test_the_plan_says_how_far_it_reaches(self, config: RunConfig, tmp_path: Path) -> None:
        harvest(**arguments(config, tmp_path / "acts", tokens=1000))
        stored = in_order(config, tmp_path / "acts")
        plan = make_plan(Source(stored), tmp_path / "r")
        assert plan.buffer_tokens == 320
        assert plan.ahead_bytes == 3 * 64 * WIDTH * 4
        assert plan.start == (
            "Reading the harvested activations in the order of the harvest, through the shuffle buffer; the checksum "
            "of each shard is verified when it is opened. The first 13 of 20 batches are those of the same run on the "
            "model; then the harvest ends and is read again."
        )
        # 7 blocks of 2 batches, of which the last gives one
        pairs = list(zip(Source(config).batches(None), islice(Source(stored).batches(None), 14), strict=False))
        same = [torch.equal(live["layers.2"], disk["layers.2"]) for (live, _), (disk, _) in pairs]
        assert same == [True] * 13 + [False]
        assert (
            "The batches are those of the same run on the model."
            in make_plan(Source(replace(stored, loop=replace(stored.loop, tokens=64 * 13))), tmp_path / "r").start
        )
        assert (
            "The harvest has seed 0 and this run 1, so no run on the model has these batches."
            in make_plan(Source(replace(stored, seed=1)), tmp_path / "r").start
        )
        as_first_format(tmp_path / "acts")
        assert make_plan(Source(stored), tmp_path / "r").start.endswith(
            "It is the order of the text, because the harvest had no window pool."
        )

    def test_a_folder_of_the_first_format_leaves_the_config_as_it_was(self, config: RunConfig, tmp_path: Path) -> None:
        harvest(**arguments(config, tmp_path / "acts", tokens=100))
        new = with_activations(replace(config, model_batch=9), tmp_path / "acts")
        assert (new.model_batch, new.window_pool_tokens) == (config.model_batch, config.window_pool_tokens)
        as_first_format(tmp_path / "acts")
        old = with_activations(replace(config, model_batch=9, window_pool_tokens=None), tmp_path / "acts")
        assert (old.model_batch, old.window_pool_tokens, old.activation_order) == (9, None, "random")

    def test_the_order_is_checked(self, config: RunConfig, tmp_path: Path) -> None:
        with pytest.raises(UserError) as caught:
            replace(config, activation_order="harvested")
        assert str(caught.value) == (
            "activation_order must be given only with harvested activations; got 'harvested' without. Give "
            "activations, or leave it out."
        )


class TestResume:
    def test_killed_at_random_moments_it_ends_with_the_same_bytes(self, config: RunConfig, tmp_path: Path) -> None:
        """Six SIGKILLs of forked processes, each a random time after the harvest has written its first file."""
        asked = arguments(config, tmp_path / "killed", dtype="int8", shard_bytes=50 * (WIDTH + 4))
        harvest(**asked | {"out": tmp_path / "whole"})
        expected = contents(tmp_path / "whole")
        assert len(expected) == 33
        (tmp_path / "asked.json").write_text(json.dumps(asked | {"model": to_dict(config.model)}))
        script = tmp_path / "killed.py"
        script.write_text(KILLED, encoding="utf-8")
        command = [sys.executable, str(script), str(tmp_path / "asked.json"), "6"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        shards = [int(word) for word in done.stdout.split()]
        assert len(shards) == 6
        assert shards == sorted(shards)
        assert 0 < shards[0] < 32, "a kill in the middle"
        assert contents(tmp_path / "killed") == expected

    def test_ctrl_c_keeps_the_shards(self, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = arguments(config, tmp_path / "acts", tokens=600)
        plain = ActivationStream.__iter__

        def stopping(self: ActivationStream) -> Any:
            for number, item in enumerate(plain(self)):
                if number == 3:
                    raise KeyboardInterrupt
                yield item

        with monkeypatch.context() as patch:
            patch.setattr(ActivationStream, "__iter__", stopping)
            with pytest.raises(Interrupted) as caught:
                harvest(**asked)
        assert caught.value.exit_status == 130
        assert str(caught.value) == (
            f"stopped before the end of 600 tokens; the complete shards are kept in {tmp_path / 'acts'}. Run the same "
            "command again to resume."
        )
        assert PROGRESS in contents(tmp_path / "acts")
        with pytest.raises(UserError, match=r"was interrupted. Run the same `kronsae harvest` command again to finish"):
            with_activations(config, tmp_path / "acts")
        with pytest.raises(UserError, match=r"holds another one \(seed: 0 -> 1\)\. Give another folder, or remove it"):
            harvest(**asked | {"seed": 1})
        for left in (".tmpd8Al4x", ".activations-00003.safetensors.a_b1c2d3"):  # of safetensors and of ours, killed
            (tmp_path / "acts" / left).touch()
        said: list[str] = []
        harvest(**asked, say=said.append)
        assert said[1] == "Resuming after 300 of 600 tokens."
        harvest(**asked | {"out": tmp_path / "whole"})
        assert contents(tmp_path / "acts") == contents(tmp_path / "whole")

    def test_a_finished_one_does_not_load_the_model(
        self, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = arguments(config, tmp_path / "acts", tokens=300)
        first = harvest(**asked)
        monkeypatch.setattr("kronsae.runs.harvest.load_model", None)
        said: list[str] = []
        again = harvest(**asked, say=said.append)
        assert said == [f"The harvest in {tmp_path / 'acts'} is already finished; nothing is read from the model."]
        timing = ("seconds", "tokens_per_second")
        assert {key: value for key, value in again.items() if key not in timing} == {
            key: value for key, value in first.items() if key not in timing
        }
        assert again["seconds"] == 0
        with pytest.raises(UserError, match=r"holds another one \(tokens: 300 -> 301\)"):
            harvest(**asked | {"tokens": 301})


def test_size_and_time_are_said_before(config: RunConfig, tmp_path: Path) -> None:
    said: list[str] = []
    done: list[tuple[int, int]] = []
    about = harvest(
        **arguments(config, tmp_path / "acts", tokens=900), say=said.append, progress=lambda *at: done.append(at)
    )
    size = sum(path.stat().st_size for path in (tmp_path / "acts").glob("*.safetensors"))
    assert about["bytes"] == size
    assert said[0] == (
        f"900 tokens at layers.2 (width 16) in float32: {size / 2**20:.2g} MB ({size:,} bytes) in 6 shards."
    )
    assert said[1].startswith("Time: about ")
    assert done[-1] == (900, 900)
    manifest = read_manifest(tmp_path / "acts")
    assert manifest.metadata["hooks"] == ["layers.2"]
    assert (manifest.metadata["seed"], manifest.metadata["window_pool_tokens"]) == (0, 1024)


def test_seeds_and_pools_give_other_orders(config: RunConfig, tmp_path: Path) -> None:
    for name, changes in {"a": {}, "b": {"seed": 1}, "c": {"window_pool_tokens": 0}}.items():
        harvest(**arguments(config, tmp_path / name, tokens=200, **changes))
    files = [contents(tmp_path / name)["activations-00000.safetensors"] for name in "abc"]
    assert len(set(files)) == 3
    with pytest.raises(
        UserError, match=r"^window_pool_tokens must be 0 or at least model_batch \* context_length; got 9"
    ):
        harvest(**arguments(config, tmp_path / "d", window_pool_tokens=9))


# The forked children share one start of the interpreter and one model, which take longer than a harvest.
KILLED = """
import json, os, random, signal, sys, time
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from pathlib import Path
import torch
torch.set_num_threads(1)
from kronsae.data.model import ModelConfig, load_model
from kronsae.runs import harvest as module

asked = json.loads(Path(sys.argv[1]).read_text())
asked["model"] = ModelConfig(**asked["model"])
loaded = load_model(asked["model"])
module.load_model = lambda config: loaded
folder = Path(asked["out"])
draw = random.Random(int(sys.argv[2]))

def fork():
    child = os.fork()
    if child == 0:
        module.harvest(**asked)
        os._exit(0)
    return child

for _ in range(int(sys.argv[2])):
    before = len(list(folder.glob("activations-*")))
    child = fork()
    deadline = time.monotonic() + 120
    while len(list(folder.glob("activations-*"))) <= before and time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            child = None
            break
        time.sleep(0.0005)
    if child is not None:
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(len(list(folder.glob("activations-*"))))
child = fork()
assert os.waitpid(child, 0)[1] == 0
"""
