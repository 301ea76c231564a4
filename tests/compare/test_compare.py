"""Runs beside each other: alignment, refusals, roles, agreement, flips, seeds."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kd_bench.compare import Comparison, agreement, compare, list_flips
from kd_bench.compare.align import aggregator_of, align
from kd_bench.compare.methods import compare_methods
from kd_bench.errors import IncompleteRunError, NotComparableError, UsageError
from kd_bench.files import digest_text
from kd_bench.records import SAMPLE_COLUMNS
from kd_bench.stats import mcnemar
from kd_bench.store import Run
from tests.statistics.simulate import small_frames, write_run

Frames = dict[str, pd.DataFrame]
FAST = {"resamples": 1000, "categories": False}


def samples(task: str, scores: list[float], **columns: list[str]) -> pd.DataFrame:
    """One document a unit; a wrong answer is `b`."""
    rows = len(scores)
    made = {
        "document_id": [f"{task}-{row}" for row in range(rows)],
        "unit_id": [f"{task}-{row}" for row in range(rows)],
        "category": [""] * rows,
        "question": [f"Question {row}?" for row in range(rows)],
        "target": ["a"] * rows,
        "answer": ["A." if score else "B." for score in scores],
        "parsed": ["a" if score else "b" for score in scores],
        "score": [float(score) for score in scores],
        "status": ["ok"] * rows,
        "image_digest": [digest_text(task, str(row)) for row in range(rows)],
        "answer_confidence": [float("nan")] * rows,
    }
    return pd.DataFrame({**made, **columns}, columns=list(SAMPLE_COLUMNS))


def pair(results: Path, one: Frames, other: Frames) -> list[Run]:
    return [write_run(results, "one", one), write_run(results, "other", other)]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Teacher, SFT, Switch-KD and its hybrid on small benchmarks of the ten."""
    results = tmp_path_factory.mktemp("results")
    skills = {"teacher": 1.2, "sft": 0.1, "switch-kd": 0.5, "hybrid": 0.9}
    roles = {"teacher": "teacher", "sft": "sft", "switch-kd": "kd", "hybrid": "switch"}
    runs = []
    for number, (name, mu) in enumerate(skills.items()):
        frames = small_frames(seed=5, mu=mu, rho=0.5, models=4, shrink=6)[number]
        method = "switch-kd" if name == "hybrid" else name
        runs.append(write_run(results, name, frames, role=roles[name], method=method, seed=1))  # type: ignore[arg-type]
    return [runs[1], runs[2], runs[0], runs[3]]


@pytest.fixture(scope="module")
def comparison(suite: list[Run]) -> Comparison:
    return compare(suite, resamples=1000)


# --- what is computed --------------------------------------------------------------------------


@pytest.mark.slow
def test_differences_are_against_the_first_run(comparison: Comparison, suite: list[Run]) -> None:
    for task in comparison.tasks:
        assert len(task.scores) == 4
        for other, difference in enumerate(task.differences, start=1):
            gap = task.scores[other].value - task.scores[0].value
            assert difference.value == pytest.approx(gap)
            assert difference.interval.low <= difference.value <= difference.interval.high
            assert difference.p <= difference.p_holm <= 1
        assert suite[0].result(task.task).score == pytest.approx(task.scores[0].value)


def test_average_is_the_mean_of_the_benchmarks(comparison: Comparison) -> None:
    for run in range(4):
        mean = np.mean([task.scores[run].value for task in comparison.tasks])
        assert comparison.average[run].value == pytest.approx(mean)
    change = comparison.average_differences[0]
    assert change.interval.low > 0
    assert change.p < 0.01
    assert change.fixed == sum(task.differences[0].fixed for task in comparison.tasks)


def test_average_interval_adds_up_over_independent_benchmarks(comparison: Comparison) -> None:
    """Resampled within each benchmark: variances add (EN and CN share units, so loosely)."""
    errors = [task.differences[0].standard_error for task in comparison.tasks]
    independent = np.sqrt(np.sum(np.square(errors))) / len(errors)
    assert comparison.average_differences[0].standard_error == pytest.approx(independent, rel=0.2)


