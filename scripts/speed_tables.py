"""Write the tables of docs/speed.md, gpu.md, pursuit.md, distributed.md and harvesting.md from the benchmarks.

python scripts/speed_tables.py
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from kronsae.support.files import write_marked

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, GPU_PAGE, PURSUIT_PAGE, DISTRIBUTED_PAGE, HARVESTING_PAGE = (
    ROOT / "docs" / f"{name}.md" for name in ("speed", "gpu", "pursuit", "distributed", "harvesting")
)

Row = dict[str, str]


def rows_of(name: str) -> list[Row]:
    """Return the rows of a result file."""
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(headings: list[str], cells: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


def about(name: str, rows: Sequence[Row]) -> str:
    """Return a sentence with the machine, versions and commit of a result; where rows differ, with those of all."""
    machine, threads, python, versions, commit, seed, date = (
        ", ".join(dict.fromkeys(row[key] for row in rows))
        for key in ("machine", "threads", "python", "versions", "commit", "seed", "date")
    )
    return (
        f"\n\n{machine}, {threads} threads; Python {python}, {versions}; commit {commit}, seed {seed}, {date} "
        f"([CSV](../benchmarks/results/{name}.csv))."
    )


def milliseconds(row: Row) -> str:
    """Return ``median (lower quartile to upper quartile)``."""
    low, median, high = (float(row[key]) for key in ("low_quartile_ms", "median_ms", "high_quartile_ms"))
    digits = 0 if median >= 100 else 1
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def step() -> str:
    """Return the table of the training step of every library."""
    rows = rows_of("step")
    own = next(float(row["median_ms"]) for row in rows if row["subject"] == "kronsae")
    cells = [[row["subject"], milliseconds(row), f"{float(row['median_ms']) / own:.2f}"] for row in rows]
    first = rows[0]
    sizes = (
        f"D = {first['d_in']}, F = {int(first['d_sae']):,} ({int(first['num_heads']):,} heads of {first['d_base']} x "
        f"{first['d_extension']}), k = {first['k']}, {int(first['batch']):,} tokens, "
        f"{first['rounds']} interleaved rounds."
    )
    return table(["", "ms, median (quartiles)", "relative to kronsae"], cells) + f"\n\n{sizes}" + about("step", rows)


def grid() -> str:
    """Return the table of widths D and dictionary sizes F."""
    rows = rows_of("grid")
    places = list(dict.fromkeys((row["d_sae"], row["d_in"]) for row in rows))
    by = {(row["d_sae"], row["d_in"], row["subject"]): row for row in rows}
    cells = []
    for d_sae, d_in in places:
        product, own, dense = (by[d_sae, d_in, name] for name in ("encoder_product", "kronsae", "topk"))
        ratio = float(dense["median_ms"]) / float(own["median_ms"])
        cells.append([f"{int(d_sae):,}", d_in, *(milliseconds(row) for row in (product, own, dense)), f"{ratio:.2f}"])
    headings = ["F", "D", "encoder product", "KronSAE", "TopK", "TopK / KronSAE"]
    return table(headings, cells) + about("grid", rows)


def scaling() -> str:
    """Return the table of cost against dictionary size with a fixed number of heads."""
    rows = [row for row in rows_of("scaling") if row["subject"] == "kronsae"]
    at = {int(row["d_sae"]): float(row["median_ms"]) for row in rows}
    cells = [
        [
            f"{int(row['d_sae']):,}",
            f"{row['d_base']} x {row['d_extension']}",
            milliseconds(row),
            f"{at[int(row['d_sae'])] / at[2**15]:.2f}",
            f"{float(row['tokens_per_second']):,.0f}",
            f"{int(row['peak_bytes']) / 2**30:.1f}",
        ]
        for row in rows
    ]
    headings = ["F", "M x N", "step, ms", "relative to F = 2^15", "tokens/s", "peak memory, GiB"]
    return table(headings, cells) + about("scaling", rows)


def memory() -> str:
    """Return the table of peak additional memory of forward and backward."""
    [row] = rows_of("memory")
    cells = [
        [
            f"{int(row['d_sae']):,}",
            f"{int(row['batch']):,}",
            f"{int(row['extra_bytes']) / 2**20:,.0f}",
            f"{int(row['pre_latent_bytes']) / 2**20:,.0f}",
            f"{float(row['ratio']):.2f}",
        ]
    ]
    headings = ["F", "B", "forward + backward, MiB", "all pre-latents, MiB", "ratio"]
    return table(headings, cells) + about("memory", [row])


def quickstart() -> str:
    """Return the table of the quickstart's training speed with and without compiled kernels."""
    result = json.loads((RESULTS / "quickstart_paths.json").read_text(encoding="utf-8"))
    cells = []
    for what, ratio in result["ratio_of_medians"].items():
        values = {path: sorted(run[what] for run in runs) for path, runs in result["tokens_per_second"].items()}
        spread = [f"{found[len(found) // 2]:,.0f} ({found[0]:,.0f} to {found[-1]:,.0f})" for found in values.values()]
        cells.append([what, *spread, f"{ratio:.2f}"])
    source = result["provenance"]
    note = (
        f"\n\n{result['tokens']:,} tokens, median and range of {len(result['tokens_per_second']['cpu'])} runs; "
        f"{source['processor']}, {source['cores']} cores; commit {source['commit']}, {source['date']} "
        "([JSON](../benchmarks/results/quickstart_paths.json))."
    )
    return table(["tokens/s", "portable", "compiled", "compiled / portable"], cells) + note


