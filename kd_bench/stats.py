"""Is a difference real? Resampling by unit, exact tests, and what a test set could have shown.

Every interval and test resamples units (images, pairs, groups), never rows. Statistics come
from `aggregators.unit_statistics` as [units, m] and are stacked to [models, units, m]; models
share the resampled units, so differences between them are paired.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import special  # a third of the time that scipy.stats takes to import

from kd_bench.aggregators import get_aggregator, unit_statistics
from kd_bench.files import digest_text
from kd_bench.records import Interval

if TYPE_CHECKING:
    import pandas as pd


Array = NDArray[np.float64]

RESAMPLES = 10_000
# Below this many units no interval holds what it says (docs/statistics.md): none is shown.
FEWEST_UNITS = 5
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
    aggregator: str, samples: "pd.DataFrame", level: float = 0.95
) -> Interval | None:
    """The interval of one task's score, on the 0-100 scale; None with too few units."""
    values = unit_statistics(aggregator, samples).values
    if len(values) < FEWEST_UNITS:
        return None
    score, size = effective_units(aggregator, values)
    return binomial_interval(score / 100, size, len(values), level)


# --- few units ---------------------------------------------------------------------------------


def effective_units(aggregator: str, values: Array) -> tuple[float, float]:
    """The score of [units, m] and how many right-or-wrong items would be as uncertain.

    n_eff = n / deff with the design effect deff = v / (p (1 - p)), v the variance of a unit's
    influence on the score (delta method). Where p is near 0 or 1 there is little to see of v, so
    one wholly right or wrong unit is added to both: at 0 and 1, n_eff = n. After E. Korn and
    B. Graubard, "Confidence intervals for proportions with small expected number of positive
    counts estimated from survey data", Survey Methodology 24 (1998).
    """
    combine, units = get_aggregator(aggregator).combine, len(values)
    sums = values.sum(axis=0)
    score = float(combine(sums))
    steps = np.diag(1e-4 * np.maximum(np.abs(sums), 1.0))
    slopes = (combine(sums + steps) - combine(np.maximum(sums - steps, 0))) / (
        np.diag(steps) + np.minimum(np.diag(steps), sums)
    )
    influence = units * (values @ np.nan_to_num(slopes)) / 100
    variance = float(influence.var(ddof=1)) if units > 1 else 0.0
    p = score / 100
    design = (4 * units * variance + 1) / (4 * units * p * (1 - p) + 1)
    return score, units / design


def binomial_interval(share: float, size: float, units: float, level: float = 0.95) -> Interval:
    """Mid-P exact binomial interval of a share of `size` items, in points (0-100).

    `size` need not be whole (`effective_units`). What it exceeds `units` by was estimated from
    them: it is cut by (z / t)^2, not below `units`. 0 of 15 gives 0 to 18 points.
    """
    from scipy.optimize import brentq

    tail = (1 + level) / 2
    cut = float(special.ndtri(tail) / special.stdtrit(max(units - 1, 1), tail)) ** 2
    size = max(min(size, units), size * cut)
    hits = share * size

    def above(p: float) -> float:
        """Mid-P probability of as many hits or more."""
        more = special.betainc(hits + 1, size - hits, p) if hits < size else 0.0
        return float(more + (special.betainc(hits, size - hits + 1, p) if hits > 0 else 1.0)) / 2

    low = float(brentq(lambda p: above(p) - (1 - tail), 0.0, 1.0)) if hits > 0 else 0.0
    high = float(brentq(lambda p: above(p) - tail, 0.0, 1.0)) if hits < size else 1.0
    return Interval(100 * low, 100 * high, level)


def smoothed(
    draws: Array, score: float, size: float, values: Array, seed: int | tuple[int, ...] = 0
) -> Array:
    """Bootstrap draws of one model's score [resamples] that few units do not make too narrow.

    The spread is corrected for the units' degree of freedom and widened by what one more
    right-or-wrong item could do, normal noise of 100 / n_eff points: two models that differ on
    few units (or on none that is here) are not known to be alike. The noise depends on the
    model's own statistics alone, whatever stands beside it.

    Args:
        score, size: of `effective_units(aggregator, values)`.
    """
    units = len(values)
    if units < 2:
        return draws
    base = (seed,) if isinstance(seed, int) else tuple(seed)
    content = int(content_digest(values)[:16], 16)
    noise = np.random.default_rng((*base, content)).standard_normal(len(draws))
    wide: Array = score + (draws - score) * math.sqrt(units / (units - 1)) + 100 / size * noise
    return wide