def test_swapping_the_runs_mirrors_everything(suite: list[Run]) -> None:
    there, back = compare(suite[:2], **FAST), compare(suite[1::-1], **FAST)
    for one, other in zip(there.tasks, back.tasks, strict=True):
        a, b = one.differences[0], other.differences[0]
        assert a.value == pytest.approx(-b.value)
        assert (a.fixed, a.broken) == (b.broken, b.fixed)
        assert a.interval.low == pytest.approx(-b.interval.high)
        assert a.p == pytest.approx(b.p, abs=0.03)


@pytest.mark.slow
def test_a_third_run_does_not_change_the_first_two(suite: list[Run]) -> None:
    two, three = compare(suite[:2], **FAST), compare(suite[:3], **FAST)
    for one, other in zip(two.tasks, three.tasks, strict=True):
        assert one.scores[:2] == other.scores[:2]
        assert one.differences[0].interval == other.differences[0].interval


def test_counts_and_p_by_hand(tmp_path: Path) -> None:
    one = {"mmmu": samples("mmmu", [0] * 12 + [1] * 3 + [1] * 85)}
    other = {"mmmu": samples("mmmu", [1] * 12 + [0] * 3 + [1] * 85)}
    (task,) = compare(pair(tmp_path, one, other), **FAST).tasks
    difference = task.differences[0]
    assert (difference.fixed, difference.broken) == (12, 3)
    assert difference.value == pytest.approx(9.0)
    assert difference.p == pytest.approx(mcnemar(12, 3))
    assert difference.test == "McNemar, exact"
    assert difference.detectable == pytest.approx(2.8016 * difference.standard_error, rel=1e-3)


def test_groups_are_counted_as_wholes(tmp_path: Path) -> None:
    units = [f"g{row // 4}" for row in range(40)]
    scores = [1.0] * 40
    one = samples("mmbench_en", scores, unit_id=units)
    scores[0] = scores[1] = scores[4] = 0.0
    other = samples("mmbench_en", scores, unit_id=units)
    runs = pair(tmp_path, {"mmbench_en": one}, {"mmbench_en": other})
    (task,) = compare(runs, **FAST).tasks
    assert (task.differences[0].fixed, task.differences[0].broken) == (0, 2)
    assert task.differences[0].value == pytest.approx(-20)


@pytest.mark.slow
def test_row_order_on_disk_is_nothing(tmp_path: Path) -> None:
    one, other = small_frames(seed=1, shrink=12)
    shuffled = {task: frame.sample(frac=1, random_state=3) for task, frame in other.items()}
    straight = compare(pair(tmp_path / "a", one, other), **FAST)
    mixed = compare(pair(tmp_path / "b", one, shuffled), **FAST)
    for a, b in zip(straight.tasks, mixed.tasks, strict=True):
        assert a.differences == b.differences


def test_categories_have_their_own_scores_and_holm(comparison: Comparison) -> None:
    by_name = {task.task: task for task in comparison.tasks}
    pope = by_name["pope"].categories
    assert [each.category for each in pope] == ["adversarial", "popular", "random"]
    assert sum(each.documents for each in pope) == by_name["pope"].documents
    assert all(each.differences[0].p_holm >= each.differences[0].p for each in pope)
    mme = {each.category for each in by_name["mme"].categories}
    assert {"existence", "code_reasoning"} <= mme
    assert by_name["mmmu"].categories == []


# --- roles -----------------------------------------------------------------------------------


def test_relations_by_role(comparison: Comparison) -> None:
    sft, student, teacher, hybrid = (measure.value for measure in comparison.average)
    ids = [run.run_id for run in comparison.runs]
    found = {
        (each.kind, each.run_id): each.measure
        for each in comparison.relations
        if each.task == "average"
    }
    assert found["retention", ids[1]].value == pytest.approx(student / teacher)
    assert found["retention", ids[0]].value == pytest.approx(sft / teacher)
    gap = found["gap closed", ids[1]]
    assert gap.value == pytest.approx((student - sft) / (teacher - sft))
    assert gap.interval is not None
    assert gap.interval.low < gap.value < gap.interval.high
    assert found["vision gap", ids[1]].value == pytest.approx(teacher - hybrid)
    assert found["language gap", ids[1]].value == pytest.approx(hybrid - student)
    assert ("gap closed", ids[0]) not in found
    assert ("vision gap", ids[0]) not in found
    assert len(found) == 5


def test_no_relations_without_a_teacher(suite: list[Run]) -> None:
    found = compare(suite[:2], **FAST)
    assert found.relations == []
    assert all(task.agreement == [] for task in found.tasks)


