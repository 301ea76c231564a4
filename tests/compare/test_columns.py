"""Form gap and sight: further columns of a run on the same units, and a difference in two parts."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_bench.aggregators import unit_statistics
from kd_bench.compare.align import content_statistics
from kd_bench.compare.estimates import BLANK, CONTENT, Estimate, Evidence, TaskEvidence, beside
from kd_bench.records import AVERAGE
from kd_bench.stats import unchanged_draws
from tests.compare.test_compare import samples

RNG = np.random.default_rng(21)


def ones(scores: Sequence[float]) -> np.ndarray:
    """Statistics of one document a unit: [units, (score, 1)]."""
    return np.stack([scores, np.ones(len(scores))], axis=1).astype(float)


def evidence(task: str = "t", resamples: int = 4000, **columns: Sequence[float]) -> Evidence:
    """Of 0/1 scores by name; `content_a` is what run a says, `blank_a` its blank score."""
    named = {
        beside(*name.split("_")) if "_" in name else name: ones(scores)
        for name, scores in columns.items()
    }
    units = [str(row) for row in range(len(next(iter(columns.values()))))]
    return Evidence({task: TaskEvidence.of("mean", units, named, resamples)})


def same(one: Estimate, other: Estimate) -> bool:
    return (one.value, one.interval, one.error, one.p) == pytest.approx(
        (other.value, other.interval, other.error, other.p)
    )


def spread(values: np.ndarray) -> tuple[float, float]:
    """Closed form of the 95 % interval of a mean of paired differences, in points."""
    error = 100 * values.std(ddof=1) / np.sqrt(len(values))
    reach = scipy.stats.t.ppf(0.975, len(values) - 1) * error
    return 100 * values.mean() - reach, 100 * values.mean() + reach


# --- the estimator -----------------------------------------------------------------------------


def test_a_gap_of_one_run_is_the_paired_difference_of_its_two_columns():
    score, content, blank = (RNG.integers(0, 2, 300) for _ in range(3))
    found = evidence(a=score, content_a=np.maximum(score, content), blank_a=blank)
    form, sight = found.form_gap("t", ["a"]), found.sight("t", ["a"])
    assert same(form, found.difference("t", ["a"], [beside(CONTENT, "a")]))
    assert same(sight, found.difference("t", [beside(BLANK, "a")], ["a"]))
    for known, values in ((form, np.maximum(score, content) - score), (sight, score - blank)):
        assert known.value == pytest.approx(100 * values.mean())
        bounds = known.interval.low, known.interval.high
        assert bounds == pytest.approx(spread(values), abs=0.6)


def test_the_parts_of_a_difference_add_up_and_have_the_closed_forms_intervals():
    a, b = RNG.integers(0, 2, (2, 400))
    said_a, said_b = np.maximum(a, RNG.integers(0, 2, 400)), np.maximum(b, a)
    found = evidence(a=a, b=b, content_a=said_a, content_b=said_b)
    whole = found.difference("t", ["a"], ["b"])
    content, form = found.split("t", ["a"], ["b"], CONTENT)
    assert whole.value == pytest.approx(content.value + form.value, abs=1e-9)
    for part, values in ((content, said_b - said_a), (form, (b - said_b) - (a - said_a))):
        assert part.value == pytest.approx(100 * values.mean())
        bounds = part.interval.low, part.interval.high
        assert bounds == pytest.approx(spread(values), abs=0.6)
    gap_a, gap_b = (found.form_gap("t", [run]).value for run in "ab")
    assert form.value == pytest.approx(gap_a - gap_b)  # a smaller gap is a gain of form


def test_two_runs_that_differ_in_form_alone_have_all_of_it_there():
    said = RNG.integers(0, 2, 200)
    shown = said * (RNG.random(200) < 0.6)
    found = evidence(a=shown, b=said, content_a=said, content_b=said)
    whole = found.difference("t", ["a"], ["b"])
    content, form = found.split("t", ["a"], ["b"], CONTENT)
    assert (content.value, content.unchanged, content.p) == (0.0, True, 1.0)
    assert form.value == pytest.approx(whole.value)
    assert form.interval.low == pytest.approx(whole.interval.low)
    assert form.interval.high == pytest.approx(whole.interval.high)
    assert form.interval.low > 0


def test_answers_that_do_not_depend_on_images_have_no_sight():
    score = RNG.integers(0, 2, 50)
    sight = evidence(a=score, blank_a=score).sight("t", ["a"])
    assert (sight.value, sight.unchanged, sight.p) == (0.0, True, 1.0)
    unseen = np.quantile(unchanged_draws(50, 4000), [0.025, 0.975])
    assert (sight.interval.low, sight.interval.high) == pytest.approx(tuple(unseen))


def test_what_is_not_known_of_every_run_is_not_split():
    score = RNG.integers(0, 2, 30)
    found = evidence(a=score, b=1 - score, content_a=score)
    assert found.form_gap("t", ["a"]) is not None
    assert found.form_gap("t", ["b"]) is None
    assert found.form_gap("t", ["a", "b"]) is None
    assert found.split("t", ["a"], ["b"], CONTENT) is None
    assert found.sight("t", ["a"]) is None
    two = Evidence({**found.tasks, **evidence("u", a=score, b=score).tasks})
    assert two.form_gap("t", ["a"]) is not None
    assert two.form_gap(AVERAGE, ["a"]) is None


def test_seeds_are_paired_with_their_own_columns():
    """Seeds that are far apart with the same gap each: their distance is not in the gap."""
    rows = RNG.random(2000)
    scores = {f"s{n}": rows < skill for n, skill in enumerate((0.2, 0.5, 0.8))}
    gaps = {f"content_{run}": score | (RNG.random(2000) < 0.1) for run, score in scores.items()}
    found = evidence(**scores, **gaps)
    seeds = list(scores)
    gap = found.form_gap("t", seeds)
    assert (gap.seeds, gap.holds_seeds, gap.one_seed) == ((3,), True, False)
    alone = [found.form_gap("t", [run]).value for run in seeds]
    assert gap.value == pytest.approx(np.mean(alone))
    width = gap.interval.high - gap.interval.low
    apart = found.difference("t", seeds, [beside(CONTENT, run) for run in seeds])
    assert width < 0.5 * (apart.interval.high - apart.interval.low)


def test_no_part_is_larger_than_it_can_be():
    none, full = np.zeros(20), np.ones(20)
    found = evidence(a=none, content_a=full, b=full, content_b=none)
    assert found.form_gap("t", ["a"]).interval.high == 100
    content, form = found.split("t", ["a"], ["b"], CONTENT)
    assert (content.value, form.value) == (-100, 200)
    assert (content.interval.low, form.interval.high) == (-100, 200)


@given(st.data(), st.sampled_from(["mean", "accuracy", "circular", "f1", "mme", "strict"]))
@settings(max_examples=60, deadline=None)
def test_parts_add_up_for_every_aggregator_and_number_of_seeds(data, aggregator):
    count = data.draw(st.integers(1, 3))
    rows = 2 * data.draw(st.integers(3, 12))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    columns: dict[str, np.ndarray] = {}
    for number in range(2 * count):
        frame = answered(rng, rows)
        columns[str(number)] = unit_statistics(aggregator, frame).values
        columns[beside(CONTENT, str(number))] = content_statistics(aggregator, frame).values
        columns[beside(BLANK, str(number))] = unit_statistics(
            aggregator, answered(rng, rows)
        ).values
    units = unit_statistics(aggregator, frame).units
    found = Evidence({"t": TaskEvidence.of(aggregator, units, columns, 200)})
    first, second = ([str(n + start) for n in range(count)] for start in (0, count))
    whole = found.difference("t", first, second)
    for column in (CONTENT, BLANK):
        parts = found.split("t", first, second, column)
        assert sum(part.value for part in parts) == pytest.approx(whole.value, abs=1e-9)
        back = found.split("t", second, first, column)
        assert [part.value for part in back] == pytest.approx([-part.value for part in parts])
        for part in parts:
            if part.interval is not None:
                assert part.interval.low <= part.interval.high
    gaps = [found.form_gap("t", group).value for group in (first, second)]
    assert gaps[0] - gaps[1] == pytest.approx(found.split("t", first, second, CONTENT)[1].value)


def answered(rng: np.random.Generator, rows: int) -> pd.DataFrame:
    """Yes-or-no questions in pairs; what is said is read from some answers by upstream too."""
    frame = samples("t", [0.0] * rows)
    target = np.array(["yes", "no"] * (rows // 2), dtype=object)
    said = rng.choice(np.array(["yes", "no", ""], dtype=object), rows)
    read = rng.random(rows) < 0.7
    return frame.assign(
        unit_id=[f"u{row // 2}" for row in range(rows)],
        category="existence",
        target=target,
        parsed=np.where(read, said, ""),
        score=((said == target) & read).astype(float),
        content=said,
        score_by_content=(said == target).astype(float),
    )
