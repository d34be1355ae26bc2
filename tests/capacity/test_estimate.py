"""Estimates compared with the plan of a run and with sums computed by hand; which parallelism a training needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from tests.tiny_models import WIDTH
from tests.tiny_runs import tiny_config

from kronsae import kernels
from kronsae.capacity.devices import Device, find_device
from kronsae.capacity.estimate import NOTED_GAIN, Estimate, estimate, single_plan, token_bytes
from kronsae.capacity.layout import Division, Layout, divide, part_of
from kronsae.capacity.models import GivenShape
from kronsae.capacity.work import Group, gradient_sum, merge_bytes, pass_work, seconds_of, step_work
from kronsae.core.sparsifiers import JumpReLUConfig
from kronsae.data.model import ModelConfig
from kronsae.data.text import TextConfig
from kronsae.runs.architectures import kron, topk
from kronsae.runs.config import RunConfig
from kronsae.runs.pipeline import Source
from kronsae.runs.planning import make_plan
from kronsae.runs.recipes import RECIPES, tiny
from kronsae.support.errors import UserError
from kronsae.training.config import LoopConfig, MemberConfig

FolderOf = Callable[[str], Path]
H100 = find_device("h100")
HUGE = kron(num_heads=2**16, d_base=8, d_extension=32, k=64)


def config_of(*members: MemberConfig, model: str = "gpt2", dtype: str = "bfloat16", tokens: int = 10**9) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name=model, dtype=dtype),
        text=TextConfig(source="bundled"),
        hook="layers.6",
        saes=members or (kron(num_heads=512, d_base=2, d_extension=4, k=32),),
        loop=LoopConfig(tokens=tokens, batch_tokens=8192),
    )


def divided(config: RunConfig, layout: Layout) -> Division:
    found = divide(config, *single_plan(config), layout)
    assert found is not None
    return found


def test_the_plan_of_a_recipe_is_what_the_run_announces(tmp_path: Path) -> None:
    """All values that both know: SAEs, steps, tokens, FLOPs, memory by part, disk space."""
    config = tiny()
    source = Source(config)
    source.language_model.pass_size.most_tokens = None  # as on a GPU
    with kernels.use("cpu"):
        announced = make_plan(source, tmp_path / "r")
    planned, _ = single_plan(config)
    assert replace(announced, memory_available_bytes=None, disk_free_bytes=None) == planned
    assert divided(config, Layout()).memory_bytes == announced.memory_bytes
    found = estimate(config, H100, 1)
    assert found.division.memory_bytes == announced.memory_bytes
    assert found.plan.disk_bytes == announced.disk_bytes
    assert found.plan.training_lines == announced.training_lines


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_plan_of_a_local_model_is_what_the_run_announces(
    kind: str, tiny_model_folder: FolderOf, text_file: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_model_folder(kind), text_file)
    with kernels.use("cpu"):
        announced = make_plan(Source(config), tmp_path / "r")
    assert single_plan(config)[0] == replace(announced, memory_available_bytes=None, disk_free_bytes=None)
    assert announced.d_in == WIDTH


def test_every_recipe_has_a_plan() -> None:
    for name, recipe in RECIPES.items():
        found = estimate(recipe(), H100)
        assert found.fits, name
        assert found.plan.tokens > 0
        assert str(found.division.layout) == "none"


def test_one_device_by_hand() -> None:
    """Times, tokens per second, hours and cost of one SAE on one device."""
    config = config_of()
    found = estimate(config, H100, 1, efficiency=0.5, price_per_hour=3.0)
    plan, model = single_plan(config)
    assert model is not None
    tokens = 32 * 256
    passes = pass_work(model, 7, tokens, 256).seconds(989e12, 3.35e12) * 8192 / tokens / 0.5
    shape = config.saes[0].shape(768, "layers.6")
    step = seconds_of(step_work(shape, 8192, plan.members[0].parameters, clipped=True).values(), 67e12, 3.35e12) / 0.5
    assert found.seconds.language_model == pytest.approx(passes)
    assert found.seconds.saes == pytest.approx(step)
    assert found.seconds.communication == 0
    steps = 10**9 // 8192
    assert found.run_seconds == pytest.approx(steps * (passes + step))
    assert found.hours == pytest.approx(found.run_seconds / 3600)
    assert found.cost == pytest.approx(3 * found.hours)
    assert found.tokens_per_second == pytest.approx(8192 / (passes + step))
    assert estimate(config, H100, 1).cost is None


def test_memory_per_device_by_hand() -> None:
    """2 x 4 devices: everything of the dictionary in four parts, but for b_dec; tokens and buffer in shares."""
    config = config_of()
    plan, _ = single_plan(config)
    found = divided(config, Layout(data=2, heads=4))
    parameters = 128 * 6 * 769 + 1024 * 768 + 768
    assert found.kept_bytes == {
        "language model's weights": 2 * 124_439_808,
        "SAE weights": 4 * parameters,
        "Adam's moments": 8 * parameters,
        "shuffle buffer": plan.buffer_bytes // 8,
        "window pool": plan.window_pool_bytes,
        "batches read ahead": 0,  # the model computes the activations
    }
    step = found.step_bytes
    assert step["vectors"] == 4 * 4096 * 4 * 2 * 768
    assert step["codes"] == 4 * 4096 * 8 * (32 + 384)
    # both gradients are smaller in dense form: 4 bytes, and two copies while they are summed
    assert step["gradients"] == 3 * 4 * parameters
    assert found.memory_bytes == sum(found.kept_bytes.values()) + max(
        plan.model_work_bytes, sum(found.step_bytes.values())
    )
    split = divided(config, Layout(data=2, heads=4, model_parts=4))
    assert found.memory_bytes - split.memory_bytes == 2 * 124_439_808 * 3 // 4


def test_traffic_by_hand() -> None:
    config = config_of()
    found = divided(config, Layout(data=2, heads=4))
    [member] = found.members
    encoder, decoder = 128 * 6 * 769 + 768, 1024 * 768
    pair, four = Group(2, 8), Group(4, 4)
    sums, merge = member.sent
    assert sums.bytes == sum(
        gradient_sum(size, 768, rows, 8192, pair)[0] for size, rows in ((encoder, 64), (decoder, 32))
    )
    assert (sums.span, merge.span) == (8, 4)
    assert merge.bytes == merge_bytes(member.shape, 4096, four)
    [rows] = found.batch_sent
    assert rows.bytes == 0.75 * 4096 * 4 * 768
    assert divided(config, Layout(data=8)).batch_sent == ()
    within, between = divided(config, Layout(data=8, model_parts=2)).batch_sent, 0.5 * 8192 * 2 / 8 * 768 * 2
    assert [one.bytes for one in within] == [between]
    assert divided(config, Layout()).members[0].sent == ()


def test_parts_of_saes() -> None:
    pair = kron(num_heads=12, d_base=2, d_extension=4, k=8).shape(6, "0")
    half = part_of(pair, 2)
    assert half is not None
    assert (half.d_sae, half.encoder.multiply_adds(6)) == (48, 6 * 6 * 6 + 48)
    assert part_of(pair, 5) is None  # not a whole number of heads
    assert part_of(pair, 12) == kron(num_heads=1, d_base=2, d_extension=4, k=8).shape(6, "0")
    assert part_of(replace(pair, sparsifier=replace(pair.sparsifier, k=9)), 12) is None  # a part has 8 latents
    assert part_of(replace(pair, sparsifier=JumpReLUConfig(k=8)), 2) is None
    dense = topk(d_sae=96, k=8).shape(6, "0")
    third = part_of(dense, 3)
    assert third is not None
    assert third.d_sae == 32
    assert part_of(dense, 1) == dense


def device(memory: float) -> Device:
    return find_device("h100", device_memory=memory)


def test_which_parallelism_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary is divided only where memory requires it, and no further."""
    small = config_of()
    assert str(estimate(small, H100, 1).division.layout) == "none"
    assert str(estimate(small, H100, 4).division.layout) == "data parallel over 4"
    large = config_of(kron(num_heads=2**18, d_base=2, d_extension=4, k=32))
    needed = estimate(large, H100, 1).division.memory_bytes
    tight = device(0.3 * needed)
    alone = estimate(large, tight, 1)
    assert not alone.fits
    with pytest.raises(UserError) as caught:
        alone.check()
    message = str(caught.value)
    assert message.startswith("the training must fit into the memory of the devices; it needs about ")
    assert message.endswith(" on each of 1 h100 (none). Give --gpus 4.")
    enough = estimate(large, tight)
    enough.check()
    assert (enough.devices, enough.division.layout.model_parts) == (4, 1)
    assert str(enough.division.layout) == "head parallel over 4"
    eight = estimate(large, tight, 8)
    assert str(eight.division.layout) == "head parallel over 4 x data parallel over 2"
    assert eight.faster is not None
    assert str(eight.faster.division.layout) == "head parallel over 8"
    assert eight.faster.tokens_per_second > eight.tokens_per_second
    named = "Head parallel over 8 might be faster: "
    assert eight.faster.tokens_per_second < NOTED_GAIN * eight.tokens_per_second
    assert not any(note.startswith(named) for note in eight.notes)  # too little to be named
    monkeypatch.setattr("kronsae.capacity.estimate.NOTED_GAIN", 1.0)
    assert any(note.startswith(named) for note in eight.notes)


