"""Two training methods compared over their seeds, on the test documents that all runs share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kd_bench.compare.align import align, common_tasks
from kd_bench.compare.differences import resample
from kd_bench.stats import RESAMPLES, MethodDifference, method_difference
from kd_bench.store import Run

__all__ = ["MethodComparison", "compare_methods"]


@dataclass(frozen=True)
class MethodComparison:
    """Method B minus method A: by benchmark, and on the mean over benchmarks."""

    tasks: dict[str, MethodDifference]
    average: MethodDifference


def compare_methods(
    a_runs: Sequence[Run],
    b_runs: Sequence[Run],
    *,
    allow_different: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> MethodComparison:
    """Compare methods whose runs are their training seeds, e.g. three of SFT, three of Switch-KD.

    Both sources of error count: the seeds and the choice of test documents; see
    `stats.method_difference`.
    """
    runs = [*a_runs, *b_runs]
    tasks = common_tasks(runs)
    split = len(a_runs)
    by_task: dict[str, MethodDifference] = {}
    scores, draws, units = [], [], 0
    for task in tasks:
        sampled = resample(align(runs, task, allow_different=allow_different), resamples, seed)
        count = len(sampled.aligned.units)
        s, d = sampled.scores, sampled.draws
        by_task[task] = method_difference(s[:split], s[split:], d[:split], d[split:], count, level)
        scores.append(s)
        draws.append(d)
        units += count
    s, d = np.mean(scores, axis=0), np.mean(draws, axis=0)
    average = method_difference(s[:split], s[split:], d[:split], d[split:], units, level)
    return MethodComparison(by_task, average)
