"""Form gap and sight: further columns of a run on the same units, and a difference in two parts."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_bench.aggregators import aggregate, by_content, unit_statistics
from kd_bench.compare import Comparison, compare
from kd_bench.compare.align import aggregator_of, content_statistics
from kd_bench.compare.estimates import (
    BLANK,
    CONTENT,
    PARTS,
    Estimate,
    Evidence,
    TaskEvidence,
    beside,
)
from kd_bench.compare.methods import compare_all_methods
from kd_bench.errors import IncompleteRunError, UsageError
from kd_bench.files import digest_text
from kd_bench.gate import check
from kd_bench.gate_plan import plan
from kd_bench.policy import Margins, Policy, load_policy
from kd_bench.records import AMBIGUOUS, AVERAGE
from kd_bench.report.verdicts import (
    comparison_tables,
    job_summary,
    junit_xml,
    method_tables,
    verdict_table,
)
from kd_bench.stats import unchanged_draws
from kd_bench.store import Run, catalogue
from tests.cli.conftest import Call, call  # noqa: F401  # a fixture
from tests.compare.test_compare import FAST, samples
from tests.statistics.simulate import small_frames, write_run

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


# --- runs --------------------------------------------------------------------------------------

KINDS = ("form gap", "sight", *PARTS[CONTENT], *PARTS[BLANK])


def told(frame: pd.DataFrame, lost: float, seed: int) -> pd.DataFrame:
    """The frame as content, of which upstream's scorer did not read a share."""
    hidden = np.random.default_rng(seed).random(len(frame)) < lost
    return frame.assign(
        content=frame["parsed"],
        score_by_content=frame["score"],
        parsed=frame["parsed"].where(~hidden, ""),
        score=frame["score"].where(~hidden, 0.0),
    )


def write_blank(run: Run, frames: dict[str, pd.DataFrame], **changes: object) -> Run:
    """The same model with blank images; `changes` of its model or protocol."""
    name = f"{run.manifest.model.name}-{changes.get('images', 'blank')}"
    made = write_run(run.path.parents[1], name, frames, fingerprint=digest_text("blank"))
    its = run.manifest
    model, protocol = replace(its.model, name=name), replace(its.protocol, images="blank")
    for key, value in changes.items():
        if key in vars(model):
            model = replace(model, **{key: value})
        else:
            protocol = replace(protocol, **{key: value})
    made.write_manifest(replace(made.manifest, model=model, protocol=protocol))
    return made


@pytest.fixture(scope="module")
def frames() -> list[dict[str, pd.DataFrame]]:
    drawn = small_frames(seed=2, models=5, shrink=20)
    lost = (0.3, 0.1, 0.0, 0.0, 0.0)
    return [
        {task: told(frame, share, row) for task, frame in model.items()}
        for row, (model, share) in enumerate(zip(drawn, lost, strict=True))
    ]


@pytest.fixture(scope="module")
def pair(frames, tmp_path_factory) -> list[Run]:
    results = tmp_path_factory.mktemp("results")
    runs = [write_run(results, name, frames[row]) for row, name in enumerate(("sft", "kd"))]
    for row, run in enumerate(runs):
        write_blank(run, frames[row + 3])
    return runs


@pytest.fixture(scope="module")
def comparison(pair) -> Comparison:
    return compare(pair, resamples=1000, categories=False)


def test_every_benchmark_and_the_average_are_split(comparison, pair, frames):
    one, other = (run.path.name for run in pair)
    keys = {each.task for each in comparison.tasks} | {AVERAGE}
    for kind in KINDS:
        assert set(comparison.measures(kind, other)) == keys
        assert set(comparison.measures(kind, one)) == (
            keys if kind in ("form gap", "sight") else set()
        )
    whole = {each.task: each.differences[0].value for each in comparison.tasks}
    whole[AVERAGE] = comparison.average_differences[0].value
    for kinds in PARTS.values():
        parts = [comparison.measures(kind, other) for kind in kinds]
        for key in keys:
            assert sum(p[key].value for p in parts) == pytest.approx(whole[key], abs=1e-9)
    for task in comparison.tasks:
        frame, blank = frames[0][task.task], frames[3][task.task]
        score, content = (aggregate(task.aggregator, f) for f in (frame, by_content(frame)))
        form_gap = comparison.measures("form gap", one)[task.task]
        assert form_gap.value == pytest.approx(content - score)
        sight = comparison.measures("sight", one)[task.task]
        assert sight.value == pytest.approx(score - aggregate(task.aggregator, blank))
    lost, kept = (comparison.measures("form gap", run)[AVERAGE] for run in (one, other))
    assert lost.interval.low > kept.value > 0
    assert not comparison.notes


