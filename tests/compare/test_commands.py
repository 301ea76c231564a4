"""`check` and `compare` as they are typed: refusals, exit codes, what is printed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from kd_bench.errors import ExitCode
from kd_bench.store import Run
from tests.cli.conftest import Call, call  # noqa: F401  # a fixture
from tests.compare.test_compare import samples
from tests.statistics.simulate import write_run

TASKS = ("gqa", "mmmu")
POLICY = "margins: {default: {average: 4, default: 8}}\n"


def frames(seed: int, skill: float, documents: int = 300) -> dict[str, pd.DataFrame]:
    """Answers to documents whose difficulty all models share."""
    hard = np.random.default_rng(0).normal(0, 1, (len(TASKS), documents))
    own = np.random.default_rng([1, seed]).normal(0, 0.6, hard.shape)
    return {
        task: samples(task, (skill + own[row] > hard[row]).astype(float).tolist())
        for row, task in enumerate(TASKS)
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of sft and of switch-kd, one of kl, and an sft run under another protocol."""
    results = tmp_path_factory.mktemp("store")
    for number, (method, seed, skill) in enumerate(
        [("sft", 0, 0.3), ("sft", 1, 0.3), ("switch-kd", 0, 0.9), ("switch-kd", 1, 0.9),
         ("kl", 0, 0.3)]
    ):  # fmt: skip
        name = f"{method}-seed{seed}"
        write_run(results, name, frames(number, skill), method=method, seed=seed)
    other = write_run(
        results, "short", frames(0, 0.3), method="short", seed=0,
        fingerprint="other", settings={"max_new_tokens": 8},
    )  # fmt: skip
    assert other.manifest.model.method == "short"
    return results


