"""Shapes of language models: known ones, those of a local ``config.json``, or given by hand. Nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kronsae import bundled
from kronsae.core.checks import check_count
from kronsae.data.model import BUNDLED, DTYPES, ModelConfig
from kronsae.data.pretrained import empty_model
from kronsae.runs.memory import model_bytes
from kronsae.support.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a language model.

    Args:
        name: its name.
        d_in: D, width of its residual stream.
        layers: L, transformer blocks.
        parameters: all parameters.
        embedding_parameters: those of the embedding of tokens and of the head: 0 if the vocabulary is not known.
        weights_bytes: size of the weights in memory, in their dtype.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        source: where the sizes are from.
    """

    name: str
    d_in: int
    layers: int
    parameters: int
    embedding_parameters: int
    weights_bytes: int
    dtype: str
    source: str

    def __post_init__(self) -> None:
        if self.parameters <= self.embedding_parameters:
            raise UserError(
                f"parameters must be more than the {self.embedding_parameters:,} of the embedding; got "
                f"{self.parameters:,}. Change --parameters, --d-in or --vocabulary."
            )

    @property
    def layer_parameters(self) -> float:
        """Parameters of one block: all but those of embedding and head, divided by the layers."""
        return (self.parameters - self.embedding_parameters) / self.layers

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return DTYPES[self.dtype].itemsize

    def layers_run(self, hooks: Sequence[str]) -> int:
        """Return the number of blocks that run until the last hook is read.

        Raises:
            UserError: a hook names a layer that the model does not have.
        """
        return max(self._layer_of(hook) for hook in hooks)

    def _layer_of(self, hook: str) -> int:
        found = re.search(r"(?:^|\.)(\d+)(?:\.|:|$)", hook)
        if found is None:
            return self.layers
        if int(found[1]) >= self.layers:
            raise UserError(
                f"hook must name a layer from 0 to {self.layers - 1}; got '{hook}'. The model has {self.layers} layers."
            )
        return int(found[1]) + 1


@dataclass(frozen=True, kw_only=True)
class GivenShape:
    """Sizes given by hand, which replace known ones; None: not given."""

    d_in: int | None = None
    layers: int | None = None
    parameters: int | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None:
                check_count(name, value)


def whole(value: float | None) -> Any:
    """Return a number such as 70e9 as an integer if it is whole; anything else as it is, for `GivenShape` to refuse."""
    return int(value) if value is not None and value % 1 == 0 else value


@dataclass(frozen=True)
class Known:
    """Sizes of a known model; ``tied``: the head shares the embedding's weights."""

    d_in: int
    layers: int
    parameters: int
    vocabulary: int
    tied: bool


KNOWN_MODELS: dict[str, Known] = {
    "smollm2": Known(576, 30, 134_515_008, 49_152, True),
    "gpt2": Known(768, 12, 124_439_808, 50_257, True),
    "gpt2-xl": Known(1600, 48, 1_557_611_200, 50_257, True),
    "pythia-70m": Known(512, 6, 70_426_624, 50_304, False),
    "pythia-160m": Known(768, 12, 162_322_944, 50_304, False),
    "pythia-410m": Known(1024, 24, 405_334_016, 50_304, False),
    "pythia-1.4b": Known(2048, 24, 1_414_647_808, 50_304, False),
    "pythia-2.8b": Known(2560, 32, 2_775_208_960, 50_304, False),
    "pythia-6.9b": Known(4096, 32, 6_857_302_016, 50_432, False),
    "pythia-12b": Known(5120, 36, 11_846_072_320, 50_688, False),
    "gemma-2-2b": Known(2304, 26, 2_614_341_888, 256_000, True),
    "gemma-2-9b": Known(3584, 42, 9_241_705_984, 256_000, True),
    "gemma-2-27b": Known(4608, 46, 27_227_128_320, 256_000, True),
    "qwen2.5-0.5b": Known(896, 24, 494_032_768, 151_936, True),
    "qwen2.5-1.5b": Known(1536, 28, 1_543_714_304, 151_936, True),
    "qwen2.5-7b": Known(3584, 28, 7_615_616_512, 152_064, False),
    "qwen2.5-72b": Known(8192, 80, 72_706_203_648, 152_064, False),
    "mistral-7b-v0.1": Known(4096, 32, 7_241_732_096, 32_000, False),
    "llama-3.2-1b": Known(2048, 16, 1_235_814_400, 128_256, True),
    "llama-3.2-3b": Known(3072, 28, 3_212_749_824, 128_256, True),
    "llama-3.1-8b": Known(4096, 32, 8_030_261_248, 128_256, False),
    "llama-3.1-70b": Known(8192, 80, 70_553_706_496, 128_256, False),
}
"""Models by the last part of their name on the Hub in small letters, without ``-instruct``, ``-it`` or ``-deduped``."""


