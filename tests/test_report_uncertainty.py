"""Intervals, ranks and relations against the statistics that they must come from."""

from pathlib import Path

import numpy as np
import pytest

from kd_bench.compare import compare_methods
from kd_bench.records import AVERAGE
from kd_bench.report.board import Board
from kd_bench.report.board_loading import load_board
from kd_bench.report.uncertainty import Draws, draw_scores, hybrid_gaps, relate
from tests.report_store import Model, add_run, demo_models, samples

TWO = ("gqa", "mme")


def board_of(results: Path, resamples: int = 500) -> tuple[Board, Draws]:
    board = load_board(results)
    draws = draw_scores(board, resamples)
    return relate(board, draws), draws


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("store")
    for model in demo_models(seeds=(0, 1)):
        add_run(results, model, tasks=TWO, units=20)
    return results


def entry(board: Board, name: str, role: str = "kd"):  # type: ignore[no-untyped-def]
    return next(e for e in board.entries if e.method == name and e.role == role)


def test_difference_from_sft_is_the_method_comparison(store: Path) -> None:
    board, _ = board_of(store, resamples=10_000)
    switch, floor = entry(board, "switch-kd"), entry(board, "sft", "sft")
    expected = compare_methods(floor.runs, switch.runs)
    for key, found in [*expected.tasks.items(), (AVERAGE, expected.average)]:
        shown = switch.differences[key]
        assert shown.value == pytest.approx(found.difference)
        assert shown.interval.low == pytest.approx(found.interval.low)
        assert shown.interval.high == pytest.approx(found.interval.high)
        assert shown.holds_seeds


def test_retention_and_gap_closed_by_hand(store: Path) -> None:
    board, _ = board_of(store)
    switch = entry(board, "switch-kd")
    top, low = board.teacher, board.floor
    assert top is not None
    assert low is not None
    own, ceiling, ground = (e.score(AVERAGE).value for e in (switch, top, low))
    assert switch.retentions[AVERAGE].value == pytest.approx(100 * own / ceiling)
    assert switch.gap_closed.value == pytest.approx(100 * (own - ground) / (ceiling - ground))
    assert (
        switch.gap_closed.interval.low < switch.gap_closed.value < switch.gap_closed.interval.high
    )
    assert top.retentions == {}
    assert low.differences == {}


def test_vision_and_language_gap_add_up_to_the_distance_from_the_teacher(store: Path) -> None:
    board, draws = board_of(store)
    (gap,) = hybrid_gaps(board, draws)
    assert gap.student.role == "kd"
    for key in (*TWO, AVERAGE):
        whole = board.teacher.score(key).value - gap.student.score(key).value  # type: ignore[union-attr]
        assert gap.vision[key].value + gap.language[key].value == pytest.approx(whole)


def test_equal_models_share_a_rank_and_a_better_one_leads(tmp_path: Path) -> None:
    same = samples("gqa", Model("twin", "kd", "", 0.0), units=40)
    better = same.assign(score=1.0)
    for name, frame in (("one", same), ("two", same.copy()), ("best", better)):
        add_run(tmp_path, Model(name, "kd", "", 0.0), tasks=("gqa",), change={"gqa": frame})
    board, _ = board_of(tmp_path)
    ranks = {e.name: e.score("gqa").rank for e in board.entries}
    assert ranks == {"one": 2, "two": 2, "best": 1}


def test_a_difference_within_noise_shares_the_rank(tmp_path: Path) -> None:
    base = samples("gqa", Model("twin", "kd", "", 0.0), units=40)
    flipped = base.copy()
    wrong = np.flatnonzero(flipped["score"] == 0)[:1]
    flipped.loc[flipped.index[wrong], "score"] = 1.0
    for name, frame in (("base", base), ("lucky", flipped)):
        add_run(tmp_path, Model(name, "kd", "", 0.0), tasks=("gqa",), change={"gqa": frame})
    board, _ = board_of(tmp_path)
    assert {e.score("gqa").rank for e in board.entries} == {1}


def test_samples_that_do_not_make_the_score_give_no_interval(tmp_path: Path) -> None:
    run = add_run(tmp_path, Model("a", "sft", "sft", 0.0, 0), tasks=("gqa",), units=10)
    frame = run.samples("gqa")
    run.commit(run.result("gqa"), frame.assign(score=1.0 - frame["score"]))
    draws = draw_scores(load_board(tmp_path), 50)
    assert draws.scores["gqa"] == {}


def test_unreadable_samples_cost_the_interval_only(tmp_path: Path) -> None:
    add_run(tmp_path, Model("a", "sft", "sft", 0.0, 0), tasks=("gqa",), units=10)
    run = add_run(tmp_path, Model("b", "kd", "kl", 0.5, 0), tasks=("gqa",), units=10)
    (run.path / "tasks" / "gqa.samples.parquet").write_bytes(b"PAR1 torn")
    board, _ = board_of(tmp_path, 50)
    found = next(e for e in board.entries if e.role == "kd").differences["gqa"]
    assert found.known
    assert found.interval is None


def test_other_documents_are_not_paired(tmp_path: Path) -> None:
    add_run(tmp_path, Model("a", "sft", "sft", 0.0, 0), tasks=("gqa",), units=10)
    add_run(tmp_path, Model("b", "kd", "kl", 0.0, 0), tasks=("gqa",), units=12)
    draws = draw_scores(load_board(tmp_path), 50)
    assert len(draws.scores["gqa"]) == 1


def test_a_teacher_below_the_floor_closes_no_gap(tmp_path: Path) -> None:
    for name, role, skill in (("t", "teacher", -2.0), ("s", "sft", 1.0), ("k", "kd", 1.5)):
        add_run(tmp_path, Model(name, role, "", skill), tasks=("gqa",), units=20)
    board, _ = board_of(tmp_path, 50)
    student = next(e for e in board.entries if e.role == "kd")
    assert not student.gap_closed.known
    assert student.differences[AVERAGE].known
