"""What the student is asked to match: pure tensor functions, one value an answer position.

`teacher` and `other` are logits [N, V] of any float type; `other` is the student's or the visual
switch's. The result is [N] (its mean or sum is the caller's), computed in float32 or better. Rows
are independent, so callers may work through them in chunks. Gradients reach `other` only.

DBiLD and BiLD compare distributions over all ordered pairs of top logits, without the pairs. For
one row let `a_1 ... a_k` be the top logits of one model divided by the temperature, in the order of
the side that leads, and `p_ij ~ exp(a_i - a_j)` over i < j. With log Z the logarithm of the sum
over the pairs,

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

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_bench.distill.knee import Candidates, Curve, TopLogits, join, top_logits
from kd_bench.distill.knee import knee as knee  # a public name of the losses
from kd_bench.errors import UsageError

Direction = Literal["forward", "reverse", "led"]
Ids = Literal["each", "union"]
PairForm = Literal["flat", "row-wise", "none"]
Weighting = Literal["equal", "entropy"]

LARGEST_SPREAD = 300.0  # exp(-2 * 300) is an ordinary double
ELEMENTS_AT_A_TIME = {"cpu": 1 << 16}
ELEMENTS_ELSEWHERE = 1 << 21
"""Padded [rows, k] entries worked on at a time: half a megabyte, or 16, a double tensor."""


@dataclass
class Limits:
    """What is assumed of all rows of a step, so that the host need not ask an accelerator for each.

    Attributes:
        width: ids that lead a row at most.
        seen: largest k, and largest spread of top logits, that were met since [2].
    """

    width: int = 1024
    seen: Tensor | None = None

    def note(self, k: Tensor, spread: Tensor) -> None:
        """Keep the largest of some rows' k, and the largest spread."""
        found = torch.stack([k.amax().double(), spread.double()])
        self.seen = found if self.seen is None else torch.maximum(self.seen, found)

    def held(self) -> bool:
        """Whether all rows kept to the limits, asked once; the width follows what was met."""
        if self.seen is None:
            return True
        (largest, spread), self.seen = self.seen.tolist(), None
        kept = largest <= self.width and spread <= LARGEST_SPREAD
        if 1.25 * largest > self.width:
            self.width = 1 << math.ceil(math.log2(1.25 * largest))
        return bool(kept)


def dbild(
    teacher: Tensor,
    other: Tensor,
    *,
    temperature: float = 3.0,
    direction: Direction = "reverse",
    curve: Curve = "logits",
    candidates: Candidates = "full",
    k_min: int = 2,
    k_max: int | None = None,
    pairs: PairForm = "flat",
    ids: Ids = "each",
    weight_by: Weighting = "equal",
    teacher_top: TopLogits | None = None,
    limits: Limits | None = None,
) -> Tensor:
    """Dynamic bi-directional logits-difference loss (Switch-KD, arXiv 2604.14629), [N].

    The differences of all pairs among the teacher's top logits become a distribution, and so do
    those among the top logits of `other`; on both sets of ids the two models' distributions
    are compared, and the two divergences added. Each side leads with the logits above its knee.

    The paper leaves choices open, and public codes read it in different ways; each is an option.

    Args:
        direction: `reverse` is KL(other || teacher), `forward` is KL(teacher || other); `led` is
            forward on the teacher's ids and reverse on the other's.
        curve, candidates, k_min, k_max: as in `knee`; k_min = k_max is a fixed k.
        pairs: one softmax over all pairs (`flat`); one for each top logit's differences to
            those behind it, the divergences averaged (`row-wise`); or one over the top logits
            themselves (`none`).
        ids: both sides' top ids apart, two divergences added (`each`), or their union in the
            teacher's order, one divergence (`union`).
        weight_by: `entropy` weighs a position by the teacher's entropy over the vocabulary, as a
            share of the largest possible one.
        teacher_top: `top_logits(teacher, ...)` where it is known from another term.
        limits: ask the device for nothing; the values count where `limits.held()` afterwards.
    """
    _check(teacher, other, temperature)
    options: dict[str, Any] = {
        "curve": curve,
        "candidates": candidates,
        "k_min": k_min,
        "k_max": k_max,
        "width": None if limits is None else min(limits.width, teacher.shape[-1]),
    }
    by_teacher = top_logits(teacher, **options) if teacher_top is None else teacher_top
    tops: tuple[TopLogits, ...] = (by_teacher, top_logits(other, **options))
    if ids == "union":
        if direction == "led":
            raise UsageError("A union of ids has one leader.", "Set ids to each, or a direction.")
        if limits is not None:  # one side's ids, cut off, may be no more than the union's
            limits.note(torch.cat([top.k for top in tops]), teacher.new_zeros(()))
        tops = (_union(teacher.detach(), tops[0], tops[1], limits),)
    elif ids != "each":
        raise UsageError(f"ids is {ids!r}.", "Choose each or union.")
    values = _over(tops, teacher, other, temperature, direction, pairs, limits)
    if weight_by == "equal":
        return values
    if weight_by != "entropy":
        raise UsageError(f"weight_by is {weight_by!r}.", "Choose equal or entropy.")
    logs = F.log_softmax(teacher.detach().to(_at_least_float32(teacher)), dim=-1)
    entropy = -(logs.exp() * logs).sum(dim=-1)  # [N]
    return values * (entropy / max(math.log(teacher.shape[-1]), 1e-30)).to(values.dtype)


