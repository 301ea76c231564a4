"""Reports from stored runs: terminal, Markdown, CSV, LaTeX, JSON and a self-contained page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from kd_bench.report.board import Board
    from kd_bench.report.tables import Table
    from kd_bench.report.uncertainty import Draws

__all__ = ["print_report", "render_report", "render_training"]


def render_report(
    results: Path,
    destination: Path,
    names: Sequence[str] | None = None,
    *,
    suite: str | None = None,
    compare: str | None = None,
    console: "Console | None" = None,
) -> Path:
    """Render the named runs (default: all) of one suite; returns the path of `index.html`.

    Args:
        results: the store.
        names: runs, run id prefixes or model names, as `store.find_run` takes them.
        suite: default: that of the newest run.
        compare: `paper` also prints the measured rows beside the Switch-KD paper's.
        console: where the tables are printed too; None prints nothing.

    Raises:
        UsageError: a name fits no run, or there is nothing of that name to compare with.
        NotComparableError: mini scores were to stand beside the paper's.
    """
    from kd_bench.report.page import render
    from kd_bench.report.tables_terminal import to_terminal

    board, draws = _load(results, names, suite)
    tables = _tables(board, compare)
    page = render(board, destination, draws)
    if console is not None:
        for table in tables:
            to_terminal(table, console)
    return page


def print_report(
    results: Path, names: Sequence[str] | None = None, *, compare: str | None = None
) -> str:
    """The same tables as text of at most 100 columns, without a page; raises the same."""
    from kd_bench.report.tables_terminal import to_terminal

    board, _ = _load(results, names, None)
    return "\n".join(to_terminal(table) for table in _tables(board, compare))


def _load(results: Path, names: Sequence[str] | None, suite: str | None) -> "tuple[Board, Draws]":
    """The board with differences, retention and ranks, and the draws that they come from."""
    from kd_bench.report.board_loading import load_board
    from kd_bench.report.uncertainty import draw_scores, relate

    board = load_board(results, names, suite)
    draws = draw_scores(board)
    return relate(board, draws), draws


def _tables(board: "Board", compare: str | None) -> "list[Table]":
    """What stands on a terminal; refuses before anything is written."""
    from kd_bench.report.facts import comparison
    from kd_bench.report.leaderboard import terminal_tables

    tables = terminal_tables(board)
    return tables if compare is None else [*tables, comparison(board, compare)]


def render_training(trainings: Sequence[Path], destination: Path) -> Path:
    """Plot training folders, unfinished ones too; returns the path of `index.html`.

    Raises:
        UsageError: a folder has no log.
    """
    from kd_bench.report.training_page import render_training as render

    return render(trainings, destination)
