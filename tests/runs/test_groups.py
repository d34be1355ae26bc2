"""Groups whose members read and write different hooks: one pass of the model for all, and no mutual influence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import WIDTH
from tests.tiny_runs import assert_same_run, tiny_config, weights
from torch import Tensor

import kronsae as ks
from kronsae.cli.main import app
from kronsae.core import checkpoint
from kronsae.core.metrics import explained_variance
from kronsae.data.manifest import read_manifest
from kronsae.data.stored import StoredActivations
from kronsae.runs.architectures import batch_topk, jumprelu, kron, matryoshka, switch, topk
from kronsae.runs.config import RunConfig
from kronsae.runs.evaluation import as_table, evaluate_run, write_report
from kronsae.runs.harvest import harvest, with_activations
from kronsae.runs.pipeline import Source
from kronsae.runs.run import Interrupted, Run, execute
from kronsae.support.errors import UserError
from kronsae.training import trainer
from kronsae.training.config import MemberConfig

FolderOf = Callable[[str], Path]
MLP_IN, MLP_OUT = "layers.1.mlp:input", "layers.1.mlp"
HEADS: dict[str, Any] = {"num_heads": 8, "d_base": 2, "d_extension": 2}
COMMON: dict[str, Any] = {"k": 4, "dead_after_tokens": 200}
MEMBERS: dict[str, MemberConfig] = {
    "plain": kron(name="plain", **HEADS, **COMMON),
    "deep": matryoshka(name="deep", d_sae=32, read="layers.3", **COMMON),
    "transcoder": topk(name="transcoder", d_sae=32, read=MLP_IN, write=MLP_OUT, **COMMON),
    "skip": batch_topk(name="skip", read=MLP_IN, write=MLP_OUT, skip=True, **HEADS, **COMMON),
    "crosscoder": jumprelu(name="crosscoder", read="layers.0, layers.2", **HEADS, **COMMON),
    "switch": switch(name="switch", d_sae=32, num_experts=2, write="layers.0,layers.3", **COMMON),
}


@pytest.fixture(scope="module")
def config(tiny_model_folder: FolderOf, text_file: Path) -> RunConfig:
    return tiny_config(tiny_model_folder("gpt_neox"), text_file, saes=tuple(MEMBERS.values()))


def go(config: RunConfig, out: Path, **options: Any) -> Run:
    return execute(config, out, show_progress=False, **options)


@pytest.fixture(scope="module")
def together(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return one run of all members, which tests must not change."""
    return go(config, tmp_path_factory.mktemp("group") / "r")


