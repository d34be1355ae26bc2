"""Write the table of docs/interop.md from docs/results/interop.json, which `make test-interop` writes.

python scripts/interop_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kronsae.support.files import write_marked

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "results" / "interop.json"
PAGE = ROOT / "docs" / "interop.md"
START, END = "<!-- results:interop -->", "<!-- /results -->"
DIRECTIONS = ("read", "write", "train")


def rows(kept: dict[str, Any]) -> list[list[str]]:
    """Return a row per format: format, package, read, write, train, measured difference, other checks."""
    formats: dict[str, list[dict[str, Any]]] = {}
    for group in kept.values():
        for check in group["checks"]:
            formats.setdefault(check["format"], []).append(check)
    found = []
    for name, checks in formats.items():
        versions = sorted({f"{check['package']} {check['version']}" for check in checks})
        cells = ["yes" if any(check["direction"] == one for check in checks) else "–" for one in DIRECTIONS]
        measured = [check["difference"] for check in checks if check["difference"] is not None]
        used = sorted({check["check"] for check in checks if check["direction"] == "use"})
        difference = f"{max(measured):.1e}" if measured else "–"
        found.append([name, ", ".join(versions), *cells, difference, ", ".join(used) or "–"])
    return found


def markdown(kept: dict[str, Any]) -> str:
    """Return the table, and where and when it was measured."""
    headings = ["format", "package", *DIRECTIONS, "largest difference", "also checked"]
    lines = [headings, ["---"] * len(headings), *rows(kept)]
    table = [f"| {' | '.join(cells)} |" for cells in lines]
    made = []
    for name, group in kept.items():
        about = group["provenance"]
        checks = len(group["checks"])
        made.append(
            f"{name}: {checks} checks on {about['date']}, {about['cores']} core(s) of {about['processor']}, torch "
            f"{about['versions']['torch']}, commit {about['commit']}."
        )
    return "\n".join([*table, "", *made, "([All checks](results/interop.json); again by `make test-interop`.)"])


def main() -> None:
    """Write the table."""
    write_marked(PAGE, START, END, markdown(json.loads(RESULT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
