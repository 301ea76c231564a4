"""Reports from stored runs: terminal, Markdown, CSV, LaTeX, JSON and a self-contained page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_report", "render_report"]


def render_report(
    results: Path,
    destination: Path,
    names: Sequence[str] | None = None,
    *,
    suite: str | None = None,
) -> Path:
    """Render the named runs (default: all) of one suite; returns the path of `index.html`.

    Args:
        results: the store.
        names: runs, run id prefixes or model names, as `store.find_run` takes them.
        suite: default: that of the newest run.

    Raises:
        UsageError: a name fits no run.
    """
    from kd_bench.report.frames import load_board
    from kd_bench.report.page import render
    from kd_bench.report.uncertainty import draw_scores, relate

    board = load_board(results, names, suite)
    draws = draw_scores(board)
    return render(relate(board, draws), destination, draws=draws)


def print_report(
    results: Path,
    names: Sequence[str] | None = None,
    *,
    suite: str | None = None,
    console: "Console | None" = None,
    width: int = 100,
) -> str:
    """The leaderboard as text, at most `width` columns; printed where a console is given."""
    from kd_bench.report.frames import load_board
    from kd_bench.report.leaderboard import benchmark_table, summary
    from kd_bench.report.tables import to_terminal
    from kd_bench.report.uncertainty import draw_scores, relate

    board = load_board(results, names, suite)
    board = relate(board, draw_scores(board))
    parts = [
        to_terminal(table, console, width) for table in (summary(board), benchmark_table(board))
    ]
    return "\n".join(parts)
