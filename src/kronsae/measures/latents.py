"""``kronsae eval latents``: statistics of every latent, base and extension, and example contexts of some of them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer

from kronsae.core.checks import check_count, check_seed
from kronsae.core.encoders import KroneckerEncoder
from kronsae.core.heads import DeadShares, dead_shares
from kronsae.core.sae import SAE
from kronsae.eval.contexts import Gallery, GalleryMeter
from kronsae.eval.display import TokenText
from kronsae.eval.hooked import Windows, vocabulary_size
from kronsae.eval.latents import GalleryConfig, LatentStatistics
from kronsae.eval.profiles import PreLatentMeter, Profile, ProfileMeter, ProfileSummary, pre_latent_rows
from kronsae.eval.token_entropy import MAX_PAIRS
from kronsae.report.measurements import keep_result, known_result, result_path
from kronsae.report.sections.latents import summary_table
from kronsae.report.tables import rich_table
from kronsae.runs.loaded import LoadedRun, describe_tokens
from kronsae.runs.run import Run, open_run
from kronsae.support.config import to_dict
from kronsae.support.progress import progress_bar
from kronsae.support.terminal import Json, Quiet, RunArgument, Seed, print_json, print_table, say, what_now

NAME = "latents"


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """Settings of the latent statistics.

    Args:
        tokens: held-out tokens for the statistics of the latents; None: the run's ``eval_tokens``.
        pre_latent_tokens: number of the first of these tokens used for bases and extensions, whose activations are
            dense.
        example_tokens: number of the first of these tokens searched for examples.
        max_pairs: maximum number of (latent, token) pairs stored for the token entropy, 16 bytes each. When it is
            exceeded, the token entropy covers only the tokens before.
        latents: indices of latents to show in any case.
        num_latents: number of further latents to show, spread over the frequencies.
        num_heads: number of complete heads to show, with examples of their bases and extensions.
        top, quantiles, quantile_contexts, negatives: examples per latent, see `kronsae.eval.latents.GalleryConfig`.
        seed: seed of all sampling.
    """

    tokens: int | None = None
    pre_latent_tokens: int = 32_768
    example_tokens: int = 131_072
    max_pairs: int = MAX_PAIRS
    latents: tuple[int, ...] = ()
    num_latents: int = 16
    num_heads: int = 1
    top: int = 5
    quantiles: int = 4
    quantile_contexts: int = 2
    negatives: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens is not None:
            check_count("tokens", self.tokens)
        for name in ("pre_latent_tokens", "example_tokens", "max_pairs"):
            check_count(name, getattr(self, name))
        check_seed(self.seed)
        self.gallery  # noqa: B018  runs the checks of GalleryConfig

    @property
    def gallery(self) -> GalleryConfig:
        """Return the settings of the examples."""
        return GalleryConfig(
            num_latents=self.num_latents,
            num_heads=self.num_heads,
            top=self.top,
            sampled=0,
            quantiles=self.quantiles,
            quantile_contexts=self.quantile_contexts,
            negatives=self.negatives,
            latents=self.latents,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class SAELatents:
    """Result of one SAE.

    Args:
        dead: shares of latents, bases, extensions and heads that were active on none of the tokens.
        summary: summaries of the profiles: ``latents`` and, for a Kronecker encoder, ``bases`` and ``extensions``.
        latents: profile of every latent.
        bases, extensions: profile of every base ``relu(u)`` and extension ``relu(v)``, in the order of the heads; None
            without a Kronecker encoder.
        gallery: latents and heads with the text on which they are active.
    """

    dead: DeadShares
    summary: dict[str, ProfileSummary]
    latents: Profile
    bases: Profile | None
    extensions: Profile | None
    gallery: Gallery


@dataclass(frozen=True, kw_only=True)
class LatentsResult:
    """Results by SAE, and the number of tokens used for each part."""

    tokens: int
    pre_latent_tokens: int
    example_tokens: int
    saes: dict[str, SAELatents]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return to_dict(self)


def measure(
    run: Run,
    config: LatentsConfig | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure all latents of a run's SAEs on held-out text, and store and return a `LatentsResult` as JSON values.

    The language model runs up to the hook twice: on all tokens for the statistics, and on the first ones for examples.
    """
    run.require_finished()
    config = config or LatentsConfig()
    config = replace(config, tokens=run.config.eval_tokens if config.tokens is None else config.tokens)
    settings = to_dict(config)
    known = known_result(run.folder, NAME, settings)
    if known is not None:
        say(f"Already measured with these settings: {result_path(run.folder, NAME)}.")
        return known
    loaded = LoadedRun(run)
    assert config.tokens is not None
    result = measure_saes(loaded, config, say, progress).to_dict()
    keep_result(run.folder, NAME, settings, result)
    return result


