"""The command line: verbs that parse, pick and call."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kronsae.measures.verbs import DEFAULT, MeasureGroup
from kronsae.support.errors import UserError
from kronsae.support.terminal import Json, Quiet, print_json, print_table, run_app, say, what_now

if TYPE_CHECKING:
    from kronsae.runs.config import RunConfig
    from kronsae.runs.run import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Sparse autoencoders with Kronecker-factorised encoders: train, compare, look inside. "
    "Begin with `kronsae quickstart`.",
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder.")]
RunFolder = Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder (the same as --out).")]
OptionalOut = Annotated[Path | None, typer.Option("--out", "-o", help="Run folder.")]
Model = Annotated[
    str | None, typer.Option(help="Hugging Face model: Hub name or local folder; 'bundled' is the one inside.")
]
Text = Annotated[
    str | None,
    typer.Option(help="Text: Hub data set, local .txt/.jsonl/.parquet or folder; 'bundled' is Python's own library."),
]
Hook = Annotated[
    str | None,
    typer.Option(help="Where to read: module path or layer, such as layers.6; with --activations, one of theirs."),
]
Tokens = Annotated[int | None, typer.Option(help="Tokens to use.")]
Flops = Annotated[
    float | None, typer.Option(help="Instead of --tokens: what the training of each SAE may cost, such as 1e15.")
]
SameFlopsAs = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The SAE of this name trains on --tokens, each other one on as many as cost the same FLOPs.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the weights and of the order of the data.")]


@app.command()
def quickstart(
    out: Out = Path("runs/quickstart"),
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to train on; shuffle buffer and evaluation are cut to as many.")
    ] = None,
    seed: Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a TopK SAE and a KronSAE on the bundled language model, compare them, write a report.

    Takes minutes on two cores. Stopped half-way, the same command carries on.
    """
    from kronsae.runs import recipes
    from kronsae.runs.run import execute, with_overrides

    config = with_overrides(recipes.quickstart(), seed=seed)
    if tokens is not None:
        config = recipes.shortened(config, tokens)
    run = execute(config, out, show_progress=not quiet, say=say)
    _evaluate_and_report(run, as_json, quiet)
    what_now(
        f"open {run.folder / 'report.html'} in a browser", "kronsae train --help, and --model with a model of yours"
    )


