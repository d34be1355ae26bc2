"""``kronsae report``: write the HTML report of a run."""

from __future__ import annotations

from kronsae.cli.options import OptionalOut, RunFolder, evaluate_and_report, one_folder
from kronsae.cli.sae_argument import SaeHook, SaeModel, SaeText, SaeWrite, run_of
from kronsae.support.terminal import Json, Quiet, what_now


def report(
    run_folder: RunFolder = None,
    out: OptionalOut = None,
    model: SaeModel = None,
    text: SaeText = None,
    hook: SaeHook = None,
    write: SaeWrite = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the report of a run, one HTML page: comparison, training curves, latents with contexts, measurements.

    In place of RUN, the folder of a single SAE, also of another library, or user/repo on the Hub is taken.
    """
    from kronsae.runs.run import open_run

    run = open_run(one_folder(run_of(run_folder, model, text, hook, write), out))
    evaluate_and_report(run, as_json, quiet)
    what_now(f"open {run.folder / 'report.html'} in a browser")
