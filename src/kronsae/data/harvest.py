"""Activations of a model, read by forward hooks; the forward pass ends at the last hook that is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.data.buffer import Activations
from kronsae.data.model import HookPoint, LanguageModel, resolve_hook, tap
from kronsae.data.stream import MakeStream, State
from kronsae.data.tokens import TokenBatch, Tokens
from kronsae.support.errors import UserError

Hooks = str | int | Sequence[str | int]


class _AllReadError(Exception):
    """Ends a forward pass whose remaining layers nobody asked for."""


def forward(language_model: LanguageModel, batch: Tokens) -> Any:
    """Run the whole model on a batch, without gradients; return its Hugging Face output.

    Raises:
        UserError: If the windows are longer than the model's positions, or a token is unknown to the model.
    """
    language_model.check_context_length(batch.input_ids_ST.shape[1])
    embeddings: Any = language_model.model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    largest = int(batch.input_ids_ST.max())
    if largest >= vocabulary:
        raise UserError(
            f"model: the tokenizer must not know more tokens than the model; token {largest} is beyond the "
            f"{vocabulary} embeddings of '{language_model.name}'. Use the tokenizer that it was trained with."
        )
    device = language_model.device
    with torch.no_grad():
        return language_model.model(
            input_ids=batch.input_ids_ST.to(device, torch.int64),
            attention_mask=batch.attention_mask_ST.to(device, torch.int64),
        )


def hidden_states(language_model: LanguageModel, hooks: Hooks, batch: Tokens) -> dict[str, Float[Tensor, "S T D"]]:
    """Return the activations at several hooks for a batch, by hook, in the model's dtype and on its device.

    One forward pass, ended as soon as the last of them is known: no later layer and no head is run. Of a
    module that is called more than once the first call counts. Padded and special tokens are included.

    Raises:
        UserError: If a hook names no module, or one without one vector per token.
    """
    points = {name: resolve_hook(language_model.model, hook) for name, hook in _named(hooks).items()}
    return read_points(language_model, points, batch)


def read_points(
    language_model: LanguageModel, points: Mapping[str, HookPoint], batch: Tokens
) -> dict[str, Float[Tensor, "S T D"]]:
    """`hidden_states` at places that are resolved already, by the names they are given."""
    try:
        with _reading(points, batch, to_the_end=False) as found:
            forward(language_model, batch)
    except _AllReadError:
        return {name: found[name] for name in points}
    raise _never_ran(points, found)


def read_points_and_output(
    language_model: LanguageModel, points: Mapping[str, HookPoint], batch: Tokens
) -> tuple[dict[str, Float[Tensor, "S T D"]], Any]:
    """As `read_points`, from a whole pass, and the model's undisturbed output."""
    with _reading(points, batch, to_the_end=True) as found:
        output = forward(language_model, batch)
    if len(found) < len(points):
        raise _never_ran(points, found)
    return {name: found[name] for name in points}, output


@contextmanager
def _reading(points: Mapping[str, HookPoint], batch: Tokens, *, to_the_end: bool) -> Iterator[dict[str, Tensor]]:
    """While inside, a forward pass fills the dict; it ends with `_AllReadError` once that is full, or at its end."""
    found: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[[Tensor], None]:
        def read(hidden_STD: Tensor) -> None:
            if name not in found:
                _check_shape(hidden_STD, name, points[name], batch)
                more = to_the_end or len(found) + 1 < len(points)
                found[name] = hidden_STD.clone() if more else hidden_STD  # a later layer may write into it
            if len(found) == len(points) and not to_the_end:
                raise _AllReadError

        return read

    with ExitStack() as stack:
        for name, point in points.items():
            stack.enter_context(tap(point, reader(name)))
        yield found


def _never_ran(points: Mapping[str, HookPoint], found: Mapping[str, Tensor]) -> UserError:
    name, point = next((name, point) for name, point in points.items() if name not in found)
    where = "" if name == point.name else f" ({point.name})"
    return UserError(
        f"hook must name a module that runs in a forward pass; '{name}'{where} does not. "
        "Give a transformer block, such as 'layers.0'."
    )


def widths(language_model: LanguageModel, hooks: Hooks) -> dict[str, int]:
    """Return the width of the activations of each hook, by running one token up to the last."""
    one_11 = torch.zeros((1, 1), dtype=torch.int64)
    batch = TokenBatch(
        input_ids_ST=one_11,
        attention_mask_ST=torch.ones_like(one_11),
        keep_ST=torch.ones_like(one_11, dtype=torch.bool),
        documents=("",),
        offsets=(0,),
    )
    return {hook: hidden.shape[-1] for hook, hidden in hidden_states(language_model, hooks, batch).items()}


class ActivationStream:
    """Yield ``({hook: values_ND}, state)``: float32 rows of the kept tokens, on the model's device.

    One item per token batch; N differs from item to item. The state is the token stream's.

    Args:
        language_model: The model to run.
        hooks: One hook or several; each is a key of the items, as a string, just as it was given.
        make_tokens: Makes the stream of token batches, such as ``partial(TokenStream, make_text, tokenizer, ...)``.
        state: Go on after the item that this state came with.

    Raises:
        UserError: If a hook names no module, or an activation is not finite (it says where).
    """

    def __init__(
        self,
        language_model: LanguageModel,
        hooks: Hooks,
        make_tokens: MakeStream[TokenBatch],
        *,
        state: State | None = None,
    ) -> None:
        for hook in _named(hooks).values():
            resolve_hook(language_model.model, hook)
        self._language_model = language_model
        self._hooks = hooks
        self._make_tokens = make_tokens
        self._state = state

    def __iter__(self) -> Iterator[tuple[Activations, State]]:
        for number, (batch, state) in enumerate(self._make_tokens(state=self._state)):
            hidden = hidden_states(self._language_model, self._hooks, batch)
            keep_ST = batch.keep_ST.to(self._language_model.device)
            values = {hook: hidden_STD[keep_ST].float() for hook, hidden_STD in hidden.items()}
            for hook, rows_ND in values.items():
                check_finite(rows_ND, hook, batch, number)
            yield values, state


def check_finite(rows_ND: Float[Tensor, "N D"], hook: str, batch: TokenBatch, number: int) -> None:
    """Raise a UserError that says where the kept activations of a batch are NaN or infinite, if they are."""
    finite_N = rows_ND.isfinite().all(-1)
    if bool(finite_N.all()):
        return
    row = int((~finite_N).nonzero()[0, 0])
    sequence, column = (int(index) for index in batch.keep_ST.nonzero()[row])
    raise UserError(
        f"activations must be finite; hook '{hook}' gave NaN or infinity in batch {number}, document "
        f"'{batch.documents[sequence]}', token {batch.offsets[sequence] + column}. Check the model's weights, or "
        "run it in float32 or bfloat16."
    )


def _check_shape(hidden_STD: Tensor, name: str, point: HookPoint, batch: Tokens) -> None:
    if hidden_STD.shape[:2] != batch.input_ids_ST.shape:
        raise UserError(
            f"hook must name a module with one vector per token as {point.side}; '{name}' gives "
            f"{tuple(hidden_STD.shape)} for tokens {tuple(batch.input_ids_ST.shape)}. Give a transformer block, "
            "such as 'layers.0'."
        )


def _named(hooks: Hooks) -> dict[str, str | int]:
    several = [hooks] if isinstance(hooks, str | int) else hooks
    if not several:
        raise UserError("hooks must name at least one module; got none. Give one such as 'layers.0'.")
    return {str(hook): hook for hook in several}