@pytest.mark.slow
def test_gap_closed_has_no_interval_when_the_teacher_is_no_better(tmp_path: Path) -> None:
    frames = small_frames(seed=2, mu=0.3, models=3, shrink=12)
    runs = [
        write_run(tmp_path, name, each, role=role)  # type: ignore[arg-type]
        for name, role, each in zip("abc", ("sft", "kd", "teacher"), frames, strict=True)
    ]
    found = compare(runs, **FAST)
    gap = next(r for r in found.relations if r.kind == "gap closed" and r.task == "average")
    assert gap.measure.interval is None


# --- agreement and flips -----------------------------------------------------------------------


def agreed(tmp_path: Path, teacher: pd.DataFrame, student: pd.DataFrame) -> object:
    runs = [
        write_run(tmp_path, "teacher", {"mmmu": teacher}, role="teacher"),
        write_run(tmp_path, "student", {"mmmu": student}),
    ]
    (task,) = compare(runs, **FAST).tasks
    assert task.agreement[0] is None
    return task.agreement[1]


def test_agreement_by_hand(tmp_path: Path) -> None:
    targets = list("aaaabbbb")
    teacher = samples("mmmu", [1, 1, 0, 0, 1, 0, 0, 0], target=targets, parsed=list("aabcbccd"))
    student = samples("mmmu", [1, 0, 0, 1, 1, 0, 0, 0], target=targets, parsed=list("acbabcda"))
    found = agreed(tmp_path, teacher, student)
    # both wrong: documents 2 (b b), 5 (c c), 6 (c d), 7 (d a)
    assert found.same_answer == pytest.approx(4 / 8)  # type: ignore[attr-defined]
    assert found.both_wrong == 4  # type: ignore[attr-defined]
    assert found.same_wrong == pytest.approx(2 / 4)  # type: ignore[attr-defined]
    assert found.right_where_teacher_wrong == pytest.approx(1 / 5)  # type: ignore[attr-defined]
    # Pairs of different documents (i, j) where the student's b_j would be wrong for i:
    # i = 2 (target a): c d of 5 and 6, not 7's a; i = 5, 6, 7 (target b): all others but 2's b.
    pairs = {2: "cd", 5: "da", 6: "ca", 7: "cd"}
    says = {2: "b", 5: "c", 6: "c", 7: "d"}
    chance = sum(b == says[i] for i, others in pairs.items() for b in others) / 8
    expected = (0.5 - chance) / (1 - chance)
    assert found.same_wrong_beyond_chance == pytest.approx(expected)  # type: ignore[attr-defined]


def test_yes_and_no_leave_nothing_beyond_chance(tmp_path: Path) -> None:
    targets = ["yes", "no"] * 20
    wrong = ["no", "yes"] * 20
    one = samples("mmmu", [0] * 40, target=targets, parsed=wrong)
    found = agreed(tmp_path, one, one)
    assert found.same_wrong == 1.0  # type: ignore[attr-defined]
    assert found.same_wrong_beyond_chance is None  # type: ignore[attr-defined]


def test_independent_mistakes_agree_by_chance_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    targets = rng.choice(list("abcd"), 3000)
    habit = {"a": 0.5, "b": 0.25, "c": 0.15, "d": 0.1}  # both like to say a

    def wrong(target: str) -> str:
        others = [letter for letter in "abcd" if letter != target]
        weights = np.array([habit[letter] for letter in others])
        return str(rng.choice(others, p=weights / weights.sum()))

    draws = [[wrong(target) for target in targets] for _ in range(2)]
    frames = [
        samples("mmmu", [0] * 3000, target=targets.tolist(), parsed=parsed) for parsed in draws
    ]
    found = agreed(tmp_path, *frames)
    assert found.same_wrong > 0.35  # type: ignore[attr-defined]
    assert found.same_wrong_beyond_chance == pytest.approx(0, abs=0.05)  # type: ignore[attr-defined]


def test_unreadable_answers_agree_with_nothing(tmp_path: Path) -> None:
    one = samples("mmmu", [0] * 10, parsed=[""] * 10)
    found = agreed(tmp_path, one, one)
    assert found.same_answer == 0.0  # type: ignore[attr-defined]
    assert found.same_wrong == 0.0  # type: ignore[attr-defined]


