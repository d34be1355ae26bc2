"""``kronsae recipes`` and ``kronsae architectures``: lists of recipes and of architectures."""

from __future__ import annotations

import shlex
from typing import Any

from kronsae.support.terminal import Json, print_json, what_now

OPTIONS = """\
Further options of --sae. Of Kronecker encoders: null_symbols=true (a base or an extension may be absent), d_trunk=256
(latents with rows of their own). Of SAEs with sparsifier topk: pursuit_rounds=2 (codes are pursued)."""


def list_recipes(as_json: Json = False) -> None:
    """List the recipes for `kronsae train --recipe`."""
    from kronsae.runs import recipes

    described = {name: recipes.describe(recipe) for name, recipe in recipes.RECIPES.items()}
    if as_json:
        print_json(described)
    else:
        for name, description in described.items():
            print(f"{name}: {description}")
    what_now("kronsae train --recipe NAME --out runs/NAME")


def list_architectures(as_json: Json = False) -> None:
    """List the architectures that can be trained, the parts of each, and a command that trains a small one."""
    from kronsae.runs.architectures import ARCHITECTURES

    rows = [architecture(name, spec) for name, spec in ARCHITECTURES.items()]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            parts = ", ".join(f"{part} {row[part]}" for part in ("role", "encoder", "sparsifier", "loss", "experts"))
            print(f"{row['name']}: {parts}\n    {row['train']}")
        print(OPTIONS)
    what_now("one of these commands, then `kronsae eval` on its run folder")


def architecture(name: str, spec: str) -> dict[str, Any]:
    """Return the parts of an architecture, its ``--sae`` specification, and a command that trains a small one."""
    from kronsae.runs.parsing import parse_sae

    member = parse_sae(spec)
    experts = getattr(member.encoder, "num_experts", 1)
    return {
        "name": name,
        "role": member.shape(1).role or "autoencoder",
        "encoder": getattr(member.encoder, "expert", member.encoder).kind,
        "sparsifier": member.sparsifier.kind,
        "loss": member.loss.kind,
        "experts": experts,
        "sae": spec,
        "train": f"kronsae train --recipe tiny --sae {shlex.quote(spec)} --out runs/{name}",
    }
