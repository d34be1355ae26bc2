"""Made-up results of a run, as the files hold them, and a reader of the page that is made of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from kronsae.report import render, report_data

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' style='position:fixed",
    "{{ 7 * 7 }}{% raw %}",
    "<!--",
    "&lt;b&gt;",
    "\x00\x1b[31m",
    "\u202egnirts\u2066",
    "\u2028\ud800",
)
TOKENS = (" the", "↵", " def", *HOSTILE)

RUN = {
    "kronsae_version": "0.1.0",
    "config": {
        "model": {"name": "bundled", "revision": None},
        "text": {"source": "bundled"},
        "hook": "layers.3",
        "context_length": 128,
        "loop": {"tokens": 400_000, "batch_tokens": 1024},
        "seed": 0,
    },
}


def row(name: str, architecture: str, **figures: Any) -> dict[str, Any]:
    """A row of ``evaluation.json``."""
    measured = {f"{kind}_{key}": 2.0 for kind in ("ce", "kl") for key in ("clean", "spliced", "mean", "zero")}
    return {
        "name": name,
        "architecture": architecture,
        "d_in": 256,
        "d_sae": 2048,
        "parameters": 1_050_880,
        "encoder_parameters": 526_336,
        "training_flops": 1_280_000_000_000,
        "tokens": 400_000,
        "explained_variance": 0.9,
        "explained_variance_per_token": 0.88,
        "l0": 32.0,
        "dead_share": 0.25,
        "ce_recovered": 0.99,
        "kl_recovered": 0.98,
        "language_model": {"kind": "measured", "tokens": 8000} | measured,
        "seconds": 100.0,
        "evaluation_tokens": 40_000,
    } | figures


def rows() -> list[dict[str, Any]]:
    """TopK reconstructs better, KronSAE is smaller and has fewer dead latents."""
    return [
        row("topk", "dense-topk"),
        row(
            "kron",
            "kronecker-topk",
            encoder_parameters=394_752,
            explained_variance=0.87,
            dead_share=0.1,
            ce_recovered=0.985,
        ),
    ]


def metrics(names: Sequence[str] = ("topk", "kron"), lines: int = 40) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``."""
    return [
        {
            "step": step,
            "tokens": 1024 * (step + 1),
            "sae": name,
            "loss": 1000 / (step + 1),
            "explained_variance": 1 - 1 / (step + 1),
            "l0": 32.0,
            "dead_share": 0.01 * number,
        }
        for step in range(lines)
        for number, name in enumerate(names)
    ]


def context(tokens: Sequence[str] = TOKENS, *, parents: bool = False) -> dict[str, Any]:
    """A `kronsae.eval.Context`: the third token is the peak, every other one is active."""
    values = [1.5 if place == 2 else 0.5 * (place % 2) for place in range(len(tokens))]
    return {
        "tokens": list(tokens),
        "peak": 2,
        "values": values,
        "base": [2 * value for value in values] if parents else [],
        "extension": [value / 2 for value in values] if parents else [],
    }


def head_with_null_symbols(number: int, shape: tuple[int, int]) -> dict[str, Any]:
    """A `kronsae.eval.ShownHead` of a head in which a base or an extension may be absent."""
    m, n = shape
    found = head(number, (m + 1, n + 1))
    places = [(i, j) for i in range(m + 1) for j in range(n + 1)][:-1]
    for cell, (base, extension) in zip(found["cells"], places, strict=False):
        cell |= {"base": base if base < m else None, "extension": extension if extension < n else None}
        cell |= {} if base < m and extension < n else {"parents_frequency": None}
    return found | {"bases": found["bases"][:m], "extensions": found["extensions"][:n], "cells": found["cells"][:-1]}


def latent(number: int, shape: tuple[int, int] | None = None, contexts: int = 2) -> dict[str, Any]:
    """A `kronsae.eval.ShownLatent`; ``shape`` is (bases, extensions) of a Kronecker encoder."""
    m, n = shape or (1, 1)
    kron = shape is not None
    return {
        "latent": number,
        "frequency": 0.01,
        "max_activation": 1.5,
        "mean_activation": 0.7,
        "top": [context(parents=kron) for _ in range(contexts)],
        "sampled": [context(parents=kron)] if contexts else [],
        "head": number // (m * n) if kron else None,
        "base": number // n % m if kron else None,
        "extension": number % n if kron else None,
        "parents_frequency": 0.03 if kron else None,
    }


def head(number: int, shape: tuple[int, int], contexts: int = 2) -> dict[str, Any]:
    """A `kronsae.eval.ShownHead`; its last cell is dead."""
    m, n = shape
    parents = [
        {"number": i, "frequency": 0.2, "max_activation": 3.0, "top": [context()] * contexts} for i in range(max(m, n))
    ]
    cells = [latent(number * m * n + cell, shape, contexts) for cell in range(m * n)]
    cells[-1] |= {"top": [], "frequency": 0.0, "max_activation": 0.0}
    return {"head": number, "living": m * n - 1, "bases": parents[:m], "extensions": parents[:n], "cells": cells}


def latents(shape: tuple[int, int] | None = None, heads: int = 2, contexts: int = 2) -> dict[str, Any]:
    """`kronsae.eval.Evaluation.latents` of 2048 latents, half of them dead."""
    counts = [0 if number % 2 else 1 + number for number in range(2048)]
    shown = [latent(number, shape, contexts) for number in (8, 19, 45)]
    whole = [head(number, shape, contexts) for number in range(heads)] if shape else []
    return {
        "statistics": {"tokens": 40_000, "active_tokens": counts, "max_activation": [], "mean_activation": []},
        "gallery": {"tokens": 40_000, "latents": shown, "heads": whole},
    }


def whole_page(**changes: Any) -> str:
    """The page of all of this."""
    given: dict[str, Any] = {
        "run": RUN,
        "rows": rows(),
        "metrics": metrics(),
        "latents": {"topk": latents(), "kron": latents((2, 4))},
    }
    return render(report_data(**(given | changes)))


VOID = {"meta", "br", "img", "input", "link", "hr"}


@dataclass
class Element:
    """A tag with its attributes and the text directly in it."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    ancestors: list[Element] = field(default_factory=list, repr=False)

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()


class Page(HTMLParser):
    """The elements of a page, in order; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        repeated = [name for name, count in Counter(name for name, _ in attrs).items() if count > 1]
        assert not repeated, (tag, repeated)
        element = Element(tag, dict(attrs), ancestors=list(self._open))
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs), ancestors=list(self._open)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, tag
        assert self._open[-1].tag == tag, f"<{self._open[-1].tag}> is closed by </{tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1].text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def all(self, tag: str, *classes: str) -> list[Element]:
        """The elements of a tag that have all of the classes."""
        return [found for found in self.elements if found.tag == tag and set(classes) <= set(found.classes)]

    def islands(self) -> list[Any]:
        """The JSON in the page."""
        return [
            json.loads(found.text) for found in self.all("script") if found.attributes.get("type") == "application/json"
        ]

    @property
    def text(self) -> str:
        """All text outside of scripts and styles."""
        return "\n".join(found.text for found in self.elements if found.tag not in ("script", "style"))
