"""Compute an objective: terms -> one loss, in memory that does not grow with the answers.

Hidden states at the answer positions go through the LM heads and the losses a chunk at a time.
Each chunk's gradient is taken at once and its logits are dropped, so the logits of a whole batch
[positions, vocabulary] never exist and nothing is computed twice.

Beside these stand the terms on image tokens of the methods that Switch-KD is compared with:
LLaVA-KD (arXiv 2410.16236) compares the last layer at image positions, Align-KD (arXiv 2412.01282)
the projected image tokens and the first layer's attention from text to image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_bench.distill import losses
from kd_bench.distill.knee import TopLogits, top_logits
from kd_bench.distill.recipe import KNEE_OPTIONS, Term


def count_items(batch: Mapping[str, Tensor], image_token_id: int) -> dict[str, Tensor]:
    """What the sums of the terms are divided by.

    Added up over micro-batches and devices, the terms are the same on any number of them.

    Returns:
        answers: positions whose next token is supervised.
        image_samples: samples with an image.
        image_tokens: image positions.
        image_pairs: text positions times the image positions before each.
    """
    places = batch["input_ids"] == image_token_id  # [batch, length]
    asks = batch["attention_mask"].bool() & ~places
    return {
        "answers": (batch["labels"][:, 1:] != -100).sum(),
        "image_samples": places.any(1).sum(),
        "image_tokens": places.sum(),
        "image_pairs": (places.cumsum(1) * asks).sum(),
    }


# Terms on logits


@dataclass(frozen=True)
class Heads:
    """LM heads of both models.

    Attributes:
        student, teacher: hidden states [n, width] -> logits [n, vocabulary].
        parameters: weights of the student's head, those that learn.
        vocabulary: size that both sides are cut to where the teacher is compared; None is all.
    """

    student: Callable[[Tensor], Tensor]
    teacher: Callable[[Tensor], Tensor] | None = None
    parameters: Sequence[nn.Parameter] = ()
    vocabulary: int | None = None


@dataclass
class KneeLog:
    """Knee positions k met by the DBiLD terms, by whose logits they were found on."""

    knees: dict[str, list[Tensor]] = field(default_factory=dict)

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
    limits: losses.Limits | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the terms over answer positions, and each term's own unweighted value.

    Args:
        hidden: `student` [N, width], `teacher` and `switch` [N, teacher's width], as terms need.
        targets: token ids [N].
        items: answer positions of the whole batch, over all devices and micro-batches.
        chunk: positions that pass through heads and losses at a time.
        limits: the device is asked once whether all chunks kept to them, instead of in each chunk;
            where one did not, all are computed again without.

    Returns:
        The loss, a scalar; and by term label its sum over the N positions divided by `items`.
    """
    active = [term for term in terms if term.weight]
    work = partial(_in_chunks, active, heads, hidden, targets, items, chunk)
    knees: dict[str, list[Tensor]] | None = None if knee_log is None else {}
    loss, sums, inputs, gradients = work(knees, limits)
    if limits is not None and not limits.held():
        knees = None if knee_log is None else {}
        loss, sums, inputs, gradients = work(knees, None)
    for side, parts in (knees or {}).items():
        assert knee_log is not None
        knee_log.knees.setdefault(side, []).extend(parts)
    if inputs:
        loss = _WithGradients.apply(loss, gradients, *inputs)
    return loss, {term.label: value for term, value in zip(active, sums, strict=True)}


