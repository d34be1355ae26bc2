"""Encoders of a user's own, so that configs, run folders and saved SAEs can hold them."""

from __future__ import annotations

import dataclasses
from typing import TypeVar, get_args

from kronsae.core.encoders import EncoderConfig, OwnEncoderConfig
from kronsae.core.experts import SwitchEncoderConfig
from kronsae.core.trunk import TrunkEncoderConfig
from kronsae.support.config import add_to_unions
from kronsae.support.errors import UserError

T = TypeVar("T", bound=type)

ENCODER_CONFIG = ("kind", "d_sae", "block", "latents_per_token", "build", "multiply_adds")
"""What an encoder's config must have; `OwnEncoderConfig` documents each."""


def register_encoder(config: T) -> T:
    """Make a config of an encoder of your own known by its ``kind``; return it, for use as a decorator.

    The config is a frozen dataclass that implements `kronsae.core.encoders.OwnEncoderConfig`; its ``build`` returns an
    ``nn.Module`` that implements `kronsae.core.encoders.Encoder`. SAEs with it are trained, evaluated, saved and loaded
    like all others. Whoever loads one registers the encoder first: a saved SAE holds no code.

    Raises:
        UserError: the config is no frozen dataclass, lacks an attribute, or its kind is taken.

    Example:
        ``examples/own_encoder.py``
    """
    name, params = config.__name__, getattr(config, "__dataclass_params__", None)
    if params is None or not params.frozen:
        raise UserError(f"an encoder's config must be a frozen dataclass; {name} is none. Add @dataclass(frozen=True).")
    known = {field.name for field in dataclasses.fields(config)}
    lacking = [attribute for attribute in ENCODER_CONFIG if attribute not in known and not hasattr(config, attribute)]
    if lacking:
        raise UserError(
            f"an encoder's config must have {', '.join(ENCODER_CONFIG)}; {name} has no {', '.join(lacking)}. "
            "See kronsae.core.encoders.OwnEncoderConfig."
        )
    kind = getattr(config, "kind", None)
    taken = {option.kind for option in (*get_args(EncoderConfig), TrunkEncoderConfig, SwitchEncoderConfig)}
    if not isinstance(kind, str) or kind in taken:
        others = ", ".join(sorted(taken))
        raise UserError(f"kind of {name} must be a text other than {others}; got {kind!r}. Choose another one.")
    add_to_unions(config, beside=OwnEncoderConfig)
    return config
