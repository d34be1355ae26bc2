"""Write the tables of docs/crash.md from docs/results/crash.json, which `kronsae doctor crash --results` writes.

kronsae doctor crash --kills 90 --damages 210 --results docs/results/crash.json
python scripts/crash_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kronsae.support.files import write_marked

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "results" / "crash.json"
PAGE = ROOT / "docs" / "crash.md"
START, END = "<!-- results:crash -->", "<!-- /results -->"
SUMMED = ("kills", "after_a_checkpoint", "while_writing", "runs", "identical")


def kills(kept: dict[str, Any]) -> list[list[str]]:
    """Return a row per kind of work that was killed, and one of their sums."""
    found = kept["kills"]
    rows = [
        [
            one["about"],
            *(f"{one[key]}" for key in SUMMED),
            f"{one['largest_difference']:.1e}" if one["largest_difference"] else "0",
            f"{one['tolerance']:.0e}" if one["tolerance"] else "0",
        ]
        for one in found
    ]
    sums = [f"{sum(one[key] for one in found)}" for key in SUMMED]
    return [*rows, ["all", *sums, "", ""]]


def damages(kept: dict[str, Any]) -> list[list[str]]:
    """Return a row per kind of files that were damaged, and one of their sums."""
    files: dict[str, dict[str, dict[str, Any]]] = {}
    for one in kept["damages"]:
        files.setdefault(one["about"], {})[one["how"]] = one
    rows = [
        [about, *(f"{of[how]['detected']} of {of[how]['damages']}" for how in ("flipped", "truncated"))]
        for about, of in files.items()
    ]
    sums = []
    for how in ("flipped", "truncated"):
        of_how = [one for one in kept["damages"] if one["how"] == how]
        sums.append(f"{sum(one['detected'] for one in of_how)} of {sum(one['damages'] for one in of_how)}")
    return [*rows, ["all", *sums]]


def markdown(kept: dict[str, Any]) -> str:
    """Return both tables, and where and when they were measured."""
    headings = [
        "killed",
        "kills",
        "with a checkpoint or shard to resume from",
        "that left an unfinished file",
        "runs",
        "of these the same bits",
        "largest difference",
        "allowed",
    ]
    about = kept["provenance"]
    failures = "\n".join(f"- {failure}" for failure in kept["failures"]) or "No failures."
    return "\n".join(
        [
            *_table([headings, *kills(kept)]),
            "",
            *_table([["damaged", "bit flips detected", "truncations detected"], *damages(kept)]),
            "",
            failures,
            "",
            f"On {about['cores']} core(s) of {about['processor']}, {about['system']}, Python {about['python']}, torch "
            f"{about['versions']['torch']}, commit {about['commit']}, seed {kept['seed']}, {about['date']} "
            "([all figures](results/crash.json)).",
        ]
    )


def _table(rows: list[list[str]]) -> list[str]:
    first, *others = rows
    return [f"| {' | '.join(cells)} |" for cells in (first, ["---"] * len(first), *others)]


def main() -> None:
    """Write the tables."""
    write_marked(PAGE, START, END, markdown(json.loads(RESULT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
