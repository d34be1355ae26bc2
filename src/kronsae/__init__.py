"""KronSAE: sparse autoencoders with Kronecker-factorised encoders.

Train several SAEs side by side on a language model's activations, compare them, look inside, load them again.
Only PyTorch is imported here; models, data sets and reports are imported by the functions that use them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from kronsae.vector_math import warm_up as _warm_up

if TYPE_CHECKING:
    from kronsae.architectures import batch_topk, jumprelu, kron, matryoshka, switch, topk
    from kronsae.core.checkpoint import save
    from kronsae.core.codes import SparseCodes
    from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
    from kronsae.core.gates import mand
    from kronsae.core.metrics import explained_variance
    from kronsae.core.objective import AuxKConfig
    from kronsae.core.sae import SAE, SAEConfig
    from kronsae.core.sparsifiers import TopKConfig
    from kronsae.errors import UserError
    from kronsae.intervention import intervene
    from kronsae.loading import load
    from kronsae.run import Run, open_run, train
    from kronsae.run_config import RunConfig
    from kronsae.sweeping import sweep
    from kronsae.training.config import MemberConfig, OptimizerConfig

__version__ = _version("kronsae")

_HOMES = {
    "AuxKConfig": "core.objective",
    "DenseEncoderConfig": "core.encoders",
    "KroneckerEncoderConfig": "core.encoders",
    "MemberConfig": "training.config",
    "OptimizerConfig": "training.config",
    "Run": "run",
    "RunConfig": "run_config",
    "SAE": "core.sae",
    "SAEConfig": "core.sae",
    "SparseCodes": "core.codes",
    "TopKConfig": "core.sparsifiers",
    "UserError": "errors",
    "batch_topk": "architectures",
    "explained_variance": "core.metrics",
    "intervene": "intervention",
    "jumprelu": "architectures",
    "kron": "architectures",
    "load": "loading",
    "mand": "core.gates",
    "matryoshka": "architectures",
    "open_run": "run",
    "save": "core.checkpoint",
    "sweep": "sweeping",
    "switch": "architectures",
    "topk": "architectures",
    "train": "run",
}

__all__ = [
    "SAE",
    "AuxKConfig",
    "DenseEncoderConfig",
    "KroneckerEncoderConfig",
    "MemberConfig",
    "OptimizerConfig",
    "Run",
    "RunConfig",
    "SAEConfig",
    "SparseCodes",
    "TopKConfig",
    "UserError",
    "__version__",
    "batch_topk",
    "explained_variance",
    "intervene",
    "jumprelu",
    "kron",
    "load",
    "mand",
    "matryoshka",
    "open_run",
    "save",
    "sweep",
    "switch",
    "topk",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kronsae' has no attribute '{name}'")
    value = getattr(import_module(f"kronsae.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


_warm_up()
