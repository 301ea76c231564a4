"""Checks over training seeds, and of few units."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.main import get_command

from kd_bench.cli import app
from kd_bench.compare import compare
from kd_bench.errors import ExitCode, UsageError
from kd_bench.gate import check
from kd_bench.policy import Policy, load_policy
from kd_bench.report.verdicts import junit_xml
from kd_bench.store import Run
from tests.compare.test_compare import samples
from tests.statistics.simulate import write_run
from tests.support.seeds import command, named, right, store_of_methods

POLICY = load_policy().model_copy(update={"resamples": 2000})


def policy(**changes: object) -> Policy:
    return Policy.model_validate({**POLICY.model_dump(), **changes})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of_methods(tmp_path_factory.mktemp("seeds"))


# --- seeds ---------------------------------------------------------------------------------------


def sides(*words: str) -> tuple[list[str], list[str]]:
    """Candidates and baselines of `check` with these words."""
    context = get_command(app).commands["check"].make_context("check", list(words))  # type: ignore[attr-defined]
    return list(context.params["candidate"]), list(context.params["against"])


@pytest.mark.parametrize(
    "words, candidates, baselines",
    [
        ("a0 a1 --against b0 b1 --json", ["a0", "a1"], ["b0", "b1"]),
        ("a0 a1 --against=b0 b1 --json", ["a0", "a1"], ["b0", "b1"]),
        ("--against b a", ["a"], ["b"]),
        ("--against=b a", ["a"], ["b"]),
        ("a --results r --against b c", ["a"], ["b", "c"]),
    ],
)
def test_every_name_after_against_is_a_baseline_where_a_candidate_stands_before(
    words: str, candidates: list[str], baselines: list[str]
) -> None:
    assert sides(*words.split()) == (candidates, baselines)


def test_check_over_seeds_is_about_the_recipe(store: Path) -> None:
    new = [f"switch-kd-seed{seed}" for seed in range(3)]
    old = [f"sft-seed{seed}" for seed in range(3)]
    value = json.loads(command("check", *new, "--against", *old, "--json", "--results", store))
    assert value["about"] == "this recipe"
    assert value["candidate"] == "switch-kd (3 seeds)"
    average = value["verdicts"][-1]
    assert average["verdict"] == "improved"
    assert average["difference"]["test"] == "Student's t over seeds and documents"
    assert value["warnings"] == []
    means = [np.mean([np.mean(right(100 * side + 10 * seed + n, skill)) for seed in range(3)
                      for n in range(3)]) for side, skill in ((0, 0.4), (1, 0.9))]  # fmt: skip
    assert average["difference"]["value"] == pytest.approx(100 * (means[1] - means[0]))


@pytest.mark.slow
def test_one_seed_is_about_these_weights_and_says_so_loudly(store: Path) -> None:
    words = ("check", "switch-kd-seed0", "--against", "sft-seed0", "--results", store)
    value = json.loads(command(*words, "--json"))
    assert value["about"] == "these weights"
    (warning,) = value["warnings"]
    assert "ONE SEED" in warning
    assert "3 seeds of sft in this store change" in warning
    assert "ONE SEED" in command(*words)
    (same,) = compare([*named(store, "sft-seed0", "sft-seed1")], categories=False).warnings
    assert "ONE RECIPE" not in same  # no recipe is stored


def test_an_equals_sign_after_against_changes_nothing(store: Path) -> None:
    words = ("check", "switch-kd-seed0", "switch-kd-seed1", "--against=sft-seed0", "sft-seed1")
    value = json.loads(command(*words, "--json", "--results", store))
    assert ["sft-seed" in name for name in value["baseline_runs"]] == [True, True]
    assert ["switch-kd" in name for name in value["candidate_runs"]] == [True, True]


def test_a_policy_under_which_nothing_decides_is_refused(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(
        "benchmarks: [gqa]\nadvisory: [gqa]\nmargins: {default: {average: 1, default: 1}}\n"
    )
    words = ("check", "sft-seed0", "--against", "switch-kd-seed0", "--policy", file)
    with pytest.raises(UsageError, match="no benchmark decides"):
        check(*named(store, "sft-seed0", "switch-kd-seed0"), load_policy(file))
    command(*words, "--results", store, code=None)


def test_retention_against_oneself_names_the_rule(store: Path) -> None:
    runs = named(store, "switch-kd-seed0", "sft-seed0")
    rule = {"teacher": "switch-kd-seed0", "floor": 0.9}
    with pytest.raises(UsageError, match="retention: teacher 'switch-kd-seed0'"):
        check(*runs, policy(retention=rule))


def test_seeds_must_be_of_one_method(store: Path) -> None:
    new = named(store, "switch-kd-seed0", "kl-seed0")
    with pytest.raises(UsageError, match="not seeds of one method"):
        check(new, named(store, "sft-seed0"), POLICY)


# --- few units, and units that do not change -----------------------------------------------------


def pair(results: Path, old: pd.DataFrame, new: pd.DataFrame, task: str) -> list[Run]:
    return [write_run(results, "new", {task: new}), write_run(results, "old", {task: old})]


def test_nothing_right_in_either_is_not_equal(tmp_path: Path) -> None:
    """0 of 15 groups against 0 of 15: a drop of 18 points would have gone unseen."""
    frame = samples("mmbench_cn", [0.0] * 60, unit_id=[f"g{row // 4}" for row in range(60)])
    other = frame.assign(parsed="c")
    runs = pair(tmp_path, frame, other, "mmbench_cn")
    margins = {"default": {"average": 8, "default": 8}}
    report = check(runs[0], runs[1], policy(margins=margins))
    first = report.verdicts[0]
    assert first.verdict == "inconclusive"
    assert first.units == 15
    assert first.difference.interval is not None
    assert first.difference.interval.high == pytest.approx(18.1, abs=0.3)
    assert report.exit_code == ExitCode.INCONCLUSIVE
    (task,) = compare(runs, categories=False).tasks
    assert task.scores[0].interval is not None
    assert task.scores[0].interval.low == 0
    assert task.scores[0].interval.high == pytest.approx(18.1, abs=0.1)


def test_too_few_units_have_no_interval_and_no_verdict(tmp_path: Path) -> None:
    old = samples("gqa", [1.0] * 6, unit_id=["one"] * 6)
    new = samples("gqa", [1.0] * 5 + [0.0], unit_id=["one"] * 6)
    runs = pair(tmp_path, old, new, "gqa")
    (task,) = compare(runs[::-1], categories=False).tasks
    assert task.differences[0].interval is None
    assert task.differences[0].span == "too few units: 1"
    assert task.scores[0].interval is None
    report = check(runs[0], runs[1], policy(margins={"default": {"average": 9, "default": 9}}))
    assert report.verdicts[0].verdict == "inconclusive"
    assert "too few units: 1" in report.verdicts[0].sentence


def test_an_average_of_parts_with_too_few_units_has_no_interval(tmp_path: Path) -> None:
    old = {task: samples(task, [1.0] * 6, unit_id=["one"] * 6) for task in ("gqa", "textvqa")}
    old["mmmu"] = samples("mmmu", right(0, 0.5))
    new = {**old, "gqa": samples("gqa", [1.0] * 5 + [0.0], unit_id=["one"] * 6)}
    runs = [write_run(tmp_path, "old", old), write_run(tmp_path, "new", new)]
    found = compare(runs, categories=False)
    assert found.average[0].interval is None
    assert found.average_differences[0].interval is None
    assert found.average_differences[0].detectable is None
    report = check(runs[1], runs[0], policy(margins={"default": {"average": 9, "default": 9}}))
    assert report.verdicts[-1].verdict == "inconclusive"
    json.loads(report.to_json(), parse_constant=pytest.fail)


def test_over_seeds_no_sentence_says_what_the_units_could_find(store: Path) -> None:
    old, new = named(store, "sft-seed0", "sft-seed1"), named(store, "sft-seed2", "kl-seed0")
    with pytest.raises(UsageError):
        check(new, old, POLICY)
    new = named(store, "switch-kd-seed0", "switch-kd-seed1")
    report = check(new, old, policy(margins={"default": {"average": 0, "default": 0}}))
    assert all(each.difference.detectable is None for each in report.verdicts)
    assert not any("four times in five" in each.sentence for each in report.verdicts)


def test_an_alpha_out_of_reach_is_refused_with_the_number_that_reaches_it(store: Path) -> None:
    runs = named(store, "switch-kd-seed0", "sft-seed0")
    with pytest.raises(UsageError, match="no p of 4 tests") as told:
        check(*runs, policy(alpha=0.003, resamples=1000))
    assert "1333" in str(told.value.hint)
    assert check(*runs, policy(alpha=0.003, resamples=1333))


def test_the_junit_file_says_what_limits_the_verdict(store: Path) -> None:
    report = check(*named(store, "switch-kd-seed0", "sft-seed0"), POLICY)
    suite = ET.fromstring(junit_xml(report))
    told = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert told["policy_digest"] == POLICY.digest
    assert "ONE SEED" in (told["warning"] or "")
    assert "ONE SEED" in (suite.findtext("system-out") or "")
    assert suite.get("tests") == str(len(suite.findall("testcase")))