def screening() -> str:
    """Return the table of int8 screening of heads."""
    rows = rows_of("int8_screening")
    cells = [
        [
            row["activations"],
            row["heads_left_over_per_token"],
            row["selection_exact"],
            row["float32_product_ms"],
            row["int8_product_ms"],
            row["recompute_ms"],
        ]
        for row in rows
    ]
    headings = ["activations", "remaining heads per token", "exact", "float32 product, ms", "int8 product, ms"]
    return table([*headings, "float32 product of the remaining heads, ms"], cells) + about("int8_screening", rows)


def sparsifiers() -> str:
    """Return the table of BatchTopK and JumpReLU relative to TopK."""
    rows = rows_of("sparsifiers")
    cells = [
        [
            f"{int(row['d_sae']):,}",
            row["d_in"],
            row["encoder"],
            row["sparsifier"],
            milliseconds(row),
            f"{float(row['ratio_to_topk']):.2f} ({float(row['low_quartile_ratio']):.2f} to "
            f"{float(row['high_quartile_ratio']):.2f})",
            f"{float(row['l0']):.1f}",
            row["places_per_token"],
        ]
        for row in rows
    ]
    headings = [
        "F",
        "D",
        "encoder",
        "sparsifier",
        "ms, median (quartiles)",
        "relative to topk",
        "l0",
        "stored entries per token",
    ]
    return table(headings, cells) + about("sparsifiers", rows)


def tried() -> str:
    """Return the table of kernel variants and their alternatives."""
    rows = rows_of("tried")
    return table(
        ["question", "choice", "ms, median (quartiles)"],
        [[row["question"], row["contestant"], milliseconds(row)] for row in rows],
    ) + about("tried", rows)


def group() -> str:
    """Return the table of eight SAEs trained together, compared with the sum of the parts."""
    rows = rows_of("group_cost")
    cells = [
        [
            row["part"],
            f"{float(row['median']):,.2f} ({float(row['quartile_1']):,.2f} to {float(row['quartile_3']):,.2f})",
            row["unit"],
        ]
        for row in rows
    ]
    return table(["part", "median (quartiles)", "unit"], cells) + about("group_cost", rows)


def variants(name: str) -> str:
    """Return the table of a file of `benchmarks/pursuit_step.py`."""
    rows = rows_of(name)
    cells = [
        [
            f"{int(row['d_sae']):,}",
            row["d_in"],
            row["subject"],
            milliseconds(row),
            f"{float(row['ratio']):.2f} ({float(row['low_quartile_ratio']):.2f} to "
            f"{float(row['high_quartile_ratio']):.2f})",
            row["relative_to"],
        ]
        for row in rows
    ]
    first = rows[0]
    sizes = (
        f"\n\nk = {first['k']}, {int(first['batch']):,} tokens, {first['rounds']} interleaved rounds, random inputs."
    )
    headings = ["F", "D", "", "ms, median (quartiles)", "ratio, median (quartiles)", "relative to"]
    return table(headings, cells) + sizes + about(name, rows)