def content_digest(values: Array) -> str:
    """sha256 of a model's unit statistics, hexadecimal; equal where no unit differs."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def unchanged_draws(units: int, resamples: int = RESAMPLES, exact: bool = False) -> Array:
    """Differences that go with `units` units of which none changed, in points, symmetrical.

    Their quantiles are the exact binomial bounds: a drop x in a share x of all units went unseen
    with probability (1 - x)^n. Mid-P for intervals; `exact` for a test, whose size is kept.
    """
    tail = (np.arange(resamples) + 0.5) / resamples
    near = np.minimum(tail, 1 - tail) * (1 if exact else 2)
    return np.asarray(100 * np.sign(tail - 0.5) * (1 - near ** (1 / max(units, 1))))


def stretched(draws: Array, value: float, freedom: float) -> Array:
    """Draws about `value`, sorted, with Student's tails in place of the normal ones.

    Quantile q is moved away from `value` by t(q) / z(q): what the percentile bootstrap lacks with
    few units (T. Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 4.2).
    """
    ordered = np.sort(draws[~np.isnan(draws)])
    if freedom > 1_000 or ordered.size == 0:
        return ordered
    z, t = _quantile_grid(ordered.size, float(max(freedom, 1)))
    return np.asarray(value + (ordered - value) * t / z)


@lru_cache(maxsize=64)
def _quantile_grid(count: int, freedom: float) -> tuple[Array, Array]:
    q = (np.arange(count) + 0.5) / count
    q[np.abs(q - 0.5) < 0.25 / count] = 0.5 + 0.25 / count
    return special.ndtri(q), special.stdtrit(freedom, q)


# --- tests -----------------------------------------------------------------------------------


def mcnemar(fixed: int, broken: int) -> float:
    """Exact two-sided McNemar test of 0/1 scores that changed: a fair coin over the changes."""
    if fixed + broken == 0:
        return 1.0
    return min(1.0, 2 * float(special.bdtr(min(fixed, broken), fixed + broken, 0.5)))


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


def holm_levels(p_values: Sequence[float], alpha: float = 0.05) -> list[float]:
    """The error rate that Holm's step-down gave each test, in the order given.

    A step-down rejects the smallest p first: test i of them has alpha / (tests - i), and those
    that it did not reach share the level at which it stopped. An interval at a test's own level
    excludes the hypothesis exactly when the test rejected it.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")[: np.sum(~np.isnan(p))]
    count = len(order)
    rejected = sum(value <= alpha for value in holm(p_values))
    levels = np.full(len(p), alpha / max(count, 1))
    for rank, index in enumerate(order):
        levels[index] = alpha / (count - min(rank, rejected, count - 1))
    return [float(level) for level in levels]


def minimum_detectable_effect(
    standard_error: float, items: int, alpha: float = 0.05, power: float = 0.8
) -> float:
    """The smallest true difference that a two-sided test finds with this power, 0-100 scale.

    Args:
        standard_error: of the paired difference, on the 0-100 scale.
        items: documents or groups that can change. Two models that never disagreed have no
            standard error; about eight one-sided changes are needed even then: z^2 / (n + z^2).
    """
    z = special.ndtri(1 - alpha / 2) + special.ndtri(power)
    return float(max(z * standard_error, 100 * z**2 / (items + z**2)))


@dataclass(frozen=True)
class NonInferiority:
    """One benchmark's test of `candidate - baseline > -margin`.

    Attributes:
        bound: lower one-sided bound at the level that Holm gave this test; above -margin
            exactly when the test passed.
        p, p_holm: of the hypothesis that the drop is the margin or more.
        level: the error rate that Holm gave this test; the bound holds with 1 - level.
    """

    margin: float
    bound: float
    p: float
    p_holm: float
    passed: bool
    level: float = 0.05


def non_inferiority(
    differences: Sequence[Array], margins: Sequence[float], alpha: float = 0.05
) -> list[NonInferiority]:
    """Holm's step-down over benchmarks, from bootstrap differences [resamples] of each.

    The bound of a passed test is taken at its own Holm level, that of the others at the level
    at which the procedure stopped, so bounds and verdicts always agree.
    """
    p = [
        float((1 + np.sum(~(draws > -margin))) / (1 + len(draws)))
        for draws, margin in zip(differences, margins, strict=True)
    ]
    rows = zip(differences, margins, p, holm(p), holm_levels(p, alpha), strict=True)
    return [
        NonInferiority(margin, _lower_bound(draws, level), one, adjusted, adjusted <= alpha, level)
        for draws, margin, one, adjusted, level in rows
    ]


def _lower_bound(draws: Array, level: float) -> float:
    """The draw that decides `p <= level`: the k-th smallest with k = floor(level (R + 1))."""
    k = max(1, math.floor(level * (len(draws) + 1) + 1e-9))
    return float(np.partition(draws, k - 1)[k - 1])


# --- training seeds --------------------------------------------------------------------------


def seed_variance(scores: Array, draws: Array) -> tuple[float, float]:
    """Variance of a method's mean score from its training seeds: (net, as seen on this test set).

    Seeds also disagree on documents, and what that adds to the spread of their scores is in the
    bootstrap already: the net variance is without it, never below zero.

    Args:
        scores: [seeds], at least two.
        draws: [seeds, resamples] of one paired bootstrap.
    """
    count = len(scores)
    seen = float(scores.var(ddof=1)) / count
    apart = float(np.nanvar(draws - draws.mean(axis=0), axis=1).sum()) / (count - 1) / count
    return max(seen - apart, 0.0), seen


def pooled_freedom(variance: float, parts: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of variances, after Satterthwaite.

    Args:
        variance: the sum that is used, with the net seed variances.
        parts: (variance as seen, its degrees of freedom). What was seen is more than what is
            used; of the choices tried, their product kept coverage closest to what it says
            (docs/statistics.md).
    """
    spread = sum(part**2 / freedom for part, freedom in parts)
    if spread <= 0:
        return 1.0
    fewest = min(freedom for part, freedom in parts if part > 0)
    return max(variance * sum(part for part, _ in parts) / spread, fewest)
