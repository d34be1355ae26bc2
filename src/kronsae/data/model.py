"""Any Hugging Face causal language model or encoder: loading it, and reaching into it by plain hooks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kronsae.data.hub import check_model, looks_like_path, one_line
from kronsae.support.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = "bundled"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to run, and how.

    Args:
        name: ``"bundled"``, a local folder, or a model's name on the Hugging Face Hub.
        revision: Branch, tag or commit of a Hub model.
        dtype: Precision of the model's weights: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"`` for CUDA where there is any, else the CPU.
    """

    name: str = BUNDLED
    revision: str | None = None
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.name:
            raise UserError("model must name a model; got ''. Give 'bundled', a folder or a Hub name.")
        if self.dtype not in DTYPES:
            raise UserError(
                f"dtype must be one of {', '.join(DTYPES)}; got '{self.dtype}'.{nearest(self.dtype, DTYPES)}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """A model with its tokenizer, in evaluation mode and without gradients of its own.

    Args:
        name: The name that it was asked for by.
        model: The Hugging Face model.
        tokenizer: Its tokenizer.
        device: Where it runs.
        no_lm_head_reason: Why it gives no next-token logits; ``""`` if it does.
        max_positions: Longest input in tokens; None if the model sets no bound.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    no_lm_head_reason: str
    max_positions: int | None

    @property
    def has_lm_head(self) -> bool:
        """Whether the model's output has ``logits`` for the next token."""
        return not self.no_lm_head_reason

    def check_context_length(self, context_length: int) -> None:
        """Raise a UserError if the model cannot take so many tokens at once."""
        if self.max_positions is not None and context_length > self.max_positions:
            raise UserError(
                f"context_length must not exceed the {self.max_positions} positions of model '{self.name}'; "
                f"got {context_length}. Give at most {self.max_positions}."
            )


def load_model(config: ModelConfig) -> LanguageModel:
    """Load a model and its tokenizer; only safetensors, and no code that comes with a model.

    A checkpoint of a causal language model is loaded with its head, any other without.

    Raises:
        UserError: If there is no such model or device, if its weights are incomplete or not safetensors, if it
            has no tokenizer, or if it is of a kind that takes two texts (encoder-decoder).
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    device = find_device(config.device)
    location, common = _locate(config)
    with _quiet_transformers(), _as_user_error(config.name):
        architecture = AutoConfig.from_pretrained(location, **common)
        if architecture.is_encoder_decoder:
            raise UserError(
                f"model must be a causal language model or an encoder; '{config.name}' is an encoder-decoder. "
                "Choose another model."
            )
        reason = _no_lm_head_reason(architecture)
        auto_class: Any = AutoModel if reason else AutoModelForCausalLM
        model, info = auto_class.from_pretrained(
            location,
            config=architecture,
            dtype=DTYPES[config.dtype],
            use_safetensors=True,
            output_loading_info=True,
            **common,
        )
        _check_complete(config.name, info)
        tokenizer = _load_tokenizer(config.name, location, common)
    model.config.use_cache = False  # a harvest never goes on from a cached past
    model.requires_grad_(False).eval().to(device)
    return LanguageModel(
        name=config.name,
        model=model,
        tokenizer=tokenizer,
        device=device,
        no_lm_head_reason=reason,
        max_positions=_max_positions(model),
    )


def find_device(name: str) -> torch.device:
    """Return the device of a name; ``"auto"`` is CUDA where there is any, else the CPU.

    Raises:
        UserError: If this machine has no such device.
    """
    if name == "auto":
        # not mps: it has no float64, in which norms and explained variance are summed
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "mps":
            raise UserError("device must have float64, which mps lacks; got 'mps'. Give 'cpu'.")
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device must be one that this machine and this build of torch have; got '{name}'. Give 'auto' or 'cpu'."
        ) from error
    return device


def _locate(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Return what ``from_pretrained`` takes: a folder or a name, and the options of every call."""
    common: dict[str, Any] = {"trust_remote_code": False}
    folder = Path(config.name).expanduser()
    if config.name == BUNDLED:
        from kronsae import bundled

        folder = bundled.path()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model: folder '{config.name}' must hold a Hugging Face model; it has no config.json. "
                "Give the folder that save_pretrained wrote."
            )
        return str(folder), common
    if looks_like_path(config.name) or folder.exists() or config.name == BUNDLED:
        raise UserError(
            f"model: there is no folder '{config.name}'. Check the path, or give a model's name on the "
            "Hugging Face Hub."
        )
    common["local_files_only"] = check_model(config.name, config.revision)
    return config.name, common | {"revision": config.revision or "main"}


def _no_lm_head_reason(config: PretrainedConfig) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = config.architectures or []
    if any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in names):
        return ""
    kind = " and ".join(names) or f"an unnamed architecture of type {config.model_type}"
    return f"the checkpoint is {kind}, which has no head for the next token"


def _check_complete(name: str, info: dict[str, Any]) -> None:
    """Raise a UserError for weights that transformers would otherwise have drawn at random."""
    # The pooler of an encoder comes after all its layers, and many a checkpoint leaves it out.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    missing += sorted(str(key[0]) for key in info.get("mismatched_keys", ()))
    if missing:
        raise UserError(
            f"model: the weights of '{name}' must be complete; {len(missing)} are missing or misshapen, such as "
            f"{missing[0]}. Save or download the model again."
        )


def _load_tokenizer(name: str, location: str, common: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    cause = "it knows no token"  # what comes of a folder without tokenizer files
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, **common)
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


