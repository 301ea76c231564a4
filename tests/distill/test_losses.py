"""The losses against their definitions in double precision: a list of pairs, a full softmax."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from kd_bench.distill import losses as losses_module
from kd_bench.distill.knee import knee, top_logits
from kd_bench.distill.losses import bild, dbild, jsd, kl, rkl
from kd_bench.errors import UsageError

DIRECTIONS = ("forward", "reverse")
FORMS = ("flat", "row-wise", "none")


def divergence(teacher: Tensor, other: Tensor, direction: str) -> Tensor:
    """KL of two lists of unnormalised log-probabilities."""
    t, s = F.log_softmax(teacher, dim=-1), F.log_softmax(other, dim=-1)
    a, b = (t, s) if direction == "forward" else (s, t)
    return (a.exp() * (a - b)).sum()


def pair_list(
    teacher: Tensor, other: Tensor, ids: Tensor, tau: float, direction: str, form: str
) -> Tensor:
    """One side's divergence, with every difference written out."""
    t, s = teacher[ids] / tau, other[ids] / tau
    if form == "none":
        return divergence(t, s, direction)
    i, j = torch.triu_indices(len(ids), len(ids), 1)
    if form == "flat":
        return divergence(t[i] - t[j], s[i] - s[j], direction)
    rows = [
        divergence(t[row] - t[row + 1 :], s[row] - s[row + 1 :], direction)
        for row in range(len(ids) - 1)
    ]
    return torch.stack(rows).mean()


def both_leads(
    teacher: Tensor,
    other: Tensor,
    k_teacher: list[int],
    k_other: list[int],
    tau: float = 3.0,
    direction: str = "reverse",
    form: str = "flat",
) -> Tensor:
    """The oracle of `bild` and `dbild`: [N] in double precision, differentiable in `other`."""
    teacher, other = teacher.double().detach(), other.double()
    total = []
    for t, s, k_t, k_s in zip(teacher, other, k_teacher, k_other, strict=True):
        by_t = torch.sort(t, descending=True, stable=True).indices[:k_t]
        by_s = torch.sort(s.detach(), descending=True, stable=True).indices[:k_s]
        total.append(
            pair_list(t, s, by_t, tau, direction, form)
            + pair_list(t, s, by_s, tau, direction, form)
        )
    return torch.stack(total)


def gradient_of(values: Tensor, leaf: Tensor, weights: Tensor) -> Tensor:
    return torch.autograd.grad((values * weights.to(values.dtype)).sum(), leaf)[0]


def logits_of(kind: str, rows: int = 5, vocabulary: int = 40) -> tuple[Tensor, Tensor]:
    """Teacher and other [rows, vocabulary] that are hard in one way, named."""
    generator = torch.Generator().manual_seed(11)
    teacher = torch.randn(rows, vocabulary, generator=generator) * 4
    other = torch.randn(rows, vocabulary, generator=generator) * 4
    if kind == "equal":
        other = teacher.clone()
    elif kind == "near":
        other = teacher + 0.1 * other
    elif kind == "reversed":
        other = -teacher
    elif kind == "ties":
        teacher, other = teacher.round(), other.round()
    elif kind == "flat other":
        other = torch.ones_like(other)
    elif kind == "flat both":
        teacher, other = torch.zeros_like(teacher), torch.full_like(other, 5.0)
    elif kind == "extreme":
        teacher, other = teacher.sign() * 1e4, other.sign() * 1e4
    elif kind == "extreme reversed":
        teacher = torch.linspace(1e4, -1e4, vocabulary).repeat(rows, 1)
        other = -teacher
    elif kind == "far from zero":
        teacher, other = teacher + 5e3, other - 5e3
    elif kind == "peaked":
        teacher[:, 3] += 60
        other[:, 9] += 90
    return teacher, other


