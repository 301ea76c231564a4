"""Paired differences of aligned runs: interval, test, counts, and what could have been seen."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kd_bench.compare.align import AlignedTask
from kd_bench.records import Interval
from kd_bench.stats import (
    RESAMPLES,
    exact_or_swap,
    holm,
    minimum_detectable_effect,
    percentile_interval,
    swap_draws,
    two_sided,
    unit_seed,
)

__all__ = [
    "Difference",
    "Resampled",
    "average_difference",
    "resample",
    "task_difference",
    "with_holm",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Another run minus the reference, in points (0-100 scale).

    Attributes:
        p: two-sided, of this benchmark alone; `p_holm` corrected over the benchmarks.
        test: which test gave `p`.
        fixed, broken: items (documents, or groups scored as a whole) that changed.
        detectable: the smallest true difference that this test set finds four times in five.
        standard_error: of the difference, from the bootstrap.
    """

    value: float
    interval: Interval
    p: float
    p_holm: float
    test: str
    fixed: int
    broken: int
    detectable: float
    standard_error: float


@dataclass(frozen=True)
class Resampled:
    """One benchmark's scores [runs] and their paired bootstrap draws [runs, resamples]."""

    aligned: AlignedTask
    scores: Array
    draws: Array

    def null_draws(self, first: int, second: int, seed: int = 0) -> Array:
        """Differences that two equal models would show, [resamples]."""
        return swap_draws(
            self.aligned.aggregator,
            self.aligned.statistics[first],
            self.aligned.statistics[second],
            self.draws.shape[1],
            unit_seed(self.aligned.units, seed + 1),
        )


def resample(aligned: AlignedTask, resamples: int = RESAMPLES, seed: int = 0) -> Resampled:
    """Bootstrap one benchmark for all of its runs at once."""
    return Resampled(aligned, aligned.scores, aligned.draws(resamples, seed))


def task_difference(
    task: Resampled, first: int, second: int, null: Array, level: float = 0.95
) -> Difference:
    """Second run minus first run on one benchmark; `null` from `Resampled.null_draws`."""
    statistics = task.aligned.statistics
    p, test = exact_or_swap(task.aligned.aggregator, statistics[first], statistics[second], null)
    drawn = task.draws[second] - task.draws[first]
    error = _standard_error(drawn)
    fixed, broken = task.aligned.changes(first, second)
    return Difference(
        value=float(task.scores[second] - task.scores[first]),
        interval=percentile_interval(drawn, level),
        p=p,
        p_holm=p,
        test=test,
        fixed=fixed,
        broken=broken,
        detectable=minimum_detectable_effect(error, task.aligned.items),
        standard_error=error,
    )


def average_difference(
    tasks: list[Resampled], nulls: list[Array], first: int, second: int, level: float = 0.95
) -> Difference:
    """Second run minus first run on the mean over benchmarks, resampled within each of them."""
    drawn = np.mean([task.draws[second] - task.draws[first] for task in tasks], axis=0)
    value = float(np.mean([task.scores[second] - task.scores[first] for task in tasks]))
    error = _standard_error(drawn)
    changes = [task.aligned.changes(first, second) for task in tasks]
    p = two_sided(value, np.mean(nulls, axis=0))
    return Difference(
        value=value,
        interval=percentile_interval(drawn, level),
        p=p,
        p_holm=p,
        test="sign-flip by unit",
        fixed=sum(fixed for fixed, _ in changes),
        broken=sum(broken for _, broken in changes),
        detectable=minimum_detectable_effect(error, sum(task.aligned.items for task in tasks)),
        standard_error=error,
    )


def with_holm(differences: list[Difference]) -> list[Difference]:
    """The same differences with p corrected over all of them."""
    adjusted = holm([each.p for each in differences])
    return [replace(each, p_holm=p) for each, p in zip(differences, adjusted, strict=True)]


def _standard_error(draws: Array) -> float:
    return float(np.nanstd(draws, ddof=1))
