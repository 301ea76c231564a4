"""Plots: valid SVG in the page's colours, equal for equal data, honest about what is missing."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from kd_bench.report.board import Board, load_board
from kd_bench.report.history import logs_of
from kd_bench.report.leaderboard import leaderboard
from kd_bench.report.plots import board_plots, group_scores, measure
from kd_bench.report.relations import read_evidence, relate
from kd_bench.report.style import DARK, LIGHT, Plot, css_series, marker, spread_out
from tests.support.report_store import Model, add_run, make_demo
from tests.support.svg_reading import read_svg


@pytest.fixture(scope="module")
def plots(tmp_path_factory: pytest.TempPathFactory) -> list[Plot]:
    board = load_board(make_demo(tmp_path_factory.mktemp("demo"), units=5, seeds=(0,)))
    evidence = read_evidence(board, 100)
    logs = {entry.key: logs_of(entry) for entry in board.entries}
    return board_plots(relate(board, evidence), evidence, logs)


@pytest.mark.slow
def test_svg_parses_and_ids_do_not_meet_on_one_page(plots: list[Plot]) -> None:
    ids: list[str] = []
    for plot in plots:
        for text in (plot.svg, plot.standalone()):
            ElementTree.fromstring(text)
        ids += re.findall(r'\bid="([^"]*)"', plot.svg)
        for target in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', plot.svg):
            assert "".join(target) in re.findall(r'\bid="([^"]*)"', plot.svg)
    assert len(ids) == len(set(ids))


def test_colours_follow_the_theme(plots: list[Plot]) -> None:
    for plot in plots:
        assert set(re.findall(r"#[0-9a-fA-F]{6}\b", plot.svg)) <= set()
        assert set(re.findall(r"var\(--(\w+)", plot.svg)) <= set(LIGHT) | {"font"}
        assert "prefers-color-scheme:dark" in plot.standalone()
    assert set(LIGHT) == set(DARK)


def test_every_plot_says_in_words_what_it_shows(plots: list[Plot]) -> None:
    for plot in plots:
        assert plot.summary.endswith((".", "!"))
        assert f'role="img" aria-label="{plot.summary[:10]}' in plot.svg


def test_plots_are_small_enough_to_inline(plots: list[Plot]) -> None:
    assert sum(len(plot.svg) for plot in plots) < 600_000


@pytest.mark.slow
def test_a_board_without_relations_evidence_what_it_can(tmp_path: Path) -> None:
    add_run(tmp_path, Model("alone", "student", "", 0.4), tasks=("gqa", "mme"), units=4)
    board = load_board(tmp_path)
    evidence = read_evidence(board, 50)
    names = [plot.name for plot in board_plots(relate(board, evidence), evidence)]
    assert names == ["bars", "reliability"]


def test_group_scores_are_means_over_the_groups_benchmarks(tmp_path: Path) -> None:
    add_run(tmp_path, Model("alone", "student", "", 0.4), units=4)
    board = load_board(tmp_path)
    (entry,) = board.entries
    groups = group_scores(board, entry)
    assert len(groups) == 5
    members = [entry.score(task.id).value for task in board.tasks if task.group == "domain"]
    assert groups["domain"] == pytest.approx(sum(members) / len(members))


def test_expected_calibration_error_by_hand() -> None:
    found = measure([0.95, 0.95, 0.95, 0.95, 0.55, 0.55], [1, 1, 1, 0, 0, 1])
    assert found is not None
    assert found.counts == [2, 4]
    assert found.accuracy == pytest.approx([50.0, 75.0])
    assert found.error == pytest.approx((2 * 5 + 4 * 20) / 6)
    assert measure([float("nan")], [1.0]) is None


def test_a_calibrated_model_has_no_calibration_error() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.random(200_000)
    found = measure(confidence, generator.random(200_000) < confidence)
    assert found is not None
    assert found.error < 0.7


def test_labels_keep_apart_and_near() -> None:
    placed = spread_out([10.0, 10.5, 11.0, 50.0], 5.0)
    gaps = np.diff(sorted(placed))
    assert min(gaps) >= 5.0 - 0.2
    assert placed[3] == 50.0


def many(folder: Path, count: int) -> Board:
    """SFT and equal-sized methods, one seed each, whose latency was measured differently."""
    for number in range(count):
        role = "kd" if number else "sft"
        model = Model(f"m{number}", role, f"m{number}", 0.1 * number, 0, 220_000, 8.7 + number)
        add_run(folder, model, tasks=("gqa", "pope"), units=6)
    board = load_board(folder)
    return relate(board, read_evidence(board, 50))


def drawn(board: Board, folder: Path) -> dict[str, Plot]:
    found = {plot.name: plot for plot in board_plots(board, read_evidence(board, 50))}
    for plot in found.values():
        (folder / f"{plot.name}.svg").write_text(plot.standalone())
    return found


@pytest.mark.slow
def test_every_method_is_in_the_forest_or_counted(tmp_path: Path) -> None:
    board = many(tmp_path / "results", 12)
    plots = drawn(board, tmp_path)
    for name, count in (("forest", 11),):
        _, colors = read_svg(tmp_path / f"{name}.svg")
        assert len(colors) == len(set(colors.values())) == count
        assert "more" not in plots[name].summary
        assert "largest" not in plots[name].summary
    board = many(tmp_path / "larger", 20)
    assert (
        "3 more, of lower average, stand in the table" in drawn(board, tmp_path)["forest"].summary
    )


@pytest.mark.slow
def test_equal_models_stand_at_one_latency_with_its_range(tmp_path: Path) -> None:
    """Their times differ by noise alone; labels stay beside their points, by a line if moved."""
    board = many(tmp_path / "results", 6)
    drawn(board, tmp_path)
    panels, _ = read_svg(tmp_path / "pareto.svg")
    panel = next(p for p in panels if any(t.text.startswith("Latency") for t in p.texts))
    points = [s for s in panel.shapes if s.marker and s.clipped]
    assert len(points) == 6
    assert {round(panel.x(p.points[0][0]), 1) for p in points} == {11.7}
    assert len({p.color for p in points}) == 6
    for point in points:
        ((start, end),) = panel.lines(point.color)
        assert (panel.x(start[0]), panel.x(end[0])) == pytest.approx((8.7, 13.7), abs=0.05)
    table = leaderboard(board)
    latency = [column.key for column in table.columns].index("latency_ms")
    assert {row.cells[latency].interval.low for row in table.rows} == {8.7}  # type: ignore[union-attr]


def test_colours_do_not_repeat_among_eighteen_methods() -> None:
    methods = [css_series(number) for number in range(2, 20)]
    assert len(set(methods)) == 18
    assert len({LIGHT[f"s{number}"] for number in methods}) == 18
    assert len({DARK[f"s{number}"] for number in methods}) == 18
    pairs = {(css_series(number), marker(number)) for number in range(2, 80)}
    assert len(pairs) == 78
