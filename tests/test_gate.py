"""The gate: verdicts, the one exit code, policies, refusals, and what CI systems are given."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_bench.compare.align import Difference
from kd_bench.errors import ExitCode, IncompleteRunError, NotComparableError, UsageError
from kd_bench.gate import GateReport, Verdict, check
from kd_bench.policy import Policy, RuleOutcome, load_policy
from kd_bench.records import Cost, Interval
from kd_bench.report.tables import to_markdown
from kd_bench.report.verdicts import (
    annotations,
    append_summary,
    job_summary,
    junit_xml,
    verdict_table,
    write_junit,
)
from kd_bench.stats import NonInferiority
from kd_bench.store import Run, find_run
from tests.compare.test_compare import samples
from tests.statistics.simulate import small_frames, write_run

POLICY = load_policy().model_copy(update={"resamples": 2000})


def policy(**changes: object) -> Policy:
    return Policy.model_validate({**POLICY.model_dump(), **changes})


def with_scores(results: Path, name: str, scores: list[float], **changes: object) -> Run:
    return write_run(results, name, {"mmmu": samples("mmmu", scores)}, **changes)  # type: ignore[arg-type]


def verdict_of(results: Path, old: list[float], new: list[float], margin: float = 4.0) -> Verdict:
    baseline, candidate = with_scores(results, "old", old), with_scores(results, "new", new)
    margins = {"default": {"average": margin, "default": margin}}
    report = check(candidate, baseline, policy(margins=margins))
    return report.verdicts[0]


# --- verdicts --------------------------------------------------------------------------------


def test_the_four_verdicts(tmp_path: Path) -> None:
    half = [1.0, 0.0] * 200
    better = [1.0, 0.0] * 150 + [1.0] * 100
    worse = [1.0, 0.0] * 150 + [0.0] * 100
    little = [1.0, 0.0] * 198 + [0.0, 0.0, 1.0, 1.0]
    assert verdict_of(tmp_path / "a", half, better).verdict == "improved"
    assert verdict_of(tmp_path / "b", half, worse).verdict == "regressed"
    assert verdict_of(tmp_path / "c", half, little).verdict == "not worse than the margin"
    shuffled = half.copy()
    shuffled[:80] = [0.0, 1.0] * 40  # 80 documents change, 40 each way
    assert verdict_of(tmp_path / "d", half, shuffled).verdict == "inconclusive"


def test_identical_answers_are_equal_under_any_margin(tmp_path: Path) -> None:
    half = [1.0, 0.0] * 20
    found = verdict_of(tmp_path, half, half, margin=0.0)
    assert found.verdict == "not worse than the margin"
    assert found.difference.p == 1.0


def test_a_real_drop_inside_the_margin_is_said_to_be_one(tmp_path: Path) -> None:
    old = [1.0] * 2000
    new = [1.0] * 1980 + [0.0] * 20
    found = verdict_of(tmp_path, old, new, margin=3.0)
    assert found.verdict == "not worse than the margin"
    assert found.real_drop
    assert "a real drop, smaller than the margin" in found.sentence


def test_a_drop_beyond_the_margin_is_never_equal(tmp_path: Path) -> None:
    found = verdict_of(tmp_path, [1.0] * 500, [1.0] * 475 + [0.0] * 25)
    assert found.verdict == "regressed"
    assert found.difference.broken == 25


def test_bound_and_verdict_agree(tmp_path: Path) -> None:
    one, other = small_frames(seed=4, shrink=8)
    report = check(write_run(tmp_path, "new", other), write_run(tmp_path, "old", one), POLICY)
    assert [each.name for each in report.verdicts][-1] == "average"
    assert len(report.verdicts) == 11
    for each in report.verdicts:
        passed = each.non_inferiority.bound > -each.non_inferiority.margin
        assert each.non_inferiority.passed == passed
        assert (each.verdict == "not worse than the margin") <= passed
        assert each.difference.p_holm >= each.difference.p


@pytest.mark.slow
def test_the_average_is_guarded_too(tmp_path: Path) -> None:
    """A drop of a point and a half everywhere, inside each margin, is seen on the average."""
    rng = np.random.default_rng(0)
    old, new = {}, {}
    for task in ("gqa", "mmmu", "textvqa", "vizwiz_vqa", "scienceqa_img"):
        scores = (rng.random(4000) < 0.7).astype(float)
        dropped = scores.copy()
        dropped[np.flatnonzero(scores)[:60]] = 0.0
        old[task], new[task] = samples(task, scores.tolist()), samples(task, dropped.tolist())
    margins = {"ten": {"average": 1.0, "default": 4.0}}
    report = check(
        write_run(tmp_path, "new", new),
        write_run(tmp_path, "old", old),
        policy(margins=margins),
    )
    *benchmarks, average = report.verdicts
    assert {each.verdict for each in benchmarks} == {"not worse than the margin"}
    assert average.verdict == "regressed"
    assert report.exit_code == ExitCode.REGRESSION


def test_advisory_benchmarks_decide_nothing(tmp_path: Path) -> None:
    frames = {"mmmu": samples("mmmu", [1.0] * 50), "gqa": samples("gqa", [1.0, 0.0] * 500)}
    worse = {**frames, "mmmu": samples("mmmu", [0.0] * 50)}
    old, new = write_run(tmp_path, "old", frames), write_run(tmp_path, "new", worse)
    assert check(new, old, POLICY).exit_code == ExitCode.REGRESSION
    margins = {"default": {"average": 100.0, "default": 8.0}}
    report = check(new, old, policy(advisory=["mmmu"], margins=margins))
    assert [each.advisory for each in report.verdicts] == [True, False, False]
    # The average is still regressed: an advisory benchmark is part of it, unless the margin allows.
    assert report.verdicts[0].verdict == "regressed"
    assert report.exit_code == ExitCode.PASS


# --- the exit code ---------------------------------------------------------------------------


def made_verdict(verdict: str = "improved", name: str = "gqa", **changes: object) -> Verdict:
    difference = Difference(-1.2, Interval(-2, -0.4), 0.01, 0.04, "test", 3, 9, 2.5, 0.4)
    test = NonInferiority(1.0, -1.9, 0.6, 0.9, False)
    made = Verdict(name, verdict, 60.0, 58.8, difference, test, 500, True)  # type: ignore[arg-type]
    return replace(made, **changes)  # type: ignore[arg-type]


def made_report(verdicts: list[Verdict], rules: list[RuleOutcome] | None = None) -> GateReport:
    return GateReport("new", "old", "ten", 0.05, verdicts, rules or [], [])


VERDICTS = ("improved", "not worse than the margin", "regressed", "inconclusive")
STATES = ("passed", "failed", "inconclusive", "not checked")


@settings(max_examples=200, deadline=None)
@given(
    verdicts=st.lists(st.tuples(st.sampled_from(VERDICTS), st.booleans()), min_size=1, max_size=5),
    states=st.lists(st.sampled_from(STATES), max_size=3),
)
def test_one_rule_gives_the_exit_code_the_junit_file_and_the_annotations(
    verdicts: list[tuple[str, bool]], states: list[str]
) -> None:
    report = made_report(
        [made_verdict(name, advisory=advisory) for name, advisory in verdicts],
        [RuleOutcome("rule", state, "It is so.") for state in states],  # type: ignore[arg-type]
    )
    deciding = [name for name, advisory in verdicts if not advisory]
    failed = deciding.count("regressed") + states.count("failed")
    unsure = deciding.count("inconclusive") + states.count("inconclusive")
    expected = ExitCode.REGRESSION if failed else ExitCode.INCONCLUSIVE if unsure else ExitCode.PASS
    assert report.exit_code == expected
    root = ET.fromstring(junit_xml(report))
    assert int(root.get("failures", "-1")) == failed == len(root.findall(".//failure"))
    assert int(root.get("tests", "-1")) == len(verdicts) + len(states)
    errors = [line for line in annotations(report) if line.startswith("::error ")]
    assert len(errors) == failed
    assert report.outcome in job_summary(report)
    assert report.outcome in verdict_table(report).title
    assert json.loads(report.to_json())["exit_code"] == expected


# --- further rules ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "floor, state, code",
    [(0.5, "passed", 0), (0.95, "failed", 1), (0.7917, "inconclusive", 3)],
)
def test_retention_floor(tmp_path: Path, floor: float, state: str, code: int) -> None:
    teacher = [1.0] * 960 + [0.0] * 240
    student = [1.0] * 760 + [0.0] * 440
    with_scores(tmp_path, "teacher", teacher, role="teacher")
    old, new = with_scores(tmp_path, "old", student), with_scores(tmp_path, "new", student)
    report = check(new, old, policy(retention={"teacher": "teacher", "floor": floor}))
    assert [(rule.name, rule.state) for rule in report.rules] == [("retention", state)]
    assert report.exit_code == code


def test_broken_budget(tmp_path: Path) -> None:
    old = with_scores(tmp_path, "old", [1.0, 0.0] * 500)
    new = with_scores(tmp_path, "new", [0.0, 1.0] * 10 + [1.0, 0.0] * 490)
    report = check(new, old, policy(broken_per_thousand=1.0))
    assert report.rules[0].state == "passed"  # as many were mended: net zero
    assert "10 of 1,000 documents broke (10.0 in a thousand)" in report.rules[0].sentence
    assert "10 were mended: net +0.0" in report.rules[0].sentence
    assert "90 % interval" in report.rules[0].sentence
    worse = with_scores(tmp_path, "worse", [0.0, 0.0] * 20 + [1.0, 0.0] * 480)
    # 20 of 1,000 lost: net 20 with a standard error of 4.4.
    for budget, state in ((12.0, "failed"), (13.5, "passed"), (20.0, "passed")):
        report = check(worse, old, policy(broken_per_thousand=budget))
        assert report.rules[0].state == state, budget


def test_cost_limits(tmp_path: Path) -> None:
    old, new = with_scores(tmp_path, "old", [1.0, 0]), with_scores(tmp_path, "new", [1.0, 0])
    limits = policy(cost={"latency_ms": 1.2, "parameters": 1.0, "peak_memory_bytes": 2.0})

    def states(new_hardware: str) -> dict[str, str]:
        for run, latency, hardware in ((old, 10.0, "cpu"), (new, 13.0, new_hardware)):
            cost = Cost(parameters=100, latency_ms=latency)
            run.write_manifest(
                replace(run.manifest, cost=cost, provenance={"hardware": {"cpu": hardware}})
            )
        return {rule.name: rule.state for rule in check(new, old, limits).rules}

    expected = {"parameters": "passed", "latency": "failed", "peak memory": "not checked"}
    assert states("cpu") == expected
    assert states("other") == {**expected, "latency": "not checked"}


def test_unknown_hardware_is_not_identical_hardware(tmp_path: Path) -> None:
    old, new = with_scores(tmp_path, "old", [1.0, 0]), with_scores(tmp_path, "new", [1.0, 0])
    for run in (old, new):
        run.write_manifest(replace(run.manifest, cost=Cost(latency_ms=10.0)))
    report = check(new, old, policy(cost={"latency_ms": 1.2}))
    assert report.rules[0].state == "not checked"
    assert report.exit_code == ExitCode.PASS


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["running", "partial", "unhealthy"])
@pytest.mark.parametrize("which", ["old", "new"])
def test_partial_and_unhealthy_runs_are_refused(tmp_path: Path, status: str, which: str) -> None:
    runs = {name: with_scores(tmp_path, name, [1.0, 0.0]) for name in ("old", "new")}
    runs[which].write_manifest(
        replace(runs[which].manifest, status=status, notes=["3 % errors"])  # type: ignore[arg-type]
    )
    with pytest.raises(IncompleteRunError, match=rf"{which}.*3 % errors") as caught:
        check(runs["new"], runs["old"], POLICY)
    assert caught.value.exit_code == ExitCode.INCOMPLETE


def test_error_rate_above_the_policy(tmp_path: Path) -> None:
    old = with_scores(tmp_path, "old", [1.0, 0.0])
    new = with_scores(tmp_path, "new", [1.0, 0.0], rates={"error": 0.02})
    with pytest.raises(IncompleteRunError, match=r"mmmu of new .*2.0% of its answers are error"):
        check(new, old, POLICY)
    assert check(new, old, policy(health={"error": 0.05})).exit_code == ExitCode.PASS


def test_a_candidate_that_lacks_a_benchmark(tmp_path: Path) -> None:
    both = {"mmmu": samples("mmmu", [1, 0]), "gqa": samples("gqa", [1, 0])}
    old = write_run(tmp_path, "old", both)
    new = write_run(tmp_path, "new", {"mmmu": both["mmmu"]})
    with pytest.raises(IncompleteRunError, match="lacks gqa"):
        check(new, old, POLICY)
    with pytest.raises(NotComparableError, match="has 1 of 2 benchmarks"):
        check(old, new, POLICY)
    report = check(old, new, policy(benchmarks=["mmmu"]))
    assert [verdict.name for verdict in report.verdicts] == ["mmmu"], "no average of fewer"
    assert "and the average" not in report.statement
    with pytest.raises(IncompleteRunError, match="lacks pope, which the policy counts"):
        check(old, new, policy(benchmarks=["mmmu", "pope"]))


def test_runs_of_a_part_of_their_suite(tmp_path: Path) -> None:
    """One benchmark of ten on both sides is no verdict either, unless the policy says so."""
    runs = [with_scores(tmp_path, name, [1.0, 0.0] * 8) for name in ("old", "new")]
    for run in runs:
        run.write_manifest(replace(run.manifest, suite_tasks=["mmmu", "gqa", "pope"]))
    with pytest.raises(NotComparableError, match=r"1 of 3 benchmarks.*benchmarks: \[mmmu\]"):
        check(runs[1], runs[0], POLICY)
    report = check(runs[1], runs[0], policy(benchmarks=["mmmu"]))
    assert [verdict.name for verdict in report.verdicts] == ["mmmu"]
    assert report.exit_code == ExitCode.PASS


def test_an_empty_candidate(tmp_path: Path) -> None:
    old = with_scores(tmp_path, "old", [1.0, 0.0])
    new = write_run(tmp_path, "new", {}, planned=["mmmu"])
    with pytest.raises(IncompleteRunError, match=r"new.*no finished benchmark"):
        check(new, old, POLICY)


def test_other_fingerprints_and_documents(tmp_path: Path) -> None:
    old = with_scores(tmp_path, "old", [1.0, 0.0])
    other = with_scores(tmp_path, "other", [1.0, 0.0], fingerprint="x")
    with pytest.raises(NotComparableError, match="measured different things"):
        check(other, old, POLICY)
    documents = samples("mmmu", [1.0, 0.0], document_id=["x", "y"])
    with pytest.raises(NotComparableError, match="share no document"):
        check(write_run(tmp_path, "disjoint", {"mmmu": documents}), old, POLICY)
    more = with_scores(tmp_path, "more", [1.0, 0.0, 1.0])
    with pytest.raises(NotComparableError, match="share only 2 of 3"):
        check(more, old, POLICY)


def test_samples_that_do_not_give_the_stored_score(tmp_path: Path) -> None:
    old = with_scores(tmp_path, "old", [1.0, 0.0])
    new = with_scores(tmp_path, "new", [1.0, 0.0], score=80.0)
    with pytest.raises(IncompleteRunError, match=r"give 50.00, the stored score is 80.00"):
        check(new, old, POLICY)


def test_the_same_run_against_itself(tmp_path: Path) -> None:
    old = with_scores(tmp_path, "old", [1.0, 0.0])
    with pytest.raises(UsageError, match="named twice"):
        check(old, old, POLICY)


def test_a_limited_run_says_so(tmp_path: Path) -> None:
    runs = [with_scores(tmp_path, name, [1.0, 0.0]) for name in ("old", "new")]
    for run in runs:
        protocol = replace(run.manifest.protocol, limit=2)
        run.write_manifest(replace(run.manifest, protocol=protocol))
    report = check(runs[1], runs[0], POLICY)
    assert [note.split(") ")[1] for note in report.notes] == [
        "is limited to 2 documents a benchmark: n = 2, limited."
    ] * 2


def test_a_policy_without_margins_for_the_suite(tmp_path: Path) -> None:
    runs = [with_scores(tmp_path, name, [1.0, 0.0]) for name in ("old", "new")]
    with pytest.raises(UsageError, match="no margins for the suite 'ten'"):
        check(runs[1], runs[0], policy(margins={"mini": {"average": 1, "default": 1}}))


# --- what CI is given --------------------------------------------------------------------------

NASTY = 'a|b <script>alert(1)</script> ]]> "&\x00\x1b[31m\n::error::x %0A *_`@user'


def test_names_become_no_markup_and_no_command() -> None:
    report = made_report([made_verdict("regressed", name=NASTY)])
    report = replace(report, candidate=NASTY, notes=[NASTY])
    root = ET.fromstring(junit_xml(report))
    assert "<script>" in root.findall(".//failure")[0].get("message", "")
    summary = job_summary(report)
    assert "<script>" not in summary
    assert "\\|" in summary
    assert "\\@user" in summary
    rows = [line for line in summary.splitlines() if line.startswith("|")]
    assert len(rows) == 3
    (line,) = annotations(report)
    assert "\n" not in line
    assert "%0A" in line
    assert "\x1b" not in to_markdown(verdict_table(report))
    assert line.count("::error") == 2  # its own, and one inert inside the text
    assert "%250A" in line


def test_summaries_of_several_steps_follow_each_other(tmp_path: Path) -> None:
    report = made_report([made_verdict("inconclusive")])
    target = tmp_path / "summary.md"
    target.write_text("an earlier step\n")
    append_summary(report, target)
    append_summary(report, target)
    text = target.read_text()
    assert text.startswith("an earlier step\n### kd-bench check: cannot tell")
    assert text.count("### kd-bench check") == 2
    (line,) = annotations(report)
    assert line.startswith("::warning title=kd-bench check%3A gqa::gqa inconclusive")


def test_junit_is_written_atomically_and_parses(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "junit.xml"
    write_junit(made_report([made_verdict("regressed")]), path)
    assert ET.parse(path).getroot().get("failures") == "1"
    assert [each.name for each in path.parent.iterdir()] == ["junit.xml"]


def test_the_summary_has_a_row_a_verdict(tmp_path: Path) -> None:
    one, other = small_frames(seed=4, shrink=20)
    new, old = write_run(tmp_path, "new", other), write_run(tmp_path, "old", one)
    report = check(new, old, POLICY)
    rows = [line for line in job_summary(report).splitlines() if line.startswith("| ")]
    assert len(rows) == 12
    for each, row in zip(report.verdicts, rows[1:], strict=True):
        assert row.startswith(f"| {each.name}".replace("_", "\\_"))
        assert each.verdict in row


def test_the_table_explains_what_is_not_fine(tmp_path: Path) -> None:
    old = with_scores(tmp_path, "old", [1.0, 0.0] * 200)
    new = with_scores(tmp_path, "new", [1.0, 0.0] * 150 + [0.0] * 100)
    report = check(new, old, policy(broken_per_thousand=1.0))
    text = to_markdown(verdict_table(report))
    assert "mmmu regressed: 50.0" in text
    assert "bound" in text
    assert "broken answers failed: 50 of 400 documents broke" in text


def test_check_reads_only_what_it_needs(tmp_path: Path) -> None:
    """Question and answer texts are large; the gate never loads them."""
    read: list[tuple[str, ...]] = []

    class Watched(Run):
        def samples(self, task: str, columns: object = ()) -> pd.DataFrame:
            read.append(tuple(columns))  # type: ignore[arg-type]
            return super().samples(task, columns)  # type: ignore[arg-type]

    runs = [with_scores(tmp_path, name, [1.0, 0.0]) for name in ("old", "new")]
    check(Watched(runs[1].path), Watched(runs[0].path), POLICY)
    assert read
    assert not {"question", "answer", "image_digest"} & set().union(*read)


def test_find_run_serves_the_teacher_by_name(tmp_path: Path) -> None:
    run = with_scores(tmp_path, "teacher", [1.0])
    assert find_run(tmp_path, "teacher").path == run.path
