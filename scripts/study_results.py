"""Run a study (a sweep in studies/); write docs/results/<study>.csv and its table in docs/results/README.md.

.venv/bin/python scripts/study_results.py cells
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kronsae.report.sweeps import divergences, mean_table, summaries
from kronsae.runs.loaded import LoadedRun
from kronsae.runs.run import open_run
from kronsae.support.files import write_csv, write_marked
from kronsae.sweeps.grid import points, sweep_config
from kronsae.sweeps.sweep import execute_sweep

ROOT = Path(__file__).resolve().parent.parent
STUDIES = tuple(sorted(path.stem for path in (ROOT / "studies").glob("*.json")))
README = ROOT / "docs" / "results" / "README.md"
END = "<!-- /results -->"
L0_TOLERANCE = 0.02
ON_TRAINING_TEXT = "l0_on_training_text"


def result_path(study: str) -> Path:
    """Return the path of the study's committed results."""
    return ROOT / "docs" / "results" / f"{study}.csv"


def marker(study: str) -> str:
    """Return the marker at which the study's table begins."""
    return f"<!-- results:{study} -->"


def run(study: str) -> None:
    """Train and evaluate the missing runs of the study; replace its committed results."""
    config = sweep_config(ROOT / "studies" / f"{study}.json", {})
    folder = ROOT / "runs" / "studies" / study
    found = execute_sweep(config, folder, say=_say)
    with found.csv.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    trained = {group: l0_on_training_text(folder / "groups" / group) for group in {row["group"] for row in rows}}
    write_csv(result_path(study), [row | {ON_TRAINING_TEXT: trained[row["group"]].get(row["name"])} for row in rows])


@torch.no_grad()
def l0_on_training_text(folder: Path) -> dict[str, float]:
    """Return the l0 on training text of a run's SAEs with learned thresholds; that of TopK is always k."""
    loaded = LoadedRun(open_run(folder))
    free = {name: sae for name, sae in loaded.saes.items() if sae.config.sparsifier.kind != "topk"}
    active, tokens = dict.fromkeys(free, 0), 0
    for _, x_ND in loaded.activations(loaded.windows(loaded.run.config.eval_tokens, held_out=False) if free else []):
        tokens += len(x_ND)
        for name, sae in free.items():
            active[name] += int(sae.encode(x_ND).active.sum())
    return {name: number / tokens for name, number in active.items()}


def read_rows(study: str) -> list[dict[str, Any]]:
    """Return the committed results, with numbers as float and None for empty cells."""
    with result_path(study).open(encoding="utf-8", newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def table(study: str) -> str:
    """Return the study's table: mean and standard deviation over seeds, and a comparison of l0 with k."""
    rows = read_rows(study)
    settings = {
        point.name: {"kind": point.kind} | dict(point.settings)
        for point in points(sweep_config(ROOT / "studies" / f"{study}.json", {}))
    }
    found = mean_table(summaries(rows, settings))
    lines = [
        f"| SAE | {' | '.join(heading for heading, _ in found.headings)} |",
        "|---" * (len(found.headings) + 1) + "|",
    ]
    lines += [f"| {row.name} | {' | '.join(cell.text for cell in row.cells)} |" for row in found.rows]
    measured = [row for row in rows if not row.get("diverged")]
    first = measured[0]
    lines += [
        "",
        f"Mean ± one standard deviation over seeds; {_evaluated_on(measured)} held-out tokens. "
        f"{' '.join([*divergences(rows), *_l0_checks(measured)])} "
        f"Measured on {first['cores']:.0f} core(s) of {first['processor']}, commit {first['commit']} "
        f"([all figures]({study}.csv); reproduce with `python scripts/study_results.py {study}`).",
    ]
    return "\n".join(lines)


def _evaluated_on(rows: list[dict[str, Any]]) -> str:
    """Return the distinct numbers of held-out tokens, so that rows with different numbers are not confused."""
    return " or ".join(f"{tokens:,.0f}" for tokens in sorted({row["evaluation_tokens"] for row in rows}))


def _l0_checks(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield comparisons of l0 with k on held-out text, and on training text for SAEs with learned thresholds."""
    yield _l0_check(rows, "l0", "l0")
    learned = [row for row in rows if row.get(ON_TRAINING_TEXT) is not None]
    if learned:
        yield _l0_check(
            learned, ON_TRAINING_TEXT, "On the same number of training tokens, from which thresholds are learned, l0"
        )


def _l0_check(rows: list[dict[str, Any]], key: str, what: str) -> str:
    """Return whether each SAE's l0 is within 2% of k, and the deviations of those for which it is not."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        shares.setdefault(row["name"], []).append(row[key] / row["k"] - 1)
    wrong = {name: of for name, of in shares.items() if max(map(abs, of)) > L0_TOLERANCE}
    if wrong:
        deviations = ", ".join(f"{name} ({_range(of)})" for name, of in wrong.items())
        rule = "is within 2% of k except for" if len(wrong) < len(shares) else "deviates by more than 2% from k for"
        return f"{what} {rule} {deviations}."
    most_off = max(abs(one) for of in shares.values() for one in of)
    which = "every SAE" if key == "l0" else "every SAE with learned thresholds"
    return f"{what} is within 2% of k for {which} (maximum deviation {most_off:.1%})."


def _range(shares: list[float]) -> str:
    """Return the smallest and largest difference over the seeds, such as ``+17.9% to +21.5%``."""
    low, high = (f"{share:+.1%}".replace("-", "−") for share in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _value(text: str) -> Any:
    if text == "":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def main() -> None:
    """Run the study, then write its results and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--table-only", action="store_true", help="only write the table from the committed figures")
    arguments = parser.parse_args()
    if not arguments.table_only:
        run(arguments.study)
    write_marked(README, marker(arguments.study), END, table(arguments.study))


if __name__ == "__main__":
    main()
