"""What a language model loses when it has to go on from the reconstruction."""

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
    """The language model's loss with the reconstruction in the place of the hooked activations.

    Of a transcoder the reconstruction, made of the undisturbed activations it reads, stands at the hook it writes; of
    a crosscoder all hooks written are replaced at once, and at once by 0 and by the mean. On the residual stream the
    last of them then decides most: what the others change below it is replaced there.

    Only activations that count are replaced: padding and special tokens keep their own. CE is the cross-entropy of
    the next token, KL is ``KL(clean || replaced)`` between the next-token distributions; both in nats, mean over
    the positions whose next token is not padding.

    Args:
        tokens: positions scored.
        ce_clean: nothing replaced.
        ce_spliced: replaced by the reconstruction.
        ce_zero: replaced by 0.
        ce_mean: replaced by the mean activation.
        kl_spliced, kl_zero, kl_mean: the same for KL; clean is 0.
        ce_recovered: ``(ce_zero - ce_spliced) / (ce_zero - ce_clean)``; 1 is perfect, 0 is as bad as zero. None where
            zeroing changes nothing.
        kl_recovered: ``1 - kl_spliced / kl_zero``; None where zeroing changes nothing.
        ce_recovered_from_mean: ``(ce_mean - ce_spliced) / (ce_mean - ce_clean)``, the harder comparison.
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
        """As JSON values."""
        return to_dict(self)


@dataclass(frozen=True)
class Skipped:
    """A measurement that was not made, and why."""

    kind: ClassVar[str] = "skipped"
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return to_dict(self)


Spliced: TypeAlias = SplicedModel | Skipped


def spliced_models(
    saes: Mapping[str, SAE], language_model: LanguageModel, hook: HookPoint, make_tokens: MakeTokens, *, tokens: int
) -> dict[str, Spliced]:
    """Splice each SAE into the language model; the clean and the ablated passes are shared by all of them.

    Args:
        saes: by name.
        language_model: the model; without a head for the next token every SAE is `Skipped`.
        hook: whose output the SAEs reconstruct.
        make_tokens: makes the stream of token windows; its windows are run once for the mean, once for the losses.
        tokens: kept tokens to evaluate on; the last window is used whole.
    """
    if language_model.no_lm_head_reason:
        return {name: Skipped(language_model.no_lm_head_reason) for name in saes}
    for name, sae in saes.items():
        if sae.config.role:
            raise UserError(
                f"spliced_models takes SAEs of one hook; '{name}' is a {sae.config.role}. Use `evaluate`, which is "
                "told the hooks of each."
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
    """Accumulates `SplicedModel` for SAEs that write the same hooks; holds one pass's logits beside the clean ones.

    Args:
        language_model: the model.
        hook: the hook written, or several, which are replaced at once.
        names: the SAEs.
        mean_D: mean activation, of several hooks side by side.
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
        """Take in some windows, given their clean pass and each SAE's reconstruction of the kept activations.

        Args:
            windows: the windows.
            hidden: their activations, by `HookPoint.name`; of one hook, those alone will do.
            clean_STV: the undisturbed logits.
            reconstructions: by SAE, of several hooks side by side.
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
        """The figures by SAE; `Skipped` if no window had two tokens."""
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
    """Over the positions scored so far, in nats."""

    cross_entropy: float = 0.0
    divergence: float = 0.0


@dataclass(frozen=True, eq=False)
class _Prediction:
    """Next-token log-probabilities at the positions that are scored, and the tokens that came."""

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
        """``KL(self || other)``, summed over positions. A probability of 0 on this side adds nothing."""
        terms_NV = self.log_p_NV.exp() * (self.log_p_NV - other.log_p_NV)
        return float(terms_NV.masked_fill_(self.log_p_NV == -torch.inf, 0.0).sum(1).double().sum())


def scored_positions(windows: Windows) -> Bool[Tensor, "S T-1"]:
    """Positions that are no padding and whose next token is none."""
    return windows.attention_mask_ST[:, :-1] & windows.attention_mask_ST[:, 1:]


def _recovered(spliced: float, worst: float, clean: float) -> float | None:
    return None if worst == clean else (worst - spliced) / (worst - clean)
