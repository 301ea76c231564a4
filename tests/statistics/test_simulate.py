"""The simulation itself: its shortcuts equal the program's own path, its truth is the truth."""

import numpy as np
import pytest
from scipy.stats import kstest

from kd_bench.aggregators import aggregate, get_aggregator, unit_statistics
from kd_bench.stats import bootstrap_sums, unit_seed
from tests.statistics import figures
from tests.statistics.simulate import (
    answers,
    frame,
    real_benchmarks,
    rho_for,
    sums_by_unit,
    true_score,
)

BENCHMARKS = real_benchmarks()


def test_sizes_are_the_real_ones() -> None:
    sizes = {task: shape.rows for task, shape in BENCHMARKS.items()}
    assert sizes["mme"] == 2374
    assert sizes["vqav2"] == 214_354
    assert sum(sizes.values()) == 259_200
    assert BENCHMARKS["gqa"].units == 398


@pytest.mark.parametrize("task", [task for task in BENCHMARKS if task != "vqav2"])
def test_sums_by_unit_equal_the_aggregators(task: str) -> None:
    shape = BENCHMARKS[task]
    right = answers(np.random.default_rng(0), shape, [0.4], 0.0)[0]
    fast, slow = (
        sums_by_unit(shape, right),
        unit_statistics(shape.aggregator, frame(shape, right)).values,
    )
    assert sorted(map(tuple, fast)) == sorted(map(tuple, slow))
    combine = get_aggregator(shape.aggregator).combine
    assert combine(fast.sum(0)) == pytest.approx(aggregate(shape.aggregator, frame(shape, right)))


@pytest.mark.parametrize("task", ["mme", "mmbench_en", "gqa", "pope"])
def test_true_scores_are_the_mean_of_many_worlds(task: str) -> None:
    shape = BENCHMARKS[task]
    rng = np.random.default_rng(1)
    combine = get_aggregator(shape.aggregator).combine
    scores = [
        combine(sums_by_unit(shape, answers(rng, shape, [0.4], 0.0)[0]).sum(0)) for _ in range(300)
    ]
    error = np.std(scores) / np.sqrt(len(scores))
    assert np.mean(scores) == pytest.approx(true_score(shape, 0.4), abs=4 * error)


@pytest.mark.parametrize("discordance", [0.02, 0.1, 0.2])
def test_discordance_is_the_one_asked_for(discordance: float) -> None:
    shape = BENCHMARKS["gqa"]
    rng = np.random.default_rng(2)
    rho = rho_for(discordance, 0.4)
    rates = []
    for _ in range(20):
        a, b = answers(rng, shape, [0.4, 0.4], rho)
        rates.append(np.mean(a != b))
    assert np.mean(rates) == pytest.approx(discordance, rel=0.08)


@pytest.mark.parametrize("task", ["gqa", "pope", "mme"])
def test_drawing_equal_units_together_has_the_programs_distribution(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = BENCHMARKS[task]
    made = figures.aligned(shape, answers(np.random.default_rng(3), shape, [0.4, 0.3], 0.8))
    monkeypatch.setattr(figures, "RESAMPLES", 4000)
    own = figures.resampled(made, 0)
    monkeypatch.setattr(figures, "SMALL", 0)
    fast = figures.resampled(made, 0)
    assert isinstance(fast, figures.Collapsed)
    for one, other in (
        (own.draws[1] - own.draws[0], fast.draws[1] - fast.draws[0]),
        (own.null_draws(0, 1), fast.null_draws(0, 1)),
    ):
        assert kstest(one, other).pvalue > 1e-3


def test_weights_of_the_bootstrap_give_the_programs_draws() -> None:
    shape = figures.seeded_shapes()[1]
    values = sums_by_unit(shape, answers(np.random.default_rng(4), shape, [0.4], 0.0)[0])
    seed = unit_seed(np.arange(shape.units).astype(object))
    own = bootstrap_sums(values, figures.RESAMPLES, seed)
    np.testing.assert_allclose(figures.weights_of(shape.units) @ values, own)
