"""Any Hugging Face causal language model or encoder: loading it, and reaching into it by plain hooks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kronsae.data import gguf
from kronsae.data.hub import check_model, looks_like_path
from kronsae.data.named_models import NAMED, fetch
from kronsae.data.passes import PassSize, depends_on_longest
from kronsae.data.pretrained import load_pretrained
from kronsae.support.cache import is_whole
from kronsae.support.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = "bundled"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to run, and how.

    Args:
        name: ``"bundled"``, a name that `kronsae models` lists, a local folder, a GGUF file or a folder with one, or
            a model's name on the Hugging Face Hub.
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

    @cached_property
    def pass_size(self) -> PassSize:
        """How many windows it reads at once."""
        return PassSize.on(self.device, all_columns=depends_on_longest(getattr(self.model, "config", None)))

    def check_context_length(self, context_length: int) -> None:
        """Raise a UserError if the model cannot take so many tokens at once."""
        if self.max_positions is not None and context_length > self.max_positions:
            raise UserError(
                f"context_length must not exceed the {self.max_positions} positions of model '{self.name}'; "
                f"got {context_length}. Give at most {self.max_positions}."
            )


def load_model(config: ModelConfig) -> LanguageModel:
    """Load a model and its tokenizer; only safetensors and GGUF, and no code that comes with a model.

    A checkpoint of a causal language model is loaded with its head, any other without. A model of
    `kronsae.data.named_models` is fetched and a GGUF file dequantised at first use; both are kept in the cache, and
    stderr says so.

    Raises:
        UserError: If there is no such model or device, if its weights are incomplete or in another format, if it
            has no tokenizer, or if it is of a kind that takes two texts (encoder-decoder).
    """
    device = find_device(config.device)
    location, options = _locate(config)
    loaded = load_pretrained(config.name, location, DTYPES[config.dtype], **options)
    model = loaded.model
    model.config.use_cache = False  # a harvest never goes on from a cached past
    _own_weights(model)
    model.requires_grad_(False).eval().to(device)
    _warn_of_slow_dtype(config.dtype, device)
    return LanguageModel(
        name=config.name,
        model=model,
        tokenizer=loaded.tokenizer,
        device=device,
        no_lm_head_reason=loaded.no_lm_head_reason,
        max_positions=_max_positions(model),
    )


def _warn_of_slow_dtype(dtype: str, device: torch.device) -> None:
    """Say so if bfloat16 is emulated, as on every x86 processor whose best instructions are AVX2."""
    if dtype == "bfloat16" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        from kronsae.support.terminal import say

        say(
            "The model runs in bfloat16 on a CPU that has no instructions for it, which takes several times as long "
            "as float32 (docs/harvesting.md)."
        )


def _own_weights(model: nn.Module) -> None:
    """Copy every weight out of the mapped file it was read from, one at a time.

    A mapped weight changes, or ends the process, when the file is written to; and its address is a multiple of 16
    bytes only if its place in the file is, on which the last bits of matrix products depend.
    """
    for tensor in (*model.parameters(), *model.buffers()):  # each once, if weights are tied
        tensor.data = tensor.data.clone()


def find_device(name: str) -> torch.device:
    """Return the device of a name; ``"auto"`` is CUDA where there is any, else the CPU.

    Raises:
        UserError: If this machine has no such device.
    """
    if name == "auto":
        # not mps: it has no float64, in which norms and explained variance are summed
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = check_device(name)
    if device.type == "mps":
        raise UserError("device must have float64, which mps lacks; got 'mps'. Give 'cpu'.")
    return device


def check_device(name: torch.device | str) -> torch.device:
    """Return a device after allocating on it.

    Raises:
        UserError: this machine has no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device must be one that this machine and this build of torch have; got '{name}'. Give 'cpu'."
        ) from error
    return device


def _locate(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Return what ``from_pretrained`` takes: a folder or a name, and the options of every call."""
    if config.revision is not None and local_path(config.name) is not None:
        raise UserError(
            f"revision is for models of the Hugging Face Hub; got '{config.revision}' with model '{config.name}'. "
            "Leave it out."
        )
    folder = local_folder(config.name)
    if folder is None:
        from_cache = check_model(config.name, config.revision)
        return config.name, {"local_files_only": from_cache, "revision": config.revision or "main"}
    return str(folder), {}


def local_folder(name: str) -> Path | None:
    """Return the folder, as save_pretrained writes it, that a model's name means; None for a name on the Hub.

    A model is fetched and a GGUF file dequantised if need be.

    Raises:
        UserError: If the name can only mean a path and there is no model, or the model cannot be fetched.
    """
    path = local_path(name)
    if path is None:
        return None
    if (file := gguf.find(path, name)) is not None:
        return gguf.dequantised(file)
    if not (path / "config.json").is_file():
        raise UserError(
            f"model: folder '{name}' must hold a Hugging Face model; it has no config.json. "
            "Give the folder that save_pretrained wrote."
        )
    return path


def local_path(name: str) -> Path | None:
    """Return the folder or GGUF file that a model's name means, fetched if need be; None for a name on the Hub.

    Raises:
        UserError: If the name can only mean a path, and there is nothing, or the model cannot be fetched.
    """
    if name == BUNDLED:
        from kronsae import bundled

        return bundled.path()
    if name in NAMED:
        if not is_whole(NAMED[name].folder):
            gguf.require_packages(name)  # before something is downloaded that could not be read
        return fetch(NAMED[name])
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and gguf.is_gguf(path)):
        return path
    if looks_like_path(name) or path.exists() or gguf.is_gguf(path):
        kind = "file" if gguf.is_gguf(path) else "folder"
        raise UserError(
            f"model: there is no {kind} '{name}'. Check the path, or give a model's name on the Hugging Face Hub."
        )
    return None


def origin(name: str) -> dict[str, str]:
    """Return what exactly a named model or a GGUF file is: its file and SHA-256, and its source; else nothing."""
    if name in NAMED:
        return NAMED[name].origin
    path = Path(name).expanduser()
    if name == BUNDLED or not path.exists():
        return {}
    file = gguf.find(path, name)
    return {} if file is None else {"file": file.name, "sha256": gguf.digest(file)}


def _max_positions(model: PreTrainedModel) -> int | None:
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for path, module in model.named_modules():
        # RoBERTa and its relatives count positions from the padding index on.
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            positions = module.num_embeddings - reserved
    return positions


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
