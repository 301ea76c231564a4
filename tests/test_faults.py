"""Every fault of `tests.faults`; what is tried often is sampled here, and whole under `-m slow`."""

import pytest

from tests.faults import FAULTS, Fault
from tests.faults.catalogue import load

load()
SAMPLED = 3


def cases(slow: bool) -> list[object]:
    found = [each for each in FAULTS if slow or not each.slow]
    marks = [pytest.mark.slow] if slow else []
    return [pytest.param(each, id=each.name, marks=marks) for each in found]


@pytest.mark.parametrize("each", cases(slow=False))
def test_a_fault_is_survived(each: Fault) -> None:
    step = max(1, each.tries // SAMPLED)
    assert each.run(range(0, each.tries, step)) == []


@pytest.mark.parametrize("each", cases(slow=True))
def test_every_try_of_a_fault_is_survived(each: Fault) -> None:
    assert each.run() == []
