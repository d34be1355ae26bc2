"""Interventions on latents in a running language model: steer, scale, clamp, ablate, at one or more hooks.

If latents ``f`` of an activation x are changed to ``f'``, x is replaced by ``x + decode(f') - decode(f)``, so the part
of x that the SAE does not reconstruct stays unchanged. The decoder is linear, so this is computed as
``x + sum_i (f'_i - f_i) W_dec[i]`` over the changed latents. An activation without changes keeps its exact bits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kronsae.core.sae import SAE
from kronsae.data.model import HookPoint, resolve_hook, tap
from kronsae.interventions.sites import check_fits
from kronsae.support.errors import UserError, nearest

Positions = slice | Sequence[int] | Literal["last"] | None
Kind = Literal["add", "scale", "set"]


@dataclass(frozen=True)
class Change:
    """Change of one latent's activation; created by `steer`, `scale`, `clamp` and `ablate`."""

    latent: int
    kind: Kind
    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "latent", _latent_index(self.latent))
        if self.kind not in (kinds := get_args(Kind)):
            raise UserError(
                f"kind must be one of {', '.join(kinds)}; got {self.kind!r}.{nearest(str(self.kind), kinds)}"
            )
        try:
            object.__setattr__(self, "value", float(self.value))
        except (TypeError, ValueError):
            raise UserError(f"value must be a number; got {self.value!r} for latent {self.latent}.") from None
        if not math.isfinite(self.value):
            raise UserError(f"value must be finite; got {self.value!r} for latent {self.latent}.")

    def __call__(self, f: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the activation after the change."""
        if self.kind == "add":
            return f + self.value
        if self.kind == "scale":
            return f * self.value
        return torch.full_like(f, self.value)


def steer(latent: int, amount: float) -> Change:
    """Return the change to ``f + amount``, active or not: adds ``amount * W_dec[latent]``. May be negative."""
    return Change(latent, "add", amount)


def scale(latent: int, factor: float) -> Change:
    """Return the change to ``factor * f``; no effect where the latent is not active."""
    return Change(latent, "scale", factor)


def clamp(latent: int, value: float) -> Change:
    """Return the change to ``value``, whether the latent is active or not."""
    return Change(latent, "set", value)


def ablate(latent: int) -> Change:
    """Return the change to 0; no effect where the latent is not active."""
    return clamp(latent, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """Changes of one SAE's latents at one hook.

    Args:
        sae: SAE that takes raw activations, as saved SAEs do, on the model's device. ``sae.train()`` and ``sae.eval()``
            give the same result, because `SAE.encode` does not depend on the mode.
        hook: hook that the SAE reconstructs, as for `kronsae.data.model.resolve_hook`.
        changes: changes; several changes of one latent are applied in order.
        positions: tokens to change. A token's position is its index in its own sequence, from 0, without padding and
            including tokens in the cache, so generation gives the same result with and without a cache. A slice or a
            list of non-negative positions; None: all. ``"last"``: the last token of each sequence in each forward pass,
            which in generation with a cache is the last token of the prompt and every new one. Padding is never
            changed.
    """

    sae: SAE
    hook: str | int
    changes: Sequence[Change]
    positions: Positions = None

    def __post_init__(self) -> None:
        if role := self.sae.config.role:
            raise UserError(
                f"sae must reconstruct the single hook it reads; got a {role}, whose reconstruction error is not part "
                "of the activation it reads. Use an SAE of that hook."
            )
        if not isinstance(self.changes, Sequence) or not all(isinstance(change, Change) for change in self.changes):
            raise UserError(
                f"changes must be a list of results of steer, scale, clamp and ablate, such as [steer(12, 5.0)]; got "
                f"{self.changes!r}."
            )
        check_latents((change.latent for change in self.changes), self.sae.d_sae)
        _check_positions(self.positions)

    @property
    def latents(self) -> list[int]:
        """Return the changed latents, each once."""
        return list(dict.fromkeys(change.latent for change in self.changes))

    def difference(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """Return ``f' - f`` of the changed latents (`latents`) on some activations; differentiable."""
        if all(change.kind == "add" for change in self.changes):  # f cancels out
            f = dict.fromkeys(self.latents, x_ND.new_zeros(len(x_ND)))
        else:
            codes = self.sae.encode(x_ND)
            f = {latent: torch.where(codes.indices == latent, codes.values, 0.0).sum(-1) for latent in self.latents}
        after = dict(f)
        for change in self.changes:
            after[change.latent] = change(after[change.latent])
        return torch.stack([after[latent] - f[latent] for latent in self.latents], dim=1)

    def apply(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Return ``x + decode(f') - decode(f)`` in the dtype of x; a row without changes keeps its exact bits.

        Raises:
            UserError: the changed activations are not finite.
        """
        if not self.changes:
            return x_ND
        W_dec = self.sae.W_dec
        inner_ND = x_ND.to(W_dec.dtype)
        difference_NC = self.difference(inner_ND)
        changed_ND = (inner_ND + difference_NC @ W_dec[self.latents]).to(x_ND.dtype)
        if not bool(changed_ND.isfinite().all()):
            raise UserError(
                f"changed activations must be finite in {x_ND.dtype}; latents {self.latents} give NaN or infinity. "
                "Change them by less, or check the weights of the SAE and of the model."
            )
        return torch.where((difference_NC != 0).any(1, keepdim=True), changed_ND, x_ND)


def check_latents(latents: Iterable[int], d_sae: int) -> None:
    """Raise if a latent is not in a dictionary of ``d_sae`` latents."""
    for latent in latents:
        if not 0 <= latent < d_sae:
            raise UserError(f"latent must be from 0 to {d_sae - 1}; got {latent}.")


@contextmanager
def intervene(model: nn.Module, *interventions: Intervention) -> Iterator[None]:
    """Change latents in every forward pass of ``model``, a Hugging Face language model, inside the ``with`` block.

    It uses plain forward hooks and works with padding, batches, generation (with and without a cache) and gradients.
    Later hooks see the changes of earlier ones. Several interventions at one hook are applied in order, each to the
    result of the previous one.

    Raises:
        UserError: a hook names no module, or an SAE does not have the width or device of its hook.

    Example:
        >>> from kronsae.data.model import load_model, ModelConfig
        >>> from kronsae.runs.recipes import kron
        >>> model = load_model(ModelConfig(name="bundled", device="cpu")).model
        >>> sae = kron(num_heads=4, d_base=2, d_extension=2, k=3).shape(model.config.hidden_size).build()
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> plain = model(tokens).logits
        >>> with intervene(model, Intervention(sae=sae, hook="layers.3", changes=[steer(5, 2.0)])):
        ...     bool((model(tokens).logits == plain).all())
        False
    """
    hooks = [resolve_hook(model, intervention.hook) for intervention in interventions]
    with ExitStack() as stack:
        tracker = stack.enter_context(_tracked(model))
        for hook, intervention in zip(hooks, interventions, strict=True):
            edit = partial(_edit, intervention, tracker, hook)
            stack.enter_context(tap(hook, edit))
        yield


def _latent_index(latent: Any) -> int:
    """Return the index of a latent as int; NumPy and torch integers are accepted."""
    try:
        number = -1 if isinstance(latent, bool) else index(latent)
    except TypeError:
        number = -1
    if number < 0:
        raise UserError(f"latent must be a whole number of at least 0; got {latent!r}.")
    return number


def _edit(intervention: Intervention, tracker: _Tracker, site: HookPoint, hidden_STD: Tensor) -> Tensor:
    check_fits(intervention.sae, site, hidden_STD, intervention.sae.d_in)
    chosen_ST = tracker.chosen(intervention.positions, hidden_STD)
    if not intervention.changes or not bool(chosen_ST.any()):
        return hidden_STD
    changed_ND = intervention.apply(hidden_STD[chosen_ST])
    return hidden_STD.masked_scatter(chosen_ST.unsqueeze(-1), changed_ND)


def _check_positions(positions: Positions) -> None:
    if positions is None or positions == "last":
        return
    if isinstance(positions, slice):
        numbers = [number for number in (positions.start, positions.stop, positions.step) if number is not None]
    else:
        numbers = list(positions) if isinstance(positions, Sequence) else [-1]
    no_step = isinstance(positions, slice) and positions.step == 0
    if no_step or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise UserError(
            "positions must be None, 'last', a slice with a step of at least 1, or a list of whole numbers of at least "
            f"0; got {positions!r}."
        )


class _Tracker:
    """Stores the attention mask and the cache length of the current forward pass, and selects tokens by position."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._past = 0

    def begin(self, arguments: dict[str, Any]) -> None:
        """Store the model's arguments at the start of a forward pass."""
        mask, cache = arguments.get("attention_mask"), arguments.get("past_key_values")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise UserError(
                "attention_mask must be a tensor [sequences, tokens] while latents are changed; got "
                f"{type(mask).__name__}{list(mask.shape) if isinstance(mask, Tensor) else ''}."
            )
        self._mask, self._past = mask, 0 if cache is None else int(cache.get_seq_length())

    def end(self) -> None:
        """Clear the state at the end of a forward pass."""
        self._mask, self._past = None, 0

    def chosen(self, positions: Positions, hidden_STD: Tensor) -> Bool[Tensor, "S T"]:
        """Return a mask of the tokens of this pass at the given positions."""
        position_ST, token_ST = self._positions(hidden_STD)
        if positions is None:
            return token_ST
        if isinstance(positions, str):  # "last"
            return token_ST & (position_ST == position_ST.masked_fill(~token_ST, -1).amax(1, keepdim=True))
        if not isinstance(positions, slice):
            return token_ST & torch.isin(position_ST, torch.tensor(list(positions), device=position_ST.device))
        first = positions.start or 0
        chosen_ST = token_ST & (position_ST >= first) & ((position_ST - first) % (positions.step or 1) == 0)
        return chosen_ST if positions.stop is None else chosen_ST & (position_ST < positions.stop)

    def _positions(self, hidden_STD: Tensor) -> tuple[Int[Tensor, "S T"], Bool[Tensor, "S T"]]:
        sequences, length = hidden_STD.shape[:2]
        width = self._past + length
        if self._mask is None:
            mask = torch.ones(sequences, width, dtype=torch.bool, device=hidden_STD.device)
        elif self._mask.shape == (sequences, width):
            mask = self._mask.to(hidden_STD.device).bool()
        else:
            raise UserError(
                f"attention_mask must be {sequences} x {width}, covering cached and new tokens, while latents are "
                f"changed; got {' x '.join(map(str, self._mask.shape))}."
            )
        position = mask.cumsum(1) - 1
        return position[:, -length:], mask[:, -length:]


@contextmanager
def _tracked(model: nn.Module) -> Iterator[_Tracker]:
    tracker, signature = _Tracker(), inspect.signature(model.forward)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tracker.begin(signature.bind_partial(*args, **kwargs).arguments)

    def after(_module: nn.Module, _args: Any, _output: Any) -> None:
        tracker.end()

    handles = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    )
    try:
        yield tracker
    finally:
        for handle in handles:
            handle.remove()
