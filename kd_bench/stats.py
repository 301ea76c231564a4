"""Is a difference real? Resampling by unit, exact tests, and what a test set could have shown.

Every interval and test resamples units (pictures, pairs, groups), never rows. Statistics come
from `aggregators.unit_statistics` as [units, m] and are stacked to [models, units, m]; models
share the resampled units, so differences between them are paired.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import stats as distributions

from kd_bench.aggregators import get_aggregator, unit_statistics
from kd_bench.files import digest_text
from kd_bench.records import Interval

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "RESAMPLES",
    "MethodDifference",
    "NonInferiority",
    "bootstrap_sums",
    "exact_or_swap",
    "gap_closed",
    "holm",
    "mcnemar",
    "method_difference",
    "minimum_detectable_effect",
    "non_inferiority",
    "paired_bootstrap",
    "percentile_interval",
    "ratio_interval",
    "score_interval",
    "swap_draws",
    "two_sided",
    "unit_seed",
]

Array = NDArray[np.float64]

RESAMPLES = 10_000
# Weights are made for this many (resample, unit) cells at a time, so that they stay in the cache.
CELLS = 250_000


# --- the bootstrap ---------------------------------------------------------------------------


def unit_seed(units: Sequence[str] | NDArray[np.object_], seed: int = 0) -> tuple[int, int]:
    """A seed that depends on the units alone.

    Whatever is compared on the same units shares its resamples: the interval of a model does
    not depend on which others stand beside it, and benchmarks over the same questions (MMBench
    EN and CN) are resampled together.
    """
    return seed, int(digest_text("\n".join(map(str, units)))[:16], 16)


def bootstrap_sums(
    values: Array, resamples: int = RESAMPLES, seed: int | tuple[int, ...] = 0
) -> Array:
    """Sums of `values` [units, m] over resampled units -> [resamples, m].

    Units are drawn with replacement, as many as there are. Memory is bounded by `CELLS`; the
    draws do not depend on it.
    """
    units = len(values)
    sums = np.zeros((resamples, values.shape[1]))
    if units == 0:
        return sums
    generator = np.random.default_rng(seed)
    chunk = max(1, min(resamples, CELLS // units))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(0, units, (rows, units))
        drawn += np.arange(rows)[:, None] * units
        weights = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
        np.matmul(weights.astype(np.float64), values, out=sums[start : start + rows])
    return sums


def paired_bootstrap(
    aggregator: str,
    statistics: Array,
    resamples: int = RESAMPLES,
    seed: int | tuple[int, ...] = 0,
) -> Array:
    """Scores of resampled test sets, the same ones for every model.

    Args:
        statistics: [models, units, m], units in the same order for every model.

    Returns:
        Scores [models, resamples].
    """
    models, units, width = statistics.shape
    flat = statistics.transpose(1, 0, 2).reshape(units, models * width)
    sums = bootstrap_sums(flat, resamples, seed).reshape(resamples, models, width)
    return get_aggregator(aggregator).combine(sums).T


def percentile_interval(draws: Array, level: float = 0.95) -> Interval:
    """The central interval of bootstrap draws; NaN draws (nothing to score) are left out."""
    draws = draws[~np.isnan(draws)]
    if draws.size == 0:
        return Interval(math.nan, math.nan, level)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def score_interval(
    aggregator: str,
    samples: "pd.DataFrame",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The cluster bootstrap interval of one task's score, on the 0-100 scale."""
    statistics = unit_statistics(aggregator, samples)
    seeds = unit_seed(statistics.units, seed)
    draws = paired_bootstrap(aggregator, statistics.values[None], resamples, seeds)
    return percentile_interval(draws[0], level)


def ratio_interval(numerator: Array, denominator: Array, level: float = 0.95) -> Interval | None:
    """Interval of a ratio of paired draws; None where the denominator may be zero.

    Retention is student / teacher; the gap closed is (student - floor) / (teacher - floor).
    A ratio over something that is not clearly positive has no finite interval.
    """
    sound = ~(np.isnan(numerator) | np.isnan(denominator))
    numerator, denominator = numerator[sound], denominator[sound]
    if denominator.size == 0 or np.mean(denominator <= 0) > (1 - level) / 20:
        return None
    positive = denominator > 0
    return percentile_interval(numerator[positive] / denominator[positive], level)


