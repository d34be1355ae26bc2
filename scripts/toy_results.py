"""Measure SAEs on the toy model of correlated features; write docs/results/toy.json and the tables of toy.md.

.venv/bin/python scripts/toy_results.py [--seeds 3] [--table-only]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any

from kronsae.measures.toy import ToyConfig, measure
from kronsae.report.sections.toy import setup_table, table, verdict
from kronsae.report.tables import markdown_table
from kronsae.runs.planning import format_duration
from kronsae.support.config import to_dict
from kronsae.support.files import write_json, write_marked
from kronsae.support.progress import progress_bar
from kronsae.support.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "results" / "toy.json"
PAGE = ROOT / "docs" / "measurements" / "toy.md"
START, END = "<!-- results:toy -->", "<!-- /results -->"


def markdown(kept: dict[str, Any]) -> str:
    """Return the generated part of the page: both tables, the verdict, and their provenance."""
    result, about, settings = kept["result"], kept["provenance"], kept["settings"]
    lines = [markdown_table(table(result), "dictionary"), "", "RV by setup:", ""]
    lines += [markdown_table(setup_table(result), "setup"), ""]
    lines += [f"- {sentence}" for sentence in verdict(result)]
    lines += [
        "",
        f"Mean ± standard deviation: in the first table over {len(settings['setups'])} correlated setups and "
        f"{settings['seeds']} seeds, in the second over seeds. Measured in "
        f"{format_duration(kept['seconds'])} on {about['cores']} core(s) of {about['processor']}, commit "
        f"{about['commit']} ([all figures](../results/toy.json)).",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the measurement, then write the result file and the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=ToyConfig.seeds)
    parser.add_argument("--table-only", action="store_true", help="only write the tables from the result file")
    arguments = parser.parse_args()
    if not arguments.table_only:
        config = ToyConfig(seeds=arguments.seeds)
        about, started = provenance(), perf_counter()
        with progress_bar("training") as progress:
            result = measure(config, progress=progress)
        seconds = perf_counter() - started
        write_json(RESULT, {"provenance": about, "settings": to_dict(config), "seconds": seconds, "result": result})
    kept = json.loads(RESULT.read_text(encoding="utf-8"))
    write_marked(PAGE, START, END, markdown(kept))


if __name__ == "__main__":
    main()
