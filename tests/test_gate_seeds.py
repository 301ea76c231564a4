"""Checks over training seeds, margins that can be planned, methods against methods, few units."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import binom
from typer.main import get_command
from typer.testing import CliRunner

from kd_bench.cli import app
from kd_bench.compare import compare
from kd_bench.compare.estimates import Evidence, TaskEvidence, headline
from kd_bench.compare.methods import compare_all_methods, noise_of
from kd_bench.errors import ExitCode, IncompleteRunError, UsageError
from kd_bench.files import digest_text
from kd_bench.gate import check
from kd_bench.gate_plan import plan
from kd_bench.policy import Policy, load_policy
from kd_bench.records import AVERAGE
from kd_bench.report.verdicts import junit_xml
from kd_bench.stats import binomial_interval, effective_units, holm_levels, unchanged_draws
from kd_bench.store import Run
from tests.compare.test_compare import samples
from tests.statistics.simulate import write_run
from tests.support.report_store import Model, add_run

POLICY = load_policy().model_copy(update={"resamples": 2000})
TASKS = ("gqa", "mmmu", "textvqa")


def policy(**changes: object) -> Policy:
    return Policy.model_validate({**POLICY.model_dump(), **changes})


def right(seed: int, skill: float, documents: int = 600, noise: float = 0.6) -> list[float]:
    """Answers of one seed: a difficulty that all share, and noise of its own."""
    difficulty = np.random.default_rng(0).normal(0, 1, documents)
    own = np.random.default_rng([1, seed]).normal(0, noise, documents)
    return (skill + own > difficulty).astype(float).tolist()


def seeds_of(results: Path, method: str, skill: float, count: int = 3, first: int = 0) -> list[Run]:
    return [
        write_run(
            results,
            f"{method}-seed{seed}",
            {
                task: samples(task, right(first + 10 * seed + place, skill))
                for place, task in enumerate(TASKS)
            },
            role="sft" if method == "sft" else "kd",
            method=method,
            seed=seed,
        )
        for seed in range(count)
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("seeds")
    seeds_of(results, "sft", 0.4)
    seeds_of(results, "switch-kd", 0.9, first=100)
    seeds_of(results, "kl", 0.4, count=1, first=200)
    return results


def command(*words: object, code: int | None = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert code is None or done.exit_code == code, done.output
    return done.output


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
    (same,) = compare([*_named(store, "sft-seed0", "sft-seed1")], categories=False).warnings
    assert "ONE RECIPE" not in same  # no recipe is stored


def lineage(recipe: str) -> dict[str, object]:
    return {"recipe": recipe, "recipe_digest": digest_text(recipe)}


@pytest.mark.parametrize(
    "seeds, recipes, one",
    [
        ((0, 1), ("a", "a"), True),
        ((0, 1), ("a", "b"), False),
        ((0, 0), ("a", "a"), False),
        ((0, 1), ("a", None), False),
        ((0, 1), (None, None), False),
    ],
)
def test_one_recipe_is_said_of_equal_stored_recipes_only(
    tmp_path: Path, seeds: tuple[int, int], recipes: tuple[str | None, str | None], one: bool
) -> None:
    runs = [
        add_run(
            tmp_path,
            Model(name, "kd", "switch-kd", 0.5, seed),
            tasks=["pope"],
            training=lineage(recipe) if recipe else None,
        )
        for name, seed, recipe in zip("xy", seeds, recipes, strict=True)
    ]
    (warning,) = compare(runs, categories=False).warnings
    assert ("ONE RECIPE" in warning) == one
    pooled = noise_of(runs[0])
    assert (pooled is not None) == (seeds == (0, 1) and recipes[0] == recipes[1])


def test_seeds_of_one_recipe_share_a_digest(tmp_path: Path) -> None:
    """A recipe's own digest holds its seed: the lineage needs one without."""
    from kd_bench.distill.recipe import Recipe
    from kd_bench.distill.train import new_lineage

    stage = {"method": "sft", "steps": 1}
    made = [
        new_lineage(Recipe.model_validate({"name": f"r{seed}", "student": "s", "seed": seed,
                                        "data": {"path": data}, "stages": [stage]}))
        for seed, data in ((0, "d"), (1, "d"), (2, "other"))
    ]  # fmt: skip
    assert made[0]["recipe_digest"] != made[1]["recipe_digest"]
    assert made[0]["seedless_digest"] == made[1]["seedless_digest"] != made[2]["seedless_digest"]


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
        check(*_named(store, "sft-seed0", "switch-kd-seed0"), load_policy(file))
    command(*words, "--results", store, code=None)


