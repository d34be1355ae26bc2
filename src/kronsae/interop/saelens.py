"""KronSAE in SAELens (sae-lens >= 6): importing this module registers our architectures there.

    import kronsae.interop.saelens
    from sae_lens import SAE

    sae = SAE.load_from_disk("exported/kron")

SAELens finds no plug-ins by itself: without this import, it knows no architecture ``kronsae_topk``. Its runner and its
command line train our architectures too::

    python -m kronsae.interop.saelens --architecture kronsae_topk --d_sae 1024 --k 32 ...

Encoder, selection and loss are those of `kronsae.core`; nothing is defined twice. The names of architectures, config
fields and tensors are in `kronsae.interop.saelens_layout`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from kronsae.support.errors import UserError

if importlib.util.find_spec("sae_lens") is None:
    raise UserError(
        "sae-lens must be installed for kronsae.interop.saelens; it was not found. Install it with: pip install "
        "'sae-lens>=6'."
    )

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)

from kronsae.interop.saelens_classes import (
    KronJumpReLUSAE,
    KronJumpReLUSAEConfig,
    KronJumpReLUTranscoder,
    KronJumpReLUTranscoderConfig,
    KronTopKSAE,
    KronTopKSAEConfig,
    KronTopKTranscoder,
    KronTopKTranscoderConfig,
    to_kronsae,
)
from kronsae.interop.saelens_training import (
    KronBatchTopKTrainingSAE,
    KronBatchTopKTrainingSAEConfig,
    KronMatryoshkaTrainingSAE,
    KronMatryoshkaTrainingSAEConfig,
    KronTopKTrainingSAE,
    KronTopKTrainingSAEConfig,
)

__all__ = [
    "KronBatchTopKTrainingSAE",
    "KronBatchTopKTrainingSAEConfig",
    "KronJumpReLUSAE",
    "KronJumpReLUSAEConfig",
    "KronJumpReLUTranscoder",
    "KronJumpReLUTranscoderConfig",
    "KronMatryoshkaTrainingSAE",
    "KronMatryoshkaTrainingSAEConfig",
    "KronTopKSAE",
    "KronTopKSAEConfig",
    "KronTopKTrainingSAE",
    "KronTopKTrainingSAEConfig",
    "KronTopKTranscoder",
    "KronTopKTranscoderConfig",
    "main",
    "register",
    "to_kronsae",
]

INFERENCE = (
    (KronTopKSAE, KronTopKSAEConfig),
    (KronJumpReLUSAE, KronJumpReLUSAEConfig),
    (KronTopKTranscoder, KronTopKTranscoderConfig),
    (KronJumpReLUTranscoder, KronJumpReLUTranscoderConfig),
)
TRAINING = (
    (KronTopKTrainingSAE, KronTopKTrainingSAEConfig),
    (KronBatchTopKTrainingSAE, KronBatchTopKTrainingSAEConfig),
    (KronMatryoshkaTrainingSAE, KronMatryoshkaTrainingSAEConfig),
)


def register() -> None:
    """Register our architectures in SAELens; those that are registered already stay."""
    for sae, config in INFERENCE:
        if config.architecture() not in SAE_CLASS_REGISTRY:
            register_sae_class(config.architecture(), sae, config)
    for sae, config in TRAINING:
        if config.architecture() not in SAE_TRAINING_CLASS_REGISTRY:
            register_sae_training_class(config.architecture(), sae, config)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line of SAELens' training runner, with our architectures among its own.

    Args:
        words: its arguments; None: those of the process.
    """
    from sae_lens.llm_sae_training_runner import _run_cli

    _run_cli(sys.argv[1:] if words is None else list(words))


register()

if __name__ == "__main__":
    main()
