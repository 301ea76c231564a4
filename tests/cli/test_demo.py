"""What the demo runs, and what it says at the end."""

from pathlib import Path

import pytest

pytest.importorskip("PIL")

from kd_bench.cli import demo, jobs
from kd_bench.cli.demo import Student
from kd_bench.distill.recipe import load_recipe
from kd_bench.errors import UsageError
from kd_bench.world.build import ERROR
from tests.support.report_store import demo_models, make_store


def resolved(student: Student) -> object:
    command = student.train()
    assert command[:2] == ["train", "mini"]
    return load_recipe("mini", command[2:])


@pytest.mark.parametrize("method", ["sft", "kl", "switch-kd"])
def test_every_method_trains_with_the_same_settings(method: str) -> None:
    """Only method, seed and folder differ: no method is tuned more than another."""
    plain = load_recipe("mini").model_dump()
    changed = resolved(Student(method, 2)).model_dump()  # type: ignore[attr-defined]
    assert changed.pop("seed") == 2
    assert changed.pop("output") == f"checkpoints/demo/{method}-seed2"
    assert changed["stages"][0].pop("method") == method
    for key in ("seed", "output"):
        plain.pop(key)
    plain["stages"][0].pop("method")
    assert changed == plain


def test_every_student_is_evaluated_once_after_its_training() -> None:
    students = [Student(method, seed) for method in ("sft", "switch-kd", "kl") for seed in (0, 1)]
    groups = demo.commands_of(students)
    assert [line[2].partition("=")[2] for line in groups["train"]] == ["switch-kd"] * 2 + [
        "kl"
    ] * 2 + ["sft"] * 2
    commands = [*groups["train"], *groups["eval"]]
    finals = [word for line in groups["eval"] for word in line if word.endswith("/final")]
    assert sorted(finals) == sorted(
        [s.checkpoint for s in students] + [s.checkpoint for s in students[2:4]]
    )
    for student in students:
        others = [line for line in commands if line != student.train()]
        able = [line for line in others if student.checkpoint not in line]
        assert all(jobs._next([line], [student.train()]) == 0 for line in able)
        waiting = [line for line in others if line not in able]
        assert waiting
        assert all(jobs._next([line], [student.train()]) is None for line in waiting)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"methods": "sft,kll"}, "no method 'kll'"),
        ({"methods": "kl,kl"}, "a method stands twice"),
        ({"methods": " , "}, "names no method"),
        ({"seeds": ""}, "names no seed"),
        ({"parts": "map"}, "Add --study"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_runs(
    options: dict[str, str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as error:
        demo.demo(**{"methods": "sft", "seeds": "0", "parts": None, "study": False} | options)  # type: ignore[arg-type]
    assert told in str(error.value)
    assert capsys.readouterr().out == ""


def test_the_first_lines_say_what_is_learnt_from() -> None:
    told = demo.introduction()
    assert f"{ERROR:.0%}" in told
    assert "600 conversations" in told
    assert "test sets are the truth" in told


@pytest.mark.slow
def test_the_last_lines_are_the_table_and_the_verdicts_and_the_page_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [m for m in demo_models((0, 1)) if m.method in ("", "sft", "kl", "switch-kd")]
    results = make_store(tmp_path / "results", models, units=10)
    monkeypatch.setattr(demo, "RESULTS", results)
    monkeypatch.setattr(demo, "REPORT", tmp_path / "report")
    demo.tell_report(["sft", "kl", "switch-kd"], 60.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].startswith("1.0 minutes. Report: ")
    assert any("MMB-CN" in line for line in lines[1:-3])
    asked = [line.removeprefix("Verdict: ").split(" on the mini world")[0] for line in lines[-3:]]
    pairs = [("kl", "sft"), ("switch-kd", "kl"), ("switch-kd", "sft")]
    for said, pair in zip(asked, pairs, strict=True):
        assert {word for word in said.split() if word in ("sft", "kl", "switch-kd")} == set(pair)
    low, high = lines[-1].split("95 % interval ")[1].split(",")[0].split(" to ")
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert f"{low} to {high}" in page.replace("\u2212", "-")