def test_what_no_number_of_devices_holds() -> None:
    """JumpReLU is not divided, so the smallest estimate is of one device, and says that more do not help."""
    member = replace(topk(d_sae=2**20, k=32), sparsifier=JumpReLUConfig(k=32))
    found = estimate(config_of(member), device(2**30))
    assert (found.devices, found.fits) == (1, False)
    with pytest.raises(UserError, match=r"Use smaller SAEs or batches\.$"):
        found.check()


def test_a_70b_model_and_2_to_the_24_latents() -> None:
    """10^12 tokens: the dictionary needs 32 devices of 80 GB, and the language model is divided too."""
    config = config_of(HUGE, model="meta-llama/Llama-3.1-70B", tokens=10**12)
    found = estimate(config, H100)
    found.check()
    layout, member = found.division.layout, found.plan.members[0]
    assert member.d_sae == 2**24
    assert 12 * member.parameters / 16 > H100.usable_bytes > 12 * member.parameters / 32
    assert (found.devices, layout.heads) == (32, 32)
    assert layout.model_parts > 1
    assert str(layout).startswith("head parallel over 32; each copy of the language model over ")
    assert found.plan.tokens == 10**12 // 8192 * 8192
    assert any("kronsae does not divide one" in note for note in found.notes)
    assert any(note.startswith("A divided SAE is gathered when it is saved: 592 GB") for note in found.notes)
    assert found.harvested_bytes["bfloat16"] == 2 * 8192 * found.plan.tokens
    more = estimate(config, H100, 64)
    assert more.division.layout.heads >= 32
    assert more.division.layout.model_parts < layout.model_parts  # dictionaries leave more room
    assert more.tokens_per_second > found.tokens_per_second


