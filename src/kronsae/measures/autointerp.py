"""``kronsae eval autointerp``: a language model explains latents, and its explanations are scored."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kronsae.chat import Asker, AskReport, Bounds, Estimator, RateLimiter, RetrySettings
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
    """Number of questions that stayed unanswered for one reason."""

    reason: str
    questions: int


@dataclass(frozen=True, kw_only=True)
class AutointerpResult:
    """Results of all SAEs, in the run's order, and the questions that stayed unanswered."""

    saes: tuple[Interpretation, ...]
    unanswered: tuple[Unanswered, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Limits and retries for the language model; they affect the cost but no answer.

    Args:
        bounds: limits on requests, tokens and cost.
        persistence: number of attempts, and number of concurrent requests.
        requests_per_minute, tokens_per_minute: rate limits; None: no limit.
    """

    bounds: Bounds = field(default_factory=lambda: Bounds(max_requests=2000))
    retry: RetrySettings = field(default_factory=RetrySettings)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True)
class Sample:
    """Latents of one SAE to interpret, with the number of living and of eligible latents."""

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
    """Explain latents of a run's SAEs, score the explanations, and store the result.

    Answers are stored in ``RUN/measures/answers``, so that no question is asked twice.

    Args:
        run: a finished run.
        config: selection of latents and text.
        model: language model that explains and judges.
        saes: names of the SAEs; empty: all SAEs of the run.
        asking: limits and retries.
        only_estimate: report the expected cost, send nothing, and return None.
        say: receives status messages.
        progress: called with (done, total), starting from 0 in each of two stages: tokens that the run's model reads,
            then questions.

    Raises:
        UserError: the questions may exceed a bound, a bound is reached, or the model does not answer.
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
    estimate = _estimate(samples, config, model, memory, asking, say)
    if only_estimate:
        return None
    found = asyncio.run(_interpret(samples, config, model, memory, asking, estimate, say, progress))
    keep_result(run.folder, NAME, settings, to_dict(found))
    return found


def draw_samples(
    loaded: LoadedRun,
    names: Sequence[str],
    config: AutointerpConfig,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Sample]:
    """Return the sampled latents of each SAE, with examples from held-out text."""
    saes = {name: loaded.saes[name] for name in names}
    windows = loaded.windows(config.tokens)
    tokens = sum(one.num_kept for one in windows)
    say(f"Searching for examples in {describe_tokens(tokens, config.tokens)}, in two passes.")
    counts = count_activations(loaded, saes, windows, progress_after(progress, 0, 2 * tokens))
    chosen = {
        name: list(config.chosen)
        or draw_latents(counts_F, config.latents, at_least=config.min_active_tokens, seed=config.seed)
        for name, counts_F in counts.items()
    }
    for name, latents in chosen.items():
        if not latents:
            raise UserError(
                f"at least one latent of '{name}' must be active on min_active_tokens={config.min_active_tokens} "
                "tokens; got none. Lower --min-active, or increase --tokens."
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


def _estimate(
    samples: Mapping[str, Sample],
    config: AutointerpConfig,
    model: ChatModel,
    memory: AnswerMemory,
    asking: Asking,
    say: Callable[[str], None],
) -> int:
    """Report the expected cost and return the number of questions; raise if it may exceed a bound."""
    estimator = Estimator(model, memory, placeholder=PLACEHOLDER)

    async def estimate_all() -> None:
        for sample in samples.values():
            for examples in sample.examples:
                await interpret_latent(examples, estimator, config)

    asyncio.run(estimate_all())
    estimate = estimator.value()
    usage, cost = estimate.usage, asking.bounds.cost(estimate.usage)
    say(
        f"{usage.requests:,} questions to ask ({estimate.remembered:,} more are already answered): about "
        f"{usage.tokens_in:,} input tokens, at most {usage.tokens_out:,} output tokens"
        + ("." if cost is None else f", cost at most {cost:.4g} in the currency of the prices.")
    )
    if excess := asking.bounds.exceeded_by(usage):
        raise UserError(f"no question was sent, because this may exceed {excess}. Raise the bound or lower --latents.")
    return usage.requests + estimate.remembered


async def _interpret(
    samples: Mapping[str, Sample],
    config: AutointerpConfig,
    model: ChatModel,
    memory: AnswerMemory,
    asking: Asking,
    questions: int,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None,
) -> AutointerpResult:
    rate_limiter = RateLimiter(
        requests_per_minute=asking.requests_per_minute, tokens_per_minute=asking.tokens_per_minute
    )
    asker = Asker(model, memory, bounds=asking.bounds, rate_limiter=rate_limiter, retry=asking.retry)
    ask = _count_questions(asker, questions, progress)
    try:
        latents = await _gather(
            {
                (name, examples.latent): interpret_latent(examples, ask, config)
                for name, sample in samples.items()
                for examples in sample.examples
            }
        )
    finally:
        await asker.close()
        say(_describe(asker.report, asker.spent.tokens))
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


async def _gather(
    work: Mapping[tuple[str, int], Coroutine[Any, Any, LatentInterpretation]],
) -> dict[tuple[str, int], LatentInterpretation]:
    """Run all coroutines concurrently; the first `UserError` cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {key: group.create_task(one) for key, one in work.items()}
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return {key: task.result() for key, task in tasks.items()}


def _count_questions(ask: Ask, questions: int, progress: Callable[[int, int], None] | None) -> Ask:
    done = 0

    async def counted(instructions: str, content: str, schema: Mapping[str, Any] | None = None) -> str | None:
        nonlocal done
        answer = await ask(instructions, content, schema)
        done += 1
        if progress is not None:
            progress(done, questions)
        return answer

    return counted


def _describe(report: AskReport, tokens: int) -> str:
    failures = "; ".join(f"{reason} x {number}" for reason, number in report.failed_attempts.most_common())
    return (
        f"{report.answered:,} questions answered now, {report.remembered:,} from stored answers, "
        f"{sum(report.unanswered.values()):,} unanswered; {tokens:,} tokens."
        + (f" Failed attempts: {failures}." if failures else "")
    )


app = typer.Typer(add_completion=False)


@app.command()
def autointerp(
    run_folder: RunArgument,
    sae: Annotated[list[str] | None, typer.Option(help="Name of an SAE to measure; repeatable. Default: all.")] = None,
    latents: Annotated[
        int, typer.Option(help="Number of latents per SAE, sampled at random.")
    ] = AutointerpConfig.latents,
    latent: Annotated[
        list[int] | None, typer.Option(help="Index of a latent to use instead of a random sample; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Held-out tokens to search for examples.")] = AutointerpConfig.tokens,
    tested: Annotated[
        int, typer.Option(help="Examples per test with the latent active, and the same number with it inactive.")
    ] = AutointerpConfig.tested,
    per_prompt: Annotated[int, typer.Option(help="Examples judged in one prompt.")] = AutointerpConfig.per_prompt,
    min_active: Annotated[
        int, typer.Option(help="Minimum number of tokens on which a sampled latent is active.")
    ] = AutointerpConfig.min_active_tokens,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print the expected cost and send nothing.")] = False,
    max_requests: Annotated[int, typer.Option(help="Maximum number of requests, including retries.")] = 2000,
    max_tokens: Annotated[int | None, typer.Option(help="Maximum number of input and output tokens.")] = None,
    max_cost: Annotated[float | None, typer.Option(help="Maximum cost; requires both prices.")] = None,
    price_in: Annotated[float | None, typer.Option(help="Price of a million input tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Price of a million output tokens.")] = None,
    concurrency: Annotated[int, typer.Option(help="Number of concurrent requests.")] = RetrySettings.concurrency,
    requests_per_minute: Annotated[int | None, typer.Option(help="Rate limit on requests.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Rate limit on input and output tokens.")] = None,
    attempts: Annotated[int, typer.Option(help="Attempts per question.")] = RetrySettings.attempts,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for one answer.")] = 60.0,
    answer_tokens: Annotated[
        int, typer.Option(help="Maximum length of an answer in tokens; reasoning models need more.")
    ] = 300,
    reasoning: Annotated[
        bool, typer.Option("--reasoning", help="For models that reject max_tokens and temperature.")
    ] = False,
    structured: Annotated[
        bool,
        typer.Option(
            "--structured",
            help="Allow only answers of the requested form: the JSON schema is sent to the endpoint, or the local "
            "model chooses among the tokens that fit.",
        ),
    ] = False,
    model_folder: Annotated[
        str | None,
        typer.Option(
            help="Local model to use instead of an endpoint: a transformers folder, a GGUF file, or a name of `kronsae "
            "models`, such as smollm2."
        ),
    ] = None,
    model_dtype: Annotated[
        str, typer.Option(help="Precision of the local model: float32, bfloat16 or float16.")
    ] = "float32",
    model_device: Annotated[str, typer.Option(help="Device of the local model: auto, cpu, cuda or cuda:1.")] = "auto",
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Explain latents with a language model and score the explanations (detection, fuzzing).

    The address, model and key of an OpenAI-compatible endpoint are read from the environment variables
    KRONSAE_CHAT_URL, KRONSAE_CHAT_MODEL and KRONSAE_CHAT_KEY. Excerpts of the held-out text are sent there.
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
        retry=RetrySettings(concurrency=concurrency, attempts=attempts),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )
    run = open_run(run_folder)
    model = (
        _endpoint_model(answer_tokens, timeout, reasoning, structured)
        if model_folder is None
        else _local_model(model_folder, model_dtype, model_device, answer_tokens, seed, structured)
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
    """Return a table with one row per latent, and one per SAE with its means."""
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
                Text(latent.explanation or f"({latent.problem})"),  # Text: the model's output must not act as markup
            )
        means = (one.detection, one.fuzzing)
        cells = ("-" if mean.mean is None else f"{mean.mean:.3f}" for mean in means)
        counts = f"over {means[0].n} and {means[1].n} latents of {one.eligible:,} eligible"
        table.add_row(Text(visible(one.sae)), "mean", *cells, str(one.dropped), str(one.failed), counts)
    return table


def _endpoint_model(answer_tokens: int, timeout: float, reasoning: bool, structured: bool) -> ChatModel:
    from kronsae.chat.endpoint import KEY, EndpointModel, endpoint_from_environment

    options: dict[str, Any] = {"limit_field": "max_completion_tokens", "temperature": None} if reasoning else {}
    options["structured"] = structured
    endpoint, key = endpoint_from_environment(max_answer_tokens=answer_tokens, timeout_seconds=timeout, **options)
    say(f"Excerpts of the held-out text are sent to {endpoint.host} (model {visible(endpoint.model)}).")
    if endpoint.in_clear:
        secret = f" and the key in {KEY}" if key is not None else ""
        say(f"Warning: requests to {endpoint.host} use unencrypted http; the text{secret} can be read in transit.")
    return EndpointModel(endpoint, key)


def _local_model(name: str, dtype: str, device: str, answer_tokens: int, seed: int, structured: bool) -> ChatModel:
    from kronsae.chat.local import LocalModel
    from kronsae.data.model import ModelConfig, load_model, local_folder

    folder = local_folder(name)
    if folder is None or not folder.is_dir():
        raise UserError(
            "--model-folder must be the folder of a transformers model, a GGUF file, or a name that `kronsae models` "
            f"lists; there is no such folder or name: {name}."
        )
    loaded = load_model(ModelConfig(name=name, dtype=dtype, device=device))
    return LocalModel(loaded, folder=folder, max_answer_tokens=answer_tokens, seed=seed, structured=structured)
