from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.interventions.test_intervene import make_sae
from tests.tiny_runs import tiny_config
from typer.testing import CliRunner

from kronsae.cli.steer import app
from kronsae.data.model import LanguageModel, ModelConfig, load_model
from kronsae.interventions.intervene import Intervention, ablate, clamp, scale, steer
from kronsae.interventions.steering import (
    STRENGTH,
    Continuation,
    changes_of,
    continuations,
    generate,
    mean_activation_norm,
    padded_prompts,
)
from kronsae.runs.pipeline import Source
from kronsae.runs.recipes import topk
from kronsae.runs.run import Run, execute
from kronsae.support.errors import UserError

PROMPTS = ["The quick brown", "A sparse autoencoder writes each"]


@pytest.fixture(scope="module")
def language_model(tiny_model_folder: Callable[[str], Path]) -> LanguageModel:
    return load_model(ModelConfig(name=str(tiny_model_folder("gpt_neox")), device="cpu"))


def test_prompts_are_padded_on_the_left(language_model: LanguageModel) -> None:
    ids_ST, mask_ST = padded_prompts(language_model, PROMPTS)
    lengths = [len(language_model.tokenizer(prompt, add_special_tokens=False)["input_ids"]) + 1 for prompt in PROMPTS]
    assert mask_ST.sum(1).tolist() == lengths  # one more for <bos>
    assert ids_ST.shape[1] == max(lengths)
    bos = language_model.tokenizer.bos_token_id
    for row, mask in zip(ids_ST, mask_ST, strict=True):
        assert int(row[mask.bool()][0]) == bos
        assert bool(mask[-1])
    bare = load_model(ModelConfig(name=language_model.name, device="cpu"))
    bare.tokenizer.bos_token = None
    with pytest.raises(UserError, match="prompt must have at least one token; got ''"):
        padded_prompts(bare, [""])


def test_with_and_without(language_model: LanguageModel) -> None:
    sae = make_sae()
    strong = Intervention(sae=sae, hook="layers.2", changes=[steer(5, 50.0)])
    nothing = Intervention(sae=sae, hook="layers.2", changes=[steer(5, 0.0)])
    found = continuations(language_model, PROMPTS, strong, new_tokens=8)
    assert [one.prompt for one in found] == PROMPTS
    assert [one.plain for one in found] == generate(language_model, PROMPTS, new_tokens=8)
    assert any(one.changed != one.plain for one in found)
    assert found == continuations(language_model, PROMPTS, strong, new_tokens=8)
    assert all(one.changed == one.plain for one in continuations(language_model, PROMPTS, nothing, new_tokens=8))