def limited(run: Run, limit: int) -> None:
    """As if `--limit` had made the run."""
    protocol = replace(run.manifest.protocol, limit=limit)
    run.write_manifest(replace(run.manifest, protocol=protocol))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, told",
    [
        ("compare --methods sft kl --flips gqa", "--flips lists the samples of two runs"),
        ("compare sft-seed0 kl-seed0 sft-seed1 --flips gqa", "--flips lists the samples of two"),
        ("compare sft-seed0 kl-seed0 --flips gqqa", "Not every run has 'gqqa'. Did you mean 'gqa'"),
        ("compare --methods sft", "needs two or more different methods"),
        ("compare --methods sft switch", "No run of a method 'switch'"),
        ("check --plan sft-seed0 --against kl-seed0", "--plan looks at one recipe"),
        ("check --plan sft-seed0 kl-seed0", "not seeds of one method"),
        ("check sft-seed0 kl-seed0 --against switch-kd-seed0", "not seeds of one method"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_line(
    call: Call,  # noqa: F811
    store: Path,
    words: str,
    told: str,
) -> None:
    done = call(*words.split(), "--results", store)
    assert done.code == ExitCode.USAGE
    assert told in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


@pytest.mark.parametrize(
    "policy, told",
    [
        ("margins: {tne: {average: 1, default: 2}}", "no suite 'tne'. Did you mean 'ten'?"),
        (POLICY + "retention: {teacher: t, floor: 90}", "a share is meant, 0.9 for 90 %"),
        (POLICY + "benchmarks: [gqa]\nadvisory: [gqa]", "no benchmark decides: gqa are advisory"),
        (POLICY + "benchmarks: [gqqa]", "no benchmark 'gqqa'. Did you mean 'gqa'?"),
        (POLICY + "alpha: 0.001\nresamples: 1000", "nothing could be shown. Set resamples: 2999"),
        ("margins: {mini: {average: 1, default: 2}}", "no margins for the suite 'ten'"),
    ],
)
def test_a_policy_that_cannot_judge_is_one_line(
    call: Call,  # noqa: F811
    store: Path,
    tmp_path: Path,
    policy: str,
    told: str,
) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(policy)
    words = ("check", "kl-seed0", "--against", "sft-seed0", "--policy", file)
    done = call(*words, "--results", store)
    assert done.code == ExitCode.USAGE
    assert told in done.err
    assert done.err.count("\n") == 1


# --- across protocols ----------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["sft-seed0 short", "--methods sft short"])
def test_across_protocols_only_where_it_is_asked_for_and_marked(
    call: Call,  # noqa: F811
    store: Path,
    words: str,
) -> None:
    refused = call("compare", *words.split(), "--results", store)
    assert refused.code == ExitCode.NOT_COMPARABLE
    assert "max_new_tokens none and 8" in refused.err
    assert "--allow-different" in refused.err
    shown = call("compare", *words.split(), "--allow-different", "--results", store)
    assert shown.code == ExitCode.PASS
    assert "not comparable" in " ".join(shown.out.split())


def test_a_verdict_is_never_given_across_protocols(call: Call, store: Path) -> None:  # noqa: F811
    done = call("check", "short", "--against", "sft-seed0", "--results", store)
    assert done.code == ExitCode.NOT_COMPARABLE
    assert call("check", "short", "--allow-different", "--results", store).code == ExitCode.USAGE


# --- methods -------------------------------------------------------------------------------------


def test_any_method_against_any_says_what_was_corrected_and_what_has_one_seed(
    call: Call,  # noqa: F811
    store: Path,
) -> None:
    words = ("compare", "--methods", "kl", "switch-kd", "sft", "--results", store)
    found = json.loads(call(*words, "--json").out)
    assert found["methods"] == {"kl": 1, "switch-kd": 2, "sft": 2}
    pairs = [(pair["first"], pair["second"]) for pair in found["pairs"]]
    assert pairs == [("kl", "switch-kd"), ("kl", "sft"), ("switch-kd", "sft")]
    alone = sorted(pair["estimates"]["average"]["p"] for pair in found["pairs"])
    corrected = sorted(pair["p_holm"]["average"] for pair in found["pairs"])
    running = np.maximum.accumulate(
        [min(1.0, p * left) for p, left in zip(alone, (3, 2, 1), strict=True)]
    )
    np.testing.assert_allclose(corrected, running)
    text = " ".join(call(*words).out.split())
    assert "sft - switch-kd" in text
    assert "p after Holm over all pairs of methods" in text
    assert "kl has one training seed here: its training noise is unknown." in text


# --- few units, limited runs ---------------------------------------------------------------------


def test_one_unit_has_no_interval_no_verdict_and_no_rank(
    call: Call,  # noqa: F811
    tmp_path: Path,
) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    for name, right in (("old", 50), ("new", 10)):
        scores = [1.0] * right + [0.0] * (60 - right)
        write_run(few, name, {"gqa": samples("gqa", scores, unit_id=["one"] * 60)})
        write_run(many, name, {"gqa": samples("gqa", scores)})
    words = ("compare", "old", "new", "--results", few)
    assert "gqa: too few units: 1, no interval." in " ".join(call(*words).out.split())
    (task,) = json.loads(call(*words, "--json").out)["tasks"]
    assert [each["interval"] for each in (*task["scores"], *task["differences"])] == [None] * 3
    judged = call("check", "new", "--against", "old", "--results", few)
    assert judged.code == ExitCode.INCONCLUSIVE
    assert "too few units: 1" in " ".join(judged.out.split())
    assert call("check", "new", "--against", "old", "--results", many).code == ExitCode.REGRESSION
    marks = {}
    for results in (few, many):
        assert call("report", "--to", results / "page", "--results", results).code == ExitCode.PASS
        board = json.loads((results / "page" / "leaderboard.json").read_text())["tables"][0]
        marks[results] = [set(row["cells"]["gqa"]) for row in board["rows"]]
    assert all({"emphasis", "interval"} & each == set() for each in marks[few]), (
        "no rank, no interval"
    )
    assert all({"emphasis", "interval"} <= each for each in marks[many]), (
        "both where units are many"
    )


def test_margins_of_limited_runs_say_so_loudly_and_in_the_policy_file(
    call: Call,  # noqa: F811
    tmp_path: Path,
) -> None:
    runs = [
        write_run(tmp_path, f"s{seed}", frames(seed, 0.3, 60), method="sft", seed=seed)
        for seed in range(2)
    ]
    words = ("check", "--plan", "s0", "s1", "--results", tmp_path)
    assert "LIMITED" not in call(*words).out
    for run in runs:
        limited(run, 60)
    told = call(*words).out
    assert told.count("LIMITED") >= 2
    text = told.partition("Policy file:\n\n")[2]
    assert text.startswith("# LIMITED: s0 (")
    assert yaml.safe_load(text)["margins"]["ten"]["average"] > 0
    (warning,) = json.loads(call(*words, "--json").out)["warnings"]
    assert "equally limited runs" in warning
