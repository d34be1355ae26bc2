"""Measure SAEs on synthetic features; write docs/results/synthetic.json and docs/measurements/synthetic.md's table.

.venv/bin/python scripts/synthetic_results.py [--seeds 3] [--table-only]

The SAEs are those of `kronsae architectures` and a KronSAE with larger heads.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from kronsae.measures.synthetic import SyntheticStudyConfig, measure
from kronsae.report.sections.synthetic import table, verdict
from kronsae.report.tables import markdown_table
from kronsae.runs.architectures import ARCHITECTURES
from kronsae.runs.parsing import parse_sae
from kronsae.runs.planning import format_duration
from kronsae.support.config import to_dict
from kronsae.support.files import write_json, write_marked
from kronsae.support.progress import progress_bar
from kronsae.support.provenance import provenance
from kronsae.training.config import MemberConfig

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "results" / "synthetic.json"
PAGE = ROOT / "docs" / "measurements" / "synthetic.md"
START, END = "<!-- results:synthetic -->", "<!-- /results -->"
TEN = {name: words for name, words in ARCHITECTURES.items() if "coder" not in name}  # SAEs, not transcoders
FORMS = TEN | {"topk-kron-m4-n4": "kron num_heads=64 d_base=4 d_extension=4 k=16"}


def members() -> tuple[MemberConfig, ...]:
    """Return one SAE of each form; the measurement sets their sizes."""
    return tuple(replace(parse_sae(words), name=name) for name, words in FORMS.items())


def markdown(kept: dict[str, Any]) -> str:
    """Return the generated part of the page: the table, the verdict, and their provenance."""
    result, about, settings = kept["result"], kept["provenance"], kept["settings"]
    truth = result["about"]
    l0 = sum(one["l0"] for one in truth) / len(truth)
    lines = [markdown_table(table(result), "SAE"), ""]
    lines += [f"- {sentence}" for sentence in verdict(result)]
    lines += [
        "",
        f"Mean ± standard deviation over {len(truth)} seeds; {truth[0]['features']} features in width "
        f"{truth[0]['d_in']}, {l0:.1f} of them active per token; {settings['steps'] * settings['batch']:,} training "
        f"tokens for every SAE. Measured in {format_duration(kept['seconds'])} on {about['cores']} core(s) of "
        f"{about['processor']}, "
        f"commit {about['commit']} "
        "([all figures](../results/synthetic.json)).",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the measurement, then write the result file and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SyntheticStudyConfig.seeds)
    parser.add_argument("--table-only", action="store_true", help="only write the table from the result file")
    arguments = parser.parse_args()
    if not arguments.table_only:
        config = SyntheticStudyConfig(seeds=arguments.seeds)
        about, started = provenance(), perf_counter()
        with progress_bar("training") as progress:
            result = measure(members(), config, progress=progress)
        seconds = perf_counter() - started
        write_json(RESULT, {"provenance": about, "settings": to_dict(config), "seconds": seconds, "result": result})
    kept = json.loads(RESULT.read_text(encoding="utf-8"))
    write_marked(PAGE, START, END, markdown(kept))


if __name__ == "__main__":
    main()