def test_further_columns_change_nothing_of_what_was_there(comparison, pair, tmp_path, frames):
    bare = [
        {task: f.drop(columns=["content", "score_by_content"]) for task, f in frames[row].items()}
        for row in (0, 1)
    ]
    runs = [write_run(tmp_path, name, bare[row]) for row, name in enumerate(("sft", "kd"))]
    old = compare(runs, resamples=1000, categories=False)
    assert old.relations == []
    assert old.notes == []
    assert [(t.scores, t.differences) for t in old.tasks] == [
        (t.scores, t.differences) for t in comparison.tasks
    ]
    assert old.average_differences == comparison.average_differences


def test_tables_and_frame_show_the_parts_beside_the_difference(comparison):
    main, parts, gaps = comparison_tables(comparison)
    assert [column.title for column in main.columns][3] == "Difference"
    titles = [column.title for column in parts.columns]
    assert titles == ["Benchmark", "Difference", "Content", "Form", "Guessing", "Sight"]
    for row in parts.rows:
        whole, content, form, guessing, sight = (cell.value for cell in row.cells[1:])
        assert content + form == pytest.approx(whole)
        assert guessing + sight == pytest.approx(whole)
        assert all(cell.interval for cell in row.cells[1:])
    titles = [f"{kind}, {name}" for name in ("sft", "kd") for kind in ("Form gap", "Sight")]
    assert [column.title for column in gaps.columns] == ["Benchmark", *titles]
    frame = comparison.to_frame().set_index(["task", "model"])
    row = frame.loc[("pope", "kd")]
    assert row["content_difference"] + row["form_difference"] == pytest.approx(row["difference"])
    assert row["sight_low"] < row["sight"] < row["sight_high"]
    assert np.isnan(frame.loc[("pope", "sft"), "sight_difference"])
    assert '"form gap"' in comparison.to_json()


def test_where_no_form_costs_anything_a_note_is_enough(frames, tmp_path):
    runs = [write_run(tmp_path, name, frames[row]) for row, name in ((2, "a"), (3, "b"))]
    (table,) = comparison_tables(compare(runs, **FAST))
    assert table.notes[-1].startswith("Form gap 0.0 on every benchmark")
    for row, run in zip((3, 4), runs, strict=True):
        write_blank(run, frames[row])
    main, parts, gaps = comparison_tables(compare(runs, **FAST))
    assert main.notes == table.notes
    titles = [column.title for column in parts.columns]
    assert titles == ["Benchmark", "Difference", "Guessing", "Sight"]
    assert gaps.title == "Sight"


def test_answers_that_can_be_read_in_two_ways_are_counted(frames, tmp_path):
    twice = frames[1]["pope"].copy()
    twice.loc[:2, ["content", "score_by_content"]] = [AMBIGUOUS, 0.0]
    runs = [
        write_run(tmp_path, name, its)
        for name, its in (("a", frames[0]), ("b", {**frames[1], "pope": twice}))
    ]
    told = (
        f"b ({runs[1].path.name}): answers that can be read in two ways, by content wrong: pope 3."
    )
    assert compare(runs, **FAST).notes == [told]
    assert told in check(runs[1], runs[0], policy(score="content")).notes
    assert told not in check(runs[1], runs[0], policy()).notes
    said = by_content(twice)["parsed"]
    right = twice["target"].head(3)
    assert set(said.head(3)) <= {"yes", "no"}
    assert (said.head(3) != right).all()  # the stricter of the two readings


def test_a_run_without_scores_by_content_says_so_and_has_no_split(frames, tmp_path):
    bare = {t: f.drop(columns=["content", "score_by_content"]) for t, f in frames[0].items()}
    runs = [write_run(tmp_path, "old", bare), write_run(tmp_path, "new", frames[1])]
    found = compare(runs, **FAST)
    assert {each.kind for each in found.relations} == {"form gap"}
    assert {each.run_id for each in found.relations} == {runs[1].path.name}
    (note,) = found.notes
    assert note.startswith("old (")
    assert note.endswith("no form gap.")
    assert len(comparison_tables(found)) == 2


