"""Divergence of two distributions over all ordered pairs of leading logits, without the pairs.

For one row let `a_1 ... a_k` be the leading logits of one model divided by the temperature, in the
leader's order, and `p_ij ~ exp(a_i - a_j)` over i < j. With log Z the logarithm of the sum over the
pairs,

    log Z = log sum_i exp(a_i + S_i),   S_i = log sum_{j>i} exp(-a_j)
    g_i   = d log Z / d a_i = sum_{j>i} p_ij - sum_{j<i} p_ji

and p is an exponential family in a, so that KL(p(a) || p(b)) is the Bregman divergence of log Z:

    KL = log Z(b) - log Z(a) - <g(a), b - a>
    dKL / db = g(b) - g(a)          dKL / da = H(a) (a - b),  H = d g / d a

Every sum over j > i or j < i is a running sum, so that value and gradient take O(k) time and
memory. The running sums are taken of logarithms and in double precision: exact for logits of
+-1e4, for reversed orders (where the largest pair is the absent one), and cheap beside the LM head.
"""

from typing import Literal

import torch
from torch import Tensor

from kd_bench.distill.knee import Lead

__all__ = ["PairForm", "pair_divergence"]

PairForm = Literal["flat", "row-wise"]

LARGEST_SPREAD = 300.0  # exp(2 * 300) and its inverse still are ordinary doubles
ELEMENTS_AT_A_TIME = 1 << 21
"""Padded [rows, k] entries worked on at a time: some 16 MB a double tensor."""


