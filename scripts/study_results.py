"""Run a study (a sweep in studies/); write docs/results/<study>.csv and its table in docs/results/README.md.

.venv/bin/python scripts/study_results.py cells
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from pathlib import Path
from typing import Any

from kronsae.files import write_marked
from kronsae.grid import points, sweep_config
from kronsae.report.sweeps import divergences, mean_table, summaries
from kronsae.sweeping import execute_sweep

ROOT = Path(__file__).resolve().parent.parent
STUDIES = tuple(sorted(path.stem for path in (ROOT / "studies").glob("*.json")))
README = ROOT / "docs" / "results" / "README.md"
END = "<!-- /results -->"
L0_TOLERANCE = 0.02


def result_path(study: str) -> Path:
    """The study's committed figures."""
    return ROOT / "docs" / "results" / f"{study}.csv"


def marker(study: str) -> str:
    """Where the study's table begins."""
    return f"<!-- results:{study} -->"


def run(study: str) -> None:
    """Train and evaluate what is missing of the study; replace its committed figures."""
    config = sweep_config(ROOT / "studies" / f"{study}.json", {})
    found = execute_sweep(config, ROOT / "runs" / "studies" / study, say=_say)
    shutil.copyfile(found.csv, result_path(study))


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
        f"{' '.join([*divergences(rows), _l0_check(measured)])} "
        f"On {first['cores']:.0f} cores of {first['processor']}, commit {first['commit']} "
        f"([all figures]({study}.csv); again by `python scripts/study_results.py {study}`).",
    ]
    return "\n".join(lines)


def _evaluated_on(rows: list[dict[str, Any]]) -> str:
    """Each number of held-out tokens once; rows measured on different ones must not look alike."""
    return " or ".join(f"{tokens:,.0f}" for tokens in sorted({row["evaluation_tokens"] for row in rows}))


def _l0_check(rows: list[dict[str, Any]]) -> str:
    """Whether each SAE's l0 on held-out tokens is within 2% of the k it was asked for; where not, by how much."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        shares.setdefault(row["name"], []).append(row["l0"] / row["k"] - 1)
    wrong = {name: of for name, of in shares.items() if max(map(abs, of)) > L0_TOLERANCE}
    if wrong:
        told = ", ".join(f"{name} ({_range(of)})" for name, of in wrong.items())
        most = "l0 is within 2% of k but for" if len(wrong) < len(shares) else "l0 is further than 2% from k for"
        return f"{most} {told}."
    return (
        f"l0 is within 2% of k for every SAE (at most {max(abs(one) for of in shares.values() for one in of):.1%} off)."
    )


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
