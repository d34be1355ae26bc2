"""Evaluation of several SAEs in two passes of the language model over the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronsae.core.checks import check_positive
from kronsae.core.sae import SAE
from kronsae.eval.contexts import Gallery, GalleryMeter
from kronsae.eval.display import TokenText
from kronsae.eval.hooked import (
    HookPoint,
    LanguageModel,
    MakeTokens,
    Windows,
    all_hidden_states,
    all_hidden_states_and_logits,
    kept,
    read_windows,
    windows_per_pass,
)
from kronsae.eval.language_model import Skipped, Spliced, SplicingMeter
from kronsae.eval.latents import GalleryConfig, LatentMeter, LatentStatistics
from kronsae.eval.reconstruction import Reconstruction, ReconstructionMeter, encode_decode
from kronsae.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results for one SAE; definitions and units are documented at each part."""

    reconstruction: Reconstruction
    language_model: Spliced
    statistics: LatentStatistics
    gallery: Gallery

    def figures(self) -> dict[str, Any]:
        """Return the scalar metrics as JSON values: ``reconstruction`` and ``language_model``."""
        return {"reconstruction": self.reconstruction.to_dict(), "language_model": self.language_model.to_dict()}

    def latents(self) -> dict[str, Any]:
        """Return the latents as JSON values: ``statistics`` of all latents, ``gallery`` of those shown."""
        return {"statistics": self.statistics.to_dict(), "gallery": self.gallery.to_dict()}

    def to_dict(self) -> dict[str, Any]:
        """Return `figures` and `latents` in one dictionary of JSON values."""
        return self.figures() | self.latents()


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """The hooks that one SAE reads and writes. They are the same except for transcoders."""

    read: tuple[HookPoint, ...]
    write: tuple[HookPoint, ...]

    @staticmethod
    def of(hook: HookPoint) -> Hooks:
        """Return `Hooks` of an SAE that reads and writes one hook."""
        return Hooks(read=(hook,), write=(hook,))


def evaluate(
    saes: Mapping[str, SAE],
    language_model: LanguageModel,
    hook: HookPoint | Mapping[str, Hooks],
    make_tokens: MakeTokens,
    *,
    tokens: int,
    language_model_tokens: int = 32_768,
    gallery: GalleryConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Evaluation]:
    """Evaluate several SAEs on the same tokens, each at its own hooks.

    The first pass runs the model up to the last hook. It measures reconstruction, latent statistics and the mean
    activation. The second pass uses these: it measures explained variance per token and collects the contexts of the
    shown latents. On the first ``language_model_tokens`` it also measures the losses of the spliced model. These need
    one clean forward pass for all SAEs, two ablated passes per set of written hooks, and one spliced pass per SAE.

    Args:
        saes: SAEs by name, each on the language model's device.
        language_model: the model, in evaluation mode.
        hook: the hook that all SAEs read and reconstruct; or, by SAE name, the hooks that each reads and writes.
        make_tokens: creates the stream of token windows from its start.
        tokens: number of kept tokens to evaluate on. The last window is used whole, so the actual number may be
            slightly larger.
        language_model_tokens: maximum number of these tokens used for the losses of the spliced model, which take most
            of the time. The losses are compared on the same text, so few tokens suffice.
        gallery: which latents to show.
        progress: called with (tokens done, total tokens), over both passes.

    Raises:
        UserError: an SAE does not match the width of its hooks, an activation is not finite, or the text has no
            usable token.
    """
    check_positive("tokens", tokens)
    check_positive("language_model_tokens", language_model_tokens)
    hooks = dict.fromkeys(saes, Hooks.of(hook)) if isinstance(hook, HookPoint) else {name: hook[name] for name in saes}
    points = {point.name: point for own in hooks.values() for point in (*own.read, *own.write)}.values()
    if not saes:
        return {}
    report = _Progress(progress, 2 * tokens)
    first = {name: _FirstPass(sae, hooks[name]) for name, sae in saes.items()}
    stream = read_windows(make_tokens, tokens)
    for windows in stream:
        rows = _Rows(all_hidden_states(language_model, points, windows), windows)
        _check_widths(saes, hooks, rows)
        for meters in first.values():
            meters.update(rows)
        report.add(windows.num_kept)
    second = {name: _SecondPass(meters, gallery or GalleryConfig()) for name, meters in first.items()}
    splicing = {} if language_model.no_lm_head_reason else _splicing_meters(language_model, first)
    for part, with_loss in _parts(language_model, stream, language_model_tokens):
        if splicing and with_loss:
            hidden, clean_STV = all_hidden_states_and_logits(language_model, points, part)
            rows = _Rows(hidden, part)
            x_hat = {name: later.update(rows) for name, later in second.items()}
            for meter in splicing.values():
                meter.update(part, hidden, clean_STV, x_hat)
        else:
            rows = _Rows(all_hidden_states(language_model, points, part), part)
            for later in second.values():
                later.update(rows)
        report.add(part.num_kept)
    spliced: dict[str, Spliced] = dict.fromkeys(saes, Skipped(language_model.no_lm_head_reason))
    for meter in splicing.values():
        spliced |= meter.values()
    token_text = TokenText(language_model.tokenizer)
    return {name: later.value(spliced[name], token_text) for name, later in second.items()}


