"""Faults that are put into data, stores and trainings, and what must come of them.

    @fault("damaged files", count=150)
    def one_flipped_bit(folder: Path, number: int) -> None: ...

A fault makes its own material in `folder`, does the damage, and asserts the outcome: the same
numbers, or a refusal by name; never another number. `number` counts the tries of one fault.
`python -m tests.faults` prints family, tried, survived; pytest runs the same faults.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FAULTS", "Fault", "fault"]


@dataclass(frozen=True)
class Fault:
    """One kind of damage.

    Attributes:
        family: row of the printed table.
        tries: how often it is tried, each time with another number.
        slow: takes more than a few seconds; left to `-m slow` in pytest.
    """

    family: str
    name: str
    tries: int
    slow: bool
    inject: Callable[[Path, int], None]

    def run(self, numbers: Iterable[int] | None = None) -> list[str]:
        """Try it; returns one line for each try that was not survived."""
        failed = []
        for number in range(self.tries) if numbers is None else numbers:
            with tempfile.TemporaryDirectory(prefix="kd-bench-fault-") as folder:
                try:
                    self.inject(Path(folder), number)
                except Exception as error:  # whatever came up is what the table must tell
                    told = (str(error).strip() or type(error).__name__).split("\n")[0]
                    failed.append(f"{self.name}, try {number}: {type(error).__name__}: {told}")
        return failed


FAULTS: list[Fault] = []


def fault(
    family: str, *, tries: int = 1, slow: bool = False
) -> Callable[[Callable[[Path, int], None]], Callable[[Path, int], None]]:
    """Register a fault below its family."""

    def register(inject: Callable[[Path, int], None]) -> Callable[[Path, int], None]:
        name = inject.__name__.replace("_", " ")
        FAULTS.append(Fault(family, name, tries, slow, inject))
        return inject

    return register
