"""A sweep on a tiny model: complete, resumed after an interruption, extended, and rejected if it cannot run."""

from __future__ import annotations

import csv
import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_runs import listing, tiny_config, weights

import kronsae as ks
from kronsae.core.flops import training_flops
from kronsae.runs.config import RunConfig
from kronsae.runs.pipeline import Source
from kronsae.runs.planning import Plan, make_plan, with_times
from kronsae.runs.run import Interrupted, execute, open_run
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError
from kronsae.support.files import folder_lock
from kronsae.sweeps import sweep as sweeping
from kronsae.sweeps.grid import SweepConfig, points
from kronsae.sweeps.results import Sweep, as_csv, result_row
from kronsae.sweeps.sweep import execute_sweep, plan_sweep, sweep_points
from kronsae.training.config import LoopConfig
from kronsae.training.member import Member

FolderOf = Callable[[str], Path]
SAES = ("topk d_sae=32 k={2,4}", "kron num_heads=8 d_base=2 d_extension=2 k=4")


@pytest.fixture(scope="module")
def run_config(tiny_model_folder: FolderOf, text_file: Path) -> RunConfig:
    short = LoopConfig(tokens=6 * 64, batch_tokens=64, log_every=3, checkpoint_every=2)
    return tiny_config(tiny_model_folder("gpt_neox"), text_file, loop=short, eval_tokens=60)


