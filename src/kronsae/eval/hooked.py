"""Forward passes of a language model on token windows, reading or replacing activations at hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kronsae.data.harvest import forward, read_points, read_points_and_output
from kronsae.data.model import HookPoint, LanguageModel, tap
from kronsae.data.tokens import Tokens as TokenBatch
from kronsae.support.errors import UserError

__all__ = [
    "HookPoint",
    "LanguageModel",
    "MakeTokens",
    "TokenBatch",
    "Windows",
    "all_hidden_states",
    "all_hidden_states_and_logits",
    "hidden_states",
    "hidden_states_and_logits",
    "kept",
    "logits",
    "logits_with",
    "read_windows",
    "splice",
    "windows_per_pass",
]

MAX_LOGITS = 2**25  # elements of one logits tensor: 128 MiB in float32; scoring holds about four such tensors


class MakeTokens(Protocol):
    """Callable that creates the stream of ``(TokenBatch, state)`` from its start; evaluation calls it once."""

    def __call__(self) -> Iterable[tuple[TokenBatch, Any]]: ...


@dataclass(frozen=True, eq=False)
class Windows:
    """A `TokenBatch` on the CPU (int32, bool, bool); ``first`` is the index of its first window in the stream."""

    input_ids_ST: Int[Tensor, "S T"]
    attention_mask_ST: Bool[Tensor, "S T"]
    keep_ST: Bool[Tensor, "S T"]
    first: int

    def __len__(self) -> int:
        return len(self.input_ids_ST)

    @property
    def num_kept(self) -> int:
        """Number of kept tokens."""
        return int(self.keep_ST.sum())

    def reaching(self, tokens: int) -> int:
        """Return how many leading windows are needed for ``tokens`` kept tokens; all if they hold fewer."""
        kept_S = self.keep_ST.sum(1)
        return int((kept_S.cumsum(0) - kept_S < tokens).sum())

    def split(self, size: int) -> Iterator[Windows]:
        """Yield the windows, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.rows(start, start + size)

    def rows(self, start: int, stop: int) -> Windows:
        """Return the windows ``start <= n < stop``."""
        part = slice(start, stop)
        return Windows(self.input_ids_ST[part], self.attention_mask_ST[part], self.keep_ST[part], self.first + start)


def read_windows(make_tokens: MakeTokens, tokens: int) -> list[Windows]:
    """Read whole windows from the stream until they hold ``tokens`` kept tokens or the stream ends.

    The windows read do not depend on how the stream batches them. They are stored at 6 bytes per token, so that the
    text is tokenised once and every pass sees the same tokens.

    Raises:
        UserError: the stream has no kept token.
    """
    found: list[Windows] = []
    left, first = tokens, 0
    for batch, _state in make_tokens():
        ids_ST, mask_ST = batch.input_ids_ST.to(torch.int32), batch.attention_mask_ST.bool()
        windows = Windows(ids_ST.cpu(), mask_ST.cpu(), batch.keep_ST.cpu(), first)
        windows = windows.rows(0, windows.reaching(left))
        found.append(windows)
        left -= windows.num_kept
        first += len(windows)
        if left <= 0:
            break
    if left == tokens:
        raise UserError("text must contain tokens that are neither padding nor special; found none. Give more text.")
    return found


def hidden_states(language_model: LanguageModel, hook: HookPoint, windows: Windows) -> Float[Tensor, "S T D"]:
    """Return the activations at one hook; the forward pass stops there.

    Raises:
        UserError: the module does not run, or a kept activation is not finite.
    """
    return all_hidden_states(language_model, [hook], windows)[hook.name]


def all_hidden_states(
    language_model: LanguageModel, hooks: Iterable[HookPoint], windows: Windows
) -> dict[str, Float[Tensor, "S T D"]]:
    """Return the activations at several hooks, by `HookPoint.name`; one forward pass, which stops at the last hook."""
    return _checked(read_points(language_model, {hook.name: hook for hook in hooks}, windows), windows)


def hidden_states_and_logits(
    language_model: LanguageModel, hook: HookPoint, windows: Windows
) -> tuple[Float[Tensor, "S T D"], Float[Tensor, "S T V"]]:
    """Return the activations at one hook and the clean logits, from one forward pass."""
    hidden, clean_STV = all_hidden_states_and_logits(language_model, [hook], windows)
    return hidden[hook.name], clean_STV


def all_hidden_states_and_logits(
    language_model: LanguageModel, hooks: Iterable[HookPoint], windows: Windows
) -> tuple[dict[str, Float[Tensor, "S T D"]], Float[Tensor, "S T V"]]:
    """Return the activations at several hooks, by `HookPoint.name`, and the clean logits, from one forward pass."""
    hidden, output = read_points_and_output(language_model, {hook.name: hook for hook in hooks}, windows)
    return _checked(hidden, windows), output.logits


def logits(
    language_model: LanguageModel, hook: HookPoint, windows: Windows, hidden_STD: Float[Tensor, "S T D"]
) -> Float[Tensor, "S T V"]:
    """Return the logits with the activations at one hook replaced by ``hidden_STD``."""
    return logits_with(language_model, [(hook, hidden_STD)], windows)


def logits_with(
    language_model: LanguageModel, replaced: Iterable[tuple[HookPoint, Float[Tensor, "S T D"]]], windows: Windows
) -> Float[Tensor, "S T V"]:
    """Return the logits with the activations at several hooks replaced at once."""
    with ExitStack() as stack:
        for hook, hidden_STD in replaced:
            stack.enter_context(tap(hook, partial(_instead, hidden_STD)))
        found: Tensor = forward(language_model, windows).logits
    return found


def _instead(new_STD: Tensor, _hidden_STD: Tensor) -> Tensor:
    return new_STD


def kept(hidden_STD: Float[Tensor, "S T D"], windows: Windows) -> Float[Tensor, "N D"]:
    """Return the activations of the kept tokens, window by window, in float32."""
    return hidden_STD[windows.keep_ST.to(hidden_STD.device)].float()


def splice(
    hidden_STD: Float[Tensor, "S T D"], windows: Windows, rows_ND: Float[Tensor, "N D"]
) -> Float[Tensor, "S T D"]:
    """Replace the activations of kept tokens by ``rows_ND``; padding and special tokens keep their own."""
    keep_ST1 = windows.keep_ST.to(hidden_STD.device).unsqueeze(-1)
    return hidden_STD.masked_scatter(keep_ST1, rows_ND.to(hidden_STD))


def windows_per_pass(language_model: LanguageModel, length: int) -> int:
    """Return how many windows of ``length`` tokens to run at once so that no logits tensor exceeds `MAX_LOGITS`."""
    return max(1, MAX_LOGITS // (vocabulary_size(language_model) * length))


def vocabulary_size(language_model: LanguageModel) -> int:
    """Return the number of token ids of the model."""
    embeddings: Any = language_model.model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def _checked(hidden: dict[str, Tensor], windows: Windows) -> dict[str, Tensor]:
    for name, hidden_STD in hidden.items():
        finite_ST = hidden_STD.isfinite().all(-1).cpu() | ~windows.keep_ST
        if not bool(finite_ST.all()):
            window, column = (int(place) for place in (~finite_ST).nonzero()[0])
            raise UserError(
                f"activations must be finite; hook '{name}' gave NaN or infinity in window {windows.first + window}, "
                f"token {column}. Check the model's weights, or run it in float32 or bfloat16."
            )
    return hidden