def times(config: RunConfig, devices: int = 1, gpu: Device = H100) -> Estimate:
    return estimate(config, gpu, devices)


def test_monotonicity() -> None:
    """More latents, more tokens and a larger model never cost less; faster devices never take longer."""
    sizes = [config_of(kron(num_heads=heads, d_base=2, d_extension=4, k=32)) for heads in (512, 2048, 8192)]
    found = [times(config) for config in sizes]
    for less, more in pairwise(found):
        assert less.seconds.saes < more.seconds.saes
        assert less.division.memory_bytes < more.division.memory_bytes
        assert less.plan.disk_bytes < more.plan.disk_bytes
        assert less.seconds.language_model == more.seconds.language_model
    models = [times(config_of(model=name)) for name in ("pythia-160m", "pythia-1.4b", "llama-3.1-8b")]
    for less, more in pairwise(models):
        assert less.tokens_per_second > more.tokens_per_second
        assert less.hours < more.hours
    double = times(config_of(tokens=2 * 10**9))
    assert double.hours == pytest.approx(2 * times(config_of()).hours, rel=1e-4)
    assert double.division.memory_bytes == times(config_of()).division.memory_bytes
    counts = [times(config_of(), devices) for devices in (1, 2, 4, 8)]
    assert counts == sorted(counts, key=lambda one: one.tokens_per_second)
    for one in counts:  # communication and weights that all devices read keep it below ideal
        assert one.tokens_per_second <= one.devices * counts[0].tokens_per_second
    faster = [replace(H100, **{name: 2 * getattr(H100, name)}) for name in ("flops", "float32_flops", "bandwidth")]
    assert all(times(config_of(), 1, gpu).hours < counts[0].hours for gpu in faster)
    slow_links = replace(H100, link_bandwidth=H100.link_bandwidth / 10)
    assert times(config_of(), 8, slow_links).hours > counts[3].hours
    assert times(config_of(), 1, slow_links).hours == counts[0].hours


