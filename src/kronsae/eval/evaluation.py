"""Everything that is measured of some SAEs, in two passes of the language model over one text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kronsae.config import to_dict
from kronsae.core.checks import check_positive
from kronsae.core.sae import SAE
from kronsae.errors import UserError
from kronsae.eval.contexts import Gallery, GalleryMeter
from kronsae.eval.display import TokenText
from kronsae.eval.hooked import (
    HookPoint,
    LanguageModel,
    MakeTokens,
    Windows,
    hidden_states,
    hidden_states_and_logits,
    kept,
    read_windows,
    windows_per_pass,
)
from kronsae.eval.language_model import Skipped, Spliced, SplicingMeter
from kronsae.eval.latents import GalleryConfig, LatentMeter, LatentStatistics
from kronsae.eval.reconstruction import Reconstruction, ReconstructionMeter, encode_decode


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured of one SAE; see the parts for definitions and units."""

    reconstruction: Reconstruction
    language_model: Spliced
    statistics: LatentStatistics
    gallery: Gallery

    def figures(self) -> dict[str, Any]:
        """The figures alone, as JSON values: ``reconstruction`` and ``language_model``."""
        return {"reconstruction": self.reconstruction.to_dict(), "language_model": self.language_model.to_dict()}

    def latents(self) -> dict[str, Any]:
        """The latents alone, as JSON values: ``statistics`` of all, ``gallery`` of those shown."""
        return {"statistics": self.statistics.to_dict(), "gallery": self.gallery.to_dict()}

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON values: `figures` and `latents` in one."""
        return to_dict(self)


def evaluate(
    saes: Mapping[str, SAE],
    language_model: LanguageModel,
    hook: HookPoint,
    make_tokens: MakeTokens,
    *,
    tokens: int,
    language_model_tokens: int = 32_768,
    gallery: GalleryConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Evaluation]:
    """Evaluate some SAEs of one hook on the same tokens.

    The first pass runs the model up to the hook: reconstruction, latent statistics, the mean. The second one adds
    what needs these: explained variance per token, the shown latents' contexts and, on the first
    ``language_model_tokens``, the losses of the spliced model (one clean and two ablated passes for all SAEs, one
    pass for each).

    Args:
        saes: by name, each on the language model's device.
        language_model: the model, in evaluation mode.
        hook: whose output the SAEs reconstruct.
        make_tokens: makes the stream of token windows from its beginning.
        tokens: kept tokens to evaluate on. The last window is used whole, so some more may be.
        language_model_tokens: of these, at most so many for the losses of the spliced model, which cost most of the
            time. The differences they are made of are between equal texts, so few suffice.
        gallery: which latents to show.
        progress: called with (tokens done, tokens to do), over both passes.

    Raises:
        UserError: an SAE does not fit the hook, the activations are not finite, or the text has no usable token.
    """
    check_positive("tokens", tokens)
    check_positive("language_model_tokens", language_model_tokens)
    report = _Progress(progress, 2 * tokens)
    first = {name: _FirstPass(sae) for name, sae in saes.items()}
    stream = read_windows(make_tokens, tokens)
    for windows in stream:
        x_ND = kept(hidden_states(language_model, hook, windows), windows)
        _check_width(saes, hook, x_ND)
        for meters in first.values():
            meters.update(x_ND)
        report.add(len(x_ND))
    second = {name: _SecondPass(meters, gallery or GalleryConfig()) for name, meters in first.items()}
    spliced: Mapping[str, Spliced] = dict.fromkeys(saes, Skipped(language_model.no_lm_head_reason))
    splicing = None
    if second and not language_model.no_lm_head_reason:
        mean_D = next(iter(first.values())).reconstruction.variance.mean_D
        splicing = SplicingMeter(language_model, hook, tuple(saes), mean_D)
    for part, with_loss in _parts(language_model, stream, language_model_tokens):
        if splicing is not None and with_loss:
            hidden_STD, clean_STV = hidden_states_and_logits(language_model, hook, part)
            x_ND = kept(hidden_STD, part)
            x_hat = {name: meter.update(part, x_ND) for name, meter in second.items()}
            splicing.update(part, hidden_STD, clean_STV, x_hat)
        else:
            x_ND = kept(hidden_states(language_model, hook, part), part)
            for meter in second.values():
                meter.update(part, x_ND)
        report.add(len(x_ND))
    if splicing is not None:
        spliced = splicing.values()
    token_text = TokenText(language_model.tokenizer)
    return {name: meters.value(spliced[name], token_text) for name, meters in second.items()}


def _parts(language_model: LanguageModel, stream: Iterable[Windows], scored: int) -> Iterator[tuple[Windows, bool]]:
    """The windows, few enough at a time for their logits, and whether they are among the first ``scored`` tokens."""
    for windows in stream:
        border = windows.reaching(scored)
        scored -= windows.num_kept
        size = windows_per_pass(language_model, windows.keep_ST.shape[1])
        for part in windows.rows(0, border).split(size):
            yield part, True
        for part in windows.rows(border, len(windows)).split(size):
            yield part, False


class _Progress:
    """Counts tokens for a display; whole windows may exceed the number asked for."""

    def __init__(self, show: Callable[[int, int], None] | None, total: int) -> None:
        self._show, self._total, self._done = show, total, 0

    def add(self, tokens: int) -> None:
        self._done += tokens
        if self._show is not None:
            self._show(min(self._done, self._total), self._total)


class _FirstPass:
    """What one SAE needs of the first pass."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.reconstruction = ReconstructionMeter(sae.d_sae)
        self.latents = LatentMeter(sae.d_sae)

    def update(self, x_ND: Tensor) -> None:
        x_hat_ND, codes = encode_decode(self.sae, x_ND)
        self.reconstruction.update(x_ND, x_hat_ND, codes)
        self.latents.update(codes)


class _SecondPass:
    """What one SAE needs of the second pass."""

    def __init__(self, first: _FirstPass, config: GalleryConfig) -> None:
        self._sae, self._reconstruction = first.sae, first.reconstruction
        self._statistics = first.latents.value()
        self._gallery = GalleryMeter(first.sae, self._statistics, config)

    def update(self, windows: Windows, x_ND: Tensor) -> Tensor:
        x_hat_ND, codes = encode_decode(self._sae, x_ND)
        self._reconstruction.update_per_token(x_ND, x_hat_ND)
        self._gallery.update(windows, x_ND, codes)
        return x_hat_ND

    def value(self, spliced: Spliced, token_text: TokenText) -> Evaluation:
        return Evaluation(
            reconstruction=self._reconstruction.value(),
            language_model=spliced,
            statistics=self._statistics,
            gallery=self._gallery.value(token_text),
        )


def _check_width(saes: Mapping[str, SAE], hook: HookPoint, x_ND: Tensor) -> None:
    for name, sae in saes.items():
        if sae.d_in != x_ND.shape[1]:
            raise UserError(
                f"SAE '{name}' must have the width of hook '{hook.path}', {x_ND.shape[1]}; it has d_in={sae.d_in}. "
                "Give the model and the hook it was trained on."
            )
