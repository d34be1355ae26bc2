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
    """The study's committed figures."""
    return ROOT / "docs" / "results" / f"{study}.csv"


def marker(study: str) -> str:
    """Where the study's table begins."""
    return f"<!-- results:{study} -->"


def run(study: str) -> None:
    """Train and evaluate what is missing of the study; replace its committed figures."""
    config = sweep_config(ROOT / "studies" / f"{study}.json", {})
    folder = ROOT / "runs" / "studies" / study
    found = execute_sweep(config, folder, say=_say)
    with found.csv.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    trained = {group: l0_on_training_text(folder / "groups" / group) for group in {row["group"] for row in rows}}
    write_csv(result_path(study), [row | {ON_TRAINING_TEXT: trained[row["group"]].get(row["name"])} for row in rows])


@torch.no_grad()
def l0_on_training_text(folder: Path) -> dict[str, float]:
    """Of the SAEs of a run that choose by thresholds, which training sets; TopK keeps k on any text."""
    loaded = LoadedRun(open_run(folder))
    free = {name: sae for name, sae in loaded.saes.items() if sae.config.sparsifier.kind != "topk"}
    active, tokens = dict.fromkeys(free, 0), 0
    for _, x_ND in loaded.activations(loaded.windows(loaded.run.config.eval_tokens, held_out=False) if free else []):
        tokens += len(x_ND)
        for name, sae in free.items():
            active[name] += int(sae.encode(x_ND).active.sum())
    return {name: number / tokens for name, number in active.items()}


def read_rows(study: str) -> list[dict[str, Any]]:
    """The committed figures, numbers as numbers and None where there is none."""
    with result_path(study).open(encoding="utf-8", newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def table(study: str) -> str:
    """The study's lines in the README: means over seeds with one standard deviation, and whether l0 is as asked."""
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
        f"On {first['cores']:.0f} core(s) of {first['processor']}, commit {first['commit']} "
        f"([all figures]({study}.csv); again by `python scripts/study_results.py {study}`).",
    ]
    return "\n".join(lines)


def _evaluated_on(rows: list[dict[str, Any]]) -> str:
    """Each number of held-out tokens once; rows measured on different ones must not look alike."""
    return " or ".join(f"{tokens:,.0f}" for tokens in sorted({row["evaluation_tokens"] for row in rows}))


def _l0_checks(rows: list[dict[str, Any]]) -> Iterator[str]:
    """l0 against the k asked for: on held-out text, and on the text that thresholds were learnt from."""
    yield _l0_check(rows, "l0", "l0")
    learnt = [row for row in rows if row.get(ON_TRAINING_TEXT) is not None]
    if learnt:
        yield _l0_check(learnt, ON_TRAINING_TEXT, "On as much of the training text, where thresholds are learnt, l0")


def _l0_check(rows: list[dict[str, Any]], key: str, what: str) -> str:
    """Whether each SAE's l0 is within 2% of the k it was asked for; where not, by how much."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        shares.setdefault(row["name"], []).append(row[key] / row["k"] - 1)
    wrong = {name: of for name, of in shares.items() if max(map(abs, of)) > L0_TOLERANCE}
    if wrong:
        told = ", ".join(f"{name} ({_range(of)})" for name, of in wrong.items())
        most = "is within 2% of k but for" if len(wrong) < len(shares) else "is further than 2% from k for"
        return f"{what} {most} {told}."
    most_off = max(abs(one) for of in shares.values() for one in of)
    return f"{what} is within 2% of k for every {'SAE' if key == 'l0' else 'such SAE'} (at most {most_off:.1%} off)."


def _range(shares: list[float]) -> str:
    """Smallest and largest difference over the seeds: ``+17.9% to +21.5%``."""
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
    """Measure, write the figures, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--table-only", action="store_true", help="only write the table from the committed figures")
    arguments = parser.parse_args()
    if not arguments.table_only:
        run(arguments.study)
    write_marked(README, marker(arguments.study), END, table(arguments.study))


if __name__ == "__main__":
    main()
