"""``kronsae eval ladder``: whether values, ranking, recall or the dictionary limits what an SAE reconstructs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer

from kronsae.core.checks import check_count
from kronsae.core.pursuit import Pursuit
from kronsae.eval.ladder import Ladder, ladder
from kronsae.measures.latent_sample import pick_saes
from kronsae.report.measurements import keep_result, known_result
from kronsae.report.sections.ladder import section
from kronsae.report.tables import rich_table
from kronsae.runs.loaded import LoadedRun, describe_tokens
from kronsae.runs.run import Run, open_run
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError
from kronsae.support.progress import progress_bar
from kronsae.support.terminal import Json, Quiet, RunArgument, print_json, print_table, say, what_now

NAME = "ladder"


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """What is measured.

    Args:
        tokens: held-out tokens; matching pursuit over all latents takes k products with the whole dictionary for each.
    """

    tokens: int = 1024

    def __post_init__(self) -> None:
        check_count("tokens", self.tokens)


def measure(
    run: Run,
    config: LadderConfig,
    *,
    saes: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Climb the ladder with each SAE on the same held-out tokens; ``{"saes": [{"sae", "ladder", "lost_by"}]}``.

    Args:
        run: a finished run whose SAEs all reconstruct one hook.
        config: how many tokens.
        saes: of these names; all of the run if none is given.
        say: told what is about to happen.
        progress: called with (SAEs done, SAEs to do).

    Raises:
        UserError: an SAE has no fixed k, or a pursuit is not defined for it.
    """
    _check_fixed_k(run, saes)
    loaded = LoadedRun(run)
    picked = pick_saes(loaded, saes)
    settings = {"config": to_dict(config), "saes": list(picked)}
    if (known := known_result(run.folder, NAME, settings)) is not None:
        say("Already measured with these settings.")
        return known
    for sae in picked.values():
        sae.config.check_pursuit(Pursuit(rounds=1))
    windows = loaded.windows(config.tokens)
    counted = sum(one.num_kept for one in windows)
    say(f"Climbing the ladder with {len(picked)} SAE(s) on {describe_tokens(counted, config.tokens)}.")
    x_ND = torch.cat([x_ND for _, x_ND in loaded.activations(windows)])
    found = []
    for number, (name, sae) in enumerate(picked.items(), start=1):
        climbed: Ladder = ladder(sae, [x_ND])
        found.append({"sae": name, "ladder": to_dict(climbed), "lost_by": climbed.lost_by})
        if progress is not None:
            progress(number, len(picked))
    result = {"saes": found}
    keep_result(run.folder, NAME, settings, result)
    return result


def _check_fixed_k(run: Run, names: Sequence[str]) -> None:
    """Refuse SAEs with thresholds before anything is loaded."""
    for member in run.config.saes:
        if (not names or member.name in names) and member.sparsifier.kind != "topk":
            raise UserError(
                f"the ladder needs SAEs with sparsifier 'topk', as it compares codes of equal k; '{member.name}' has "
                f"'{member.sparsifier.kind}', with thresholds. Choose an SAE with TopK by --sae."
            )


app = typer.Typer(add_completion=False)


@app.command()
def ladder_verb(
    run_folder: RunArgument,
    sae: Annotated[list[str] | None, typer.Option(help="Only this SAE; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = LadderConfig.tokens,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure at equal k what the encoder's values, ranking and recall cost, and what its dictionary could explain."""
    run = open_run(run_folder)
    with progress_bar("ladder", quiet=quiet) as progress:
        result = measure(run, LadderConfig(tokens=tokens), saes=tuple(sae or ()), say=say, progress=progress)
    if as_json:
        print_json(result)
    else:
        for first, table in section({"result": result}, ()).tables:
            print_table(rich_table(table, first))
    what_now(f"kronsae report {shlex.quote(str(run.folder))}")