@app.command()
def train(
    out: Out,
    recipe: Annotated[str | None, typer.Option(help="A named run to start from; see `kronsae recipes`.")] = None,
    config: Annotated[Path | None, typer.Option(help="A run's config as JSON (a run folder's run.json).")] = None,
    model: Model = None,
    text: Text = None,
    hook: Hook = None,
    tokens: Tokens = None,
    flops: Flops = None,
    same_flops_as: SameFlopsAs = None,
    sae: Annotated[
        list[str] | None,
        typer.Option(
            help="An SAE to train, repeatable: 'topk d_sae=4096 k=32' or "
            "'kron num_heads=512 d_base=2 d_extension=4 k=32 lr=1e-3 name=mine'. read= and write= name hooks of its "
            "own: 'topk d_sae=4096 k=32 read=layers.3.mlp:input write=layers.3.mlp' is a transcoder."
        ),
    ] = None,
    seed: Seed = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other field of the config, repeatable: --set loop.batch_tokens=4096."),
    ] = None,
    activations: Annotated[
        Path | None, typer.Option(help="Folder that `kronsae harvest` wrote, to train on instead of the live model.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    wandb: Annotated[str | None, typer.Option(help="Also log to this Weights & Biases project.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take: tokens, memory, disk, time.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train SAEs side by side on one stream of a model's activations.

    Start from a recipe, a config file, or --model, --text, --hook, --tokens (or --flops) and --sae. The same command
    on an unfinished run carries it on.
    """
    from kronsae.runs.parsing import RunWords, parse_sae
    from kronsae.runs.run import execute

    words = RunWords(recipe=recipe, config=config, activations=activations, model=model, text=text, hook=hook)
    budget = {"tokens": tokens, "flops": flops, "same_flops_as": same_flops_as}
    whole = words.run_config([parse_sae(spec, seed) for spec in sae or []], budget, seed, option or [])
    if dry_run:
        _dry_run(whole, out, as_json)
        return
    run = execute(whole, out, show_progress=not quiet, tensorboard=tensorboard, wandb=wandb, say=say)
    if as_json:
        last = {row["sae"]: row for row in run.metrics()}
        print_json({"out": str(run.folder), "saes": list(last.values())})
    what_now(f"kronsae eval {shlex.quote(str(out))}", f"kronsae report {shlex.quote(str(out))}")


def _dry_run(config: RunConfig, out: Path, as_json: bool) -> None:
    from kronsae.runs.planning import plan_run

    plan = plan_run(config, out)
    if as_json:
        print_json(plan.to_dict())
    else:
        print(plan)
    plan.check()
    what_now("the same command without --dry-run")


@app.command()
def sweep(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the sweep.")],
    grid: Annotated[
        Path | None,
        typer.Option(help="The sweep as JSON (a sweep.json); options given besides take its values' place."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A named run to start from; see `kronsae recipes`.")] = None,
    config: Annotated[Path | None, typer.Option(help="A run's config as JSON, to start from.")] = None,
    model: Model = None,
    text: Text = None,
    hook: Hook = None,
    activations: Annotated[Path | None, typer.Option(help="Folder that `kronsae harvest` wrote.")] = None,
    sae: Annotated[
        list[str] | None,
        typer.Option(
            help="SAEs, repeatable; {a,b} is each in turn: 'kron d_base={1,2} d_extension=4 d_sae=1024 k=16'."
        ),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on, or several budgets: 250000,500000.")] = None,
    flops: Annotated[str | None, typer.Option(help="The same in FLOPs, instead of --tokens: 1e13,3e13.")] = None,
    same_flops_as: SameFlopsAs = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="How many seeds (3 is 0, 1 and 2), or which: 4,5 or {4}. Each is one of weights and data."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other field, repeatable: --set 'saes.*.optimizer.beta2={0.99,0.999}'."),
    ] = None,
    group_size: Annotated[int, typer.Option(help="At most so many SAEs on one stream of activations.")] = 16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is left to train and how long.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train and evaluate a grid of SAEs: one CSV with every figure, one page with EV against heads, l0 and budget.

    SAEs of one seed see the same batches, many of them from one pass of the model. The same command carries on what
    was stopped; of a grid that was changed, only what is new is trained.
    """
    from kronsae.sweeps.grid import numbers, sweep_config
    from kronsae.sweeps.grid import seeds as seeds_of
    from kronsae.sweeps.sweep import execute_sweep, plan_sweep, sweep_points

    given = {
        "recipe": recipe,
        "config": config,
        "model": model,
        "text": text,
        "hook": hook,
        "activations": activations,
        "same_flops_as": same_flops_as,
        "saes": sae or None,
        "set": option or None,
        "tokens": None if tokens is None else numbers(tokens, "--tokens"),
        "flops": None if flops is None else numbers(flops, "--flops"),
        "seeds": None if seeds is None else seeds_of(seeds),
    }
    whole = sweep_config(grid, {name: value for name, value in given.items() if value is not None})
    if dry_run:
        _, plan = plan_sweep(sweep_points(whole), out, group_size)
        print_json(plan.to_dict()) if as_json else print(plan)
        plan.check()
        what_now("the same command without --dry-run")
        return
    found = execute_sweep(whole, out, group_size=group_size, show_progress=not quiet, say=say)
    if as_json:
        print_json({"csv": str(found.csv), "page": str(found.page), "saes": found.rows})
    else:
        print(found)
    what_now(f"open {found.page} in a browser", f"{found.csv} has every setting and figure")


eval_app = typer.Typer(
    cls=MeasureGroup,
    no_args_is_help=True,
    help="Measure a finished run: `kronsae eval RUN` is the table (explained variance, l0, dead share, CE and KL "
    "recovered on held-out text); the verbs measure more.",
)
app.add_typer(eval_app, name="eval")


@eval_app.command(DEFAULT)
def evaluate(
    run_folder: RunFolder = None,
    out: OptionalOut = None,
    tokens: Tokens = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a run's SAEs on held-out text: explained variance, l0, dead share, CE and KL recovered."""
    from kronsae.runs.run import open_run

    run = open_run(_one_folder(run_folder, out))
    _show(_evaluate(run, tokens, quiet), as_json)
    what_now(f"kronsae report {shlex.quote(str(run.folder))}")


@app.command()
def report(run_folder: RunFolder = None, out: OptionalOut = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Write one HTML page: the comparison, the curves, the latents and their contexts."""
    from kronsae.runs.run import open_run

    run = open_run(_one_folder(run_folder, out))
    _evaluate_and_report(run, as_json, quiet)
    what_now(f"open {run.folder / 'report.html'} in a browser")


@app.command()
def harvest(
    out: Out,
    hook: Annotated[
        list[str],
        typer.Option(help="Where to read, repeatable: module path or layer, such as layers.6 or layers.6.mlp:input."),
    ],
    tokens: Annotated[int, typer.Option(help="Tokens to harvest.")],
    model: Annotated[str, typer.Option(help="Hugging Face model: Hub name or local folder.")] = "bundled",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    model_dtype: Annotated[
        str, typer.Option(help="Precision of the model's weights: float32, bfloat16 or float16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs: auto, cpu, cuda or cuda:1.")] = "auto",
    text: Annotated[str, typer.Option(help="Text: Hub data set, local file or folder.")] = "bundled",
    subset: Annotated[str | None, typer.Option(help="Subset (configuration) of a Hub data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    column: Annotated[str, typer.Option(help="Column that holds the text, in files with columns.")] = "text",
    dtype: Annotated[str, typer.Option(help="Precision on disk: float32, bfloat16 or float16.")] = "float32",
    context_length: Annotated[int, typer.Option(help="Tokens of text the model sees at once.")] = 256,
    model_batch: Annotated[int, typer.Option(help="Sequences per forward pass of the model.")] = 32,
    held_out_share: Annotated[float, typer.Option(help="Share of documents kept for evaluation.")] = 0.05,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a model over text and keep the activations of some hooks on disk, as safetensors."""
    from kronsae.data.model import ModelConfig
    from kronsae.data.text import TextConfig
    from kronsae.runs.harvest import harvest as harvest_to
    from kronsae.support.progress import progress_bar

    with progress_bar("harvesting", quiet=quiet) as progress:
        summary = harvest_to(
            model=ModelConfig(name=model, revision=revision, dtype=model_dtype, device=device),
            text=TextConfig(source=text, subset=subset, split=split, column=column),
            hook=hook,
            tokens=tokens,
            out=out,
            dtype=dtype,
            context_length=context_length,
            model_batch=model_batch,
            held_out_share=held_out_share,
            progress=progress,
        )
    if as_json:
        print_json(summary)
    else:
        for key, value in summary.items():
            print(f"{key}: {value:.1f}" if isinstance(value, float) else f"{key}: {value}")
    what_now(f"kronsae train --activations {shlex.quote(str(out))} --sae '...' --tokens ... --out runs/...")


@app.command("recipes")
def list_recipes(as_json: Json = False) -> None:
    """List the named runs of `kronsae train --recipe`."""
    from kronsae.runs import recipes

    described = {name: recipes.describe(recipe) for name, recipe in recipes.RECIPES.items()}
    if as_json:
        print_json(described)
    else:
        for name, description in described.items():
            print(f"{name}: {description}")
    what_now("kronsae train --recipe NAME --out runs/NAME")


@app.command("architectures")
def list_architectures(as_json: Json = False) -> None:
    """List the SAEs of the comparison, what each is composed of, and the words that train it small."""
    from kronsae.runs.architectures import ARCHITECTURES

    rows = [architecture(name, words) for name, words in ARCHITECTURES.items()]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            parts = ", ".join(f"{part} {row[part]}" for part in ("role", "encoder", "sparsifier", "loss", "experts"))
            print(f"{row['name']}: {parts}\n    {row['train']}")
    what_now("one of these commands, and `kronsae eval` on the run folder it names")


def architecture(name: str, words: str) -> dict[str, Any]:
    """One cell of the comparison: its parts, its ``--sae`` words, and a command that trains it small."""
    from kronsae.runs.parsing import parse_sae

    member = parse_sae(words)
    experts = getattr(member.encoder, "num_experts", 1)
    return {
        "name": name,
        "role": member.shape(1).role or "autoencoder",
        "encoder": getattr(member.encoder, "expert", member.encoder).kind,
        "sparsifier": member.sparsifier.kind,
        "loss": member.loss.kind,
        "experts": experts,
        "sae": words,
        "train": f"kronsae train --recipe tiny --sae {shlex.quote(words)} --out runs/{name}",
    }


@app.command(
    "steer",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    help="Let a run's language model write with some latents changed, beside what it writes without.",
)
def steer(context: typer.Context) -> None:
    """Hand over to the verb's own module, which is imported only here."""
    from kronsae.interventions.steering import app as steering

    run_app(steering, "kronsae steer", context.args)


@app.command(
    "bench",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    help="Measure a training step against other libraries, over sizes, and its memory: `kronsae bench --help`.",
)
def bench(context: typer.Context) -> None:
    """Hand over to the benchmarks' own verbs, which are imported only here."""
    from kronsae.cli.bench import app as benchmarks

    run_app(benchmarks, "kronsae bench", context.args)


def main() -> None:
    """Entry point: a `UserError` becomes one sentence and exit status 2, never a traceback."""
    try:
        run_app(app, "kronsae")
    except UserError as error:
        label = "Error: " if error.exit_status == UserError.exit_status else ""
        print(f"{label}{error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


def _evaluate(run: Run, tokens: int | None, quiet: bool) -> list[dict[str, Any]]:
    from kronsae.runs.evaluation import evaluate_run
    from kronsae.support.progress import progress_bar

    with progress_bar("evaluating", quiet=quiet) as progress:
        return evaluate_run(run, tokens=tokens, say=say, progress=progress)


def _evaluate_and_report(run: Run, as_json: bool, quiet: bool) -> None:
    from kronsae.runs.evaluation import write_report

    rows = _evaluate(run, None, quiet)
    path = write_report(run)
    _show(rows, as_json)
    say(f"Report: {path}")


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    from kronsae.runs.evaluation import as_table

    if as_json:
        print_json({"saes": rows})
    else:
        print_table(as_table(rows))


def _one_folder(argument: Path | None, out: Path | None) -> Path:
    if (argument is None) == (out is None):
        raise UserError("give the run folder once: as RUN or as --out RUN.")
    folder = argument if argument is not None else out
    assert folder is not None
    return folder
