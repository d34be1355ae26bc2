"""``kronsae eval interaction``: relations between the latents of a head, and how closely the gate implements an AND."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from kronsae.core.checks import check_count, check_seed
from kronsae.core.encoders import KroneckerEncoder, KroneckerEncoderConfig
from kronsae.core.heads import head_grid
from kronsae.core.normalization import Normalization
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.core.trunk import TrunkEncoderConfig
from kronsae.eval.hooked import Windows, vocabulary_size
from kronsae.eval.interaction import (
    ByKind,
    CorrelationMeter,
    Fidelity,
    FidelityMeter,
    HeadSample,
    Inheritance,
    LivingCells,
    Meanings,
    ParentScale,
    ShownGrid,
    activation_mass,
    cosines,
    inheritance,
    living_cells,
    meanings,
    sample_heads,
    shown_grids,
)
from kronsae.eval.interaction.sample import TOKENS
from kronsae.eval.latents import LatentMeter
from kronsae.eval.profiles import PreLatentMeter, ProfileMeter
from kronsae.report.measurements import keep_result, known_result, result_path
from kronsae.report.sections.interaction import summary_table
from kronsae.report.tables import rich_table
from kronsae.runs.loaded import LoadedRun, describe_tokens
from kronsae.runs.run import Run, open_run
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError
from kronsae.support.progress import progress_bar
from kronsae.support.terminal import Json, Quiet, RunArgument, Seed, print_json, print_table, say, what_now
from kronsae.training.config import MemberConfig

NAME = "interaction"


@dataclass(frozen=True, kw_only=True)
class InteractionConfig:
    """Settings of the interaction measurement.

    Args:
        tokens: held-out tokens; None: the run's ``eval_tokens``.
        max_cells: maximum number of latents in the sample, which consists of complete heads; at least one head.
        least_active: latents active on fewer tokens are excluded from inheritance, because their statistics are noise.
        shown_heads: number of sampled heads whose cells are listed.
        seed: seed of the sample, and of the weights of the untrained twins.
    """

    tokens: int | None = None
    max_cells: int = 512
    least_active: int = 10
    shown_heads: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens is not None:
            check_count("tokens", self.tokens)
        for name in ("max_cells", "least_active"):
            check_count(name, getattr(self, name))
        check_seed(self.seed)
        if self.shown_heads < 0:
            raise UserError(f"shown_heads must be at least 0; got {self.shown_heads!r}.")


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Similarity of pairs of sampled latents of one SAE.

    Args:
        kept: Pearson's r over tokens, of activations after the sparsifier.
        composed: Pearson's r over tokens, of activations after the gate and before the sparsifier.
        directions: cosine of the rows of ``W_dec``, for latents whose kept activations vary, which excludes dead ones.
    """

    kept: ByKind
    composed: ByKind
    directions: ByKind


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """Result of one SAE.

    Args:
        gate: name of the gate.
        heads: number of heads H.
        sampled_heads: the heads on which correlations, inheritance and fidelity are measured.
        trained: pairs of latents of the SAE.
        twin: pairs of latents of an untrained SAE with the same config, weights of seed ``twin_seed``, activations
            normalised as in training, and TopK with the k of the trained SAE.
        inheritance: statistics of latents compared with those of their parents.
        fidelity: the gate compared with a binary AND.
        living: living cells, over all heads.
        bases, extensions: number of meanings of each base and extension, over all heads.
        grids: the cells of some of the sampled heads.
    """

    gate: str
    heads: int
    sampled_heads: tuple[int, ...]
    trained: Pairs
    twin: Pairs
    twin_seed: int
    inheritance: Inheritance
    fidelity: Fidelity
    living: LivingCells
    bases: Meanings
    extensions: Meanings
    grids: tuple[ShownGrid, ...]


@dataclass(frozen=True, kw_only=True)
class InteractionResult:
    """Results by SAE; ``not_applicable`` gives the reason for each SAE that has none."""

    tokens: int
    saes: dict[str, Interaction]
    not_applicable: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return to_dict(self)