def _in_chunks(
    active: Sequence[Term],
    heads: Heads,
    hidden: Mapping[str, Tensor],
    targets: Tensor,
    items: Tensor | float,
    chunk: int,
    knees: dict[str, list[Tensor]] | None,
    limits: losses.Limits | None,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Loss, sums of the terms divided by `items`, what learns, and the loss's gradients at it."""
    learning = torch.is_grad_enabled()
    names = [name for name, states in hidden.items() if states.requires_grad and learning]
    parameters = [p for p in heads.parameters if p.requires_grad and "student" in hidden]
    inputs = [*(hidden[name] for name in names), *parameters] if learning else []
    gradients = [torch.zeros_like(hidden[name]) for name in names]
    of_weights: list[Tensor | None] = [None] * len(parameters)  # the head's may be half a gigabyte
    scale = 1.0 / torch.as_tensor(items, dtype=torch.float32, device=targets.device).clamp(min=1)
    loss = torch.zeros((), device=targets.device)
    sums = torch.zeros(len(active), device=targets.device)
    for start in range(0, len(targets), chunk):
        place = slice(start, start + chunk)
        states = {name: tensor[place].detach() for name, tensor in hidden.items()}
        leaves = [states[name].requires_grad_() for name in names]
        values = _values(active, heads, states, targets[place], knees, limits)
        weighted = (term.weight * value for term, value in zip(active, values, strict=True))
        total = torch.as_tensor(sum(weighted)) * scale
        loss += total.detach()
        sums += torch.stack([value.detach() for value in values])
        if not (inputs and total.requires_grad):
            continue
        found = torch.autograd.grad(total, [*leaves, *parameters], allow_unused=True)
        for whole, gradient in zip(gradients, found, strict=False):
            if gradient is not None:
                whole[place] = gradient
        for number, gradient in enumerate(found[len(leaves) :]):
            known = of_weights[number]
            if known is None or gradient is None:
                of_weights[number] = gradient if known is None else known
            else:
                known += gradient
    if inputs:
        both = zip(of_weights, parameters, strict=True)
        gradients += [torch.zeros_like(p) if found is None else found for found, p in both]
    return loss, sums * scale, inputs, gradients


class _WithGradients(torch.autograd.Function):
    """A value whose gradients at some tensors are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *_: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (None, None, *(gradient * grad for gradient in ctx.saved_tensors))


def _values(
    terms: Sequence[Term],
    heads: Heads,
    hidden: Mapping[str, Tensor],
    targets: Tensor,
    knee_log: dict[str, list[Tensor]] | None,
    limits: losses.Limits | None,
) -> list[Tensor]:
    """Sum of every term over the positions of one chunk."""
    logits: dict[str, Tensor] = {}
    for name, states in hidden.items():
        head = heads.student if name == "student" else heads.teacher
        assert head is not None  # only a teacher makes teacher or switch states
        logits[name] = head(states)  # [n, vocabulary]
    cut = {name: rows[:, : heads.vocabulary] for name, rows in logits.items()}
    tops: dict[tuple[tuple[str, Any], ...], TopLogits] = {}  # the teacher's, by how it was sought
    knees: dict[str, Tensor] = {}  # by side, found the way its first DBiLD term finds them
    values = []
    for term in terms:
        if term.loss == "ce":
            values.append(F.cross_entropy(logits["student"].float(), targets, reduction="sum"))
            continue
        options = dict(term.options)
        if term.loss == "dbild":
            sought: dict[str, Any] = {n: v for n, v in options.items() if n in KNEE_OPTIONS}
            if limits is not None:
                sought["width"] = min(limits.width, cut["teacher"].shape[-1])
            key = tuple(sorted(sought.items()))
            if key not in tops:
                tops[key] = top_logits(cut["teacher"], **sought)
            options["teacher_top"] = tops[key]
            if knee_log is not None:
                knees.setdefault("teacher", tops[key].k)
                if term.of not in knees:
                    knees[term.of] = top_logits(cut[term.of].detach(), **sought).k
        if limits is not None and term.loss in ("bild", "dbild"):
            options["limits"] = limits
        function = getattr(losses, term.loss)
        values.append(function(cut["teacher"].detach(), cut[term.of], **options).sum())
    for side, k in knees.items():
        assert knee_log is not None
        knee_log.setdefault(side, []).append(k)
    return values


def image_kl(
    heads: Heads,
    hidden: Mapping[str, Tensor],
    items: Tensor | float,
    *,
    temperature: float | None = None,
    chunk: int = 512,
) -> Tensor:
    """KL over the vocabulary at image positions, summed and divided by `items`; a scalar.

    Args:
        hidden: of `student` and `teacher` at image positions [M, width].
    """
    unused = hidden["student"].new_zeros(len(hidden["student"]), dtype=torch.long)
    term = Term(loss="kl", temperature=temperature)
    return token_terms([term], heads, hidden, unused, items, chunk=chunk)[0]


# Terms on what lies inside the models


def image_correlation(teacher: Tensor, other: Tensor, slots: Tensor, shape: list[int]) -> Tensor:
    """1 - cosine of the two models' self-correlation matrices, summed over samples; a scalar.

    Args:
        teacher, other: last hidden states at image positions [M, width]; the widths may differ.
        slots: places of the positions in [batch * most], most the most of one sample, [M].
        shape: [batch, most].

    The source speaks of the language model's output at image positions; hidden states are taken
    here, not logits (OPEN).
    """
    relations, count = [], shape[0] * shape[1]
    for states in (teacher.detach().float(), other.float()):
        packed = states.new_zeros(count, states.shape[-1]).index_copy(0, slots, states)
        packed = packed.unflatten(0, shape)  # [batch, most, width]; what is not filled is 0
        relations.append(torch.bmm(packed, packed.transpose(1, 2)).flatten(1))  # [batch, most^2]
    seen = slots.new_zeros(count).index_fill(0, slots, 1).unflatten(0, shape).any(1)  # [batch]
    cosine = F.cosine_similarity(relations[0], relations[1], dim=1)  # [batch]
    return ((1 - cosine) * seen).sum()


def image_mse(teacher: Tensor, other: Tensor, adapter: nn.Module | None) -> Tensor:
    """Squared error of the projected image tokens, averaged over the width and summed; a scalar.

    Args:
        teacher, other: embeddings [M, width] that enter the language models.
        adapter: linear map of the teacher's width to the student's where they differ. It learns
            with the student and is no part of the checkpoint (upstream: a 1 x 1 convolution).
    """
    left = teacher.detach()
    if adapter is not None:
        left = adapter(left.to(next(adapter.parameters()).dtype))
    return F.mse_loss(other.float(), left.float(), reduction="none").mean(-1).sum()


def attention_mse(teacher: Tensor, other: Tensor, pairs: Tensor) -> Tensor:
    """Squared error of text-to-image attention averaged over heads, summed over pairs; a scalar.

    Args:
        teacher, other: attention weights averaged over heads [batch, text, images].
        pairs: which of them are there: neither end is padding, the image token comes before.
    """
    return (other - teacher.detach()).masked_fill(~pairs, 0.0).square().sum()
