"""What the student is asked to match: pure tensor functions, one value an answer position.

`teacher` and `other` are logits [N, V] of any float type; `other` is the student's or the visual
switch's. The result is [N] (its mean or sum is the caller's), computed in float32 or better. Rows
are independent, so callers may work through them in chunks. Gradients reach `other` only.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_bench.distill.knee import Candidates, Curve, Lead, join, knee, leading
from kd_bench.distill.pairs import PairForm, pair_divergence
from kd_bench.errors import UsageError

__all__ = ["Direction", "Lead", "bild", "dbild", "jsd", "kl", "knee", "leading", "rkl"]

Direction = Literal["forward", "reverse"]


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
    teacher_lead: Lead | None = None,
) -> Tensor:
    """Dynamic bi-directional logits-difference loss (Switch-KD, arXiv 2604.14629), [N].

    The differences of all pairs among the teacher's leading logits become a distribution, and so
    do those among the leading logits of `other`; on both sets of ids the two models' distributions
    are compared, and the two divergences added. Each side leads with the logits above its knee.

    Args:
        direction: `reverse` is KL(other || teacher), `forward` is KL(teacher || other).
        curve, candidates, k_min, k_max: as in `knee`.
        pairs: one softmax over all pairs (`flat`), or one for each leading logit's differences
            to those behind it, the divergences averaged (`row-wise`).
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
    return _both_ways(teacher, other, led, leading(other, **options), temperature, direction, pairs)


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
    return _both_ways(teacher, other, ours, theirs, temperature, direction, "flat")


def _both_ways(
    teacher: Tensor,
    other: Tensor,
    teacher_lead: Lead,
    other_lead: Lead,
    temperature: float,
    direction: Direction,
    pairs: PairForm,
) -> Tensor:
    if direction not in ("forward", "reverse"):
        raise UsageError(f"direction is {direction!r}.", "Choose forward or reverse.")
    if pairs not in ("flat", "row-wise"):
        raise UsageError(f"pairs is {pairs!r}.", "Choose flat or row-wise.")
    leads = (teacher_lead, other_lead)
    return _Pairs.apply(teacher.detach(), other, leads, temperature, direction, pairs)


class _Pairs(torch.autograd.Function):
    """Sum of the pair divergences over both leads.

    The gradient is made with the value: what is kept for the backward pass is [N, k], not [N, V].
    """

    @staticmethod
    def forward(
        ctx: Any,
        teacher: Tensor,
        other: Tensor,
        leads: tuple[Lead, Lead],
        temperature: float,
        direction: Direction,
        pairs: PairForm,
    ) -> Tensor:
        lead = join(leads)  # [2 N, k]
        values, gradient = pair_divergence(
            teacher, other, lead, temperature, direction, pairs, ctx.needs_input_grad[1]
        )
        if gradient is not None:
            ctx.save_for_backward(lead.ids, gradient)
        ctx.shape, ctx.type = other.shape, other.dtype
        return values.view(2, -1).sum(dim=0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ids, gradient = ctx.saved_tensors
        full = grad.new_zeros(ctx.shape)  # [N, V]
        for led, slope in zip(ids.chunk(2), gradient.chunk(2), strict=True):
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