def test_retention_against_oneself_names_the_rule(store: Path) -> None:
    runs = _named(store, "switch-kd-seed0", "sft-seed0")
    rule = {"teacher": "switch-kd-seed0", "floor": 0.9}
    with pytest.raises(UsageError, match="retention: teacher 'switch-kd-seed0'"):
        check(*runs, policy(retention=rule))


def test_methods_name_the_runs_that_they_pass_over(tmp_path: Path) -> None:
    for name, method, seed, minute in (
        ("a0", "a", 0, 0), ("a0b", "a", 0, 1), ("a1", "a", 1, 2), ("a2", "a", 2, 3),
        ("b0", "b", 0, 4),
    ):  # fmt: skip
        run = add_run(
            tmp_path,
            Model(name, "kd", method, 0.5, seed),
            tasks=["pope"],
            created=f"2026-05-01T10:{minute:02d}:00+00:00",
        )
        if name == "a2":
            protocol = replace(run.manifest.protocol, limit=8)
            run.write_manifest(replace(run.manifest, protocol=protocol))
    found = compare_all_methods(tmp_path, ["a", "b"], resamples=1000)
    assert found.methods == {"a": 2, "b": 1}
    told = " ".join(found.warnings)
    assert "a0 (" in told
    assert "newer and also seed 0" in told
    assert "limited to 8 documents" in told
    assert compare_all_methods(tmp_path, ["a", "b"], allow_different=True, resamples=1000)


def _named(store: Path, *names: str) -> list[Run]:
    return [Run(next((store / "runs").glob(f"*-{name}-*"))) for name in names]


def test_the_known_churn_is_that_of_the_stored_seeds(store: Path) -> None:
    (warning,) = compare(_named(store, "sft-seed0", "kl-seed0"), categories=False).warnings
    pairs = [(0, 1), (0, 2), (1, 2)]
    answers = [[right(10 * seed + n, 0.4) for n in range(3)] for seed in range(3)]
    churn = np.mean([np.mean(np.array(answers[a]) != np.array(answers[b])) for a, b in pairs])
    assert f"change {churn:.1%} of the answers" in warning


def test_seeds_must_be_of_one_method(store: Path) -> None:
    new = _named(store, "switch-kd-seed0", "kl-seed0")
    with pytest.raises(UsageError, match="not seeds of one method"):
        check(new, _named(store, "sft-seed0"), POLICY)


# --- methods -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_methods_against_methods_with_multiplicity(store: Path) -> None:
    words = ("compare", "--methods", "sft", "switch-kd", "kl", "--results", store)
    value = json.loads(command(*words, "--json"))
    assert value["methods"] == {"sft": 3, "switch-kd": 3, "kl": 1}
    pairs = {(pair["first"], pair["second"]): pair for pair in value["pairs"]}
    assert set(pairs) == {("sft", "switch-kd"), ("sft", "kl"), ("switch-kd", "kl")}
    for pair in pairs.values():
        found = pair["estimates"][AVERAGE]
        assert pair["p_holm"][AVERAGE] >= found["p"]
        assert found["interval"]["level"] == 0.95
    assert pairs["sft", "switch-kd"]["p_holm"][AVERAGE] < 0.05
    assert value["warnings"] == ["kl has one training seed here: its training noise is unknown."]
    assert "switch-kd - sft" in command(*words)


