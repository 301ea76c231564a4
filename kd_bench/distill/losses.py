"""What the student is asked to match: pure tensor functions, one value an answer position.

`teacher` and `other` are logits [N, V] of any float type; `other` is the student's or the visual
switch's. The result is [N] (its mean or sum is the caller's), computed in float32 or better. Rows
are independent, so callers may work through them in chunks. Gradients reach `other` only.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_bench.distill.knee import Candidates, Curve, Lead, join, leading
from kd_bench.distill.knee import knee as knee  # a public name of the losses
from kd_bench.distill.pairs import PairForm, pair_divergence
from kd_bench.errors import UsageError

Direction = Literal["forward", "reverse", "led"]
Ids = Literal["each", "union"]
Weighting = Literal["equal", "entropy"]


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
    teacher_lead: Lead | None = None,
) -> Tensor:
    """Dynamic bi-directional logits-difference loss (Switch-KD, arXiv 2604.14629), [N].

    The differences of all pairs among the teacher's leading logits become a distribution, and so
    do those among the leading logits of `other`; on both sets of ids the two models' distributions
    are compared, and the two divergences added. Each side leads with the logits above its knee.

    The paper leaves choices open, and public codes read it in different ways; each is an option.

    Args:
        direction: `reverse` is KL(other || teacher), `forward` is KL(teacher || other); `led` is
            forward on the teacher's ids and reverse on the other's.
        curve, candidates, k_min, k_max: as in `knee`; k_min = k_max is a fixed k.
        pairs: one softmax over all pairs (`flat`); one for each leading logit's differences to
            those behind it, the divergences averaged (`row-wise`); or one over the leading logits
            themselves (`none`).
        ids: both sides' leading ids apart, two divergences added (`each`), or their union in the
            teacher's order, one divergence (`union`).
        weight_by: `entropy` weighs a position by the teacher's entropy over the vocabulary, as a
            share of the largest possible one.
        teacher_lead: `leading(teacher, ...)` where it is known from another term.
    """
    _check(teacher, other, temperature)
    options: dict[str, Any] = {
        "curve": curve,
        "candidates": candidates,
        "k_min": k_min,
        "k_max": k_max,
    }
    led = teacher_lead if teacher_lead is not None else leading(teacher, **options)
    leads: tuple[Lead, ...] = (led, leading(other, **options))
    if ids == "union":
        if direction == "led":
            raise UsageError("A union of ids has one leader.", "Set ids to each, or a direction.")
        leads = (_union(teacher.detach(), *leads),)
    elif ids != "each":
        raise UsageError(f"ids is {ids!r}.", "Choose each or union.")
    values = _over(leads, teacher, other, temperature, direction, pairs)
    if weight_by == "equal":
        return values
    if weight_by != "entropy":
        raise UsageError(f"weight_by is {weight_by!r}.", "Choose equal or entropy.")
    return values * _relative_entropy(teacher.detach()).to(values.dtype)


def bild(
    teacher: Tensor,
    other: Tensor,
    *,
    top_k: int = 8,
    temperature: float = 3.0,
    direction: Direction = "forward",
) -> Tensor:
    """Bi-directional logits-difference loss with a fixed k (BiLD, arXiv 2406.13555), [N]."""
    _check(teacher, other, temperature)
    ours, theirs = leading(teacher, top_k=top_k), leading(other, top_k=top_k)
    return _over((ours, theirs), teacher, other, temperature, direction, "flat")


def _over(
    leads: tuple[Lead, ...],
    teacher: Tensor,
    other: Tensor,
    temperature: float,
    direction: Direction,
    pairs: PairForm,
) -> Tensor:
    """Sum of the divergences over one or two leads, the teacher's first, [N]."""
    if direction not in ("forward", "reverse", "led"):
        raise UsageError(f"direction is {direction!r}.", "Choose forward, reverse or led.")
    if pairs not in ("flat", "row-wise", "none"):
        raise UsageError(f"pairs is {pairs!r}.", "Choose flat, row-wise or none.")
    if direction == "led":
        by_teacher, by_other = leads
        return _over((by_teacher,), teacher, other, temperature, "forward", pairs) + _over(
            (by_other,), teacher, other, temperature, "reverse", pairs
        )
    return _Pairs.apply(teacher.detach(), other, leads, temperature, direction, pairs)


def _union(teacher: Tensor, by_teacher: Lead, by_other: Lead) -> Lead:
    """Ids that lead on either side, in falling order of the teacher's logits, equal ones by id."""
    chosen = torch.zeros_like(teacher, dtype=torch.bool)  # [N, V]
    for lead in (by_teacher, by_other):
        chosen |= torch.zeros_like(chosen).scatter_(1, lead.ids, lead.mask)
    k = chosen.sum(dim=-1)
    width = int(k.max()) if len(k) else 0
    order = torch.sort(
        teacher.masked_fill(~chosen, -torch.inf), dim=-1, descending=True, stable=True
    )
    return Lead(k, order.indices[:, :width])


def _relative_entropy(logits: Tensor) -> Tensor:
    """Entropy of each row over the largest possible one, [N], from 0 to 1."""
    logs = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    entropy = -(logs.exp() * logs).sum(dim=-1)
    return entropy / max(math.log(logits.shape[-1]), 1e-30)


class _Pairs(torch.autograd.Function):
    """Sum of the pair divergences over all leads.

    The gradient is made with the value: what is kept for the backward pass is [N, k], not [N, V].
    """

    @staticmethod
    def forward(
        ctx: Any,
        teacher: Tensor,
        other: Tensor,
        leads: tuple[Lead, ...],
        temperature: float,
        direction: Direction,
        pairs: PairForm,
    ) -> Tensor:
        lead = join(leads)  # [leads x N, k]
        values, gradient = pair_divergence(
            teacher, other, lead, temperature, direction, pairs, ctx.needs_input_grad[1]
        )
        if gradient is not None:
            ctx.save_for_backward(lead.ids, gradient)
        ctx.shape, ctx.type, ctx.leads = other.shape, other.dtype, len(leads)
        return values.view(len(leads), -1).sum(dim=0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ids, gradient = ctx.saved_tensors
        full = grad.new_zeros(ctx.shape)  # [N, V]
        for led, slope in zip(ids.chunk(ctx.leads), gradient.chunk(ctx.leads), strict=True):
            full.scatter_add_(1, led, slope * grad.unsqueeze(-1))
        return None, full.to(ctx.type), None, None, None, None


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
    wide = torch.promote_types(other.dtype, torch.float32)
    target = F.log_softmax(teacher.detach().to(wide) / temperature, dim=-1)
    return target, F.log_softmax(other.to(wide) / temperature, dim=-1)


def _check(teacher: Tensor, other: Tensor, temperature: float) -> None:
    if teacher.dim() != 2 or teacher.shape != other.shape:
        raise UsageError(
            f"The logits differ in shape: teacher {tuple(teacher.shape)}, "
            f"other {tuple(other.shape)}.",
            "Both must be [positions, vocabulary] over one vocabulary.",
        )
    if not temperature > 0:
        raise UsageError(f"temperature is {temperature}.", "Choose a number above 0.")
