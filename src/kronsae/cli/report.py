"""``kronsae report``."""

from __future__ import annotations

from kronsae.cli.options import OptionalOut, RunFolder, evaluate_and_report, one_folder
from kronsae.support.terminal import Json, Quiet, what_now


def report(run_folder: RunFolder = None, out: OptionalOut = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Write one HTML page: the comparison, the curves, the latents and their contexts."""
    from kronsae.runs.run import open_run

    run = open_run(one_folder(run_folder, out))
    evaluate_and_report(run, as_json, quiet)
    what_now(f"open {run.folder / 'report.html'} in a browser")