@pytest.mark.parametrize(
    "changes,why",
    [
        ({"weights_digest": "f" * 64}, "of another checkpoint"),
        ({"prompt_template": "{{ messages }}"}, "of another prompt template"),
        ({"limit": 8}, "of another limit"),
        ({"dtype": "bfloat16"}, "of another dtype"),
    ],
)
def test_a_blank_run_of_something_else_is_not_used_and_named(changes, why, frames, tmp_path):
    runs = [write_run(tmp_path, name, frames[row]) for row, name in enumerate(("sft", "kd"))]
    blank = write_blank(runs[1], frames[3], **changes)
    found = compare(runs, **FAST)
    assert not [each for each in found.relations if each.kind == "sight"]
    (note,) = [note for note in found.notes if "sight" in note]
    assert note.startswith(f"{blank.path.name} does not tell the sight of kd")
    assert note.endswith(f"it is {why}.")


@pytest.mark.parametrize(
    "changes,why",
    [
        ({"data": {"gqa": "other"}}, "of other data or prompts"),
        ({"setup": "other"}, "of another configuration, tokenizer or processor"),
        ({"status": "unhealthy"}, "unhealthy"),
    ],
)
def test_other_data_prompts_or_configuration_are_other_runs(changes, why, frames, tmp_path):
    run = write_run(tmp_path, "kd", frames[0])
    run.write_manifest(replace(run.manifest, data={"gqa": "one", "pope": "two"}, setup="own"))
    blank = write_blank(run, frames[3])
    for data in ({"gqa": "one"}, {"gqa": "one", "mme": "three"}):  # what both know is the same
        blank.write_manifest(replace(blank.manifest, data=data, setup="own"))
        assert catalogue(tmp_path).blank_of(run, run.manifest) == (blank, "")
    blank.write_manifest(replace(blank.manifest, **changes))
    found, reason = catalogue(tmp_path).blank_of(run, run.manifest)
    assert found is None
    assert reason.endswith(f"it is {why}.")


def test_a_blank_run_is_found_by_identity_whatever_its_name(frames, tmp_path):
    run = write_run(tmp_path, "kd", frames[0])
    blank = write_blank(run, frames[3], name="guesses")
    assert catalogue(tmp_path).blank_of(run, run.manifest) == (blank, "")
    write_blank(run, frames[4], images="shuffled")
    assert catalogue(tmp_path).blank_of(run, run.manifest) == (blank, "")
    assert catalogue(tmp_path).blank_of(blank, blank.manifest) == (None, "")


def test_blank_answers_to_other_documents_are_left_out_with_a_line(frames, tmp_path):
    run, other = (write_run(tmp_path, name, frames[row]) for row, name in enumerate(("a", "b")))
    swapped = frames[3]["pope"].assign(target=lambda f: f["target"].iloc[::-1].to_numpy())
    write_blank(run, {**frames[3], "pope": swapped})
    found = compare([run, other], **FAST)
    known = found.measures("sight", run.path.name)
    assert set(known) == {each.task for each in found.tasks} - {"pope"}
    assert any("pope of a-blank" in note and "other documents" in note for note in found.notes)


def test_a_damaged_blank_run_costs_its_own_column_only(frames, tmp_path):
    runs = [write_run(tmp_path, name, frames[row]) for row, name in enumerate(("a", "b"))]
    blank = write_blank(runs[0], frames[3])
    path = blank.path / "tasks" / "gqa.samples.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    found = compare(runs, **FAST)
    assert "gqa" not in found.measures("sight", runs[0].path.name)
    assert any(path.name in note for note in found.notes)


def test_a_blank_run_without_a_readable_manifest_is_named(frames, tmp_path):
    runs = [write_run(tmp_path, name, frames[row]) for row, name in enumerate(("a", "b"))]
    blank = write_blank(runs[0], frames[3])
    (blank.path / "manifest.json").write_text("{")
    (note,) = compare(runs, **FAST).notes
    assert note.startswith(f"{blank.path.name} does not tell the sight of a")
    assert note.endswith("its manifest is damaged.")


