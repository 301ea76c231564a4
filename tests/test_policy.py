"""The policy file: the shipped one, and one clear line for a bad one."""

from pathlib import Path

import pytest

from kd_bench.errors import UsageError
from kd_bench.policy import load_policy


def test_the_shipped_policy_serves_both_suites() -> None:
    shipped = load_policy()
    assert shipped.alpha == 0.05
    for suite in ("ten", "mini", "anything else"):
        assert shipped.margins_for(suite).average > 0
    assert shipped.margins_for("mini").default > shipped.margins_for("ten").default
    assert len(shipped.margins_for("ten").tasks) == 10


@pytest.mark.parametrize(
    "text, message",
    [
        ("alfa: 0.1\nmargins: {}", "unknown key 'alfa'. Did you mean 'alpha'"),
        ("margins: {ten: {average: 1, default: 2, taks: {}}}", "Did you mean 'tasks'"),
        ("margins: {ten: {average: -1, default: 2}}", "margins.ten.average"),
        ("margins: {ten: {average: 1, default: 2, tasks: {mmu: 1}}}", "Did you mean 'mmmu'"),
        ("margins: {}\nadvisory: [pop]", "Did you mean 'pope'"),
        ("alpha: 0.7\nmargins: {}", "alpha"),
        ("resamples: 10\nmargins: {}", "resamples"),
        ("alpha: 0.1", "margins"),
        ("margins: {}\nhealth: {error: 2}", "health.error"),
        ("margins: {}\nretention: {floor: 0.9}", "retention.teacher"),
        ("margins: {tne: {average: 1, default: 2}}", "no suite 'tne'. Did you mean 'ten'"),
        ("margins: {}\nretention: {teacher: t, floor: 90}", "0.9 for 90 %"),
        ("- margins", "expected `key: value`"),
        ("margins: {", "not valid YAML"),
    ],
)
def test_a_bad_policy_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"policy\.yaml") as caught:
        load_policy(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_policy(tmp_path / "nothing.yaml")


def test_suites_of_ones_own_may_have_margins(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("margins: {ours: {average: 1, default: 2}}")
    assert load_policy(path, suites=["ours"]).margins_for("ours").average == 1


def test_a_policy_is_known_by_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("margins: {ten: {average: 1, default: 2}}")
    first = load_policy(path)
    path.write_text("# a comment\nalpha: 0.05\nmargins: {ten: {default: 2, average: 1}}")
    assert load_policy(path).digest == first.digest
    path.write_text("margins: {ten: {average: 1.1, default: 2}}")
    assert load_policy(path).digest != first.digest
    assert first.source == str(path)
    assert load_policy().source == "shipped"
