"""Compute an objective: terms -> one loss, in memory that does not grow with the answers.

Hidden states at the answer positions go through the LM heads and the losses a chunk at a time.
Each chunk's gradient is taken at once and its logits are dropped, so the logits of a whole batch
[positions, vocabulary] never exist and nothing is computed twice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_bench.distill import losses
from kd_bench.distill.knee import Lead, knee, leading
from kd_bench.distill.recipe import Term

KNEE_OPTIONS = ("curve", "candidates", "k_min", "k_max")


@dataclass(frozen=True)
class Heads:
    """LM heads of both models.

    Attributes:
        student, teacher: hidden states [n, width] -> logits [n, vocabulary].
        parameters: weights of the student's head, those that learn.
        vocabulary: rows that both sides are cut to where the teacher is compared; None is all.
    """

    student: Callable[[Tensor], Tensor]
    teacher: Callable[[Tensor], Tensor] | None = None
    parameters: Sequence[nn.Parameter] = ()
    vocabulary: int | None = None


@dataclass
class KneeLog:
    """Knee positions k met by the DBiLD terms, by whose logits they were found on."""

    knees: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, side: str, k: Tensor) -> None:
        """Keep the knees [n] found on one side's logits."""
        self.knees.setdefault(side, []).append(k.cpu())

    def summary(self) -> dict[str, float]:
        """Mean and quantiles of k by side, e.g. `knee_teacher_p50`."""
        result = {}
        for side, parts in self.knees.items():
            k = torch.cat(parts).double()
            if not len(k):
                continue
            result[f"knee_{side}_mean"] = float(k.mean())
            for percent in (10, 50, 90, 100):
                result[f"knee_{side}_p{percent}"] = float(k.quantile(percent / 100))
        return result


