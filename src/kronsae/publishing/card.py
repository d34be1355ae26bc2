"""The model card of a run: ``README.md`` of its Hub repository, written from the run's files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from kronsae.core import checkpoint
from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.sae import SAEConfig
from kronsae.publishing.public import Origin, origin_of
from kronsae.runs.config import RunConfig
from kronsae.runs.evaluation import known_evaluation
from kronsae.runs.folder import RunFolder
from kronsae.support.errors import UserError
from kronsae.training.config import MemberConfig

DEFAULT_LICENSE = "apache-2.0"
TAGS = ("kronsae", "sparse-autoencoder", "mechanistic-interpretability")

_GATES = {"mand": "(u * v).sqrt()", "relu_product": "u * v"}
"""Gates that the plain code of the card computes from positive parents; those with a minimum have ties, which TopK
may break in another way."""


@dataclass(frozen=True)
class Subject:
    """An SAE of the run: its training, its shape as saved, and the shape of its weights."""

    name: str
    member: MemberConfig
    shape: SAEConfig
    weights: Mapping[str, tuple[int, ...]]
    sha256: str


def model_card(
    run: RunFolder, repository: str, names: Sequence[str], *, license: str = DEFAULT_LICENSE, with_saelens: bool = False
) -> str:
    """Return the card: front matter for the Hub, and what, how trained, figures, how to load, licence.

    Args:
        run: a finished run.
        repository: ``user/repo``, named in the code for loading.
        names: SAEs that the repository holds.
        license: identifier of the licence as the Hub knows it, such as ``apache-2.0``.
        with_saelens: whether the repository holds folders in SAELens' format too.

    Raises:
        UserError: the licence is not an identifier.
    """
    from huggingface_hub import ModelCardData

    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise UserError(
            f"license must be an identifier of the Hub in lower case, such as apache-2.0, mit or cc-by-4.0; got "
            f"'{license}'."
        )
    config = run.config
    subjects = [_subject(run, name) for name in names]
    model, text = origin_of(config.model.name), origin_of(config.text.source)
    kinds = sorted({part for one in subjects for part in (one.shape.encoder.kind, one.shape.role) if part})
    front = ModelCardData(
        library_name="kronsae",
        license=license,
        base_model=model.hub_name,
        datasets=[text.hub_name] if text.hub_name else None,
        tags=[*TAGS, *kinds, *(["saelens"] if with_saelens else [])],
    )
    body = [
        f"# {repository.partition('/')[2]}",
        _introduction(config, subjects, model),
        "## SAEs",
        _sizes(config, subjects),
        "## Training",
        _training(config, subjects, model, text),
        "## Evaluation",
        _evaluation(run, names),
        "## Loading",
        _loading(config, subjects, model, repository, with_saelens),
        "## Licence",
        f"The weights are licensed under {license}. The licence of the language model applies to it, not to these "
        "weights.",
    ]
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"


def _subject(run: RunFolder, name: str) -> Subject:
    folder = run.sae_folder(name)
    about = checkpoint.read_config(folder)
    shape = checkpoint.read_shape(folder)
    with torch.device("meta"):
        weights = {key: tuple(tensor.shape) for key, tensor in shape.build_empty().state_dict().items()}
    member = next(one for one in run.config.saes if one.name == name)
    return Subject(name, member, shape, weights, str(about.get("weights_sha256", "")))


def _introduction(config: RunConfig, subjects: Sequence[Subject], model: Origin) -> str:
    several = len(subjects) > 1
    what = f"{len(subjects)} sparse autoencoders (SAEs)" if several else "A sparse autoencoder (SAE)"
    hooks = sorted({hook for one in subjects for hook in one.member.reads(config.hook)})
    listed = ", ".join(f"`{hook}`" for hook in hooks)
    return (
        f"{what} trained on activations of the language model {model} at {listed}, with kronsae {version('kronsae')}. "
        "Weights are safetensors, configs JSON; loading executes no code."
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _sizes(config: RunConfig, subjects: Sequence[Subject]) -> str:
    rows = []
    for one in subjects:
        sizes = ", ".join(f"{name}={size}" for name, size in one.shape.sizes.items())
        read, write = (
            " + ".join(f"`{hook}`" for hook in of(config.hook)) for of in (one.member.reads, one.member.writes)
        )
        numbers = sum(map(math.prod, one.weights.values()))
        rows.append([one.name, one.shape.architecture, sizes, read, write, f"{numbers:,}", f"`{one.sha256}`"])
    headings = ("SAE", "architecture", "sizes", "reads", "reconstructs", "weights", "SHA-256 of the weights file")
    return _table(headings, rows)


def _training(config: RunConfig, subjects: Sequence[Subject], model: Origin, text: Origin) -> str:
    revision = f", revision `{config.model.revision}`" if config.model.revision else ""
    subset = f", subset `{config.text.subset}`" if config.text.subset else ""
    loop = config.loop
    budget = f"{loop.flops:g} FLOPs per SAE" if loop.tokens is None else f"{loop.tokens:,} tokens"
    shared = (
        f"Model: {model}{revision}, {config.model.dtype}. Text: {text}{subset}, in windows of {config.context_length} "
        f"tokens. Budget: {budget}, {loop.batch_tokens:,} tokens per step. Hooks are module paths of the Hugging Face "
        "model, counted from 0; `:input` means the input of the module."
    )
    rows = [
        [
            one.name,
            one.member.shape(1, config.hook).architecture,
            f"{one.member.optimizer.lr:g}",
            f"{one.member.optimizer.warmup_share:g}",
            one.member.normalize_activations,
            str(one.member.seed),
        ]
        for one in subjects
    ]
    headings = ("SAE", "trained as", "learning rate (AdamW)", "share of warm-up", "normalisation, folded in", "seed")
    return f"{shared}\n\n{_table(headings, rows)}"


_FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "explained_variance": ("explained variance", "{:.4f}".format),
    "l0": ("l0", "{:.1f}".format),
    "dead_share": ("dead latents", "{:.1%}".format),
    "ce_recovered": ("CE recovered", "{:.4f}".format),
    "kl_recovered": ("KL recovered", "{:.4f}".format),
}


def _evaluation(run: RunFolder, names: Sequence[str]) -> str:
    kept = known_evaluation(run.folder / "evaluation.json")
    rows = [] if kept is None else [row for row in kept["saes"] if row["name"] in names]
    if not rows:
        return "These SAEs were not evaluated: the run holds no evaluation (`kronsae eval RUN`)."
    cells = [
        [row["name"], *("not measured" if row[key] is None else form(row[key]) for key, (_, form) in _FIGURES.items())]
        for row in rows
    ]
    tokens = rows[0]["evaluation_tokens"]
    return (
        _table(["SAE", *(heading for heading, _ in _FIGURES.values())], cells)
        + f"\n\nOn {tokens:,} held-out tokens of the same text. Explained variance is 1 - sum of squared errors / sum "
        "of squared deviations from the mean; l0 is the mean number of active latents per token; a latent is dead if "
        "it was active on none of these tokens. CE and KL recovered are the share of the language model's predictions "
        "that remains when the reconstruction replaces the activations."
    )


def _loading(config: RunConfig, subjects: Sequence[Subject], model: Origin, repository: str, with_saelens: bool) -> str:
    first = subjects[0]
    reads = " + ".join(first.member.reads(config.hook))
    skip = ", x" if first.shape.skip else ""
    ours = f"""With kronsae, which implements [KronSAE](https://arxiv.org/abs/2505.22255):

```python
import kronsae as ks

sae = ks.load("{repository}", "{first.name}")  # revision= takes a branch, a tag or a commit
codes = sae.encode(x)  # x [..., {first.shape.d_in}]: activations of {model.name} at {reads}, in the dtype of sae.W_dec
x_hat = sae.decode(codes{skip})
```"""
    return "\n\n".join([ours, _in_saelens(first, repository, with_saelens), _in_torch(first, repository)])


def _in_saelens(first: Subject, repository: str, with_saelens: bool) -> str:
    needs_ours = not isinstance(first.shape.encoder, DenseEncoderConfig)
    registered = "import kronsae.interop.saelens  # registers the Kronecker architectures\n" if needs_ours else ""
    if not with_saelens:
        return (
            "With SAELens: this repository holds no folders in its format; `kronsae export RUN --to saelens` writes "
            "them, and `kronsae push --with saelens` uploads them."
        )
    return f"""With [SAELens](https://github.com/decoderesearch/SAELens):

```python
{registered}from sae_lens import SAE

sae = SAE.from_pretrained("{repository}", "saelens/{first.name}")
```"""


def _in_torch(first: Subject, repository: str) -> str:
    """Return code that computes codes and reconstruction with safetensors and torch alone."""
    tensors = "\n".join(f"- `{name}` {list(shape)}" for name, shape in first.weights.items())
    code = plain_code(first.shape)
    if code is None:
        return (
            f"With safetensors and torch alone: `saes/{first.name}/sae_weights.safetensors` holds the tensors below; "
            f"`saes/{first.name}/cfg.json` has the architecture, whose formulas are in kronsae's documentation.\n\n"
            f"{tensors}"
        )
    return f"""With safetensors and torch alone (every latent is computed, so on few tokens at a time):

```python
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

W = load_file(hf_hub_download({json.dumps(repository)}, "saes/{first.name}/sae_weights.safetensors"))
{code}
```

{tensors}"""


def plain_code(shape: SAEConfig) -> str | None:
    """Return lines of Python that give latents ``f`` and ``x_hat`` from activations ``x [B, d_in]`` and weights ``W``.

    None for an architecture whose plain form would not be short: experts, other gates, null symbols, pursuit.
    """
    encoder, sparsifier = shape.encoder, shape.sparsifier
    if shape.pursuit is not None:
        return None
    if isinstance(encoder, DenseEncoderConfig):
        lines = ['z = (x @ W["encoder.weight"].T + W["encoder.bias"]).relu()']
    elif isinstance(encoder, KroneckerEncoderConfig) and encoder.gate in _GATES and not encoder.null_symbols:
        lines = [
            'pre = torch.einsum("bd,hpd->bhp", x, W["encoder.weight"]) + W["encoder.bias"]',
            f"u, v = pre.relu().split([{encoder.d_base}, {encoder.d_extension}], dim=-1)  # bases, extensions",
            "u, v = torch.broadcast_tensors(u.unsqueeze(-1), v.unsqueeze(-2))",
            f"z = ({_GATES[encoder.gate]}).flatten(1)",
        ]
    else:
        return None
    if sparsifier.kind == "topk":
        lines += [
            f"values, indices = z.topk({sparsifier.k})",
            "f = torch.zeros_like(z).scatter(1, indices, values)",
        ]
    else:
        lines += ['f = z * (z > W["sparsifier.log_threshold"].exp())']
    skip = ' + x @ W["skip.W_skip"].T' if shape.skip else ""
    lines += [f'x_hat = f @ W["decoder.W_dec"] + W["decoder.b_dec"]{skip}']
    return "\n".join(lines)
