"""The command line: verbs that parse, pick and call."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from kronsae.errors import UserError, nearest
from kronsae.measures.verbs import DEFAULT, MeasureGroup
from kronsae.terminal import Json, Quiet, print_json, print_table, say, what_now

if TYPE_CHECKING:
    from kronsae.run import Run
    from kronsae.run_config import RunConfig
    from kronsae.training.config import MemberConfig

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
Hook = Annotated[str | None, typer.Option(help="Where to read: module path or layer, such as layers.6.")]
Tokens = Annotated[int | None, typer.Option(help="Tokens to use.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the weights and of the order of the data.")]


@app.command()
def quickstart(
    out: Out = Path("runs/quickstart"),
    tokens: Tokens = None,
    seed: Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a TopK SAE and a KronSAE on the bundled language model, compare them, write a report.

    Takes minutes on two cores. Stopped half-way, the same command carries on.
    """
    from kronsae import recipes
    from kronsae.run import execute, with_overrides

    config = with_overrides(recipes.quickstart(), tokens=tokens, seed=seed)
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
    sae: Annotated[
        list[str] | None,
        typer.Option(
            help="An SAE to train, repeatable: 'topk d_sae=4096 k=32' or "
            "'kron num_heads=512 d_base=2 d_extension=4 k=32 lr=1e-3 name=mine'."
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
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train SAEs side by side on one stream of a model's activations.

    Start from a recipe, a config file, or --model, --text, --hook, --tokens and --sae. The same command on an
    unfinished run carries it on.
    """
    from kronsae.run import execute

    whole = _train_config(recipe, config, activations, model, text, hook, tokens, sae or [], seed, option or [])
    run = execute(whole, out, show_progress=not quiet, tensorboard=tensorboard, wandb=wandb, say=say)
    if as_json:
        last = {row["sae"]: row for row in run.metrics()}
        print_json({"out": str(run.folder), "saes": list(last.values())})
    what_now(f"kronsae eval {shlex.quote(str(out))}", f"kronsae report {shlex.quote(str(out))}")


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
    from kronsae.run import open_run

    run = open_run(_one_folder(run_folder, out))
    _show(_evaluate(run, tokens, quiet), as_json)
    what_now(f"kronsae report {shlex.quote(str(run.folder))}")


@app.command()
def report(run_folder: RunFolder = None, out: OptionalOut = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Write one HTML page: the comparison, the curves, the latents and their contexts."""
    from kronsae.run import open_run

    run = open_run(_one_folder(run_folder, out))
    _evaluate_and_report(run, as_json, quiet)
    what_now(f"open {run.folder / 'report.html'} in a browser")


@app.command()
def harvest(
    out: Out,
    hook: Annotated[str, typer.Option(help="Where to read: module path or layer, such as layers.6.")],
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
    """Run a model over text and keep one hook's activations on disk, as safetensors."""
    from kronsae.data.model import ModelConfig
    from kronsae.data.text import TextConfig
    from kronsae.harvesting import harvest as harvest_to
    from kronsae.progress_bar import progress_bar

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
            print(f"{key}: {value}")
    what_now(f"kronsae train --activations {shlex.quote(str(out))} --sae '...' --tokens ... --out runs/...")


@app.command("recipes")
def list_recipes(as_json: Json = False) -> None:
    """List the named runs of `kronsae train --recipe`."""
    from kronsae import recipes

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
    from kronsae.architectures import ARCHITECTURES

    rows = [architecture(name, words) for name, words in ARCHITECTURES.items()]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            parts = ", ".join(f"{part} {row[part]}" for part in ("encoder", "sparsifier", "loss", "experts"))
            print(f"{row['name']}: {parts}\n    {row['train']}")
    what_now("one of these commands, and `kronsae eval` on the run folder it names")


def architecture(name: str, words: str) -> dict[str, Any]:
    """One cell of the comparison: its parts, its ``--sae`` words, and a command that trains it small."""
    member = parse_sae(words)
    experts = getattr(member.encoder, "num_experts", 1)
    return {
        "name": name,
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
    from kronsae.steering import app as steering

    steering(context.args, prog_name="kronsae steer")


@app.command(
    "bench",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    help="Measure a training step against other libraries, over sizes, and its memory: `kronsae bench --help`.",
)
def bench(context: typer.Context) -> None:
    """Hand over to the benchmarks' own verbs, which are imported only here."""
    from kronsae.bench.commands import app as benchmarks

    benchmarks(context.args, prog_name="kronsae bench")


def main() -> None:
    """Entry point: a `UserError` becomes one sentence and exit status 2, never a traceback."""
    try:
        app()
    except UserError as error:
        label = "Error: " if error.exit_status == UserError.exit_status else ""
        print(f"{label}{error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


def _train_config(
    recipe: str | None,
    config: Path | None,
    activations: Path | None,
    model: str | None,
    text: str | None,
    hook: str | None,
    tokens: int | None,
    saes: list[str],
    seed: int | None,
    options: list[str],
) -> RunConfig:
    from kronsae.run import with_overrides

    members = [parse_sae(spec, seed) for spec in saes]
    if recipe is not None and config is not None:
        raise UserError("give --recipe or --config, not both.")
    named = {"--model": model, "--text": text, "--hook": hook}
    if activations is not None and (given := [name for name, value in named.items() if value is not None]):
        raise UserError(f"--activations has a model, a text and a hook of its own; leave out {', '.join(given)}.")
    if recipe is not None:
        whole = _recipe(recipe)
    elif config is not None:
        whole = _config_file(config)
    else:
        whole = _from_parts(activations, model, text, hook, tokens, members)
    if activations is not None:
        from kronsae.harvesting import with_activations

        whole = with_activations(whole, activations)
    whole = with_overrides(whole, model=model, text=text, hook=hook, tokens=tokens, seed=seed, saes=members)
    return with_options(whole, options)


def _from_parts(
    activations: Path | None,
    model: str | None,
    text: str | None,
    hook: str | None,
    tokens: int | None,
    members: list[MemberConfig],
) -> RunConfig:
    from kronsae.data.model import ModelConfig
    from kronsae.data.text import TextConfig
    from kronsae.run_config import RunConfig
    from kronsae.training.config import LoopConfig

    needed: dict[str, object] = {"--tokens": tokens, "--sae": members or None}
    if activations is None:
        needed |= {"--model": model, "--text": text, "--hook": hook}
    missing = [name for name, value in needed.items() if value is None]
    if missing or tokens is None:
        raise UserError(f"without --recipe or --config, give also {', '.join(missing)}; see `kronsae train --help`.")
    return RunConfig(
        model=ModelConfig(name=model or "bundled"),
        text=TextConfig(source=text or "bundled"),
        hook=hook or "0",
        saes=tuple(members),
        loop=LoopConfig(tokens=tokens, batch_tokens=min(LoopConfig(tokens=2**40).batch_tokens, tokens)),
    )


def _recipe(name: str) -> RunConfig:
    from kronsae.recipes import RECIPES

    if name not in RECIPES:
        raise UserError(f"recipe must be one of {', '.join(RECIPES)}; got '{name}'.{nearest(name, RECIPES)}")
    return RECIPES[name]()


def _config_file(path: Path) -> RunConfig:
    from kronsae.config import from_dict
    from kronsae.files import read_json
    from kronsae.run_config import RunConfig

    data = read_json(path, "the config")
    inner = data.get("config", data) if isinstance(data, dict) and "kronsae_version" in data else data
    return from_dict(RunConfig, inner, where=str(path))


def parse_sae(spec: str, seed: int | None = None) -> MemberConfig:
    """``"kron num_heads=512 d_base=2 d_extension=4 k=32"`` as the call ``kron(num_heads=512, ...)``.

    ``seed`` is that of an SAE which names none.
    """
    from kronsae.config import checked
    from kronsae.recipes import SAE_KINDS

    try:
        kind, *words = shlex.split(spec) or [""]
    except ValueError as error:
        raise UserError(f"--sae must have its quotes in pairs; got '{spec}' ({error}).") from None
    if kind not in SAE_KINDS:
        raise UserError(f"--sae must begin with one of {', '.join(SAE_KINDS)}; got '{spec}'.{nearest(kind, SAE_KINDS)}")
    parameters, hints = inspect.signature(SAE_KINDS[kind]).parameters, get_type_hints(SAE_KINDS[kind])
    values: dict[str, Any] = {} if seed is None else {"seed": seed}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--sae takes name=value pairs after its kind; got '{word}' in '{spec}'.")
        if name not in parameters:
            raise UserError(f"'{name}' is not an argument of {kind}.{nearest(name, parameters)} In '{spec}'.")
        hint = hints[name]
        values[name] = checked(hint, value if hint is str else _json_value(value), name)
    missing = [
        name for name, one in parameters.items() if one.default is inspect.Parameter.empty and name not in values
    ]
    if missing:
        raise UserError(f"--sae {kind} needs {', '.join(missing)}; got '{spec}'.")
    return SAE_KINDS[kind](**values)


def with_options(config: RunConfig, options: list[str]) -> RunConfig:
    """Apply ``--set loop.batch_tokens=4096``: any field of the config by its place."""
    from kronsae.config import from_dict, to_dict
    from kronsae.run_config import RunConfig

    data = to_dict(config)
    for option in options:
        place, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--set takes place=value, such as loop.batch_tokens=4096; got '{option}'.")
        *path, last = place.split(".")
        inner: Any = data
        for key in path:
            inner = _step_into(inner, key, place)
        _step_into(inner, last, place)
        inner[int(last) if isinstance(inner, list) else last] = _json_value(value)
    return from_dict(RunConfig, data)


def _step_into(inner: Any, key: str, place: str) -> Any:
    if isinstance(inner, dict) and key in inner:
        return inner[key]
    if isinstance(inner, list) and key.isdigit() and int(key) < len(inner):
        return inner[int(key)]
    known = list(inner) if isinstance(inner, dict) else []
    if isinstance(inner, list):
        known = [str(number) for number in range(len(inner))]
    rest = f"{nearest(key, known)} Known: {', '.join(known)}." if known else " That place has no parts."
    raise UserError(f"--set {place}: there is no '{key}' in the config.{rest}")


def _json_value(text: str) -> Any:
    as_in_python = {"True": True, "False": False, "None": None}
    if text in as_in_python:
        return as_in_python[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _evaluate(run: Run, tokens: int | None, quiet: bool) -> list[dict[str, Any]]:
    from kronsae.progress_bar import progress_bar
    from kronsae.run_evaluation import evaluate_run

    with progress_bar("evaluating", quiet=quiet) as progress:
        return evaluate_run(run, tokens=tokens, say=say, progress=progress)


def _evaluate_and_report(run: Run, as_json: bool, quiet: bool) -> None:
    from kronsae.run_evaluation import write_report

    rows = _evaluate(run, None, quiet)
    path = write_report(run)
    _show(rows, as_json)
    say(f"Report: {path}")


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    from kronsae.run_evaluation import as_table

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