def gap_closed(
    student: Array, floor: Array, teacher: Array, level: float = 0.95
) -> Interval | None:
    """Interval of (student - floor) / (teacher - floor) from paired draws [resamples]."""
    return ratio_interval(student - floor, teacher - floor, level)


# --- tests -----------------------------------------------------------------------------------


def mcnemar(fixed: int, broken: int) -> float:
    """Exact two-sided McNemar test of 0/1 scores that changed: a fair coin over the changes."""
    if fixed + broken == 0:
        return 1.0
    return float(distributions.binomtest(fixed, fixed + broken).pvalue)


def swap_draws(
    aggregator: str,
    first: Array,
    second: Array,
    resamples: int = RESAMPLES,
    seed: int | tuple[int, ...] = 0,
) -> Array:
    """Differences (second - first) when the two models are the same: the sign-flip null.

    In each draw every unit hands its statistics [units, m] to the other model with
    probability one half; for a mean this is the sign-flip permutation of unit differences.
    """
    combine = get_aggregator(aggregator).combine
    units = len(first)
    delta = second - first
    changed = np.flatnonzero(np.any(delta != 0, axis=1))
    total_first, total_second, moving = first.sum(0), second.sum(0), delta[changed]
    differences = np.zeros(resamples)
    if len(changed) == 0:
        return differences
    generator = np.random.default_rng(seed)
    width = -(-units // 8)
    chunk = max(1, min(resamples, CELLS // units))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        packed = np.frombuffer(generator.bytes(rows * width), np.uint8).reshape(rows, width)
        swaps = np.unpackbits(packed, axis=1)[:, changed].astype(np.float64)
        moved = swaps @ moving  # [rows, m]
        drawn = combine(total_second - moved) - combine(total_first + moved)
        differences[start : start + rows] = drawn
    return differences


def two_sided(observed: float, null_draws: Array) -> float:
    """Two-sided Monte-Carlo p; the observed value counts as one draw, so it is never zero."""
    reached = np.abs(null_draws) >= abs(observed) - 1e-9
    return float((1 + reached.sum()) / (1 + len(null_draws)))


def exact_or_swap(
    aggregator: str, first: Array, second: Array, null_draws: Array
) -> tuple[float, str]:
    """Two-sided p of (second - first), [units, m] each, and the test's name.

    Exact McNemar where each unit is one 0/1 item, else the sign-flip permutation of units with
    the draws of `swap_draws`.
    """
    combine = get_aggregator(aggregator).combine
    if _is_binary(first) and _is_binary(second):
        change = second[:, 0] - first[:, 0]
        return mcnemar(int((change > 0).sum()), int((change < 0).sum())), "McNemar, exact"
    observed = float(combine(second.sum(0)) - combine(first.sum(0)))
    return two_sided(observed, null_draws), "sign-flip by unit"


def _is_binary(values: Array) -> bool:
    """Whether the statistics are (0 or 1, count of one): one item a unit."""
    return bool(
        values.shape[1] == 2 and np.all(values[:, 1] == 1) and np.all(values[:, 0] % 1 == 0)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values, in the order given; NaN (no test) stays NaN and counts nowhere.

    Equal to statsmodels' `multipletests(method="holm")`, which collects garbage at every call:
    0.1 s each in a process that holds samples.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full_like(p, np.nan)
    order = np.argsort(p, kind="stable")[: np.sum(~np.isnan(p))]  # NaN sorts last
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return [float(value) for value in adjusted]


def minimum_detectable_effect(
    standard_error: float, items: int, alpha: float = 0.05, power: float = 0.8
) -> float:
    """The smallest true difference that a two-sided test finds with this power, 0-100 scale.

    Args:
        standard_error: of the paired difference, on the 0-100 scale.
        items: documents or groups that can change. Two models that never disagreed have no
            standard error; about eight one-sided changes are needed even then: z^2 / (n + z^2).
    """
    z = distributions.norm.ppf(1 - alpha / 2) + distributions.norm.ppf(power)
    return float(max(z * standard_error, 100 * z**2 / (items + z**2)))


@dataclass(frozen=True)
class NonInferiority:
    """One benchmark's test of `candidate - baseline > -margin`.

    Attributes:
        bound: lower one-sided bound at the level that Holm gave this test; above -margin
            exactly when the test passed.
        p, p_holm: of the hypothesis that the drop is the margin or more.
    """

    margin: float
    bound: float
    p: float
    p_holm: float
    passed: bool


def non_inferiority(
    differences: Sequence[Array], margins: Sequence[float], alpha: float = 0.05
) -> list[NonInferiority]:
    """Holm's step-down over benchmarks, from bootstrap differences [resamples] of each.

    The bound of a passed test is taken at its own Holm level, that of the others at the level
    at which the procedure stopped, so bounds and verdicts always agree.
    """
    sizes = [len(draws) for draws in differences]
    p = [
        float((1 + np.sum(~(draws > -margin))) / (1 + len(draws)))
        for draws, margin in zip(differences, margins, strict=True)
    ]
    adjusted = holm(p)
    passed = [value <= alpha for value in adjusted]
    # A step-down passes the smallest p first: test i of them had alpha / (tests - i).
    order = np.argsort(p, kind="stable")
    levels = np.empty(len(p))
    stopped = min(sum(passed), len(p) - 1)
    for rank, index in enumerate(order):
        levels[index] = alpha / (len(p) - min(rank, stopped))
    return [
        NonInferiority(
            margin=margins[i],
            bound=_lower_bound(differences[i], levels[i], sizes[i]),
            p=p[i],
            p_holm=adjusted[i],
            passed=passed[i],
        )
        for i in range(len(p))
    ]


def _lower_bound(draws: Array, level: float, size: int) -> float:
    """The draw that decides `p <= level`: the k-th smallest with k = floor(level (R + 1))."""
    k = max(1, math.floor(level * (size + 1) + 1e-9))
    return float(np.partition(draws, k - 1)[k - 1])


# --- training seeds --------------------------------------------------------------------------


@dataclass(frozen=True)
class MethodDifference:
    """Method B minus method A, both with their training seeds.

    Attributes:
        interval, p: Student's t with both sources of error; see `method_difference`.
        sampling_error: standard error from the choice of test documents.
        seed_error: standard error from the choice of training seeds, None with one seed each.
        spread_a, spread_b: standard deviation of the scores over seeds, None with one seed.
        seeds: number of seeds of A and of B.
    """

    difference: float
    interval: Interval
    p: float
    sampling_error: float
    seed_error: float | None
    spread_a: float | None
    spread_b: float | None
    seeds: tuple[int, int]


def method_difference(
    a_scores: Array,
    b_scores: Array,
    a_draws: Array,
    b_draws: Array,
    units: int,
    level: float = 0.95,
) -> MethodDifference:
    """Compare two methods over training seeds, two-level: seeds and test documents.

    The variance of the difference of means is  var_seeds(A) / S_A + var_seeds(B) / S_B +
    var_documents, the last from the bootstrap of the seed means; degrees of freedom after
    Satterthwaite. The seed variance seen on one test set holds a part of the document noise
    (seeds disagree on documents), so the interval is a little wide rather than too narrow.
    A method with one seed adds no seed variance: nothing is known about it, and `seed_error`
    says so when both have one.

    Args:
        a_scores, b_scores: observed scores, [seeds].
        a_draws, b_draws: the same under one paired bootstrap, [seeds, resamples].
        units: resampling units, for the sampling term's degrees of freedom.
    """
    difference = float(b_scores.mean() - a_scores.mean())
    sampling = float(np.nanvar(b_draws.mean(0) - a_draws.mean(0), ddof=1))
    spreads = [float(s.std(ddof=1)) if len(s) > 1 else None for s in (a_scores, b_scores)]
    terms = [(sampling, max(units - 1, 1))]
    for spread, scores in zip(spreads, (a_scores, b_scores), strict=True):
        if spread is not None:
            terms.append((spread**2 / len(scores), len(scores) - 1))
    variance = sum(term for term, _ in terms)
    seed_variance = sum(term for term, _ in terms[1:])
    error = math.sqrt(variance)
    freedom = variance**2 / sum(t**2 / df for t, df in terms) if variance > 0 else 1.0
    reach = error * float(distributions.t.ppf((1 + level) / 2, freedom))
    if error > 0:
        p = 2 * float(distributions.t.sf(abs(difference) / error, freedom))
    else:
        p = 1.0 if difference == 0 else 0.0
    return MethodDifference(
        difference=difference,
        interval=Interval(difference - reach, difference + reach, level),
        p=p,
        sampling_error=math.sqrt(sampling),
        seed_error=math.sqrt(seed_variance) if len(terms) > 1 else None,
        spread_a=spreads[0],
        spread_b=spreads[1],
        seeds=(len(a_scores), len(b_scores)),
    )
