"""`check --plan`: margins that the stored units can carry."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from kd_bench.errors import IncompleteRunError
from kd_bench.gate_plan import plan
from kd_bench.policy import Policy, load_policy
from kd_bench.records import AVERAGE
from tests.compare.test_compare import samples
from tests.statistics.simulate import write_run
from tests.support.seeds import TASKS, command, named, right, store_of_methods

POLICY = load_policy().model_copy(update={"resamples": 2000})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of_methods(tmp_path_factory.mktemp("seeds"))


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
    runs = named(store, "sft-seed0", "sft-seed1")
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
    (run,) = named(store, "sft-seed0")
    found = plan(run, [], POLICY)
    assert "15% of the answers are assumed to change" in found.notes[0]
    for line in found.lines:
        assert line.churn == pytest.approx(0.15, abs=0.02)
    assert Policy.model_validate(yaml.safe_load(found.policy)).margins["ten"].average > 0


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
        plan(sick, [], Policy.model_validate({**POLICY.model_dump(), "health": {"error": 0.1}}))
