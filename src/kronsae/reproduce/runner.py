"""Running a study: rows, CSV, result file with provenance, page with a verdict, and the index of all pages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from kronsae.reproduce import STUDIES, study
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import EXPLAINED, markdown_rows
from kronsae.runs.planning import format_duration
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError
from kronsae.support.files import read_json, sha256, write_json, write_text
from kronsae.support.provenance import provenance

INDEX = "README.md"
REVISION = 1
"""Revision of the result file; a result of another revision is not read."""


@dataclass(frozen=True)
class Result:
    """A study's result: rows and what they were measured with; ``print`` shows the page."""

    study: Study
    kept: Mapping[str, Any]

    @property
    def page(self) -> str:
        """Return the page as Markdown: claim, the paper's figures, ours, verdict, provenance."""
        study, kept = self.study, self.kept
        verdict, about = study.judge(kept["rows"]), kept["provenance"]
        paper = ["## The paper", "", study.paper, ""] if study.paper else []
        scale, seeds = kept["scale"], kept["seeds"]
        lines = [
            f"# {study.title}",
            "",
            f"<!-- results:{study.name} -->",
            "",
            f"*{study.of[0].upper()}{study.of[1:]}.* {study.claim}",
            "",
            f"**Verdict: {verdict.holds}.** {verdict.why}",
            "",
            *paper,
            "## Measured",
            "",
            *study.table(kept["rows"]),
            "",
            *([f"![{study.title}]({study.name}.png)", "", kept["picture"], ""] if kept.get("picture") else []),
            f"Mean over {len(seeds)} seed(s), range in brackets. {_chance(len(seeds))}{_explained(kept)}{study.limits}",
            "",
            "## How",
            "",
            f"`kronsae reproduce {study.name} --scale {scale['name']}`{_material(study, kept)}. "
            f"{format_duration(kept['seconds'])} on {about['cores']} core(s) of {about['processor']}, torch "
            f"{about['versions']['torch']}, commit {about['commit']}, {about['date']} ([result]({study.name}.json), "
            f"[rows]({study.name}.csv)).{_trained_at(kept)}",
            "",
            "<!-- /results -->",
            "",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.page


def run_study(name: str, context: Context, results: Path) -> Result:
    """Run a study, or read its result if it has one of these settings; write its files and the index.

    Args:
        name: name of the study.
        context: scale, seeds and the folder of the trained SAEs.
        results: folder for ``NAME.json``, ``NAME.csv``, ``NAME.md``, ``README.md``, and ``NAME.png`` of a study that
            draws.

    Raises:
        UserError: there is no such study, or it cannot be run with this text or model.
    """
    wanted = study(name)
    text = _digest(context.scale.text)
    scale = to_dict(context.scale) | ({} if text is None else {"text": Path(context.scale.text).name})
    settings = {"revision": REVISION, "scale": scale, "seeds": list(context.seeds), "text_sha256": text}
    path = results / f"{name}.json"
    if path.exists() and all((kept := read_json(path, "the result")).get(key) == settings[key] for key in settings):
        context.say(f"Already measured with these settings: {path}.")
    else:
        about, started = provenance(), perf_counter()
        rows = wanted.rows(context)
        if not rows:
            raise UserError(f"the study '{name}' must have results; every training diverged. Lower the learning rate.")
        kept = settings | {"study": name, "provenance": about, "seconds": perf_counter() - started}
        kept = json.loads(json.dumps(kept | {"rows": rows}))
        write_json(path, kept)
    if wanted.draw is not None and not kept.get("picture"):  # it may need a package that a first run lacked
        caption = wanted.draw(context, kept["rows"], results / f"{name}.png")
        if caption is not None:
            kept["picture"] = caption
            write_json(path, kept)
    found = Result(wanted, kept)
    write_files(found, results)
    return found


def write_files(found: Result, results: Path) -> None:
    """Write the page and CSV of a result, and the index of all results in the folder."""
    from kronsae.sweeps.results import as_csv

    name = found.study.name
    write_text(results / f"{name}.csv", as_csv(found.kept["rows"]))
    write_text(results / f"{name}.md", found.page)
    write_text(results / INDEX, index(known_results(results)))


def write_pages(results: Path) -> list[Result]:
    """Write all pages of a folder again from its result files, as after a change of their text.

    Raises:
        UserError: the folder has no results.
    """
    found = known_results(results)
    if not found:
        raise UserError(f"--results must be a folder with results of studies; {results} has none.")
    for one in found:
        write_files(one, results)
    return found


def known_results(results: Path) -> list[Result]:
    """Return the results in a folder, in the order of the studies."""
    found = []
    for module in STUDIES:
        path = results / f"{module.replace('_', '-')}.json"
        if path.exists() and (kept := read_json(path, "the result")).get("revision") == REVISION:
            found.append(Result(study(path.stem), kept))
    return found


def index(found: Sequence[Result]) -> str:
    """Return a page with the verdict on every claim."""
    rows = []
    for one in found:
        verdict = one.study.judge(one.kept["rows"])
        link = f"[{one.study.name}]({one.study.name}.md)"
        rows.append([link, one.study.of, one.study.claim, str(verdict.holds), str(len(one.kept["seeds"]))])
    scales = ", ".join(dict.fromkeys(one.kept["scale"]["name"] for one in found))
    return "\n".join(
        [
            "# Reproductions",
            "",
            f"`kronsae reproduce all`, scale: {scales}. A claim holds if every comparison agrees with it in every "
            "seed, and in part if some do. Each page has the figures and what the study leaves out.",
            "",
            *markdown_rows(["study", "of the paper", "claim", "verdict", "seeds"], rows),
            "",
        ]
    )


def _explained(kept: Mapping[str, Any]) -> str:
    if not any(EXPLAINED in row for row in kept["rows"]):
        return ""
    return (
        "EV is the mean over tokens of 1 - |x - x_hat|^2 / |x - mean|^2, as in the paper's listing. Of all tokens "
        "together, it is the ratio of the sums, which few tokens of very large norm decide. "
    )


def _material(study: Study, kept: Mapping[str, Any]) -> str:
    if study.synthetic:
        return ""
    scale = kept["scale"]
    return (
        f": {scale['model']}, {scale['layers'][1]}, {scale['tokens']:,} training tokens of {_source(kept)}, "
        f"{scale['eval_tokens']:,} held-out tokens"
    )


def _trained_at(kept: Mapping[str, Any]) -> str:
    """Name the commits of the rows, if the SAEs were trained at others than the study."""
    commits = {str(row["commit"]) for row in kept["rows"] if row.get("commit")} - {kept["provenance"]["commit"]}
    return f" SAEs were trained at {', '.join(sorted(commits))}." if commits else ""


def _chance(seeds: int) -> str:
    if seeds < 2:
        return "One seed decides nothing. "
    return f"Without a true difference, a comparison agrees in all {seeds} seeds with a probability of 1/{2**seeds}. "


def _digest(text: str) -> str | None:
    path = Path(text).expanduser()
    return sha256(path) if path.is_file() else None


def _source(kept: Mapping[str, Any]) -> str:
    digest = kept["text_sha256"]
    return kept["scale"]["text"] if digest is None else f"{Path(kept['scale']['text']).name} (SHA-256 {digest[:12]})"