def test_perfect_models_have_no_mistakes_to_compare(tmp_path: Path) -> None:
    one = samples("mmmu", [1] * 10)
    found = agreed(tmp_path, one, one)
    assert found.same_wrong is None  # type: ignore[attr-defined]
    assert found.right_where_teacher_wrong is None  # type: ignore[attr-defined]


def test_flips_are_the_changed_documents_broken_first(tmp_path: Path) -> None:
    one = {"mmmu": samples("mmmu", [0, 1, 1, 0.3])}
    other = {"mmmu": samples("mmmu", [1, 0, 1, 0.6])}
    found = list_flips(pair(tmp_path, one, other), "mmmu")
    assert [(flip.document_id, flip.change) for flip in found] == [
        ("mmmu-1", "broken"), ("mmmu-3", "fixed"), ("mmmu-0", "fixed"),
    ]  # fmt: skip
    assert found[0].question == "Question 1?"
    assert (found[0].reference_answer, found[0].other_answer) == ("A.", "B.")
    assert found[0].image_digest == digest_text("mmmu", "1")


def test_flips_of_an_unknown_benchmark(suite: list[Run]) -> None:
    with pytest.raises(UsageError, match="Did you mean 'mmmu'"):
        list_flips(suite[:2], "mmmmu")


# --- refusals --------------------------------------------------------------------------------


def test_other_protocols_are_refused_with_what_differs(tmp_path: Path) -> None:
    frames = {"mmmu": samples("mmmu", [1, 0, 1])}
    one = write_run(tmp_path, "one", frames)
    other = write_run(tmp_path, "two", frames, fingerprint="other", settings={"max_new_tokens": 8})
    with pytest.raises(NotComparableError, match=r"mmmu.*max_new_tokens none and 8"):
        compare([one, other], **FAST)
    allowed = compare([one, other], allow_different=True, **FAST)
    assert not allowed.tasks[0].comparable
    assert "not comparable" in allowed.notes[0]


def test_disjoint_documents_are_never_allowed(tmp_path: Path) -> None:
    one = {"mmmu": samples("mmmu", [1, 0])}
    other = {"mmmu": samples("mmmu", [1, 0], document_id=["x", "y"])}
    with pytest.raises(NotComparableError, match="share no document"):
        compare(pair(tmp_path, one, other), allow_different=True, **FAST)


def test_partly_overlapping_documents(tmp_path: Path) -> None:
    one = {"mmmu": samples("mmmu", [1, 0, 1, 1])}
    ids = ["mmmu-1", "mmmu-2", "x", "y"]
    other = {"mmmu": samples("mmmu", [1, 0, 1, 1], document_id=ids, unit_id=ids)}
    runs = pair(tmp_path, one, other)
    with pytest.raises(NotComparableError, match="share only 2 of 4 documents"):
        compare(runs, **FAST)
    (task,) = compare(runs, allow_different=True, **FAST).tasks
    assert task.documents == 2
    assert (task.differences[0].fixed, task.differences[0].broken) == (1, 1)
    assert not task.comparable


def test_other_grouping_of_the_same_documents(tmp_path: Path) -> None:
    one = {"mmmu": samples("mmmu", [1, 0])}
    other = {"mmmu": samples("mmmu", [1, 0], unit_id=["z", "z"])}
    with pytest.raises(NotComparableError, match="group the same documents differently"):
        compare(pair(tmp_path, one, other), **FAST)


def test_missing_benchmarks_are_noted_and_nothing_in_common_is_refused(tmp_path: Path) -> None:
    mmmu, gqa = {"mmmu": samples("mmmu", [1, 0])}, {"gqa": samples("gqa", [1, 0])}
    found = compare(pair(tmp_path / "a", {**mmmu, **gqa}, mmmu), **FAST)
    assert [task.task for task in found.tasks] == ["mmmu"]
    assert found.notes == ["Only some runs have gqa: left out."]
    with pytest.raises(NotComparableError, match="no finished benchmark in common"):
        compare(pair(tmp_path / "b", gqa, mmmu), **FAST)


def test_an_empty_run(tmp_path: Path) -> None:
    mmmu = {"mmmu": samples("mmmu", [1, 0])}
    one = write_run(tmp_path, "one", mmmu)
    empty = write_run(tmp_path, "empty", {}, planned=["mmmu"], status="running")
    with pytest.raises(IncompleteRunError, match=r"empty.*no finished benchmark"):
        compare([one, empty], **FAST)


