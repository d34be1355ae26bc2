"""``kronsae eval autointerp`` from the command line to the report, against a server on loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.chat.stub import KEY, Reply, Stub, completion, failure, sensible, serving
from typer.testing import CliRunner

from kronsae.chat import Bounds, RetrySettings
from kronsae.chat.endpoint import EndpointModel, endpoint_from_environment
from kronsae.cli.main import app
from kronsae.eval.autointerp import AutointerpConfig
from kronsae.measures.autointerp import Asking, AutointerpResult, Unanswered, measure
from kronsae.measures.latent_sample import count_activations, draw_latents, find_firings, pick_saes
from kronsae.report.measurements import kept_results
from kronsae.report.section import Section
from kronsae.report.sections import sections
from kronsae.runs.evaluation import write_report
from kronsae.runs.loaded import LoadedRun
from kronsae.runs.run import Run
from kronsae.support.errors import UserError

CONFIG = AutointerpConfig(
    latents=3, tokens=2000, radius=2, explained=4, tested=8, per_prompt=4, min_active_tokens=20, seed=1
)
ASKING = Asking(retry=RetrySettings(attempts=2, backoff_seconds=0.001))


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """Return a writable copy of the finished run."""
    return Run(Path(shutil.copytree(finished_run.folder, tmp_path / "run")))


def interpreted(run: Run, stub: Stub, config: AutointerpConfig = CONFIG, **options: Any) -> AutointerpResult:
    model = EndpointModel(*endpoint_from_environment(environment=stub.environment))
    found = measure(run, config, model, **{"asking": ASKING, **options})
    assert found is not None
    return found


def files(run: Run) -> list[Path]:
    return sorted((run.folder / "measures" / "answers").rglob("*.json"))


def test_from_the_text_to_the_scores(run: Run) -> None:
    lines: list[str] = []
    steps: list[tuple[int, int]] = []
    with serving(sensible) as stub:
        found = interpreted(run, stub, say=lines.append, progress=lambda done, total: steps.append((done, total)))
        assert len(stub.requests) == len(files(run))
        asking = len(stub.requests)
        assert steps[-asking:] == [(done, asking) for done in range(1, asking + 1)]
        reading = steps[:-asking]
        assert reading == sorted(reading)
        assert reading[-1][0] == reading[-1][1]
    assert [one.sae for one in found.saes] == run.names
    assert found.unanswered == ()
    for one in found.saes:
        assert len(one.latents) == 3
        assert one.living >= one.eligible >= 3
        for latent in one.latents:
            assert latent.active_tokens >= 20
            assert latent.explanation == "the word fox"
            for score in (latent.detection, latent.fuzzing):
                assert score.batches == -(-(score.positives + score.negatives) // 4) > 0
                assert (score.dropped, score.failed) == (0, 0)
    assert f"{asking} questions to ask (0 more are already answered)" in lines[1]


def test_the_same_again_is_known_and_the_same_elsewhere_is_the_same(run: Run, tmp_path: Path) -> None:
    other = Run(Path(shutil.copytree(run.folder, tmp_path / "other")))
    with serving(sensible) as stub:
        found = interpreted(run, stub)
        number = len(stub.requests)
        assert interpreted(run, stub) == found
        assert len(stub.requests) == number
        assert interpreted(other, stub) == found


def test_the_examples_are_where_the_latent_is_active(run: Run) -> None:
    """Compare with dense activations."""
    loaded = LoadedRun(run)
    saes, windows = pick_saes(loaded, ()), loaded.windows(2000)
    counts = count_activations(loaded, saes, windows)
    chosen = {name: draw_latents(counts[name], 3, at_least=20, seed=1) for name in saes}
    text, firings = find_firings(loaded, saes, windows, chosen)
    for name, sae in saes.items():
        dense = torch.cat([sae.encode(x).to_dense() for _, x in loaded.activations(windows)])
        assert counts[name].tolist() == (dense > 0).sum(0).tolist()
        for latent in chosen[name]:
            where = dense[:, latent] > 0
            assert firings[name][latent].places_E.tolist() == text.kept_N[where.numpy()].tolist()
            assert firings[name][latent].values_E.tolist() == dense[where, latent].tolist()


def test_drawing_latents_is_seeded_uniform_and_of_the_living() -> None:
    counts = torch.tensor([0, 5, 4, 9, 5, 7])
    assert draw_latents(counts, 10, at_least=5, seed=0) == [1, 3, 4, 5]
    drawn = [tuple(draw_latents(counts, 2, at_least=1, seed=seed)) for seed in range(200)]
    assert drawn[7] == tuple(draw_latents(counts, 2, at_least=1, seed=7))
    often = [sum(latent in one for one in drawn) for latent in range(6)]
    assert often[0] == 0
    assert min(often[1:]) > 50  # 80 expected


def test_stopped_at_a_bound_it_goes_on_without_paying_twice(run: Run) -> None:
    """Retries exhaust the limit on requests; questions answered before are not asked again."""

    def flaky(request: dict[str, Any], number: int) -> Reply:
        return failure(500) if number % 3 == 2 and number < 20 else sensible(request)

    with serving(flaky) as stub:
        first = Asking(retry=RetrySettings(attempts=4, backoff_seconds=0.001, concurrency=2), bounds=Bounds())
        questions: list[str] = []
        model = EndpointModel(*endpoint_from_environment(environment=stub.environment))
        assert measure(run, CONFIG, model, asking=first, only_estimate=True, say=questions.append) is None
        total = int(questions[1].split()[0])
        with pytest.raises(UserError, match=f"would exceed max_requests={total}"):
            interpreted(run, stub, asking=replace(first, bounds=Bounds(max_requests=total)))
        assert len(stub.requests) == total
        answered = len(files(run))
        assert 0 < answered < total
        assert "autointerp" not in kept_results(run.folder)[0]
        interpreted(run, stub, asking=first)
        assert len(stub.requests) == total + (total - answered)
    assert len(files(run)) == total


@pytest.mark.parametrize(
    ("bounds", "named"),
    [
        (Bounds(max_requests=5), "max_requests=5"),
        (Bounds(max_tokens=500), "max_tokens=500"),
        (Bounds(max_cost=0.001, price_in=1.0, price_out=1.0), "max_cost=0.001"),
    ],
)
def test_too_much_is_refused_before_anything_is_asked(run: Run, bounds: Bounds, named: str) -> None:
    with serving(sensible) as stub:
        with pytest.raises(UserError, match=f"no question was sent, because this may exceed {named}"):
            interpreted(run, stub, asking=Asking(bounds=bounds))
        assert stub.requests == []


def test_bad_answers_are_dropped_whole_and_counted(run: Run) -> None:
    """Of three kinds of prompt, the second gets too short an answer and the third an invalid one."""

    def bad(request: dict[str, Any], number: int) -> Reply:
        content = json.loads(request["messages"][1]["content"])
        if "explanation" not in content:
            return sensible(request)
        kind = len(str(content)) % 3
        return (sensible(request), completion("[1]"), completion("Sure! [1, 0, 1, 0]"))[kind]

    with serving(bad) as stub:
        found = interpreted(run, stub)
    scores = [score for one in found.saes for latent in one.latents for score in (latent.detection, latent.fuzzing)]
    assert 0 < sum(score.dropped for score in scores) == sum(one.dropped for one in found.saes)
    for score in scores:
        judged = score.positives + score.negatives
        assert 4 * (score.batches - score.dropped) - 3 <= judged <= 4 * (score.batches - score.dropped)


def test_failures_are_reported_stored_and_asked_again(run: Run) -> None:
    broken = True

    def failing(request: dict[str, Any], number: int) -> Reply:
        judging = "explanation" in json.loads(request["messages"][1]["content"])
        return failure(400, "filtered") if broken and judging and number % 2 else sensible(request)

    patient = Asking(retry=RetrySettings(attempts=1, concurrency=1, give_up_after=50))
    lines: list[str] = []
    with serving(failing) as stub:
        found = interpreted(run, stub, asking=patient, say=lines.append)
        [unanswered] = found.unanswered
        assert unanswered == Unanswered(reason='HTTP 400: "filtered"', questions=sum(one.failed for one in found.saes))
        assert unanswered.questions > 0
        assert 'HTTP 400: "filtered" x' in lines[-1]
        section = section_of(run)
        assert any("prompts have no answer" in note for note in section.notes)
        broken, number = False, len(stub.requests)
        again = interpreted(run, stub, asking=patient)
        assert len(stub.requests) == number + unanswered.questions
    assert again.unanswered == ()
    assert sum(one.failed for one in again.saes) == 0


def section_of(run: Run) -> Section:
    return next(one for one in sections(kept_results(run.folder)[0], run.names) if one.key == "autointerp")


def test_the_page_escapes_what_the_language_model_says(run: Run) -> None:
    evil = "<script>alert(1)</script> & \u202e [bold]x[/bold]"

    def answering(request: dict[str, Any], number: int) -> Reply:
        if "explanation" not in json.loads(request["messages"][1]["content"]):
            return completion(json.dumps({"explanation": evil}))
        return sensible(request)

    with serving(answering) as stub:
        found = interpreted(run, stub)
    section = section_of(run)
    means, latents = (table for _, table in section.tables)
    assert len(means.rows) == 2
    assert len(latents.rows) == 6
    assert f"{found.saes[0].detection.mean:.3f}" in means.rows[0].cells[0].text
    page = write_report(run).read_text("utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; \\u202e" in page
    assert "<script>alert" not in page
    assert "\u202e" not in page


ARGUMENTS = ["--min-active", "20", "--latents", "2", "--tokens", "2000", "--tested", "4", "--seed", "3"]


def invoke(run: Run, *options: str, environment: dict[str, str] | None = None) -> Any:
    clean = {"KRONSAE_CHAT_URL": "", "KRONSAE_CHAT_MODEL": "", "KRONSAE_CHAT_KEY": ""}
    words = ["eval", "autointerp", str(run.folder), *ARGUMENTS, *options]
    return CliRunner().invoke(app, words, env={**clean, **(environment or {})})


def test_the_verb_prints_figures_and_never_the_key(run: Run) -> None:
    with serving(sensible) as stub:
        outcome = invoke(run, "--estimate", environment=stub.environment)
        assert outcome.exit_code == 0, outcome.output
        assert "What now? the same command without --estimate" in outcome.stderr
        assert stub.requests == []
        outcome = invoke(run, "--json", environment=stub.environment)
        assert outcome.exit_code == 0, outcome.output
        figures = json.loads(outcome.stdout)
        assert [one["sae"] for one in figures["saes"]] == run.names
        assert f"Excerpts of the held-out text are sent to {stub.url.split('/')[2]} (model stub)." in outcome.stderr
        table = invoke(run, environment=stub.environment)
        assert "Already measured" in table.stderr
        assert "the word fox" in table.stdout
        assert "mean" in table.stdout
    assert KEY not in outcome.output + table.output
    assert not [path for path in run.folder.rglob("*.json") if KEY in path.read_text("utf-8")]


def test_one_sae_and_chosen_latents(run: Run) -> None:
    with serving(sensible) as stub:
        latent = interpreted(run, stub).saes[1].latents[0].latent
        found = interpreted(run, stub, replace(CONFIG, chosen=(latent,)), saes=(run.names[1],))
    [one] = found.saes
    assert one.sae == run.names[1]
    assert [one.latent for one in one.latents] == [latent]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "KRONSAE_CHAT_URL and KRONSAE_CHAT_MODEL must be set in the environment"),
        (
            ["--model-folder", "nowhere"],
            "`kronsae models` lists; there is no such folder or name: nowhere.",
        ),
        (["--model-folder", "./nowhere"], "there is no folder './nowhere'"),
        (["--max-cost", "1"], "max_cost needs price_in and price_out"),
        (["--attempts", "0"], "attempts must be at least 1; got 0"),
    ],
)
def test_what_cannot_work_is_reported_in_a_sentence(run: Run, options: list[str], message: str) -> None:
    outcome = invoke(run, *options)
    assert isinstance(outcome.exception, UserError)
    assert message in str(outcome.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sae", "topkk"], "--sae must name an SAE of the run"),
        (["--latent", "999"], "--latent must be below d_sae=32 of 'topk'; got 999."),
        (["--min-active", "100000"], "must be active on min_active_tokens=100000 tokens; got none."),
    ],
)
def test_latents_that_are_not_there(run: Run, options: list[str], message: str) -> None:
    with serving(sensible) as stub:
        outcome = invoke(run, *options, environment=stub.environment)
        assert stub.requests == []
    assert isinstance(outcome.exception, UserError)
    assert message in str(outcome.exception)


def test_a_local_model_needs_no_endpoint(run: Run, tiny_model_folder: Callable[[str], Path]) -> None:
    """A random model with 64 positions raises an error, because the question is too long."""
    outcome = invoke(run, "--model-folder", str(tiny_model_folder("llama")))
    assert isinstance(outcome.exception, UserError)
    assert "takes 64 tokens, but a question needs" in str(outcome.exception)


def test_a_local_model_can_be_given_by_its_name(run: Run) -> None:
    """The bundled model is found by its name and loaded, but 512 positions are too few for a question."""
    outcome = invoke(run, "--model-folder", "bundled")
    assert isinstance(outcome.exception, UserError)
    assert "the model in bundled takes 512 tokens, but a question needs" in str(outcome.exception)


def test_a_wrong_key_ends_it_in_a_sentence(run: Run) -> None:
    with serving(sensible) as stub:
        outcome = invoke(run, environment={**stub.environment, "KRONSAE_CHAT_KEY": "sk-wrong-0123456789"})
        assert isinstance(outcome.exception, UserError)
        assert "refuses: the key is not accepted (HTTP 401)" in str(outcome.exception)
        assert "sk-wrong" not in outcome.output + str(outcome.exception)
        assert len(stub.requests) <= RetrySettings.concurrency
