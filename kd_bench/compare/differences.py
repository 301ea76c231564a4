"""Paired differences of aligned runs: interval, test, counts, and what could have been seen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kd_bench.compare.align import AlignedTask
from kd_bench.compare.estimates import Estimate, Evidence, TaskEvidence
from kd_bench.records import AVERAGE, Interval
from kd_bench.stats import (
    RESAMPLES,
    exact_or_swap,
    holm,
    minimum_detectable_effect,
    swap_draws,
    two_sided,
    unit_seed,
)

Array = NDArray[np.float64]
OVER_SEEDS = "Student's t over seeds and documents"


@dataclass(frozen=True)
class Difference:
    """Another run minus the reference, in points (0-100 scale).

    Attributes:
        interval: None with fewer than `stats.FEWEST_UNITS` units.
        p: two-sided, of this benchmark alone; `p_holm` corrected over the benchmarks.
        test: which test gave `p`.
        fixed, broken: items (documents, or groups scored as a whole) that changed.
        detectable: the smallest true difference that the test finds four times in five at the
            first step of Holm over the benchmarks; None without an interval or over seeds.
        standard_error: of the difference.
        units: resampling units.
        items: documents or groups that can change.
    """

    value: float
    interval: Interval | None
    p: float
    p_holm: float
    test: str
    fixed: int
    broken: int
    detectable: float | None
    standard_error: float
    units: int = 0
    items: int = 0

    @property
    def span(self) -> str:
        """The interval in words; "too few units" where there is none."""
        if self.interval is None:
            return f"too few units: {self.units}"
        return f"{self.interval.low:+.2f} to {self.interval.high:+.2f}"


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

    @cached_property
    def evidence(self) -> TaskEvidence:
        """What the estimator takes; runs are named by their position."""
        names = [str(run) for run in range(len(self.draws))]
        return TaskEvidence.from_draws(
            self.aligned.aggregator,
            names,
            self.aligned.statistics,
            self.draws,
            unit_seed(self.aligned.units),
        )


def resample(aligned: AlignedTask, resamples: int = RESAMPLES, seed: int = 0) -> Resampled:
    """Bootstrap one benchmark for all of its runs at once."""
    return Resampled(aligned, aligned.scores, aligned.draws(resamples, seed))


def evidence_of(tasks: Sequence[Resampled]) -> Evidence:
    """All benchmarks of the same runs; runs are named by their position."""
    return Evidence({task.aligned.task: task.evidence for task in tasks})


def task_difference(
    task: Resampled, first: int, second: int, null: Array, level: float = 0.95
) -> Difference:
    """Second run minus first run on one benchmark; `null` from `Resampled.null_draws`."""
    statistics = task.aligned.statistics
    p, test = exact_or_swap(task.aligned.aggregator, statistics[first], statistics[second], null)
    found = evidence_of([task]).difference(task.aligned.task, [str(first)], [str(second)], level)
    return made_difference(found, p, test, task.aligned.changes(first, second), task.aligned.items)


def average_difference(
    tasks: Sequence[Resampled], nulls: list[Array], first: int, second: int, level: float = 0.95
) -> Difference:
    """Second run minus first run on the mean over benchmarks, resampled within each of them."""
    found = evidence_of(tasks).difference(AVERAGE, [str(first)], [str(second)], level)
    changes = [task.aligned.changes(first, second) for task in tasks]
    return made_difference(
        found,
        two_sided(found.value, np.mean(nulls, axis=0)),
        "sign-flip by unit",
        (sum(fixed for fixed, _ in changes), sum(broken for _, broken in changes)),
        sum(task.aligned.items for task in tasks),
    )


def seeds_difference(
    tasks: Sequence[Resampled],
    evidence: Evidence,
    key: str,
    first: Sequence[str],
    second: Sequence[str],
    level: float = 0.95,
) -> Difference:
    """One method minus another over their training seeds, on a benchmark or the average.

    Changed items are the mean over all pairs of seeds.
    """
    chosen = [task for task in tasks if key in (AVERAGE, task.aligned.task)]
    pairs = [(int(a), int(b)) for a in first for b in second]
    changes = np.mean(
        [np.sum([task.aligned.changes(*pair) for task in chosen], axis=0) for pair in pairs],
        axis=0,
    )
    found = evidence.difference(key, first, second, level)
    return made_difference(
        found,
        found.p,
        OVER_SEEDS,
        (round(float(changes[0])), round(float(changes[1]))),
        sum(task.aligned.items for task in chosen),
    )


def made_difference(
    found: Estimate, p: float, test: str, changes: tuple[int, int], items: int
) -> Difference:
    """A difference from what the estimator found, the test's p and (fixed, broken)."""
    return Difference(
        value=found.value,
        interval=found.interval,
        p=p,
        p_holm=p,
        test=test,
        fixed=changes[0],
        broken=changes[1],
        detectable=None
        if found.interval is None or test == OVER_SEEDS
        else minimum_detectable_effect(found.error, items),
        standard_error=found.error,
        units=found.units,
        items=items,
    )


def with_holm(differences: list[Difference]) -> list[Difference]:
    """The same differences with p, and what could be detected, corrected over all of them."""
    adjusted = holm([each.p for each in differences])
    alpha = 0.05 / max(len(differences), 1)
    return [
        replace(
            each,
            p_holm=p,
            detectable=None
            if each.detectable is None
            else minimum_detectable_effect(each.standard_error, each.items, alpha),
        )
        for each, p in zip(differences, adjusted, strict=True)
    ]
