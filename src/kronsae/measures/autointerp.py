"""``kronsae eval autointerp``: a language model explains latents and is tested on its explanations."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kronsae.chat import Asker, AskReport, Bounds, Estimator, Pace, Persistence
from kronsae.chat.memory import AnswerMemory
from kronsae.chat.question import ChatModel
from kronsae.eval.autointerp import (
    PLACEHOLDER,
    Ask,
    AutointerpConfig,
    Interpretation,
    LatentExamples,
    LatentInterpretation,
    draw_examples,
    interpret_latent,
    summarise,
)
from kronsae.eval.display import TokenText, visible
from kronsae.measures.latent_sample import check_chosen, count_activations, draw_latents, find_firings, pick_saes
from kronsae.report.measurements import keep_result, known_result
from kronsae.runs.loaded import LoadedRun, describe_tokens
from kronsae.runs.run import Run, open_run
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError
from kronsae.support.progress import progress_after, progress_bar
from kronsae.support.terminal import Json, Quiet, RunArgument, Seed, print_json, print_table, say, what_now

if TYPE_CHECKING:
    from rich.table import Table

NAME = "autointerp"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Unanswered:
    """So many questions were left without an answer, for this reason."""

    reason: str
    questions: int


@dataclass(frozen=True, kw_only=True)
class AutointerpResult:
    """All SAEs, in the run's order, and which questions found no answer."""

    saes: tuple[Interpretation, ...]
    unanswered: tuple[Unanswered, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How the language model is asked: it changes what is spent, and no answer.

    Args:
        bounds: what may be spent.
        persistence: how hard to try, and how many questions at once.
        requests_per_minute, tokens_per_minute: None is without limit.
    """

    bounds: Bounds = field(default_factory=lambda: Bounds(max_requests=2000))
    persistence: Persistence = field(default_factory=Persistence)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True)
class Sample:
    """One SAE's latents to be interpreted."""

    examples: tuple[LatentExamples, ...]
    living: int
    eligible: int


def measure(
    run: Run,
    config: AutointerpConfig,
    model: ChatModel,
    *,
    saes: Sequence[str] = (),
    asking: Asking | None = None,
    only_estimate: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> AutointerpResult | None:
    """Interpret latents of a run's SAEs; answers are kept in ``RUN/measures/answers``, and none is asked for twice.

    Args:
        run: a finished run.
        config: which latents, which text.
        model: who explains and judges.
        saes: of these names; all of the run if none is given.
        asking: bounds, pace and persistence.
        only_estimate: tell what it would cost, ask nothing, and return None.
        say: told what is about to happen.
        progress: called with (done, to do), from the beginning in each of two stages: tokens that the SAEs' model
            reads, then questions.

    Raises:
        UserError: a bound does not allow it, or is reached; or the model does not answer.
    """
    asking = Asking() if asking is None else asking
    loaded = LoadedRun(run)
    picked = pick_saes(loaded, saes)
    check_chosen(picked, config.chosen)
    settings = {"config": to_dict(config), "saes": list(picked), "model": dict(model.identity)}
    known = known_result(run.folder, NAME, settings)
    if known is not None and not known.get("unanswered"):
        say("Already measured with these settings.")
        return from_dict(AutointerpResult, known, NAME)
    samples = draw_samples(loaded, list(picked), config, say, progress)
    memory = AnswerMemory(run.folder / "measures" / "answers")
    estimate = _estimated(samples, config, model, memory, asking, say)
    if only_estimate:
        return None
    found = asyncio.run(_interpreted(samples, config, model, memory, asking, estimate, say, progress))
    keep_result(run.folder, NAME, settings, to_dict(found))
    return found


def draw_samples(
    loaded: LoadedRun,
    names: Sequence[str],
    config: AutointerpConfig,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Sample]:
    """The latents of each SAE, with their examples, from held-out text."""
    saes = {name: loaded.saes[name] for name in names}
    windows = loaded.windows(config.tokens)
    tokens = sum(one.num_kept for one in windows)
    say(f"Seeking examples in {describe_tokens(tokens, config.tokens)}, in two passes.")
    counts = count_activations(loaded, saes, windows, progress_after(progress, 0, 2 * tokens))
    chosen = {
        name: list(config.chosen)
        or draw_latents(counts_F, config.latents, at_least=config.min_active_tokens, seed=config.seed)
        for name, counts_F in counts.items()
    }
    for name, latents in chosen.items():
        if not latents:
            raise UserError(
                f"min_active_tokens={config.min_active_tokens} leaves no latent of '{name}' to draw from in this "
                "text; lower --min-active, or give more --tokens."
            )
    text, firings = find_firings(loaded, saes, windows, chosen, progress_after(progress, tokens, 2 * tokens))
    token_text = TokenText(loaded.language_model.tokenizer)
    return {
        name: Sample(
            examples=tuple(
                draw_examples(
                    text,
                    firings[name][latent],
                    token_text,
                    explained=config.explained,
                    positives=config.positives,
                    negatives=config.tested,
                    radius=config.radius,
                    seed=config.seed,
                )
                for latent in latents
            ),
            living=int((counts[name] > 0).sum()),
            eligible=int((counts[name] >= config.min_active_tokens).sum()),
        )
        for name, latents in chosen.items()
    }


def _estimated(
    samples: Mapping[str, Sample],
    config: AutointerpConfig,
    model: ChatModel,
    memory: AnswerMemory,
    asking: Asking,
    say: Callable[[str], None],
) -> int:
    """Say what asking will come to, refuse if that is too much; the number of questions."""
    estimator = Estimator(model, memory, placeholder=PLACEHOLDER)

    async def go_through() -> None:
        for sample in samples.values():
            for examples in sample.examples:
                await interpret_latent(examples, estimator, config)

    asyncio.run(go_through())
    estimate = estimator.value()
    usage, cost = estimate.usage, asking.bounds.cost(estimate.usage)
    say(
        f"{usage.requests:,} questions to ask ({estimate.remembered:,} more are answered already): about "
        f"{usage.tokens_in:,} tokens in, at most {usage.tokens_out:,} out"
        + ("." if cost is None else f", at most {cost:.4g} in the prices' currency.")
    )
    if excess := asking.bounds.exceeded_by(usage):
        raise UserError(f"nothing was asked, because it may exceed {excess}; raise the bound, or lower --latents.")
    return usage.requests + estimate.remembered


async def _interpreted(
    samples: Mapping[str, Sample],
    config: AutointerpConfig,
    model: ChatModel,
    memory: AnswerMemory,
    asking: Asking,
    questions: int,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None,
) -> AutointerpResult:
    pace = Pace(requests_per_minute=asking.requests_per_minute, tokens_per_minute=asking.tokens_per_minute)
    asker = Asker(model, memory, bounds=asking.bounds, pace=pace, persistence=asking.persistence)
    ask = _counted(asker, questions, progress)
    try:
        latents = await _together(
            {
                (name, examples.latent): interpret_latent(examples, ask, config)
                for name, sample in samples.items()
                for examples in sample.examples
            }
        )
    finally:
        await asker.close()
        say(_told(asker.report, asker.spent.tokens))
    return AutointerpResult(
        saes=tuple(
            summarise(
                name,
                [latents[name, examples.latent] for examples in sample.examples],
                living=sample.living,
                eligible=sample.eligible,
            )
            for name, sample in samples.items()
        ),
        unanswered=tuple(
            Unanswered(reason=reason, questions=number) for reason, number in sorted(asker.report.unanswered.items())
        ),
    )


async def _together(
    work: Mapping[tuple[str, int], Coroutine[Any, Any, LatentInterpretation]],
) -> dict[tuple[str, int], LatentInterpretation]:
    """All at once; the first `UserError` ends the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {key: group.create_task(one) for key, one in work.items()}
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return {key: task.result() for key, task in tasks.items()}


def _counted(ask: Ask, questions: int, progress: Callable[[int, int], None] | None) -> Ask:
    done = 0

    async def counted(instructions: str, content: str) -> str | None:
        nonlocal done
        answer = await ask(instructions, content)
        done += 1
        if progress is not None:
            progress(done, questions)
        return answer

    return counted


def _told(report: AskReport, tokens: int) -> str:
    failures = "; ".join(f"{reason} x {number}" for reason, number in report.failed_attempts.most_common())
    return (
        f"{report.answered:,} questions answered now, {report.remembered:,} from memory, "
        f"{sum(report.unanswered.values()):,} left without an answer; {tokens:,} tokens."
        + (f" Failed attempts: {failures}." if failures else "")
    )


app = typer.Typer(add_completion=False)


@app.command()
def autointerp(
    run_folder: RunArgument,
    sae: Annotated[list[str] | None, typer.Option(help="Only this SAE; repeatable.")] = None,
    latents: Annotated[int, typer.Option(help="Latents per SAE, drawn at random.")] = AutointerpConfig.latents,
    latent: Annotated[list[int] | None, typer.Option(help="This latent (its number) instead; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Held-out tokens to seek examples in.")] = AutointerpConfig.tokens,
    tested: Annotated[
        int, typer.Option(help="Examples per test with the latent active, and as many without.")
    ] = AutointerpConfig.tested,
    per_prompt: Annotated[int, typer.Option(help="Examples judged in one prompt.")] = AutointerpConfig.per_prompt,
    min_active: Annotated[
        int, typer.Option(help="A latent active on fewer tokens is not drawn.")
    ] = AutointerpConfig.min_active_tokens,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what it would cost, and ask nothing.")] = False,
    max_requests: Annotated[int, typer.Option(help="Send no more requests than this, repeated ones included.")] = 2000,
    max_tokens: Annotated[int | None, typer.Option(help="Spend no more tokens, in and out together.")] = None,
    max_cost: Annotated[float | None, typer.Option(help="Spend no more money; needs both prices.")] = None,
    price_in: Annotated[float | None, typer.Option(help="Price of a million tokens of questions.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Price of a million tokens of answers.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.")] = Persistence.concurrency,
    requests_per_minute: Annotated[int | None, typer.Option(help="Send no faster.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Send no faster, in and out together.")] = None,
    attempts: Annotated[int, typer.Option(help="Attempts per question.")] = Persistence.attempts,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for one answer.")] = 60.0,
    answer_tokens: Annotated[int, typer.Option(help="Longest answer; a model that reasons needs more.")] = 300,
    reasoning: Annotated[
        bool, typer.Option("--reasoning", help="For models that refuse max_tokens and temperature.")
    ] = False,
    model_folder: Annotated[
        Path | None, typer.Option(help="Ask the transformers model in this folder instead of an endpoint.")
    ] = None,
    model_dtype: Annotated[str, typer.Option(help="Its precision: float32, bfloat16 or float16.")] = "float32",
    model_device: Annotated[str, typer.Option(help="Where it runs: auto, cpu, cuda or cuda:1.")] = "auto",
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let a language model explain latents, and test its explanations (detection, fuzzing).

    Address, model and key of an OpenAI-compatible endpoint come from the environment: KRONSAE_CHAT_URL,
    KRONSAE_CHAT_MODEL, KRONSAE_CHAT_KEY. Excerpts of the held-out text are sent there.
    """
    config = AutointerpConfig(
        latents=latents,
        chosen=tuple(latent or ()),
        tokens=tokens,
        tested=tested,
        per_prompt=per_prompt,
        min_active_tokens=min_active,
        seed=seed,
    )
    asking = Asking(
        bounds=Bounds(
            max_requests=max_requests,
            max_tokens=max_tokens,
            max_cost=max_cost,
            price_in=price_in,
            price_out=price_out,
        ),
        persistence=Persistence(concurrency=concurrency, attempts=attempts),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )
    run = open_run(run_folder)
    model = (
        _endpoint_model(answer_tokens, timeout, reasoning)
        if model_folder is None
        else _local_model(model_folder, model_dtype, model_device, answer_tokens, seed)
    )
    with progress_bar("autointerp", quiet=quiet) as progress:
        found = measure(
            run,
            config,
            model,
            saes=tuple(sae or ()),
            asking=asking,
            only_estimate=estimate,
            say=say,
            progress=progress,
        )
    if found is None:
        what_now("the same command without --estimate")
        return
    if as_json:
        print_json(to_dict(found))
    else:
        print_table(as_table(found))
    what_now(f"kronsae report {shlex.quote(str(run.folder))}")


def as_table(result: AutointerpResult) -> Table:
    """One row per latent, and one per SAE with its means."""
    from rich.table import Table
    from rich.text import Text

    table = Table("SAE", "latent", "detection", "fuzzing", "dropped", "failed", "explanation", box=None)
    for one in result.saes:
        for latent in one.latents:
            scores = (latent.detection, latent.fuzzing)
            table.add_row(
                Text(visible(one.sae)),
                str(latent.latent),
                *("-" if score.balanced_accuracy is None else f"{score.balanced_accuracy:.3f}" for score in scores),
                str(sum(score.dropped for score in scores)),
                str(sum(score.failed for score in scores)),
                Text(latent.explanation or f"({latent.problem})"),  # no markup: its words are the model's
            )
        means = (one.detection, one.fuzzing)
        told = ("-" if mean.mean is None else f"{mean.mean:.3f}" for mean in means)
        spread = f"over {means[0].n} and {means[1].n} latents of {one.eligible:,} that could be drawn"
        table.add_row(Text(visible(one.sae)), "mean", *told, str(one.dropped), str(one.failed), spread)
    return table


def _endpoint_model(answer_tokens: int, timeout: float, reasoning: bool) -> ChatModel:
    from kronsae.chat.endpoint import KEY, EndpointModel, endpoint_from_environment

    newer: dict[str, Any] = {"limit_field": "max_completion_tokens", "temperature": None} if reasoning else {}
    endpoint, key = endpoint_from_environment(max_answer_tokens=answer_tokens, timeout_seconds=timeout, **newer)
    say(f"Excerpts of the held-out text go to {endpoint.host} (model {visible(endpoint.model)}).")
    if endpoint.in_clear:
        told = f" and the key of {KEY}" if key is not None else ""
        say(f"Note: {endpoint.host} is asked over plain http: others on the way can read the text{told}.")
    return EndpointModel(endpoint, key)


def _local_model(folder: Path, dtype: str, device: str, answer_tokens: int, seed: int) -> ChatModel:
    from kronsae.chat.local import LocalModel
    from kronsae.data.model import ModelConfig, load_model

    if not folder.is_dir():
        raise UserError(f"--model-folder must be a folder with a transformers model; there is no folder {folder}.")
    loaded = load_model(ModelConfig(name=str(folder.resolve()), dtype=dtype, device=device))
    return LocalModel(loaded, max_answer_tokens=answer_tokens, seed=seed)