KINDS = (
    "random",
    "equal",
    "near",
    "reversed",
    "ties",
    "flat other",
    "flat both",
    "extreme",
    "extreme reversed",
    "far from zero",
    "peaked",
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_dbild_is_the_pair_list(kind, direction, form):
    teacher, other = logits_of(kind)
    other.requires_grad_()
    weights = torch.linspace(0.5, 2, len(other))
    values = dbild(teacher, other, direction=direction, pairs=form)
    oracle = both_leads(
        teacher,
        other,
        knee(teacher).tolist(),
        knee(other.detach()).tolist(),
        direction=direction,
        form=form,
    )
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), oracle, rtol=2e-6, atol=1e-9)
    found = gradient_of(values, other, weights)
    wanted = gradient_of(oracle, other, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_union_of_ids_is_one_list_in_the_teachers_order(kind, form):
    teacher, other = logits_of(kind)
    other.requires_grad_()
    settings = {"k_max": 12, "candidates": 30}
    values = dbild(teacher, other, ids="union", pairs=form, **settings)
    k_t, k_s = (knee(side.detach(), **settings).tolist() for side in (teacher, other))
    oracle = []
    for row, (t, s) in enumerate(zip(teacher.double(), other.double(), strict=True)):
        ours = torch.sort(t, descending=True, stable=True).indices
        theirs = torch.sort(s.detach(), descending=True, stable=True).indices[: k_s[row]]
        tops = set(ours[: k_t[row]].tolist()) | set(theirs.tolist())
        ids = torch.tensor([index for index in ours.tolist() if index in tops])
        oracle.append(pair_list(t, s, ids, 3.0, "reverse", form))
    wanted = torch.stack(oracle)
    torch.testing.assert_close(values.double(), wanted, rtol=2e-6, atol=1e-9)
    weights = torch.linspace(0.5, 2, len(other))
    found = gradient_of(values, other, weights)
    torch.testing.assert_close(found, gradient_of(wanted, other, weights), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_led_is_forward_on_the_teachers_ids_and_reverse_on_the_others(form):
    teacher, other = logits_of("random")
    values = dbild(teacher, other, direction="led", k_min=32, k_max=32, pairs=form)
    wanted = []
    for t, s in zip(teacher.double(), other.double(), strict=True):
        by_t = torch.sort(t, descending=True, stable=True).indices[:32]
        by_s = torch.sort(s, descending=True, stable=True).indices[:32]
        forward = pair_list(t, s, by_t, 3.0, "forward", form)
        wanted.append(forward + pair_list(t, s, by_s, 3.0, "reverse", form))
    torch.testing.assert_close(values.double(), torch.stack(wanted), rtol=2e-6, atol=1e-9)
    weighed = dbild(
        teacher, other, direction="led", k_min=32, k_max=32, pairs=form, weight_by="entropy"
    )
    shares = F.softmax(teacher.double(), dim=-1)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=-1) / math.log(teacher.shape[-1])
    torch.testing.assert_close(
        weighed.double(), torch.stack(wanted) * entropy, rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("k", [2, 3, 8, 40])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bild_is_the_pair_list_at_a_fixed_k(direction, k):
    teacher, other = logits_of("random")
    other.requires_grad_()
    values = bild(teacher, other, top_k=k, temperature=2.0, direction=direction)
    oracle = both_leads(teacher, other, [k] * 5, [k] * 5, tau=2.0, direction=direction)
    torch.testing.assert_close(values.double(), oracle, rtol=2e-6, atol=1e-9)
    ones = torch.ones(5)
    torch.testing.assert_close(
        gradient_of(values, other, ones), gradient_of(oracle, other, ones), rtol=1e-5, atol=1e-7
    )


def test_bild_by_hand():
    """Two leading logits on each side make one pair, so every distribution is certain: zero."""
    assert bild(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 5.0, 1.0]]), top_k=2) == 0
    # Three: differences 1, 2, 1 of the teacher (x tau) against 0, 0, 0 of a flat other, which
    # leads in the order of ids too; so both sides give log 3 less the teacher's entropy.
    teacher, other = torch.tensor([[2.0, 1.0, 0.0]]) * 3, torch.zeros(1, 3)
    weights = [math.exp(1), math.exp(2), math.exp(1)]
    p = [w / sum(weights) for w in weights]
    expected = 2 * (math.log(3) + sum(x * math.log(x) for x in p))
    assert bild(teacher, other, top_k=3).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradient_is_that_of_finite_differences(direction, form):
    teacher, other = (x.double() for x in logits_of("random", rows=3, vocabulary=12))
    other.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: dbild(teacher, x, direction=direction, pairs=form, k_min=7, k_max=7), other
    )


