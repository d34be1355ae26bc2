"""Expansion of braces, names of points, and invalid grids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kronsae.runs.architectures import kron
from kronsae.runs.parsing import with_options
from kronsae.support.errors import UserError
from kronsae.sweeps.grid import SweepConfig, numbers, points, seeds, sweep_config


def grid(*saes: str, **changes: Any) -> SweepConfig:
    return SweepConfig(saes=saes, **{"recipe": "tiny"} | changes)


def test_every_combination_once_per_seed() -> None:
    found = points(grid("kron num_heads=8 d_base={1,2} d_extension=4 k={2,4}", "topk d_sae=32 k=4", seeds=(0, 5)))
    assert [(point.name, point.seed) for point in found[:5]] == [
        ("kron-d_base1-k2", 0),
        ("kron-d_base1-k4", 0),
        ("kron-d_base2-k2", 0),
        ("kron-d_base2-k4", 0),
        ("topk", 0),
    ]
    assert [point.seed for point in found] == [0] * 5 + [5] * 5
    assert all(point.run.seed == point.run.saes[0].seed == point.seed for point in found)
    expected = kron(num_heads=8, d_base=2, d_extension=4, k=2, name="kron-d_base2-k2", seed=5)
    assert found[7].run.saes == (expected,)
    assert found[7].settings == {"num_heads": 8, "d_base": 2, "d_extension": 4, "k": 2}
    assert len({point.digest for point in found}) == 10
    assert len({point.shared for point in found}) == 2


def test_heads_follow_the_width() -> None:
    found = points(grid("kron d_sae=64 d_base={1,2,4} d_extension=4 k=2"))
    encoders = [point.run.saes[0].encoder for point in found]
    assert [(one.d_sae, getattr(one, "num_heads", None)) for one in encoders] == [(64, 16), (64, 8), (64, 4)]


def test_null_symbols_are_an_axis() -> None:
    found = points(grid("kron d_sae=64 d_base=2 d_extension=2 k=2 null_symbols={true,false}"))
    encoders = [point.run.saes[0].encoder for point in found]
    assert [(one.d_sae, getattr(one, "num_heads", None)) for one in encoders] == [(64, 8), (64, 16)]
    assert [point.name for point in found] == ["kron-null_symbolsTrue", "kron-null_symbolsFalse"]


def test_words_that_differ_between_two_saes_are_in_the_names() -> None:
    found = points(grid("topk d_sae=32 k=4", "topk d_sae=64 k=4 lr=1e-3"))
    assert [point.name for point in found] == ["topk-d_sae32", "topk-d_sae64-lr0.001"]
    named = points(grid("topk d_sae={32,64} k=4 name=base"))
    assert [(point.name, point.kind) for point in named] == [("base-d_sae32", "base"), ("base-d_sae64", "base")]


def test_budgets_and_options_are_axes_too() -> None:
    sweep = grid(
        "topk d_sae=32 k=4", tokens=(4096, 8192), set=("saes.*.optimizer.beta2={0.9,0.99}", "buffer_tokens=2048")
    )
    found = points(sweep)
    assert [point.name for point in found] == [
        "topk-tokens4096-optimizer.beta20.9",
        "topk-tokens4096-optimizer.beta20.99",
        "topk-tokens8192-optimizer.beta20.9",
        "topk-tokens8192-optimizer.beta20.99",
    ]
    assert [(one.run.loop.tokens, one.run.saes[0].optimizer.beta2) for one in found] == [
        (4096, 0.9),
        (4096, 0.99),
        (8192, 0.9),
        (8192, 0.99),
    ]
    assert {point.run.buffer_tokens for point in found} == {2048}
    assert [point.shared == found[0].shared for point in found] == [True, True, False, False]
    (one, _) = points(grid("topk d_sae=32 k=4", flops=(10**9, 2e9)))
    assert (one.run.loop.flops, one.run.loop.tokens) == (10**9, None)


def test_a_point_is_known_by_its_content() -> None:
    (one,) = points(grid("topk d_sae=32 k=4"))
    (named,) = points(grid("topk d_sae=32 k=4 name=x"))
    assert one.digest == named.digest
    for same in ("eval_tokens=99", "loop.log_every=1", "loop.checkpoint_every=1"):
        assert points(grid("topk d_sae=32 k=4", set=(same,)))[0].digest == one.digest
    for changed in (
        grid("topk d_sae=32 k=4", set=("held_out_share=0.1",)),
        grid("topk d_sae=32 k=3"),
        grid("topk d_sae=32 k=4", tokens=(4096,)),
        grid("topk d_sae=32 k=4", seeds=(1,)),
    ):
        assert points(changed)[0].digest != one.digest


def test_saes_with_hooks_of_their_own_need_no_other_and_share_a_stream() -> None:
    start: dict[str, Any] = {"recipe": None, "model": "bundled", "text": "bundled", "tokens": (8192,)}
    found = points(grid("topk d_sae=32 k=4 read={layers.1,layers.2}", **start))
    assert [point.run.hooks for point in found] == [("layers.1",), ("layers.2",)]
    assert len({point.shared for point in found}) == 1
    with pytest.raises(UserError, match=r"^--hook must be given without --recipe or --config"):
        points(grid("topk d_sae=32 k=4 read=layers.1", "topk d_sae=32 k=4 name=b", **start))


def test_lists_within_braces() -> None:
    found = points(grid("matryoshka d_sae=32 k=2 groups={[8,24],[16,16]}"))
    assert [point.settings["groups"] for point in found] == [[8, 24], [16, 16]]
    assert [point.name for point in found] == ["matryoshka-groups_8_24", "matryoshka-groups_16_16"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"saes": ()}, "saes must name at least one SAE; got none."),
        ({"seeds": ()}, "seeds must name at least one seed; got none."),
        ({"seeds": (1, 1)}, "seeds must have different values; got 1 more than once."),
        ({"tokens": (4096,), "flops": (1e9,)}, "the budgets must be either tokens or flops; got both. Leave one out."),
        ({"flops": (1e9,), "same_flops_as": "a"}, "same_flops_as must be used with tokens; got flops. Leave one out."),
        ({"saes": ("topk d_sae=32 k={2,4",)}, "--sae must have values between its braces, and no nested braces; got"),
        ({"saes": ("topk d_sae=32 k={2,{4}}",)}, "--sae must have values between its braces, and no nested braces; g"),
        ({"saes": ("topk d_sae=32 k={}",)}, "--sae must have values between its braces, and no nested braces; got"),
        ({"saes": ("topk d_sae=32 k=2}",)}, "--sae must have matching braces; got 'topk d_sae=32 k=2}'."),
        ({"saes": ("topk d_sae=32 k={2,,4}",)}, "braces must contain comma-separated values; got '{2,,4}'."),
        (
            {"saes": ("topk d_sae=32 k=2 seed={0,1}",)},
            "seeds must be given with --seeds in a sweep; got 'topk d_sae=32 k=2 seed={0,1}'. Leave seed out of it.",
        ),
        (
            {"saes": ("topk d_sae=32 k={2,2}",)},
            "SAEs of the grid must have different names; got 'topk' twice. Give one a name=.",
        ),
        (
            {
                "saes": (
                    "kron d_sae=32 d_base=2 d_extension=2 k=2",
                    "kron num_heads=8 d_base=2 d_extension=2 k=2 name=b",
                )
            },
            "SAEs of the grid must differ; got the same training as 'b' and as 'kron'. Leave one out.",
        ),
        (
            {"set": ("eval_tokens={64,128}",)},
            "SAEs of the grid must differ; got the same training as 'topk-eval_tokens128' and as 'topk-eval_tokens64'.",
        ),
        ({"set": ("saes.0.seed=1",)}, "--set in a sweep must use saes.*, which means every SAE; got 'saes.0.seed=1'."),
        (
            {"set": ("seed=7",)},
            "seeds must be given with --seeds and names with --sae in a sweep; got --set seed=7. Leave it out.",
        ),
        (
            {"set": ("saes.*.seed={1,2}",)},
            "seeds must be given with --seeds and names with --sae in a sweep; got --set saes.*.seed={1,2}.",
        ),
        (
            {"set": ("saes.*.name=x",)},
            "seeds must be given with --seeds and names with --sae in a sweep; got --set saes.*.name=x.",
        ),
        ({"saes": ("topk d_sae=32 k=2 name='x",)}, "--sae must have matching quotes; got"),
        ({"set": ("lop.tokens=1",)}, "--set must name a field of the config; got 'lop.tokens', in which 'lop' is unk"),
        ({"recipe": "tny"}, "recipe must be one of "),
        ({"recipe": None}, "--tokens, --model, --text, --hook must be given without --recipe or --config."),
    ],
)
def test_what_no_grid_can_be_made_of(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"saes": ("topk d_sae=32 k=2",), "recipe": "tiny"}
    with pytest.raises(UserError) as caught:
        points(SweepConfig(**given | changes))
    assert str(caught.value).startswith(message)


def test_numbers_and_seeds() -> None:
    assert numbers("1,2_000", "--tokens") == (1, 2000)
    assert numbers("{1e9, 2}", "--flops") == (1e9, 2)
    assert (seeds(3), seeds("3"), seeds("4,5"), seeds("{4}"), seeds([7])) == ((0, 1, 2), (0, 1, 2), (4, 5), (4,), (7,))
    with pytest.raises(UserError, match=r"^--tokens must be comma-separated numbers; got 'many'\.$"):
        numbers("many", "--tokens")
    with pytest.raises(UserError, match=r"^--seeds must be whole numbers; got '1.5,2'\.$"):
        seeds("1.5,2")
    with pytest.raises(UserError, match=r"^seeds must be a whole number above 0; got 0\.$"):
        seeds(0)


def test_a_file_and_what_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"saes": ["topk d_sae=32 k=4"], "recipe": "tiny", "tokens": [4096], "seeds": [0, 1]}))
    whole = SweepConfig(saes=("topk d_sae=32 k=4",), recipe="tiny", tokens=(4096,), seeds=(0, 1))
    assert sweep_config(path, {}) == whole
    assert sweep_config(path, {"flops": (1e9,), "seeds": (3,)}) == replace(whole, tokens=(), flops=(1e9,), seeds=(3,))
    path.write_text(json.dumps({"kronsae_version": "1", "sweep": {"saes": ["topk d_sae=32 k=4"], "recipe": "tiny"}}))
    assert sweep_config(path, {"tokens": (4096,), "seeds": (0, 1)}) == whole
    path.write_text(json.dumps({"saes": [], "sedes": [1]}))
    with pytest.raises(UserError, match=r"sedes is not a known key of SweepConfig. Did you mean 'seeds'\?"):
        sweep_config(path, {})
    for wrong in ([1, 2], "x", {"kronsae_version": "1", "config": {}}):  # the last one is a run.json
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"grid\.json must hold the config of a sweep, like the sweep\.json of a"):
            sweep_config(path, {})


def test_every_sae_at_once() -> None:
    (point,) = points(grid("topk d_sae=32 k=4"))
    two = replace(point.run, saes=(kron(num_heads=8, d_base=2, d_extension=2, k=2), *point.run.saes))
    changed = with_options(two, ["saes.*.optimizer.clip_norm=null", "saes.*.sparsifier.k=3"])
    assert [(one.optimizer.clip_norm, one.sparsifier.k) for one in changed.saes] == [(None, 3), (None, 3)]
    with pytest.raises(UserError, match=r"; got 'saes.\*.optimiser.lr', in which 'optimiser' is unknown"):
        with_options(two, ["saes.*.optimiser.lr=1"])
