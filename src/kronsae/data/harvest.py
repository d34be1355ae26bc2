"""Read a model's activations with forward hooks; the forward pass stops after the last hook that is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from traceback import clear_frames
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.data.buffer import Activations
from kronsae.data.model import HookPoint, LanguageModel, resolve_hook, tap
from kronsae.data.passes import Part, PassSize, is_out_of_memory
from kronsae.data.prefetch import Prefetched
from kronsae.data.stream import MakeStream, State
from kronsae.data.tokens import TokenBatch, Tokens
from kronsae.support.errors import UserError

Hooks = str | int | Sequence[str | int]


class _AllReadError(Exception):
    """Stop a forward pass whose remaining layers are not needed."""


def forward(language_model: LanguageModel, batch: Tokens) -> Any:
    """Run the whole model on a batch, without gradients; return its Hugging Face output.

    Raises:
        UserError: If the windows are longer than the model's context, or the model has no embedding for a token.
    """
    language_model.check_context_length(batch.input_ids_ST.shape[1])
    embeddings: Any = language_model.model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    largest = int(batch.input_ids_ST.max())
    if largest >= vocabulary:
        raise UserError(
            f"model: the tokenizer must not have more tokens than the model; token {largest} is beyond the "
            f"{vocabulary} embeddings of '{language_model.name}'. Use the tokenizer with which the model was trained."
        )
    device = language_model.device
    with torch.no_grad():
        return language_model.model(
            input_ids=batch.input_ids_ST.to(device, torch.int64),
            attention_mask=batch.attention_mask_ST.to(device, torch.int64),
        )


def hidden_states(language_model: LanguageModel, hooks: Hooks, batch: Tokens) -> dict[str, Float[Tensor, "S T D"]]:
    """Return a batch's activations by hook, in the model's dtype and on its device.

    They are read in as many forward passes as `kronsae.data.passes.PassSize` says, each of which stops at the last
    hook: no later layer and no head is run. If a module is called more than once, its first call is read. Special
    tokens are included; at padding, the values mean nothing.

    Raises:
        UserError: If a hook names no module, or a module that does not give one vector per token.
    """
    points = {name: resolve_hook(language_model.model, hook) for name, hook in _named(hooks).items()}
    return read_points(language_model, points, batch)


def read_points(
    language_model: LanguageModel, points: Mapping[str, HookPoint], batch: Tokens
) -> dict[str, Float[Tensor, "S T D"]]:
    """Return the same as `hidden_states` for hooks that are already resolved, by the keys of ``points``."""
    whole: dict[str, Tensor] = {}
    with _room(batch, points, language_model):
        for part, found in _parts_read(language_model, points, batch):
            if part.input_ids_ST.shape == batch.input_ids_ST.shape:
                return found
            for name, hidden_STD in found.items():
                if name not in whole:
                    whole[name] = hidden_STD.new_zeros((*batch.input_ids_ST.shape, hidden_STD.shape[-1]))
                whole[name][part.rows, : hidden_STD.shape[1]] = hidden_STD
    return whole


def kept_rows(language_model: LanguageModel, hooks: Hooks, batch: Tokens) -> dict[str, Float[Tensor, "N D"]]:
    """Return the kept tokens' activations by hook, in float32, in the order of the tokens.

    They are those of `hidden_states`; of each pass, only they are kept.

    Raises:
        UserError: As of `hidden_states`, or if the memory does not suffice for the rows of all hooks.
    """
    points = {name: resolve_hook(language_model.model, hook) for name, hook in _named(hooks).items()}
    device = language_model.device
    place_ST = batch.keep_ST.flatten().cumsum(0).view(batch.keep_ST.shape) - 1
    count = int(batch.keep_ST.sum())
    rows: dict[str, Tensor] = {}
    with _room(batch, points, language_model):
        for part, found in _parts_read(language_model, points, batch):
            places_N = place_ST[part.rows, : part.keep_ST.shape[1]][part.keep_ST].to(device)
            keep_ST = part.keep_ST.to(device)
            for name in points:
                kept_ND = found.pop(name)[keep_ST].float()
                if len(kept_ND) == count:
                    rows[name] = kept_ND
                    continue
                if name not in rows:
                    rows[name] = kept_ND.new_empty((count, kept_ND.shape[1]))
                rows[name][places_N] = kept_ND
    return rows


def _parts_read(
    language_model: LanguageModel, points: Mapping[str, HookPoint], batch: Tokens
) -> Iterator[tuple[Part, dict[str, Tensor]]]:
    """Yield the parts of a batch with their hidden states, until each window is read."""
    size = language_model.pass_size
    waiting = size.parts(batch)
    while waiting:
        part = waiting.pop(0)
        found = _read_part(language_model, points, part)
        if isinstance(found, BaseException):
            size.halve(part, language_model.device, found)
            _tell(size, part)
            waiting = size.parts(batch, sorted(row for left in (part, *waiting) for row in left.rows))
        else:
            yield part, found


@contextmanager
def _room(batch: Tokens, points: Mapping[str, HookPoint], language_model: LanguageModel) -> Iterator[None]:
    """Turn lack of memory for a whole batch into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        windows, columns = batch.input_ids_ST.shape
        raise UserError(
            f"model_batch must be so small that the activations of one batch fit into memory; that of "
            f"{language_model.device} does not suffice for {windows} windows of {columns} tokens at {len(points)} "
            "hook(s). Give a smaller model_batch, or fewer hooks."
        ) from error


