"""``kronsae bench``: the benchmarks as commands; ``--csv`` writes the files that the docs are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kronsae.bench import checklist, compiled, runs
from kronsae.bench.device import find_gpu
from kronsae.bench.measure import Timing
from kronsae.bench.subjects import Shape
from kronsae.support.files import check_folder_place, write_csv
from kronsae.support.provenance import provenance_columns
from kronsae.support.terminal import print_json, say, what_now

app = typer.Typer(
    no_args_is_help=True,
    help="Measure training steps and memory on this machine: medians in ms of interleaved rounds. Before timing, the "
    "operations are checked; if a check fails, nothing is reported.",
)

DIn = Annotated[int, typer.Option(help="D, width of the activations.")]
NumHeads = Annotated[int, typer.Option(help="H, heads.")]
DBase = Annotated[int, typer.Option(help="M, bases per head.")]
DExtension = Annotated[int, typer.Option(help="N, extensions per head.")]
K = Annotated[int, typer.Option(help="Latents kept per token.")]
Batch = Annotated[int, typer.Option(help="B, tokens per step.")]
Rounds = Annotated[int, typer.Option(help="Number of timed rounds.")]
Seed = Annotated[int, typer.Option(help="Seed of weights and activations.")]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout, and nothing else there.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="Also write the results to this CSV file.")]


@app.command()
def step(
    d_in: DIn = 768,
    num_heads: NumHeads = 1024,
    d_base: DBase = 4,
    d_extension: DExtension = 8,
    k: K = 32,
    batch: Batch = 1024,
    rounds: Rounds = 15,
    seed: Seed = 0,
    only: Annotated[
        list[str] | None, typer.Option(help="Name of an implementation to measure; repeatable. Default: all.")
    ] = None,
    csv: Csv = None,
    as_json: Json = False,
) -> None:
    """Compare KronSAE's training step with its encoder product, TopK, the paper's listing and two libraries."""
    shape = Shape(d_in=d_in, num_heads=num_heads, d_base=d_base, d_extension=d_extension, k=k, batch=batch)
    result = runs.step(shape, rounds, seed, only or ())
    rows = [{"subject": name, **_sizes(shape), **_times(timing)} for name, timing in result.timings.items()]
    own = result.timings.get("kronsae")
    medians: dict[str, float | None] = {name: round(t.median_ms, 2) for name, t in result.timings.items()}
    ratios = {
        name: round(own.median_ms / t.median_ms if name == "encoder_product" else t.median_ms / own.median_ms, 3)
        for name, t in result.timings.items()
        if own is not None and name != "kronsae"
    }
    spread = {name: [round(t.low_ms, 2), round(t.high_ms, 2)] for name, t in result.timings.items()}
    payload = {
        **medians,
        **dict.fromkeys(result.unavailable),
        "spread": spread,
        "ratios": ratios,
        "unavailable": result.unavailable,
        "sizes": _sizes(shape),
        "rounds": rounds,
        **provenance_columns(seed),
    }
    lines = [
        f"{name:16s} {t.median_ms:9.1f} ms   ({t.low_ms:.1f} to {t.high_ms:.1f})   {_describe_ratio(name, ratios)}"
        for name, t in result.timings.items()
    ]
    lines += [f"{name:16s}   not measured: {reason}" for name, reason in result.unavailable.items()]
    _report(rows, payload, lines, seed, csv, as_json)


@app.command()
def grid(
    batch: Batch = 256,
    rounds: Rounds = 5,
    seed: Seed = 0,
    csv: Csv = None,
    plot: Annotated[Path | None, typer.Option(help="Also plot the results to this .svg, .png or .pdf file.")] = None,
    as_json: Json = False,
) -> None:
    """Compare KronSAE with TopK over model widths and dictionary sizes (the paper's figure 8)."""
    from kronsae.bench.plot import check_plot, plot_grid

    if plot is not None:
        check_plot(plot)
    points = runs.grid(batch=batch, rounds=rounds, seed=seed)
    rows = [
        {"subject": name, **_sizes(point.shape), **_times(timing)}
        for point in points
        for name, timing in point.timings.items()
    ]
    skipped = [{**_sizes(point.shape), "reason": point.skipped} for point in points if point.skipped is not None]
    lines = [f"F={row['d_sae']:7d} D={row['d_in']:5d} {row['subject']:16s} {row['median_ms']:10.1f} ms" for row in rows]
    lines += [f"F={point['d_sae']:7d} D={point['d_in']:5d} skipped: {point['reason']}" for point in skipped]
    _report(rows, {"points": rows, "skipped": skipped, **provenance_columns(seed)}, lines, seed, csv, as_json)
    if plot is not None:
        plot_grid(points, plot)


@app.command()
def sparsifiers(
    k: K = 32,
    batch: Batch = 1024,
    rounds: Rounds = 15,
    seed: Seed = 0,
    csv: Csv = None,
    as_json: Json = False,
) -> None:
    """Compare BatchTopK and JumpReLU with TopK at equal l0, dense and Kronecker, at two widths and dictionary sizes."""
    rows = []
    for point in runs.sparsifiers(runs.SPARSIFIER_SIZES, k=k, batch=batch, rounds=rounds, seed=seed):
        ratio = {
            "ratio_to_topk": round(point.ratio.median_ms, 3),
            "low_quartile_ratio": round(point.ratio.low_ms, 3),
            "high_quartile_ratio": round(point.ratio.high_ms, 3),
        }
        names = {"encoder": point.encoder, "sparsifier": point.sparsifier}
        places = {"l0": round(point.l0, 2), "places_per_token": point.width}
        rows.append({**names, **_sizes(point.shape), **_times(point.timing), **ratio, **places})
    lines = [
        f"F={row['d_sae']:6d} D={row['d_in']:4d} {row['encoder']:6s} {row['sparsifier']:11s} {row['median_ms']:8.1f} ms"
        f"   {row['ratio_to_topk']:.2f} x topk ({row['low_quartile_ratio']:.2f} to {row['high_quartile_ratio']:.2f})"
        f"   l0 {row['l0']:.1f}, {row['places_per_token']} places"
        for row in rows
    ]
    _report(rows, {"points": rows, **provenance_columns(seed)}, lines, seed, csv, as_json)


@app.command()
def scaling(
    d_in: DIn = 768,
    num_heads: NumHeads = 1024,
    k: K = 32,
    batch: Batch = 1024,
    rounds: Rounds = 5,
    seed: Seed = 0,
    csv: Csv = None,
    as_json: Json = False,
) -> None:
    """Measure step time and peak memory of KronSAE for F = 4 H .. 1024 H at a fixed number of heads H."""
    rows = []
    for point in runs.scaling(d_in=d_in, num_heads=num_heads, k=k, batch=batch, rounds=rounds, seed=seed):
        extra = {"peak_bytes": point.peak_bytes, "tokens_per_second": round(point.tokens_per_second, 1)}
        rows += [{"subject": name, **_sizes(point.shape), **_times(t), **extra} for name, t in point.timings.items()]
    lines = [
        f"F={row['d_sae']:8d} {row['subject']:16s} {row['median_ms']:9.1f} ms  peak {row['peak_bytes'] / 2**30:.2f} GiB"
        for row in rows
    ]
    _report(rows, {"points": rows, **provenance_columns(seed)}, lines, seed, csv, as_json)


@app.command()
def memory(
    d_in: DIn = 768,
    num_heads: NumHeads = 4096,
    d_base: DBase = 4,
    d_extension: DExtension = 8,
    k: K = 32,
    batch: Batch = 8192,
    seed: Seed = 0,
    csv: Csv = None,
    as_json: Json = False,
) -> None:
    """Compare the peak extra memory of forward and backward with that of all pre-latents, B * H * (M + N) * 4 bytes."""
    shape = Shape(d_in=d_in, num_heads=num_heads, d_base=d_base, d_extension=d_extension, k=k, batch=batch)
    result = runs.memory(shape, seed)
    row = {
        **_sizes(shape),
        "extra_bytes": result.extra_bytes,
        "pre_latent_bytes": result.pre_latent_bytes,
        "ratio": round(result.ratio, 4),
    }
    line = f"forward + backward add {result.extra_bytes / 2**20:.0f} MiB: {result.ratio:.2f} x all pre-latents"
    _report([row], {**row, **provenance_columns(seed)}, [line], seed, csv, as_json)


@app.command("compile")
def compile_kernels(
    target: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90 or gfx942; repeatable. Default: all of them.")
    ] = None,
    seed: Seed = 0,
    csv: Csv = None,
    as_json: Json = False,
) -> None:
    """Compile every GPU kernel ahead of time and list registers, spills and shared memory. Needs Triton, but no GPU.

    The column ``source`` of the results is a digest of the kernels' source.
    """
    rows, source = [], compiled.source_digest()
    for name in target or compiled.TARGETS:
        for dtype in compiled.DTYPES:
            rows += [{**vars(one), "source": source} for one in compiled.compile_all(name, dtype)]
            say(f"{name}, {str(dtype).removeprefix('torch.')}: compiled")
    lines = [
        f"{row['target']:6s} {row['dtype']:8s} {row['kernel']:16s} {row['variant']:24s} {row['registers']:3d} registers"
        f" {row['spill_bytes']:4d} bytes spilled {row['shared_bytes']:6d} bytes shared"
        for row in rows
    ]
    _report(rows, {"kernels": rows, **provenance_columns(seed)}, lines, seed, csv, as_json)
    what_now("on a machine with a GPU: kronsae bench gpu")


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="Folder for the results, one CSV file per item.")] = Path("gpu-bench"),
    only: Annotated[
        list[str] | None,
        typer.Option(help="Item to run; repeatable. Operations are always compared first. Default: all."),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time for everything.")] = checklist.MINUTES,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print items and times, and do nothing.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Check and measure the kernels on a GPU, tune their block sizes, and compare a training step with its floor."""
    items = checklist.select_items(only or [])
    if dry_run:
        planned = [{"item": item.name, "about": item.about, "seconds_at_most": item.seconds} for item in items]
        total = sum(item.seconds for item in items)
        lines = [f"{item.name:11s} {item.seconds:4d} s at most   {item.about}" for item in items]
        lines.append(f"{'together':11s} {total:4d} s at most of {60 * minutes:.0f} s; results go to {out}")
        typer.echo(json.dumps({"items": planned, "seconds": total}, indent=2) if as_json else "\n".join(lines))
        what_now("on a machine with a GPU: kronsae bench gpu")
        return
    device = find_gpu()
    check_folder_place(out)
    table, sizes = checklist.block_table(), checklist.sizes_for(device.memory_bytes)
    say(f"{device.name}: results go to {out}, block sizes to {table}")
    outcomes = checklist.run_checklist(device, sizes, out, only or [], table, minutes, seed, _say_outcome)
    results = {one.item: one.rows for one in outcomes}
    if as_json:
        print_json({"device": device.name, "results": results, **provenance_columns(seed)})
    else:
        for row in [*results.get("step", ()), *results.get("grid", ())]:
            time = row["problem"] if row["median_ms"] is None else f"{row['median_ms']:.2f} ms"
            floor = "" if row["ratio_to_floor"] is None else f"   {row['ratio_to_floor']:.2f} x floor"
            typer.echo(f"F={row['d_sae']:7d} D={row['d_in']:5d} {row['subject']:16s} {time}{floor}")
    what_now(f"look at {out}/step.csv")
    if any(one.problems for one in outcomes):
        raise typer.Exit(1)


def _say_outcome(outcome: checklist.Outcome) -> None:
    say(f"{outcome.item}: {len(outcome.rows)} rows in {outcome.seconds:.0f} s")
    for problem in outcome.problems:
        say(f"  failed: {problem}")
    if outcome.left_out:
        say(f"  no time was left for: {', '.join(outcome.left_out)}")


def _sizes(shape: Shape) -> dict[str, int]:
    return {**vars(shape), "d_sae": shape.d_sae}


def _times(timing: Timing) -> dict[str, Any]:
    return {
        "median_ms": round(timing.median_ms, 3),
        "low_quartile_ms": round(timing.low_ms, 3),
        "high_quartile_ms": round(timing.high_ms, 3),
        "rounds": timing.rounds,
    }


def _describe_ratio(name: str, ratios: dict[str, float]) -> str:
    if name not in ratios:
        return ""
    return f"kronsae takes {ratios[name]:.2f} x this" if name == "encoder_product" else f"{ratios[name]:.2f} x kronsae"


def _report(
    rows: list[dict[str, Any]], payload: dict[str, Any], lines: list[str], seed: int, csv: Path | None, as_json: bool
) -> None:
    if csv is not None:
        write_csv(csv, [{**row, **provenance_columns(seed)} for row in rows])
    typer.echo(json.dumps(payload, indent=2) if as_json else "\n".join(lines))