@pytest.mark.parametrize("loss", [kl, rkl, jsd, dbild, bild])
def test_gradient_reaches_other_only(loss):
    teacher, other = logits_of("random")
    teacher.requires_grad_()
    other.requires_grad_()
    loss(teacher, other).sum().backward()
    assert teacher.grad is None
    assert other.grad.abs().sum() > 0
    assert not loss(teacher, other.detach()).requires_grad


@pytest.mark.parametrize("loss", [kl, rkl, jsd, dbild, bild])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_sides_cost_nothing(loss, dtype):
    teacher = logits_of("random")[0].to(dtype)
    other = teacher.clone().requires_grad_()
    values = loss(teacher, other)
    assert values.abs().max() == 0 if loss is not jsd else values.abs().max() < 1e-7
    values.sum().backward()
    assert other.grad.dtype == dtype
    assert other.grad.abs().max() < 1e-6


@pytest.mark.parametrize("loss", [kl, rkl, jsd, dbild, bild])
def test_no_positions(loss):
    other = torch.zeros(0, 30, requires_grad=True)
    values = loss(torch.zeros(0, 30), other)
    assert values.shape == (0,)
    values.sum().backward()
    assert other.grad.shape == (0, 30)


@pytest.mark.parametrize("loss", [dbild, bild])
def test_one_word_has_no_pairs(loss):
    other = torch.zeros(3, 1, requires_grad=True)
    values = loss(torch.ones(3, 1), other)
    values.sum().backward()
    assert values.tolist() == [0, 0, 0]
    assert other.grad.tolist() == [[0], [0], [0]]


@pytest.mark.parametrize("loss", [kl, rkl, jsd, dbild, bild])
def test_rows_are_independent(loss):
    teacher, other = logits_of("random", rows=6)
    whole = loss(teacher, other)
    pieces = torch.cat([loss(teacher[i : i + 2], other[i : i + 2]) for i in range(0, 6, 2)])
    torch.testing.assert_close(whole, pieces, rtol=1e-6, atol=1e-9)


def test_bfloat16_is_computed_wide():
    teacher, other = (x.bfloat16() for x in logits_of("random", rows=4, vocabulary=300))
    values = dbild(teacher, other)
    torch.testing.assert_close(values, dbild(teacher.float(), other.float()))
    assert values.dtype == torch.float32


