"""Evaluation of a run's SAEs on held-out text: stored in the run folder, shown as a table and in the report."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kronsae.core.flops import training_flops
from kronsae.core.pursuit import Pursuit
from kronsae.core.sae import SAE, count_parameters
from kronsae.eval.evaluation import Evaluation, evaluate
from kronsae.report import report_data, write
from kronsae.report.comparison import architecture, beside, differ_in_hooks, hooks, with_pursuit
from kronsae.report.measurements import kept_results
from kronsae.runs.folder import RunFolder
from kronsae.runs.loaded import LoadedRun, describe_tokens
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError
from kronsae.support.files import read_json, write_json

if TYPE_CHECKING:
    from rich.table import Table

REVISION = 3
"""Revision of ``evaluation.json`` and ``latents.json``; increased when their structure or a metric changes."""

PURSUED = "evaluation-pursuit.json"

SUMMARY_KEYS = (
    "name",
    "architecture",
    "parameters",
    "encoder_parameters",
    "training_flops",
    "tokens",
    "explained_variance",
    "l0",
    "dead_share",
    "ce_recovered",
    "seconds",
)


def evaluate_run(
    run: RunFolder,
    *,
    tokens: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate all SAEs of a run on the same held-out tokens and write the results into the run folder.

    Args:
        run: a finished run.
        tokens: number of held-out tokens; None: that of the last evaluation, or the run's ``eval_tokens`` if there is
            none. A stored evaluation on this number of tokens is returned without computing it again.
        say: receives status messages.
        progress: called with (tokens done, all tokens); there are two passes.

    Returns:
        One row per SAE: size, cost, and all metrics of `kronsae.eval.Evaluation`.
    """
    run.require_finished()
    config = run.config
    path = run.folder / "evaluation.json"
    known = known_evaluation(path)
    if known is not None and tokens in (None, known["requested_tokens"]):
        counted = known["saes"][0]["evaluation_tokens"]
        say(f"Already evaluated on {describe_tokens(counted, known['requested_tokens'])}: {path}.")
        return list(known["saes"])
    wanted = config.eval_tokens if tokens is None else tokens
    found, rows = _measure(run, wanted, None, say, progress)
    path.unlink(missing_ok=True)  # written last: if it exists, all three files belong together
    write_json(run.folder / "latents.json", {name: one.latents() for name, one in found.items()})
    write_json(run.folder / "summary.json", {"saes": [{key: row[key] for key in SUMMARY_KEYS} for row in rows]})
    write_json(path, {"revision": REVISION, "requested_tokens": wanted, "saes": rows})
    return rows


