"""One SAE in training: weights, optimiser, dead-latent tracking, and the training step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.core.heads import dead_shares
from kronsae.core.metrics import explained_variance
from kronsae.core.normalization import Normalization
from kronsae.core.objective import DeadLatents, Objective, objective
from kronsae.core.sae import SAE
from kronsae.core.shares import shares
from kronsae.kernels import RowAdamW, clip_scale, collect_row_gradients
from kronsae.support.errors import UserError
from kronsae.training.config import MemberConfig, OptimizerConfig
from kronsae.training.revival import revive
from kronsae.training.sparsity import THRESHOLD_LR_FLOOR, SparsityController
from kronsae.training.split import Split, Undivided


class Diverged(UserError):
    """A member's loss, gradient or weights stopped being finite.

    Args:
        member: name of the SAE.
        what: the number or weight, its step and learning rate, and the remedy.
    """

    def __init__(self, member: str, what: str) -> None:
        super().__init__(f"training of '{member}' diverged: {what}")
        self.member, self.what = member, what


REVIVING_SHARE = 0.5  # rows reinitialised later would not converge before the learning rate has decayed


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step, as defined in `kronsae.core.metrics`, on the batch of the step.

    Losses are on the scale of training, after normalisation; explained variance does not depend on it. The dead shares
    of bases, extensions and heads are None without heads (`kronsae.core.heads.DeadShares`).
    """

    loss: float
    auxiliary_loss: float
    explained_variance: float
    l0: float
    dead_share: float
    dead_base_share: float | None
    dead_extension_share: float | None
    dead_head_share: float | None
    grad_norm: float
    lr: float
    member_seconds: float


