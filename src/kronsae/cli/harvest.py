"""``kronsae harvest``: write the activations of a model to disk."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from kronsae.support.terminal import Json, Quiet, print_json, say, what_now


def harvest(
    out: Annotated[
        str, typer.Option("--out", "-o", help="Folder for the activations, or a URL that fsspec opens (s3://...).")
    ],
    hook: Annotated[
        list[str],
        typer.Option(help="Hook to read, repeatable: module path or layer, such as layers.6 or layers.6.mlp:input."),
    ],
    tokens: Annotated[int, typer.Option(help="Tokens to harvest.")],
    model: Annotated[
        str, typer.Option(help="Hub name, local folder, GGUF file, or a name of `kronsae models`.")
    ] = "bundled",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    model_dtype: Annotated[
        str, typer.Option(help="Precision of the model's weights: float32, bfloat16 or float16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Device of the model: auto, cpu, cuda or cuda:1.")] = "auto",
    text: Annotated[str, typer.Option(help="Text: Hub data set, local file or folder.")] = "bundled",
    subset: Annotated[str | None, typer.Option(help="Subset (configuration) of a Hub data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    column: Annotated[str, typer.Option(help="Name of the text column in files with columns.")] = "text",
    dtype: Annotated[str, typer.Option(help="Precision on disk: float32, bfloat16, float16 or int8.")] = "float32",
    context_length: Annotated[int, typer.Option(help="Length of a sequence of the model in tokens.")] = 256,
    model_batch: Annotated[int, typer.Option(help="Windows of a batch, read in one or several passes.")] = 32,
    held_out_share: Annotated[float, typer.Option(help="Share of documents held out for evaluation.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the order of the windows, as of a training.")] = 0,
    window_pool_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens in the pool in which windows are shuffled, as of a training; 0: order of the text."),
    ] = None,
    shard_mb: Annotated[int, typer.Option(help="Size of a shard in MB (2^20 bytes), over all hooks.")] = 128,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a model over text and write the activations of one or more hooks to disk, as safetensors.

    The same command resumes an interrupted harvest.
    """
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
            seed=seed,
            window_pool_tokens=window_pool_tokens,
            shard_bytes=shard_mb * 2**20,
            progress=progress,
            say=say,
        )
    if as_json:
        print_json(summary)
    else:
        for key, value in summary.items():
            print(f"{key}: {value:.1f}" if isinstance(value, float) else f"{key}: {value}")
    what_now(f"kronsae train --activations {shlex.quote(out)} --sae '...' --tokens ... --out runs/...")
