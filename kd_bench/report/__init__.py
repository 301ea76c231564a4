"""Reports from stored runs: terminal, Markdown, CSV, LaTeX, JSON and a self-contained page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd_bench.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from kd_bench.report.papers import Paper


def render_report(
    results: Path,
    destination: Path,
    names: Sequence[str] | None = None,
    *,
    suite: str | None = None,
    compare: str | None = None,
    main: str | None = None,
    paper: "Paper | None" = None,
    console: "Console | None" = None,
    allow_empty: bool = True,
) -> Path:
    """Render the named runs (default: all) of one suite; returns the path of `index.html`.

    Args:
        results: the store.
        names: runs, run id prefixes or model names, as `store.find_run` takes them.
        suite: default: that of the newest run.
        compare: `paper` also prints the measured rows beside the Switch-KD paper's.
        main: name or method of the row that the headline is about; default: what holds over all.
        paper: which benchmarks and rows `paper.tex` holds; None writes no such file.
        console: where the tables are printed too; None prints nothing.
        allow_empty: False refuses a page without a single run instead of writing it.

    Raises:
        UsageError: a name fits no run, or there is nothing of that name to compare with.
        NotComparableError: mini scores were to stand beside the paper's.
    """
    from kd_bench.report.history import logs_of
    from kd_bench.report.leaderboard import terminal_tables
    from kd_bench.report.page import render
    from kd_bench.report.papers import comparison, to_paper
    from kd_bench.report.relations import read_board
    from kd_bench.report.tables import to_terminal

    board, evidence = read_board(results, names, suite, main)
    if not board.entries and not allow_empty:
        raise _nothing_to_show(results, board.left_out)
    tables = terminal_tables(board)
    if compare is not None:
        tables.append(comparison(board, compare))
    text = None if paper is None else to_paper(board, evidence, paper)
    logs = {entry.key: logs_of(entry) for entry in board.entries}
    page = render(board, destination, evidence, logs, text)
    if console is not None:
        for table in tables:
            to_terminal(table, console, console.width)
    return page


def _nothing_to_show(results: Path, left_out: Sequence[str]) -> UsageError:
    """Why there is no page: no such folder, no run in it, or none that can be read."""
    from kd_bench.store import runs_elsewhere

    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        problem = f"No run below {results} can be shown: {left_out[0]}{more}."
        return UsageError(problem, "`kd-bench runs fsck` explains.")
    state = "holds no runs" if results.is_dir() else "is not a folder"
    other = runs_elsewhere(results)
    hint = other or "`kd-bench eval CHECKPOINT` makes one; --results names the folder."
    return UsageError(f"{results} {state}.", hint)
