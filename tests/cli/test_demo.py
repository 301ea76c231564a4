"""What the demo and the study run, and what they say at the end."""

import csv
from pathlib import Path

import pytest

pytest.importorskip("PIL")

from kd_bench.cli import demo
from kd_bench.cli.demo import Student
from kd_bench.distill.recipe import load_recipe
from kd_bench.world.build import ERROR, LABELLED, STUDY_ERRORS
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


def test_the_first_lines_say_what_is_learnt_from() -> None:
    told = demo.introduction()
    assert f"{ERROR:.0%}" in told
    assert "600 conversations" in told
    assert "test sets are right" in told


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


def test_the_map_has_every_cell_once_and_begins_with_the_demos() -> None:
    every = demo.cells()
    assert len({(cell.error, cell.count) for cell in every}) == len(every) == 16
    source = load_recipe("mini").data
    assert source is not None
    assert (every[0].error, every[0].count) == (round(100 * ERROR), source.limit)
    assert max(cell.count for cell in every) == LABELLED


@pytest.mark.slow
def test_every_cell_finds_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_BENCH_CACHE", str(tmp_path))
    from kd_bench.distill.conversations import read_conversations

    labels = []
    for error in STUDY_ERRORS:
        cell = demo.Cell(round(100 * error), 300)
        source = resolved(cell.student("kl", 0)).data  # type: ignore[attr-defined]
        found, broken = read_conversations(source)
        assert len(found) == 300
        assert not broken
        labels.append([turn.pieces for one in found for turn in one.turns])
    demos, _ = read_conversations(load_recipe("mini", ["data.limit=300"]).data)
    assert [turn.pieces for one in demos for turn in one.turns] in labels


@pytest.mark.slow
def test_the_map_is_of_the_cells_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STUDY_RESULTS", tmp_path / "results")
    monkeypatch.setattr(demo, "MAP", tmp_path / "map")
    cell = demo.Cell(25, 600)
    make_store(tmp_path / "results" / cell.name, units=12)
    demo.write_map()
    with (tmp_path / "map" / "map.csv").open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert {(row["wrong_percent"], row["conversations"]) for row in table} == {("25", "600")}
    by_method = {row["method"]: row for row in table}
    assert by_method["sft"]["above_sft"] == ""
    assert float(by_method["kl"]["low"]) < float(by_method["kl"]["above_sft"])
    assert by_method["switch-kd"]["seeds"] == "3"
    drawn = (tmp_path / "map" / "map.svg").read_text(encoding="utf-8")
    assert "in 1 of 16 cells" in drawn
    assert all(f"{error} % wrong" in drawn for error in (0, 10, 25, 40))
