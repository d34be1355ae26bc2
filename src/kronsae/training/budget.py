"""Number of training steps of each SAE of a group, from a budget in tokens or FLOPs."""

from __future__ import annotations

from collections.abc import Mapping

from kronsae.core.flops import training_flops
from kronsae.core.sae import SAEConfig
from kronsae.support.errors import UserError
from kronsae.training.config import LoopConfig


def member_steps(loop: LoopConfig, shapes: Mapping[str, SAEConfig]) -> dict[str, int]:
    """Return the optimiser steps of each SAE, by name, under the budget of ``loop``; rounded down to whole batches.

    - ``tokens``: ``tokens // batch_tokens``, the same for all;
    - ``flops``: the most steps whose cost by `training_flops` does not exceed ``flops``;
    - ``tokens`` with ``same_flops_as``: the SAE of that name trains on ``tokens``; every other SAE gets the same FLOPs
      (the paper's iso-FLOPs comparison).

    Raises:
        UserError: ``same_flops_as`` names none of the SAEs, or the budget gives one of them less than a batch.
    """
    if loop.flops is None and loop.same_flops_as is None:
        return dict.fromkeys(shapes, loop.steps)
    if loop.flops is not None:
        flops = int(loop.flops)
    else:
        check_reference(loop.same_flops_as, shapes)
        flops = training_flops(shapes[str(loop.same_flops_as)], loop.steps * loop.batch_tokens)
    steps = {name: flops // training_flops(shape, loop.batch_tokens) for name, shape in shapes.items()}
    for name, found in steps.items():
        if found < 1:
            raise UserError(
                f"the budget must give every SAE at least one batch; got {flops:.3g} FLOPs, but one of batch_tokens="
                f"{loop.batch_tokens} costs '{name}' {training_flops(shapes[name], loop.batch_tokens):.3g}. "
                "Enlarge the budget or use smaller batches."
            )
    return steps


def check_reference(name: str | None, names: Mapping[str, object] | list[str]) -> None:
    """Raise if ``same_flops_as`` names no SAE of the run. None means "not given" and passes."""
    if name is not None and name not in names:
        raise UserError(f"same_flops_as must name an SAE of the run: {', '.join(names)}; got '{name}'.")
