"""KronSAE: sparse autoencoders with Kronecker-factorised encoders.

Train several SAEs side by side on a language model's activations, compare them, look inside, load them again.
Only PyTorch is imported here; models, data sets and reports are imported by the functions that use them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from kronsae.support.openmp import brief_spinning as _brief_spinning

with _brief_spinning():  # PyTorch is loaded here
    from kronsae.support.vector_math import warm_up as _warm_up

if TYPE_CHECKING:
    from kronsae.core.checkpoint import save
    from kronsae.core.codes import SparseCodes
    from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
    from kronsae.core.gates import mand
    from kronsae.core.metrics import explained_variance
    from kronsae.core.objective import AuxKConfig
    from kronsae.core.pursuit import Pursuit
    from kronsae.core.registration import register_encoder
    from kronsae.core.sae import SAE, SAEConfig
    from kronsae.core.sparsifiers import TopKConfig
    from kronsae.interventions.attach import attach
    from kronsae.interventions.intervene import intervene
    from kronsae.runs.architectures import batch_topk, jumprelu, kron, matryoshka, switch, topk
    from kronsae.runs.config import RunConfig
    from kronsae.runs.loading import load
    from kronsae.runs.run import Run, open_run, train
    from kronsae.support.errors import UserError
    from kronsae.sweeps.sweep import sweep
    from kronsae.training.config import MemberConfig, OptimizerConfig

__version__ = _version("kronsae")

_HOMES = {
    "AuxKConfig": "core.objective",
    "DenseEncoderConfig": "core.encoders",
    "KroneckerEncoderConfig": "core.encoders",
    "MemberConfig": "training.config",
    "OptimizerConfig": "training.config",
    "Pursuit": "core.pursuit",
    "Run": "runs.run",
    "RunConfig": "runs.config",
    "SAE": "core.sae",
    "SAEConfig": "core.sae",
    "SparseCodes": "core.codes",
    "TopKConfig": "core.sparsifiers",
    "UserError": "support.errors",
    "attach": "interventions.attach",
    "batch_topk": "runs.architectures",
    "explained_variance": "core.metrics",
    "intervene": "interventions.intervene",
    "jumprelu": "runs.architectures",
    "kron": "runs.architectures",
    "load": "runs.loading",
    "mand": "core.gates",
    "matryoshka": "runs.architectures",
    "open_run": "runs.run",
    "register_encoder": "core.registration",
    "save": "core.checkpoint",
    "sweep": "sweeps.sweep",
    "switch": "runs.architectures",
    "topk": "runs.architectures",
    "train": "runs.run",
}

__all__ = [
    "SAE",
    "AuxKConfig",
    "DenseEncoderConfig",
    "KroneckerEncoderConfig",
    "MemberConfig",
    "OptimizerConfig",
    "Pursuit",
    "Run",
    "RunConfig",
    "SAEConfig",
    "SparseCodes",
    "TopKConfig",
    "UserError",
    "__version__",
    "attach",
    "batch_topk",
    "explained_variance",
    "intervene",
    "jumprelu",
    "kron",
    "load",
    "mand",
    "matryoshka",
    "open_run",
    "register_encoder",
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
