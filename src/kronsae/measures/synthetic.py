"""``kronsae eval synthetic``: how many known features are recovered by SAEs with the architectures of a run's SAEs.

The features of a language model are unknown, so the run's own SAEs cannot be compared with them. Instead, new SAEs with
the same architectures (encoder, head shape, gate, sparsifier, loss) are trained on synthetic activations with known
features. They have as many latents as there are true features, or a multiple of it, k equal to the true l0, and the
same training.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Annotated, Any, Literal

import typer

from kronsae.core.checks import check_count, check_positive, check_seed
from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoderConfig
from kronsae.core.losses import LossConfig, MatryoshkaConfig
from kronsae.core.objective import AuxKConfig
from kronsae.core.sae import SAE
from kronsae.core.trunk import TrunkEncoderConfig
from kronsae.data.synthetic import ACTIVATIONS, KnownFeatures, SyntheticActivations, SyntheticConfig, mean_l0
from kronsae.eval.known_features import KnownFeaturesMeter, absolute_cosines, mean_correlation_coefficient
from kronsae.eval.reconstruction import ReconstructionMeter, encode_decode
from kronsae.interop.sae_lens_synthetic import SaeLensConfig
from kronsae.measures.training import train_on
from kronsae.report.measurements import keep_result, known_result
from kronsae.report.sections.synthetic import table, verdict
from kronsae.report.tables import rich_table
from kronsae.runs.run import open_run
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError
from kronsae.support.progress import Progress, progress_of_part
from kronsae.support.terminal import Json, Quiet, RunArgument, Seed, print_json, print_table, say, what_now
from kronsae.training.config import MemberConfig, OptimizerConfig

NAME = "synthetic"
HELD_OUT_BATCH = 2048
INIT_NORM = 0.5  # norm of the initial encoder rows, as in the other short trainings of the library


@dataclass(frozen=True, kw_only=True)
class SyntheticStudyConfig:
    """Settings of the synthetic features and of the training on them.

    Args:
        source: ``own`` (`kronsae.data.synthetic`) or ``sae_lens`` (its SynthSAEBench, small; needs sae-lens).
        own: features of the source ``own``; their seed is replaced.
        sae_lens: features of the source ``sae_lens``; their seed is replaced.
        seeds: number of repetitions, with seeds from ``seed`` on; each has its own features and weights.
        seed: seed of the first repetition.
        steps: optimiser steps.
        batch: tokens per step.
        lr: peak learning rate.
        held_out_tokens: tokens to measure on, rounded up to whole batches.
        latents_per_feature: latents of each SAE, as a multiple of the number of true features.
    """

    source: Literal["own", "sae_lens"] = "own"
    own: SyntheticConfig = field(default_factory=SyntheticConfig)
    sae_lens: SaeLensConfig = field(default_factory=SaeLensConfig)
    seeds: int = 3
    seed: int = 0
    steps: int = 1500
    batch: int = 512
    lr: float = 4e-3
    held_out_tokens: int = 16_384
    latents_per_feature: int = 1

    def __post_init__(self) -> None:
        if self.source not in ("own", "sae_lens"):
            raise UserError(f"source must be 'own' or 'sae_lens'; got {self.source!r}.")
        for name in ("seeds", "steps", "batch", "held_out_tokens", "latents_per_feature"):
            check_count(name, getattr(self, name))
        check_positive("lr", self.lr)
        check_seed(self.seed)

    def features(self, seed: int) -> KnownFeatures:
        """Return the known features of one repetition."""
        config = self.own if self.source == "own" else self.sae_lens
        return replace(config, seed=seed).build()


def measure(
    members: Sequence[MemberConfig], config: SyntheticStudyConfig, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Train SAEs with the members' architectures on known features; return ``{"about", "rows"}``.

    There is one row per SAE and seed: its `kronsae.eval.known_features.Found`, its reconstruction of held-out tokens,
    and the MCC of the same SAE before training, which is the chance level for directions in superposition.
    """
    rows: list[dict[str, Any]] = []
    truth = []
    for number, seed in enumerate(range(config.seed, config.seed + config.seeds)):
        features = config.features(seed)
        l0 = mean_l0(features)
        d_sae = config.latents_per_feature * len(features.directions_GD)
        fitted = [fit_to(member, d_sae=d_sae, k=max(1, round(l0)), seed=seed, config=config) for member in members]
        d_in = features.directions_GD.shape[1]
        truth.append({"seed": seed, "features": len(features.directions_GD), "d_in": d_in, "l0": l0})
        saes = train_on(
            fitted,
            SyntheticActivations(features, batch=config.batch),
            hook=ACTIVATIONS,
            d_in=d_in,
            steps=config.steps,
            batch_tokens=config.batch,
            progress=progress_of_part(progress, number, config.seeds),
        )
        for member in fitted:
            start = absolute_cosines(member.shape(d_in).build(member.seed).W_dec, features.directions_GD)
            about = {
                "seed": seed,
                "sae": member.name,
                "family": family(member),
                "encoder": encoder_kind(member.encoder),
            }
            about["mcc_untrained"] = mean_correlation_coefficient(start)
            rows.append(about | _measure_sae(saes[member.name], features, config.held_out_tokens))
    return {"about": truth, "rows": rows}


