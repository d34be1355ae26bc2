"""``kronsae train``: train SAEs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kronsae.cli.options import Flops, Hook, Model, Out, SameFlopsAs, Seed, Text, Tokens
from kronsae.support.terminal import Json, Quiet, print_json, say, what_now

if TYPE_CHECKING:
    from kronsae.runs.config import RunConfig


def train(
    out: Out,
    recipe: Annotated[str | None, typer.Option(help="Recipe to start from; see `kronsae recipes`.")] = None,
    config: Annotated[Path | None, typer.Option(help="Config of a run as JSON (the run.json of a run folder).")] = None,
    model: Model = None,
    text: Text = None,
    hook: Hook = None,
    tokens: Tokens = None,
    flops: Flops = None,
    same_flops_as: SameFlopsAs = None,
    sae: Annotated[
        list[str] | None,
        typer.Option(
            help="SAE to train, repeatable: 'topk d_sae=4096 k=32' or "
            "'kron num_heads=512 d_base=2 d_extension=4 k=32 lr=1e-3 name=mine'. read= and write= set the SAE's own "
            "hooks: 'topk d_sae=4096 k=32 read=layers.3.mlp:input write=layers.3.mlp' is a transcoder."
        ),
    ] = None,
    seed: Seed = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other field of the config, repeatable: --set loop.batch_tokens=4096."),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL written by `kronsae harvest`, to train on instead of the model; read in random order, "
            "or with --set activation_order=harvested in the order of a run on the model."
        ),
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    wandb: Annotated[str | None, typer.Option(help="Also log to this Weights & Biases project.")] = None,
    head_parallel: Annotated[
        int,
        typer.Option(
            help="Under torchrun: number of processes that hold one dictionary, each a part of its heads. It divides "
            "the number of processes; the others share the tokens of each batch."
        ),
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the requirements (tokens, memory, disk, time) and train nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train SAEs side by side on one stream of a model's activations.

    Give a recipe, a config file, or --model, --text, --hook, --tokens (or --flops) and --sae. The same command resumes
    an unfinished run. `torchrun --nproc-per-node 4 -m kronsae train ...` trains with four processes.
    """
    from kronsae.distributed.launch import team
    from kronsae.runs.parsing import RunOptions, parse_sae
    from kronsae.runs.run import execute

    options = RunOptions(recipe=recipe, config=config, activations=activations, model=model, text=text, hook=hook)
    budget = {"tokens": tokens, "flops": flops, "same_flops_as": same_flops_as}
    with team(head_parallel) as processes:
        whole = options.run_config([parse_sae(spec, seed) for spec in sae or []], budget, seed, option or [])
        leads = processes is None or processes.leads
        if dry_run:
            if leads:
                _dry_run(whole, out, as_json)
            return
        run = execute(
            whole, out, show_progress=not quiet, tensorboard=tensorboard, wandb=wandb, say=say, team=processes
        )
        if not leads:
            return
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
