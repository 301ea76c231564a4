"""Aggregators against upstream's own functions, by hand, and by property."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_bench.aggregators import (
    AGGREGATORS,
    MME_COGNITION,
    MME_PERCEPTION,
    aggregate,
    get_aggregator,
    unit_statistics,
)
from kd_bench.errors import UsageError


def upstream(path: str) -> ModuleType:
    """A file of lmms-eval loaded by itself: importing the package costs seconds."""
    found = importlib.util.find_spec("lmms_eval")
    if found is None or not found.submodule_search_locations:
        pytest.skip("lmms-eval is not installed", allow_module_level=True)
    file = Path(found.submodule_search_locations[0]) / "tasks" / path
    spec = importlib.util.spec_from_file_location(file.stem + "_upstream", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def frame(
    scores: list[float],
    units: list[str] | None = None,
    categories: list[str] | None = None,
    parsed: list[str] | None = None,
    targets: list[str] | None = None,
) -> pd.DataFrame:
    rows = len(scores)
    return pd.DataFrame(
        {
            "document_id": [f"d{row}" for row in range(rows)],
            "unit_id": units or [f"u{row}" for row in range(rows)],
            "category": categories or [""] * rows,
            "score": np.asarray(scores, dtype=float),
            "parsed": parsed or ["x"] * rows,
            "target": targets or ["x"] * rows,
        }
    )


# --- by hand ---------------------------------------------------------------------------------


def test_mean_accuracy_and_strict_by_hand() -> None:
    samples = frame([1.0, 0.3, 0.0, 0.9], parsed=["a", "b", "", ""])
    assert aggregate("mean", samples) == pytest.approx(55.0)
    assert aggregate("accuracy", samples) == pytest.approx(25.0)
    assert aggregate("strict", samples) == pytest.approx(32.5)


def test_circular_counts_a_group_when_every_rotation_is_right() -> None:
    units = ["a", "a", "b", "b", "b", "c"]
    assert aggregate("circular", frame([1, 1, 1, 0, 1, 1], units)) == pytest.approx(200 / 3)


def test_mme_is_the_share_of_what_an_oracle_gets() -> None:
    # existence: one whole pair (200 of 200), one half (50 of 200); OCR: nothing.
    units = ["1", "1", "2", "2", "1", "1"]
    categories = ["existence"] * 4 + ["OCR"] * 2
    samples = frame([1, 1, 1, 0, 0, 0], units, categories)
    assert aggregate("mme", samples) == pytest.approx((125 + 0) / 400 * 100)
    assert aggregate("mme_category", samples) == pytest.approx(aggregate("mme", samples))
    assert np.isnan(aggregate("mme_cognition", samples))


def test_mme_equal_question_ids_in_two_categories_are_two_pairs() -> None:
    samples = frame([1, 1, 0, 0], ["7"] * 4, ["count", "count", "color", "color"])
    assert len(unit_statistics("mme", samples).units) == 2
    assert aggregate("mme", samples) == pytest.approx(50.0)


def test_mme_leaves_out_a_pair_that_a_limit_cut_in_half() -> None:
    samples = frame([1, 1, 0], ["1", "1", "2"], ["count"] * 3)
    assert aggregate("mme", samples) == pytest.approx(100.0)
    assert np.isnan(aggregate("mme", samples.iloc[2:]))


def test_all_ten_perception_categories_give_the_papers_perception_over_20() -> None:
    rng = np.random.default_rng(3)
    categories = np.repeat(MME_PERCEPTION, 2 * 5).tolist()
    units = [str(row // 2) for row in range(100)]
    scores = rng.integers(0, 2, 100).tolist()
    samples = frame(scores, units, categories)
    pairs = np.array(scores).reshape(10, 5, 2)
    raw = (pairs.mean(2) * 100 + (pairs.sum(2) == 2) * 100).mean(1).sum()
    assert aggregate("mme", samples) == pytest.approx(raw / 20)


def test_f1_by_hand_and_an_unreadable_answer_counts_nowhere() -> None:
    said = ["yes", "yes", "no", "yes", "", "No "]
    truth = ["yes", "no", "yes", "yes", "yes", "no"]
    samples = frame([1, 0, 0, 1, 0, 1], parsed=said, targets=truth)
    assert aggregate("f1", samples) == pytest.approx(100 * 4 / (4 + 1 + 1))


def test_f1_of_a_model_that_never_says_yes_is_zero() -> None:
    assert aggregate("f1", frame([0, 1], parsed=["no", "no"], targets=["yes", "no"])) == 0.0


def test_f1_mean_is_the_mean_over_the_three_subsets() -> None:
    said = ["yes", "yes", "yes", "no"]
    truth = ["yes", "no", "yes", "yes"]
    categories = ["random", "random", "popular", "popular"]
    samples = frame([1, 0, 1, 0], ["p"] * 4, categories, said, truth)
    assert aggregate("f1_mean", samples) == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)
    assert len(unit_statistics("f1_mean", samples).units) == 1


@pytest.mark.parametrize("name", AGGREGATORS)
def test_nothing_to_score_is_nan(name: str) -> None:
    assert np.isnan(aggregate(name, frame([])))


def test_an_unknown_aggregator_names_the_near_one() -> None:
    with pytest.raises(UsageError, match="Did you mean 'circular'"):
        get_aggregator("circullar")


# --- against upstream ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), present=st.integers(1, 14))
def test_mme_equals_upstream_on_random_pairs(seed: int, present: int) -> None:
    rng = np.random.default_rng(seed)
    names = rng.permutation([*MME_PERCEPTION, *MME_COGNITION])[:present]
    rows = [
        {"question_id": f"{pair}.png", "category": str(name), "score": float(rng.integers(0, 2))}
        for name in names
        for pair in range(int(rng.integers(1, 6)))
        for _ in range(2)
    ]
    order = rng.permutation(len(rows))
    samples = frame(
        [rows[i]["score"] for i in order],
        [rows[i]["question_id"] for i in order],
        [rows[i]["category"] for i in order],
    )
    score = MME.mme_aggregate_results
    for aggregator, group in (("mme", MME_PERCEPTION), ("mme_cognition", MME_COGNITION)):
        chosen = [row for row in rows if row["category"] in group]
        ours = aggregate(aggregator, samples)
        if not chosen:
            assert np.isnan(ours)
            continue
        categories = len({row["category"] for row in chosen})
        assert ours == pytest.approx(score(chosen) / (200 * categories) * 100)


@settings(max_examples=60, deadline=None)
@given(
    answers=st.lists(
        st.tuples(st.sampled_from(["yes", "no", ""]), st.sampled_from(["yes", "no"])), min_size=1
    )
)
def test_f1_equals_upstream_on_random_answers(answers: list[tuple[str, str]]) -> None:
    rows = [{"prediction": said, "ground_truth": truth} for said, truth in answers]
    samples = frame(
        [float(said == truth) for said, truth in answers],
        parsed=[said for said, _ in answers],
        targets=[truth for _, truth in answers],
    )
    expected = 100 * POPE.pope_aggregate_f1_score(rows)
    assert aggregate("f1", samples) == pytest.approx(expected)


def test_category_tables_equal_upstreams() -> None:
    assert MME.eval_type_dict["Perception"] == list(MME_PERCEPTION)
    assert MME.eval_type_dict["Cognition"] == list(MME_COGNITION)


MME = upstream("mme/utils.py")
POPE = upstream("pope/utils.py")


# --- properties ------------------------------------------------------------------------------


@st.composite
def any_samples(draw: st.DrawFn) -> pd.DataFrame:
    rows = draw(st.integers(2, 40))
    pick = st.lists(st.integers(0, 5), min_size=rows, max_size=rows)
    words = st.lists(st.sampled_from(["yes", "no", ""]), min_size=rows, max_size=rows)
    values = st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])
    return frame(
        draw(st.lists(values, min_size=rows, max_size=rows)),
        [f"u{number}" for number in draw(pick)],
        [["count", "OCR", "code_reasoning"][number % 3] for number in draw(pick)],
        draw(words),
        draw(words),
    )


@settings(max_examples=80, deadline=None)
@given(samples=any_samples(), name=st.sampled_from(sorted(AGGREGATORS)), seed=st.integers(0, 99))
def test_row_order_is_nothing_and_scores_stay_within_0_and_100(
    samples: pd.DataFrame, name: str, seed: int
) -> None:
    score = aggregate(name, samples)
    shuffled = aggregate(name, samples.sample(frac=1, random_state=seed))
    assert score == pytest.approx(shuffled, nan_ok=True)
    assert np.isnan(score) or -1e-9 <= score <= 100 + 1e-9


@settings(max_examples=80, deadline=None)
@given(samples=any_samples(), name=st.sampled_from(sorted(AGGREGATORS)))
def test_combine_is_vectorised_over_leading_axes(samples: pd.DataFrame, name: str) -> None:
    values = unit_statistics(name, samples).values
    weights = np.random.default_rng(0).integers(0, 4, (2, 3, len(values)))
    combine = get_aggregator(name).combine
    together = combine(weights @ values)
    assert together.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(together[i, j], combine(weights[i, j] @ values))


@settings(max_examples=40, deadline=None)
@given(samples=any_samples(), name=st.sampled_from(sorted(AGGREGATORS)))
def test_weighting_a_unit_twice_is_repeating_its_rows(samples: pd.DataFrame, name: str) -> None:
    """The sums really are what a resample with replacement would give."""
    statistics = unit_statistics(name, samples)
    if len(statistics.units) == 0:
        return
    twice = statistics.units[0]
    key = samples["unit_id"].astype(str)
    if name.startswith("mme"):
        key = samples["category"].astype(str) + "\x1f" + key
    copy = samples[key == twice].assign(unit_id=lambda rows: rows["unit_id"] + "-copy")
    repeated = aggregate(name, pd.concat([samples, copy]))
    weights = np.ones(len(statistics.units))
    weights[0] = 2
    weighted = get_aggregator(name).combine(weights @ statistics.values)
    np.testing.assert_allclose(weighted, repeated)
