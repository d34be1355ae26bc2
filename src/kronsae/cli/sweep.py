"""``kronsae sweep``: train and evaluate a grid of SAEs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kronsae.cli.options import Hook, Model, SameFlopsAs, Text
from kronsae.support.terminal import Json, Quiet, print_json, say, what_now


def sweep(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the sweep.")],
    grid: Annotated[
        Path | None,
        typer.Option(help="Config of a sweep as JSON (a sweep.json); other options override its values."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe to start from; see `kronsae recipes`.")] = None,
    config: Annotated[Path | None, typer.Option(help="Config of a run as JSON, to start from.")] = None,
    model: Model = None,
    text: Text = None,
    hook: Hook = None,
    activations: Annotated[str | None, typer.Option(help="Folder or URL written by `kronsae harvest`.")] = None,
    sae: Annotated[
        list[str] | None,
        typer.Option(
            help="SAEs to train, repeatable; {a,b} is replaced by each value in turn: "
            "'kron d_base={1,2} d_extension=4 d_sae=1024 k=16'."
        ),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="One or more budgets in tokens: 250000,500000.")] = None,
    flops: Annotated[
        str | None, typer.Option(help="One or more budgets in FLOPs: 1e13,3e13; instead of --tokens.")
    ] = None,
    same_flops_as: SameFlopsAs = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Number of seeds (3 means 0, 1 and 2), or the seeds: 4,5 or {4}. A seed sets weights and data."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other field, repeatable: --set 'saes.*.optimizer.beta2={0.99,0.999}'."),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Maximum number of SAEs on one stream of activations.")] = 16,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the remaining work and its requirements, and train nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train and evaluate a grid of SAEs; write a CSV file with all metrics and a page with plots.

    All SAEs of a seed see the same batches, and many of them share each pass of the model. The same command resumes an
    interrupted sweep. If the grid has changed, only new SAEs are trained.
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
    what_now(f"open {found.page} in a browser", f"{found.csv} has all settings and metrics")