def spinning() -> str:
    """Return the table of steps with threads that spin for long or briefly."""
    rows = rows_of("spinning")
    cells = [
        [
            f"{int(row['d_sae']):,}",
            row["d_in"],
            row["subject"],
            f"{float(row['long_ms']):.1f}",
            f"{float(row['brief_ms']):.1f}",
            f"{float(row['ratio']):.2f} ({float(row['lowest_ratio']):.2f} to {float(row['highest_ratio']):.2f})",
        ]
        for row in rows
    ]
    headings = ["F", "D", "", "ms, OpenMP's default", "ms, kronsae's", "default / kronsae's (range)"]
    turns = (
        f"\n\nMedians over {rows[0]['turns']} turns, each a process with either setting; ratios are those of a turn."
    )
    return table(headings, cells) + turns + about("spinning", rows)


def distributed() -> str:
    """Return the table of steps of several processes."""
    rows = rows_of("distributed_step")
    cells = [
        [
            f"{row['sae']}, F = {int(row['d_sae']):,}",
            row["mode"],
            f"{1000 * float(row['alone_seconds']):,.0f}",
            f"{1000 * float(row['together_seconds']):,.0f}",
            *(
                f"{float(row[key]):.2f} ({float(row[f'{key}_low']):.2f} to {float(row[f'{key}_high']):.2f})"
                for key in ("efficiency", "work")
            ),
            f"{float(row['sent_megabytes']):,.2f}",
            f"{float(row['formula_megabytes']):,.2f}",
        ]
        for row in rows
    ]
    first = rows[0]
    sizes = (
        f"\n\nD = {first['d_in']}, k = {first['k']}, {int(first['batch_tokens']):,} tokens, {first['processes']} "
        f"processes, {first['rounds']} interleaved rounds, random inputs."
    )
    headings = ["", "", "one process, ms", "two processes, ms", "efficiency, median (range)"]
    headings += ["work, median (range)", "sent, MB", "formula, MB"]
    return table(headings, cells) + sizes + about("distributed_step", rows)


def gpu_kernels() -> str:
    """Return the table of what every GPU kernel uses, one row per launch and a column per target."""
    rows = rows_of("gpu_kernels")
    targets, dtypes = ([*dict.fromkeys(row[name] for row in rows)] for name in ("target", "dtype"))
    by = {tuple(row[name] for name in ("kernel", "variant", "target", "dtype")): row for row in rows}
    cells = []
    for kernel, variant in dict.fromkeys((row["kernel"], row["variant"]) for row in rows):
        own = [[by[kernel, variant, target, dtype] for dtype in dtypes] for target in targets]
        used = [
            f"{' / '.join(row['registers'] for row in of)}; {max(int(row['shared_bytes']) for row in of):,}"
            for of in own
        ]
        first = own[0][0]
        tile = f"{first['rows']} x {int(first['block']):,}, {first['num_warps']}"
        cells.append([f"{kernel} ({variant})" if variant else kernel, f"{int(first['width']):,}", tile, *used])
    spilled = [row for row in rows if int(row["spill_bytes"]) or int(row["local_bytes"])]
    sentence = (
        f"\n\nEach cell: registers per thread in {', '.join(dtypes)}; bytes of shared memory per program (largest). "
        f"Tile and warps are those in {dtypes[0]}. {len(rows)} compiled kernels, {len(spilled)} with spills or local "
        f"memory. Digest of the kernels' source: {rows[0]['source']}."
    )
    for row in spilled:
        name = " ".join(row[key] for key in ("kernel", "variant", "target", "dtype"))
        sentence += f" {name}: {row['spill_bytes']} bytes spilled, {row['local_bytes']} bytes of local memory."
    return table(["kernel", "width", "tile, warps", *targets], cells) + sentence + about("gpu_kernels", rows)


def processes() -> str:
    """Return a sentence on the repeatability over new processes."""
    [row] = rows_of("fresh_processes")
    sentence = f"{row['processes']} new processes computed {row['different_results']} distinct result(s)."
    return sentence + about("fresh_processes", [row])


