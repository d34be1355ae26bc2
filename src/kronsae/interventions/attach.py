"""An SAE put into a running model: the activation is computed from its codes, so gradients reach the codes.

At the hook, x is replaced by ``decode(f') + e`` with the codes ``f = encode(x)``, their edited form ``f'`` and the
error node ``e = x - decode(f)``, which is held fixed (Marks et al. 2024). Without an edit this is x itself. It is
computed as ``x + (decode(f') - decode(f))`` where x and decode(f) are constants, so an activation whose codes are not
edited keeps its exact bits, while gradients flow through f' and, through the encoder, to everything before the hook.

A transcoder reads one hook and imitates what another gives: there ``y`` is replaced by ``decode(f', x) + e`` with
``e = y - decode(f, x)``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.core.sae import SAE
from kronsae.data.model import tap
from kronsae.interventions.sites import check_fits, find_site
from kronsae.support.errors import UserError, nearest

Edit = Callable[[SparseCodes], SparseCodes]
Error = Literal["keep", "drop"]


class Attached:
    """An SAE that is part of a model until `remove`, or until the end of a ``with`` block; made by `attach`.

    After a forward pass it holds what that pass computed; `codes` and `error_node` have a ``.grad`` after
    ``backward()``, also if no weight of the model or the SAE requires a gradient.
    """

    def __init__(
        self, model: Any, sae: SAE, hook: str | int, *, write: str | int | None, error: Error, edit: Edit | None
    ) -> None:
        _check(sae, write, error)
        self.sae, self.error, self.edit = sae, error, edit
        self.read_site = find_site(model, hook)
        self.write_site = self.read_site if write is None else find_site(model, write)
        self._x: Tensor | None = None
        self._codes: SparseCodes | None = None
        self._error_node: Tensor | None = None
        self._removed = False
        self._taps = ExitStack()
        if write is None:
            self._taps.enter_context(tap(self.read_site, self._replace_read))
        else:
            self._taps.enter_context(tap(self.read_site, self._remember))
            self._taps.enter_context(tap(self.write_site, self._replace_written))

    def __repr__(self) -> str:
        read, written = self.read_site.name, self.write_site.name
        place = read if self.write_site is self.read_site else f"{read} -> {written}"
        state = f"error {'kept' if self.error == 'keep' else 'dropped'}{', codes edited' if self.edit else ''}"
        sizes = f"d_in={self.sae.d_in}, d_sae={self.sae.d_sae}"
        if self._removed:
            state = "removed"
        return f"Attached({self.sae.config.architecture}, {sizes}, at {place}: {state})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the SAE out of the model, which is then exactly as before; the values of the last pass stay here."""
        self._taps.close()
        self._removed = True

    @property
    def codes(self) -> SparseCodes:
        """The codes of the last forward pass, ``[S, T, K]``, after the edit; ``codes.values.grad`` is their gradient.

        Raises:
            UserError: no forward pass has reached the hook.
        """
        if self._codes is None:
            raise UserError(
                f"codes are known after a forward pass; none has reached hook '{self.write_site.name}' yet."
            )
        return self._codes

    @property
    def error_node(self) -> Float[Tensor, "S T O"]:
        """What the SAE does not reconstruct, ``x - decode(f)`` (for a transcoder ``y - decode(f, x)``), in its dtype.

        Raises:
            UserError: no forward pass has reached the hook, or the error is dropped.
        """
        if self._error_node is None:
            why = 'error="drop"' if self.error == "drop" else f"none has reached hook '{self.write_site.name}' yet"
            raise UserError(f"the error node is known after a forward pass that keeps it; {why}.")
        return self._error_node

    def _remember(self, x: Tensor) -> None:
        check_fits(self.sae, self.read_site, x, self.sae.d_in)
        self._x = x

    def _replace_read(self, x: Tensor) -> Tensor:
        self._remember(x)
        return self._replace_written(x)

    def _replace_written(self, y: Tensor) -> Tensor:
        x, self._x = self._x, None
        if x is None:
            raise UserError(
                f"the transcoder's hook '{self.read_site.name}' must run before '{self.write_site.name}'; it did not. "
                "Exchange hook and write, or give the hooks that it was trained on."
            )
        check_fits(self.sae, self.write_site, y, self.sae.d_out, "d_out")
        return self._computed(x.to(self.sae.W_dec.dtype), y)

    def _computed(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what takes the place of y, in the dtype of y; x is what the SAE reads."""
        codes = self.sae.encode(x)
        if torch.is_grad_enabled() and not codes.values.requires_grad:
            codes = SparseCodes(codes.values.detach().requires_grad_(), codes.indices, codes.d_sae)
        edited = codes if self.edit is None else _checked(self.edit(codes), codes)
        if edited.values.requires_grad:
            edited.values.retain_grad()
        self._codes = edited
        decoded = self.sae.decode(edited, x)
        if self.error == "drop":
            return decoded.to(y.dtype)
        with torch.no_grad():
            plain = decoded if self.edit is None else self.sae.decode(codes, x)
            plain, y = plain.detach(), y.detach()
        error = (y - plain).requires_grad_(torch.is_grad_enabled())
        self._error_node = error
        change = (decoded - plain) + (error - error.detach())  # the second part is 0: it gives the error a gradient
        return y + change.to(y.dtype)


def attach(
    model: Any,
    sae: SAE,
    hook: str | int,
    *,
    write: str | int | None = None,
    error: Error = "keep",
    edit: Edit | None = None,
) -> Attached:
    """Put an SAE into a model at a hook, until it is removed.

    Every forward pass then computes the activation from the SAE's codes plus its reconstruction error, which is held
    fixed. The result of the model stays bit for bit the same, unless the codes are edited or the error is dropped.
    Several SAEs may be attached, each by a call of its own; later ones see the effect of earlier ones. The SAE computes
    in its own dtype, and the result has that of the model.

    Args:
        model: a Hugging Face model or another torch module, a TransformerLens model, or an nnsight model.
        sae: the SAE, on the model's device.
        hook: hook that it reads (`kronsae.interventions.sites.find_site`): ``"layers.6"``, or by TransformerLens' name
            ``"blocks.6.hook_resid_post"``, also in a Hugging Face model.
        write: hook that a transcoder writes; None: ``hook``, for an SAE.
        error: ``"keep"`` adds the reconstruction error, ``"drop"`` leaves only the reconstruction.
        edit: function of the codes ``[S, T, K]`` that returns the codes to decode, with any K.

    Raises:
        UserError: a hook names no place, or the SAE does not fit it: another width or device (in the forward pass), a
            crosscoder, or a transcoder without ``write``.

    Example:
        >>> from kronsae.data.model import load_model, ModelConfig
        >>> from kronsae.runs.recipes import topk
        >>> model = load_model(ModelConfig(name="bundled", device="cpu")).model
        >>> sae = topk(d_sae=64, k=4).shape(model.config.hidden_size).build()
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> plain = model(tokens).logits
        >>> with attach(model, sae, "layers.3") as attached:
        ...     logits = model(tokens).logits
        >>> bool((logits == plain).all())
        True
        >>> logits[0, -1, 7].backward()
        >>> attached.codes.values.grad.shape
        torch.Size([1, 3, 4])
    """
    return Attached(model, sae, hook, write=write, error=error, edit=edit)


def _check(sae: SAE, write: str | int | None, error: str) -> None:
    if error not in (kinds := get_args(Error)):
        raise UserError(f"error must be one of {', '.join(kinds)}; got {error!r}.{nearest(str(error), kinds)}")
    role = sae.config.role
    if "crosscoder" in role:
        raise UserError(
            f"sae must read a single hook and write a single hook; got a {role}, whose codes need hooks that run after "
            "the first one it writes. Use an SAE or a transcoder."
        )
    if role and write is None:
        raise UserError(
            f"write must name the hook that a {role} writes; got none. Give write=, such as 'layers.6.mlp'."
        )
    if not role and write is not None:
        raise UserError(
            f"write is for transcoders; got '{write}' with an SAE that writes the hook it reads. Leave it out."
        )


def _checked(edited: object, codes: SparseCodes) -> SparseCodes:
    """Return edited codes after checking that they fit the dictionary and the tokens."""
    if not isinstance(edited, SparseCodes):
        raise UserError(f"edit must return SparseCodes; got {type(edited).__name__}.")
    if edited.d_sae != codes.d_sae or edited.values.shape[:-1] != codes.values.shape[:-1]:
        raise UserError(
            f"edit must return codes of the same tokens and dictionary, {list(codes.values.shape[:-1])} tokens and "
            f"{codes.d_sae} latents; got {list(edited.values.shape[:-1])} and {edited.d_sae}."
        )
    indices = edited.indices
    if indices.shape != edited.values.shape or bool(((indices < 0) | (indices >= codes.d_sae)).any()):
        raise UserError(f"edit must return an index from 0 to {codes.d_sae - 1} for each value; it does not.")
    return SparseCodes(edited.values.to(codes.values.dtype), indices, edited.d_sae)
