"""``kronsae recipes`` and ``kronsae architectures``: what there is to choose from."""

from __future__ import annotations

import shlex
from typing import Any

from kronsae.support.terminal import Json, print_json, what_now


def list_recipes(as_json: Json = False) -> None:
    """List the named runs of `kronsae train --recipe`."""
    from kronsae.runs import recipes

    described = {name: recipes.describe(recipe) for name, recipe in recipes.RECIPES.items()}
    if as_json:
        print_json(described)
    else:
        for name, description in described.items():
            print(f"{name}: {description}")
    what_now("kronsae train --recipe NAME --out runs/NAME")


def list_architectures(as_json: Json = False) -> None:
    """List the SAEs of the comparison, what each is composed of, and the words that train it small."""
    from kronsae.runs.architectures import ARCHITECTURES

    rows = [architecture(name, words) for name, words in ARCHITECTURES.items()]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            parts = ", ".join(f"{part} {row[part]}" for part in ("role", "encoder", "sparsifier", "loss", "experts"))
            print(f"{row['name']}: {parts}\n    {row['train']}")
    what_now("one of these commands, and `kronsae eval` on the run folder it names")


def architecture(name: str, words: str) -> dict[str, Any]:
    """One cell of the comparison: its parts, its ``--sae`` words, and a command that trains it small."""
    from kronsae.runs.parsing import parse_sae

    member = parse_sae(words)
    experts = getattr(member.encoder, "num_experts", 1)
    return {
        "name": name,
        "role": member.shape(1).role or "autoencoder",
        "encoder": getattr(member.encoder, "expert", member.encoder).kind,
        "sparsifier": member.sparsifier.kind,
        "loss": member.loss.kind,
        "experts": experts,
        "sae": words,
        "train": f"kronsae train --recipe tiny --sae {shlex.quote(words)} --out runs/{name}",
    }
