"""Two training methods compared over their seeds, on the test documents that all runs share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kd_bench.compare.align import align, common_tasks
from kd_bench.compare.differences import evidence_of, resample
from kd_bench.compare.estimates import Evidence
from kd_bench.records import AVERAGE
from kd_bench.stats import RESAMPLES, MethodDifference, seed_variance
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
    `compare.estimates`.
    """
    runs = [*a_runs, *b_runs]
    tasks = common_tasks(runs)
    evidence = evidence_of(
        [
            resample(align(runs, task, allow_different=allow_different), resamples, seed)
            for task in tasks
        ]
    )
    split = len(a_runs)
    first, second = ([str(n) for n in part] for part in (range(split), range(split, len(runs))))
    by_task = {key: _difference(evidence, key, first, second, level) for key in [*tasks, AVERAGE]}
    average = by_task.pop(AVERAGE)
    return MethodComparison(by_task, average)


def _difference(
    evidence: Evidence, key: str, first: list[str], second: list[str], level: float
) -> MethodDifference:
    """The estimator's difference, with its two sources of error apart."""
    found = evidence.difference(key, first, second, level)
    a, b = (evidence.draws(key, group) for group in (first, second))
    scores = [evidence.scores(key, group) for group in (first, second)]
    seen = [
        seed_variance(score, draws)[1]
        for score, draws in zip(scores, (a, b), strict=True)
        if len(score) > 1
    ]
    spreads = [float(score.std(ddof=1)) if len(score) > 1 else None for score in scores]
    return MethodDifference(
        difference=found.value,
        interval=found.interval,
        p=found.p,
        sampling_error=float(np.nanstd(b.mean(0) - a.mean(0), ddof=1)),
        seed_error=float(np.sqrt(sum(seen))) if seen else None,
        spread_a=spreads[0],
        spread_b=spreads[1],
        seeds=(len(first), len(second)),
        error=found.error,
        freedom=found.freedom,
    )