def test_a_method_that_is_not_there(store: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'switch-kd'"):
        compare_all_methods(store, ["sft", "swich-kd"])
    with pytest.raises(UsageError, match="two or more different methods"):
        compare_all_methods(store, ["sft", "sft"])


# --- margins -------------------------------------------------------------------------------------


def test_plan_from_seeds_gives_a_policy_that_passes_them(store: Path, tmp_path: Path) -> None:
    names = [f"sft-seed{seed}" for seed in range(3)]
    text = command("check", "--plan", *names, "--results", store)
    file = tmp_path / "policy.yaml"
    file.write_text(text.partition("Policy file:\n\n")[2])
    margins = yaml.safe_load(file.read_text())["margins"]["ten"]
    assert set(margins["tasks"]) == set(TASKS)
    words = ("check", "sft-seed1", "--against", "sft-seed0", "--policy", file)
    value = json.loads(command(*words, "--json", "--results", store))
    assert value["policy"] == str(file)
    assert value["policy_digest"] == load_policy(file).digest
    assert value["verdicts"][-1]["verdict"] == "not worse than the margin"


def test_plan_by_hand(store: Path) -> None:
    """One other seed: (z_level + z_pass) standard errors of the paired difference."""
    runs = _named(store, "sft-seed0", "sft-seed1")
    found = {line.name: line for line in plan(runs[0], runs[1:], POLICY).lines}
    for n, task in enumerate(TASKS):
        change = np.array(right(10 + n, 0.4)) - np.array(right(n, 0.4))
        error = 100 * change.std() / np.sqrt(600)
        line = found[task]
        assert line.churn == pytest.approx(np.mean(change != 0))
        assert line.error == pytest.approx(error, rel=0.04)
        assert line.margin == pytest.approx((2.241 + 1.645) * error, abs=0.35)
        assert line.found > line.margin
    assert found[AVERAGE].margin < min(found[task].margin for task in TASKS)


def test_plan_of_one_run_assumes_a_churn_and_says_so(store: Path) -> None:
    (run,) = _named(store, "sft-seed0")
    found = plan(run, [], POLICY)
    assert "15% of the answers are assumed to change" in found.notes[0]
    for line in found.lines:
        assert line.churn == pytest.approx(0.15, abs=0.02)
    assert Policy.model_validate(yaml.safe_load(found.policy)).margins["ten"].average > 0


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


def test_no_difference_is_larger_than_a_hundred_points() -> None:
    values = {"a": np.array([[1.0, 1.0]] * 6), "b": np.array([[1.0, 1.0]] + [[0.0, 1.0]] * 5),
              "c": np.array([[0.0, 1.0]] * 6)}  # fmt: skip
    one = Evidence({"t": TaskEvidence.of("mean", list("uvwxyz"), values, 500)})
    for key in ("t", AVERAGE):
        for first, second in ((["a"], ["b"]), (["a", "b"], ["b", "c"])):
            interval = one.difference(key, first, second).interval
            assert interval is not None
            assert -100 <= interval.low <= interval.high <= 100


def test_over_seeds_no_sentence_says_what_the_units_could_find(store: Path) -> None:
    old, new = _named(store, "sft-seed0", "sft-seed1"), _named(store, "sft-seed2", "kl-seed0")
    with pytest.raises(UsageError):
        check(new, old, POLICY)
    new = _named(store, "switch-kd-seed0", "switch-kd-seed1")
    report = check(new, old, policy(margins={"default": {"average": 0, "default": 0}}))
    assert all(each.difference.detectable is None for each in report.verdicts)
    assert not any("four times in five" in each.sentence for each in report.verdicts)


def test_an_alpha_out_of_reach_is_refused_with_the_number_that_reaches_it(store: Path) -> None:
    runs = _named(store, "switch-kd-seed0", "sft-seed0")
    with pytest.raises(UsageError, match="no p of 4 tests") as told:
        check(*runs, policy(alpha=0.003, resamples=1000))
    assert "1333" in str(told.value.hint)
    assert check(*runs, policy(alpha=0.003, resamples=1333))


def test_a_plan_asks_whether_the_runs_are_sound(tmp_path: Path) -> None:
    frames = {task: samples(task, right(n, 0.4)) for n, task in enumerate(TASKS)}
    frames["gqa"] = samples("gqa", [1.0] * 6, unit_id=["one"] * 6)
    whole = write_run(tmp_path, "whole", frames)
    found = plan(whole, [], POLICY)
    assert yaml.safe_load(found.policy)["benchmarks"] == ["mmmu", "textvqa"]
    protocol = replace(whole.manifest.protocol, limit=600)
    whole.write_manifest(replace(whole.manifest, protocol=protocol))
    assert any("limited to 600" in note for note in plan(whole, [], POLICY).notes)
    partial = write_run(tmp_path, "part", frames, status="partial")
    with pytest.raises(IncompleteRunError, match="is partial"):
        plan(partial, [], POLICY)
    rates = {"error": 0.5, "empty": 0.0, "truncated": 0.0, "unparsed": 0.0}
    sick = write_run(tmp_path, "sick", frames, rates=rates)
    with pytest.raises(IncompleteRunError, match="unhealthy"):
        plan(sick, [], policy(health={"error": 0.1}))


def test_the_junit_file_says_what_limits_the_verdict(store: Path) -> None:
    report = check(*_named(store, "switch-kd-seed0", "sft-seed0"), POLICY)
    suite = ET.fromstring(junit_xml(report))
    told = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert told["policy_digest"] == POLICY.digest
    assert "ONE SEED" in (told["warning"] or "")
    assert "ONE SEED" in (suite.findtext("system-out") or "")
    assert suite.get("tests") == str(len(suite.findall("testcase")))


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


# --- the headline --------------------------------------------------------------------------------


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
