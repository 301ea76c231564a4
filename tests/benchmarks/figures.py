"""What a benchmark measures, and the table it prints."""

import gc
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

from kd_bench.provenance import hardware

__all__ = ["Figure", "peak_memory", "print_table", "seconds", "timed"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        name: what was measured, with its sizes.
        ours, theirs: values with their unit; `theirs` is the baseline's.
        ratio: how much better than the baseline, or None where there is none.
        goal: the ratio to reach.
    """

    name: str
    ours: str
    theirs: str = ""
    ratio: float | None = None
    goal: float | None = None


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """CPU seconds of the fastest of some runs, after one that is not counted."""
    if repeats > 1:
        work()
    best = float("inf")
    for _ in range(repeats):
        gc.collect()
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """A result and the CPU seconds it took."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def peak_memory(work: Callable[[], object]) -> int:
    """Most bytes of CPU tensors alive at once during `work`, above what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler.kineto_results.events()
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in results if event.name() == "[memory]"),
        key=lambda change: change[0],
    )
    alive = peak = 0
    for _, size in changes:
        alive += size
        peak = max(peak, alive)
    return peak


def print_table(
    title: str, figures: Sequence[Figure], clock: str = "CPU seconds, fastest run"
) -> None:
    """The figures, and the machine, versions and clock they were measured with."""
    table = Table(title=title)
    for column in ("figure", "kd-bench", "baseline", "ratio", "to reach"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for figure in figures:
        table.add_row(
            figure.name,
            figure.ours,
            figure.theirs,
            "" if figure.ratio is None else f"{figure.ratio:.3g} x",
            "" if figure.goal is None else f"{figure.goal:g} x",
        )
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{hardware()['processor']}, {torch.get_num_threads()} thread(s), Python "
        f"{platform.python_version()}, torch {torch.__version__}; {clock}."
    )
