"""``kronsae eval toy``: whether an SAE's dictionary shows which features are correlated, on data with known covariance.

It trains its own SAEs on the toy model of `kronsae.data.toy`, with controls that separate what training learns from
what the shape of the SAE gives. No run is needed; if one is given, it stores the result and shows it on its page.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from jaxtyping import Float
from torch import Tensor

from kronsae.core.checks import check_count, check_positive, check_seed
from kronsae.core.metrics import explained_variance
from kronsae.data.random import generator_for
from kronsae.data.toy import HIDDEN, INDEPENDENT, SETUPS, BlockSetup, CorrelatedFeatures, HiddenStates, ToyAutoencoder
from kronsae.eval.known_covariance import effective_rank, recovery
from kronsae.eval.reconstruction import reconstruction
from kronsae.measures.training import train_on
from kronsae.report.measurements import keep_result, known_result
from kronsae.report.sections.toy import AUTOENCODER, table, verdict
from kronsae.report.tables import rich_table
from kronsae.runs.recipes import kron, topk
from kronsae.runs.run import Run, open_run
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError
from kronsae.support.progress import Progress
from kronsae.support.terminal import Json, Quiet, Seed, print_json, print_table, say, what_now

if TYPE_CHECKING:
    from kronsae.training.config import MemberConfig

NAME = "toy"


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Settings of the toy model: data, training and comparison. The defaults are the paper's where it states them.

    Args:
        setups: correlated covariances, all with the same number of features.
        independent: control without correlation, with the same number of features.
        shapes: ``(num_heads, d_base, d_extension)`` of each KronSAE; their product is the number of features.
        hidden: width of the autoencoder's hidden state.
        active: number of active features of a token before L mixes them.
        k: active latents per token.
        seeds: number of repetitions, with seeds from ``seed`` on.
        seed: seed of the first repetition.
        tokens: training tokens, generated once per setup and seed.
        held_out_tokens: tokens for the explained variance.
        autoencoder_steps, autoencoder_lr: steps and learning rate of the autoencoder's training.
        steps, lr: steps and peak learning rate of the SAEs' training.
        batch: tokens per step of both trainings.
    """

    setups: tuple[BlockSetup, ...] = SETUPS
    independent: BlockSetup = INDEPENDENT
    shapes: tuple[tuple[int, int, int], ...] = ((2, 4, 32), (4, 2, 32), (4, 8, 8), (8, 2, 16))
    hidden: int = 64
    active: int = 8
    k: int = 8
    seeds: int = 3
    seed: int = 0
    tokens: int = 65_536
    held_out_tokens: int = 8192
    autoencoder_steps: int = 1500
    autoencoder_lr: float = 1e-3
    steps: int = 600
    lr: float = 3e-3
    batch: int = 256

    def __post_init__(self) -> None:
        for name in ("hidden", "active", "k", "seeds", "tokens", "held_out_tokens", "autoencoder_steps", "steps"):
            check_count(name, getattr(self, name))
        check_count("batch", self.batch)
        check_positive("autoencoder_lr", self.autoencoder_lr)
        check_positive("lr", self.lr)
        check_seed(self.seed)
        if len(self.setups) < 2:
            raise UserError(f"setups must hold at least two, to compare each with another; got {len(self.setups)}.")
        sizes = {setup.features for setup in (*self.setups, self.independent)}
        sizes |= {heads * bases * extensions for heads, bases, extensions in self.shapes}
        if len(sizes) > 1:
            raise UserError(
                "all setups and shapes must have the same number of features; got "
                f"{', '.join(map(str, sorted(sizes)))}. Change blocks or shapes."
            )

    @property
    def features(self) -> int:
        """Return G, the number of true features, which is also the number of latents."""
        return self.independent.features

    def members(self, seed: int) -> tuple[MemberConfig, ...]:
        """Return the configs of the SAEs: TopK and a KronSAE of each shape, all with the same training."""
        shared: dict[str, Any] = {"k": self.k, "lr": self.lr, "seed": seed, "init_norm": 0.5}
        shared["dead_after_tokens"] = max(1, self.steps * self.batch // 10)
        heads = (
            kron(num_heads=h, d_base=m, d_extension=n, name=f"kron-h{h}-m{m}-n{n}", **shared) for h, m, n in self.shapes
        )
        return (topk(d_sae=self.features, **shared), *heads)


@dataclass(frozen=True, eq=False)
class _Cell:
    """Dictionaries of one setup and seed, before and after training."""

    setup: BlockSetup
    truth_GG: Float[Tensor, "G G"]
    reference_GD: Float[Tensor, "G D"]
    trained: Mapping[str, Float[Tensor, "G D"]]
    untrained: Mapping[str, Float[Tensor, "G D"]]
    explained_variance: Mapping[str, float | None]


def measure(config: ToyConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Train and compare all dictionaries; return ``{"setups": [...], "rows": [...]}`` as JSON values.

    Each row is one dictionary, setup and seed, with three `Recovery` values: ``trained``; ``untrained``, the same SAE
    at initialisation; and ``mismatched``, matched to the autoencoder of the next setup and compared with that setup's
    covariance, which the SAE was not trained on (None for the independent features).
    """
    setups = (*config.setups, config.independent)
    steps = len(setups) * config.seeds * 2
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    rows: list[dict[str, Any]] = []
    for seed in range(config.seed, config.seed + config.seeds):
        cells = []
        for setup in setups:
            cells.append(train_cell(config, setup, seed))
            advance()
        correlated = cells[: len(config.setups)]
        for number, cell in enumerate(cells):
            other = correlated[(number + 1) % len(correlated)] if cell in correlated else None
            rows += _compare(cell, other, seed)
            advance()
    return {"setups": [_about(setup) for setup in setups], "rows": rows}


def train_cell(config: ToyConfig, setup: BlockSetup, seed: int) -> _Cell:
    """Generate the features, and train the autoencoder and the SAEs, of one setup and seed."""
    truth_GG = setup.covariance()
    features = CorrelatedFeatures(truth_GG, config.active)
    s_NG = features.sample(config.tokens, generator_for(seed, f"features of {setup.name}"))
    autoencoder = ToyAutoencoder(config.features, config.hidden, generator_for(seed, "autoencoder"))
    trained, untrained = {}, {AUTOENCODER: autoencoder.rows}
    autoencoder.fit(s_NG, steps=config.autoencoder_steps, batch=config.batch, lr=config.autoencoder_lr, seed=seed)
    trained[AUTOENCODER] = autoencoder.rows
    held_out_NG = features.sample(config.held_out_tokens, generator_for(seed, f"held-out features of {setup.name}"))
    explained: dict[str, float | None] = {AUTOENCODER: explained_variance(held_out_NG, autoencoder(held_out_NG))}
    members = config.members(seed)
    saes = train_on(
        members,
        HiddenStates(autoencoder.hidden(s_NG), batch=config.batch, seed=seed),
        hook=HIDDEN,
        d_in=config.hidden,
        steps=config.steps,
        batch_tokens=config.batch,
    )
    for member in members:
        trained[member.name] = saes[member.name].W_dec
        untrained[member.name] = member.shape(config.hidden).build(member.seed).W_dec.detach()
        found = reconstruction(saes[member.name], [autoencoder.hidden(held_out_NG)])
        explained[member.name] = found.explained_variance
    return _Cell(setup, truth_GG, autoencoder.rows, trained, untrained, explained)


def _compare(cell: _Cell, other: _Cell | None, seed: int) -> list[dict[str, Any]]:
    rows = []
    for name, trained_GD in cell.trained.items():
        in_order = name == AUTOENCODER
        kinds = {
            "trained": recovery(trained_GD, cell.reference_GD, cell.truth_GG, in_order=in_order),
            "untrained": recovery(cell.untrained[name], cell.reference_GD, cell.truth_GG, in_order=in_order),
            "mismatched": None if other is None else recovery(trained_GD, other.reference_GD, other.truth_GG),
        }
        about = {"setup": cell.setup.name, "seed": seed, "dictionary": name}
        figures = {kind: None if found is None else asdict(found) for kind, found in kinds.items()}
        rows.append(about | {"explained_variance": cell.explained_variance[name]} | figures)
    return rows


def _about(setup: BlockSetup) -> dict[str, Any]:
    return to_dict(setup) | {"effective_rank": effective_rank(setup.covariance())}


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def command(
    run_folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run folder to store the result in; optional.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Repetitions.")] = ToyConfig.seeds,
    steps: Annotated[int, typer.Option(help="Training steps of each SAE.")] = ToyConfig.steps,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Test on a toy model whether an SAE's dictionary shows which features are correlated, with controls.

    Trains its own small SAEs on synthetic features; no run is needed. Takes tens of minutes.
    """
    config = ToyConfig(seeds=seeds, steps=steps, seed=seed)
    run = None if run_folder is None else open_run(run_folder)
    result = _measure_or_read(run, config, quiet, say)
    if as_json:
        print_json(result | {"verdict": list(verdict(result))})
    else:
        print_table(rich_table(table(result), "dictionary"))
        for sentence in verdict(result):
            say(sentence)
    if run is not None:
        what_now(f"kronsae report {shlex.quote(str(run.folder))}")
    else:
        what_now("docs/measurements/toy.md explains the metrics", "kronsae eval toy RUN stores the result in a run")


def _measure_or_read(run: Run | None, config: ToyConfig, quiet: bool, say: Callable[[str], None]) -> dict[str, Any]:
    from kronsae.support.progress import progress_bar

    settings = to_dict(config)
    known = None if run is None else known_result(run.folder, NAME, settings)
    if known is not None:
        say("Already measured with these settings.")
        return known
    cells = (len(config.setups) + 1) * config.seeds
    say(f"Training {cells} autoencoders and {cells * (1 + len(config.shapes))} SAEs of {config.features} latents.")
    with progress_bar("training", quiet=quiet) as progress:
        result = measure(config, progress=progress)
    if run is not None:
        say(f"Result: {keep_result(run.folder, NAME, settings, result)}")
    return result