def test_unfinished_runs_are_noted(tmp_path: Path) -> None:
    mmmu = {"mmmu": samples("mmmu", [1, 0])}
    runs = [write_run(tmp_path, "a", mmmu), write_run(tmp_path, "b", mmmu, status="partial")]
    assert compare(runs, **FAST).notes == ["b (20260101-b-00000000-00000000) is partial."]


def test_one_run_or_the_same_twice(tmp_path: Path) -> None:
    one = write_run(tmp_path, "a", {"mmmu": samples("mmmu", [1])})
    with pytest.raises(UsageError, match="needs two runs"):
        compare([one], **FAST)
    with pytest.raises(UsageError, match="named twice"):
        compare([one, one], **FAST)


@pytest.mark.parametrize(
    "damage", [{"score": [1.0, 7.0]}, {"score": [1.0, np.nan]}, {"document_id": ["x", "x"]}]
)
def test_damaged_samples_name_task_and_run(tmp_path: Path, damage: dict[str, list[object]]) -> None:
    runs = [write_run(tmp_path, name, {"mmmu": samples("mmmu", [1, 0])}) for name in "ab"]
    runs[1].commit(runs[1].result("mmmu"), samples("mmmu", [1, 0]).assign(**damage))
    with pytest.raises(IncompleteRunError, match=r"mmmu of b .* is damaged"):
        compare(runs, **FAST)


def test_too_few_documents_to_score(tmp_path: Path) -> None:
    half = samples("mme", [1.0], category=["existence"])
    frames = {"mme": half, "mmmu": samples("mmmu", [1, 0])}
    runs = [write_run(tmp_path / "a", name, frames, score=0.0) for name in "ab"]
    found = compare(runs, **FAST)
    assert [task.task for task in found.tasks] == ["mmmu"]
    assert "too few documents" in found.notes[0]
    only = [write_run(tmp_path / "b", name, {"mme": half}, score=0.0) for name in "ab"]
    with pytest.raises(NotComparableError, match="enough documents"):
        compare(only, **FAST)


# --- the rest --------------------------------------------------------------------------------


def test_json_has_no_nan_and_round_trips(comparison: Comparison) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    value = json.loads(comparison.to_json(), parse_constant=refuse)
    assert value["format"] == 1
    assert len(value["tasks"]) == 10
    assert value["tasks"][0]["differences"][0]["interval"].keys() == {"low", "high", "level"}


def test_aggregators_come_from_the_registry(suite: list[Run]) -> None:
    names = {task: aggregator_of(result) for task, result in suite[0].results().items()}
    assert names["mme"] == "mme"
    assert names["mmbench_cn"] == "circular"
    assert names["pope"] == "f1"
    assert names["gqa"] == "mean"


def test_a_benchmark_that_nobody_knows_is_a_mean(tmp_path: Path) -> None:
    one = {"own_task": samples("own_task", [1, 0, 1, 1])}
    (task,) = compare(pair(tmp_path, one, one), **FAST).tasks
    assert (task.aggregator, task.scores[0].value) == ("mean", 75.0)


def test_agreement_needs_only_the_statistics_columns(suite: list[Run]) -> None:
    aligned = align(suite, "mmmu")
    assert "question" not in aligned.samples[0]
    assert 0 <= agreement(aligned, 2, 1).same_answer <= 1


@pytest.mark.slow
def test_methods_over_seeds(tmp_path: Path) -> None:
    weak = small_frames(seed=7, mu=0.0, rho=0.4, models=3, shrink=12)
    strong = small_frames(seed=7, mu=0.5, rho=0.4, models=3, shrink=12)
    a = [write_run(tmp_path, f"a{n}", each, seed=n) for n, each in enumerate(weak)]
    b = [write_run(tmp_path, f"b{n}", each, seed=n) for n, each in enumerate(strong)]
    found = compare_methods(a, b, resamples=1000)
    assert set(found) == {*weak[0], "average"}
    average = found.pop("average")
    assert average.value == pytest.approx(np.mean([each.value for each in found.values()]))
    assert average.interval.low > 0
    assert average.seeds == (3, 3)
    assert average.holds_seeds
    one_by_one = compare([a[0], b[0]], **FAST).average_differences[0]
    width = one_by_one.interval.high - one_by_one.interval.low
    assert average.interval.high - average.interval.low < 1.5 * width
