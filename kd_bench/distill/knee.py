"""Which logits lead: the top k of every row, with k at the knee of the row's sorted curve.

The sorted curve falls from 1 to 0 once both axes are scaled to [0, 1]; the knee is where it lies
furthest below the straight line between its ends (Kneedle for a convex, decreasing curve). With
`y` scaled and `count(z > y)` values above it, that distance is

    gap(y) = 1 - count(z > y) / (V - 1) - y

so it needs no sorting: counts over bins of the value range bound the gap of every bin from above
and from below. The bins that cannot hold the largest gap, and those behind them, are dropped; what
is left (a few percent of the vocabulary) is sorted, and the gap taken exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kd_bench.errors import UsageError

Curve = Literal["logits", "probs"]
Candidates = Literal["full"] | int

SORT_ALL_BELOW = 8192
"""Vocabularies up to this size are sorted whole: cheaper than counting first."""

BINS = 2048
BIN_SLACK = 1e-5  # of the value range: far above float32's rounding of a bin's edge
GAP_SLACK = 1e-6  # gaps up to this are the rounding of a straight line, no knee
ELEMENTS_AT_A_TIME = {"cpu": 1 << 21}
ELEMENTS_ELSEWHERE = 1 << 24
"""Logits that pass through the counting at a time: to stay near the cache, or within 0.3 GB."""


@dataclass(frozen=True)
class TopLogits:
    """The leading ids of every row, in falling order of their logits.

    Attributes:
        k: how many ids lead, [N].
        ids: [N, largest k]; behind a row's first k entries stand other ids of no meaning. Equal
            logits are ordered by id.
    """

    k: Tensor
    ids: Tensor

    def to(self, device: torch.device) -> "TopLogits":
        """The same on another device."""
        return TopLogits(self.k.to(device), self.ids.to(device))

    @property
    def mask(self) -> Tensor:
        """bool [N, largest k], true at the first k entries of a row."""
        return torch.arange(self.ids.shape[-1], device=self.k.device) < self.k.unsqueeze(-1)


def knee(
    logits: Tensor,
    curve: Curve = "logits",
    candidates: Candidates = "full",
    k_min: int = 2,
    k_max: int | None = None,
) -> Tensor:
    """Number of logits above the knee of each row, LongTensor [N].

    Args:
        logits: [N, V], finite, any float type.
        curve: the knee of the sorted logits or of their probabilities.
        candidates: `full`, or the number of largest logits that make up the curve.
        k_min, k_max: bounds of the result; the vocabulary's size is one too. A row without a
            knee (flat, or bent upwards) has k_min.
    """
    return top_logits(logits, curve=curve, candidates=candidates, k_min=k_min, k_max=k_max).k


@torch.no_grad()
def top_logits(
    logits: Tensor,
    *,
    top_k: int | None = None,
    curve: Curve = "logits",
    candidates: Candidates = "full",
    k_min: int = 2,
    k_max: int | None = None,
    width: int | None = None,
) -> TopLogits:
    """The top `top_k` ids of each row of logits [N, V], or, by default, those above its knee.

    Args:
        width: keep so many ids a row, whatever the largest k is: no value is then read by the
            host, and rows whose k is larger lack ids.
    """
    if logits.dim() != 2:
        raise UsageError(
            f"Logits have the shape {tuple(logits.shape)}.", "Give [positions, vocabulary]."
        )
    if curve not in ("logits", "probs"):
        raise UsageError(f"curve is {curve!r}.", "Choose logits or probs.")
    if candidates != "full" and not (isinstance(candidates, int) and candidates >= 2):
        raise UsageError(f"candidates is {candidates!r}.", "Choose full, or a number from 2 up.")
    if min(k_min, k_min if k_max is None else k_max, k_min if top_k is None else top_k) < 2:
        raise UsageError("One leading logit makes no pair.", "Set k_min, k_max and top_k to 2 up.")
    if k_max is not None and k_max < k_min:
        raise UsageError(f"k_max {k_max} is less than k_min {k_min}.", "Swap them.")
    rows, vocabulary = logits.shape
    if rows == 0 or vocabulary == 0:
        empty = torch.zeros(rows, dtype=torch.long, device=logits.device)
        return TopLogits(empty, empty.new_zeros(rows, 0))
    rule = _Rule(
        top_k=None if top_k is None else min(top_k, vocabulary),
        curve=curve,
        prefix=vocabulary if candidates == "full" else min(candidates, vocabulary),
        k_min=min(k_min, vocabulary),
        k_max=vocabulary if k_max is None else min(k_max, vocabulary),
        width=width,
    )
    chunks = logits.detach()
    if chunks.device.type == "mps":  # has no double precision
        chunks = chunks.cpu()
    at_a_time = max(1, ELEMENTS_AT_A_TIME.get(logits.device.type, ELEMENTS_ELSEWHERE) // vocabulary)
    return join([_top_of_chunk(chunk, rule) for chunk in chunks.split(at_a_time)]).to(logits.device)


@dataclass(frozen=True)
class _Rule:
    """How k is chosen, with every bound inside the vocabulary."""

    top_k: int | None
    curve: Curve
    prefix: int
    k_min: int
    k_max: int
    width: int | None

    @property
    def at_least(self) -> int:
        """Leading values that are needed whatever the knee turns out to be."""
        return self.k_min if self.top_k is None else self.top_k


def _top_of_chunk(logits: Tensor, rule: _Rule) -> TopLogits:
    """One chunk of rows, small enough for the memory that counting takes."""
    values = logits if logits.dtype == torch.float64 else logits.float()
    vocabulary = values.shape[-1]
    if vocabulary <= SORT_ALL_BELOW or rule.width is not None:
        # Counting would be contended on an accelerator, and its result has a size of its own.
        ordered, ids = _sort_falling(values)
        low, counts = ordered[:, -1:], None
    else:
        ordered, ids, counts = _sort_top(values, rule)
        low = values.amin(dim=-1, keepdim=True)
    if rule.top_k is not None:
        return TopLogits(torch.full_like(ids[:, 0], rule.top_k), ids[:, : rule.top_k])
    if rule.prefix < vocabulary:  # every row has as many: `_sort_top` saw to it
        ordered, counts = ordered[:, : rule.prefix], None
        low = ordered[:, -1:]
    # The first values of every row are known in order: all of them, or `counts` [n, 1].
    index = torch.arange(ordered.shape[-1], device=ordered.device)
    fall = 1 - index.double() / max(rule.prefix - 1, 1)  # the chord's own y
    gap = _height(ordered, ordered[:, :1], low, rule.curve).neg_().add_(fall)  # [n, width]
    if counts is not None:
        gap.masked_fill_(index >= counts, -torch.inf)
    largest, k = gap.max(dim=-1)
    k = k.where(largest > GAP_SLACK, 0).clamp_(rule.k_min, rule.k_max)
    return TopLogits(k, ids[:, : int(k.max()) if rule.width is None else rule.width])


def _height(values: Tensor, high: Tensor, low: Tensor, curve: Curve) -> Tensor:
    """The curve's `y` in [0, 1] at `values`, in double precision; NaN on a flat row.

    Probabilities need no normaliser, which the scaling to [0, 1] would cancel.
    """
    top, bottom = high.double(), low.double()
    if curve == "logits":
        return (values - bottom).div_(top - bottom)
    least = (bottom - top).exp_()
    return (values - top).exp_().sub_(least).div_(1 - least)


def _sort_top(values: Tensor, rule: _Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted values and ids [n, width] of at least what decides k and leads; their counts [n, 1].

    Rows end in -inf behind their count.
    """
    rows, vocabulary = values.shape
    low, high = (end.unsqueeze(-1) for end in values.aminmax(dim=-1))
    per_value = BINS / (high - low)  # inf on a flat row, whose bins are then all the last or first
    # Rounding keeps the order of values, so bins are in falling order too.  [n, vocabulary]
    bins = ((high - values) * per_value).long().clamp_(0, BINS - 1)
    inside = torch.zeros(rows, BINS, dtype=torch.long, device=values.device)
    inside.scatter_add_(
        1, bins, torch.ones((), dtype=torch.long, device=values.device).expand_as(bins)
    )
    up_to = inside.cumsum(dim=-1)
    needed = rule.at_least if rule.prefix == vocabulary else max(rule.at_least, rule.prefix)
    last = (up_to < needed).sum(dim=-1, keepdim=True)
    if rule.top_k is None and rule.prefix == vocabulary:
        last = torch.maximum(last, _last_bin_of_knee(inside, up_to, low, high, rule.curve))
    counts = up_to.gather(1, last)
    row, column = (bins <= last).nonzero(as_tuple=True)  # ids rise inside a row
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row, 0]
    packed = values.new_full((rows, int(counts.max())), -torch.inf)
    packed[row, place] = values[row, column]
    ids = torch.zeros_like(packed, dtype=torch.long)
    ids[row, place] = column
    ordered, order = _sort_falling(packed)
    return ordered, ids.gather(1, order), counts


