"""Loss of a language model when the reconstruction replaces the activations at a hook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kronsae.core.sae import SAE
from kronsae.eval.hooked import (
    HookPoint,
    LanguageModel,
    MakeTokens,
    Windows,
    hidden_states,
    hidden_states_and_logits,
    kept,
    logits_with,
    read_windows,
    splice,
    windows_per_pass,
)
from kronsae.eval.reconstruction import encode_decode
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SplicedModel:
    """Losses of the language model with the hooked activations replaced by the reconstruction.

    A transcoder's reconstruction is computed from the clean activations it reads and replaces those at the hook it
    writes. A crosscoder's hooks are all replaced at once, also in the ablations by 0 and by the mean. On the residual
    stream the last of these hooks then dominates, because the replacement there discards the changes at earlier hooks.

    Only kept activations are replaced: padding and special tokens keep their own. CE is the cross-entropy of the next
    token. KL is ``KL(clean || replaced)`` between the next-token distributions. Both are in nats, mean over the
    positions whose next token is not padding.

    Args:
        tokens: number of positions scored.
        ce_clean: CE with nothing replaced.
        ce_spliced: CE with the reconstruction.
        ce_zero: CE with zero ablation.
        ce_mean: CE with mean ablation.
        kl_spliced, kl_zero, kl_mean: KL for the same replacements; the clean KL is 0.
        ce_recovered: ``(ce_zero - ce_spliced) / (ce_zero - ce_clean)``; 1 is perfect, 0 is as bad as zero ablation.
            None if zero ablation changes nothing.
        kl_recovered: ``1 - kl_spliced / kl_zero``; None if zero ablation changes nothing.
        ce_recovered_from_mean: ``(ce_mean - ce_spliced) / (ce_mean - ce_clean)``, a stricter baseline.
    """

    kind: ClassVar[str] = "measured"
    tokens: int
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    kl_spliced: float
    kl_zero: float
    kl_mean: float
    ce_recovered: float | None = field(init=False)
    kl_recovered: float | None = field(init=False)
    ce_recovered_from_mean: float | None = field(init=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "ce_recovered", _recovered(self.ce_spliced, self.ce_zero, self.ce_clean))
        set_field(self, "kl_recovered", _recovered(self.kl_spliced, self.kl_zero, 0.0))
        set_field(self, "ce_recovered_from_mean", _recovered(self.ce_spliced, self.ce_mean, self.ce_clean))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return to_dict(self)


@dataclass(frozen=True)
class Skipped:
    """A measurement that was not made, and why."""

    kind: ClassVar[str] = "skipped"
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return to_dict(self)


Spliced: TypeAlias = SplicedModel | Skipped


def spliced_models(
    saes: Mapping[str, SAE], language_model: LanguageModel, hook: HookPoint, make_tokens: MakeTokens, *, tokens: int
) -> dict[str, Spliced]:
    """Measure `SplicedModel` for each SAE; all SAEs share the clean and ablated passes.

    Args:
        saes: SAEs by name.
        language_model: the model; without a language-model head, every SAE is `Skipped`.
        hook: the hook that the SAEs reconstruct.
        make_tokens: creates the stream of token windows. They are run once for the mean and once for the losses.
        tokens: number of kept tokens to evaluate on; the last window is used whole.
    """
    if language_model.no_lm_head_reason:
        return {name: Skipped(language_model.no_lm_head_reason) for name in saes}
    for name, sae in saes.items():
        if sae.config.role:
            raise UserError(
                f"spliced_models needs SAEs that read and write one hook; '{name}' is a {sae.config.role}. Use "
                "`evaluate`, which takes the hooks of each SAE."
            )
    stream = read_windows(make_tokens, tokens)
    total_D = torch.zeros((), dtype=torch.float64)
    for windows in stream:
        total_D = total_D + kept(hidden_states(language_model, hook, windows), windows).double().sum(0).cpu()
    mean_D = total_D / sum(windows.num_kept for windows in stream)
    meter = SplicingMeter(language_model, hook, tuple(saes), mean_D)
    for windows in stream:
        for part in windows.split(windows_per_pass(language_model, windows.keep_ST.shape[1])):
            hidden_STD, clean_STV = hidden_states_and_logits(language_model, hook, part)
            x_ND = kept(hidden_STD, part)
            meter.update(part, hidden_STD, clean_STV, {name: encode_decode(sae, x_ND)[0] for name, sae in saes.items()})
    return meter.values()


class SplicingMeter:
    """Accumulator of `SplicedModel` for SAEs that write the same hooks. Holds the clean logits and those of one pass.

    Args:
        language_model: the model.
        hook: the written hook, or several hooks, which are replaced at once.
        names: names of the SAEs.
        mean_D: mean activation; for several hooks, concatenated.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        hook: HookPoint | Sequence[HookPoint],
        names: tuple[str, ...],
        mean_D: Float[Tensor, " D"],
    ) -> None:
        self._hooks = (hook,) if isinstance(hook, HookPoint) else tuple(hook)
        self._language_model, self._names = language_model, names
        self._mean_D = mean_D
        self._tokens = 0
        self._ce_clean = 0.0
        self._ablated = {"zero": _Sums(), "mean": _Sums()}
        self._spliced = {name: _Sums() for name in names}

    def update(
        self,
        windows: Windows,
        hidden: Float[Tensor, "S T D"] | Mapping[str, Float[Tensor, "S T _"]],
        clean_STV: Float[Tensor, "S T V"],
        reconstructions: Mapping[str, Float[Tensor, "N D"]],
    ) -> None:
        """Add windows, with their clean pass and each SAE's reconstruction of the kept activations.

        Args:
            windows: the windows.
            hidden: their activations, by `HookPoint.name`; for one hook, also the tensor itself.
            clean_STV: the clean logits.
            reconstructions: reconstructions by SAE; for several hooks, concatenated.
        """
        own = [hidden if isinstance(hidden, Tensor) else hidden[hook.name] for hook in self._hooks]
        widths = [hidden_STD.shape[-1] for hidden_STD in own]
        clean = _Prediction.of(clean_STV, windows)
        self._tokens += len(clean.log_p_NV)
        self._ce_clean += clean.cross_entropy()
        mean_ND = self._mean_D.expand(windows.num_kept, -1)
        replaced = [(self._ablated["zero"], torch.zeros_like(mean_ND)), (self._ablated["mean"], mean_ND)]
        replaced += [(self._spliced[name], reconstructions[name]) for name in self._names]
        for sums, rows_ND in replaced:
            parts = zip(self._hooks, own, rows_ND.split(widths, dim=1), strict=True)
            put_in = [(hook, splice(hidden_STD, windows, part_ND)) for hook, hidden_STD, part_ND in parts]
            changed = _Prediction.of(logits_with(self._language_model, put_in, windows), windows)
            sums.cross_entropy += changed.cross_entropy()
            sums.divergence += clean.divergence(changed)

    def values(self) -> dict[str, Spliced]:
        """Return the results by SAE; `Skipped` if no window had two tokens."""
        n = self._tokens
        if n == 0:
            return {name: Skipped("no window of the text has a token and a next one") for name in self._names}
        zero, mean = self._ablated["zero"], self._ablated["mean"]
        return {
            name: SplicedModel(
                tokens=n,
                ce_clean=self._ce_clean / n,
                ce_spliced=sums.cross_entropy / n,
                ce_zero=zero.cross_entropy / n,
                ce_mean=mean.cross_entropy / n,
                kl_spliced=sums.divergence / n,
                kl_zero=zero.divergence / n,
                kl_mean=mean.divergence / n,
            )
            for name, sums in self._spliced.items()
        }