def _splicing_meters(
    language_model: LanguageModel, first: Mapping[str, _FirstPass]
) -> dict[tuple[str, ...], SplicingMeter]:
    """Return one meter per set of written hooks; SAEs that write the same hooks share the ablated passes."""
    together: dict[tuple[str, ...], list[str]] = {}
    for name, meters in first.items():
        together.setdefault(tuple(point.name for point in meters.hooks.write), []).append(name)
    return {
        written: SplicingMeter(
            language_model,
            first[names[0]].hooks.write,
            tuple(names),
            first[names[0]].reconstruction.variance.mean_D,
        )
        for written, names in together.items()
    }


def _parts(language_model: LanguageModel, stream: Iterable[Windows], scored: int) -> Iterator[tuple[Windows, bool]]:
    """Yield batches of windows small enough for their logits, and whether each is in the first ``scored`` tokens."""
    for windows in stream:
        border = windows.reaching(scored)
        scored -= windows.num_kept
        size = windows_per_pass(language_model, windows.keep_ST.shape[1])
        for part in windows.rows(0, border).split(size):
            yield part, True
        for part in windows.rows(border, len(windows)).split(size):
            yield part, False


class _Progress:
    """Token counter for a progress display. Whole windows may exceed the requested number; the count is capped."""

    def __init__(self, show: Callable[[int, int], None] | None, total: int) -> None:
        self._show, self._total, self._done = show, total, 0

    def add(self, tokens: int) -> None:
        self._done += tokens
        if self._show is not None:
            self._show(min(self._done, self._total), self._total)


class _Rows:
    """Kept activations of some windows, by hook. Concatenations of several hooks are cached for all SAEs."""

    def __init__(self, hidden: Mapping[str, Tensor], windows: Windows) -> None:
        self.windows = windows
        self._rows: dict[tuple[str, ...], Tensor] = {}
        for name, hidden_STD in hidden.items():
            self._rows[name,] = kept(hidden_STD, windows)

    def at(self, points: tuple[HookPoint, ...]) -> Tensor:
        names = tuple(point.name for point in points)
        if names not in self._rows:
            self._rows[names] = torch.cat([self._rows[name,] for name in names], dim=1)
        return self._rows[names]


class _FirstPass:
    """Meters of one SAE for the first pass."""

    def __init__(self, sae: SAE, hooks: Hooks) -> None:
        self.sae, self.hooks = sae, hooks
        self.reconstruction = ReconstructionMeter(sae.d_sae, sae.config.widths_written)
        self.latents = LatentMeter(sae.d_sae)

    def update(self, rows: _Rows) -> None:
        x_hat_NO, codes = encode_decode(self.sae, rows.at(self.hooks.read))
        self.reconstruction.update(rows.at(self.hooks.write), x_hat_NO, codes)
        self.latents.update(codes)


class _SecondPass:
    """Meters of one SAE for the second pass."""

    def __init__(self, first: _FirstPass, config: GalleryConfig) -> None:
        self._sae, self._hooks, self._reconstruction = first.sae, first.hooks, first.reconstruction
        self._statistics = first.latents.value()
        self._gallery = GalleryMeter(first.sae, self._statistics, config)

    def update(self, rows: _Rows) -> Tensor:
        x_ND = rows.at(self._hooks.read)
        x_hat_NO, codes = encode_decode(self._sae, x_ND)
        self._reconstruction.update_per_token(rows.at(self._hooks.write), x_hat_NO)
        self._gallery.update(rows.windows, x_ND, codes)
        return x_hat_NO

    def value(self, spliced: Spliced, token_text: TokenText) -> Evaluation:
        return Evaluation(
            reconstruction=self._reconstruction.value(),
            language_model=spliced,
            statistics=self._statistics,
            gallery=self._gallery.value(token_text),
        )


def _check_widths(saes: Mapping[str, SAE], hooks: Mapping[str, Hooks], rows: _Rows) -> None:
    for name, sae in saes.items():
        own = hooks[name]
        for points, width, field in ((own.read, sae.d_in, "d_in"), (own.write, sae.d_out, "d_out")):
            found = rows.at(points).shape[1]
            if found != width:
                listed = " and ".join(f"'{point.name}'" for point in points)
                raise UserError(
                    f"SAE '{name}' must have the width of hook {listed}, {found}; got {field}={width}. "
                    "Use the model and the hook that it was trained on."
                )
