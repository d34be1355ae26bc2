"""Contexts of latents: windows of tokens with the activations of a latent and of its two parents."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import KroneckerEncoder
from kronsae.core.heads import HeadGrid, head_grid
from kronsae.core.sae import SAE
from kronsae.eval.display import NOT_A_TOKEN, TokenText
from kronsae.eval.hooked import Windows
from kronsae.eval.latents import GalleryConfig, LatentStatistics, choose_heads, choose_latents, rounded
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError

MAX_SIGNALS = 2**24  # activations held densely at once: 64 MiB
POOL = 64  # contexts drawn at random per latent, of which the bands are made
CANDIDATES = 8  # windows stored per context of the largest activations, so that near-copies can be skipped
NEAR_COPY = 0.5  # 1 to 2% of pairs of code windows at the same token share more of their tokens; table rows often do
ABSENT = ("pre", -1)  # column of the parent that a latent of a head with null symbols does not have: 0 everywhere
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Context:
    """A window of text around one activation; the tuples have one entry per token.

    Args:
        tokens: the text of each token, with visible control characters.
        peak: index of the token that the window was selected for.
        values: activations of the latent (or base, or extension) that the context belongs to.
        base: ``relu(u)`` of the latent's base for a Kronecker encoder, else empty; 0 if it is absent (null symbols).
        extension: ``relu(v)`` of the latent's extension, likewise.
    """

    tokens: tuple[str, ...]
    peak: int
    values: tuple[float, ...]
    base: tuple[float, ...] = ()
    extension: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Band:
    """One of several quantile bands of a latent's activations, with contexts drawn from it.

    Args:
        low: smallest activation in the band.
        high: largest activation in the band.
        contexts: random contexts, at most one per window of the stream.
    """

    low: float
    high: float
    contexts: tuple[Context, ...]


@dataclass(frozen=True, kw_only=True)
class ShownLatent:
    """A latent with contexts in which it is active.

    Args:
        latent: index of the latent.
        frequency: share of tokens on which the latent is active.
        max_activation: largest activation.
        mean_activation: mean activation over the tokens on which the latent is active.
        top: contexts of the largest activations, at most one per window of the stream, without near-copies of a
            stronger one (`near_copies`); there may be fewer than requested.
        sampled: contexts of random activations, at most one per window of the stream.
        quantiles: bands of its activations from weakest to strongest, formed from `POOL` random contexts.
        negatives: random contexts from windows of the stream in which the latent is not active.
        head, base, extension: position in a Kronecker encoder; None for a dense encoder, and for an absent parent.
        parents_frequency: share of tokens on which base and extension are both above 0; after TopK the latent is
            active on ``frequency``. None without two parents.
    """

    latent: int
    frequency: float
    max_activation: float
    mean_activation: float
    top: tuple[Context, ...]
    sampled: tuple[Context, ...] = ()
    quantiles: tuple[Band, ...] = ()
    negatives: tuple[Context, ...] = ()
    head: int | None = None
    base: int | None = None
    extension: int | None = None
    parents_frequency: float | None = None


@dataclass(frozen=True, kw_only=True)
class ShownParent:
    """A base or an extension of a head with contexts; its activation is ``relu`` of the pre-latent."""

    number: int
    frequency: float
    max_activation: float
    top: tuple[Context, ...]


@dataclass(frozen=True, kw_only=True)
class ShownHead:
    """A complete head: its bases, its extensions, and the latent of each pair, row-major (base by base).

    With null symbols, a base's latents end with that of the base alone, and those of extensions alone come last.
    ``living`` is the number of cells that were active on at least one token.
    """

    head: int
    living: int
    bases: tuple[ShownParent, ...]
    extensions: tuple[ShownParent, ...]
    cells: tuple[ShownLatent, ...]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The shown latents of one SAE, and the number of tokens searched for their contexts."""

    tokens: int
    latents: tuple[ShownLatent, ...]
    heads: tuple[ShownHead, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return to_dict(self)


class GalleryMeter:
    """Collector of contexts for selected latents in one pass.

    Memory: for each kept context, a window of tokens with three activations per token; and at most `MAX_SIGNALS`
    activations of the selected latents and their parents at a time. Memory does not grow with the number of tokens.

    Args:
        sae: the SAE.
        statistics: latent statistics of an earlier pass over the same tokens, used to select latents.
        config: number of latents, heads and contexts.
    """

    def __init__(self, sae: SAE, statistics: LatentStatistics, config: GalleryConfig) -> None:
        counts_F = torch.tensor(statistics.active_tokens)
        self._statistics, self._config = statistics, config
        named = [_checked_latent(latent, sae.d_sae) for latent in config.latents]
        self._sample = list(dict.fromkeys([*named, *choose_latents(counts_F, config.num_latents, config.seed)]))
        self._encoder = sae.encoder if isinstance(sae.encoder, KroneckerEncoder) else None
        self._heads: list[int] = []
        if self._encoder is not None:
            cells = self._encoder.config.block
            number = max(1, min(config.num_heads, config.max_cells // cells)) if config.num_heads else 0
            self._heads = choose_heads(counts_F, self._encoder, number)
        self._signals = _Signals(sae, self._sample, self._heads)
        width = len(self._signals.columns)
        self._positive_C = torch.zeros(width, dtype=torch.int64)
        self._max_C = torch.zeros(width)
        self._both_C = torch.zeros(width, dtype=torch.int64)
        kept = max(config.top, config.cell_contexts)
        companions_CA = torch.tensor(self._signals.companions)
        self._top = _BestWindows(CANDIDATES * kept, companions_CA, config.window)
        of_sample_CA = companions_CA[: len(self._sample)]  # the first columns are the sample's
        drawn = max(config.sampled, POOL if config.quantiles else 0)
        self._drawn = _BestWindows(drawn, of_sample_CA, config.window)
        self._negatives = _BestWindows(config.negatives, of_sample_CA, config.window)
        self._tokens = 0

    @torch.no_grad()
    def update(self, windows: Windows, x_ND: Float[Tensor, "N D"], codes: SparseCodes) -> None:
        """Add windows, with the activations of their kept tokens and the codes of these."""
        width = len(self._signals.columns)
        self._tokens += len(x_ND)
        if width == 0:
            return
        size = max(1, MAX_SIGNALS // (width * windows.keep_ST.shape[1]))
        offsets_S = torch.cat([torch.zeros(1, dtype=torch.int64), windows.keep_ST.sum(1).cumsum(0)]).tolist()
        for start in range(0, len(windows), size):
            stop = min(start + size, len(windows))
            rows = slice(offsets_S[start], offsets_S[stop])
            part_codes = SparseCodes(codes.values[rows], codes.indices[rows], codes.d_sae)
            self._update(windows.rows(start, stop), self._signals.of(x_ND[rows], part_codes))

    def _update(self, windows: Windows, signals_NC: Tensor) -> None:
        keep_ST = windows.keep_ST
        ids_ST = windows.input_ids_ST.masked_fill(~windows.attention_mask_ST, NOT_A_TOKEN)
        self._positive_C += (signals_NC > 0).sum(0)
        self._max_C = torch.maximum(self._max_C, signals_NC.amax(0) if len(signals_NC) else self._max_C)
        base_C, extension_C = torch.tensor(self._signals.companions).T[1:]
        self._both_C += ((signals_NC[:, base_C] > 0) & (signals_NC[:, extension_C] > 0)).sum(0)
        signals_STC = signals_NC.new_zeros(*keep_ST.shape, signals_NC.shape[1])
        signals_STC[keep_ST] = signals_NC
        self._top.update(signals_STC, signals_STC, ids_ST, windows.first)
        if self._sample and (self._config.sampled or self._config.quantiles or self._config.negatives):
            number = len(self._sample)
            lottery_STC = _lottery(keep_ST, windows.first, self._signals.columns[:number], self._config.seed)
            active_STC = signals_STC[..., :number] > 0
            self._drawn.update(lottery_STC * active_STC, signals_STC, ids_ST, windows.first)
            nowhere_STC = keep_ST.unsqueeze(-1) & ~active_STC.any(1, keepdim=True)
            self._negatives.update(lottery_STC * nowhere_STC, signals_STC, ids_ST, windows.first)

    def value(self, token_text: TokenText) -> Gallery:
        """Return the contexts found, as text."""
        config, encoder = self._config, self._encoder
        return Gallery(
            tokens=self._tokens,
            latents=tuple(self._latent(number, config.top, config.sampled, token_text) for number in self._sample),
            heads=() if encoder is None else tuple(self._head(encoder, head, token_text) for head in self._heads),
        )

    def _head(self, encoder: KroneckerEncoder, head: int, token_text: TokenText) -> ShownHead:
        m, n = encoder.d_base, encoder.d_extension
        size = encoder.config.block
        cells = range(head * size, (head + 1) * size)
        row = head * (m + n)
        return ShownHead(
            head=head,
            living=sum(self._statistics.active_tokens[cell] > 0 for cell in cells),
            bases=tuple(self._parent(i, row + i, token_text) for i in range(m)),
            extensions=tuple(self._parent(j, row + m + j, token_text) for j in range(n)),
            cells=tuple(self._latent(cell, self._config.cell_contexts, 0, token_text) for cell in cells),
        )

    def _parent(self, number: int, row: int, token_text: TokenText) -> ShownParent:
        column = self._signals.place[("pre", row)]
        return ShownParent(
            number=number,
            frequency=self._share(self._positive_C, column),
            max_activation=rounded([float(self._max_C[column])])[0],
            top=self._top.distinct(column, self._config.cell_contexts, token_text, parents=False),
        )

    def _latent(self, number: int, top: int, sampled: int, token_text: TokenText) -> ShownLatent:
        column, encoder = self._signals.place[("latent", number)], self._encoder
        has_parents = encoder is not None
        shown = self._top.distinct(column, top, token_text, parents=has_parents)
        drawn: tuple[Context, ...] = ()
        negatives: tuple[Context, ...] = ()
        if column < len(self._sample):
            drawn = self._drawn.contexts(column, POOL, token_text, parents=has_parents)
            negatives = self._negatives.contexts(column, self._config.negatives, token_text, parents=has_parents)
        place: dict[str, Any] = {}
        if encoder is not None:
            place = dict(zip(("head", "base", "extension"), _grid(encoder).place(number), strict=True))
            if None not in place.values():
                place["parents_frequency"] = self._share(self._both_C, column)
        return ShownLatent(
            latent=number,
            frequency=rounded([self._statistics.active_tokens[number] / self._statistics.tokens])[0],
            max_activation=self._statistics.max_activation[number],
            mean_activation=self._statistics.mean_activation[number],
            top=shown,
            sampled=tuple(context for context in drawn[:sampled] if context not in shown),
            quantiles=_bands(drawn, self._config.quantiles, self._config.quantile_contexts),
            negatives=negatives,
            **place,
        )

    def _share(self, counts_C: Tensor, column: int) -> float:
        return rounded([int(counts_C[column]) / self._tokens])[0]


def _bands(drawn: Sequence[Context], number: int, contexts: int) -> tuple[Band, ...]:
    """Split the drawn contexts into ``number`` bands by peak activation; keep the first ``contexts`` of each."""
    peaks = [context.values[context.peak] for context in drawn]
    order = sorted(range(len(drawn)), key=peaks.__getitem__)
    borders = [band * len(drawn) // number for band in range(number + 1)] if number else []
    bands = [order[start:stop] for start, stop in itertools.pairwise(borders) if start < stop]
    return tuple(
        Band(low=peaks[band[0]], high=peaks[band[-1]], contexts=tuple(drawn[n] for n in sorted(band)[:contexts]))
        for band in bands
    )


def near_copies(one: Context, other: Context) -> bool:
    """Return whether two contexts share more than `NEAR_COPY` of the longer one's tokens, in any order.

    Formula: ``sum over t of min(count_one(t), count_other(t)) / max(len(one), len(other)) > NEAR_COPY``, where
    ``t`` is the text of a token, with all runs of digits treated as equal.
    """
    counts = [Counter(_DIGITS.sub("0", token) for token in context.tokens) for context in (one, other)]
    return (counts[0] & counts[1]).total() > NEAR_COPY * max(len(one.tokens), len(other.tokens))


def _checked_latent(latent: int, d_sae: int) -> int:
    if not 0 <= latent < d_sae:
        raise UserError(f"latents must be numbers from 0 to {d_sae - 1}; got {latent}.")
    return latent


class _Signals:
    """The activations of the selected latents and of their pre-latents, as columns.

    ``columns`` lists their keys, ``("latent", number)``, ``("pre", row)`` or `ABSENT`; ``place`` maps a key to its
    column. ``companions`` has for each column: the column itself, its base's and its extension's. A column without
    parents has itself three times.
    """

    def __init__(self, sae: SAE, sample: Sequence[int], heads: Sequence[int]) -> None:
        latents = list(sample)
        self._weight_RD, self._bias_R = sae.W_dec.new_zeros(0, sae.d_in), sae.W_dec.new_zeros(0)
        rows: list[int] = []
        parents: list[tuple[int | None, int | None]] = []
        encoder = sae.encoder
        if isinstance(encoder, KroneckerEncoder):
            cells, width = encoder.config.block, encoder.d_base + encoder.d_extension
            latents += [head * cells + cell for head in heads for cell in range(cells)]
            latents = list(dict.fromkeys(latents))
            parents = [_parent_rows(encoder, latent) for latent in latents]
            whole = [head * width + row for head in heads for row in range(width)]
            rows = sorted({*whole, *(row for pair in parents for row in pair if row is not None)})
            self._weight_RD = encoder.weight.detach().flatten(0, 1)[rows]
            self._bias_R = encoder.bias.detach().flatten()[rows]
        self.columns = [("latent", number) for number in latents] + [("pre", row) for row in rows]
        self._absent = any(None in pair for pair in parents)
        self.columns += [ABSENT] * self._absent
        self.place = {column: number for number, column in enumerate(self.columns)}
        self.companions = [(column, column, column) for column in range(len(self.columns))]
        for column, pair in enumerate(parents):
            base, extension = (self.place[ABSENT if row is None else ("pre", row)] for row in pair)
            self.companions[column] = (column, base, extension)
        self._column_of_F = torch.full((sae.d_sae,), -1)
        self._column_of_F[torch.tensor(latents, dtype=torch.int64)] = torch.arange(len(latents))
        self._num_latents = len(latents)

    def of(self, x_ND: Tensor, codes: SparseCodes) -> Float[Tensor, "N C"]:
        """Return the activations of the columns, on the CPU in float32."""
        column_NK = self._column_of_F[codes.indices.cpu()]
        token_E, k_E = (column_NK.ge(0) & codes.active.cpu()).nonzero(as_tuple=True)
        latents_NC = torch.zeros(len(x_ND), self._num_latents)
        latents_NC[token_E, column_NK[token_E, k_E]] = codes.values.cpu()[token_E, k_E].float()
        pre_NR = torch.addmm(self._bias_R, x_ND.to(self._weight_RD), self._weight_RD.T).relu()
        absent_N1 = torch.zeros(len(x_ND), int(self._absent))
        return torch.cat([latents_NC, pre_NR.float().cpu(), absent_N1], dim=1)


def _grid(encoder: KroneckerEncoder) -> HeadGrid:
    grid = head_grid(encoder.config)
    assert grid is not None
    return grid


def _parent_rows(encoder: KroneckerEncoder, latent: int) -> tuple[int | None, int | None]:
    """Return the encoder's rows of a latent's base and extension; None: absent."""
    head, base, extension = _grid(encoder).place(latent)
    first = head * (encoder.d_base + encoder.d_extension)
    return None if base is None else first + base, None if extension is None else first + encoder.d_base + extension


class _BestWindows:
    """The positions of the largest scores of each column, at most one per window of the stream, with their contexts.

    Ties are resolved in favour of the earlier window, and within a window the earlier token.
    """

    def __init__(self, kept: int, companions_CA: Int[Tensor, "C A"], radius: int) -> None:
        columns, width = len(companions_CA), 2 * radius + 1
        self._radius, self._companions_CA = radius, companions_CA
        self._score_CQ = torch.zeros(columns, kept)
        self._ids_CQW = torch.full((columns, kept, width), NOT_A_TOKEN, dtype=torch.int32)
        self._values_CQWA = torch.zeros(columns, kept, width, 3)

    def update(self, scores_STC: Tensor, signals_STC: Tensor, ids_ST: Tensor, first: int) -> None:
        kept = self._score_CQ.shape[1]
        peak_SC, position_SC = scores_STC.max(dim=1)
        candidates = torch.cat([self._score_CQ, peak_SC.T], dim=1).sort(dim=1, descending=True, stable=True)
        order_CQ = candidates.indices[:, :kept]
        column_E, slot_E = ((order_CQ >= kept) & (candidates.values[:, :kept] > 0)).nonzero(as_tuple=True)
        # kept entries move to their new slots; new entries are gathered only where they enter
        stays_CQ = order_CQ.clamp_max(kept - 1).unsqueeze(-1)
        self._score_CQ = candidates.values[:, :kept].clone()
        self._ids_CQW = self._ids_CQW.gather(1, stays_CQ.expand_as(self._ids_CQW))
        self._values_CQWA = self._values_CQWA.gather(1, stays_CQ.unsqueeze(-1).expand_as(self._values_CQWA))
        window_E = order_CQ[column_E, slot_E] - kept
        around_W = torch.arange(-self._radius, self._radius + 1)
        token_EW = position_SC[window_E, column_E].unsqueeze(1) + around_W
        outside_EW = (token_EW < 0) | (token_EW >= ids_ST.shape[1])
        token_EW = token_EW.clamp(0, ids_ST.shape[1] - 1)
        ids_EW = ids_ST[window_E.unsqueeze(1), token_EW].masked_fill(outside_EW, NOT_A_TOKEN)
        companions_E1A = self._companions_CA[column_E].unsqueeze(1)
        values_EWA = signals_STC[window_E[:, None, None], token_EW.unsqueeze(-1), companions_E1A]
        self._ids_CQW[column_E, slot_E] = ids_EW
        self._values_CQWA[column_E, slot_E] = values_EWA

    def contexts(self, column: int, number: int, token_text: TokenText, *, parents: bool) -> tuple[Context, ...]:
        """Return up to ``number`` contexts of a column, best first; with ``parents``, also its parents' activations."""
        return tuple(itertools.islice(self._contexts(column, token_text, parents), number))

    def distinct(self, column: int, number: int, token_text: TokenText, *, parents: bool) -> tuple[Context, ...]:
        """Return the same as `contexts` without near-copies of a better context."""
        found: list[Context] = []
        for context in self._contexts(column, token_text, parents):
            if len(found) == number:
                break
            if not any(near_copies(context, better) for better in found):
                found.append(context)
        return tuple(found)

    def _contexts(self, column: int, token_text: TokenText, parents: bool) -> Iterator[Context]:
        for slot in range(self._score_CQ.shape[1]):
            if float(self._score_CQ[column, slot]) <= 0:
                return
            ids_W = self._ids_CQW[column, slot]
            inside_W = ids_W != NOT_A_TOKEN
            values_AW = self._values_CQWA[column, slot][inside_W].T.tolist()
            base, extension = (rounded(values_AW[1]), rounded(values_AW[2])) if parents else ((), ())
            yield Context(
                tokens=token_text.strings(ids_W[inside_W].tolist()),
                peak=int(inside_W[: self._radius].sum()),
                values=rounded(values_AW[0]),
                base=base,
                extension=extension,
            )


def _lottery(like_ST: Tensor, first: int, columns: Sequence[tuple[str, int]], seed: int) -> Float[Tensor, "S T C"]:
    """Return a pseudo-random number in (0, 1] for each token and column, a function of position, column and seed only.

    It is a hash (the finaliser of splitmix64) rather than a generator, so that the drawn tokens do not depend on the
    batch size.
    """
    identity_C = torch.tensor([2 * number + (kind == "pre") for kind, number in columns])
    window_S = torch.arange(first, first + len(like_ST))
    position_T = torch.arange(like_ST.shape[1])
    token_ST = _mix(_mix(window_S.unsqueeze(1) + _mix(torch.tensor(seed))) + position_T)
    mixed_STC = _mix(token_ST.unsqueeze(-1) + _mix(identity_C))
    return ((mixed_STC >> 24 & 0xFFFFFF) + 1).float() / 2**24


def _mix(bits: Tensor) -> Tensor:
    bits = bits + -0x61C8864680B583EB
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return bits ^ (bits >> 31 & (1 << 33) - 1)