def known_model(name: str) -> Known | None:
    """Return the sizes of a model of `KNOWN_MODELS` by its name or its name on the Hub."""
    short = re.sub(r"-(instruct|it|deduped)$", "", name.lower().rpartition("/")[2])
    return KNOWN_MODELS.get(short)


def find_model(config: ModelConfig, given: GivenShape | None = None) -> ModelShape:
    """Return the shape of a language model from what is given, a local ``config.json`` or `KNOWN_MODELS`.

    Raises:
        UserError: none of these says enough, or what is given is contradictory.
    """
    given = GivenShape() if given is None else given
    name, element = config.name, DTYPES[config.dtype].itemsize
    by_hand = {key: value for key, value in asdict(given).items() if value is not None}
    folder = bundled.path() if name == BUNDLED else Path(name).expanduser()
    if (folder / "config.json").is_file():
        found = _of_folder(config, folder)
        source = f"config.json of {name}"
    elif (known := known_model(name)) is not None:
        found = asdict(known) | {"weights_bytes": known.parameters * element}
        source = "table of known models"
    elif {"d_in", "layers", "parameters"} <= by_hand.keys():
        found, source = {"vocabulary": 0, "tied": True}, ""
    else:
        raise UserError(
            f"model must be a known one, a folder with a config.json, or described by --d-in, --layers and "
            f"--parameters; got '{name}'.{nearest(name.lower(), KNOWN_MODELS)} Known: {', '.join(KNOWN_MODELS)}."
        )
    if by_hand:
        source = f"{source}; given: {', '.join(by_hand)}" if source else "given"
        found |= by_hand
    if "parameters" in by_hand:
        found["weights_bytes"] = found["parameters"] * element
    copies = 1 if found["tied"] else 2
    return ModelShape(
        name=name,
        d_in=found["d_in"],
        layers=found["layers"],
        parameters=found["parameters"],
        embedding_parameters=copies * found["vocabulary"] * found["d_in"],
        weights_bytes=found["weights_bytes"],
        dtype=config.dtype,
        source=source,
    )


def _of_folder(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Return the sizes of a model that is built without values from a folder's ``config.json``."""
    model: Any = empty_model(config.name, str(folder), DTYPES[config.dtype])
    text = model.config.get_text_config()
    vocabulary, d_in = model.get_input_embeddings().weight.shape
    return {
        "d_in": d_in,
        "layers": text.num_hidden_layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": vocabulary,
        "tied": model.get_output_embeddings() is None or bool(model.config.tie_word_embeddings),
        "weights_bytes": model_bytes(model),
    }


STREAM_HOOK = re.compile(r"(?:[\w.]+\.)?\d+(?:\.(?:mlp|attn|self_attn|attention|feed_forward))?(?::(?:in|out)put)?")
"""Hooks with the width of the residual stream: a block, its MLP or its attention, and their inputs."""


def hook_widths(shape: ModelShape, hooks: Sequence[str], given_width: int | None) -> Mapping[str, int]:
    """Return the width of the activations of each hook.

    Raises:
        UserError: the width of a hook follows neither from its name nor from ``given_width``.
    """
    for hook in hooks:
        if given_width is None and STREAM_HOOK.fullmatch(hook) is None:
            raise UserError(
                f"hook must be a block, its MLP or its attention, whose width is the model's, or --d-in must be given; "
                f"got '{hook}'."
            )
    return dict.fromkeys(hooks, shape.d_in if given_width is None else given_width)