def of_member(run: Run, name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights(run).items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize("name", MEMBERS)
def test_no_member_feels_the_others(name: str, config: RunConfig, together: Run, tmp_path: Path) -> None:
    """A member has the same bits alone, with members at other hooks, and after an additional one."""
    stranger = kron(name="stranger", read="layers.1,layers.3:input", **HEADS, k=7, seed=5, lr=1e-2)
    alone = go(replace(config, saes=(MEMBERS[name],)), tmp_path / "alone")
    behind = go(replace(config, saes=(stranger, MEMBERS[name])), tmp_path / "behind")
    expected = of_member(together, name)
    assert expected
    for run in (alone, behind):
        found = of_member(run, name)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_the_model_runs_once_for_all(config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kronsae.data import harvest as harvest_module

    passes: list[int] = []
    plain = harvest_module.forward

    def counted(*arguments: Any) -> Any:
        passes.append(1)
        return plain(*arguments)

    monkeypatch.setattr(harvest_module, "forward", counted)
    counts = []
    for number, names in enumerate((("plain",), tuple(MEMBERS))):
        passes.clear()
        go(replace(config, saes=tuple(MEMBERS[name] for name in names)), tmp_path / str(number))
        counts.append(len(passes))
    assert counts[0] == counts[1]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the training stop after this many steps."""
    plain: Any = trainer.fit

    def fit(*arguments: Any) -> Any:
        *rest, _, save = arguments
        asked = iter(range(10_000))
        return plain(*rest, lambda: next(asked) >= step, save)

    monkeypatch.setattr("kronsae.runs.run.fit", fit)


def test_stopped_and_carried_on_to_the_same_bits(
    config: RunConfig, together: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (7, 4):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted):
                go(config, tmp_path / "r")
    assert_same_run(together, go(config, tmp_path / "r"))


def test_rows_of_all_hooks_belong_together(config: RunConfig) -> None:
    """The input of block 1 is the output of block 0, so rows shuffled in the same order are equal."""
    reads_both = kron(**HEADS, k=2, read="layers.0,layers.1:input")
    batches = iter(Source(replace(config, saes=(reads_both,))).batches(None))
    for _ in range(8):  # across the border of a buffer of 5 batches
        values, _ = next(batches)
        assert torch.equal(values["layers.0"], values["layers.1:input"])
        assert len(values["layers.0"].unique(dim=0)) > 30


def test_what_is_written_down_of_each(together: Run) -> None:
    about = {name: checkpoint.read_config(together.sae_folder(name)) for name in MEMBERS}
    metadata = {name: about[name]["metadata"] for name in MEMBERS}
    assert (metadata["plain"]["hooks_read"], metadata["plain"]["hooks_written"]) == (["layers.2"], ["layers.2"])
    assert metadata["plain"]["hook_name"] == "layers.2"
    assert (metadata["skip"]["hooks_read"], metadata["skip"]["hooks_written"]) == ([MLP_IN], [MLP_OUT])
    assert metadata["crosscoder"]["hooks_written"] == ["layers.0", "layers.2"]
    assert len(metadata["crosscoder"]["training_scales"]["read"]) == 2
    assert {name: about[name]["architecture"] for name in MEMBERS} == {
        "plain": "kronecker-topk",
        "deep": "dense-topk",
        "transcoder": "dense-topk-transcoder",
        "skip": "kronecker-jumprelu-skip_transcoder",
        "crosscoder": "kronecker-jumprelu-crosscoder",
        "switch": "dense-topk-switch-crosscoder",
    }
    assert metadata["skip"]["trained_as"] == "kronecker-batch_topk-skip_transcoder"
    assert metadata["crosscoder"]["trained_as"] == about["crosscoder"]["architecture"]
    path = together.sae_folder("skip") / "cfg.json"
    assert json.loads(path.read_text())["sae"]["write_widths"] == [WIDTH]


def test_a_run_says_what_it_holds(together: Run) -> None:
    shown = repr(together).splitlines()
    assert shown[0].startswith(f"Run('{together.folder}'): finished, ")
    skip, crosscoder, switched = (
        next(line for line in shown if line.startswith(f"  {name}: ")) for name in ("skip", "crosscoder", "switch")
    )
    assert skip == (
        f"  skip: kronecker-batch_topk-skip_transcoder, d_in={WIDTH}, d_out={WIDTH}, d_sae=32, k=4, "
        "num_heads=8, d_base=2, d_extension=2"
    )
    assert f"d_in={WIDTH}+{WIDTH}, d_sae=32" in crosscoder
    assert "num_experts=" in switched


def test_a_transcoder_takes_and_gives_raw_activations(together: Run) -> None:
    sae = ks.load(together.folder, "skip")
    x, y = together.activations(200, hook=MLP_IN), together.activations(200, hook=MLP_OUT)
    assert sae(x).shape == y.shape
    assert explained_variance(y, sae(x)) > explained_variance(y, y.mean(0).expand_as(y)) - 0.5
    assert torch.equal(sae.decode(sae.encode(x), x), sae(x))


class TestHarvested:
    def test_one_pass_for_several_hooks_then_training_without_the_model(
        self, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        about = harvest(
            model=config.model.name,
            text=config.text.source,
            hook=["layers.2", MLP_IN, MLP_OUT, "layers.0"],
            tokens=600,
            out=tmp_path / "acts",
            context_length=32,
            held_out_share=0.2,
        )
        assert about["hooks"] == dict.fromkeys(["layers.2", MLP_IN, MLP_OUT, "layers.0"], WIDTH)
        members = tuple(MEMBERS[name] for name in ("plain", "skip", "crosscoder"))
        stored = with_activations(replace(config, saes=members, hook="layers.0"), tmp_path / "acts")
        assert stored.hook == "layers.2"
        monkeypatch.setattr("kronsae.runs.pipeline.load_model", None)
        whole = go(stored, tmp_path / "whole")
        with monkeypatch.context() as patch:
            stop_after(patch, 7)
            with pytest.raises(Interrupted):
                go(stored, tmp_path / "r")
        assert_same_run(whole, go(stored, tmp_path / "r"))
        alone = go(replace(stored, saes=(MEMBERS["skip"],)), tmp_path / "alone")
        expected = of_member(whole, "skip")
        assert all(torch.equal(value, expected[key]) for key, value in of_member(alone, "skip").items())
        values, _ = next(iter(Source(replace(stored, saes=(MEMBERS["skip"],))).batches(None)))
        assert list(values) == [MLP_IN, MLP_OUT], "no hook is read from disk that nobody needs"
        with pytest.raises(UserError) as error:
            go(replace(stored, saes=(MEMBERS["deep"],)), tmp_path / "d")
        assert str(error.value) == (
            f"hook must be one of those harvested into {tmp_path / 'acts'}: layers.2, {MLP_IN}, {MLP_OUT}, layers.0; "
            "got 'layers.3'. Leave hook out, or harvest it."
        )
        with pytest.raises(UserError, match=r"hooks must be among those harvested .*; got 'layers.9'"):
            StoredActivations(tmp_path / "acts", batch_size=8, hooks=["layers.9"])

    @pytest.mark.parametrize("hook", [[], ["1", 1]], ids=str)
    def test_hooks_are_named_once(self, hook: list[str | int], tmp_path: Path) -> None:
        with pytest.raises(UserError, match="hook must name different hooks, at least one; got"):
            harvest(model="bundled", text="bundled", hook=hook, tokens=9, out=tmp_path / "h")


def test_evaluation_and_report(together: Run) -> None:
    rows = {row["name"]: row for row in evaluate_run(together, tokens=100)}
    for row in rows.values():
        assert row["explained_variance"] < 1
        assert math.isfinite(row["ce_recovered"])
        assert math.isfinite(row["kl_recovered"])
    assert (rows["skip"]["hooks_read"], rows["skip"]["hooks_written"]) == ([MLP_IN], [MLP_OUT])
    assert [rows[name]["d_out"] for name in ("skip", "crosscoder", "switch")] == [WIDTH, 2 * WIDTH, 2 * WIDTH]
    assert [len(rows[name]["explained_variance_by_hook"]) for name in ("plain", "crosscoder", "switch")] == [0, 2, 2]
    ablated = {name: row["language_model"]["ce_zero"] for name, row in rows.items()}
    assert ablated["skip"] == ablated["transcoder"] != ablated["plain"]
    headings = [column.header for column in as_table(list(rows.values())).columns]
    assert headings[:3] == ["SAE", "hooks", "architecture"]
    assert rows["skip"]["architecture"] == "kronecker-batch_topk-skip_transcoder"
    assert {name: row["saved_as"] for name, row in rows.items() if row["saved_as"]} == {"skip": "jumprelu"}
    assert "skip_transcoder, saved as jumprelu" in str(as_table([rows["skip"]]).columns[1]._cells)
    assert as_table([rows["skip"], rows["transcoder"]]).columns[1].header == "architecture"
    page = write_report(together).read_text(encoding="utf-8")
    for text in (
        f"{MLP_IN} → {MLP_OUT}",
        "layers.0 + layers.2",
        "have different hooks",
        "crosscoder at each hook",
        "kronecker-batch_topk-skip_transcoder, saved as jumprelu",
    ):
        assert text in page, text
    assert "plain against deep" not in page, "SAEs of different hooks are not compared"


class TestWords:
    def test_on_the_command_line(self, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def kronsae(*words: object) -> None:
            app([str(word) for word in words], standalone_mode=False)

        source = ("--model", config.model.name, "--text", config.text.source)
        hooks = ("--hook", "layers.2", "--hook", MLP_IN, "--hook", MLP_OUT)
        kronsae("harvest", *source, *hooks, "--tokens", 400, "--context-length", 32, "--out", tmp_path / "acts")
        assert list(read_manifest(tmp_path / "acts").d_in) == ["layers.2", MLP_IN, MLP_OUT]
        words = f"kron num_heads=4 d_base=2 d_extension=4 k=4 read={MLP_IN} write={MLP_OUT} skip=true name=skip"
        common = ("--tokens", 256, "--set", "loop.batch_tokens=64", "--set", "buffer_tokens=128", "--quiet")
        kronsae(
            *("train", "--activations", tmp_path / "acts", "--sae", words, "--sae", "topk d_sae=32 k=4"),
            *("--hook", "layers.2", *common, "--out", tmp_path / "r"),
        )
        # the buffer holds every hook: 128 tokens * 3 * 16 values; the message has only MB, so the config is used
        places = ", ".join(f"{hook} (width {WIDTH})" for hook in (MLP_IN, MLP_OUT, "layers.2"))
        assert f"at {places} of " in capsys.readouterr().err
        run = ks.open_run(tmp_path / "r")
        assert run.config.hooks == (MLP_IN, MLP_OUT, "layers.2")
        assert Source(run.config).d_in == 3 * WIDTH
        assert run.load("skip").config.role == "skip_transcoder"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ({"read": ()}, "read must list hooks, such as ['layers.2', 'layers.3']; got ()."),
            ({"write": "a,,b"}, "write must list hooks, such as ['layers.2', 'layers.3']; got ('a', '', 'b')."),
            ({"read": ("a", "a")}, "read must list different hooks; got a, a. Name each once."),
            (
                {"skip": True},
                "skip must be used with output hooks that differ from the input hooks; 'topk' writes the hooks it "
                "reads. Give write=, or leave skip out.",
            ),
        ],
    )
    def test_refusals(self, words: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            topk(d_sae=8, k=2, **words)
        assert str(error.value) == message

    def test_one_place_has_one_name(self, config: RunConfig, tmp_path: Path) -> None:
        """Otherwise the linear path of this transcoder would copy its input, bypassing the dictionary."""
        member = topk(d_sae=8, k=2, read="layers.2", write="2", skip=True)
        with pytest.raises(UserError) as error:
            go(replace(config, saes=(member,)), tmp_path / "r")
        assert str(error.value) == (
            "hooks of one place must be written alike; 'layers.2' and '2' both are 'gpt_neox.layers.2'. "
            "Use one of them."
        )
        with pytest.raises(UserError, match=r"^hooks of one place must be written alike; '2' and 'layers.2' both are"):
            harvest(
                model=config.model.name,
                text=config.text.source,
                hook=[2, "layers.2"],
                tokens=9,
                out=tmp_path / "h",
                context_length=8,
            )
        assert not (tmp_path / "h").exists()

    def test_a_hook_that_is_not_there_is_found_before_anything_is_written(
        self, config: RunConfig, tmp_path: Path
    ) -> None:
        member = topk(d_sae=8, k=2, read="layers.1.mpl:input")
        with pytest.raises(UserError, match=r"got 'layers.1.mpl:input'. Did you mean 'layers.1.mlp'\?"):
            go(replace(config, saes=(member,)), tmp_path / "r")
        assert not (tmp_path / "r").exists()