def precision() -> str:
    """Return the tables of explained variance by precision of the stored activations."""
    return "\n\n".join(precision_table(name) for name in ("cache_precision", "cache_precision_smollm2"))


def precision_table(name: str) -> str:
    """Return the table of a file of `benchmarks/cache_precision.py`."""
    rows = rows_of(name)
    first = rows[0]
    saes = list(dict.fromkeys(row["sae"] for row in rows))
    figures = {"explained_variance_per_token": "EV", "explained_variance": "EV of all tokens together"}
    figures = {key: words for key, words in figures.items() if key in first}
    base = {(row["sae"], row["seed"]): row for row in rows if row["dtype"] == "float32"}
    cells = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        cell = [dtype, own[0]["bytes_per_token"], f"{float(own[0]['lost_variance']):.1e}"]
        for key in figures:
            for sae in saes:
                values = [float(row[key]) for row in own if row["sae"] == sae]
                changes = [float(row[key]) - float(base[sae, row["seed"]][key]) for row in own if row["sae"] == sae]
                mean = f"{sum(values) / len(values):.4f}"
                cell.append(mean if dtype == "float32" else f"{mean} ({' '.join(f'{one:+.5f}' for one in changes)})")
        cells.append(cell)
    headings = ["dtype", "bytes per token", "lost variance"]
    rate = first.get("lr", "")
    model = "the bundled model" if first.get("model", "bundled") == "bundled" else first["model"]
    sizes = (
        f"\n\nExplained variance, mean of the seeds (and difference to float32 of each seed). {first['hook']} of "
        f"{model}, D = {first['d_in']}, F = {int(first['d_sae']):,}, k = {first['k']}, "
        f"{int(first['tokens']):,} tokens, {first['epochs']} epochs{f', learning rate {rate}' if rate else ''}."
    )
    columns = [f"{words}, {sae}" for words in figures.values() for sae in saes]
    return table([*headings, *columns], cells) + sizes + about(name, rows)


def passes() -> str:
    """Return the table of the language model's pass, as a ratio to the whole batch at once."""
    files = {name: rows_of(f"model_pass_{name}") for name in ("smollm2", "bundled")}
    cells, paid = [], []
    for name, rows in files.items():
        own = {row["variant"]: row for row in rows if row["first_seconds"]}
        for row in rows:
            ratio = f"{float(row['ratio']):.2f} ({float(row['low_ratio']):.2f} to {float(row['high_ratio']):.2f})"
            place = f"{row['windows']} x {row['context_length']}, {100 * float(row['padding']):.0f}%"
            cells.append([name, place, row["variant"], f"{float(row['tokens_per_second']):,.0f}", ratio])
        compiled = own["divided, torch.compile"]
        paid.append(f"{float(compiled['first_seconds']):.0f} s for {name}, {worth(own['divided'], compiled)}")
    headings = ["model", "windows x tokens, not kept", "variant", "tokens/s"]
    first = files["smollm2"][0]
    sizes = (
        f"\n\n{first['hook']} of smollm2 and {files['bundled'][0]['hook']} of the bundled model. Tokens per second of "
        f"one core's processor time; {first['rounds']} and {files['bundled'][0]['rounds']} interleaved rounds, each "
        f"with another batch of real text. `torch.compile` took {'; '.join(paid)}; other work slowed it."
    )
    sources = "".join(about(f"model_pass_{name}", rows) for name, rows in files.items())
    return table([*headings, "relative to whole batch, median (quartiles)"], cells) + sizes + sources


def worth(usual: Row, compiled: Row) -> str:
    """Return how many minutes of passes of a compiled model save the time in which it was compiled."""
    gain = 1 - float(usual["ratio"]) / float(compiled["ratio"])
    if gain <= 0:
        return "which no pass saves"
    return f"as much as {float(compiled['first_seconds']) / gain / 60:.0f} minutes of passes save"