def _measure_sae(sae: SAE, features: KnownFeatures, tokens: int) -> dict[str, Any]:
    """Return all metrics of one SAE on the held-out tokens."""
    meter = KnownFeaturesMeter(sae.W_dec, features.directions_GD, features.kinds, features.edges)
    reconstruction = ReconstructionMeter(sae.d_sae)
    for number in range(-(-tokens // HELD_OUT_BATCH)):
        x_BD, activations_BG = features.sample(HELD_OUT_BATCH, held_out=True, number=number)
        x_hat_BD, codes = encode_decode(sae, x_BD)
        reconstruction.update(x_BD, x_hat_BD, codes)
        meter.update(codes, activations_BG)
    of_all = reconstruction.value()
    figures = {"d_sae": sae.d_sae, "explained_variance": of_all.explained_variance, "l0": of_all.l0}
    return figures | {"dead_share": of_all.dead_share, "tokens": of_all.tokens} | asdict(meter.value())


def fit_to(member: MemberConfig, *, d_sae: int, k: int, seed: int, config: SyntheticStudyConfig) -> MemberConfig:
    """Return the member's config at another size.

    Encoder kind, head shape, gate, sparsifier, loss and experts stay the same. The measurement sets size, k, seed and
    training, equal for all members. A Kronecker encoder gets as many complete heads as fit into ``d_sae``. Matryoshka's
    groups keep their shares, rounded to the nearest head. Hooks are removed.

    Raises:
        UserError: not even one head (of each expert) fits, or the member is a transcoder or crosscoder.
    """
    if role := member.shape(1).role:
        raise UserError(
            f"every SAE must reconstruct the single hook it reads, because synthetic activations have one hook; "
            f"'{member.name}' is a {role}. Measure a run without it."
        )
    encoder = resized(member.encoder, d_sae)
    return replace(
        member,
        read=None,
        write=None,
        encoder=encoder,
        sparsifier=replace(member.sparsifier, k=k),
        loss=_regrouped(member.loss, encoder),
        optimizer=OptimizerConfig(lr=config.lr),
        aux_k=AuxKConfig(weight=member.aux_k.weight, dead_after_tokens=max(1, config.steps * config.batch // 10)),
        seed=seed,
    )


def resized(encoder: AnyEncoderConfig, d_sae: int) -> AnyEncoderConfig:
    """Return the encoder config resized to the largest number of latents that is at most ``d_sae``."""
    if isinstance(encoder, SwitchEncoderConfig):
        expert = resized(encoder.expert, d_sae // encoder.num_experts)
        assert isinstance(expert, DenseEncoderConfig | KroneckerEncoderConfig)
        return replace(encoder, expert=expert)
    units = d_sae // encoder.block
    if units < (2 if isinstance(encoder, TrunkEncoderConfig) else 1):
        raise UserError(
            f"the synthetic data must have at least as many features (in each expert) as one head has latents, "
            f"{encoder.block}; got {d_sae}. Measure SAEs with smaller heads."
        )
    if isinstance(encoder, DenseEncoderConfig):
        return replace(encoder, d_sae=units, init_norm=INIT_NORM)
    if isinstance(encoder, KroneckerEncoderConfig):
        return replace(encoder, num_heads=units, init_norm=INIT_NORM)
    if isinstance(encoder, TrunkEncoderConfig):  # the trunk keeps its share, in units of a head
        own = min(units - 1, max(1, round(units * encoder.trunk.d_sae / encoder.d_sae)))
        trunk = replace(encoder.trunk, d_sae=own * encoder.block, init_norm=INIT_NORM)
        return replace(encoder, trunk=trunk, heads=replace(encoder.heads, num_heads=units - own, init_norm=INIT_NORM))
    raise UserError(
        f"SAEs must have an encoder that can be resized to the synthetic data: dense, kronecker, trunk or switch; got "
        f"'{encoder.kind}'. Measure the other SAEs of the run."
    )


def _regrouped(loss: LossConfig, encoder: AnyEncoderConfig) -> LossConfig:
    if not isinstance(loss, MatryoshkaConfig):
        return loss
    units, total = encoder.d_sae // encoder.block, sum(loss.groups)
    ends = [round(end / total * units) for end in accumulate(loss.groups)]
    sizes = (encoder.block * (end - start) for start, end in pairwise([0, *ends]))
    return MatryoshkaConfig(groups=tuple(size for size in sizes if size))


def family(member: MemberConfig) -> str:
    """Return sparsifier, loss and experts as a name, which a dense SAE and its Kronecker counterpart share."""
    parts = [member.sparsifier.kind]
    if isinstance(member.loss, MatryoshkaConfig):
        parts.append(member.loss.kind)
    if isinstance(member.encoder, SwitchEncoderConfig):
        parts.append(member.encoder.kind)
    return "-".join(parts)


def encoder_kind(encoder: AnyEncoderConfig) -> str:
    """Return the kind, such as ``dense``; for a switch encoder, that of its experts."""
    inner = encoder.expert if isinstance(encoder, SwitchEncoderConfig) else encoder
    return inner.kind


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def command(
    run_folder: RunArgument,
    source: Annotated[str, typer.Option(help="Known features: 'own', or 'sae_lens' for its SynthSAEBench.")] = "own",
    seeds: Annotated[int, typer.Option(help="Repetitions.")] = SyntheticStudyConfig.seeds,
    steps: Annotated[int, typer.Option(help="Training steps of each SAE.")] = SyntheticStudyConfig.steps,
    latents_per_feature: Annotated[
        int, typer.Option(help="Latents of each SAE, as a multiple of the number of true features.")
    ] = SyntheticStudyConfig.latents_per_feature,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train SAEs with the run's architectures on known features and measure recovery, detection and absorption.

    The run's own weights are not used. Each architecture is resized to the synthetic data.
    """
    from kronsae.support.progress import progress_bar

    config = SyntheticStudyConfig(
        source=_source(source), seeds=seeds, steps=steps, seed=seed, latents_per_feature=latents_per_feature
    )
    run = open_run(run_folder)
    settings = to_dict(config)
    result = known_result(run.folder, NAME, settings)
    if result is None:
        members = run.config.saes
        say(f"Training {seeds} x {len(members)} SAEs on {steps * config.batch:,} synthetic tokens each.")
        with progress_bar("training", quiet=quiet) as progress:
            result = measure(members, config, progress=progress)
        say(f"Result: {keep_result(run.folder, NAME, settings, result)}")
    else:
        say("Already measured with these settings.")
    if as_json:
        print_json(result | {"verdict": list(verdict(result))})
    else:
        print_table(rich_table(table(result), "SAE"))
        for sentence in verdict(result):
            say(sentence)
    what_now(f"kronsae report {shlex.quote(str(run.folder))}")


def _source(name: str) -> Literal["own", "sae_lens"]:
    if name == "own":
        return "own"
    if name == "sae_lens":
        return "sae_lens"
    raise UserError(f"--source must be 'own' or 'sae_lens'; got '{name}'.")
