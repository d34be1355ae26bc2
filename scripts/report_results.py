"""Write the table of verdicts and the answers' figures of docs/report.md from docs/reproductions.

.venv/bin/python scripts/report_results.py

The results come from `kronsae reproduce NAME --scale SCALE --results docs/reproductions/SCALE`.
"""

from __future__ import annotations

from pathlib import Path

from kronsae.reproduce.runner import Result, known_results
from kronsae.reproduce.scales import SCALES
from kronsae.reproduce.tables import markdown_rows
from kronsae.support.files import write_marked

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "report.md"
REPRODUCTIONS = ROOT / "docs" / "reproductions"
END = "<!-- /results -->"
ANSWERS = (
    "gates",
    "fidelity",
    "toy",
    "correlation",
    "inheritance",
    "absorption",
    "word-classes",
    "probing",
    "budgets",
    "shapes",
    "occupancy",
    "pursuit",
    "meaning",
    "known-features",
)
"""Studies whose verdicts the report quotes, each between marks of its own."""


def results() -> dict[str, list[Result]]:
    """Return the committed results by scale."""
    return {scale: known_results(REPRODUCTIONS / scale) for scale in SCALES if (REPRODUCTIONS / scale).is_dir()}


def verdict_table(found: dict[str, list[Result]]) -> str:
    """Return a table with one line per study and a column per scale."""
    studies = {one.study.name: one.study for of_scale in found.values() for one in of_scale}
    rows = []
    for name, study in studies.items():
        cells = []
        for scale, of_scale in found.items():
            own = next((one for one in of_scale if one.study.name == name), None)
            verdict = (
                "–" if own is None else f"[{own.study.judge(own.kept['rows']).holds}](reproductions/{scale}/{name}.md)"
            )
            cells.append(verdict)
        rows.append([study.of, study.claim, *cells])
    return "\n".join(markdown_rows(["of the paper", "claim", *found], rows))


def quoted(found: dict[str, list[Result]], name: str) -> str:
    """Return the verdict of a study at each scale, as sentences."""
    lines = []
    for scale, of_scale in found.items():
        for one in of_scale:
            if one.study.name == name:
                verdict = one.study.judge(one.kept["rows"])
                lines.append(f"- [{scale}](reproductions/{scale}/{name}.md): **{verdict.holds}**. {verdict.why}")
    return "\n".join(lines) or "Not measured yet."


def blocks() -> dict[str, str]:
    """Return the generated parts of the page by mark."""
    found = results()
    return {"verdicts": verdict_table(found)} | {name: quoted(found, name) for name in ANSWERS}


def main() -> None:
    """Write all generated parts."""
    for mark, text in blocks().items():
        write_marked(PAGE, f"<!-- results:{mark} -->", END, text)


if __name__ == "__main__":
    main()