def test_a_blank_run_under_its_models_name_is_no_newer_run_that_was_passed_over(frames, tmp_path):
    runs = [write_run(tmp_path, name, frames[row]) for row, name in enumerate(("a", "b"))]
    write_blank(runs[0], frames[3], name="a")
    found = compare(runs, **FAST)
    assert found.notes == []
    assert found.measures("sight", runs[0].path.name)


def test_the_commands_show_the_parts(pair, call: Call):  # noqa: F811
    store = str(pair[0].path.parents[1])
    shown = call("compare", "sft", "kd", "--results", store)
    assert shown.code == 0
    assert "What kd against sft is made of" in shown.out
    assert "Form gap and sight" in shown.out
    told = json.loads(call("compare", "sft", "kd", "--results", store, "--json").out)
    found = {
        (each["kind"], each["task"]): each["measure"]["value"]
        for each in told["relations"]
        if each["run_id"] == pair[1].path.name
    }
    whole = {each["task"]: each["differences"][0]["value"] for each in told["tasks"]}
    for task, difference in whole.items():
        for kinds in PARTS.values():
            parts = [found[kind, task] for kind in kinds]
            assert sum(parts) == pytest.approx(difference, abs=1e-9)


def test_a_blank_run_beside_its_own_run_is_all_sight(pair):
    blank, _ = catalogue(pair[0].path.parents[1]).blank_of(pair[0], pair[0].manifest)
    found = compare([pair[0], blank], **FAST, allow_different=True)
    sight = found.measures("sight", pair[0].path.name)
    for task in found.tasks:
        assert sight[task.task].value == pytest.approx(-task.differences[0].value)
    assert found.measures("sight", blank.path.name) == {}


def test_methods_are_split_over_their_seeds(tmp_path):
    drawn = small_frames(seed=4, models=5, shrink=25)
    small = [
        {t: told(f, (0.2, 0.2, 0.0, 0.0, 0.0)[row], row) for t, f in model.items()}
        for row, model in enumerate(drawn)
    ]
    for row, (method, seed) in enumerate((("sft", 0), ("sft", 1), ("kd", 0), ("kd", 1))):
        run = write_run(tmp_path, f"{method}{seed}", small[row], method=method, seed=seed)
        if method == "kd" or seed == 0:
            write_blank(run, small[4])
    found = compare_all_methods(tmp_path, ["sft", "kd"], resamples=1000)
    (pair,) = found.pairs
    assert set(pair.parts) == set(PARTS[CONTENT])  # one seed of sft has no blank run
    assert set(found.gaps["sft"]) == {"form gap"}
    assert set(found.gaps["kd"]) == {"form gap", "sight"}
    content, form = (pair.parts[kind] for kind in PARTS[CONTENT])
    for key, whole in pair.estimates.items():
        assert content[key].value + form[key].value == pytest.approx(whole.value, abs=1e-9)
        assert content[key].seeds == form[key].seeds == (2, 2)
        assert form[key].interval.low <= form[key].value <= form[key].interval.high
    assert form[AVERAGE].value == pytest.approx(found.gaps["sft"]["form gap"][AVERAGE].value)
    assert "Infinity" not in found.to_json()
    table = found.to_frame().set_index("task")
    assert table.loc["pope", "form_difference"] == form["pope"].value
    assert table.loc["pope", "form_difference_low"] == form["pope"].interval.low
    titles = [each.title for each in method_tables(found)]
    assert titles == [
        "Methods on the average", "kd against sft", "What kd against sft is made of",
        "Form gap and sight",
    ]  # fmt: skip


# --- the gate ----------------------------------------------------------------------------------

WIDE = {"ten": Margins(average=50, default=90)}


def policy(**rules: object) -> Policy:
    return Policy(margins=WIDE, resamples=1000, **rules)


