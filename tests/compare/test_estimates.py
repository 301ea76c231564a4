"""The one estimator: differences over seeds and documents, ratios, few units, the headline."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from scipy.stats import binom

from kd_bench.compare.estimates import Estimate, Evidence, TaskEvidence, headline
from kd_bench.records import AVERAGE, Interval
from kd_bench.stats import (
    binomial_interval,
    effective_units,
    holm_levels,
    paired_bootstrap,
    percentile_interval,
    seed_variance,
    unchanged_draws,
)

UNITS = 300


def ones(scores: np.ndarray) -> np.ndarray:
    """Statistics of one document a unit: [units, (score, 1)]."""
    return np.stack([scores, np.ones_like(scores)], axis=1).astype(float)


# --- seeds and documents ----------------------------------------------------------------------


def simulate_methods(
    rng: np.random.Generator, seeds: int, seed_spread: float, gap: float
) -> Evidence:
    """Methods a and b: documents of differing difficulty, noisy seeds a0, a1, ..., b0, b1, ..."""
    difficulty = rng.normal(0, 1, UNITS)
    values = {}
    for method, mean in (("a", 0.0), ("b", gap)):
        skill = mean + rng.normal(0, seed_spread, (seeds, 1))
        right = (skill + rng.normal(0, 1, (seeds, UNITS)) > difficulty).astype(float)
        values |= {f"{method}{number}": ones(row) for number, row in enumerate(right)}
    draws = paired_bootstrap("mean", np.stack([*values.values()]), 400, int(rng.integers(1 << 30)))
    statistics = np.stack([*values.values()])
    return Evidence({"t": TaskEvidence.from_draws("mean", [*values], statistics, draws, 0)})


def between(evidence: Evidence) -> Estimate:
    """Method b minus method a over all of their seeds."""
    runs = list(evidence.tasks["t"].scores)
    first, second = ([run for run in runs if run[0] == method] for method in "ab")
    return evidence.difference("t", first, second)


@pytest.mark.parametrize("seed_spread", [0.0, 0.1, 0.4])
@pytest.mark.slow
def test_a_difference_of_methods_covers_zero_between_equal_ones(seed_spread: float) -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(300):
        found = between(simulate_methods(rng, 3, seed_spread, 0.0))
        inside = found.interval.low <= 0 <= found.interval.high
        covered += inside
        on_the_edge = abs(found.p - 0.05) < 0.002  # the bounds are of 400 quantiles
        assert (found.p < 0.05) == (not inside) or on_the_edge
    assert covered / 300 >= 0.93


def test_ignoring_the_seeds_would_not_cover() -> None:
    """The test above can fail: sampling error alone covers zero far too rarely."""
    rng = np.random.default_rng(12)
    covered = 0
    for _ in range(200):
        draws = simulate_methods(rng, 3, 0.4, 0.0).tasks["t"].draws
        a, b = (np.mean([draws[f"{method}{n}"] for n in range(3)], axis=0) for method in "ab")
        interval = percentile_interval(b - a)
        covered += interval.low <= 0 <= interval.high
    assert covered / 200 < 0.75


def test_a_difference_of_methods_adds_both_sources_of_error() -> None:
    evidence = simulate_methods(np.random.default_rng(13), 5, 0.05, 1.0)
    found, task = between(evidence), evidence.tasks["t"]
    scores = np.array([*task.scores.values()]).reshape(2, 5)
    draws = np.stack([*task.draws.values()]).reshape(2, 5, -1)
    assert found.p < 0.01
    assert found.value == pytest.approx(scores[1].mean() - scores[0].mean())
    assert found.seeds == (5, 5)
    variance = np.var(draws[1].mean(0) - draws[0].mean(0), ddof=1)
    for own, drawn in zip(scores, draws, strict=True):
        net, seen = seed_variance(own, drawn)
        assert seen == pytest.approx(own.var(ddof=1) / 5)
        variance += net
    assert found.error == pytest.approx(math.sqrt(variance))
    reach = found.error * scipy.stats.t.ppf(0.975, found.freedom)
    assert found.interval.low == pytest.approx(found.value - reach, abs=0.1)  # of 400 quantiles


def test_one_seed_a_method_has_no_seed_error() -> None:
    found = between(simulate_methods(np.random.default_rng(14), 1, 0.0, 0.5))
    assert not found.holds_seeds
    assert found.one_seed
    assert found.interval.low < found.value < found.interval.high


def test_identical_methods_differ_by_nothing_that_was_seen() -> None:
    values = {name: ones(np.array([1.0, 0.0] * 5)) for name in ("a0", "a1", "b0", "b1")}
    found = between(Evidence({"t": TaskEvidence.of("mean", list("abcdefghij"), values, 400)}))
    assert (found.value, found.p) == (0.0, 1.0)
    assert found.unchanged
    assert found.interval.high == pytest.approx(-found.interval.low)
    assert found.interval.high > 0


# --- ratios, few units ------------------------------------------------------------------------


def test_ratio_has_no_interval_when_its_denominator_may_be_zero() -> None:
    """Percent of the way from a floor to a teacher, from normal draws about known scores."""
    rng = np.random.default_rng(0)

    def closed(floor: float, teacher: float) -> Interval | None:
        scores = {"student": 50.0, "floor": floor, "teacher": teacher}
        draws = {name: rng.normal(score, 1, 5000) for name, score in scores.items()}
        sizes = dict.fromkeys(scores, 1000.0)
        task = TaskEvidence(1000, scores, sizes, draws, {name: name for name in scores})
        found = Evidence({"t": task}).gap_closed("t", ["student"], ["floor"], ["teacher"])
        return found and found.interval

    assert closed(45, 46) is None
    assert closed(46, 45) is None
    found = closed(45, 65)
    assert found is not None
    assert 10 < found.low < 25 < found.high < 40


def test_no_difference_is_larger_than_a_hundred_points() -> None:
    values = {"a": np.array([[1.0, 1.0]] * 6), "b": np.array([[1.0, 1.0]] + [[0.0, 1.0]] * 5),
              "c": np.array([[0.0, 1.0]] * 6)}  # fmt: skip
    one = Evidence({"t": TaskEvidence.of("mean", list("uvwxyz"), values, 500)})
    for key in ("t", AVERAGE):
        for first, second in ((["a"], ["b"]), (["a", "b"], ["b", "c"])):
            interval = one.difference(key, first, second).interval
            assert interval is not None
            assert -100 <= interval.low <= interval.high <= 100


def test_ranks_want_units(tmp_path: Path) -> None:
    values = {"a": np.array([[1.0, 1.0]]), "b": np.array([[0.0, 1.0]])}
    one = Evidence({"t": TaskEvidence.of("mean", ["u"], values, 200)})
    assert one.ranks("t", {"a": ["a"], "b": ["b"]}) == {}
    assert one.difference("t", ["a"], ["b"]).interval is None


def test_exact_bounds_by_hand() -> None:
    assert binomial_interval(0.0, 15, 15).high == pytest.approx(100 * (1 - 0.05 ** (1 / 15)))
    assert binomial_interval(1.0, 15, 15).low == pytest.approx(100 * 0.05 ** (1 / 15))
    low = np.quantile(unchanged_draws(15, exact=True), 0.05)
    assert low == pytest.approx(-100 * (1 - 0.05 ** (1 / 15)), abs=0.05)
    assert holm_levels([0.001, 0.3, 0.02], 0.05) == pytest.approx([0.05 / 3, 0.05, 0.05 / 2])


def test_a_retention_of_equal_models_is_not_known_exactly() -> None:
    values = {name: np.array([[1.0, 1.0]] * 14 + [[0.0, 1.0]] * 6) for name in "ab"}
    found = Evidence({"t": TaskEvidence.of("mean", list(map(str, range(20))), values, 2000)})
    kept = found.retention("t", ["a"], ["b"])
    assert kept is not None
    assert kept.interval is not None
    assert kept.value == pytest.approx(100)
    assert kept.interval.high - kept.interval.low > 20


@pytest.mark.parametrize("units", [5, 15, 40])
def test_scores_of_few_units_are_covered_at_every_truth(units: int) -> None:
    """Exactly, over all outcomes: no simulation."""
    intervals = []
    for hits in range(units + 1):
        values = np.stack([np.arange(units) < hits, np.ones(units)], axis=1).astype(float)
        score, size = effective_units("mean", values)
        intervals.append(binomial_interval(score / 100, size, units))
    covered = [
        sum(
            binom.pmf(hits, units, truth)
            for hits, interval in enumerate(intervals)
            if interval.low - 1e-9 <= 100 * truth <= interval.high + 1e-9
        )
        for truth in np.linspace(0.005, 0.995, 199)
    ]
    assert min(covered) > 0.925
    assert 0.95 < np.mean(covered) < 0.99


# --- the headline -----------------------------------------------------------------------------


def evidence_with(gains: dict[str, float], seed: int, units: int = 400) -> Evidence:
    rng = np.random.default_rng(seed)
    hard = rng.normal(0, 1, units)
    values = {
        name: np.stack([(gain + rng.normal(0, 1, units) > hard), np.ones(units)], 1).astype(float)
        for name, gain in {"floor": 0.0, **gains}.items()
    }
    return Evidence({"t": TaskEvidence.of("mean", list(map(str, range(units))), values, 400)})


def test_a_headline_holds_over_all_methods() -> None:
    names = {name: [name] for name in "abcdefgh"}
    said = 0
    for seed in range(100):
        said += (
            headline(evidence_with(dict.fromkeys(names, 0.0), seed), ["floor"], names) is not None
        )
    assert said <= 12  # 5 % or less; 1.6 in a thousand of binomial chance above this
    found = headline(evidence_with({**dict.fromkeys(names, 0.0), "c": 1.0}, 1), ["floor"], names)
    assert found is not None
    assert (found.method, found.candidates, found.weights_only) == ("c", 8, True)
    assert found.difference.interval is not None
    assert found.difference.interval.level == pytest.approx(1 - 0.05 / 8)
    assert "training noise is unknown" in found.sentence


def test_the_main_recipe_is_spoken_of_alone() -> None:
    names = {name: [name] for name in "ab"}
    evidence = evidence_with({"a": 0.0, "b": 1.0}, 2)
    assert headline(evidence, ["floor"], names, main="a") is None
    found = headline(evidence, ["floor"], names, main="b")
    assert found is not None
    assert found.candidates == 1