def token_terms(
    terms: Sequence[Term],
    heads: Heads,
    hidden: Mapping[str, Tensor],
    targets: Tensor,
    items: Tensor | float,
    *,
    chunk: int = 512,
    knee_log: KneeLog | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the terms over answer positions, and each term's own unweighted value.

    Args:
        hidden: `student` [N, width], `teacher` and `switch` [N, teacher's width], as terms need.
        targets: token ids [N].
        items: answer positions of the whole batch, over all devices and accumulation pieces.
        chunk: positions that pass through heads and losses at a time.

    Returns:
        The loss, a scalar; and by term label its sum over the N positions divided by `items`.
    """
    active = [term for term in terms if term.weight]
    names = [name for name, states in hidden.items() if states.requires_grad]
    parameters = [p for p in heads.parameters if p.requires_grad and "student" in hidden]
    scale = 1.0 / torch.as_tensor(items, dtype=torch.float32, device=targets.device).clamp(min=1)

    def run(pieces: Mapping[str, Tensor], wanted: Tensor) -> tuple[Tensor, list[Tensor]]:
        values = _values(active, heads, pieces, wanted, knee_log)
        total = sum(term.weight * v for term, v in zip(active, values, strict=True)) * scale
        return total, values

    job = _Job(run, dict(hidden), targets, names, parameters, chunk, len(active))
    loss, values = _InChunks.apply(job, *(hidden[name] for name in names), *parameters)
    logged = {term.label: values[i] * scale for i, term in enumerate(active)}
    return loss, logged


def _values(
    terms: Sequence[Term],
    heads: Heads,
    hidden: Mapping[str, Tensor],
    targets: Tensor,
    knee_log: KneeLog | None,
) -> list[Tensor]:
    """Sum of every term over the positions of one chunk."""
    logits: dict[str, Tensor] = {}
    for name, states in hidden.items():
        head = heads.student if name == "student" else heads.teacher
        assert head is not None  # only a teacher makes teacher or switch states
        logits[name] = head(states)  # [n, vocabulary]
    cut = {name: rows[:, : heads.vocabulary] for name, rows in logits.items()}
    leads = _Leads(cut, knee_log)
    return [_value(term, logits, cut, targets, leads) for term in terms]


def _value(
    term: Term,
    logits: Mapping[str, Tensor],
    cut: Mapping[str, Tensor],
    targets: Tensor,
    leads: "_Leads",
) -> Tensor:
    """Sum of one term over the positions of one chunk."""
    if term.loss == "ce":
        return F.cross_entropy(logits["student"].float(), targets, reduction="sum")
    options = dict(term.options)
    if term.loss == "dbild":
        options["teacher_lead"] = leads.teacher(term)
    function = getattr(losses, term.loss)
    per_token: Tensor = function(cut["teacher"].detach(), cut[term.of], **options)  # [n]
    return per_token.sum()


class _Leads:
    """The teacher's leading logits, found once for all terms that look for them in one way."""

    def __init__(self, logits: Mapping[str, Tensor], knee_log: KneeLog | None) -> None:
        self.logits = logits
        self.knee_log = knee_log
        self.found: dict[tuple[tuple[str, object], ...], Lead] = {}
        self.logged: set[str] = set()

    def teacher(self, term: Term) -> Lead:
        options: dict[str, Any] = {
            name: value for name, value in term.options.items() if name in KNEE_OPTIONS
        }
        key = tuple(sorted(options.items()))
        if key not in self.found:
            self.found[key] = leading(self.logits["teacher"], **options)
        if self.knee_log is not None:
            self._log("teacher", self.found[key].k)
            if term.of not in self.logged:
                self._log(term.of, knee(self.logits[term.of].detach(), **options))
        return self.found[key]

    def _log(self, side: str, k: Tensor) -> None:
        """One distribution a side, found the way its first DBiLD term finds it."""
        if self.knee_log is not None and side not in self.logged:
            self.logged.add(side)
            self.knee_log.add(side, k)


@dataclass(frozen=True)
class _Job:
    """What `_InChunks` runs; a plain object because autograd functions take positions only."""

    run: Callable[[Mapping[str, Tensor], Tensor], tuple[Tensor, list[Tensor]]]
    hidden: dict[str, Tensor]
    targets: Tensor
    names: list[str]
    parameters: list[nn.Parameter]
    chunk: int
    terms: int


class _InChunks(torch.autograd.Function):
    """Loss and term values; the gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        device = job.targets.device
        loss = torch.zeros((), device=device)
        values = torch.zeros(job.terms, device=device)
        wants_grad = any(ctx.needs_input_grad[1:])
        states = inputs[: len(job.names)]
        gradients = [torch.zeros_like(tensor) for tensor in inputs] if wants_grad else []
        for start in range(0, len(job.targets), job.chunk):
            piece = slice(start, start + job.chunk)
            pieces = {name: tensor[piece].detach() for name, tensor in job.hidden.items()}
            with torch.set_grad_enabled(wants_grad):
                leaves = []
                for name, tensor in zip(job.names, states, strict=True):
                    pieces[name] = tensor[piece].detach().requires_grad_(wants_grad)
                    leaves.append(pieces[name])
                total, found = job.run(pieces, job.targets[piece])
            loss += total.detach()
            values += torch.stack([value.detach() for value in found])
            if wants_grad and total.requires_grad:
                _accumulate(gradients, total, leaves, job.parameters, piece)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Any, ...]:
        return (None, *(gradient * grad_loss for gradient in ctx.saved_tensors))


def _accumulate(
    gradients: list[Tensor],
    total: Tensor,
    leaves: list[Tensor],
    parameters: list[nn.Parameter],
    piece: slice,
) -> None:
    """Add one chunk's gradients: rows of the hidden states, sums for the head's weights."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        total, [*leaves, *parameters], allow_unused=True
    )
    for index, gradient in enumerate(found):
        if gradient is None:
            continue
        if index < len(leaves):
            gradients[index][piece] = gradient
        else:
            gradients[index] += gradient
