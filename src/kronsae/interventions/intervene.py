"""Changing latents in a running language model: steer, scale, clamp, ablate, at one hook or at several.

Where latents ``f`` of an activation x become ``f'``, the model goes on with ``x + decode(f') - decode(f)``: the part of
x that the SAE does not reconstruct stays as it is. Since the decoder is linear this is
``x + sum_i (f'_i - f_i) W_dec[i]`` over the changed latents, and so it is computed: an activation in which nothing
changes keeps its very bits.
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
from kronsae.data.model import resolve_hook, tap
from kronsae.support.errors import UserError, nearest

Positions = slice | Sequence[int] | Literal["last"] | None
Kind = Literal["add", "scale", "set"]


@dataclass(frozen=True)
class Change:
    """What becomes of one latent's activation; made by `steer`, `scale`, `clamp` and `ablate`."""

    latent: int
    kind: Kind
    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "latent", _whole(self.latent))
        if self.kind not in (kinds := get_args(Kind)):
            raise UserError(
                f"kind must be one of {', '.join(kinds)}; got {self.kind!r}.{nearest(str(self.kind), kinds)}"
            )
        try:
            object.__setattr__(self, "value", float(self.value))
        except (TypeError, ValueError):
            raise UserError(f"the change of latent {self.latent} must be by a number; got {self.value!r}.") from None
        if not math.isfinite(self.value):
            raise UserError(f"the change of latent {self.latent} must be by a finite number; got {self.value!r}.")

    def __call__(self, f: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The activation after the change."""
        if self.kind == "add":
            return f + self.value
        if self.kind == "scale":
            return f * self.value
        return torch.full_like(f, self.value)


def steer(latent: int, amount: float) -> Change:
    """``f + amount``, active or not: adds ``amount * W_dec[latent]`` to every activation. May be negative."""
    return Change(latent, "add", amount)


def scale(latent: int, factor: float) -> Change:
    """``factor * f``: nothing where the latent is not active."""
    return Change(latent, "scale", factor)


def clamp(latent: int, value: float) -> Change:
    """``value``, whether the latent is active or not."""
    return Change(latent, "set", value)


def ablate(latent: int) -> Change:
    """0: the latent is taken out where it is active."""
    return clamp(latent, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """Changes of one SAE's latents at one hook.

    Args:
        sae: takes raw activations, as saved SAEs do; on the model's device. ``sae.train()`` or ``sae.eval()`` makes no
            difference: `SAE.encode` is the same in both.
        hook: the module whose output it reconstructs, as `kronsae.data.model.resolve_hook` reads it.
        changes: several of one latent are applied in their order.
        positions: at which tokens. A token's position is its place in its own sequence, counted from 0, padding left
            out and tokens in the cache included, so that generation with a cache and without agree. A slice or a list
            of positions from 0 on; None: all. ``"last"``: the last token of each sequence in each forward pass, in
            generation with a cache so the prompt's last one and every new one. Padding is never changed.
    """

    sae: SAE
    hook: str | int
    changes: Sequence[Change]
    positions: Positions = None

    def __post_init__(self) -> None:
        if role := self.sae.config.role:
            raise UserError(
                f"sae must reconstruct the one hook it reads; this one is a {role}, and what it leaves out of a hook "
                "it writes is not in what it reads there. Intervene with an SAE of that hook."
            )
        if not isinstance(self.changes, Sequence) or not all(isinstance(change, Change) for change in self.changes):
            raise UserError(
                f"changes must be a list of what steer, scale, clamp and ablate give, such as [steer(12, 5.0)]; got "
                f"{self.changes!r}."
            )
        check_latents((change.latent for change in self.changes), self.sae.d_sae)
        _check_positions(self.positions)

    @property
    def latents(self) -> list[int]:
        """The latents it changes, each once."""
        return list(dict.fromkeys(change.latent for change in self.changes))

    def difference(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """``f' - f`` of the changed latents (`latents`) on some activations; differentiable."""
        if all(change.kind == "add" for change in self.changes):  # f itself cancels out
            f = dict.fromkeys(self.latents, x_ND.new_zeros(len(x_ND)))
        else:
            codes = self.sae.encode(x_ND)
            f = {latent: torch.where(codes.indices == latent, codes.values, 0.0).sum(-1) for latent in self.latents}
        after = dict(f)
        for change in self.changes:
            after[change.latent] = change(after[change.latent])
        return torch.stack([after[latent] - f[latent] for latent in self.latents], dim=1)

    def apply(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """``x + decode(f') - decode(f)``, in the dtype of x; a row in which nothing changes is returned as it was.

        Raises:
            UserError: what comes out is not finite.
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
    """Refuse a latent that a dictionary of ``d_sae`` has not."""
    for latent in latents:
        if not 0 <= latent < d_sae:
            raise UserError(f"latent must be a number from 0 to {d_sae - 1}; got {latent}.")


@contextmanager
def intervene(model: nn.Module, *interventions: Intervention) -> Iterator[None]:
    """Let ``model``, a Hugging Face language model, run with latents changed, until the block ends.

    Works on plain forward hooks: with padding, batches, generation (with a cache or without) and gradients. Later
    hooks see what earlier ones changed; several interventions at one hook are applied in their order, each to the
    activation that the one before left.

    Raises:
        UserError: a hook names no module, or an SAE does not fit it.

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
            edit = partial(_edit, intervention, tracker, hook.path)
            stack.enter_context(tap(hook, edit))
        yield


def _whole(latent: Any) -> int:
    """A latent's number; those of NumPy and torch are taken as well."""
    try:
        number = -1 if isinstance(latent, bool) else index(latent)
    except TypeError:
        number = -1
    if number < 0:
        raise UserError(f"latent must be a whole number from 0 on; got {latent!r}.")
    return number


def _edit(intervention: Intervention, tracker: _Tracker, path: str, hidden_STD: Tensor) -> Tensor:
    sae = intervention.sae
    if hidden_STD.shape[-1] != sae.d_in:
        raise UserError(
            f"the SAE must have the width of hook '{path}', {hidden_STD.shape[-1]}; it has d_in={sae.d_in}. "
            "Give the hook that it was trained on."
        )
    if hidden_STD.device != sae.W_dec.device:
        raise UserError(
            f"the SAE must be on the model's device, {hidden_STD.device}; it is on {sae.W_dec.device}. Move it: "
            "sae.to(device)."
        )
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
            "positions must be None, 'last', a slice (of steps from 1 on) or a list of whole numbers from 0 on; got "
            f"{positions!r}."
        )


class _Tracker:
    """Knows, during a forward pass of the model, which tokens are padding and where the others stand."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._past = 0

    def begin(self, arguments: dict[str, Any]) -> None:
        """Take note of what the model was called with."""
        mask, cache = arguments.get("attention_mask"), arguments.get("past_key_values")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise UserError(
                "attention_mask must be a tensor of sequences by tokens while latents are changed; got "
                f"{type(mask).__name__}{list(mask.shape) if isinstance(mask, Tensor) else ''}."
            )
        self._mask, self._past = mask, 0 if cache is None else int(cache.get_seq_length())

    def end(self) -> None:
        """Forget it."""
        self._mask, self._past = None, 0

    def chosen(self, positions: Positions, hidden_STD: Tensor) -> Bool[Tensor, "S T"]:
        """The tokens of this pass that are meant."""
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
                f"attention_mask must be {sequences} x {width}, over the tokens in the cache and the new ones, while "
                f"latents are changed; got {' x '.join(map(str, self._mask.shape))}."
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
