"""Hooks as TransformerLens and SAELens name them, and our module paths, in both directions.

Covered are decoder models of the families GPT-2, GPT-NeoX, Llama, Mistral, Qwen and Gemma: blocks, their attention and
MLP, and the attention heads' outputs. A name that is not covered is kept as it is.

============================  =====================================  ==============================
TransformerLens               ours                                   activation
============================  =====================================  ==============================
hook_embed                    embed                                  token embeddings
blocks.L.hook_resid_pre       layers.L:input                         input of a block
blocks.L.hook_resid_post      layers.L                               output of a block
blocks.L.hook_attn_out        layers.L.<attention>                   output of the attention
blocks.L.hook_mlp_out         layers.L.mlp                           output of the MLP
blocks.L.mlp.hook_in          layers.L.mlp:input                     input of the MLP, after its norm
blocks.L.attn.hook_z          layers.L.<attention>.<output>:input    heads, before their output matrix
============================  =====================================  ==============================

Gemma 2 and 3 norm the outputs of attention and MLP once more, before they are added to the residual stream.
TransformerLens' hooks are after that norm: ``layers.L.post_attention_layernorm`` and
``layers.L.post_feedforward_layernorm``. ``hook_mlp_in``, the input of the norm before the MLP, and
``ln2.hook_normalized``, its output before the norm's weights, are kept as they are: no module has the second.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Family(NamedTuple):
    """Names of the modules of a family of models, in Hugging Face transformers.

    Args:
        embed: the token embeddings.
        attention: the attention in a block, its output matrix.
        attn_out: what is added to the residual stream after the attention.
        mlp_out: what is added after the MLP.
    """

    embed: str
    attention: str
    output: str
    attn_out: str
    mlp_out: str = "mlp"


FAMILIES: dict[str, Family] = {
    "gpt2": Family("transformer.wte", "attn", "c_proj", "attn"),
    "gpt_neox": Family("gpt_neox.embed_in", "attention", "dense", "attention"),
    "llama": Family("model.embed_tokens", "self_attn", "o_proj", "self_attn"),
    "gemma2": Family(
        "model.embed_tokens", "self_attn", "o_proj", "post_attention_layernorm", "post_feedforward_layernorm"
    ),
}
"""Families by the name of their config; Mistral, Qwen and Gemma 1 have the modules of Llama."""

LIKE = {
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo2"), "llama"),
    **dict.fromkeys(("gemma3", "gemma3_text"), "gemma2"),
}

ALIASES = {
    "gpt2-small": "gpt2",
    **{f"gpt2-{size}": f"gpt2-{size}" for size in ("medium", "large", "xl")},
    **{name: f"google/{name}" for name in ("gemma-2b", "gemma-7b", "gemma-2-2b", "gemma-2-9b", "gemma-2-27b")},
}
"""Names of models in TransformerLens, which files of SAELens state, and on the Hub; `hub_name` has those of Pythia."""

MLP_INPUT = "mlp.hook_in"
"""The MLP's input: a hook that SAELens adds to the models of TransformerLens."""


def family_of(model_type: str | None, model: str | None = None) -> Family | None:
    """Return the family of a model; None: not known.

    Args:
        model_type: ``config.model_type`` of the model in transformers, such as ``"gpt_neox"``; None: not known.
        model: its name, from which the family is guessed where the type is not known: ``"EleutherAI/pythia-160m"``.
    """
    if model_type is not None:
        return FAMILIES.get(LIKE.get(model_type, model_type))
    name = (model or "").rstrip("/").lower().rpartition("/")[2]
    known = (
        *(("gpt2", "gpt2"), ("pythia", "gpt_neox"), ("gpt-neox", "gpt_neox"), ("gemma-2-", "gemma2")),
        *(("gemma-3-", "gemma2"), ("gemma", "llama"), ("llama", "llama"), ("qwen", "llama"), ("mistral", "llama")),
        *(("smollm", "llama"),),
    )
    return next((FAMILIES[family] for part, family in known if part in name), None)


def hub_name(model: str) -> str:
    """Return the Hub's name of a model that TransformerLens has an alias for; any other name is returned as it is."""
    return f"EleutherAI/{model}" if re.fullmatch(r"pythia-[\w.-]+", model) else ALIASES.get(model, model)


def to_transformer_lens(hook: str, family: Family | None = None) -> str:
    """Return the name that TransformerLens has for one of our hooks; an unknown one is returned as it is.

    Args:
        hook: our hook: a module path of any length, such as ``layers.6``, ``transformer.h.6.mlp`` or
            ``model.layers.6.mlp:input``.
        family: family of the model; None: only hooks that are the same in all families are known.
    """
    path, _, side = hook.partition(":")
    output = side in ("", "output")
    families = [family] if family is not None else list(FAMILIES.values())
    if output and any(path in (one.embed, one.embed.rpartition(".")[2]) for one in families):
        return "hook_embed"
    found = re.fullmatch(r"(?:(?:.+\.)?(?:layers|layer|h|blocks)\.)?(\d+)(?:\.(.+))?", path)
    if found is None:
        return hook
    block, inside = f"blocks.{int(found[1])}", found[2]
    if inside is None:
        return f"{block}.hook_resid_{'post' if output else 'pre'}"
    if inside == "mlp" and not output:
        return f"{block}.{MLP_INPUT}"
    if family is None:
        return hook
    if inside == f"{family.attention}.{family.output}" and not output:
        return f"{block}.attn.hook_z"
    named = {family.attn_out: "hook_attn_out", family.mlp_out: "hook_mlp_out"}
    return f"{block}.{named[inside]}" if output and inside in named else hook


def from_transformer_lens(name: str, family: Family | None = None) -> str:
    """Return our hook for a name of TransformerLens; a name that is not known, or needs the family, is kept.

    Args:
        name: such as ``blocks.6.hook_resid_post``.
        family: family of the model; None: only hooks that are the same in all families are known.
    """
    if name == "hook_embed" and family is not None:
        return family.embed
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if found is None:
        return name
    block, inside = f"layers.{int(found[1])}", found[2]
    if inside == "hook_resid_post":
        return block
    if inside == "hook_resid_pre":
        return f"{block}:input"
    if inside == MLP_INPUT:
        return f"{block}.mlp:input"
    if family is None:
        return name
    places = {
        "hook_mlp_out": family.mlp_out,
        "hook_attn_out": family.attn_out,
        "attn.hook_z": f"{family.attention}.{family.output}:input",
    }
    return f"{block}.{places[inside]}" if inside in places else name