@pytest.fixture(scope="module")
def base(run_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base") / "run.json"
    path.write_text(json.dumps(to_dict(run_config)))
    return str(path)


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Return a sweep of three SAEs and two seeds, which tests must not change."""
    return go(SweepConfig(saes=SAES, config=base, seeds=(0, 1)), tmp_path_factory.mktemp("sweeps") / "whole")


def go(config: SweepConfig, out: Path, **options: Any) -> Sweep:
    return execute_sweep(config, out, show_progress=False, **options)


def without_times(found: Sweep, *besides: str) -> list[dict[str, Any]]:
    left_out = {"seconds", "group", *besides}
    return [{key: value for key, value in row.items() if key not in left_out} for row in found.rows]


def test_one_row_per_sae_and_seed_with_every_setting_and_figure(whole: Sweep, run_config: RunConfig) -> None:
    with whole.csv.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["seed"]) for row in rows] == [
        (name, seed) for seed in "01" for name in ("topk-k2", "topk-k4", "kron")
    ]
    assert len({row["group"] for row in rows}) == 2
    kron = rows[2]
    expected = {
        "num_heads": "8",
        "d_base": "2",
        "gate": "mand",
        "k": "4",
        "d_sae": "32",
        "lr": "0.0008",
        "tokens": "384",
    }
    assert {key: kron[key] for key in expected} == expected
    assert (kron["sae.optimizer.beta2"], kron["run.loop.batch_tokens"], kron["run.hook"]) == ("0.999", "64", "layers.2")
    assert kron["torch_version"] == torch.__version__
    assert rows[0]["num_heads"] == ""
    for row in rows:
        assert float(row["explained_variance"]) <= 1
        assert math.isfinite(float(row["ce_recovered"]))
        run = open_run(whole.folder / "groups" / row["group"])
        assert (run.config.seed, run.config.hook) == (int(row["seed"]), run_config.hook)
        (figures,) = (one for one in run.compare().rows if one["name"] == row["name"])
        assert float(row["explained_variance"]) == figures["explained_variance"]


def test_a_point_is_what_it_would_be_alone(whole: Sweep, run_config: RunConfig, tmp_path: Path) -> None:
    alone = replace(run_config, saes=(ks.kron(num_heads=8, d_base=2, d_extension=2, k=4, seed=1),), seed=1)
    run = execute(alone, tmp_path / "r", show_progress=False)
    group = open_run(whole.folder / "groups" / whole.rows[5]["group"])
    assert all(torch.equal(value, weights(group)[name]) for name, value in weights(run).items())


def test_the_page(whole: Sweep) -> None:
    page = whole.page.read_text(encoding="utf-8")
    assert "EV against l0" in page
    assert "EV against the budget" not in page  # one budget
    assert "±" in page
    assert "±" in str(whole)
    assert "topk-k2" in str(whole)


def test_given_again_it_trains_nothing(whole: Sweep, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "execute", None)
    said: list[str] = []
    again = go(SweepConfig(saes=SAES, config=base, seeds=(0, 1)), whole.folder, say=said.append)
    assert said == ["0 SAEs to train in 0 group(s), seeds -; 6 are finished"]
    assert again.rows == whole.rows


def test_stopped_and_carried_on(whole: Sweep, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Member.step

    def stopping(self: Member, x_BD: Any, step: int, want_metrics: bool) -> object:
        if step == 3 and self.config.seed == 1 and self.name == "kron":
            signal.raise_signal(signal.SIGINT)
        return plain(self, x_BD, step, want_metrics)

    config = SweepConfig(saes=SAES, config=base, seeds=(0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(Member, "step", stopping)
        with pytest.raises(Interrupted, match=r"^stopped after 256 of 384 tokens; a checkpoint is saved in"):
            go(config, tmp_path / "s")
    assert len((tmp_path / "s" / "sweep.csv").read_text().splitlines()) == 4  # intermediate results
    said: list[str] = []
    resumed = go(config, tmp_path / "s", say=said.append)
    assert said[0].startswith("3 SAEs to train in 1 group(s), seeds 1; 3 are finished")
    assert "Resuming after 256 of 384 tokens." in said
    assert without_times(resumed) == without_times(whole)


class TestADivergence:
    SAES = ("topk d_sae=32 k=2 lr={1e-3,1e30}", "topk d_sae=32 k=4 name=other")

    def test_the_others_go_on_and_it_is_not_tried_again(
        self, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said: list[str] = []
        config = SweepConfig(saes=self.SAES, config=base)
        found = go(config, tmp_path / "s", say=said.append)
        with found.csv.open(encoding="utf-8") as file:
            good, bad, other = csv.DictReader(file)
        assert bad["diverged"].startswith("training of 'topk-lr1e_30' diverged: the ")
        assert f"{bad['diverged']} The sweep continues without it." in said
        assert (bad["name"], bad["seed"], bad["k"], bad["lr"], bad["run.hook"]) == (
            *("topk-lr1e_30", "0", "2", "1e+30"),
            "layers.2",
        )
        assert (bad["explained_variance"], bad["tokens"], bad["group"]) == ("", "", "")
        assert (good["diverged"], other["diverged"]) == ("", "")
        without = SweepConfig(saes=("topk d_sae=32 k=2 lr=1e-3 name=topk-lr0.001", self.SAES[1]), config=base)
        alone = go(without, tmp_path / "without")
        assert [float(row["explained_variance"]) for row in (good, other)] == [
            row["explained_variance"] for row in alone.rows
        ]
        assert [path.name for path in (tmp_path / "s" / "groups").iterdir()] == [good["group"]]
        assert bad["diverged"] in str(found)
        assert "topk-lr1e_30" in found.page.read_text(encoding="utf-8")

        monkeypatch.setattr(sweeping, "execute", None)
        said.clear()
        again = go(config, tmp_path / "s", say=said.append)
        assert said == ["0 SAEs to train in 0 group(s), seeds -; 2 are finished; 1 diverged"]
        assert again.rows == found.rows
        renamed = SweepConfig(saes=("topk d_sae=32 k=2 lr=1e30",), config=base)
        (row,) = go(renamed, tmp_path / "s").rows
        assert row["diverged"].startswith("training of 'topk' diverged: the ")

    def test_killed_before_the_group_was_removed(
        self, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(path: Path) -> None:
            raise KeyboardInterrupt

        config = SweepConfig(saes=self.SAES[:1], config=base)
        with monkeypatch.context() as patch:
            patch.setattr("kronsae.sweeps.sweep.shutil.rmtree", killed)
            with pytest.raises(Interrupted) as caught:
                go(config, tmp_path / "s")
        assert str(caught.value) == (
            f"stopped; the finished groups are kept in {tmp_path / 's'}. Run the same command again to resume."
        )
        found = go(config, tmp_path / "s")
        assert [row["diverged"] is None for row in found.rows] == [True, False]
        assert [path.name for path in (tmp_path / "s" / "groups").iterdir()] == [found.rows[0]["group"]]

    def test_nobody_is_left(self, base: str, tmp_path: Path) -> None:
        found = go(SweepConfig(saes=("topk d_sae=32 k=2 lr=1e30",), config=base, seeds=(0, 1)), tmp_path / "s")
        assert [row["seed"] for row in found.rows if row["diverged"]] == [0, 1]
        assert list((tmp_path / "s" / "groups").iterdir()) == []
        assert "evaluated on" not in found.page.read_text(encoding="utf-8").split("<table")[0]


def test_a_changed_grid_keeps_what_is_the_same(base: str, tmp_path: Path) -> None:
    first = go(SweepConfig(saes=("topk d_sae=32 k=2",), config=base), tmp_path / "s")
    said: list[str] = []
    second = go(SweepConfig(saes=("topk d_sae=32 k={2,3}",), config=base), tmp_path / "s", say=said.append)
    assert said[0].splitlines()[0] == "1 SAEs to train in 1 group(s), seeds 0; 1 are finished"
    assert [row["name"] for row in second.rows] == ["topk-k2", "topk-k3"]
    assert second.rows[0] | {"name": "topk"} == first.rows[0]
    last = go(SweepConfig(saes=("topk d_sae=32 k=3",), config=base), tmp_path / "s")
    assert [row["name"] for row in last.rows] == ["topk"]
    assert len(list((tmp_path / "s" / "groups").iterdir())) == 2


def test_what_leaves_the_weights_as_they_are_trains_nothing_anew(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = ("topk d_sae=32 k={2,3}",)
    first = go(SweepConfig(saes=saes, config=base), tmp_path / "s")
    (group,) = {row["group"] for row in first.rows}
    other = ("eval_tokens=200", "loop.log_every=1", "loop.checkpoint_every=5")
    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "execute", None)
        said: list[str] = []
        again = go(SweepConfig(saes=saes, config=base, set=other), tmp_path / "s", say=said.append)
        assert said[0].splitlines() == [
            "0 SAEs to train in 0 group(s), seeds -; 2 are finished",
            "1 finished group(s) to evaluate again, because eval_tokens changed.",
        ]
        assert all(row["evaluation_tokens"] >= 200 for row in again.rows)
        assert [row["explained_variance"] for row in again.rows] != [row["explained_variance"] for row in first.rows]
        assert [(row["run.eval_tokens"], row["run.loop.log_every"]) for row in again.rows] == [(200, 3)] * 2
        open_run(tmp_path / "s" / "groups" / group).compare(40)  # evaluated by the user on fewer tokens
        assert go(SweepConfig(saes=saes, config=base, set=other), tmp_path / "s").rows == again.rows
    anew = go(SweepConfig(saes=saes, config=base, set=other), tmp_path / "anew")
    recorded = ("run.loop.log_every", "run.loop.checkpoint_every")
    assert without_times(anew, *recorded) == without_times(again, *recorded)


def test_rows_of_different_numbers_of_tokens_are_reported(whole: Sweep, tmp_path: Path) -> None:
    assert "held-out tokens" not in str(whole)
    rows = [row | {"evaluation_tokens": 50 + number % 2} for number, row in enumerate(whole.rows)]
    assert str(Sweep(tmp_path, rows, whole.settings)).splitlines()[-1] == (
        "Evaluated on different numbers of held-out tokens: 50, 51."
    )


def test_a_stopped_group_is_carried_on_though_it_is_logged_otherwise_now(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Member.step

    def stopping(self: Member, x_BD: Any, step: int, want_metrics: bool) -> object:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return plain(self, x_BD, step, want_metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Member, "step", stopping)
        with pytest.raises(Interrupted):
            go(SweepConfig(saes=("topk d_sae=32 k=2",), config=base), tmp_path / "s")
    said: list[str] = []
    changed = SweepConfig(saes=("topk d_sae=32 k=2 name=x",), config=base, set=("loop.log_every=1", "eval_tokens=90"))
    (row,) = go(changed, tmp_path / "s", say=said.append).rows
    assert "Resuming after 256 of 384 tokens." in said
    assert (row["name"], row["evaluation_tokens"] >= 90) == ("x", True)


def test_the_plan_has_the_sum_of_all_groups(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = sweep_points(SweepConfig(saes=("topk d_sae={32,64} k=2", "topk d_sae=8 k=2 name=small"), config=base))
    _, plan = plan_sweep(wanted, tmp_path / "s", group_size=2)
    assert [len(group.points) for group in plan.groups] == [2, 1]
    width = 16
    parameters = {d_sae: d_sae * (2 * width + 1) + width for d_sae in (32, 64, 8)}
    saved = 4 * sum(parameters.values())
    assert plan.disk_bytes == saved + sum(2 * (12 * parameters[d_sae] + 8 * d_sae) for d_sae in (32, 64))
    (first, second) = (make_plan(Source(group.run_config), tmp_path).memory_bytes for group in plan.groups)
    assert plan.memory_bytes == max(first, second)
    assert plan.to_dict()["disk_bytes"] == plan.disk_bytes
    assert "Disk: about " in str(plan)
    assert " free." in str(plan)
    plan.check()
    monkeypatch.setattr(sweeping, "free_disk_bytes", lambda folder: plan.disk_bytes - 1)
    with pytest.raises(
        UserError, match=r"^the sweep must fit on the disk; it needs about .*, but only .* are free\. Free s"
    ):
        go(SweepConfig(saes=("topk d_sae={32,64} k=2", "topk d_sae=8 k=2 name=small"), config=base), tmp_path / "s")


def test_groups_are_bounded_by_number_and_by_memory(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = sweep_points(SweepConfig(saes=("topk d_sae=32 k={1,2,3,4,5}",), config=base))
    _, plan = plan_sweep(wanted, tmp_path / "s", group_size=2)
    assert [len(group.points) for group in plan.groups] == [2, 2, 1]
    _, plan = plan_sweep(wanted, tmp_path / "s")
    assert [len(group.points) for group in plan.groups] == [5]
    (group,) = plan.groups
    made = make_plan(Source(group.run_config), tmp_path)
    state = made.members[0].state_bytes
    fixed = made.memory_bytes - 5 * state
    free = int((fixed + 3.5 * state) / sweeping.MEMORY_SHARE) - made.language_model_bytes
    monkeypatch.setattr("kronsae.runs.planning.available_memory_bytes", lambda: free)
    _, plan = plan_sweep(wanted, tmp_path / "s")
    assert [len(group.points) for group in plan.groups] == [3, 2]
    monkeypatch.setattr("kronsae.runs.planning.available_memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"^the run must fit into memory"):
        plan_sweep(wanted, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_equal_flops(base: str, tmp_path: Path) -> None:
    saes = ("topk d_sae=64 k=4", "kron num_heads=8 d_base=2 d_extension=4 k=4")
    found = go(SweepConfig(saes=saes, config=base, tokens=(384, 640), same_flops_as="topk"), tmp_path / "s")
    rows = {row["name"]: row for row in found.rows}
    assert (rows["topk-tokens384"]["tokens"], rows["topk-tokens640"]["tokens"]) == (384, 640)
    shape = ks.kron(num_heads=8, d_base=2, d_extension=4, k=4).shape(16)
    for tokens in (384, 640):
        dense, factored = (rows[f"{kind}-tokens{tokens}"] for kind in ("topk", "kron"))
        assert factored["tokens"] > dense["tokens"]
        assert 0 <= dense["training_flops"] - factored["training_flops"] < training_flops(shape, 64)
    assert "EV against the budget" in found.page.read_text(encoding="utf-8")
    with pytest.raises(
        UserError, match=r"^same_flops_as must name one SAE of the grid: topk, kron; got 'tpok'. Did you"
    ):
        sweep_points(SweepConfig(saes=saes, config=base, same_flops_as="tpok"))


def test_times_are_estimated_where_they_are_worth_it(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "TIMED_FROM_STEPS", 1)
    one = sweep_points(SweepConfig(saes=("topk d_sae=32 k=2",), config=base))
    two = sweep_points(SweepConfig(saes=("topk d_sae=32 k=2",), config=base, seeds=(0, 1)))
    timed: list[Plan] = []

    def watched(plan: Plan, source: Source) -> Plan:
        timed.append(plan)
        return with_times(plan, source)

    monkeypatch.setattr(sweeping, "with_times", watched)
    _, plan = plan_sweep(one, tmp_path)
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert "Time: about" in str(plan)
    _, plan = plan_sweep(two, tmp_path)
    assert len(timed) == 2  # other seeds reuse the times
    assert plan.to_dict()["seconds"] == plan.seconds
    assert [group["seed"] for group in plan.to_dict()["groups"]] == [0, 1]


def test_a_folder_that_holds_other_things(base: str, run_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        UserError, match=r"^out must be a new or empty folder or a sweep; .* holds other files\. Choose another one\.$"
    ):
        go(SweepConfig(saes=SAES, config=base), tmp_path)
    assert listing(tmp_path) == ["thesis.tex"]


def test_another_process_is_at_work_in_the_folder(base: str, tmp_path: Path) -> None:
    with folder_lock(tmp_path / "s"), pytest.raises(UserError, match="another kronsae process is writing to"):
        go(SweepConfig(saes=SAES, config=base), tmp_path / "s")
    assert listing(tmp_path) == []


def test_in_python(run_config: RunConfig, text_file: Path, tmp_path: Path) -> None:
    found = ks.sweep(
        saes=["topk d_sae=32 k={2,4}"],
        model=run_config.model.name,
        text=str(text_file),
        hook="layers.2",
        tokens=128,
        seeds=[3],
        set=["loop.batch_tokens=64", "buffer_tokens=128", "context_length=32", "eval_tokens=40", "held_out_share=0.2"],
        out=tmp_path / "s",
        show_progress=False,
    )
    assert [(row["name"], row["seed"], row["tokens"]) for row in found.rows] == [
        ("topk-k2", 3, 128),
        ("topk-k4", 3, 128),
    ]
    assert (found.csv, found.page) == (tmp_path / "s" / "sweep.csv", tmp_path / "s" / "sweep.html")


def test_a_switch_has_the_heads_of_all_its_experts(base: str) -> None:
    words = "switch num_heads=8 d_base=2 d_extension=2 k=2 num_experts={1,4}"
    provenance: dict[str, Any] = {"versions": {}}
    rows = [result_row(point, {}, provenance, "g") for point in points(SweepConfig(saes=(words,), config=base))]
    assert [(row["num_heads"], row["num_experts"], row["d_base"]) for row in rows] == [(8, 1, 2), (8, 4, 2)]


def test_the_page_says_all_there_is_of_model_hook_and_machine(whole: Sweep, tmp_path: Path) -> None:
    rows = [row | {"run.hook": hook, "commit": None} for row, hook in zip(whole.rows, "abaaba", strict=True)]
    Sweep(tmp_path, rows, whole.settings).write({})
    page = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert "a, b" in page
    assert "commit" not in page.split("<table")[0]


def test_rows_with_different_columns() -> None:
    assert as_csv([{"a": 1, "b": None}, {"a": 2, "c": "x, y"}]) == 'a,b,c\n1,,\n2,,"x, y"\n'