class Member:
    """One SAE of a group, with its own optimiser and schedule; members do not affect each other.

    Args:
        config: the SAE and its training.
        d_in: width of the activations, by hook; one number: the width of every hook.
        hook: hook of the run, which the SAE reads and writes unless its config names other hooks.
        steps: number of training steps, for the schedule; it may differ between members.
        device: device of weights and optimiser.
        split: which latents this process holds.
    """

    def __init__(
        self,
        config: MemberConfig,
        d_in: int | Mapping[str, int],
        hook: str,
        steps: int,
        device: torch.device | str = "cpu",
        split: Split | None = None,
    ) -> None:
        self.config, self.steps = config, steps
        self.reads, self.writes = config.reads(hook), config.writes(hook)
        self.shape = shape = config.shape(d_in, hook)
        self.split = Undivided() if split is None else split
        self.sae = self.split.build(shape, config.seed).to(device)
        self.dead = DeadLatents(shape.d_sae, device)
        self.sparsity = SparsityController(config.sparsity, config.sparsifier.k)
        self._widths = {"read": shape.widths_read} | ({} if shape.autoencodes else {"written": shape.widths_written})
        self.normalizations: dict[str, Normalization] = {}  # of input and target; measured on the first batch
        if config.normalize_activations == "none":
            self.normalizations = {what: Normalization.identity(own, device) for what, own in self._widths.items()}
        self.seconds = 0.0
        self.optimizer = self._build_optimizer()

    def _build_optimizer(self) -> RowAdamW:
        decoder = self.sae.decoder
        groups: list[dict[str, Any]] = [
            {"params": [decoder.W_dec], "unit_norm": self.config.unit_norm_decoder},
            {"params": [decoder.b_dec, *self.sae.encoder.parameters()]},
        ]
        if self.sae.skip is not None:
            groups.append({"params": list(self.sae.skip.parameters())})
        if thresholds := list(self.sae.sparsifier.parameters()):
            groups.append({"params": thresholds, "lr_scale": self.config.sparsity.threshold_lr_scale})
        settings = self.config.optimizer
        return RowAdamW(
            groups,
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    @property
    def name(self) -> str:
        """Name of the SAE in tables and on disk."""
        return self.config.name

    @property
    def hooks(self) -> tuple[str, ...]:
        """Hooks read or written, each once."""
        return tuple(dict.fromkeys((*self.reads, *self.writes)))

    def step_on(self, batch: Mapping[str, Tensor], step: int, want_metrics: bool) -> StepMetrics | None:
        """Take one `step` on the member's own hooks of a batch; several hooks are concatenated."""
        x_BD = side_by_side(batch, self.reads)
        if self.writes == self.reads:
            return self.step(x_BD, step, want_metrics)
        return self.step(x_BD, step, want_metrics, side_by_side(batch, self.writes))

    def step(
        self,
        x_BD: Float[Tensor, "B D"],
        step: int,
        want_metrics: bool,
        target_BO: Float[Tensor, "B O"] | None = None,
    ) -> StepMetrics | None:
        """Take one optimiser step on one batch; return metrics only if wanted.

        Args:
            x_BD: input activations.
            step: index of the step, from 0.
            want_metrics: whether to compute metrics.
            target_BO: target of the reconstruction; None: the input.
        """
        started = perf_counter()
        x_BD = self._normalized("read", x_BD)
        target_BO = None if target_BO is None else self._normalized("written", target_BO)
        settings = self.config.optimizer
        lr = learning_rate(settings, step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            if "lr_scale" in group:  # thresholds
                group["lr"] = group["lr_scale"] * max(lr, THRESHOLD_LR_FLOOR * settings.lr)
        dead_C = self.dead.dead(self.config.aux_k.dead_after_tokens)
        with collect_row_gradients() as rows:  # weight gradients stay lists of row entries, never F x D tensors
            l0_weight = self.sparsity.coefficient(step, self.steps)
            result = objective(
                self.sae,
                x_BD,
                dead_C,
                self.config.aux_k,
                self.config.loss,
                l0_weight,
                target_BO,
                self.config.pursuit_learning,
            )
        self.optimizer.zero_grad()
        result.loss.backward()
        shares().add_gradients(list(self.sae.parameters()), rows)
        needs_norm = want_metrics or settings.clip_norm is not None
        norm = self.split.grad_norm(self.sae, rows) if needs_norm else 0.0
        self._check_finite(result, norm, lr, step)  # before the weights change
        self.optimizer.step(row_gradients=rows, grad_scale=clip_scale(norm, settings.clip_norm))
        self.dead.update(result.codes)
        if self.config.sparsifier.kind == "jumprelu":
            l0 = result.codes.l0()
            self.sparsity.update(l0, result.reconstruction_loss)
            self.sae.sparsifier.rescale(l0.new_tensor(self.sparsity.threshold_factor(l0, step, self.steps)))
        if self._revival_due(step, shares().tokens(len(x_BD))):
            self._revive(x_BD, result, step)
        self.seconds += perf_counter() - started
        return self._metrics(x_BD if target_BO is None else target_BO, result, lr, norm) if want_metrics else None

    def _revival_due(self, step: int, batch: int) -> bool:
        every = self.config.revive_every_tokens
        if every is None or step >= REVIVING_SHARE * self.steps:
            return False
        return (step + 1) * batch // every > step * batch // every

    def _revive(self, x_BD: Tensor, result: Objective, step: int) -> None:
        dead_F = torch.zeros(self.shape.d_sae, dtype=torch.bool, device=x_BD.device)
        dead_F[self.dead.dead(self.config.aux_k.dead_after_tokens)] = True
        generator = torch.Generator().manual_seed(hash((self.config.seed, step)) % 2**63)
        revived = revive(self.sae, self.optimizer, dead_F, x_BD, result.x_hat_BO, generator)
        self.dead.tokens_since_active_F[revived.latents_C] = 0

    def _normalized(self, what: str, x_BD: Tensor) -> Tensor:
        if what not in self.normalizations:
            self.normalizations[what] = Normalization.of(x_BD, self._widths[what])
        return self.normalizations[what](x_BD)

    def _check_finite(self, result: Objective, norm: float, lr: float, step: int) -> None:
        for what, value in (("loss", float(result.total_loss)), ("gradient's norm", norm)):
            if not math.isfinite(value):
                about = f"the {what} is {value} at step {step}. Lower its learning rate (now {lr:.2g})."
                raise Diverged(self.name, about)

    def check_weights(self, steps: int) -> None:
        """Raise if a weight is not finite: a step from a finite loss can still lead there.

        Args:
            steps: number of steps taken, for the message.

        Raises:
            Diverged: with the name of the weight.
        """
        if (name := self.sae.unsound_weight()) is not None:
            lr = learning_rate(self.config.optimizer, min(steps, self.steps) - 1, self.steps)
            about = f"the weights {name} are not finite after {steps} steps. Lower its learning rate (now {lr:.2g})."
            raise Diverged(self.name, about)

    def _metrics(self, target_BO: Tensor, result: Objective, lr: float, norm: float) -> StepMetrics:
        alive_F = self.dead.tokens_since_active_F < self.config.aux_k.dead_after_tokens
        dead = dead_shares(alive_F, self.config.encoder)
        return StepMetrics(
            loss=float(result.total_loss),
            auxiliary_loss=0.0 if result.auxiliary_loss is None else float(result.auxiliary_loss),
            explained_variance=explained_variance(target_BO, result.x_hat_BO),
            l0=float(result.codes.l0()),
            dead_share=dead.latents,
            dead_base_share=dead.bases,
            dead_extension_share=dead.extensions,
            dead_head_share=dead.heads,
            grad_norm=norm,
            lr=lr,
            member_seconds=self.seconds,
        )

    def finished_sae(self) -> SAE:
        """Return a copy of the SAE that takes raw activations: the normalisation is folded into its weights."""
        sae = self.split.whole(self.sae, self.shape)
        if self.normalizations:
            self.normalizations["read"].fold(sae, self.normalizations.get("written"))
        return sae

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that a later process needs to continue with the same bits."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for key, value in self.optimizer.state_of(parameter).items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors["dead.tokens_since_active"] = self.dead.tokens_since_active_F
        tensors["sparsity"] = self.sparsity.state
        for what, normalization in self.normalizations.items():
            tensors[f"normalization.{what}.mean"] = normalization.mean_D
            tensors[f"normalization.{what}.scale"] = normalization.scale_H
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore a result of `state`.

        Raises:
            UserError: it belongs to another SAE.
        """
        expected = {f"sae.{name}": tensor.shape for name, tensor in self.sae.state_dict().items()}
        for what, widths in self._widths.items():
            expected[f"normalization.{what}.mean"] = torch.Size((sum(widths),))
            expected[f"normalization.{what}.scale"] = torch.Size((len(widths),))
        expected |= {"dead.tokens_since_active": self.dead.tokens_since_active_F.shape, "seconds": torch.Size()}
        expected["sparsity"] = self.sparsity.state.shape
        for name, parameter in self.sae.named_parameters():
            expected |= {f"optimizer.{name}.{moment}": parameter.shape for moment in ("exp_avg", "exp_avg_sq")}
            expected[f"optimizer.{name}.step"] = torch.Size()
        wrong = [name for name, shape in expected.items() if name not in tensors or tensors[name].shape != shape]
        if wrong:
            raise UserError(f"the state of '{self.name}' is missing or misshapen in the checkpoint ({wrong[0]}).")
        self.sae.load_state_dict({name: tensors[f"sae.{name}"] for name in self.sae.state_dict()})
        for name, parameter in self.sae.named_parameters():
            prefix = f"optimizer.{name}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self.optimizer.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in own.items()}
        self.dead.tokens_since_active_F.copy_(tensors["dead.tokens_since_active"])
        self.sparsity.state.copy_(tensors["sparsity"])
        for what, widths in self._widths.items():
            parts = (tensors[f"normalization.{what}.{part}"] for part in ("mean", "scale"))
            mean_D, scale_H = (part.to(self.sae.W_dec.device, copy=True) for part in parts)
            self.normalizations[what] = Normalization(mean_D, scale_H, widths)
        self.seconds = float(tensors["seconds"])


def side_by_side(batch: Mapping[str, Tensor], hooks: Sequence[str]) -> Float[Tensor, "B D"]:
    """Return the concatenated activations of some hooks; those of a single hook are not copied."""
    parts = [batch[hook] for hook in hooks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of step ``step`` (from 0) of ``steps``.

    It increases linearly from ``lr / w`` to ``lr`` over the first ``w = warmup_share * steps`` steps. Then it is
    ``final_lr + (lr - final_lr) * (1 + cos(pi * t)) / 2`` with t from 0 to 1 over the remaining steps.
    """
    warmup = round(config.warmup_share * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