def _last_bin_of_knee(
    inside: Tensor, up_to: Tensor, low: Tensor, high: Tensor, curve: Curve
) -> Tensor:
    """Last bin [n, 1] that can hold the largest gap.

    The first value of a bin has `before` values above it, the largest gap its bin can offer
    comes from there, and that value lies between the bin's edges.
    """
    before = up_to - inside  # [n, BINS]
    bins = torch.arange(BINS, device=inside.device)
    step = (high.double() - low.double()) / BINS
    slack = BIN_SLACK * BINS
    upper = _height(high - step * (bins - slack), high, low, curve)
    lower = _height(high - step * (bins + 1 + slack), high, low, curve)
    right = 1 - before.double() / (up_to[:, -1:] - 1)
    occupied = inside > 0
    floor = (right - upper).masked_fill(~occupied, -torch.inf).amax(dim=-1, keepdim=True)
    possible = occupied & (right - lower >= floor - GAP_SLACK)
    return (bins * possible).amax(dim=-1, keepdim=True)


def _sort_falling(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values in falling order and their ids; equal values in the order of their ids."""
    if values.device.type != "cpu" or values.dtype != torch.float32:
        ordered = torch.sort(values, dim=-1, descending=True, stable=True)
        return ordered.values, ordered.indices
    # numpy sorts integers with vector instructions where torch's stable sort does not (a quarter
    # of the time), so value and id go into one: the value falling in the high half, then the id.
    bits = (values + 0.0).view(torch.int32)  # + 0.0: one zero, not two
    bits ^= (bits >> 31) & 0x7FFFFFFF  # integers in the order of the values
    index = torch.arange(values.shape[-1])
    keys = torch.sub(index - (1 << 32), bits.long(), alpha=1 << 32)  # ~bits << 32 | index
    keys.numpy().sort(axis=-1)
    ids = keys.bitwise_and_(0xFFFFFFFF)
    return values.gather(1, ids), ids


def join(parts: Sequence[TopLogits]) -> TopLogits:
    """The rows of several, one below the other."""
    if len(parts) == 1:
        return parts[0]
    width = max(top.ids.shape[-1] for top in parts)
    ids = [torch.nn.functional.pad(top.ids, (0, width - top.ids.shape[-1])) for top in parts]
    return TopLogits(torch.cat([top.k for top in parts]), torch.cat(ids))
