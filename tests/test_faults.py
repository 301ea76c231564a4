"""Every fault of `tests.faults`, sampled; `python -m tests.faults` tries all of them."""

import pytest

from tests.faults import FAULTS, Fault
from tests.faults.catalogue import load

load()
SAMPLED, SAMPLED_OF_SLOW = 3, 10


def cases() -> list[object]:
    return [
        pytest.param(each, id=each.name, marks=[pytest.mark.slow] if each.slow else [])
        for each in FAULTS
    ]


@pytest.mark.parametrize("each", cases())
@pytest.mark.slow
def test_a_fault_is_survived(each: Fault) -> None:
    sampled = SAMPLED_OF_SLOW if each.slow else SAMPLED
    step = max(1, each.tries // sampled)
    assert each.run(range(0, each.tries, step)) == []
