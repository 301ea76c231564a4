"""Statistics against scipy, statsmodels and hand-written oracles, and their own properties."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from kd_bench import stats
from kd_bench.stats import (
    bootstrap_sums,
    exact_or_swap,
    holm,
    mcnemar,
    minimum_detectable_effect,
    non_inferiority,
    paired_bootstrap,
    percentile_interval,
    score_interval,
    swap_draws,
    two_sided,
    unit_seed,
)


def ones(scores: np.ndarray) -> np.ndarray:
    """Statistics of one document a unit: [units, (score, 1)]."""
    return np.stack([scores, np.ones_like(scores)], axis=1).astype(float)


# --- bootstrap -------------------------------------------------------------------------------


def test_bootstrap_draws_as_many_units_as_there_are() -> None:
    counts = bootstrap_sums(np.ones((37, 1)), 500)
    assert np.all(counts == 37)


def test_bootstrap_weights_are_multinomial() -> None:
    units = 12
    weights = bootstrap_sums(np.eye(units), 20_000)
    assert np.all(weights == weights.round())
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.03)
    np.testing.assert_allclose(weights.var(0), 1 - 1 / units, atol=0.04)
    off = np.cov(weights.T)[~np.eye(units, dtype=bool)]
    np.testing.assert_allclose(off, -1 / units, atol=0.04)


def test_memory_bound_does_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((50, 3))
    whole = bootstrap_sums(values, 300, seed=5)
    monkeypatch.setattr(stats, "CELLS", 120)
    np.testing.assert_allclose(bootstrap_sums(values, 300, seed=5), whole)


def test_seeds_are_fixed_and_differ() -> None:
    values = np.random.default_rng(0).random((50, 1))
    assert np.array_equal(bootstrap_sums(values, 20, 1), bootstrap_sums(values, 20, 1))
    assert not np.array_equal(bootstrap_sums(values, 20, 1), bootstrap_sums(values, 20, 2))


def test_a_model_keeps_its_draws_whoever_stands_beside_it() -> None:
    rng = np.random.default_rng(1)
    three = np.stack([ones(rng.integers(0, 2, 80)) for _ in range(3)])
    alone = paired_bootstrap("mean", three[:1], 200)
    np.testing.assert_allclose(paired_bootstrap("mean", three, 200)[0], alone[0])


def test_equal_models_have_equal_draws() -> None:
    one = ones(np.random.default_rng(1).integers(0, 2, 80))
    draws = paired_bootstrap("mean", np.stack([one, one]), 200)
    assert np.array_equal(draws[0], draws[1])


def test_unit_seed_depends_on_units_and_seed_only() -> None:
    assert unit_seed(["a", "b"]) == unit_seed(np.array(["a", "b"], dtype=object))
    assert unit_seed(["a", "b"]) != unit_seed(["a", "c"])
    assert unit_seed(["a", "b"]) != unit_seed(["ab", ""])
    assert unit_seed(["a"], 1) != unit_seed(["a"], 2)


def test_interval_of_a_mean_agrees_with_scipys_bootstrap() -> None:
    scores = np.random.default_rng(4).choice([0, 0.3, 0.6, 0.9, 1.0], 300)
    draws = paired_bootstrap("mean", ones(scores)[None], 20_000)[0]
    ours = percentile_interval(draws)
    reference = scipy.stats.bootstrap(
        (100 * scores,), np.mean, n_resamples=20_000, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    assert ours.low == pytest.approx(reference.confidence_interval.low, abs=0.15)
    assert ours.high == pytest.approx(reference.confidence_interval.high, abs=0.15)
    assert draws.std(ddof=1) == pytest.approx(reference.standard_error, rel=0.03)


def test_clusters_widen_the_interval() -> None:
    scores = np.repeat(np.random.default_rng(2).integers(0, 2, 50), 20).astype(float)
    samples = pd.DataFrame({"score": scores, "unit_id": [f"p{row // 20}" for row in range(1000)]})
    by_picture = score_interval("mean", samples)
    samples["unit_id"] = [f"d{row}" for row in range(1000)]
    by_row = score_interval("mean", samples)
    ratio = (by_picture.high - by_picture.low) / (by_row.high - by_row.low)
    assert ratio == pytest.approx(math.sqrt(20), rel=0.1)


def test_interval_ignores_draws_without_a_score() -> None:
    draws = np.array([np.nan, 1.0, 2.0, 3.0, np.nan])
    assert percentile_interval(draws, 0.5).low == pytest.approx(1.5)
    empty = percentile_interval(np.array([np.nan]))
    assert math.isnan(empty.low)
    assert math.isnan(empty.high)


# --- tests -----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(fixed=st.integers(0, 60), broken=st.integers(0, 60))
def test_mcnemar_equals_statsmodels_and_the_binomial(fixed: int, broken: int) -> None:
    p = mcnemar(fixed, broken)
    if fixed + broken == 0:
        assert p == 1
        return
    table = [[10, fixed], [broken, 20]]
    assert p == pytest.approx(float(statsmodels_mcnemar(table, exact=True).pvalue), abs=1e-9)
    binomial = scipy.stats.binomtest(fixed, fixed + broken, 0.5).pvalue
    assert p == pytest.approx(binomial, abs=1e-9)
    assert p == mcnemar(broken, fixed)


@settings(max_examples=25, deadline=None)  # statsmodels collects garbage at every call
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=12))
@pytest.mark.slow
def test_holm_equals_statsmodels_and_the_step_down_by_hand(p: list[float]) -> None:
    ours = holm(p)
    np.testing.assert_allclose(ours, multipletests(p, method="holm")[1], atol=1e-9)
    order = np.argsort(p, kind="stable")
    running, by_hand = 0.0, np.empty(len(p))
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[index]))
        by_hand[index] = running
    np.testing.assert_allclose(ours, by_hand, atol=1e-9)


def test_holm_leaves_out_what_was_not_tested() -> None:
    adjusted = holm([0.01, math.nan, 0.04])
    assert adjusted[0] == pytest.approx(0.02)
    assert math.isnan(adjusted[1])
    assert adjusted[2] == pytest.approx(0.04)
    assert all(math.isnan(value) for value in holm([math.nan]))


def test_sign_flip_agrees_with_scipys_permutation_test() -> None:
    rng = np.random.default_rng(8)
    first, second = rng.choice([0, 0.3, 0.6, 1.0], (2, 60))
    second = np.clip(second + 0.1, 0, 1)
    draws = swap_draws("mean", ones(first), ones(second), 20_000)
    p, name = exact_or_swap("mean", ones(first), ones(second), draws)
    reference = scipy.stats.permutation_test(
        (second, first), lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples", n_resamples=20_000, vectorized=True,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    assert name == "sign-flip by unit"
    assert p == pytest.approx(reference.pvalue, abs=0.012)


def test_sign_flip_of_binary_documents_is_mcnemar() -> None:
    first = np.zeros(100)
    second = np.zeros(100)
    first[:4], second[4:16] = 1, 1
    draws = swap_draws("mean", ones(first), ones(second), 50_000)
    exact, name = exact_or_swap("mean", ones(first), ones(second), draws)
    assert name == "McNemar, exact"
    assert exact == pytest.approx(mcnemar(12, 4))
    assert two_sided(8.0, draws) == pytest.approx(exact, abs=0.006)


def test_swap_of_whole_units_for_f1() -> None:
    """Each null draw must be the F1 difference of some exchange of whole pictures."""
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, 4, (2, 3, 4)).astype(float)
    second[:, 3] = first[:, 3] = 9
    draws = swap_draws("f1", first, second, 400)

    def f1(sums: np.ndarray) -> float:
        return 200 * sums[0] / max(1, 2 * sums[0] + sums[1] + sums[2])

    possible = set()
    for bits in np.ndindex(2, 2, 2):
        swap = np.array(bits, dtype=bool)[:, None]
        a, b = np.where(swap, second, first), np.where(swap, first, second)
        possible.add(round(f1(b.sum(0)) - f1(a.sum(0)), 9))
    drawn = {round(value, 9) for value in draws}
    assert drawn == possible


def test_identical_models_have_p_one() -> None:
    values = ones(np.random.default_rng(0).choice([0, 0.5, 1.0], 40))
    p, _ = exact_or_swap("mean", values, values, swap_draws("mean", values, values, 100))
    assert p == 1.0


def test_monte_carlo_p_is_never_zero() -> None:
    assert two_sided(50.0, np.zeros(999)) == pytest.approx(0.001)
    assert two_sided(0.0, np.zeros(999)) == 1.0


# --- detectable effects, non-inferiority ---------------------------------------------------------


def test_detectable_effect_is_found_four_times_in_five() -> None:
    """Simulated power of McNemar at the effect that the formula names: n 1000, discordance 12 %."""
    n, discordance = 1000, 0.12
    error = 100 * math.sqrt(discordance / n)
    effect = minimum_detectable_effect(error, n) / 100
    rng = np.random.default_rng(0)
    table = rng.multinomial(
        n, [(discordance - effect) / 2, (discordance + effect) / 2, 1 - discordance], 2000
    )
    found = np.mean([mcnemar(int(fixed), int(broken)) <= 0.05 for fixed, broken, _ in table])
    assert 0.74 < found < 0.84  # the exact test is a little conservative


def test_detectable_effect_without_any_change_seen_needs_eight_changes() -> None:
    assert minimum_detectable_effect(0.0, 900) == pytest.approx(100 * 7.849 / 907.849, rel=1e-3)
    assert minimum_detectable_effect(2.0, 900) == pytest.approx(2.8016 * 2, rel=1e-3)
    assert minimum_detectable_effect(2.0, 900, power=0.95) > minimum_detectable_effect(2.0, 900)


@settings(max_examples=60, deadline=None)
@given(
    means=st.lists(st.floats(-6, 3), min_size=1, max_size=11),
    margin=st.floats(0.1, 4),
    seed=st.integers(0, 999),
)
def test_bounds_and_verdicts_of_non_inferiority_always_agree(
    means: list[float], margin: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    draws = [rng.normal(mean, 1, 2000) for mean in means]
    tests = non_inferiority(draws, [margin] * len(means))
    for one, drawn in zip(tests, draws, strict=True):
        assert one.passed == (one.bound > -margin)
        assert one.passed == (one.p_holm <= 0.05)
        assert one.p == pytest.approx((1 + np.sum(drawn <= -margin)) / 2001)
        assert one.bound <= np.quantile(drawn, 0.06)


def test_non_inferiority_alone_is_the_one_sided_95_percent_bound() -> None:
    drawn = np.random.default_rng(0).normal(0, 1, 100_000)
    (one,) = non_inferiority([drawn], [2.0])
    assert one.bound == pytest.approx(-1.645, abs=0.02)
    assert one.passed
    (two,) = non_inferiority([drawn], [1.6])
    assert not two.passed


def test_a_draw_without_score_speaks_against_passing() -> None:
    (one,) = non_inferiority([np.full(1000, np.nan)], [5.0])
    assert not one.passed