def _max_positions(model: PreTrainedModel) -> int | None:
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for path, module in model.named_modules():
        # RoBERTa and its relatives count positions from the padding index on.
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            positions = module.num_embeddings - reserved
    return positions


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


SIDES = ("output", "input")


@dataclass(frozen=True, eq=False)
class HookPoint:
    """A place in a model where activations are read or replaced: a module's output, or its input.

    Args:
        path: The module's path, as ``named_modules`` gives it.
        module: The module.
        side: ``"output"`` or ``"input"``.
    """

    path: str
    module: nn.Module
    side: str = "output"

    @property
    def name(self) -> str:
        """The hook that means this place in this model, whatever it was asked for by."""
        return self.path if self.side == "output" else f"{self.path}:{self.side}"


def resolve_hook(model: nn.Module, hook: str | int) -> HookPoint:
    """Return the place that a hook names: a module, and after ``:`` its side, ``output`` where none is named.

    So ``"layers.3.mlp"`` is what the MLP of block 3 gives and ``"layers.3.mlp:input"`` what it is given. The module is
    looked for in this order: a module's exact path (``"gpt_neox.layers.6"``); a transformer block by number (``6``,
    ``"6"``, ``"layers.6"``) or a module in it (``"layers.6.mlp"``), whatever the architecture calls its blocks;
    the end of one module's path (``"h.6"``).

    Raises:
        UserError: If no module is meant, or more than one, or the side is neither.
    """
    name, colon, side = str(hook).partition(":")
    if colon and side not in SIDES:
        raise UserError(f"hook must end in ':input' or ':output' if it has a ':'; got '{hook}'.{nearest(side, SIDES)}")
    path, module = _find_module(model, name, hook)
    return HookPoint(path, module, side or "output")


def check_hooks(model: nn.Module, hooks: Sequence[str | int]) -> None:
    """Raise a UserError for a hook that names no place, and for two names of one place."""
    known: dict[str, str | int] = {}
    for hook in hooks:
        place = resolve_hook(model, hook).name
        if place in known:
            raise UserError(
                f"hooks of one place must be written alike; '{known[place]}' and '{hook}' both are '{place}'. "
                "Use one of them."
            )
        known[place] = hook


def _find_module(model: nn.Module, name: str, hook: str | int) -> tuple[str, nn.Module]:
    modules = {path: module for path, module in model.named_modules() if path}
    if re.fullmatch(r"-?\d+", name):
        name = f"layers.{name}"
    if name in modules:
        return name, modules[name]
    stack = _block_stack(modules)
    in_block = re.fullmatch(rf"(?:layers|{re.escape(stack.rpartition('.')[2])})\.(-?\d+)(\..+)?", name)
    if stack and in_block:
        count = len(list(modules[stack].children()))
        if not 0 <= int(in_block[1]) < count:
            raise UserError(
                f"hook must name a layer from 0 to {count - 1}; got '{hook}'. The model has {count} layers."
            )
        path = f"{stack}.{int(in_block[1])}{in_block[2] or ''}"
        if path in modules:
            return path, modules[path]
    ending = [path for path in modules if path.endswith(f".{name}")]
    if len(ending) == 1:
        return ending[0], modules[ending[0]]
    if ending:
        raise UserError(
            f"hook must name one module; '{hook}' ends {len(ending)} paths, such as {ending[0]} and {ending[1]}. "
            "Give the whole path."
        )
    short = [f"layers{path.removeprefix(stack)}" for path in modules if stack and path.startswith(f"{stack}.")]
    raise UserError(
        f"hook must name a module of the model, such as 'layers.0'; got '{hook}'." + nearest(name, [*short, *modules])
    )


def _block_stack(modules: dict[str, nn.Module]) -> str:
    """Return the path of the list of transformer blocks: the longest list, and of equals the outermost."""
    lists = {path: len(module) for path, module in modules.items() if isinstance(module, nn.ModuleList)}
    return max(lists, key=lambda path: (lists[path], -path.count(".")), default="")


@contextmanager
def tap(point: HookPoint, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """While inside, call ``see`` with the hidden states [S, T, D] at a point whenever its module runs.

    What it returns takes their place, cast to the model's dtype; None leaves them. A tuple keeps its other elements.

    Raises:
        UserError: If the module gives, or is given, no vector per token.
        ValueError: If ``see`` returns another shape.
    """

    def replaced(hidden_STD: Tensor) -> Tensor:
        new_STD = see(hidden_STD)
        if new_STD is None:
            return hidden_STD
        if new_STD.shape != hidden_STD.shape:
            raise ValueError(
                f"what is put in must keep the shape {tuple(hidden_STD.shape)}; got {tuple(new_STD.shape)}."
            )
        return new_STD.to(hidden_STD.dtype)

    def on_output(_module: nn.Module, _inputs: object, output: object) -> object:
        if isinstance(output, tuple) and output:
            return (replaced(_hidden(output[0], point)), *output[1:])
        return replaced(_hidden(output, point))

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (replaced(_hidden(args[0], point)), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": replaced(_hidden(kwargs.get("hidden_states"), point))}

    if point.side == "input":
        handle = point.module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = point.module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def _hidden(value: object, point: HookPoint) -> Float[Tensor, "S T D"]:
    """``value``, if it is one vector per token."""
    if not isinstance(value, Tensor) or value.ndim != 3:
        kind = f"a tensor of {value.ndim} dimensions" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(
            f"hook must name a module with one vector per token as {point.side}; '{point.name}' gives {kind}. "
            "Give a transformer block, such as 'layers.0'."
        )
    return value
