"""Places in a running model, whichever library holds it: Hugging Face, TransformerLens, nnsight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kronsae.core.sae import SAE
from kronsae.data.model import HookPoint, resolve_hook
from kronsae.interop.hook_names import family_of, from_transformer_lens
from kronsae.support.errors import UserError, nearest


def find_site(model: Any, hook: str | int) -> HookPoint:
    """Return the place that a hook names in a model.

    - A Hugging Face model, or any other torch module: as `kronsae.data.model.resolve_hook`; a name of TransformerLens,
      such as ``blocks.6.hook_resid_post``, means the module whose input or output has this activation
      (`kronsae.interop.hook_names`).
    - A TransformerLens model (``HookedTransformer`` or the bridge): the name of a hook point, such as
      ``blocks.6.hook_resid_post``; a number n means ``blocks.n.hook_resid_post``.
    - An nnsight model: as for the torch module that it wraps, whose weights must be loaded (``dispatch=True``).

    Raises:
        UserError: it is no model, or the hook names no place in it.
    """
    module = _torch_module(model)
    points = getattr(module, "hook_dict", None)
    if not isinstance(points, Mapping):
        return resolve_hook(module, _our_name(module, hook))
    name = f"blocks.{hook}.hook_resid_post" if isinstance(hook, int) or hook.isdecimal() else hook
    if name not in points:
        raise UserError(
            f"hook must name a hook point of the TransformerLens model, such as 'blocks.0.hook_resid_post'; got "
            f"'{hook}'.{nearest(name, points)}"
        )
    return HookPoint(name, points[name])


def _our_name(module: nn.Module, hook: str | int) -> str | int:
    """Return our name of a hook that is a name of TransformerLens; every other hook is returned as it is.

    Raises:
        UserError: no module of the model gives what the name of TransformerLens means.
    """
    if not isinstance(hook, str) or not re.fullmatch(r"hook_embed|blocks\.\d+\.(?:\w+\.)*hook_\w+", hook):
        return hook
    family = family_of(getattr(getattr(module, "config", None), "model_type", None))
    found = from_transformer_lens(hook, family)
    if found == hook:
        what = "a model of this architecture" if family is None else "this model"
        raise UserError(
            f"hook must be an activation that a module of the model gives or is given, such as 'layers.0'; "
            f"TransformerLens' '{hook}' is not known to be one in {what}. Give the path of a module."
        )
    return found


def check_fits(sae: SAE, site: HookPoint, hidden: Tensor, width: int, what: str = "d_in") -> None:
    """Refuse activations of another width or device than the SAE's.

    Args:
        sae: the SAE.
        site: where the activations are.
        hidden: the activations, ``[S, T, width]``.
        width: the width that the SAE has there.
        what: its name.

    Raises:
        UserError: the width or the device differs.
    """
    if hidden.shape[-1] != width:
        raise UserError(
            f"{what} of the SAE must equal the width of hook '{site.name}', {hidden.shape[-1]}; got {what}={width}. "
            "Give the hook that the SAE was trained on."
        )
    if hidden.device != sae.W_dec.device:
        raise UserError(
            f"the SAE must be on the model's device, {hidden.device}; got {sae.W_dec.device}. Move it with "
            "sae.to(device)."
        )


def _torch_module(model: Any) -> nn.Module:
    """Return the torch module of a model; that which an nnsight model wraps."""
    if any(base.__module__.partition(".")[0] == "nnsight" for base in type(model).__mro__):
        model = model.__dict__.get("_module")
        if isinstance(model, nn.Module) and any(weight.is_meta for weight in model.parameters()):
            raise UserError("the nnsight model must have its weights loaded. Load it with dispatch=True.")
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model must be a torch module, a TransformerLens model or an nnsight model; got {type(model).__name__}."
        )
    return model
