"""Divergence of two distributions over all ordered pairs of leading logits, without the pairs.

(And, beside them, over the leading logits themselves: the reading of the paper without pairs.)

For one row let `a_1 ... a_k` be the leading logits of one model divided by the temperature, in the
leader's order, and `p_ij ~ exp(a_i - a_j)` over i < j. With log Z the logarithm of the sum over the
pairs,

    log Z = log sum_i exp(a_i + S_i),   S_i = log sum_{j>i} exp(-a_j)
    g_i   = d log Z / d a_i = sum_{j>i} p_ij - sum_{j<i} p_ji

and p is an exponential family in a, so that KL(p(a) || p(b)) is the Bregman divergence of log Z:

    KL = log Z(b) - log Z(a) - <g(a), b - a>
    dKL / db = g(b) - g(a)          dKL / da = H(a) (a - b),  H = d g / d a

Every sum over j > i or j < i is a running sum, so that value and gradient take O(k) time and
memory. They run in double precision over exponentials of which a row's largest is 1, or over
logarithms where a row is too wide for that (logits of +-1e4; an order reversed on the other side,
where the largest pair is the absent one). Both are exact, and cheap beside the LM head.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_bench.distill.knee import Lead

PairForm = Literal["flat", "row-wise", "none"]

LARGEST_SPREAD = 300.0  # exp(-2 * 300) is an ordinary double
ELEMENTS_AT_A_TIME = {"cpu": 1 << 16}
ELEMENTS_ELSEWHERE = 1 << 21
"""Padded [leads, k] entries worked on at a time: half a megabyte, or 16, a double tensor."""


def pair_divergence(
    teacher: Tensor,
    other: Tensor,
    lead: Lead,
    temperature: float,
    direction: str,
    pairs: PairForm,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """KL between two rows' pair distributions over the ids that lead.

    Args:
        teacher, other: [N, V].
        lead: M leads, a multiple of N: lead m is over row m modulo N.

    Returns:
        Values [M] and, if asked for, their gradient at `other`'s leading logits [M, largest k],
        zero behind each lead's k. Fewer than two leading logits are worth 0.
    """
    home = other.device
    device = torch.device("cpu") if home.type == "mps" else home  # mps has no double precision
    leads, width = lead.ids.shape
    kind = torch.promote_types(other.dtype, torch.float32)
    values = torch.zeros(leads, dtype=kind, device=device)
    gradients = torch.zeros(leads, width, dtype=kind, device=device) if with_gradient else None
    divergence = {"flat": _flat, "row-wise": _row_wise, "none": _no_pairs}[pairs]
    of_other = _gather(other, lead.ids).to(device)  # [M, largest k]
    of_teacher = _gather(teacher, lead.ids).to(device)
    lead = lead.to(device)
    for group, size in _groups(lead):
        a = of_other[group, :size].double() / temperature
        b = of_teacher[group, :size].double() / temperature
        mask = torch.arange(size, device=a.device) < lead.k[group].unsqueeze(-1)
        value, gradient = divergence(a, b, mask, direction, with_gradient)
        values[group] = value.to(kind)
        if gradients is not None and gradient is not None:
            gradients[group, :size] = gradient.div_(temperature).to(kind)
    return values.to(home), None if gradients is None else gradients.to(home)


def _groups(lead: Lead) -> list[tuple[Tensor | slice, int]]:
    """Leads that are worked on together, and the width they need: k differs from row to row."""
    leads, width = lead.ids.shape
    if width < 2:
        return []
    at_a_time = ELEMENTS_AT_A_TIME.get(lead.k.device.type, ELEMENTS_ELSEWHERE)
    if leads * width <= at_a_time:
        return [(slice(None), width)]
    order = lead.k.argsort(descending=True)
    falling = lead.k[order].tolist()
    groups: list[tuple[Tensor | slice, int]] = []
    start = 0
    while start < leads and falling[start] >= 2:
        size, end = falling[start], start + 1
        most = max(1, at_a_time // size)
        while end < leads and falling[end] >= max(size / 2, 2) and end - start < most:
            end += 1
        groups.append((order[start:end], size))
        start = end
    return groups


def _gather(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits [N, V] at the ids [M, k] of leads whose rows repeat every N."""
    if not len(ids):
        return logits.new_zeros(ids.shape)
    return torch.cat([logits.gather(1, part) for part in ids.split(len(logits))])


