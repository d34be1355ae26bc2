"""``kronsae eval synthetic``: a run's architectures at another size, tiny trainings, deterministic results."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kronsae.cli.main import app
from kronsae.core.encoders import KroneckerEncoderConfig
from kronsae.core.experts import SwitchEncoderConfig
from kronsae.core.losses import MatryoshkaConfig
from kronsae.data.synthetic import SyntheticConfig, mean_l0
from kronsae.eval.known_features import absolute_cosines, mean_correlation_coefficient
from kronsae.measures import synthetic
from kronsae.measures.synthetic import SyntheticStudyConfig, encoder_kind, family, fit_to, measure
from kronsae.runs.architectures import ARCHITECTURES
from kronsae.runs.parsing import parse_sae
from kronsae.runs.recipes import kron, topk
from kronsae.runs.run import Run
from kronsae.support.errors import UserError
from kronsae.training.config import MemberConfig

OWN = SyntheticConfig(d_in=8, independent=16, group_size=4, roots=4, branching=2, conjunctions=4, p_max=0.3, p_min=0.1)
TINY = SyntheticStudyConfig(own=OWN, seeds=2, steps=6, batch=32, held_out_tokens=2000)
MEMBERS = (topk(d_sae=1000, k=50), kron(num_heads=99, d_base=2, d_extension=4, k=50))
EVERY = {name: replace(parse_sae(words), name=name) for name, words in ARCHITECTURES.items()}
ALL = {name: member for name, member in EVERY.items() if not member.shape(1).role}


def at(member: MemberConfig, d_sae: int) -> MemberConfig:
    return fit_to(member, d_sae=d_sae, k=5, seed=3, config=TINY)


@pytest.mark.parametrize("member", ALL.values(), ids=ALL)
def test_every_form_stays_what_it_is_at_another_size(member: MemberConfig) -> None:
    found = at(member, 128)
    assert found.encoder.d_sae == 128
    assert (found.sparsifier.k, found.seed, found.optimizer.lr, found.name) == (5, 3, TINY.lr, member.name)
    assert type(found.encoder) is type(member.encoder)
    assert (found.sparsifier.kind, found.loss.kind) == (member.sparsifier.kind, member.loss.kind)
    if isinstance(found.encoder, KroneckerEncoderConfig):
        assert (found.encoder.d_base, found.encoder.d_extension, found.encoder.num_heads) == (2, 4, 16)
    if isinstance(found.loss, MatryoshkaConfig):
        assert found.loss.groups == (16, 16, 32, 64)  # of 128, 128, 256, 512
    if isinstance(found.encoder, SwitchEncoderConfig):
        assert (found.encoder.num_experts, found.encoder.expert.d_sae) == (8, 16)
    found.shape(8).build()


def test_there_can_be_several_latents_per_feature() -> None:
    result = measure(MEMBERS, replace(TINY, seeds=1, latents_per_feature=3))
    features = result["about"][0]["features"]
    assert [row["d_sae"] for row in result["rows"]] == [3 * features, 3 * features // 8 * 8]
    with pytest.raises(UserError, match=r"latents_per_feature must be a whole number above 0; got 0\."):
        replace(TINY, latents_per_feature=0)


def test_the_gate_stays_and_a_size_that_does_not_divide_loses_latents() -> None:
    found = at(kron(num_heads=4, d_base=3, d_extension=5, k=2, gate="minimum"), 64)
    assert isinstance(found.encoder, KroneckerEncoderConfig)
    assert (found.encoder.gate, found.encoder.num_heads, found.encoder.d_sae) == ("minimum", 4, 60)


def test_a_head_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"as many features \(in each expert\) as one head has latents, 8; got 7"):
        at(MEMBERS[1], 7)


def test_a_hook_of_its_own_is_left_out_and_other_roles_are_refused() -> None:
    elsewhere = replace(MEMBERS[0], read=("layers.1",))
    once = replace(TINY, seeds=1)
    assert measure([elsewhere], once) == measure(MEMBERS[:1], once)
    for name, role in (("transcoder", "transcoder"), ("skip_transcoder-kron", "skip_transcoder"), ("crosscoder",) * 2):
        with pytest.raises(UserError, match=f"because synthetic activations have one hook; '{name}' is a {role}\\."):
            at(EVERY[name], 128)


def test_families_and_encoders() -> None:
    pairs = {name: (family(member), encoder_kind(member.encoder)) for name, member in ALL.items()}
    assert pairs["topk"] == ("topk", "dense")
    assert pairs["matryoshka-kron"] == ("topk-matryoshka", "kronecker")
    assert pairs["switch-kron"] == ("topk-switch", "kronecker")
    assert len(set(pairs.values())) == 10
    assert len({one for one, _ in pairs.values()}) == 5


@pytest.fixture(scope="module")
def tiny_result() -> dict[str, Any]:
    return measure(MEMBERS, TINY)


def test_the_same_seed_gives_the_same_digits(tiny_result: dict[str, Any]) -> None:
    assert json.dumps(measure(MEMBERS, TINY), allow_nan=False) == json.dumps(tiny_result)


def test_what_a_row_says(tiny_result: dict[str, Any]) -> None:
    assert [(row["seed"], row["sae"]) for row in tiny_result["rows"]] == [
        (s, n) for s in (0, 1) for n in ("topk", "kron")
    ]
    features = replace(OWN, seed=1).build()
    l0 = mean_l0(features)
    assert tiny_result["about"][1] == {"seed": 1, "features": OWN.features, "d_in": 8, "l0": l0}
    row = tiny_result["rows"][3]
    assert (row["d_sae"], row["tokens"], row["family"], row["encoder"]) == (32, 2048, "topk", "kronecker")
    start = fit_to(MEMBERS[1], d_sae=OWN.features, k=round(l0), seed=1, config=TINY).shape(8).build(1)
    chance = mean_correlation_coefficient(absolute_cosines(start.W_dec, features.directions_GD))
    assert row["mcc_untrained"] == chance != row["mcc"]
    assert set(row["f1_by_kind"]) == {"independent", "root", "child", "conjunction"}
    assert set(row["absorption"]) == {"hierarchy", "conjunction"}
    assert row["l0"] <= round(l0)


def test_training_finds_more_than_chance() -> None:
    easy = replace(OWN, d_in=32, conjunctions=0, correlation=0.0, p_max=0.1, p_min=0.1)
    config = replace(TINY, own=easy, seeds=1, steps=250, batch=128, lr=1e-2)
    [row] = measure(MEMBERS[:1], config)["rows"]
    assert row["mcc"] > row["mcc_untrained"] + 0.2
    assert row["f1_by_kind"]["independent"] > 0.5


def test_no_sae_starts_at_the_truth() -> None:
    """If the weights and the features used the same random numbers, an untrained SAE would match the features."""
    for seed in (0, 1):
        features = replace(OWN, d_in=64, seed=seed).build()
        untrained = fit_to(MEMBERS[0], d_sae=OWN.features, k=2, seed=seed, config=TINY).shape(64).build(seed)
        assert float(absolute_cosines(untrained.W_dec, features.directions_GD).diagonal().mean()) < 0.2


def test_progress_counts_over_all_seeds() -> None:
    calls: list[tuple[int, int]] = []
    measure(MEMBERS[:1], replace(TINY, held_out_tokens=1), progress=lambda *at: calls.append(at))
    assert calls == [(done, 12) for done in range(1, 13)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "theirs"}, "source must be 'own' or 'sae_lens'"),
        ({"seeds": 0}, "seeds must be a whole number above 0"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"lr": -1.0}, "lr must be above 0"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(TINY, **changes)


def test_the_command_keeps_its_result(
    finished_run: Run, tiny_result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run.folder, folder)
    calls: list[tuple[list[str], int]] = []

    def counted(members: tuple[MemberConfig, ...], config: SyntheticStudyConfig, progress: object) -> dict[str, Any]:
        calls.append(([member.name for member in members], config.steps))
        return tiny_result

    monkeypatch.setattr(synthetic, "measure", counted)
    for options in (["--json"], ["--json"], ["--steps", "7"]):
        command = ["eval", "synthetic", str(folder), "--quiet", *options]
        outcome = CliRunner().invoke(app, command, catch_exceptions=False)
        assert outcome.exit_code == 0
        if "--json" in options:
            assert json.loads(outcome.stdout)["rows"] == tiny_result["rows"]
            assert len(json.loads(outcome.stdout)["verdict"]) > 0
    assert calls == [(["topk", "kron"], SyntheticStudyConfig.steps), (["topk", "kron"], 7)]
    assert "kron" in outcome.stdout
    assert "Kronecker encoders" in outcome.stderr


def test_an_unknown_source_is_refused(finished_run: Run) -> None:
    with pytest.raises(UserError, match="--source must be 'own' or 'sae_lens'; got 'theirs'"):
        CliRunner().invoke(
            app, ["eval", "synthetic", str(finished_run.folder), "--source", "theirs"], catch_exceptions=False
        )
