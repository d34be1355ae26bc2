"""Plans of runs compared with sums computed by hand; runs that do not fit are rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import WIDTH
from tests.tiny_runs import STEPS, assert_same_run, tiny_config, weights

from kronsae import kernels
from kronsae.core.flops import training_flops
from kronsae.runs import planning
from kronsae.runs.architectures import kron
from kronsae.runs.config import RunConfig
from kronsae.runs.memory import ReadingBytes, largest_k_aux, sae_bytes
from kronsae.runs.pipeline import Source
from kronsae.runs.planning import Plan, format_duration, make_plan, plan_run
from kronsae.runs.run import Run, execute, open_run
from kronsae.support import resources
from kronsae.support.errors import UserError
from kronsae.support.resources import available_memory_bytes, check_disk, format_bytes, free_disk_bytes
from kronsae.training.config import LoopConfig

FolderOf = Callable[[str], Path]


@pytest.fixture
def config(tiny_model_folder: FolderOf, text_file: Path) -> RunConfig:
    return tiny_config(tiny_model_folder("gpt_neox"), text_file)


def test_the_figures_are_the_sums(config: RunConfig, tmp_path: Path) -> None:
    with kernels.use("cpu"):
        plan = make_plan(Source(config), tmp_path / "r")
    topk, kron = plan.members
    # dense: 32 rows and biases, 32 decoder rows and a bias; Kronecker: 8 heads of 2 + 2 rows
    assert topk.parameters == 32 * (WIDTH + 1) + 32 * WIDTH + WIDTH
    assert kron.parameters == 8 * 4 * (WIDTH + 1) + 32 * WIDTH + WIDTH
    assert (topk.tokens, topk.steps, plan.steps, plan.tokens) == (64 * STEPS, STEPS, STEPS, 64 * STEPS)
    assert topk.flops == 6 * (WIDTH * 32 + 4 * WIDTH) * 64 * STEPS
    assert topk.state_bytes == 12 * topk.parameters
    assert plan.buffer_bytes == 320 * WIDTH * 4
    assert plan.window_pool_bytes == 1024 * 4
    model: Any = Source(config).language_model.model
    expected = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert plan.language_model_bytes == expected
    state = topk.state_bytes + kron.state_bytes
    work = max(plan.model_work_bytes, topk.work_bytes, kron.work_bytes)
    assert plan.memory_bytes == expected + 1024 * 4 + plan.buffer_bytes + state + work
    assert plan.disk_bytes == 28 * (topk.parameters + kron.parameters) + 16 * 64
    assert plan.seconds is None
    assert not (tmp_path / "r").exists()


def test_the_memory_of_reading_a_batch_by_hand(config: RunConfig, tmp_path: Path) -> None:
    """Hooks of 2 widths: a pass has 16 vectors and the hooks' per token, the batch the hooks' in float32."""
    assert ReadingBytes.of(100, 30, 6, 2).total(6 + 24) == 2 * 30 * (16 * 6 + 30) + 4 * 100 * 30
    source = Source(config)
    windows, columns = config.model_batch, config.context_length
    for most, pass_tokens in ((None, windows * columns), (2 * columns, 2 * columns), (1, columns)):
        source.language_model.pass_size.most_tokens = most
        assert source.language_model.pass_size.tokens(windows, columns) == pass_tokens
        work = 4 * pass_tokens * 17 * WIDTH + 4 * windows * columns * WIDTH
        assert make_plan(source, tmp_path / "r").model_work_bytes == work


def test_gradients_take_memory_where_the_optimiser_needs_them_whole(config: RunConfig, tmp_path: Path) -> None:
    with kernels.use("portable"):
        whole = make_plan(Source(config), tmp_path)
    with kernels.use("cpu"):
        rows = make_plan(Source(config), tmp_path)
    for one, other in zip(whole.members, rows.members, strict=True):
        assert one.state_bytes - other.state_bytes == 4 * one.parameters
        assert replace(one, state_bytes=other.state_bytes) == other


def test_the_memory_of_an_sae_by_hand() -> None:
    """D = 6, F = 4 * 2 * 3 = 24, 20 pre-latents, k = 2, AuxK 3; a batch of 5 tokens."""
    member = kron(num_heads=4, d_base=2, d_extension=3, k=2)
    shape = member.shape(6, "layers.0")
    needs = sae_bytes(shape, 5, largest_k_aux(member, shape), dense_gradients=True)
    parameters = 20 * (6 + 1) + 24 * 6 + 6
    assert needs.parameters == parameters
    assert (needs.weights, needs.gradients, needs.moments) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert needs.vectors == 4 * 5 * 4 * (6 + 6)
    assert needs.codes == 4 * 5 * 8 * (2 + 3)
    assert needs.product == 4 * 64 * ((6 * 20 + 24) // 6)  # chunks of at least 64 tokens
    assert needs.work == needs.vectors + needs.codes + needs.product
    assert sae_bytes(shape, 5, 0, dense_gradients=True).codes == 4 * 5 * 8 * 2
    none = replace(member, aux_k=replace(member.aux_k, weight=0.0))
    assert largest_k_aux(none, shape) == 0
    assert largest_k_aux(replace(member, aux_k=replace(member.aux_k, k_aux=7)), shape) == 7


def test_the_copy_that_is_saved_may_be_the_largest_temporary_memory(config: RunConfig, tmp_path: Path) -> None:
    large = kron(num_heads=64, d_base=16, d_extension=32, k=4)
    [plan] = make_plan(Source(replace(config, saes=(large,))), tmp_path).members
    assert plan.work_bytes == plan.saved_bytes == 4 * plan.parameters


def test_the_checkpoints_and_saes_are_as_large_as_planned(config: RunConfig, finished_run: Run, tmp_path: Path) -> None:
    plan = make_plan(Source(config), tmp_path)
    saved = sum(path.stat().st_size for path in (finished_run.folder / "saes").rglob("*.safetensors"))
    assert saved == pytest.approx(4 * sum(member.parameters for member in plan.members), rel=0.2)


def test_times_are_measured_and_change_nothing(config: RunConfig, finished_run: Run, tmp_path: Path) -> None:
    plan = plan_run(config, tmp_path)
    assert plan.batch_seconds is not None
    assert all(member.step_seconds is not None and member.step_seconds > 0 for member in plan.members)
    assert plan.seconds is not None
    assert plan.seconds == pytest.approx(
        STEPS * (plan.batch_seconds + sum(member.step_seconds or 0 for member in plan.members))
    )
    half = replace(plan, steps_done=STEPS // 2)
    assert half.seconds == pytest.approx(plan.seconds / 2)
    assert "Time: about " in str(plan)
    assert plan.to_dict()["seconds"] == plan.seconds


def test_a_run_whose_times_were_measured_has_the_same_bits(
    config: RunConfig, finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kronsae.runs.run.TIMED_FROM_STEPS", 1)
    said: list[str] = []
    run = execute(config, tmp_path / "r", show_progress=False, say=said.append)
    assert any("Time: about " in line for line in said)
    assert_same_run(finished_run, run)


def test_unequal_members(config: RunConfig, tmp_path: Path) -> None:
    """At equal FLOPs the cheaper KronSAE trains longer; the plan and all files contain its own number of tokens."""
    loop = replace(config.loop, same_flops_as="topk")
    cheap = kron(num_heads=4, d_base=2, d_extension=4, k=4, dead_after_tokens=200)
    config = replace(config, loop=loop, saes=(config.saes[0], cheap))
    plan = make_plan(Source(config), tmp_path)
    topk_plan, kron_plan = plan.members
    spent = [training_flops(member.shape(WIDTH), 1) for member in config.saes]
    assert kron_plan.steps == STEPS * spent[0] // spent[1] > STEPS
    assert plan.steps == kron_plan.steps
    assert f"{topk_plan.tokens:,} tokens in {STEPS} steps" in str(plan)
    run = execute(config, tmp_path / "r", show_progress=False)
    rows = {row["name"]: row for row in run.compare(60).rows}
    assert [rows[name]["tokens"] for name in ("topk", "kron")] == [topk_plan.tokens, kron_plan.tokens]
    assert rows["kron"]["training_flops"] == kron_plan.flops <= rows["topk"]["training_flops"]
    assert topk_plan.flops - kron_plan.flops < training_flops(cheap.shape(WIDTH), 64)
    last = {row["sae"]: row["step"] for row in run.metrics()}
    assert last == {"topk": STEPS, "kron": kron_plan.steps}
    equal = execute(replace(config, loop=replace(loop, same_flops_as=None)), tmp_path / "equal", show_progress=False)
    assert all(torch.equal(v, weights(equal)[k]) for k, v in weights(run).items() if k.startswith("topk"))


def test_a_budget_in_flops_trains(config: RunConfig, tmp_path: Path) -> None:
    loop = LoopConfig(flops=1e7, batch_tokens=64)
    run = execute(replace(config, loop=loop), tmp_path / "r", show_progress=False)
    assert open_run(run.folder).config.loop == loop
    assert all(1e7 * 0.9 < row["training_flops"] <= 1e7 for row in run.compare(60).rows)


def plan_with(config: RunConfig, tmp_path: Path, **changes: Any) -> Plan:
    return replace(make_plan(Source(config), tmp_path), **changes)


def test_what_does_not_fit_is_refused(config: RunConfig, tmp_path: Path) -> None:
    plan_with(config, tmp_path, memory_available_bytes=None).check()
    plan_with(config, tmp_path).check()
    with pytest.raises(UserError) as caught:
        plan_with(config, tmp_path, memory_available_bytes=2**20, buffer_tokens=3 * 2**38 // WIDTH).check()
    message = str(caught.value)
    assert message.startswith("the run must fit into memory; it needs about 3 TB (SAEs with gradients and Adam's mom")
    assert "shuffle buffer 3 TB" in message
    assert message.endswith(
        ", but only 1 MB are available. Lower buffer_tokens, train fewer or smaller SAEs at once, or use smaller "
        "batches."
    )
    with pytest.raises(UserError, match=r"^checkpoints and SAEs must fit on the disk; they need .*, but only 0 MB are"):
        plan_with(config, tmp_path, disk_free_bytes=0).check()


def test_a_run_that_does_not_fit_leaves_nothing(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "available_memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"^the run must fit into memory"):
        execute(config, tmp_path / "r", show_progress=False)
    assert not (tmp_path / "r").exists()


def test_a_dry_run_tries_nothing_that_does_not_fit(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "available_memory_bytes", lambda: 1000)
    monkeypatch.setattr(planning, "with_times", None)
    assert not plan_run(config, tmp_path).fits_memory


def test_some_members_take_what_they_take_alone(config: RunConfig, tmp_path: Path) -> None:
    """The plan of a subset of members, as in a sweep, equals the plan of a run of these members."""
    elsewhere = kron(num_heads=8, d_base=2, d_extension=2, k=4, name="two", read="layers.0,layers.2")
    both = replace(config, saes=(config.saes[0], elsewhere))
    plan = make_plan(Source(both), tmp_path)
    assert (plan.hook, plan.d_in) == ("layers.2, layers.0", 2 * WIDTH)
    assert f"at layers.2 (width {WIDTH}), layers.0 (width {WIDTH}) of {both.model.name}: " in str(plan)
    for number in (0, 1):
        alone = make_plan(Source(replace(both, saes=(both.saes[number],))), tmp_path)
        part = replace(plan, members=(plan.members[number],))
        for figure in ("d_in", "buffer_bytes", "memory_bytes", "disk_bytes"):
            assert getattr(part, figure) == getattr(alone, figure), figure
    assert plan.disk_bytes == sum(member.disk_bytes for member in plan.members)


def test_a_run_s_own_checkpoint_is_no_room_lost(config: RunConfig, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(planning, "free_disk_bytes", lambda folder: 100)
    assert make_plan(Source(config), tmp_path).disk_free_bytes == 100
    (tmp_path / "checkpoint" / "step-00000002").mkdir(parents=True)
    (tmp_path / "checkpoint" / "step-00000002" / "state.safetensors").write_bytes(bytes(7))
    assert make_plan(Source(config), tmp_path, steps_done=2).disk_free_bytes == 107


def test_a_harvest_that_does_not_fit_leaves_nothing(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kronsae.runs.harvest import harvest

    monkeypatch.setattr(resources, "free_disk_bytes", lambda folder: 10)
    with pytest.raises(UserError, match=r"^the activations must fit on the disk; about .* are needed at .*/a and "):
        harvest(
            model=config.model, text=config.text, hook="layers.2", tokens=100, out=tmp_path / "a", context_length=32
        )
    assert not (tmp_path / "a").exists()


def test_what_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_disk_bytes(tmp_path / "x" / "y") > 0
    check_disk(tmp_path, 1, "nothing", "")
    (tmp_path / "max").write_text("5000\n")
    (tmp_path / "now").write_text("2000\n")
    monkeypatch.setattr(resources, "CGROUP_FILES", ((str(tmp_path / "max"), str(tmp_path / "now")),))
    assert available_memory_bytes() == 3000
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 700\nactive_file 300\nslab 50\n")
    assert available_memory_bytes() == 4000
    (tmp_path / "memory.stat").write_text(
        "inactive_file 1\nactive_file 2\ntotal_inactive_file 10\ntotal_active_file 20\n"
    )
    assert available_memory_bytes() == 3030
    (tmp_path / "max").write_text("max\n")
    found = available_memory_bytes()
    assert found is None or found > 3000


def test_sizes_and_durations_in_words() -> None:
    assert [format_bytes(n) for n in (0, 2**19, 3 * 2**20, 1.5 * 2**30, 1500 * 2**30, 2**41)] == [
        "0 MB",
        "0.5 MB",
        "3 MB",
        "1.5 GB",
        "1.46 TB",
        "2 TB",
    ]
    assert [format_duration(n) for n in (3, 119, 180, 7200, 200_000)] == [
        "3 s",
        "119 s",
        "3.0 minutes",
        "2.0 hours",
        "2.3 days",
    ]