def _flat(
    other: Tensor, teacher: Tensor, mask: Tensor, direction: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """One distribution over all pairs: KL [n] and its gradient at `other` [n, k]."""
    a, b = (other, teacher) if direction == "reverse" else (teacher, other)
    sums = _ScaledSums if _fits(a, b) else _LogSums
    of_a, of_b = sums(a, mask), sums(b, mask)
    behind, ahead = of_a.behind(), of_a.ahead()
    slope = behind - ahead  # d log Z(a) / da
    difference = a - b
    value = of_b.log_z - of_a.log_z + (slope * difference).sum(dim=-1)
    value = value.clamp_(min=0)  # below zero by rounding only
    if not with_gradient:
        return value, None
    if direction == "forward":
        return value, of_b.behind() - of_b.ahead() - slope
    # H(a) (a - b). The differences are shifted to be positive, for the logarithms' sake.
    shift = difference - difference.amin(dim=-1, keepdim=True)
    mean = (shift * slope).sum(dim=-1, keepdim=True)
    gradient = behind * (shift - mean) - of_a.behind(shift)
    gradient += ahead * (shift + mean) - of_a.ahead(shift)
    return value, gradient


class _ScaledSums:
    """Sums over the pairs of p_ij ~ exp(z_i - z_j), i < j, for every row of z [n, k].

    Exponentials are scaled to a largest of 1, which keeps rows up to `LARGEST_SPREAD` in range.
    """

    def __init__(self, z: Tensor, mask: Tensor) -> None:
        mask = mask.to(z.dtype)  # several times faster than to multiply by a bool
        high, low = z.amax(dim=-1, keepdim=True), z.amin(dim=-1, keepdim=True)
        self.up = (z - high).exp_().mul_(mask)
        self.down = (low - z).exp_().mul_(mask)
        self._behind = self.up * _behind(self.down)
        self.z = self._behind.sum(dim=-1, keepdim=True)  # [n, 1]
        self.log_z = (self.z.log() + high - low).squeeze(-1)  # [n]

    def behind(self, weight: Tensor | None = None) -> Tensor:
        """sum_{j>i} p_ij w_j, [n, k]."""
        if weight is None:
            return self._behind / self.z
        return _behind(self.down * weight).mul_(self.up).div_(self.z)

    def ahead(self, weight: Tensor | None = None) -> Tensor:
        """sum_{i<j} p_ij w_i, [n, k]."""
        up = self.up if weight is None else self.up * weight
        return _ahead(up).mul_(self.down).div_(self.z)


class _LogSums:
    """The same sums through logarithms, for rows of any width; weights are not negative."""

    def __init__(self, z: Tensor, mask: Tensor) -> None:
        self.up = z.masked_fill(~mask, -torch.inf)
        self.down = (-z).masked_fill(~mask, -torch.inf)
        self.log_z = (self.up + _log_behind(self.down)).logsumexp(dim=-1)  # [n]

    def behind(self, weight: Tensor | None = None) -> Tensor:
        """sum_{j>i} p_ij w_j, [n, k]."""
        down = self.down if weight is None else self.down + weight.log()
        return (self.up + _log_behind(down) - self.log_z.unsqueeze(-1)).exp()

    def ahead(self, weight: Tensor | None = None) -> Tensor:
        """sum_{i<j} p_ij w_i, [n, k]."""
        up = self.up if weight is None else self.up + weight.log()
        return (self.down + _log_ahead(up) - self.log_z.unsqueeze(-1)).exp()


def _row_wise(
    other: Tensor, teacher: Tensor, mask: Tensor, direction: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """One distribution q_ij ~ exp(-a_j), j > i, for each i < k: mean KL [n] and its gradient."""
    a, b = (other, teacher) if direction == "reverse" else (teacher, other)
    down_a, down_b = ((-z).masked_fill(~mask, -torch.inf) for z in (a, b))
    norm_a, norm_b = _log_behind(down_a), _log_behind(down_b)  # [n, k]
    has_pairs = F.pad(mask[:, 1:], (0, 1))
    share = 1 / has_pairs.sum(dim=-1)  # [n]
    low = (a - b).amin(dim=-1, keepdim=True)
    shift = a - b - low
    # Mean of the shifted differences under q_i, [n, k].
    log_mean = (_log_behind(down_a + shift.log()) - norm_a).masked_fill(~has_pairs, -torch.inf)
    value = (norm_b - norm_a - log_mean.exp() - low).masked_fill(~has_pairs, 0.0).clamp_(min=0)
    value = value.sum(dim=-1) * share
    if not with_gradient:
        return value, None

    def received(down: Tensor, norm: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
        """sum_{i<m} q_im w_i, [n, k]."""
        inner = (log_weight - norm).masked_fill(~has_pairs, -torch.inf)
        return (down + _log_ahead(inner)).exp()

    if direction == "forward":
        gradient = received(down_a, norm_a) - received(down_b, norm_b)
    else:
        gradient = shift * received(down_a, norm_a) - received(down_a, norm_a, log_mean)
    return value, gradient * share.unsqueeze(-1)


def _no_pairs(
    other: Tensor, teacher: Tensor, mask: Tensor, direction: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """One distribution over the leading logits themselves: KL [n] and its gradient at `other`."""
    log_a, log_b = (z.masked_fill(~mask, -torch.inf).log_softmax(dim=-1) for z in (other, teacher))
    if direction == "forward":
        log_a, log_b = log_b, log_a
    share = log_a.exp()
    difference = (log_a - log_b).masked_fill(~mask, 0.0)
    value = (share * difference).sum(dim=-1)
    if direction == "forward":  # `other` is b
        gradient = log_b.exp() - share
    else:
        gradient = share * (difference - value.unsqueeze(-1))
    return value.clamp(min=0), gradient if with_gradient else None


def _fits(a: Tensor, b: Tensor) -> bool:
    """Whether scaled exponentials of every row stay inside double precision."""
    widest = max((z.amax(dim=-1) - z.amin(dim=-1)).amax() for z in (a, b))
    return bool(widest <= LARGEST_SPREAD)


def _ahead(terms: Tensor) -> Tensor:
    """sum_{i<j} terms_i for every j along the last dimension."""
    return F.pad(terms[:, :-1].cumsum(dim=-1), (1, 0))


def _behind(terms: Tensor) -> Tensor:
    """sum_{j>i} terms_j for every i along the last dimension."""
    return _ahead(terms.flip(-1)).flip(-1)


def _log_ahead(logs: Tensor) -> Tensor:
    """log sum_{i<j} exp(logs_i) for every j along the last dimension; -inf for the first."""
    return F.pad(logs[:, :-1].logcumsumexp(dim=-1), (1, 0), value=-torch.inf)


def _log_behind(logs: Tensor) -> Tensor:
    """log sum_{j>i} exp(logs_j) for every i along the last dimension; -inf for the last."""
    return _log_ahead(logs.flip(-1)).flip(-1)
