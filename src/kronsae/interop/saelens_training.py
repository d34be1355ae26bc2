"""Training of our architectures by SAELens' own trainer; `kronsae.interop.saelens` registers these classes.

A step's loss is `kronsae.core.objective.objective`: the squared error, of nested prefixes for Matryoshka, and AuxK for
the latents that SAELens counts as dead. The rows of ``W_dec`` are kept at norm 1, as in our own training. Selected
latents reach the trainer as a sparse tensor, so a step creates no tensor of size tokens x d_sae.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from sae_lens import SAEConfig as LensSAEConfig
from sae_lens import TrainingSAE, TrainingSAEConfig
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.core.gates import GateName
from kronsae.core.losses import LossConfig, MatryoshkaConfig, SquaredErrorConfig, matryoshka_groups
from kronsae.core.objective import AuxKConfig, objective
from kronsae.interop.saelens_classes import KronSAEMixin, check
from kronsae.support.errors import UserError


@dataclass(kw_only=True)
class KronTopKTrainingSAEConfig(TrainingSAEConfig):  # type: ignore[misc]
    """Config of the training of a KronSAE with TopK.

    Args:
        d_base: bases per head.
        d_extension: extensions per head; there are ``d_sae / (d_base * d_extension)`` heads.
        gate: how a base and an extension compose.
        k: active latents per token.
        aux_loss_coefficient: weight of the AuxK loss.
    """

    apply_b_dec_to_input: bool = False
    decoder_init_norm: float | None = 1.0
    d_base: int = 2
    d_extension: int = 4
    gate: GateName = "mand"
    k: int = 100
    aux_loss_coefficient: float = 1 / 32

    @classmethod
    def architecture(cls) -> str:
        return "kronsae_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self)
        if self.decoder_init_norm != 1.0:
            raise UserError(
                "decoder_init_norm must be 1.0 for a KronSAE, whose decoder rows are kept at norm 1; got "
                f"{self.decoder_init_norm}."
            )

    def loss(self) -> LossConfig:
        """Return the reconstruction loss."""
        return SquaredErrorConfig()


@dataclass(kw_only=True)
class KronBatchTopKTrainingSAEConfig(KronTopKTrainingSAEConfig):
    """Config of the training of a KronSAE with BatchTopK: k latents per token on average, saved with a threshold."""

    @classmethod
    def architecture(cls) -> str:
        return "kronsae_batchtopk"

    def get_inference_config_class(self) -> type[LensSAEConfig]:
        """Return the config class that the finished SAE is saved with."""
        found: type[LensSAEConfig] = get_sae_class("kronsae_jumprelu")[1]
        return found


@dataclass(kw_only=True)
class KronMatryoshkaTrainingSAEConfig(KronBatchTopKTrainingSAEConfig):
    """Config of the training of a KronSAE with BatchTopK and the loss of nested prefixes.

    Args:
        matryoshka_widths: numbers of latents of the prefixes, increasing, the last of which is d_sae; each ends at a
            head. Empty: an eighth, a quarter, a half and all of the latents.
    """

    matryoshka_widths: list[int] = field(default_factory=list)

    @classmethod
    def architecture(cls) -> str:
        return "kronsae_matryoshka_batchtopk"

    def loss(self) -> LossConfig:
        """Return the reconstruction loss."""
        widths = self.matryoshka_widths
        if not widths:
            return MatryoshkaConfig(groups=matryoshka_groups(self.d_sae, self.d_sae // 8))
        return MatryoshkaConfig(groups=tuple(end - start for start, end in pairwise([0, *widths])))


class KronTrainingSAE(KronSAEMixin, TrainingSAE):  # type: ignore[misc]
    """What our classes for training share."""

    loss_config: LossConfig

    def initialize_weights(self) -> None:
        """Build our SAE, and check that the loss fits its encoder."""
        super().initialize_weights()
        self.loss_config = self.cfg.loss()
        self.loss_config.check(self.kronsae.config.encoder)

    def get_coefficients(self) -> dict[str, Any]:
        """Return no coefficients: nothing is warmed up."""
        return {}

    def encode(self, x: Tensor) -> Tensor:
        """Return dense latents, selected as at inference: by the learned threshold for BatchTopK."""
        return KronSAEMixin.encode(self, x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Return the reconstruction."""
        return KronSAEMixin.decode(self, feature_acts)

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return dense latents after and before the selection."""
        sae_in = self.process_sae_in(x)
        pre = self.kronsae.encoder(sae_in.reshape(-1, self.cfg.d_in)).materialize()
        return self.encode(x), pre.reshape(*sae_in.shape[:-1], self.cfg.d_sae)

    def calculate_aux_loss(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Return nothing: `training_forward_pass` computes the whole loss."""
        return {}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return the loss of a step and what the trainer logs."""
        self.kronsae.decoder.normalize()
        dead_F = step_input.dead_neuron_mask
        dead_C = None if dead_F is None else dead_F.nonzero().squeeze(1)
        with torch.autocast(self.device.type, enabled=False):
            sae_in = self.process_sae_in(step_input.sae_in)
            found = objective(
                self.kronsae, sae_in, dead_C, AuxKConfig(weight=self.cfg.aux_loss_coefficient), self.loss_config
            )
        losses = {"mse_loss": found.reconstruction_loss}
        if found.auxiliary_loss is not None:
            losses["auxiliary_reconstruction_loss"] = self.cfg.aux_loss_coefficient * found.auxiliary_loss
        acts = sparse(found.codes)
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=self.run_time_activation_norm_fn_out(found.x_hat_BO),
            feature_acts=acts,
            hidden_pre=acts,
            loss=found.loss,
            losses=losses,
        )

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Bring the rows of ``W_dec`` to norm 1, here and in what is saved, and name the tensors as in a file."""
        if self.unit_norm:
            self.kronsae.decoder.normalize()
            state_dict["kronsae.decoder.W_dec"] = self.W_dec.detach().clone()
        super().process_state_dict_for_saving(state_dict)

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Save what is left after training: a threshold per latent in place of BatchTopK's single one."""
        self.process_state_dict_for_saving(state_dict)
        if "log_threshold" in state_dict:
            state_dict["log_threshold"] = state_dict["log_threshold"].expand(self.cfg.d_sae).contiguous()


class KronTopKTrainingSAE(KronTrainingSAE):
    """Training of a KronSAE with TopK."""


class KronBatchTopKTrainingSAE(KronTrainingSAE):
    """Training of a KronSAE with BatchTopK."""


class KronMatryoshkaTrainingSAE(KronTrainingSAE):
    """Training of a Matryoshka KronSAE."""


def sparse(codes: SparseCodes) -> Tensor:
    """Return codes of a batch as a sparse tensor ``[B, d_sae]`` of their active latents."""
    tokens_N = codes.active.nonzero()[:, 0]
    places = torch.stack([tokens_N, codes.indices[codes.active]])
    values_N = codes.values.detach()[codes.active]
    return torch.sparse_coo_tensor(
        places, values_N, (len(codes.values), codes.d_sae), check_invariants=False
    ).coalesce()
