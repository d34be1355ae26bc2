"""``kronsae eval token-rule``: how well nearby tokens alone predict a latent's activity, without a language model."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from kronsae.eval.display import visible
from kronsae.eval.token_rule import TokenRuleConfig, TokenRules, summarise_rules, token_rule
from kronsae.measures.latent_sample import check_chosen, count_activations, draw_latents, find_firings, pick_saes
from kronsae.report.measurements import keep_result, known_result
from kronsae.runs.loaded import LoadedRun, describe_tokens
from kronsae.runs.run import Run, open_run
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError
from kronsae.support.progress import progress_after, progress_bar
from kronsae.support.terminal import Json, Quiet, RunArgument, Seed, print_json, print_table, say, what_now

if TYPE_CHECKING:
    from rich.table import Table

NAME = "token-rule"


@dataclass(frozen=True, kw_only=True)
class TokenRuleResult:
    """Results of all SAEs, in the run's order."""

    saes: tuple[TokenRules, ...]


def measure(
    run: Run,
    config: TokenRuleConfig,
    *,
    saes: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenRuleResult:
    """Fit a rule per latent on the run's training documents, test it on held-out ones, and store the result.

    Args:
        run: a finished run.
        config: selection of latents, and amount of text.
        saes: names of the SAEs; empty: all SAEs of the run.
        say: receives status messages.
        progress: called with (done, total), starting from 0 in each of two stages: tokens that the model reads, then
            latents.
    """
    loaded = LoadedRun(run)
    picked = pick_saes(loaded, saes)
    check_chosen(picked, config.chosen)
    settings = {"config": to_dict(config), "saes": list(picked)}
    if (known := known_result(run.folder, NAME, settings)) is not None:
        say("Already measured with these settings.")
        return from_dict(TokenRuleResult, known, NAME)
    texts = [loaded.windows(config.tokens, held_out=held_out) for held_out in (False, True)]
    sizes = [sum(one.num_kept for one in windows) for windows in texts]
    say(
        f"Training on {sizes[0]:,} tokens of training documents, testing on "
        f"{describe_tokens(sizes[1], config.tokens)}; the model reads both twice. Then one rule is fitted for each of "
        f"up to {len(config.chosen) or config.latents:,} latents of {len(picked)} SAE(s)."
    )
    work = 2 * sum(sizes)
    counts = [
        count_activations(loaded, picked, windows, progress_after(progress, before, work))
        for windows, before in zip(texts, (0, sizes[0]), strict=True)
    ]
    rarer = {name: torch.minimum(counts[0][name], counts[1][name]) for name in picked}
    chosen = {
        name: list(config.chosen)
        or draw_latents(rarer[name], config.latents, at_least=config.min_active_tokens, seed=config.seed)
        for name in picked
    }
    for name, latents in chosen.items():
        if not latents:
            raise UserError(
                f"at least one latent of '{name}' must be active on min_active_tokens={config.min_active_tokens} "
                "tokens of both texts; got none. Lower --min-active, or increase --tokens."
            )
    train_text, train = find_firings(loaded, picked, texts[0], chosen, progress_after(progress, sum(sizes), work))
    test_text, test = find_firings(loaded, picked, texts[1], chosen, progress_after(progress, work - sizes[1], work))
    total, done = sum(map(len, chosen.values())), 0
    found = []
    for name, latents in chosen.items():
        rules = []
        for latent in latents:
            rules.append(token_rule((train_text, train[name][latent]), (test_text, test[name][latent]), config))
            done += 1
            if progress is not None:
                progress(done, total)
        eligible, living = (int((rarer[name] >= least).sum()) for least in (config.min_active_tokens, 1))
        found.append(summarise_rules(name, rules, living=living, eligible=eligible))
    result = TokenRuleResult(saes=tuple(found))
    keep_result(run.folder, NAME, settings, to_dict(result))
    return result


app = typer.Typer(add_completion=False)


@app.command()
def token_rule_verb(
    run_folder: RunArgument,
    sae: Annotated[list[str] | None, typer.Option(help="Name of an SAE to measure; repeatable. Default: all.")] = None,
    latents: Annotated[
        int, typer.Option(help="Number of latents per SAE, sampled at random.")
    ] = TokenRuleConfig.latents,
    latent: Annotated[
        list[int] | None, typer.Option(help="Index of a latent to use instead of a random sample; repeatable.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens of training text, and of held-out text.")
    ] = TokenRuleConfig.tokens,
    examples: Annotated[
        int, typer.Option(help="Maximum number of places per text where the latent is active, and where it is not.")
    ] = TokenRuleConfig.examples,
    min_active: Annotated[
        int, typer.Option(help="Minimum number of tokens of each text on which a sampled latent is active.")
    ] = TokenRuleConfig.min_active_tokens,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict from nearby tokens where a latent is active, and test the prediction on held-out text."""
    config = TokenRuleConfig(
        latents=latents,
        chosen=tuple(latent or ()),
        tokens=tokens,
        examples=examples,
        min_active_tokens=min_active,
        seed=seed,
    )
    run = open_run(run_folder)
    with progress_bar("token-rule", quiet=quiet) as progress:
        found = measure(run, config, saes=tuple(sae or ()), say=say, progress=progress)
    if as_json:
        print_json(to_dict(found))
    else:
        print_table(as_table(found))
    what_now(f"kronsae report {shlex.quote(str(run.folder))}")


def as_table(result: TokenRuleResult) -> Table:
    """Return a table with one row per SAE."""
    from rich.table import Table
    from rich.text import Text

    table = Table("SAE", "balanced accuracy", "AUC", "latents", box=None)
    for one in result.saes:
        cells = [
            "-" if mean.mean is None else f"{mean.mean:.3f}" + ("" if mean.std is None else f" ± {mean.std:.3f}")
            for mean in (one.balanced_accuracy, one.auc)
        ]
        table.add_row(Text(visible(one.sae)), *cells, f"{one.auc.n:,} of {one.eligible:,} eligible")
    return table