def measure(
    run: Run,
    config: InteractionConfig | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a run's Kronecker SAEs on held-out text and store the result in the run folder.

    Returns:
        An `InteractionResult` as JSON values.

    Raises:
        UserError: no SAE of the run has a Kronecker encoder.
    """
    run.require_finished()
    config = config or InteractionConfig()
    config = replace(config, tokens=run.config.eval_tokens if config.tokens is None else config.tokens)
    settings = to_dict(config)
    reasons = {member.name: why for member in run.config.saes if (why := not_applicable(member))}
    if len(reasons) == len(run.config.saes):
        raise UserError(
            "interaction must be measured on an SAE with a Kronecker encoder without null symbols; the run in "
            f"{run.folder} has none ({', '.join(reasons)}). Train one: kronsae train --sae 'kron ...'."
        )
    known = known_result(run.folder, NAME, settings)
    if known is not None:
        say(f"Already measured with these settings: {result_path(run.folder, NAME)}.")
        return known
    result = measure_saes(LoadedRun(run), config, reasons, say, progress).to_dict()
    keep_result(run.folder, NAME, settings, result)
    return result


def not_applicable(member: MemberConfig) -> str:
    """Return the reason why interaction does not apply to an SAE; ``""`` if it applies."""
    if isinstance(member.encoder, KroneckerEncoderConfig):
        if member.encoder.null_symbols:
            return "It does not apply to heads with null symbols: some of their latents have only one parent."
        return ""
    if isinstance(member.encoder, TrunkEncoderConfig):
        return "It does not apply to an encoder with a dense trunk: some of its latents have no parents."
    if head_grid(member.encoder) is not None:
        return "It does not apply to a switch encoder: each expert's heads see only the tokens routed to it."
    return "It does not apply to a dense encoder: its latents have no heads and no parents."


@torch.no_grad()
def measure_saes(
    loaded: LoadedRun,
    config: InteractionConfig,
    reasons: dict[str, str],
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> InteractionResult:
    """Measure the SAEs in two passes; the second measures fidelity with each parent's scale from the first."""
    assert config.tokens is not None
    windows = loaded.windows(config.tokens)
    tokens = sum(one.num_kept for one in windows)
    say(
        f"Two passes over {describe_tokens(tokens, config.tokens)} for {len(loaded.run.config.saes) - len(reasons)} "
        "SAE(s), each with an untrained twin."
    )
    members = [member for member in loaded.run.config.saes if member.name not in reasons]
    vocabulary = vocabulary_size(loaded.language_model)
    first: dict[str, _FirstPass] = {}
    done = 0
    for part, x_ND in loaded.activations(windows):
        if not first:
            first = {
                member.name: _FirstPass(member, loaded.saes[member.name], x_ND, tokens, vocabulary, config)
                for member in members
            }
        for meters in first.values():
            meters.update(part, x_ND)
        done += len(x_ND)
        if progress is not None:
            progress(done, 2 * tokens)
    second = {name: FidelityMeter(meters.sample, meters.scale) for name, meters in first.items()}
    for _, x_ND in loaded.activations(windows):
        for name, meter in second.items():
            for part_ND in x_ND.split(TOKENS):
                codes = first[name].sae.encode(part_ND.to(first[name].sae.W_dec))
                meter.update(first[name].sample.of(part_ND, codes))
        done += len(x_ND)
        if progress is not None:
            progress(done, 2 * tokens)
    saes = {name: meters.value(second[name].value()) for name, meters in first.items()}
    return InteractionResult(tokens=tokens, saes=saes, not_applicable=reasons)


def random_twin(member: MemberConfig, d_in: int, seed: int, x_ND: Tensor) -> SAE:
    """Return an untrained SAE of the member's config and another seed, which takes raw activations like ``x_ND``.

    It uses TopK with the member's k for every sparsifier, because a threshold is not defined before training.
    """
    shape = SAEConfig(d_in=d_in, encoder=member.encoder, sparsifier=TopKConfig(k=member.sparsifier.k))
    twin = shape.build(seed).to(x_ND.device).eval()
    if member.normalize_activations != "none":
        Normalization.of(x_ND).fold(twin)
    return twin


class _PairMeter:
    """Measures the pairs of latents in one SAE's sampled heads."""

    def __init__(self, sae: SAE, sample: HeadSample) -> None:
        self._sae, self._sample = sae, sample
        self._kept, self._composed = CorrelationMeter(sample.grid), CorrelationMeter(sample.grid)

    def update(self, x_BD: Tensor) -> Any:
        codes = self._sae.encode(x_BD.to(self._sae.W_dec))
        values = self._sample.of(x_BD, codes)
        self._kept.update(values.kept_BC)
        self._composed.update(values.composed_BC)
        return codes, values

    def value(self) -> Pairs:
        rows_CD = self._sae.W_dec[self._sample.latents_C.to(self._sae.W_dec.device)].cpu()
        dead_CC = self._kept.matrix().isnan()
        return Pairs(
            kept=self._kept.value(),
            composed=self._composed.value(),
            directions=ByKind.of(cosines(rows_CD).masked_fill(dead_CC, torch.nan), self._sample.grid),
        )


class _FirstPass:
    """Measures everything about one SAE except fidelity."""

    def __init__(
        self, member: MemberConfig, sae: SAE, x_ND: Tensor, tokens: int, vocabulary: int, config: InteractionConfig
    ) -> None:
        encoder = sae.encoder
        assert isinstance(encoder, KroneckerEncoder)
        self.sae, self._encoder, self._config = sae, encoder, config
        cells = encoder.d_base * encoder.d_extension
        self._heads = sample_heads(encoder.num_heads, cells, config.max_cells, config.seed)
        self.sample = HeadSample(encoder, self._heads)
        self.scale = ParentScale(self.sample, tokens)
        self._twin_seed = (member.seed + 1 + config.seed) % 2**63
        twin = random_twin(member, sae.d_in, self._twin_seed, x_ND)
        assert isinstance(twin.encoder, KroneckerEncoder)
        self._trained = _PairMeter(sae, self.sample)
        self._twin = _PairMeter(twin, HeadSample(twin.encoder, self._heads))
        self._all = LatentMeter(sae.d_sae)
        self._profile = ProfileMeter(len(self.sample.latents_C), vocabulary)
        rows = (self.sample.base_rows, self.sample.extension_rows)
        self._parents = [PreLatentMeter(encoder, each, vocabulary, seed=config.seed) for each in rows]

    def update(self, windows: Windows, x_ND: Tensor) -> None:
        """Add some windows."""
        codes = self.sae.encode(x_ND.to(self.sae.W_dec))
        self._all.update(codes)
        self._profile.update(windows, self.sample.narrow(codes))
        for meter in self._parents:
            meter.update(windows, x_ND)
        for part_ND in x_ND.split(TOKENS):
            _, values = self._trained.update(part_ND)
            self.scale.update(values)
            self._twin.update(part_ND)

    def value(self, fidelity: Fidelity) -> Interaction:
        """Return the result."""
        statistics, grid = self._all.value(), head_grid(self._encoder.config)
        assert grid is not None
        mass_HMN = activation_mass(statistics, grid)
        bases, extensions = (meter.value() for meter in self._parents)
        profile = self._profile.value()
        return Interaction(
            gate=self._encoder.config.gate,
            heads=grid.num_heads,
            sampled_heads=tuple(self._heads),
            trained=self._trained.value(),
            twin=self._twin.value(),
            twin_seed=self._twin_seed,
            inheritance=inheritance(profile, bases, extensions, self.sample.grid, self._config.least_active),
            fidelity=fidelity,
            living=living_cells(statistics, grid),
            bases=meanings(mass_HMN.flatten(0, 1)),
            extensions=meanings(mass_HMN.transpose(1, 2).flatten(0, 1)),
            grids=shown_grids(statistics, grid, self._heads[: self._config.shown_heads]),
        )


app = typer.Typer(add_completion=False)


@app.command(
    help="Measure how the latents of a head are related, compared with an untrained SAE, and how closely the gate "
    "implements an AND.\n\n"
    "Correlations within and between heads, inheritance from bases and extensions, false positives relative to a "
    "binary AND, living cells, meanings per base. For Kronecker encoders."
)
def interaction(
    run_folder: RunArgument,
    tokens: Annotated[int | None, typer.Option(help="Held-out tokens. Default: the run's eval_tokens.")] = None,
    max_cells: Annotated[
        int, typer.Option(help="Maximum number of latents, in complete heads sampled at random.")
    ] = 512,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure interaction and print it."""
    run = open_run(run_folder)
    config = InteractionConfig(tokens=tokens, max_cells=max_cells, seed=seed)
    with progress_bar("interaction", quiet=quiet) as progress:
        result = measure(run, config, say=say, progress=progress)
    if as_json:
        print_json(result)
    else:
        print_table(rich_table(summary_table(result), "figure"))
        for name, reason in result["not_applicable"].items():
            say(f"{name}: {reason}")
        say(f"All results: {result_path(run.folder, NAME)}")
    what_now(f"kronsae report {shlex.quote(str(run_folder))}")