def evaluate_pursuit(
    run: RunFolder,
    pursuit: Pursuit,
    *,
    saes: Sequence[str] = (),
    tokens: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate a run as it is and with a pursuit, on the same tokens; the latter is kept in a file of its own.

    ``evaluation-pursuit.json`` holds the pursuit asked for last. SAEs for which the pursuit is not defined, such as
    those with thresholds, are named and have no second row.

    Args:
        run, tokens, say, progress: as for `evaluate_run`.
        pursuit: how codes are pursued.
        saes: names of the SAEs to encode with it; empty: all.

    Returns:
        The rows of `evaluate_run`, each followed by that of the same SAE with the pursuit, ``<name> + pursuit``.

    Raises:
        UserError: a name is unknown, or the pursuit is defined for none of the SAEs.
    """
    if unknown := [name for name in saes if name not in run.names]:
        raise UserError(f"saes must be among {', '.join(run.names)}; got '{unknown[0]}'.")
    plain = evaluate_run(run, tokens=tokens, say=say, progress=progress)
    wanted = known_evaluation(run.folder / "evaluation.json")
    assert wanted is not None  # just written
    about = {"revision": REVISION, "requested_tokens": wanted["requested_tokens"], "pursuit": to_dict(pursuit)}
    about["saes_asked"] = list(saes or run.names)
    path = run.folder / PURSUED
    known = known_evaluation(path)
    if known is None or any(known.get(key) != value for key, value in about.items()):
        _, rows = _measure(run, wanted["requested_tokens"], pursuit, say, progress, about["saes_asked"])
        known = about | {"saes": [row | {"name": with_pursuit(row["name"])} for row in rows]}
        write_json(path, known)
    else:
        say(f"Already evaluated with this pursuit: {path}.")
    return beside(plain, known["saes"])


def pursued_rows(run: RunFolder) -> list[dict[str, Any]]:
    """Return the stored rows with a pursuit, if they are of the same tokens as the stored evaluation."""
    plain, known = (known_evaluation(run.folder / name) for name in ("evaluation.json", PURSUED))
    if plain is None or known is None or known["requested_tokens"] != plain["requested_tokens"]:
        return []
    return list(known["saes"])


def _measure(
    run: RunFolder,
    wanted: int,
    pursuit: Pursuit | None,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None,
    names: Sequence[str] = (),
) -> tuple[dict[str, Evaluation], list[dict[str, Any]]]:
    """Measure all SAEs with their own codes, or those with these names with a pursuit; their rows too."""
    loaded = LoadedRun(run)
    saes = loaded.saes if pursuit is None else _pursuing({name: loaded.saes[name] for name in names}, pursuit, say)
    say(f"Evaluating on whole windows of held-out text with at least {wanted:,} tokens in total.")
    found = evaluate(
        saes,
        loaded.language_model,
        loaded.places,
        loaded.make_tokens(),
        tokens=wanted,
        language_model_tokens=run.config.eval_ce_tokens,
        progress=progress,
    )
    rows = [_row(run, name, sae, found[name], run.training) for name, sae in saes.items()]
    say(f"Evaluated on {describe_tokens(rows[0]['evaluation_tokens'], wanted)}.")
    return found, rows


def _pursuing(saes: Mapping[str, SAE], pursuit: Pursuit, say: Callable[[str], None]) -> dict[str, SAE]:
    """Set the pursuit of the SAEs for which it is defined, and return these."""
    found, reasons = {}, []
    for name, sae in saes.items():
        try:
            sae.config.check_pursuit(pursuit)
        except UserError as error:
            reasons.append(f"'{name}' has no pursuit: {error}")
            continue
        sae.pursuit = pursuit
        found[name] = sae
    if not found:
        raise UserError(" ".join(reasons))
    for reason in reasons:
        say(reason)
    return found


def known_evaluation(path: Path) -> dict[str, Any] | None:
    """Return the stored evaluation; None if there is none of this `REVISION`."""
    if not path.exists():
        return None
    known = read_json(path, "the evaluation")
    return known if isinstance(known, dict) and known.get("revision") == REVISION else None


def write_report(run: RunFolder, *, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write ``report.html`` from the stored results and return its path; evaluate the run first if it was not."""
    measures, outdated = kept_results(run.folder)
    for name in outdated:
        say(
            f"The report leaves out {name}, because another version measured it. Measure it again: kronsae eval {name} "
            f"{shlex.quote(str(run.folder))}"
        )
    data = report_data(
        run=run.about,
        rows=evaluate_run(run, say=say),
        pursued=pursued_rows(run),
        metrics=run.metrics(),
        latents=read_json(run.folder / "latents.json", "the evaluation's latents"),
        measures=measures,
    )
    return write(data, run.folder / "report.html")


def _row(run: RunFolder, name: str, sae: SAE, evaluation: Evaluation, training: Mapping[str, Any]) -> dict[str, Any]:
    config = run.config
    member = next(member for member in config.saes if member.name == name)
    figures = evaluation.figures()
    reconstruction, spliced = figures["reconstruction"], figures["language_model"]
    tokens = run.sae_tokens(name)
    trained = replace(sae.config, pursuit=member.pursuit)
    return {
        "name": name,
        "architecture": member.shape(1, config.hook).architecture,
        "saved_as": None if (saved := sae.config.sparsifier.kind) == member.sparsifier.kind else saved,
        "hooks_read": list(member.reads(config.hook)),
        "hooks_written": list(member.writes(config.hook)),
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "d_sae": sae.d_sae,
        "parameters": sae.num_parameters(),
        "encoder_parameters": count_parameters(sae.encoder),
        "training_flops": None if tokens is None else training_flops(trained, tokens),
        "tokens": tokens,
        "explained_variance": reconstruction["explained_variance"],
        "explained_variance_per_token": reconstruction["explained_variance_per_token"],
        "explained_variance_by_hook": reconstruction.get("explained_variance_by_hook", []),
        "mean_squared_error": reconstruction["mean_squared_error"],
        "cosine_similarity": reconstruction["cosine_similarity"],
        "l0": reconstruction["l0"],
        "dead_share": reconstruction["dead_share"],
        "ce_recovered": spliced.get("ce_recovered"),
        "kl_recovered": spliced.get("kl_recovered"),
        "language_model": spliced,
        "seconds": training["sae_seconds"][name],
        "evaluation_tokens": reconstruction["tokens"],
    }


_COLUMNS: dict[str, tuple[str, str]] = {
    "name": ("SAE", "{}"),
    "architecture": ("architecture", "{}"),
    "d_sae": ("latents", "{:,}"),
    "encoder_parameters": ("encoder params", "{:,}"),
    "parameters": ("all params", "{:,}"),
    "training_flops": ("FLOPs", "{:.2e}"),
    "tokens": ("tokens", "{:,}"),
    "explained_variance": ("EV", "{:.4f}"),
    "explained_variance_per_token": ("EV per token", "{:.4f}"),
    "l0": ("l0", "{:.1f}"),
    "dead_share": ("dead", "{:.1%}"),
    "ce_recovered": ("CE recovered", "{:.4f}"),
    "kl_recovered": ("KL recovered", "{:.4f}"),
    "seconds": ("seconds", "{:.0f}"),
}


@dataclass(frozen=True)
class Comparison:
    """The rows of `evaluate_run`, shown as a table by ``print``."""

    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=200, file=io.StringIO(), highlight=False)
        console.print(as_table(self.rows))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


def as_table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table for the terminal."""
    from rich.table import Table

    columns = _COLUMNS
    rows = [row | {"architecture": architecture(row), "hooks": hooks(row)} for row in rows]
    if differ_in_hooks(rows):
        columns = {"name": _COLUMNS["name"], "hooks": ("hooks", "{}")} | _COLUMNS
    table = Table(*(heading for heading, _ in columns.values()), box=None)
    for row in rows:
        cells = [("-" if row[key] is None else form.format(row[key])) for key, (_, form) in columns.items()]
        table.add_row(*cells)
    reasons = {row["language_model"].get("reason") for row in rows if row["ce_recovered"] is None}
    if reasons := {reason for reason in reasons if reason}:
        table.caption = f"CE and KL recovered were not measured: {'; '.join(sorted(reasons))}."
    return table
