"""Models and tokenizers through transformers' own loaders: safe formats only, quiet, one sentence per fault."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kronsae.data.hub import one_line
from kronsae.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
    """A model as transformers loads it, with its tokenizer.

    Args:
        model: The Hugging Face model, on the CPU.
        tokenizer: Its tokenizer.
        no_lm_head_reason: Why it gives no next-token logits; ``""`` if it does.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    no_lm_head_reason: str


def load_pretrained(name: str, location: str, dtype: torch.dtype, **options: Any) -> Pretrained:
    """Load a model, with its head if the checkpoint is that of a causal language model, and its tokenizer.

    Args:
        name: What an error calls it.
        location: A folder, or a name on the Hub.
        dtype: Of the weights.
        **options: For every ``from_pretrained``: ``revision``, ``local_files_only``, ``gguf_file``.

    Raises:
        UserError: The weights are incomplete or in an unsafe format, there is no tokenizer, the model needs code of
            its own, or takes two texts (encoder-decoder).
    """
    from transformers import AutoConfig

    options = {"trust_remote_code": False} | options
    with _quiet_transformers(), _as_user_error(name):
        config = AutoConfig.from_pretrained(location, **options)
        if config.is_encoder_decoder:
            raise UserError(
                f"model must be a causal language model or an encoder; '{name}' is an encoder-decoder. "
                "Choose another model."
            )
        reason = _no_lm_head_reason(config)
        model, missing = _load_model(location, config, dtype, with_head=not reason, options=options)
        if missing and not reason and not config.architectures:  # only the type said that there is a head
            headless, missing_below = _load_model(location, config, dtype, with_head=False, options=options)
            if not missing_below:
                reason = "the checkpoint has no weights of a head for the next token"
                model, missing = headless, missing_below
        if missing:
            raise UserError(
                f"model: the weights of '{name}' must be complete; {len(missing)} are missing or misshapen, such as "
                f"{missing[0]}. Save or download the model again."
            )
        tokenizer = _load_tokenizer(name, location, options)
    return Pretrained(model=model, tokenizer=tokenizer, no_lm_head_reason=reason)


def empty_model(name: str, location: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model without values, on PyTorch's meta device, built from a folder's ``config.json``.

    It has the parameters and buffers of the model that `load_pretrained` would load.

    Raises:
        UserError: The config is not one of a causal language model or an encoder that transformers has built in.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    with _quiet_transformers(), _as_user_error(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        auto_class: Any = AutoModel if _no_lm_head_reason(config) else AutoModelForCausalLM
        model: PreTrainedModel = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
    return model


def save_pretrained(loaded: Pretrained, folder: Path) -> None:
    """Write model and tokenizer into a folder that `load_pretrained` takes: safetensors and JSON."""
    with _quiet_transformers():
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)


def _load_model(
    location: str, config: PretrainedConfig, dtype: torch.dtype, *, with_head: bool, options: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the weights that the checkpoint lacks, which transformers has drawn at random."""
    from transformers import AutoModel, AutoModelForCausalLM

    options = options | (_unpacked() if "gguf_file" in options else {"use_safetensors": True})
    auto_class: Any = AutoModelForCausalLM if with_head else AutoModel
    model, info = auto_class.from_pretrained(location, config=config, dtype=dtype, output_loading_info=True, **options)
    # The pooler of an encoder comes after all its layers, and many a checkpoint leaves it out.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    return model, missing + sorted(str(key[0]) for key in info.get("mismatched_keys", ()))


def _unpacked() -> dict[str, Any]:
    """What makes transformers dequantise a GGUF file; releases that cannot keep its blocks know no such option."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def _no_lm_head_reason(config: PretrainedConfig) -> str:
    """Why the checkpoint has no head for the next token, or ``""``.

    Where it names no architecture (GGUF does not), its type decides: causal if transformers has a causal model of it
    and no masked one, since BERT and its relatives, which are encoders, have both.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    names = config.architectures or []
    if any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in names):
        return ""
    kind = config.model_type
    if not names and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return ""
    named = " and ".join(names) or f"an unnamed architecture of type {kind}"
    return f"the checkpoint is {named}, which has no head for the next token"


def _load_tokenizer(name: str, location: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    cause = "it knows no token"  # what comes of a folder without tokenizer files
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, **options)
        if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            return tokenizer
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise
        cause = one_line(error)
    raise UserError(
        f"model: '{name}' must come with its tokenizer, and has no usable one ({cause}). Save the tokenizer into "
        "the same folder with save_pretrained."
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep the loading's log lines, progress bars and deprecations off the caller's screen."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # its functions carry no types
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _as_user_error(name: str) -> Iterator[None]:
    """Turn what transformers raises for an unusable model into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise UserError(
                f"model: '{name}' needs code of its own, and code that comes with a model is never run. Choose a "
                "model of an architecture that transformers has built in."
            ) from error
        if "safetensors" in text and isinstance(error, OSError):
            raise UserError(
                f"model: '{name}' has no safetensors weights, and pickled ones are never read. Convert them "
                "with save_pretrained."
            ) from error
        raise UserError(f"model: '{name}' cannot be loaded: {one_line(error)}.") from error