@dataclass
class _Sums:
    """Sums over the positions scored so far, in nats."""

    cross_entropy: float = 0.0
    divergence: float = 0.0


@dataclass(frozen=True, eq=False)
class _Prediction:
    """Next-token log-probabilities at the scored positions, and the actual next tokens."""

    log_p_NV: Tensor
    target_N: Tensor

    @classmethod
    def of(cls, logits_STV: Tensor, windows: Windows) -> _Prediction:
        scored_ST = scored_positions(windows)
        target_N = windows.input_ids_ST[:, 1:][scored_ST].to(logits_STV.device, torch.int64)
        return cls(logits_STV[:, :-1][scored_ST.to(logits_STV.device)].float().log_softmax(-1), target_N)

    def cross_entropy(self) -> float:
        return -float(self.log_p_NV.gather(1, self.target_N.unsqueeze(1)).double().sum())

    def divergence(self, other: _Prediction) -> float:
        """Return ``KL(self || other)`` summed over positions. Terms where ``self`` has probability 0 are 0."""
        terms_NV = self.log_p_NV.exp() * (self.log_p_NV - other.log_p_NV)
        return float(terms_NV.masked_fill_(self.log_p_NV == -torch.inf, 0.0).sum(1).double().sum())


def scored_positions(windows: Windows) -> Bool[Tensor, "S T-1"]:
    """Return which positions are scored: neither the token nor the next one is padding."""
    return windows.attention_mask_ST[:, :-1] & windows.attention_mask_ST[:, 1:]


def _recovered(spliced: float, worst: float, clean: float) -> float | None:
    return None if worst == clean else (worst - spliced) / (worst - clean)