def _read_part(
    language_model: LanguageModel, points: Mapping[str, HookPoint], part: Part
) -> dict[str, Tensor] | BaseException:
    """Return the hidden states at the points, from one pass; the error if memory does not suffice."""
    try:
        with _reading(points, part, to_the_end=False) as found:
            forward(language_model, part)
    except _AllReadError:
        return {name: found[name] for name in points}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        clear_frames(error.__traceback__)  # frees the tensors of the pass
        return error
    raise _never_ran(points, found)


def _tell(size: PassSize, part: Part) -> None:
    from kronsae.support.terminal import say

    windows, columns = part.input_ids_ST.shape
    say(
        f"The model's pass over {windows} windows of {columns} tokens ran out of memory; it goes on with at most "
        f"{size.most_tokens:,} tokens at once."
    )


def read_points_and_output(
    language_model: LanguageModel, points: Mapping[str, HookPoint], batch: Tokens
) -> tuple[dict[str, Float[Tensor, "S T D"]], Any]:
    """Return the same as `read_points`, and the model's unchanged output; one complete forward pass of all windows."""
    with _room(batch, points, language_model), _reading(points, batch, to_the_end=True) as found:
        output = forward(language_model, batch)
    if len(found) < len(points):
        raise _never_ran(points, found)
    return {name: found[name] for name in points}, output


@contextmanager
def _reading(points: Mapping[str, HookPoint], batch: Tokens, *, to_the_end: bool) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that a forward pass fills; the pass is stopped with `_AllReadError` unless ``to_the_end``."""
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
        f"hook must name a module that is called in a forward pass; '{name}'{where} is not. "
        "Give a transformer block, such as 'layers.0'."
    )


def widths(language_model: LanguageModel, hooks: Hooks) -> dict[str, int]:
    """Return the width of the activations of each hook, measured with a forward pass of one token."""
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
    """Yield ``({hook: values_ND}, state)``: the kept tokens' activations in float32, on the model's device.

    There is one item per token batch; N varies. The state is the token stream's.

    Args:
        language_model: The model to run.
        hooks: One hook or several. The keys of each item are these hooks, as strings.
        make_tokens: Makes the stream of token batches, such as ``partial(TokenStream, make_text, tokenizer, ...)``.
        state: State yielded with an item; iteration resumes after that item.

    Raises:
        UserError: If a hook names no module, or an activation is not finite; the message gives its position.
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
        batches = self._make_tokens(state=self._state)
        if reads_ahead(self._language_model.device):
            batches = Prefetched(batches)
        for number, (batch, state) in enumerate(batches):
            yield self.compute(batch, number), state

    def compute(self, batch: TokenBatch, number: int) -> Activations:
        """Return the activations of one batch of tokens, the item ``number`` of the stream."""
        values = kept_rows(self._language_model, self._hooks, batch)
        for hook, rows_ND in values.items():
            check_finite(rows_ND, hook, batch, number)
        return values


def reads_ahead(device: torch.device) -> bool:
    """Return whether a thread tokenises the next windows during a pass.

    A CPU that runs the model has no time to spare, and its passes take much longer than tokenising.
    """
    return device.type != "cpu"


def check_finite(rows_ND: Float[Tensor, "N D"], hook: str, batch: TokenBatch, number: int) -> None:
    """Raise a UserError with the position of the first kept activation that is NaN or infinite, if there is one."""
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
