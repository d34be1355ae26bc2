"""Running a language model with one module's output read, or replaced, by a plain forward hook.

The protocols say what evaluation needs of the objects it is given; `kronsae.data` has them, and so may anybody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kronsae.errors import UserError

MAX_LOGITS = 2**25  # logits alive in one tensor: 128 MiB of float32, of which scoring holds about four


class TokenBatch(Protocol):
    """Windows of tokens: ids, 1 where there is no padding, True where an activation counts; each ``[S, T]``."""

    @property
    def input_ids_ST(self) -> Tensor: ...
    @property
    def attention_mask_ST(self) -> Tensor: ...
    @property
    def keep_ST(self) -> Tensor: ...


class LanguageModel(Protocol):
    """A Hugging Face style model with its tokenizer; ``no_lm_head_reason`` is ``""`` where it gives logits."""

    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def no_lm_head_reason(self) -> str: ...


class HookPoint(Protocol):
    """A module of the model, and its path for messages."""

    @property
    def path(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...


class MakeTokens(Protocol):
    """Makes the stream of ``(TokenBatch, state)`` from its beginning; evaluation calls it once."""

    def __call__(self) -> Iterable[tuple[TokenBatch, Any]]: ...


Replace: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Windows:
    """A `TokenBatch` on the CPU (int32, bool, bool); ``first`` is the number of its first window in the stream."""

    input_ids_ST: Int[Tensor, "S T"]
    attention_mask_ST: Bool[Tensor, "S T"]
    keep_ST: Bool[Tensor, "S T"]
    first: int

    def __len__(self) -> int:
        return len(self.input_ids_ST)

    @property
    def num_kept(self) -> int:
        """Tokens whose activations count."""
        return int(self.keep_ST.sum())

    def reaching(self, tokens: int) -> int:
        """How many windows from the first one on hold ``tokens`` kept tokens; all of them if they do not."""
        kept_S = self.keep_ST.sum(1)
        return int((kept_S.cumsum(0) - kept_S < tokens).sum())

    def split(self, size: int) -> Iterator[Windows]:
        """The same windows, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.rows(start, start + size)

    def rows(self, start: int, stop: int) -> Windows:
        """The windows from ``start`` up to ``stop``."""
        part = slice(start, stop)
        return Windows(self.input_ids_ST[part], self.attention_mask_ST[part], self.keep_ST[part], self.first + start)


def read_windows(make_tokens: MakeTokens, tokens: int) -> list[Windows]:
    """The stream's first windows, whole, until they hold ``tokens`` kept tokens or the stream ends.

    Which windows are read does not depend on how the stream groups them into batches. They are kept, in 6 bytes
    per token, so that every pass sees the same text and it is tokenised once.

    Raises:
        UserError: no token counts.
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
        raise UserError("text must hold tokens to evaluate on that are neither padding nor special; found none.")
    return found


class _ReachedError(Exception):
    """Ends a forward pass whose later layers nobody asked for."""


def hidden_states(language_model: LanguageModel, hook: HookPoint, windows: Windows) -> Float[Tensor, "S T D"]:
    """The hooked module's output; the forward pass ends there.

    Raises:
        UserError: the module does not run, or an activation that counts is not finite.
    """
    captured: list[Tensor] = []

    def capture(hidden_STD: Tensor) -> Tensor:
        captured.append(hidden_STD)
        raise _ReachedError

    try:
        _forward(language_model, hook, windows, capture)
    except _ReachedError:
        return _checked(captured[0], hook, windows)
    raise _never_ran(hook)


def logits(
    language_model: LanguageModel, hook: HookPoint, windows: Windows, hidden_STD: Float[Tensor, "S T D"]
) -> Float[Tensor, "S T V"]:
    """The logits when ``hidden_STD`` stands in the place of the hooked module's output."""
    return _logits(_forward(language_model, hook, windows, lambda own_STD: hidden_STD.to(own_STD.dtype)))


def hidden_states_and_logits(
    language_model: LanguageModel, hook: HookPoint, windows: Windows
) -> tuple[Float[Tensor, "S T D"], Float[Tensor, "S T V"]]:
    """The hooked module's output and the undisturbed logits, from one forward pass."""
    captured: list[Tensor] = []

    def capture(hidden_STD: Tensor) -> Tensor:
        captured.append(hidden_STD)
        return hidden_STD

    output = _forward(language_model, hook, windows, capture)
    if not captured:
        raise _never_ran(hook)
    return _checked(captured[0], hook, windows), _logits(output)


def kept(hidden_STD: Float[Tensor, "S T D"], windows: Windows) -> Float[Tensor, "N D"]:
    """The activations that count, window by window, in float32."""
    return hidden_STD[windows.keep_ST.to(hidden_STD.device)].float()


def splice(
    hidden_STD: Float[Tensor, "S T D"], windows: Windows, rows_ND: Float[Tensor, "N D"]
) -> Float[Tensor, "S T D"]:
    """``rows_ND`` in the places that count; padding and special tokens keep their own activations."""
    keep_ST1 = windows.keep_ST.to(hidden_STD.device).unsqueeze(-1)
    return hidden_STD.masked_scatter(keep_ST1, rows_ND.to(hidden_STD))


def windows_per_pass(language_model: LanguageModel, length: int) -> int:
    """How many windows of ``length`` tokens to run at once so that no tensor of logits exceeds `MAX_LOGITS`."""
    return max(1, MAX_LOGITS // (vocabulary_size(language_model) * length))


def vocabulary_size(language_model: LanguageModel) -> int:
    """How many token ids the model takes."""
    return int(language_model.model.get_input_embeddings().weight.shape[0])


def _forward(language_model: LanguageModel, hook: HookPoint, windows: Windows, replace: Replace) -> Any:
    def replace_output(_module: nn.Module, _inputs: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (replace(output[0]), *output[1:])
        return replace(output)

    device = language_model.device
    handle = hook.module.register_forward_hook(replace_output)
    try:
        with torch.no_grad():
            return language_model.model(
                input_ids=windows.input_ids_ST.to(device, torch.int64),
                attention_mask=windows.attention_mask_ST.to(device, torch.int64),
            )
    finally:
        handle.remove()


def _logits(output: Any) -> Tensor:
    found: Tensor = output.logits
    return found


def _checked(hidden_STD: Tensor, hook: HookPoint, windows: Windows) -> Tensor:
    finite_ST = hidden_STD.isfinite().all(-1).cpu() | ~windows.keep_ST
    if not bool(finite_ST.all()):
        window, column = (int(place) for place in (~finite_ST).nonzero()[0])
        raise UserError(
            f"activations must be finite; hook '{hook.path}' gave NaN or infinity in window "
            f"{windows.first + window}, token {column}. Check the model's weights, or run it in float32 or bfloat16."
        )
    return hidden_STD


def _never_ran(hook: HookPoint) -> UserError:
    return UserError(
        f"hook must name a module that runs in a forward pass; '{hook.path}' does not. Give a transformer block, "
        "such as 'layers.0'."
    )