def test_rows_of_very_different_k_are_grouped_without_a_difference(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(40, 200, generator=generator) * torch.linspace(0.1, 8, 40)[:, None]
    teacher[::3, 5] += 500  # a knee at once
    other = torch.randn(40, 200, generator=generator).requires_grad_()
    ones = torch.ones(40)
    together = dbild(teacher, other)
    wanted = gradient_of(together, other, ones)
    monkeypatch.setattr(losses_module, "ELEMENTS_AT_A_TIME", {"cpu": 300})
    assert len(losses_module._groups(top_logits(teacher).k, top_logits(teacher).ids.shape[1])) >= 5
    apart = dbild(teacher, other)
    torch.testing.assert_close(apart, together, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient_of(apart, other, ones), wanted, rtol=1e-6, atol=1e-9)


def test_teacher_lead_can_be_given():
    teacher, other = logits_of("random")
    assert torch.equal(
        dbild(teacher, other, teacher_top=top_logits(teacher)), dbild(teacher, other)
    )


def test_a_broken_row_is_seen_and_stays_alone():
    teacher, other = logits_of("random")
    expected = dbild(teacher, other)
    other[2, 7] = torch.nan
    values = dbild(teacher, other)
    assert values[2].isnan()
    keep = [0, 1, 3, 4]
    torch.testing.assert_close(values[keep], expected[keep], rtol=1e-6, atol=1e-9)


def test_strided_logits_are_read_as_they_are():
    teacher, other = logits_of("random", rows=4, vocabulary=50)
    other.requires_grad_()
    sliced = dbild(teacher[:, :30], other[:, :30])
    whole = dbild(teacher[:, :30].contiguous(), other[:, :30].contiguous())
    turned = dbild(teacher.T.contiguous().T[:, :30], other[:, :30])
    assert torch.equal(sliced, whole)
    assert torch.equal(turned, whole)
    sliced.sum().backward()
    assert other.grad[:, 30:].abs().max() == 0


def test_shift_of_all_logits_changes_nothing():
    teacher, other = (x.double() for x in logits_of("random"))
    for loss in (kl, rkl, jsd, dbild, bild):
        torch.testing.assert_close(loss(teacher + 7, other - 3), loss(teacher, other))


def test_divergences_over_the_vocabulary():
    teacher, other = (x.double() for x in logits_of("random"))
    t, s = F.log_softmax(teacher / 2, dim=-1), F.log_softmax(other / 2, dim=-1)
    m = (0.3 * t.exp() + 0.7 * s.exp()).log()

    def divergence_of(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, log_target=True, reduction="none").sum(dim=-1)

    torch.testing.assert_close(kl(teacher, other, temperature=2.0), divergence_of(t, s))
    torch.testing.assert_close(rkl(teacher, other, temperature=2.0), divergence_of(s, t))
    torch.testing.assert_close(
        jsd(teacher, other, temperature=2.0, beta=0.3),
        0.3 * divergence_of(t, m) + 0.7 * divergence_of(s, m),
    )


@pytest.mark.parametrize("loss", [kl, rkl, jsd])
def test_divergences_stay_finite_at_extremes(loss):
    for kind in ("extreme", "extreme reversed", "flat other"):
        teacher, other = logits_of(kind)
        other.requires_grad_()
        values = loss(teacher, other)
        values.sum().backward()
        assert values.isfinite().all()
        assert other.grad.isfinite().all()


def test_wrong_arguments_are_named():
    teacher, other = logits_of("random")
    with pytest.raises(UsageError, match="differ in shape"):
        dbild(teacher, other[:, :-1])
    with pytest.raises(UsageError, match="temperature"):
        kl(teacher, other, temperature=0.0)
    with pytest.raises(UsageError, match="direction"):
        dbild(teacher, other, direction="sideways")
    with pytest.raises(UsageError, match="pairs"):
        dbild(teacher, other, pairs="some")
    with pytest.raises(UsageError, match="beta"):
        jsd(teacher, other, beta=1.0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 12).flatmap(
        lambda width: hnp.arrays(
            np.float32,
            (2, 2, width),
            elements=st.floats(-1e4, 1e4, width=32)
            | st.floats(-10, 10, width=32)
            | st.sampled_from([0.0, 1.0, 3.0]),
        )
    ),
    st.sampled_from(list(itertools.product(DIRECTIONS, FORMS))),
)
def test_dbild_is_the_pair_list_on_anything(values, setting):
    direction, form = setting
    teacher, other = torch.from_numpy(values[0]), torch.from_numpy(values[1]).requires_grad_()
    found = dbild(teacher, other, direction=direction, pairs=form)
    oracle = both_leads(
        teacher,
        other,
        knee(teacher).tolist(),
        knee(other.detach()).tolist(),
        direction=direction,
        form=form,
    )
    torch.testing.assert_close(found.double(), oracle, rtol=1e-5, atol=1e-9)
    ones = torch.ones(2)
    gradient = gradient_of(found, other, ones)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient, gradient_of(oracle, other, ones), rtol=1e-4, atol=1e-6)
