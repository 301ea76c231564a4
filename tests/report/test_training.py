"""Training logs as they are found: whole, torn, in stages, or not at all."""

import json
import math
from pathlib import Path

import pytest

from kd_bench.errors import UsageError
from kd_bench.report.board import load_board
from kd_bench.report.history import logs_of, read_log, render_training
from kd_bench.report.plots import POINTS, thin
from tests.support.report_store import Model, add_run, add_training

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
