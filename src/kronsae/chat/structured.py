"""Greedy decoding that allows only answers of a JSON schema, for local models that do not keep to a form.

Two schemas are supported, which are those of the library's questions: a list with a fixed number of integers from an
enumeration, and an object with one string.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kronsae.support.errors import UserError


@torch.no_grad()
def structured_answer(
    model: Any, tokenizer: Any, ids_ST: Int[Tensor, "1 T"], schema: Mapping[str, Any], max_tokens: int
) -> tuple[str, int]:
    """Return the answer to a prompt as JSON of a schema, and the number of tokens that the model chose.

    An integer of a list is the allowed one whose tokens the model prefers where they differ, after the prompt and the
    list so far. A string is the greedy continuation of ``{"key": "`` up to a quotation mark, a line break, the end of
    the text or ``max_tokens``.

    Args:
        model, tokenizer: a Hugging Face causal language model.
        ids_ST: the prompt.
        schema: schema of the answer.
        max_tokens: largest length of a string.

    Raises:
        UserError: the schema is not supported.
    """
    if schema.get("type") == "array" and schema["minItems"] == schema["maxItems"]:
        choices = [json.dumps(value) for value in schema["items"]["enum"]]
        return _list(model, tokenizer, ids_ST, choices, schema["minItems"])
    if schema.get("type") == "object" and [one.get("type") for one in schema["properties"].values()] == ["string"]:
        [key] = schema["properties"]
        text, tokens = _string(model, tokenizer, ids_ST, f'{{{json.dumps(key)}: "', max_tokens)
        return json.dumps({key: text}, ensure_ascii=False), tokens
    raise UserError(f"a structured answer must be a list of fixed length or an object with one string; got {schema}.")


def _list(model: Any, tokenizer: Any, ids_ST: Tensor, choices: Sequence[str], length: int) -> tuple[str, int]:
    read = model(ids_ST[:, :-1], use_cache=True).past_key_values
    chosen: list[str] = []
    for _ in range(length):
        sofar = f"[{', '.join(chosen)}{', ' if chosen else ''}"
        ids = [tokenizer(sofar + choice, add_special_tokens=False)["input_ids"] for choice in choices]
        shared = next(place for place, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)
        new_ST = torch.cat([ids_ST[:, -1:], ids_ST.new_tensor([ids[0][:shared]])], dim=1)
        # the prompt's keys and values are read once; the list so far is short
        logits_V = model(new_ST, past_key_values=copy.deepcopy(read), use_cache=True).logits[0, -1]
        chosen.append(choices[int(logits_V[[one[shared] for one in ids]].argmax())])
    return f"[{', '.join(chosen)}]", length


def _string(model: Any, tokenizer: Any, ids_ST: Tensor, opening: str, max_tokens: int) -> tuple[str, int]:
    opening_ids = tokenizer(opening, add_special_tokens=False)["input_ids"]
    start_ST = torch.cat([ids_ST, ids_ST.new_tensor([opening_ids])], dim=1)
    length = start_ST.shape[1]

    def text_of(output_ST: Tensor) -> str:
        found: str = tokenizer.decode(output_ST[0, length:], skip_special_tokens=True)
        return found

    def is_over(output_ST: Tensor, scores: Tensor, **_: Any) -> Tensor:
        text = text_of(output_ST)
        return output_ST.new_tensor(['"' in text or "\n" in text], dtype=torch.bool)

    output_ST = model.generate(
        start_ST,
        attention_mask=torch.ones_like(start_ST),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_tokens,
        use_cache=True,
        pad_token_id=next(one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if one is not None),
        stopping_criteria=[is_over],
    )
    text = text_of(output_ST).partition("\n")[0].partition('"')[0]
    return text, output_ST.shape[1] - length