def bild(
    teacher: Tensor,
    other: Tensor,
    *,
    top_k: int = 8,
    temperature: float = 3.0,
    direction: Direction = "forward",
    limits: Limits | None = None,
) -> Tensor:
    """Bi-directional logits-difference loss with a fixed k (BiLD, arXiv 2406.13555), [N]."""
    _check(teacher, other, temperature)
    width = None if limits is None else top_k
    tops = tuple(top_logits(each, top_k=top_k, width=width) for each in (teacher, other))
    return _over(tops, teacher, other, temperature, direction, "flat", limits)


def kl(teacher: Tensor, other: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Forward Kullback-Leibler divergence KL(teacher || other) over the whole vocabulary, [N].

    Without the factor temperature^2 that some authors add.
    """
    target, found = _log_probabilities(teacher, other, temperature)
    return (target.exp() * (target - found)).sum(dim=-1)


def rkl(teacher: Tensor, other: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Reverse Kullback-Leibler divergence KL(other || teacher) over the whole vocabulary, [N]."""
    target, found = _log_probabilities(teacher, other, temperature)
    return (found.exp() * (found - target)).sum(dim=-1)


def jsd(teacher: Tensor, other: Tensor, *, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1), [N].

    With M = beta teacher + (1 - beta) other: beta KL(teacher || M) + (1 - beta) KL(other || M).
    """
    if not 0 < beta < 1:
        raise UsageError(f"beta is {beta}.", "Choose a number between 0 and 1.")
    target, found = _log_probabilities(teacher, other, temperature)
    log_beta = torch.tensor(beta, dtype=found.dtype, device=found.device).log()
    log_rest = torch.tensor(1 - beta, dtype=found.dtype, device=found.device).log()
    mixture = torch.logaddexp(target + log_beta, found + log_rest)
    from_teacher = (target.exp() * (target - mixture)).sum(dim=-1)
    from_other = (found.exp() * (found - mixture)).sum(dim=-1)
    return beta * from_teacher + (1 - beta) * from_other


def _log_probabilities(teacher: Tensor, other: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-softmax of both sides in float32 or better; a constant for the teacher."""
    _check(teacher, other, temperature)
    wide = _at_least_float32(other)
    target = F.log_softmax(teacher.detach().to(wide) / temperature, dim=-1)
    return target, F.log_softmax(other.to(wide) / temperature, dim=-1)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check(teacher: Tensor, other: Tensor, temperature: float) -> None:
    if teacher.dim() != 2 or teacher.shape != other.shape:
        raise UsageError(
            f"The logits differ in shape: teacher {tuple(teacher.shape)}, "
            f"other {tuple(other.shape)}.",
            "Both must be [positions, vocabulary] over one vocabulary.",
        )
    if not temperature > 0:
        raise UsageError(f"temperature is {temperature}.", "Choose a number above 0.")


# Pairs of top logits


def _over(
    tops: tuple[TopLogits, ...],
    teacher: Tensor,
    other: Tensor,
    temperature: float,
    direction: str,
    pairs: PairForm,
    limits: Limits | None,
) -> Tensor:
    """Sum of the divergences over one or two sides' top ids, the teacher's first, [N]."""
    if direction not in ("forward", "reverse", "led"):
        raise UsageError(f"direction is {direction!r}.", "Choose forward, reverse or led.")
    if pairs not in ("flat", "row-wise", "none"):
        raise UsageError(f"pairs is {pairs!r}.", "Choose flat, row-wise or none.")
    if direction != "led":
        given = (tops, temperature, direction, pairs, limits)
        return _PairDivergence.apply(teacher.detach(), other, *given)
    first, second = (
        _over((top,), teacher, other, temperature, way, pairs, limits)
        for top, way in zip(tops, ("forward", "reverse"), strict=True)
    )
    return first + second


def _union(
    teacher: Tensor, by_teacher: TopLogits, by_other: TopLogits, limits: Limits | None
) -> TopLogits:
    """Ids that lead on either side, in falling order of the teacher's logits, equal ones by id."""
    chosen = torch.zeros_like(teacher, dtype=torch.bool)  # [N, V]
    for top in (by_teacher, by_other):
        chosen |= torch.zeros_like(chosen).scatter_(1, top.ids, top.mask)
    k = chosen.sum(dim=-1)
    if limits is None:
        width = int(k.max()) if len(k) else 0
    else:
        width = by_teacher.ids.shape[1] + by_other.ids.shape[1]
    order = torch.sort(
        teacher.masked_fill(~chosen, -torch.inf), dim=-1, descending=True, stable=True
    )
    return TopLogits(k, order.indices[:, :width])


class _PairDivergence(torch.autograd.Function):
    """KL between pair distributions over each side's top ids, summed over the sides, [N].

    The gradient is made with the value: what is kept for the backward pass is [N, k], not [N, V].
    It is zero behind each row's k. Fewer than two top logits are worth 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        teacher: Tensor,
        other: Tensor,
        tops: tuple[TopLogits, ...],
        temperature: float,
        direction: str,
        pairs: PairForm,
        limits: Limits | None,
    ) -> Tensor:
        # mps has no double precision
        device = torch.device("cpu") if other.device.type == "mps" else other.device
        top = join(tops)  # [M = sides x N, largest k]
        kind = _at_least_float32(other)
        values = torch.zeros(len(top.k), dtype=kind, device=device)
        gradients = torch.zeros(top.ids.shape, dtype=kind, device=device)
        divergence: Callable[..., tuple[Tensor, Tensor | None]]
        divergence = {"flat": _flat, "row-wise": _row_wise, "none": _no_pairs}[pairs]
        if limits is not None:
            limits.note(top.k, torch.zeros((), device=device))
            if pairs == "flat":
                divergence = partial(_flat, limits=limits)
        of_other = _gather(other, top.ids).to(device)  # [M, largest k]
        of_teacher = _gather(teacher, top.ids).to(device)
        k = top.k.to(device)
        for group, size in _groups(k, top.ids.shape[1], asking=limits is None):
            a = of_other[group, :size].double() / temperature
            b = of_teacher[group, :size].double() / temperature
            mask = torch.arange(size, device=device) < k[group].unsqueeze(-1)
            value, gradient = divergence(a, b, mask, direction, ctx.needs_input_grad[1])
            values[group] = value.to(kind)
            if gradient is not None:
                gradients[group, :size] = gradient.div_(temperature).to(kind)
        ctx.save_for_backward(top.ids, gradients.to(other.device))
        ctx.shape, ctx.type, ctx.sides = other.shape, other.dtype, len(tops)
        return values.to(other.device).view(len(tops), -1).sum(dim=0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ids, gradient = ctx.saved_tensors
        full = grad.new_zeros(ctx.shape)  # [N, V]
        for top, slope in zip(ids.chunk(ctx.sides), gradient.chunk(ctx.sides), strict=True):
            full.scatter_add_(1, top, slope * grad.unsqueeze(-1))
        return None, full.to(ctx.type), None, None, None, None, None


def _groups(k: Tensor, width: int, asking: bool = True) -> list[tuple[Tensor | slice, int]]:
    """Rows that are worked on together, and the width they need: k [M] differs from row to row."""
    if width < 2:
        return []
    at_a_time = ELEMENTS_AT_A_TIME.get(k.device.type, ELEMENTS_ELSEWHERE)
    if not asking:
        rows = max(1, at_a_time // width)
        return [(slice(start, start + rows), width) for start in range(0, len(k), rows)]
    if len(k) * width <= at_a_time:
        return [(slice(None), width)]
    order = k.argsort(descending=True)
    falling = k[order].tolist()
    groups: list[tuple[Tensor | slice, int]] = []
    start = 0
    while start < len(k) and falling[start] >= 2:
        size, end = falling[start], start + 1
        most = max(1, at_a_time // size)
        while end < len(k) and falling[end] >= max(size / 2, 2) and end - start < most:
            end += 1
        groups.append((order[start:end], size))
        start = end
    return groups


def _gather(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits [N, V] at ids [M, k] whose rows repeat every N."""
    if not len(ids):
        return logits.new_zeros(ids.shape)
    return torch.cat([logits.gather(1, part) for part in ids.split(len(logits))])


def _flat(
    other: Tensor,
    teacher: Tensor,
    mask: Tensor,
    direction: str,
    with_gradient: bool,
    limits: Limits | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One distribution over all pairs: KL [n] and its gradient at `other` [n, k]."""
    a, b = (other, teacher) if direction == "reverse" else (teacher, other)
    widest = torch.stack([(z.amax(dim=-1) - z.amin(dim=-1)).amax() for z in (a, b)]).amax()
    if limits is not None:
        limits.note(mask.new_zeros(1, dtype=torch.long), widest)
    sums = _ScaledSums if limits is not None or widest <= LARGEST_SPREAD else _LogSums
    of_a, of_b = sums(a, mask), sums(b, mask)
    later, earlier = of_a.later(), of_a.earlier()
    slope = later - earlier  # d log Z(a) / da
    difference = a - b
    value = of_b.log_z - of_a.log_z + (slope * difference).sum(dim=-1)
    value = value.clamp_(min=0)  # below zero by rounding only
    if not with_gradient:
        return value, None
    if direction == "forward":
        return value, of_b.later() - of_b.earlier() - slope
    # H(a) (a - b). The differences are shifted to be positive, for the logarithms' sake.
    shift = difference - difference.amin(dim=-1, keepdim=True)
    mean = (shift * slope).sum(dim=-1, keepdim=True)
    gradient = later * (shift - mean) - of_a.later(shift)
    gradient += earlier * (shift + mean) - of_a.earlier(shift)
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
        self._later = self.up * _suffix_sum(self.down)
        self.z = self._later.sum(dim=-1, keepdim=True)  # [n, 1]
        self.log_z = (self.z.log() + high - low).squeeze(-1)  # [n]

    def later(self, weight: Tensor | None = None) -> Tensor:
        """sum_{j>i} p_ij w_j, [n, k]."""
        if weight is None:
            return self._later / self.z
        return _suffix_sum(self.down * weight).mul_(self.up).div_(self.z)

    def earlier(self, weight: Tensor | None = None) -> Tensor:
        """sum_{i<j} p_ij w_i, [n, k]."""
        up = self.up if weight is None else self.up * weight
        return _prefix_sum(up).mul_(self.down).div_(self.z)


class _LogSums:
    """The same sums through logarithms, for rows of any width; weights are not negative."""

    def __init__(self, z: Tensor, mask: Tensor) -> None:
        self.up = z.masked_fill(~mask, -torch.inf)
        self.down = (-z).masked_fill(~mask, -torch.inf)
        self.log_z = (self.up + _log_suffix_sum(self.down)).logsumexp(dim=-1)  # [n]

    def later(self, weight: Tensor | None = None) -> Tensor:
        """sum_{j>i} p_ij w_j, [n, k]."""
        down = self.down if weight is None else self.down + weight.log()
        return (self.up + _log_suffix_sum(down) - self.log_z.unsqueeze(-1)).exp()

    def earlier(self, weight: Tensor | None = None) -> Tensor:
        """sum_{i<j} p_ij w_i, [n, k]."""
        up = self.up if weight is None else self.up + weight.log()
        return (self.down + _log_prefix_sum(up) - self.log_z.unsqueeze(-1)).exp()


def _row_wise(
    other: Tensor, teacher: Tensor, mask: Tensor, direction: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """One distribution q_ij ~ exp(-a_j), j > i, for each i < k: mean KL [n] and its gradient."""
    a, b = (other, teacher) if direction == "reverse" else (teacher, other)
    down_a, down_b = ((-z).masked_fill(~mask, -torch.inf) for z in (a, b))
    norm_a, norm_b = _log_suffix_sum(down_a), _log_suffix_sum(down_b)  # [n, k]
    has_pairs = F.pad(mask[:, 1:], (0, 1))
    share = 1 / has_pairs.sum(dim=-1)  # [n]
    low = (a - b).amin(dim=-1, keepdim=True)
    shift = a - b - low
    # Mean of the shifted differences under q_i, [n, k].
    log_mean = (_log_suffix_sum(down_a + shift.log()) - norm_a).masked_fill(~has_pairs, -torch.inf)
    value = (norm_b - norm_a - log_mean.exp() - low).masked_fill(~has_pairs, 0.0).clamp_(min=0)
    value = value.sum(dim=-1) * share
    if not with_gradient:
        return value, None

    def received(down: Tensor, norm: Tensor, log_weight: Tensor | float = 0.0) -> Tensor:
        """sum_{i<m} q_im w_i, [n, k]."""
        inner = (log_weight - norm).masked_fill(~has_pairs, -torch.inf)
        return (down + _log_prefix_sum(inner)).exp()

    if direction == "forward":
        gradient = received(down_a, norm_a) - received(down_b, norm_b)
    else:
        gradient = shift * received(down_a, norm_a) - received(down_a, norm_a, log_mean)
    return value, gradient * share.unsqueeze(-1)


def _no_pairs(
    other: Tensor, teacher: Tensor, mask: Tensor, direction: str, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """One distribution over the top logits themselves: KL [n] and its gradient at `other`."""
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


def _prefix_sum(terms: Tensor) -> Tensor:
    """sum_{i<j} terms_i for every j along the last dimension."""
    return F.pad(terms[:, :-1].cumsum(dim=-1), (1, 0))


def _suffix_sum(terms: Tensor) -> Tensor:
    """sum_{j>i} terms_j for every i along the last dimension."""
    return _prefix_sum(terms.flip(-1)).flip(-1)


def _log_prefix_sum(logs: Tensor) -> Tensor:
    """log sum_{i<j} exp(logs_i) for every j along the last dimension; -inf for the first."""
    return F.pad(logs[:, :-1].logcumsumexp(dim=-1), (1, 0), value=-torch.inf)


def _log_suffix_sum(logs: Tensor) -> Tensor:
    """log sum_{j>i} exp(logs_j) for every i along the last dimension; -inf for the last."""
    return _log_prefix_sum(logs.flip(-1)).flip(-1)