def test_several_saes_share_the_pass() -> None:
    pair = topk(d_sae=4096, k=32), kron(num_heads=512, d_base=2, d_extension=4, k=32)
    both, *alone = (times(config_of(*members)) for members in (pair, pair[:1], pair[1:]))
    assert both.seconds.language_model == alone[0].seconds.language_model
    assert both.seconds.saes == pytest.approx(sum(one.seconds.saes for one in alone))
    loop = replace(config_of().loop, same_flops_as="topk")
    longer = times(replace(config_of(*pair), loop=loop))
    steps = {member.name: member.steps for member in longer.plan.members}
    assert steps["kron"] > steps["topk"]
    step = {name: longer._step_seconds(name) for name in steps}
    expected = steps["kron"] * longer.pass_seconds + sum(steps[name] * step[name] for name in steps)
    assert longer.run_seconds == pytest.approx(expected)


def test_bytes_on_disk_by_dtype() -> None:
    widths = {"layers.0": 10, "layers.1": 6}
    assert [token_bytes(widths, dtype) for dtype in ("float32", "bfloat16", "float16", "int8")] == [64, 32, 32, 24]
    found = times(config_of())
    assert found.harvested_bytes["float32"] == 4 * 768 * found.plan.tokens
    assert found.plan.disk_bytes == found.division.plan.disk_bytes


def test_refusals() -> None:
    config = config_of()
    for value in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match=rf"^efficiency must be above 0 and at most 1; got {value}\.$"):
            estimate(config, H100, efficiency=value)
    with pytest.raises(UserError, match=r"^price_per_hour must be finite and at least 0; got -1\.0\.$"):
        estimate(config, H100, price_per_hour=-1.0)
    with pytest.raises(UserError, match=r"^gpus must be a whole number above 0; got 0\.$"):
        estimate(config, H100, 0)
    with pytest.raises(UserError, match=r"^gpus must be at most 16,384; got 20,000\. Plan for fewer\.$"):
        estimate(config, H100, 20_000)
    few = replace(config, loop=replace(config.loop, batch_tokens=2))
    with pytest.raises(UserError) as caught:
        estimate(few, H100, 7)
    assert str(caught.value) == (
        "gpus must allow a division of batches of 2 tokens and of all SAEs; got 7. Give fewer, or a number that "
        "divides the heads or latents of every SAE."
    )
    with pytest.raises(UserError, match=r"^hook must name a layer from 0 to 11; got 'layers\.12'\."):
        estimate(replace(config, hook="layers.12"), H100)


def test_figures_as_json_and_as_text() -> None:
    found = estimate(config_of(), H100, 2, price_per_hour=2.0)
    figures = found.to_dict()
    assert figures["parallelism"] == {"kind": "data parallel over 2", "data": 2, "heads": 1, "model_parts": 1}
    assert figures["memory_per_device"]["total"] == found.division.memory_bytes
    assert figures["step_seconds"]["total"] == pytest.approx(
        sum(figures["step_seconds"][part] for part in ("language_model", "saes", "communication"))
    )
    assert figures["run"]["seconds"] / 3600 == pytest.approx(figures["hours"])
    assert figures["cost"] == pytest.approx(4 * figures["hours"])
    assert not math.isnan(figures["tokens_per_second"])
    text = str(found)
    assert "Model: gpt2, width 768, 12 layers of which 7 run, 124,439,808 parameters in bfloat16 (table of" in text
    assert "Devices: 2 x h100 (data sheet of NVIDIA H100 SXM).\nParallelism: data parallel over 2.\n" in text
    assert "predictions at 40% of the device's peak rates, not measurements" in text
    assert " at 2 per device and hour." in text


def test_harvested_activations_need_no_model(tiny_model_folder: FolderOf, text_file: Path, tmp_path: Path) -> None:
    from kronsae.runs.harvest import harvest, with_activations

    live = tiny_config(tiny_model_folder("llama"), text_file)
    harvest(model=live.model, text=live.text, hook=live.hook, tokens=200, out=tmp_path / "a", context_length=32)
    config = with_activations(live, tmp_path / "a")
    with kernels.use("cpu"):
        announced = make_plan(Source(config), tmp_path / "r")
    found = estimate(config, H100, 1)
    assert found.division.memory_bytes == announced.memory_bytes
    assert (found.seconds.language_model, found.layers_run) == (0, 0)
    assert any(note.startswith("Activations are read from disk") for note in found.notes)
    with pytest.raises(UserError, match=r"^d_in, layers, parameters and vocabulary must not be given with harvested"):
        estimate(config, H100, 1, given=GivenShape(d_in=3))