def test_a_policy_by_content_judges_what_was_said(pair, frames):
    by_upstream, judged = (check(pair[1], pair[0], policy(**r)) for r in ({}, {"score": "content"}))
    for verdict, other in zip(judged.verdicts, by_upstream.verdicts, strict=True):
        assert (verdict.score, other.score) == ("content", "upstream")
        assert f"{verdict.name} (by content)" in verdict.sentence
        assert "by content" not in other.sentence
    for verdict in judged.verdicts[:-1]:
        name = aggregator_of(pair[0].result(verdict.name))
        said = [aggregate(name, by_content(frames[row][verdict.name])) for row in (0, 1)]
        assert (verdict.baseline, verdict.candidate) == pytest.approx(tuple(said))
        alone = Evidence(
            {
                "t": TaskEvidence.of(
                    name,
                    unit_statistics(name, frames[0][verdict.name]).units,
                    {
                        str(row): content_statistics(name, frames[row][verdict.name]).values
                        for row in (0, 1)
                    },
                    1000,
                )
            }
        ).difference("t", ["0"], ["1"])
        assert verdict.difference.interval == alone.interval
    (note,) = [note for note in judged.notes if note.startswith("Upstream's scores")]
    assert judged.statement.endswith("Judged by content: every benchmark.")
    assert "content" not in by_upstream.statement
    assert "pope 60.9 -> 64.3" in note
    assert "pope (by content)" in str(verdict_table(judged).rows)
    assert "pope (by content)" in job_summary(judged)
    assert "pope (by content)" in junit_xml(judged)


def test_a_policy_may_judge_some_benchmarks_by_content(pair):
    found = check(pair[1], pair[0], policy(score={"pope": "content"}))
    scores = {verdict.name: verdict.score for verdict in found.verdicts}
    assert scores.pop("pope") == "content"
    assert scores.pop(AVERAGE) == "mixed"
    assert set(scores.values()) == {"upstream"}
    assert found.statement.endswith("Judged by content: pope.")
    whole = policy(score={"default": "content", "pope": "upstream"})
    assert (whole.score_of("pope"), whole.score_of("gqa")) == ("upstream", "content")


def test_form_that_was_lost_is_a_regression_by_upstream_and_none_by_content(frames, tmp_path):
    said = {task: frame for task, frame in frames[2].items() if task != "pope"}
    lost = {task: told(frame, 0.5, 3) for task, frame in said.items()}
    runs = [write_run(tmp_path, name, its) for name, its in (("was", said), ("lost", lost))]
    rules = {"margins": {"ten": Margins(average=1, default=2)}, "resamples": 1000}
    assert check(runs[1], runs[0], Policy(**rules)).exit_code == 1
    by_content = check(runs[1], runs[0], Policy(**rules, score="content"))
    assert by_content.exit_code == 0
    assert all(each.same for each in by_content.verdicts)


def test_a_run_without_scores_by_content_is_refused_with_the_way_out(frames, tmp_path):
    bare = {t: f.drop(columns=["content", "score_by_content"]) for t, f in frames[0].items()}
    runs = [write_run(tmp_path, "old", bare), write_run(tmp_path, "new", frames[1])]
    with pytest.raises(IncompleteRunError, match=r"mme of old .* has no scores by content") as told:
        check(runs[1], runs[0], policy(score="content"))
    assert "score: upstream" in told.value.hint
    assert check(runs[1], runs[0], policy()).verdicts


def test_policies_without_a_score_keep_their_digest():
    plain = policy()
    assert plain.digest == policy(score="upstream").digest != policy(score="content").digest
    told = plain.model_dump()
    del told["score"]
    assert plain.digest == digest_text(json.dumps(told, sort_keys=True))


@pytest.mark.parametrize(
    "text,why",
    [
        ("score: contents", "there is no score 'contents'. Did you mean 'content'?"),
        ("score: {pope: conten}", "there is no score 'conten'. Did you mean 'content'?"),
        ("score: {popee: content}", "there is no benchmark 'popee'. Did you mean 'pope'?"),
        ("score: [content]", "write `score: content`, or a score by benchmark"),
        ("scores: content", "unknown key 'scores'. Did you mean 'score'?"),
    ],
)
def test_a_mistyped_score_is_one_clear_line(text, why, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(f"margins:\n  ten: {{average: 1, default: 2}}\n{text}\n")
    with pytest.raises(UsageError) as told:
        load_policy(path)
    assert why in told.value.problem
    assert "\n" not in str(told.value)


def test_margins_are_planned_for_the_score_that_is_judged(pair):
    by_content = plan(pair[0], [], policy(score={"default": "content"}))
    assert "score: {default: content}" in by_content.policy
    assert "score" not in plan(pair[0], [], policy()).policy
