"""``kronsae plan``: predict memory, speed, disk space, time and cost of a training on given devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kronsae.cli.options import Tokens
from kronsae.support.terminal import Json, print_json, what_now

app = typer.Typer(add_completion=False)


@app.command()
def plan(
    recipe: Annotated[str | None, typer.Option(help="Recipe; see `kronsae recipes`.")] = None,
    config: Annotated[Path | None, typer.Option(help="Config of a run as JSON (the run.json of a run folder).")] = None,
    model: Annotated[
        str | None, typer.Option(help="Language model: a known name, such as llama-3.1-70b, or a folder.")
    ] = None,
    hook: Annotated[str | None, typer.Option(help="Hook to read; default with --model: the middle layer.")] = None,
    tokens: Tokens = None,
    sae: Annotated[
        list[str] | None, typer.Option(help="SAE to train, repeatable, as for `kronsae train`: 'topk d_sae=4096 k=32'.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other field of the config, repeatable: --set model.dtype=bfloat16."),
    ] = None,
    d_in: Annotated[
        int | None, typer.Option(help="Width of the model and its hooks, instead of the known one.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model, instead of the known number.")] = None,
    parameters: Annotated[
        float | None, typer.Option(help="Parameters of the model, such as 70e9, instead of the known number.")
    ] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Vocabulary of the model, instead of the known one.")] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Number of devices; default: the smallest power of two into which it fits.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Device: a100-40gb, a100, h100, h200, b200, l40s or mi300x.")] = "h100",
    device_memory: Annotated[float | None, typer.Option(help="Memory of a device in bytes, such as 80e9.")] = None,
    flops: Annotated[
        float | None, typer.Option(help="Peak rate of its matrix products in FLOP/s, in every dtype, such as 312e12.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Peak rate of its memory in bytes/s, such as 2e12.")] = None,
    link_bandwidth: Annotated[
        float | None, typer.Option(help="Rate at which it sends to devices of its node in bytes/s, such as 300e9.")
    ] = None,
    efficiency: Annotated[
        float | None, typer.Option(help="Share of the peak rates that is reached; default: 0.4.")
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Price of one device for an hour.")] = None,
    as_json: Json = False,
) -> None:
    """Predict memory, speed, disk space, time and cost of a training, and the parallelism that it needs.

    Give a recipe, a config file, or --model, --tokens and --sae. Nothing is downloaded, loaded or run. The formulas are
    in docs/planning.md.
    """
    from kronsae.capacity.devices import EFFICIENCY, find_device
    from kronsae.capacity.estimate import estimate
    from kronsae.capacity.models import GivenShape, find_model, whole
    from kronsae.data.model import ModelConfig
    from kronsae.runs.parsing import RunOptions, parse_sae

    given = GivenShape(d_in=d_in, layers=layers, parameters=whole(parameters), vocabulary=vocabulary)
    device = find_device(
        gpu, device_memory=device_memory, flops=flops, bandwidth=bandwidth, link_bandwidth=link_bandwidth
    )
    members = [parse_sae(spec) for spec in sae or []]
    options = RunOptions(recipe=recipe, config=config, model=model, hook=hook)
    if recipe is None and config is None:
        if model is None and parameters is not None:
            options = replace(options, model="given")
        options = replace(options, text="bundled").with_own_hook(members)  # the text does not matter
        if options.model is not None and options.hook is None:
            shape = find_model(ModelConfig(name=options.model), given)
            options = replace(options, hook=f"layers.{shape.layers // 2}")
    budget = {"tokens": tokens, "flops": None, "same_flops_as": None}
    found = estimate(
        options.run_config(members, budget, None, option or []),
        device,
        gpus,
        given=given,
        efficiency=EFFICIENCY if efficiency is None else efficiency,
        price_per_hour=price_per_hour,
    )
    if as_json:
        print_json(found.to_dict())
    else:
        print(found)
    found.check()
    what_now("kronsae train with the same options, --text TEXT and --out RUN", "docs/planning.md has the formulas")
