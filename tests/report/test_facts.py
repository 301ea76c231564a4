"""Published rows and run facts: on one scale, apart from measured rows, with their marks."""

from dataclasses import replace
from pathlib import Path

import pytest

from kd_bench.errors import NotComparableError, UsageError
from kd_bench.report.board import load_board
from kd_bench.report.page import run_facts
from kd_bench.report.papers import paper_table, published_tables
from kd_bench.report.tables import Table
from tests.support.report_store import Model, add_run, printed


def cell(table: Table, row: int, key: str):  # type: ignore[no-untyped-def]
    index = [column.key for column in table.columns].index(key)
    return table.rows[row].cells[index]


def test_the_papers_rows_are_on_the_0_to_100_scale() -> None:
    main, rest = published_tables()
    assert main is not None
    assert rest is not None
    assert (len(main.rows), len(main.rows) + len(rest.rows)) == (6, 60)
    assert [cell(main, row, "method").value for row in range(3)] == [
        "TinyLLaVA", "LLaVA-KD", "Switch-KD",
    ]  # fmt: skip
    assert cell(main, 2, "mme").value == 66.8  # perception / 20 as printed
    assert cell(main, 3, "mme").value == pytest.approx(1289.2 / 20)
    for table in (main, rest):
        for row in range(len(table.rows)):
            value = cell(table, row, "mme").value
            assert value is None or 50 < value < 100


def test_columns_that_cannot_be_compared_say_so() -> None:
    main, _ = published_tables()
    assert main is not None
    marked = {c.key: main.notes[c.notes[0]] for c in main.columns if c.notes}
    assert marked["vqav2"].startswith("Not comparable: papers use test-dev")
    assert marked["mmbench_en"].startswith("Near:")
    assert "gqa" not in marked


def test_an_average_over_fewer_benchmarks_is_marked() -> None:
    main, _ = published_tables()
    assert main is not None
    assert cell(main, 2, "average").notes == ()
    (note,) = cell(main, 5, "average").notes
    assert "fewer benchmarks" in main.notes[note]


def test_measured_rows_stand_beside_the_paper_on_comparable_columns(tmp_path: Path) -> None:
    add_run(tmp_path, Model("mine", "kd", "switch-kd", 0.5, 0), units=4, suite="ten")
    board = load_board(tmp_path)
    table = paper_table(board)
    assert table is not None
    assert [row.section for row in table.rows] == ["Measured here"] + [
        "Switch-KD paper, 0.5B students"
    ] * 3
    fair = ("mme", "mmbench_en", "mmbench_cn", "gqa", "scienceqa_img", "mmmu", "pope")
    paper = [66.8, 63.5, 57.8, 61.6, 57.9, 29.8, 87.3]
    assert cell(table, 3, "average").value == pytest.approx(sum(paper) / len(fair))
    mine = [board.entries[0].score(task).value for task in fair]
    assert cell(table, 0, "average").value == pytest.approx(sum(mine) / len(fair))
    assert "Beside the paper" in printed(tmp_path, compare="paper")


def test_the_verdict_is_that_of_the_profile_that_was_measured(tmp_path: Path) -> None:
    run = add_run(tmp_path, Model("mine", "kd", "switch-kd", 0.5, 0), units=4, suite="ten")
    for task, profile in (("textvqa", "ocr"), ("pope", "llava")):
        run.commit(replace(run.result(task), profile=profile), run.samples(task))
    table = paper_table(load_board(tmp_path))
    assert table is not None
    marks = {c.key: [table.notes[n] for n in c.notes] for c in table.columns}
    assert marks["pope"] == []
    assert marks["textvqa"][0].startswith("Near: the tokens are the same")
    paper = [66.8, 63.5, 57.8, 61.6, 57.9, 29.8, 52.3, 87.3]  # with TextVQA
    assert cell(table, 3, "average").value == pytest.approx(sum(paper) / len(paper))


def test_a_benchmark_that_the_paper_lacks_has_an_empty_cell(tmp_path: Path) -> None:
    model = Model("mine", "kd", "switch-kd", 0.5, 0)
    run = add_run(tmp_path, model, tasks=("gqa",), planned=("gqa", "mine"), units=4, suite="ten")
    run.commit(replace(run.result("gqa"), task="mine"), run.samples("gqa"))
    table = paper_table(load_board(tmp_path))
    assert table is not None
    assert {len(row.cells) for row in table.rows} == {len(table.columns)}
    assert cell(table, 3, "mine").value is None
    assert cell(table, 3, "average").value == pytest.approx(61.6)


def test_mini_scores_never_stand_beside_published_ones(tmp_path: Path) -> None:
    add_run(tmp_path, Model("mine", "kd", "switch-kd", 0.5, 0), tasks=("gqa",), units=4)
    assert paper_table(load_board(tmp_path)) is None
    with pytest.raises(NotComparableError, match="mini world"):
        printed(tmp_path, compare="paper")
    with pytest.raises(UsageError, match="papre"):
        printed(tmp_path, compare="papre")


def test_run_facts_tell_how_to_make_the_number_again(tmp_path: Path) -> None:
    training = {"method": "switch-kd", "teacher": {"weights_sha256": "ab" * 32}, "stages": {}}
    model = Model("mine", "kd", "switch-kd", 0.5, 7)
    run = add_run(tmp_path, model, tasks=("gqa",), units=2, training=training)
    facts = dict(run_facts(run.manifest))
    assert facts["Command"] == "kd-bench eval checkpoints/mine --suite mini"
    assert facts["Seed"] == "7"
    assert facts["Weights digest"] == run.manifest.model.weights_digest
    assert facts["Training teacher weights sha256"] == "ab" * 32
    assert facts["Hardware cpu"] == "2 cores"