@torch.no_grad()
def measure_saes(
    loaded: LoadedRun,
    config: LatentsConfig,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> LatentsResult:
    """Measure the latents of all SAEs of a loaded run."""
    assert config.tokens is not None
    windows = loaded.windows(config.tokens)
    again = list(first_windows(windows, config.example_tokens))
    tokens = sum(one.num_kept for one in windows)
    total = tokens + sum(one.num_kept for one in again)
    say(
        f"Statistics of the latents of {len(loaded.saes)} SAE(s) on {describe_tokens(tokens, config.tokens)}; "
        f"examples from the first {total - tokens:,}."
    )
    meters = {name: _Meters(sae, loaded, config) for name, sae in loaded.saes.items()}
    done = 0
    for part, x_ND in loaded.activations(windows):
        for meter in meters.values():
            meter.update(part, x_ND, done)
        done += len(x_ND)
        if progress is not None:
            progress(done, total)
    for meter in meters.values():
        meter.finish_statistics()
    for part, x_ND in loaded.activations(again):
        for meter in meters.values():
            meter.update_examples(part, x_ND)
        done += len(x_ND)
        if progress is not None:
            progress(done, total)
    token_text = TokenText(loaded.language_model.tokenizer)
    return LatentsResult(
        tokens=tokens,
        pre_latent_tokens=max((meter.pre_latent_tokens for meter in meters.values()), default=0),
        example_tokens=total - tokens,
        saes={name: meter.value(token_text) for name, meter in meters.items()},
    )


def first_windows(windows: Iterable[Windows], tokens: int) -> Iterable[Windows]:
    """Yield the first rows of the windows until they contain ``tokens`` counted tokens."""
    for one in windows:
        if tokens <= 0:
            return
        part = one.rows(0, one.reaching(tokens))
        yield part
        tokens -= part.num_kept


class _Meters:
    """Meters of one SAE."""

    def __init__(self, sae: SAE, loaded: LoadedRun, config: LatentsConfig) -> None:
        self._sae, self._config = sae, config
        vocabulary = vocabulary_size(loaded.language_model)
        self._latents = ProfileMeter(sae.d_sae, vocabulary, config.max_pairs)
        self._pre: list[PreLatentMeter] = []
        self.pre_latent_tokens = 0
        if isinstance(sae.encoder, KroneckerEncoder):
            rows = pre_latent_rows(sae.encoder)
            self._pre = [PreLatentMeter(sae.encoder, each, vocabulary, seed=config.seed) for each in rows]
        self._statistics: LatentStatistics | None = None
        self._profiles: dict[str, Profile] = {}

    def update(self, windows: Windows, x_ND: torch.Tensor, done: int) -> None:
        self._latents.update(windows, self._sae.encode(x_ND.to(self._sae.W_dec)))
        if self._pre and done < self._config.pre_latent_tokens:
            stop = windows.reaching(self._config.pre_latent_tokens - done)
            part = windows.rows(0, stop)
            for meter in self._pre:
                meter.update(part, x_ND[: part.num_kept])
            self.pre_latent_tokens += part.num_kept

    def finish_statistics(self) -> None:
        self._profiles = {"latents": self._latents.value()}
        self._profiles |= {name: meter.value() for name, meter in zip(("bases", "extensions"), self._pre, strict=False)}
        del self._latents, self._pre
        statistics = self._profiles["latents"].activity
        self._gallery = GalleryMeter(self._sae, statistics, self._config.gallery)

    def update_examples(self, windows: Windows, x_ND: torch.Tensor) -> None:
        self._gallery.update(windows, x_ND, self._sae.encode(x_ND.to(self._sae.W_dec)))

    def value(self, token_text: TokenText) -> SAELatents:
        latents = self._profiles["latents"]
        alive_F = torch.tensor(latents.activity.active_tokens) > 0
        return SAELatents(
            dead=dead_shares(alive_F, self._sae.config.encoder),
            summary={name: profile.summary() for name, profile in self._profiles.items()},
            latents=latents,
            bases=self._profiles.get("bases"),
            extensions=self._profiles.get("extensions"),
            gallery=self._gallery.value(token_text),
        )


app = typer.Typer(add_completion=False)


@app.command()
def latents(
    run_folder: RunArgument,
    tokens: Annotated[int | None, typer.Option(help="Held-out tokens. Default: the run's eval_tokens.")] = None,
    latent: Annotated[list[int] | None, typer.Option(help="Index of a latent to show examples of; repeatable.")] = None,
    num_latents: Annotated[
        int, typer.Option(help="Number of further latents to show examples of, spread over the frequencies.")
    ] = 16,
    num_heads: Annotated[int, typer.Option(help="Number of complete heads to show (Kronecker encoders).")] = 1,
    pre_latent_tokens: Annotated[
        int, typer.Option(help="Maximum number of held-out tokens for the statistics of bases and extensions.")
    ] = 32_768,
    example_tokens: Annotated[
        int, typer.Option(help="Maximum number of held-out tokens to search for examples.")
    ] = 131_072,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure statistics of every latent, base and extension, dead shares, and examples of some latents.

    Frequency, activation, token entropy, multitoken ratio; examples with the largest activations, by quantile, and
    inactive ones.
    """
    run = open_run(run_folder)
    config = LatentsConfig(
        tokens=tokens,
        latents=tuple(latent or ()),
        num_latents=num_latents,
        num_heads=num_heads,
        pre_latent_tokens=pre_latent_tokens,
        example_tokens=example_tokens,
        seed=seed,
    )
    with progress_bar("latents", quiet=quiet) as progress:
        result = measure(run, config, say=say, progress=progress)
    if as_json:
        print_json(result)
    else:
        print_table(rich_table(summary_table(result), "SAE"))
        say(f"All latents and examples: {result_path(run.folder, NAME)}")
    what_now(f"kronsae report {shlex.quote(str(run_folder))}")
