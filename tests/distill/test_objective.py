"""Terms against losses composed by hand on whole logits, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from kd_bench.distill import knee as knees
from kd_bench.distill import losses, objective
from kd_bench.distill.objective import Heads, KneeLog, token_terms
from kd_bench.distill.recipe import METHODS, Term, needs_switch, needs_teacher
from tests.support.counting import counted

N, VOCABULARY, WIDTH, TEACHER_WIDTH = 23, 40, 8, 12


@pytest.fixture
def sides():
    torch.manual_seed(0)
    student = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    teacher = torch.nn.Linear(TEACHER_WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    heads = Heads(student, teacher, tuple(student.parameters()))
    hidden = {
        "student": torch.randn(N, WIDTH, requires_grad=True),
        "teacher": torch.randn(N, TEACHER_WIDTH) * 3,
        "switch": torch.randn(N, TEACHER_WIDTH, requires_grad=True),
    }
    return heads, hidden, torch.randint(VOCABULARY, (N,))


def by_hand(terms, heads, hidden, targets, items):
    """The same objective on logits [N, vocabulary] that exist all at once."""
    logits = {
        "student": heads.student(hidden["student"]),
        "teacher": heads.teacher(hidden["teacher"]),
        "switch": heads.teacher(hidden["switch"]),
    }
    values = {}
    for term in terms:
        if term.loss == "ce":
            value = F.cross_entropy(logits["student"], targets, reduction="sum")
        else:
            function = getattr(losses, term.loss)
            value = function(logits["teacher"], logits[term.of], **term.options).sum()
        values[term.label] = value / items
    return sum(term.weight * values[term.label] for term in terms), values


def needed(terms, hidden):
    names = {"student"}
    names |= {"teacher"} if needs_teacher(terms) else set()
    names |= {"switch"} if needs_switch(terms) else set()
    return {name: hidden[name] for name in names}


OWN = (
    Term(loss="ce", weight=0.5),
    Term(loss="jsd", beta=0.3, temperature=2, weight=2),
    Term(loss="dbild", of="switch", curve="probs", k_max=9, direction="forward", name="a"),
    Term(loss="dbild", candidates=16, pairs="row-wise", temperature=1, name="b"),
    Term(loss="kl", of="switch", weight=3),
)
UNION = (
    Term(loss="dbild", ids="union"),
    Term(loss="dbild", pairs="none", weight_by="entropy", name="c"),
)
LISTS = [
    *(METHODS[name] for name in ("sft", "kl", "rkl", "jsd", "bild", "dbild", "vsd", "switch-kd")),
    OWN,
]


@pytest.mark.parametrize("terms", [*LISTS, UNION])
@pytest.mark.parametrize("chunk", [1, 7, 23, 512])
@pytest.mark.parametrize("width", [None, VOCABULARY, 64, 2], ids="width {}".format)
def test_chunks_give_the_values_and_gradients_of_whole_logits(sides, terms, chunk, width):
    """Also where the host asks the device once a step; some rows lead with more than 2 ids."""
    heads, hidden, targets = sides
    items = 31  # more answers in the other pieces of the batch
    expected, values = by_hand(terms, heads, hidden, targets, items)
    wanted = [tensor for tensor in hidden.values() if tensor.requires_grad]
    wanted += list(heads.parameters)
    gradients = torch.autograd.grad(2.5 * expected, wanted, allow_unused=True)
    limits = None if width is None else losses.Limits(width)
    given = (terms, heads, needed(terms, hidden), targets, items)
    loss, logged = token_terms(*given, chunk=chunk, limits=limits)
    if width == 2 and any(term.loss == "dbild" for term in terms):
        assert limits.width > 8  # it did not hold, and grew
    found = torch.autograd.grad(2.5 * loss, wanted, allow_unused=True)
    torch.testing.assert_close(loss, expected)
    assert list(logged) == [term.label for term in terms]
    for name, value in values.items():
        torch.testing.assert_close(logged[name], value.detach())
    for left, right in zip(found, gradients, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right)


def test_the_head_and_the_teacher_see_no_more_than_a_chunk(sides):
    heads, hidden, targets = sides
    seen = []

    def watched(head):
        def run(states):
            seen.append(len(states))
            return head(states)

        return run

    chunked = Heads(watched(heads.student), watched(heads.teacher), heads.parameters)
    token_terms(METHODS["switch-kd"], chunked, hidden, targets, N, chunk=5)
    assert max(seen) == 5
    assert sum(seen) == 3 * N  # three heads, nothing twice


def test_no_answers_give_a_zero_that_can_be_differentiated(sides):
    heads, hidden, targets = sides
    empty = {name: states[:0] for name, states in hidden.items()}
    loss, values = token_terms(METHODS["switch-kd"], heads, empty, targets[:0], 0)
    loss.backward()
    assert loss.item() == 0
    assert set(values) == {"ce", "align", "switch"}


def test_rows_beyond_the_common_vocabulary_are_ignored_by_the_teacher_only(sides):
    heads, hidden, targets = sides
    wide = torch.nn.Linear(TEACHER_WIDTH, VOCABULARY + 6, bias=False)
    wide.weight.data[:VOCABULARY] = heads.teacher.weight
    wide.weight.data[VOCABULARY:] = 100
    terms = METHODS["kl"]
    cut = Heads(heads.student, wide, heads.parameters, vocabulary=VOCABULARY)
    pair = needed(terms, hidden)
    expected, _ = token_terms(terms, heads, pair, targets, N)
    found, _ = token_terms(terms, cut, pair, targets, N)
    torch.testing.assert_close(found, expected)


def test_the_teachers_knees_are_found_once_a_chunk_for_terms_that_agree(sides, monkeypatch):
    heads, hidden, targets = sides
    calls = []
    before = knees.top_logits
    for module in (objective, losses):
        monkeypatch.setattr(
            module, "top_logits", lambda logits, **o: calls.append(1) or before(logits, **o)
        )
    token_terms(METHODS["switch-kd"], heads, hidden, targets, N)
    assert len(calls) == 3  # teacher, student, switch


def test_knees_are_logged_by_side_as_the_terms_find_them(sides):
    heads, hidden, targets = sides
    log = KneeLog()
    token_terms(METHODS["switch-kd"], heads, hidden, targets, N, chunk=6, knee_log=log)
    assert set(log.knees) == {"teacher", "student", "switch"}
    for side, head in (("teacher", heads.teacher), ("student", heads.student)):
        k = knees.knee(head(hidden[side]).detach())
        torch.testing.assert_close(torch.cat(log.knees[side]), k)
        summary = log.summary()
        assert summary[f"knee_{side}_mean"] == pytest.approx(k.double().mean().item())
        assert summary[f"knee_{side}_p100"] == k.max().item()


def test_mixed_precision_gives_the_same_gradients_in_every_chunking(sides):
    heads, hidden, targets = sides
    found = []
    for chunk in (4, 512):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = token_terms(METHODS["switch-kd"], heads, hidden, targets, N, chunk=chunk)
        found.append(torch.autograd.grad(loss, [hidden["student"], *heads.parameters]))
    for left, right in zip(*found, strict=True):
        assert left.dtype == torch.float32
        torch.testing.assert_close(left, right, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("broken", [torch.nan, 1e5])
def test_rows_that_break_the_limits_are_computed_again_without(sides, broken):
    """Too wide for scaled sums, or no number."""
    heads, hidden, targets = sides
    hidden["teacher"][4] *= broken
    work = (METHODS["switch-kd"], heads, hidden, targets, N)
    logs = KneeLog(), KneeLog()
    expected, values = token_terms(*work, knee_log=logs[0])
    limits = losses.Limits()
    found, again = token_terms(*work, limits=limits, knee_log=logs[1], chunk=5)
    assert limits.seen is None
    torch.testing.assert_close(found, expected, equal_nan=True)
    torch.testing.assert_close(again, values, equal_nan=True)
    assert {side: len(torch.cat(k)) for side, k in logs[1].knees.items()} == dict.fromkeys(
        ("teacher", "student", "switch"), N
    )


def test_a_union_that_is_cut_off_on_one_side_is_computed_again():
    """The other side's ids lie among those that are left of the teacher's."""
    teacher = torch.arange(30.0, 0, -1)[None].square()  # its knee lies far behind the fourth id
    student = torch.tensor([[20.0, 10.0, *[0.0] * 28]])
    assert knees.knee(teacher) > 4 >= knees.knee(student)
    heads, hidden = Heads(lambda x: x, lambda x: x), {"student": student, "teacher": teacher}
    work = ([Term(loss="dbild", ids="union")], heads, hidden, torch.zeros(1, dtype=torch.long), 1)
    expected, _ = token_terms(*work)
    found, _ = token_terms(*work, limits=losses.Limits(4))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["sft", "kl", "bild", "dbild", "switch-kd"])
def test_an_objective_waits_for_its_device_once_however_many_the_chunks(sides, method):
    heads, hidden, targets = sides
    for chunk in (3, 512):
        limits = losses.Limits(64)
        given = (METHODS[method], heads, needed(METHODS[method], hidden), targets, torch.tensor(N))
        with counted() as operations:
            token_terms(*given, chunk=chunk, limits=limits)[0].backward()
        asks = method not in ("sft", "kl")
        assert operations.waits == ({"tolist": 1} if asks else {})
