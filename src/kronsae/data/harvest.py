"""Activations of a model, read by forward hooks; the forward pass ends at the last hook that is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kronsae.data.buffer import Activations
from kronsae.data.model import LanguageModel, hidden_of, resolve_hook
from kronsae.data.stream import MakeStream, State
from kronsae.data.tokens import TokenBatch
from kronsae.errors import UserError

Hooks = str | int | Sequence[str | int]


class _AllCapturedError(Exception):
    """Ends a forward pass whose remaining layers nobody asked for."""


def forward(language_model: LanguageModel, batch: TokenBatch) -> Any:
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
            input_ids=batch.input_ids_ST.to(device), attention_mask=batch.attention_mask_ST.to(device)
        )


def hidden_states(language_model: LanguageModel, hooks: Hooks, batch: TokenBatch) -> dict[str, Float[Tensor, "S T D"]]:
    """Return the outputs of several modules for a batch, by hook, in the model's dtype and on its device.

    One forward pass, ended as soon as the last of them is known: no later layer and no head is run. Of a
    module that is called more than once the first output counts. Padded and special tokens are included.

    Raises:
        UserError: If a hook names no module, or one without an output of one vector per token.
    """
    points = {name: resolve_hook(language_model.model, hook) for name, hook in _named(hooks).items()}
    captured: dict[str, Tensor] = {}

    def capture(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if name not in captured:
                captured[name] = _checked_hidden(output, name, batch)
            if len(captured) == len(points):
                raise _AllCapturedError

        return hook

    handles = [point.module.register_forward_hook(capture(name)) for name, point in points.items()]
    try:
        forward(language_model, batch)
    except _AllCapturedError:
        return {name: captured[name] for name in points}
    finally:
        for handle in handles:
            handle.remove()
    silent = next(name for name in points if name not in captured)
    raise UserError(
        f"hook must name a module that runs in a forward pass; '{silent}' ({points[silent].path}) does not. "
        "Give a transformer block, such as 'layers.0'."
    )


def d_in(language_model: LanguageModel, hook: str | int) -> int:
    """Return the width of a hook's activations, by running one token up to it."""
    one_11 = torch.zeros((1, 1), dtype=torch.int64)
    batch = TokenBatch(
        input_ids_ST=one_11,
        attention_mask_ST=torch.ones_like(one_11),
        keep_ST=torch.ones_like(one_11, dtype=torch.bool),
        documents=("",),
        offsets=(0,),
    )
    return hidden_states(language_model, hook, batch)[str(hook)].shape[-1]


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


def _checked_hidden(output: object, hook: str, batch: TokenBatch) -> Tensor:
    hidden_STD = hidden_of(output, hook)
    if hidden_STD.shape[:2] != batch.input_ids_ST.shape:
        raise UserError(
            f"hook must name a module with one vector per token as output; '{hook}' gives "
            f"{tuple(hidden_STD.shape)} for tokens {tuple(batch.input_ids_ST.shape)}. Give a transformer block, "
            "such as 'layers.0'."
        )
    return hidden_STD


def _named(hooks: Hooks) -> dict[str, str | int]:
    several = [hooks] if isinstance(hooks, str | int) else hooks
    if not several:
        raise UserError("hooks must name at least one module; got none. Give one such as 'layers.0'.")
    return {str(hook): hook for hook in several}
