"""What changes over time: training logs as they are found, and every finished run by date.

Logs are whole, torn, in stages, or not there; a run is compared with the baseline of its day.
"""

import csv
import json
import math
import re
from datetime import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kd_bench.cli import app
from kd_bench.errors import UsageError
from kd_bench.report.board import load_board
from kd_bench.report.history import logs_of, read_log, render_training
from kd_bench.report.plots import POINTS, thin
from kd_bench.store import MOVES, Run, baseline_moves, set_baseline
from tests.support.report_store import Model, add_run, add_training
from tests.support.svg_reading import read_svg

# --- training ------------------------------------------------------------------------------------


MODEL = Model("kd-0", "kd", "switch-kd", 0.5, 0)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_stages_are_laid_end_to_end(tmp_path: Path) -> None:
    log = read_log(
        write(
            tmp_path / "train_log.jsonl",
            {"stage": "a", "step": 10, "loss": 3.0, "terms": {"ce": 3.0}},
            {"stage": "a", "step": 20, "loss": 2.0, "terms": {"ce": 2.0}},
            {"stage": "b", "step": 10, "loss": 1.5, "terms": {"ce": 1.0, "dbild": 0.5}},
        )
    )
    assert log is not None
    assert log.steps == (10.0, 20.0, 30.0)
    assert log.stages == (("a", 0.0), ("b", 20.0))
    assert log.terms["ce"] == (3.0, 2.0, 1.0)
    assert math.isnan(log.terms["dbild"][0])
    assert log.terms["dbild"][2] == 0.5


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "train_log.jsonl", {"step": 1, "loss": 2.0}, [1], {"other": 1})
    with path.open("ab") as stream:
        stream.write(b'\xff\xfe{"step": 2, "lo')
    log = read_log(tmp_path)
    assert log is not None
    assert log.terms == {"loss": (2.0,)}


def test_settings_of_a_log_line_are_not_losses(tmp_path: Path) -> None:
    add_training(tmp_path / "run", MODEL, steps=30)
    log = read_log(tmp_path / "run")
    assert log is not None
    assert set(log.terms) == {"loss", "ce", "dbild", "vsd"}
    assert "knee_teacher_p50" in log.knees


def test_the_log_beside_a_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoint = add_training(tmp_path / "trained", MODEL, steps=30)
    add_run(tmp_path, MODEL, tasks=("gqa",), units=3, checkpoint=str(checkpoint))
    (entry,) = load_board(tmp_path).entries
    assert [log.name for log in logs_of(entry)] == ["kd-0"]


def test_a_missing_log_is_no_error(tmp_path: Path) -> None:
    add_run(tmp_path, MODEL, tasks=("gqa",), units=3, checkpoint="/nowhere/final")
    (entry,) = load_board(tmp_path).entries
    assert logs_of(entry) == []


def test_a_training_without_a_step_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="logged step"):
        render_training([tmp_path], tmp_path / "out")


def test_long_curves_are_thinned_to_means() -> None:
    x, y = thin(range(10_000), [float(i % 2) for i in range(10_000)])
    assert len(x) <= POINTS
    assert all(0.4 < value < 0.6 for value in y)
    assert thin([1, 2, 3], [1.0, math.nan, 3.0]) == ([1, 3], [1.0, 3.0])


# --- trend ---------------------------------------------------------------------------------------


WEEKS = {"first": (0.2, "01"), "second": (0.5, "08"), "third": (0.9, "15"), "fourth": (0.7, "22")}
TWO = ("gqa", "pope")


@pytest.fixture(scope="module")
def weekly(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Run]]:
    """Four weekly candidates; the baseline moved from the first to the third."""
    results = tmp_path_factory.mktemp("weekly") / "results"
    runs = {
        name: add_run(results, Model(name, "student", "", skill), tasks=TWO, units=20,
                      created=f"2026-06-{day}T09:00:00+00:00")
        for name, (skill, day) in WEEKS.items()
    }  # fmt: skip
    for name in ("first", "third"):
        set_baseline(results, "mini", runs[name], allow_subset=True)
    days = {"first": "02", "third": "16"}
    lines = [json.loads(line) for line in (results / MOVES).read_text().splitlines()]
    for line, day in zip(lines, days.values(), strict=True):
        line["time"] = f"2026-06-{day}T00:00:00+00:00"
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"time": "torn'
    (results / MOVES).write_text(text)
    return results, runs


def average(run: Run) -> float:
    scores = [json.loads((run.path / "tasks" / f"{t}.json").read_text())["score"] for t in TWO]
    return sum(scores) / len(scores)


def test_moves_are_written_down(weekly: tuple[Path, dict[str, Run]]) -> None:
    results, runs = weekly
    moves = baseline_moves(results)
    assert [(name, run) for _, name, run in moves] == [
        ("mini", runs["first"].path.name), ("mini", runs["third"].path.name),
    ]  # fmt: skip
    assert moves[0][0] == datetime.fromisoformat("2026-06-02T00:00:00+00:00")


def test_table_and_plot_have_the_stored_numbers(
    weekly: tuple[Path, dict[str, Run]], tmp_path: Path
) -> None:
    results, runs = weekly
    words = ["report", "--trend", "--results", str(results), "--to", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((tmp_path / "trend.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == list(WEEKS)
    then = {"first": "none", "second": "first", "third": "first", "fourth": "third"}
    for row in rows:
        own = average(runs[row["model"]])
        assert float(row["average"]) == pytest.approx(own, rel=1e-5)
        assert float(row["average_low"]) < own < float(row["average_high"])
        name = then[row["model"]]
        if name == "none":
            assert row["change"] == ""
            assert row["baseline"] == "none"
        else:
            assert row["baseline"] == runs[name].path.name
            assert float(row["change"]) == pytest.approx(own - average(runs[name]), rel=1e-4)
    (panel,), colors = read_svg(tmp_path / "plots" / "trend.svg")
    for label, color in colors.items():
        (point,) = panel.markers(color)
        assert panel.y(point[1]) == pytest.approx(average(runs[label]), abs=0.2)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "The baseline moved 2 times: 2026-06-02: first; 2026-06-16: third." in page
    assert "Embedded mini world" in page


def test_the_page_has_the_rows_of_the_table(
    weekly: tuple[Path, dict[str, Run]], tmp_path: Path
) -> None:
    from kd_bench.report.history import render_trend

    page = render_trend(weekly[0], tmp_path).read_text(encoding="utf-8")
    body = page[page.index('<section id="trend"') :]
    for name, run in weekly[1].items():
        row = re.search(rf"<tr>(?:(?!</tr>).)*{re.escape(run.path.name)}</td>.*?</tr>", body)
        assert row is not None, name
        assert f">{average(run):.1f} [" in row.group()
