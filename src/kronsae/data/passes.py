"""Which windows a language model reads at once: of similar length, and no more than is fast or fits into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kronsae.data.tokens import Tokens
from kronsae.support.errors import UserError

CPU_TOKENS = 1024
"""Most tokens of a pass on a CPU; docs/harvesting.md compares it with a whole batch."""

CPU_TOKENS_PER_THREAD = 512
"""The same per thread, so that each has enough work. Not measured."""

CPU_FIXED_TOKENS = 32
"""Time of a pass that does not depend on its windows, on a CPU: as much as so many tokens take; mostly reading the
weights. An estimate, with which docs/harvesting.md was measured."""

OTHER_FIXED_TOKENS = 1024
"""The same on another device. Not measured: launching the kernels takes a few milliseconds, whatever the windows."""

ROPE_BY_LENGTH = ("dynamic", "longrope")
"""Types of rotary embeddings whose frequencies depend on the number of columns of a pass."""

MEMORY_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "could not create a primitive",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""In the RuntimeError that PyTorch raises if memory is refused: to itself, to oneDNN, to C++, or to CUDA's libraries.

oneDNN gives no reason. The error that is raised in the end has the original one as its cause.
"""


@dataclass(frozen=True, eq=False)
class Part:
    """Some windows of a batch, without the columns in which all of them are padding (`PassSize`).

    Args:
        rows: Their rows in the batch, ascending.
        input_ids_ST, attention_mask_ST, keep_ST: As in `TokenBatch`.
    """

    rows: list[int]
    input_ids_ST: Int[Tensor, "S T"]
    attention_mask_ST: Int[Tensor, "S T"]
    keep_ST: Bool[Tensor, "S T"]


class PassSize:
    """How many windows a model is given at once. It is halved when memory runs out, and stays so.

    Where memory does not run out, it depends on the device and on the number of threads only, and not on the memory
    that is free at the moment: an interrupted run goes on with the same bits.

    Args:
        most_tokens: Most tokens of a pass, with padding, unless one window alone has more; None: any number.
        fixed_tokens: Time of a pass that does not depend on its windows, in tokens.
        all_columns: Whether every part keeps all columns of its batch, for a model whose activations of a window
            depend on the longest of its pass.
    """

    def __init__(self, most_tokens: int | None, fixed_tokens: int, *, all_columns: bool = False) -> None:
        self.most_tokens = most_tokens
        self.fixed_tokens = fixed_tokens
        self.all_columns = all_columns

    @classmethod
    def on(cls, device: torch.device, *, all_columns: bool = False) -> PassSize:
        """Return the size for a device, and on a CPU for PyTorch's number of threads."""
        if device.type == "cpu":
            most = max(CPU_TOKENS, CPU_TOKENS_PER_THREAD * torch.get_num_threads())
            return cls(most, CPU_FIXED_TOKENS, all_columns=all_columns)
        return cls(None, OTHER_FIXED_TOKENS, all_columns=all_columns)

    def tokens(self, windows: int, columns: int) -> int:
        """Return the most tokens of a pass over windows of at most so many tokens."""
        whole = windows * columns
        return whole if self.most_tokens is None else min(whole, max(self.most_tokens, columns))

    def parts(self, batch: Tokens, rows: Sequence[int] | None = None) -> list[Part]:
        """Return the windows of a batch in parts, each for one pass.

        Args:
            batch: The windows.
            rows: Rows of the windows that are meant, ascending; None: all.
        """
        windows, columns = batch.input_ids_ST.shape
        lengths = [columns] * windows if self.all_columns else window_lengths(batch)
        rows = range(len(lengths)) if rows is None else rows
        groups = window_groups([lengths[row] for row in rows], self.most_tokens, self.fixed_tokens)
        chosen = [[rows[index] for index in group] for group in groups]
        return [_part(batch, mine, max(lengths[row] for row in mine)) for mine in chosen]

    def halve(self, part: Part, device: torch.device, error: BaseException) -> None:
        """Go on with half as many windows at once (rounded up) as a part has, for which memory did not suffice.

        Raises:
            UserError: If that is a single window; its cause is ``error``, with which the pass ended.
        """
        windows, columns = part.input_ids_ST.shape
        if windows == 1:
            raise UserError(
                f"context_length must be so small that the model can read one window; the memory of {device} does not "
                f"suffice for one of {columns} tokens. Give a smaller context_length, or dtype=bfloat16."
            ) from error
        self.most_tokens = (windows + 1) // 2 * columns
        if device.type == "cuda":
            torch.cuda.empty_cache()


def depends_on_longest(config: Any) -> bool:
    """Return whether the rotary embeddings of a Hugging Face model change with the longest window of a pass."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(of_layer for of_layer in rope.values() if isinstance(of_layer, dict))]
    return any(kind.get("rope_type", kind.get("type")) in ROPE_BY_LENGTH for kind in kinds)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the device or the system has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY_WORDS)


def window_lengths(batch: Tokens) -> list[int]:
    """Return the number of columns of each window up to the last that is not padding, at least 1."""
    attended_ST = batch.attention_mask_ST.cpu().numpy() != 0
    columns = attended_ST.shape[1]
    last = columns - attended_ST[:, ::-1].argmax(axis=1)
    return [int(length) for length in np.where(attended_ST.any(axis=1), last, 1)]


def window_groups(lengths: Sequence[int], most_tokens: int | None, fixed_tokens: int) -> list[list[int]]:
    """Return a division of windows into groups that are read together, of the least time.

    The time of a group of n windows of at most t tokens is ``n * t + fixed_tokens``. Windows that are sorted by length
    are cut where the sum over the groups is smallest, which dynamic programming finds.

    Args:
        lengths: Tokens of each window.
        most_tokens: Upper bound of n * t, unless n = 1; None: no bound.
        fixed_tokens: Time of a group that does not depend on its windows.

    Returns:
        Indices of the windows of each group, ascending; groups with the longest windows first.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    longest = np.array([lengths[index] for index in order], dtype=np.int64)
    cost = np.zeros(len(order) + 1, dtype=np.int64)  # of the first windows in this order
    begin = np.zeros(len(order) + 1, dtype=np.int64)  # of the last group among them
    for end in range(1, len(order) + 1):
        starts = np.arange(end)
        tokens = (end - starts) * longest[:end]
        if most_tokens is not None:
            starts = starts[(tokens <= most_tokens) | (starts == end - 1)]
        total = cost[starts] + tokens[starts] + fixed_tokens
        best = int(total.argmin())
        cost[end], begin[end] = total[best], starts[best]
    groups: list[list[int]] = []
    end = len(order)
    while end > 0:
        start = int(begin[end])
        groups.insert(0, sorted(order[start:end]))
        end = start
    return groups


def _part(batch: Tokens, rows: list[int], columns: int) -> Part:
    return Part(
        rows,
        batch.input_ids_ST[rows, :columns],
        batch.attention_mask_ST[rows, :columns],
        batch.keep_ST[rows, :columns],
    )