def pair_divergence(
    teacher: Tensor,
    other: Tensor,
    lead: Lead,
    temperature: float,
    direction: str,
    pairs: PairForm,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """KL between two rows' pair distributions over the ids of `lead`.

    Returns:
        values [N] and, if asked for, their gradient at `other`'s leading logits [N, largest k],
        zero behind each row's k. Rows with fewer than two leading logits have the value 0.
    """
    rows, width = lead.ids.shape
    kind = torch.float64 if other.dtype == torch.float64 else torch.float32
    values = torch.zeros(rows, dtype=kind, device=other.device)
    gradients = None
    if with_gradient:
        gradients = torch.zeros(rows, width, dtype=kind, device=other.device)
    if width < 2:
        return values, gradients
    divergence = _flat if pairs == "flat" else _row_wise
    for group, k in _groups(lead):
        ids, mask = lead.ids[group, :k], lead.mask[group, :k]
        a = _leading_values(other, group, ids, mask) / temperature
        b = _leading_values(teacher, group, ids, mask) / temperature
        value, gradient = divergence(a, b, mask, direction, with_gradient)
        values[group] = value.to(kind)
        if gradients is not None and gradient is not None:
            gradients[group, :k] = (gradient / temperature).to(kind)
    return values, gradients


def _groups(lead: Lead) -> list[tuple[Tensor | slice, int]]:
    """Rows that are worked on together, and the width they need: k differs from row to row."""
    rows, width = lead.ids.shape
    if rows * width <= ELEMENTS_AT_A_TIME // 8:
        return [(slice(None), width)]
    order = lead.k.argsort(descending=True)
    falling = lead.k[order].tolist()
    groups: list[tuple[Tensor | slice, int]] = []
    start = 0
    while start < rows and falling[start] >= 2:
        k, end = falling[start], start + 1
        most = max(1, ELEMENTS_AT_A_TIME // k)
        while end < rows and falling[end] >= max(k / 2, 2) and end - start < most:
            end += 1
        groups.append((order[start:end], k))
        start = end
    return groups


def _leading_values(logits: Tensor, group: Tensor | slice, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits at `ids` in double precision [n, k], zero where nothing leads."""
    # Either way [n, k] is copied, never whole rows.
    places = logits.gather(1, ids) if isinstance(group, slice) else logits[group[:, None], ids]
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    return places.to(wide).masked_fill(~mask, 0.0)


def _flat(
    other: Tensor, teacher: Tensor, mask: Tensor, direction: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """One distribution over all pairs: KL [n] and its gradient at `other` [n, k]."""
    a, b = (other, teacher) if direction == "reverse" else (teacher, other)
    safe = _is_safe(a, b)
    of_a = _FlatSums(a, mask, safe)
    of_b = _FlatSums(b, mask, safe)
    behind, ahead = of_a.behind(), of_a.ahead()
    slope = behind - ahead  # d log Z(a) / da
    value = (of_b.log_z - of_a.log_z).squeeze(-1) - (slope * (b - a)).sum(dim=-1)
    value = value.clamp(min=0)  # below zero by rounding only
    if not with_gradient:
        return value, None
    if direction == "forward":
        return value, of_b.behind() - of_b.ahead() - slope
    # H(a) (a - b). The differences are shifted to be positive, for their logarithm.
    shift, log_shift = _shifted(a - b, mask)
    mean = (shift * slope).sum(dim=-1, keepdim=True)
    gradient = behind * (shift - mean) - of_a.behind(log_shift)
    gradient += ahead * (shift + mean) - of_a.ahead(log_shift)
    return value, gradient


class _FlatSums:
    """Sums over the pairs of p_ij ~ exp(z_i - z_j), i < j, for every row of z [n, k]."""

    def __init__(self, z: Tensor, mask: Tensor, safe: bool) -> None:
        self.up = z.masked_fill(~mask, -torch.inf)
        self.down = (-z).masked_fill(~mask, -torch.inf)
        self.safe = safe
        self._behind = self.up + _sum_behind(self.down, safe)
        self.log_z = self._behind.logsumexp(dim=-1, keepdim=True)  # [n, 1]

    def behind(self, log_weight: Tensor | None = None) -> Tensor:
        """sum_{j>i} p_ij w_j, [n, k]."""
        if log_weight is None:
            return (self._behind - self.log_z).exp()
        inner = _sum_behind(self.down + log_weight, self.safe)
        return (self.up + inner - self.log_z).exp()

    def ahead(self, log_weight: Tensor | None = None) -> Tensor:
        """sum_{i<j} p_ij w_i, [n, k]."""
        inner = self.up if log_weight is None else self.up + log_weight
        return (self.down + _sum_ahead(inner, self.safe) - self.log_z).exp()


def _row_wise(
    other: Tensor, teacher: Tensor, mask: Tensor, direction: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """One distribution q_ij ~ exp(-a_j), j > i, for each i < k: mean KL [n] and its gradient."""
    a, b = (other, teacher) if direction == "reverse" else (teacher, other)
    safe = _is_safe(a, b)
    down_a, down_b = ((-z).masked_fill(~mask, -torch.inf) for z in (a, b))
    norm_a, norm_b = _sum_behind(down_a, safe), _sum_behind(down_b, safe)  # [n, k]
    has_pairs = torch.zeros_like(mask)
    has_pairs[:, :-1] = mask[:, 1:]
    share = 1 / has_pairs.sum(dim=-1, keepdim=True)  # [n, 1]
    shift, log_shift = _shifted(a - b, mask)
    # Mean of the shifted differences under q_i; the shift cancels against norm_b - norm_a.
    mean = (_sum_behind(down_a + log_shift, safe) - norm_a).masked_fill(~has_pairs, -torch.inf)
    mean = mean.exp()
    low = (a - b - shift)[:, :1]
    value = (norm_b - norm_a - mean - low).masked_fill(~has_pairs, 0.0).clamp(min=0)
    value = value.sum(dim=-1) * share.squeeze(-1)
    if not with_gradient:
        return value, None

    def received(down: Tensor, norm: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
        """sum_{i<m} q_im w_i, [n, k]."""
        inner = (log_weight - norm).masked_fill(~has_pairs, -torch.inf)
        return (down + _sum_ahead(inner, safe)).exp()

    if direction == "forward":
        gradient = received(down_a, norm_a) - received(down_b, norm_b)
    else:
        gradient = shift * received(down_a, norm_a) - received(down_a, norm_a, mean.log())
    return value, gradient * share


def _shifted(difference: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Differences less their row's smallest, and the logarithm of that (-inf at the smallest)."""
    low = difference.masked_fill(~mask, torch.inf).amin(dim=-1, keepdim=True)
    shift = (difference - low).masked_fill(~mask, 0.0)
    return shift, shift.log()


def _is_safe(a: Tensor, b: Tensor) -> bool:
    """Whether sums of exponentials stay inside double precision once a row's largest is 1.

    Padding is zero, which at worst says no without need.
    """
    if a.dtype != torch.float64 or not len(a):
        return False
    both = torch.stack([a, b])
    return bool((both.amax(dim=-1) - both.amin(dim=-1)).amax() <= LARGEST_SPREAD)


def _sum_ahead(logs: Tensor, safe: bool) -> Tensor:
    """log sum_{i<j} exp(logs_i) for every j along the last dimension; -inf for the first."""
    if safe:
        top = logs.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(logs.dtype).min)
        sums = (logs - top).exp_().cumsum(dim=-1).log_().add_(top)
    else:
        sums = logs.logcumsumexp(dim=-1)
    return torch.nn.functional.pad(sums[:, :-1], (1, 0), value=-torch.inf)


def _sum_behind(logs: Tensor, safe: bool) -> Tensor:
    """log sum_{j>i} exp(logs_j) for every i along the last dimension; -inf for the last."""
    return _sum_ahead(logs.flip(-1), safe).flip(-1)