def test_drawn_tokens_are_seeded_and_leave_the_generator_alone(language_model: LanguageModel) -> None:
    nothing = Intervention(sae=make_sae(), hook="layers.2", changes=[])
    before = torch.get_rng_state()
    one, same, other = (
        continuations(language_model, PROMPTS[:1], nothing, new_tokens=12, temperature=1.0, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert one == same
    assert one[0].plain == one[0].changed != other[0].plain


def test_what_cannot_be(language_model: LanguageModel, tiny_model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="new_tokens must be a whole number above 0; got 0"):
        generate(language_model, PROMPTS, new_tokens=0)
    with pytest.raises(UserError, match="temperature must be at least 0; got -1"):
        generate(language_model, PROMPTS, temperature=-1)
    with pytest.raises(UserError, match="must not exceed the 64 positions"):
        generate(language_model, PROMPTS, new_tokens=64)
    encoder = load_model(ModelConfig(name=str(tiny_model_folder("bert")), device="cpu"))
    with pytest.raises(
        UserError, match=r"must be able to generate text; '.*' cannot: the checkpoint is BertForMaskedLM"
    ):
        generate(encoder, PROMPTS)


def test_options_become_changes() -> None:
    assert changes_of([1, 2], [5.0], [3], ["4=1.5"], ["6=-2"]) == [
        steer(1, 5.0),
        steer(2, 5.0),
        ablate(3),
        clamp(4, 1.5),
        scale(6, -2.0),
    ]
    assert changes_of([1, 2], [5.0, 6.0], [], [], []) == [steer(1, 5.0), steer(2, 6.0)]
    for latents, amounts in [([1, 2], []), ([], [1.0]), ([1, 2, 3], [1.0, 2.0])]:
        with pytest.raises(UserError, match="--scale must be given once or once per --latent"):
            changes_of(latents, amounts, [], [], [])
    with pytest.raises(UserError, match=r"--clamp must be LATENT=NUMBER, such as 123=4; got '5'"):
        changes_of([], [], [], ["5"], [])
    with pytest.raises(UserError, match="at least one change must be given; got none"):
        changes_of([], [], [], [], [])


def test_the_verb(finished_run: Run) -> None:
    words = [str(finished_run.folder), "--latent", "3", "--scale", "40", "--prompt", PROMPTS[0], "--new-tokens", "5"]
    outcome = CliRunner().invoke(app, [*words, "--sae", "kron", "--json"])
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    assert result["changes"] == [{"latent": 3, "kind": "add", "value": 40.0}]
    (one,) = result["continuations"]
    assert set(one) == {"prompt", "plain", "changed"}
    shown = CliRunner().invoke(app, [*words, "--sae", "topk"])
    assert PROMPTS[0] in shown.stdout
    assert "Latent 3 of topk at layers.2: add 40" in shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert [line.split()[0] for line in shown.stdout.splitlines() if line[:1].strip()] == ["prompt", "plain", "changed"]
    with pytest.raises(UserError, match="--sae must name one of the run's SAEs, topk, kron; got none"):
        CliRunner().invoke(app, words, catch_exceptions=False, standalone_mode=False)


def test_without_a_scale_a_share_of_the_activations_norm_is_added(finished_run: Run) -> None:
    words = [str(finished_run.folder), "--sae", "topk", "--latent", "3", "--latent", "4", "--prompt", PROMPTS[0]]
    words += ["--new-tokens", "2", "--json"]
    norm = float(finished_run.activations(200).norm(dim=1).mean())  # the whole held-out text has more tokens
    source = Source(finished_run.config)
    assert mean_activation_norm(source, "layers.2", tokens=200) == pytest.approx(norm)
    everything = mean_activation_norm(source, "layers.2", tokens=10**9)  # the whole held-out text
    for given, share in (([], STRENGTH), (["--strength", "-0.5"], -0.5)):
        outcome = CliRunner().invoke(app, [*words, *given])
        assert outcome.exit_code == 0, outcome.output
        sae = finished_run.load("topk")
        for change in json.loads(outcome.stdout)["changes"]:
            added = change["value"] * float(sae.W_dec[change["latent"]].detach().norm())
            assert added == pytest.approx(share * everything, rel=1e-5)
        assert f"Steering adds {share:g} times the mean norm of the activations, " in outcome.stderr
    for given, sentence in (
        (["--scale", "1", "--strength", "1"], "--scale and --strength must not be given together; got both"),
        (["--latent", "999"], "latent must be from 0 to 31; got 999"),
    ):
        with pytest.raises(UserError, match=sentence):
            CliRunner().invoke(app, [*words, *given], catch_exceptions=False, standalone_mode=False)
    ablating = [str(finished_run.folder), "--sae", "topk", "--ablate", "3", "--prompt", "x", "--strength", "1"]
    with pytest.raises(UserError, match="--strength must be used with --latent; got no --latent"):
        CliRunner().invoke(app, ablating, catch_exceptions=False, standalone_mode=False)


def test_each_sae_is_steered_at_its_own_hook(
    tiny_model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All hooks have the same width, so using the run's hook would raise no error but be wrong."""
    saes = (
        topk(name="deep", d_sae=32, k=4, read="layers.1"),
        topk(name="across", d_sae=32, k=4, read="layers.1", write="layers.2"),
        topk(name="both", d_sae=32, k=4, read="layers.0, layers.1"),
    )
    config = tiny_config(tiny_model_folder("gpt_neox"), text_file, saes=saes)
    run = execute(replace(config, loop=replace(config.loop, tokens=128)), tmp_path / "run", show_progress=False)
    words = [str(run.folder), "--ablate", "3", "--prompt", PROMPTS[0]]
    used: list[Intervention] = []

    def spy(model: LanguageModel, prompts: list[str], *found: Intervention, **_: object) -> list[Continuation]:
        used.extend(found)
        return []

    monkeypatch.setattr("kronsae.cli.steer.continuations", spy)
    outcome = json.loads(CliRunner().invoke(app, [*words, "--sae", "deep", "--json"]).stdout)
    assert outcome["hook"] == used[0].hook == "layers.1"
    assert config.hook == "layers.2"
    for name, reads in (("across", "layers.1 and writes layers.2"), ("both", r"layers.0 \+ layers.1 and writes")):
        with pytest.raises(UserError, match=f"'{name}' reads {reads}"):
            CliRunner().invoke(app, [*words, "--sae", name], catch_exceptions=False, standalone_mode=False)
