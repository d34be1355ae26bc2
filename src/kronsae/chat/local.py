"""A local language model that answers greedily."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from kronsae.chat.question import Answer, Question
from kronsae.chat.structured import structured_answer
from kronsae.support.errors import UserError


class Loaded(Protocol):
    """Hugging Face causal language model with its tokenizer, as returned by `kronsae.data.model.load_model`."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def no_lm_head_reason(self) -> str: ...
    @property
    def max_positions(self) -> int | None: ...


class LocalModel:
    """Local transformers model: uses its chat template if it has one, greedy, one question at a time.

    Args:
        loaded: the model.
        folder: folder of its files, whose state is part of the model's identity.
        max_answer_tokens: largest length of an answer; longer ones are cut off.
        seed: seed of random numbers that a model may draw in spite of greedy decoding.
        structured: answer in the form of the question's schema only, see `kronsae.chat.structured`.

    Raises:
        UserError: the model has no language model head; or, when asked, too few positions for the question.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        folder: Path,
        max_answer_tokens: int = 300,
        seed: int = 0,
        structured: bool = False,
    ) -> None:
        if loaded.no_lm_head_reason:
            raise UserError(f"the model in {loaded.name} must answer questions, but cannot: {loaded.no_lm_head_reason}")
        if max_answer_tokens < 1:
            raise UserError(f"max_answer_tokens must be at least 1; got {max_answer_tokens!r}.")
        self._loaded, self._max_answer_tokens, self._seed = loaded, max_answer_tokens, seed
        self._structured = structured
        self._identity = {
            "kind": "local",
            "model": Path(loaded.name).resolve().name,
            "files": fingerprint(folder),
            "max_new_tokens": max_answer_tokens,
            "seed": seed,
            **({"structured": True} if structured else {}),
        }

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._identity

    @property
    def max_answer_tokens(self) -> int:
        return self._max_answer_tokens

    async def close(self) -> None:
        """Do nothing: there are no connections."""

    async def answer(self, question: Question) -> Answer:
        ids_ST = self._ids(question).to(self._loaded.device)
        length, most = ids_ST.shape[1], self._loaded.max_positions
        if most is not None and length + self._max_answer_tokens > most:
            raise UserError(
                f"the model in {self._loaded.name} takes {most:,} tokens, but a question needs {length:,} and "
                f"{self._max_answer_tokens:,} for its answer. Use one with a longer context, or lower --per-prompt."
            )
        devices = [self._loaded.device] if self._loaded.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(self._seed)
            if self._structured and question.schema is not None:
                text, tokens_out = structured_answer(
                    self._loaded.model, self._loaded.tokenizer, ids_ST, question.schema, self._max_answer_tokens
                )
                return Answer(text=text, tokens_in=length, tokens_out=tokens_out)
            output_ST = self._loaded.model.generate(
                ids_ST,
                attention_mask=torch.ones_like(ids_ST),
                do_sample=False,
                num_beams=1,
                max_new_tokens=self._max_answer_tokens,
                use_cache=True,
                pad_token_id=self._padding(),
            )
        new_T = output_ST[0, length:]
        text = self._loaded.tokenizer.decode(new_T, skip_special_tokens=True)
        return Answer(text=text, tokens_in=length, tokens_out=len(new_T))

    def _ids(self, question: Question) -> torch.Tensor:
        tokenizer = self._loaded.tokenizer
        if getattr(tokenizer, "chat_template", None):
            text = _render(tokenizer, question)
            encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            encoded = tokenizer(f"{question.instructions}\n\n{question.content}\n\nAnswer: ", return_tensors="pt")
        ids_ST: torch.Tensor = encoded["input_ids"]
        return ids_ST

    def _padding(self) -> int:
        tokenizer = self._loaded.tokenizer
        return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def _render(tokenizer: Any, question: Question) -> str:
    from jinja2 import TemplateError

    system, user = {"role": "system", "content": question.instructions}, {"role": "user", "content": question.content}
    try:
        text: str = tokenizer.apply_chat_template([system, user], tokenize=False, add_generation_prompt=True)
    except TemplateError:  # some model families have no system role
        both = {"role": "user", "content": f"{question.instructions}\n\n{question.content}"}
        text = tokenizer.apply_chat_template([both], tokenize=False, add_generation_prompt=True)
    return text


def fingerprint(folder: Path) -> str:
    """Return a hash of the names, sizes and times of a model's files, which changes with the folder's content."""
    kinds = (".safetensors", ".json", ".jinja", ".model")
    files = sorted(path for path in folder.iterdir() if path.suffix in kinds) if folder.is_dir() else []
    about = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