def memory_of_reading() -> str:
    """Return the table of trainings on a folder that is larger than their memory."""
    rows = rows_of("cache_memory")
    cells = [
        [
            row["order"],
            f"{int(row['folder_mb']):,}",
            f"{int(row['limit_mb']):,}",
            f"{int(row['before_anonymous_mb']):,}",
            f"{int(row['peak_anonymous_mb']):,}",
            f"{int(row['tokens_per_second']):,}",
        ]
        for row in rows
    ]
    first = rows[0]
    refused = "was refused" if all(row["folder_refused"] == "True" for row in rows) else "was not refused"
    sizes = (
        f"\n\n{first['hooks']} SAEs, one per hook, D = {first['d_in']}, F = {first['d_sae']}, k = {first['k']}, "
        f"{int(first['batch']):,} tokens per step, {int(first['tokens']):,} tokens, each once. An array of the "
        f"folder's size {refused} in each process."
    )
    headings = ["order", "folder, MB", "limit, MB", "before the training, MB", "peak, MB", "tokens/s"]
    return table(headings, cells) + sizes + about("cache_memory", rows)


def wait() -> str:
    """Return the table of the time that a training waits for stored activations."""
    rows = rows_of("cache_wait")
    cells = [
        [
            row["dtype"],
            row["order"],
            f"{float(row['wait_percent']):.2f}% ({float(row['low_quartile_percent']):.2f} to "
            f"{float(row['high_quartile_percent']):.2f})",
            row["step_ms"],
            row["read_ms"],
        ]
        for row in rows
    ]
    first = rows[0]
    sizes = (
        f"\n\nOne KronSAE, D = {first['d_in']}, F = {int(first['d_sae']):,}, k = {first['k']}, "
        f"{int(first['batch']):,} tokens per step, {first['rounds']} interleaved rounds. The files are in the system's "
        "memory; from a disk, a read takes longer."
    )
    headings = ["dtype", "order", "waiting, median (quartiles)", "step, ms", "reading a batch alone, ms"]
    return table(headings, cells) + sizes + about("cache_wait", rows)


def cached() -> str:
    """Return a sentence on the speed of a training on stored activations."""
    [row] = rows_of("cached_training")
    sentence = (
        f"{row['model']}, {row['hook']}, {row['saes']} SAEs of {int(row['d_sae']):,} latents, k = {row['k']}, "
        f"{int(row['tokens']):,} tokens, {row['rounds']} interleaved rounds: "
        f"{float(row['model_tokens_per_second']):,.0f} tokens/s on the model and "
        f"{float(row['stored_tokens_per_second']):,.0f} on stored activations (medians), {float(row['ratio']):.1f} "
        f"times as fast (quartiles {float(row['low_ratio']):.1f} to {float(row['high_ratio']):.1f})."
    )
    return sentence + about("cached_training", [row])


TABLES: dict[str, Callable[[], str]] = {
    "step": step,
    "grid": grid,
    "sparsifiers": sparsifiers,
    "scaling": scaling,
    "memory": memory,
    "quickstart": quickstart,
    "int8": screening,
    "tried": tried,
    "group": group,
    "processes": processes,
    "null-symbols": partial(variants, "null_symbols"),
    "spinning": spinning,
}


def main() -> None:
    """Replace the text between the markers of each table."""
    for name, make in TABLES.items():
        write_marked(PAGE, f"<!-- results:{name} -->", f"<!-- /results:{name} -->", make())
    write_marked(GPU_PAGE, "<!-- results:gpu-kernels -->", "<!-- /results:gpu-kernels -->", gpu_kernels())
    if (RESULTS / "pursuit_step.csv").exists():
        mark = "results:pursuit-cost"
        write_marked(PURSUIT_PAGE, f"<!-- {mark} -->", f"<!-- /{mark} -->", variants("pursuit_step"))
    if (RESULTS / "distributed_step.csv").exists():
        mark = "results:distributed-step"
        write_marked(DISTRIBUTED_PAGE, f"<!-- {mark} -->", f"<!-- /{mark} -->", distributed())
    harvesting = {"precision": precision, "wait": wait, "cached": cached, "pass": passes, "memory": memory_of_reading}
    for name, make in harvesting.items():
        write_marked(HARVESTING_PAGE, f"<!-- results:{name} -->", f"<!-- /results:{name} -->", make())


if __name__ == "__main__":
    main()
