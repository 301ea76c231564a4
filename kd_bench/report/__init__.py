"""Reports from stored runs: terminal, Markdown, CSV, LaTeX, JSON and a self-contained page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kd_bench.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from kd_bench.compare.estimates import Evidence
    from kd_bench.report.board import Board
    from kd_bench.report.tables import Table

__all__ = ["Paper", "print_report", "render_report", "render_training", "render_trend"]


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
    from kd_bench.report.page import render
    from kd_bench.report.tables import to_terminal

    board, evidence = _load(results, names, suite, main)
    if not board.entries and not allow_empty:
        raise _nothing_to_show(results, board.left_out)
    tables = _tables(board, compare)
    text = None if paper is None else _paper(board, evidence, paper)
    page = render(board, destination, evidence, paper=text)
    if console is not None:
        for table in tables:
            to_terminal(table, console)
    return page


@dataclass(frozen=True)
class Paper:
    """What a paper's table shows; nothing named is everything.

    Attributes:
        benchmarks: ids or short titles.
        methods: rows by name, method or role.
    """

    benchmarks: Sequence[str] = ()
    methods: Sequence[str] = ()


def _paper(board: "Board", evidence: "Evidence", paper: Paper) -> str:
    """`paper.tex`; its ranks and its average are of what it shows."""
    from kd_bench.compare.estimates import Evidence
    from kd_bench.report.paper import choose, to_paper
    from kd_bench.report.relations import relate

    chosen = choose(board, paper.benchmarks, paper.methods)
    kept = {task.id: evidence.tasks[task.id] for task in chosen.tasks if task.id in evidence.tasks}
    return to_paper(relate(chosen, Evidence(kept)))


def _nothing_to_show(results: Path, left_out: Sequence[str]) -> UsageError:
    """Why there is no page: no such folder, no run in it, or none that can be read."""
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        problem = f"No run below {results} can be shown: {left_out[0]}{more}."
        return UsageError(problem, "`kd-bench runs fsck` explains.")
    other = sorted(
        {
            manifest.parents[2]
            for start in {results, Path()}
            for pattern in ("runs/*", "*/runs/*", "*/*/runs/*")
            for manifest in start.glob(f"{pattern}/manifest.json")
        }
        - {results}
    )
    state = "holds no runs" if results.is_dir() else "is not a folder"
    if other:
        hint = "There are runs in " + ", ".join(f"{path} (--results {path})" for path in other[:3])
        return UsageError(f"{results} {state}.", hint + ".")
    hint = "`kd-bench eval CHECKPOINT` makes one; --results names the folder."
    return UsageError(f"{results} {state}.", hint)


def print_report(
    results: Path, names: Sequence[str] | None = None, *, compare: str | None = None
) -> str:
    """The same tables as text of at most 100 columns, without a page; raises the same."""
    from kd_bench.report.tables import to_terminal

    board, _ = _load(results, names, None, None)
    return "\n".join(to_terminal(table) for table in _tables(board, compare))


def _load(
    results: Path, names: Sequence[str] | None, suite: str | None, main: str | None
) -> "tuple[Board, Evidence]":
    """The board with differences, retention and ranks, and the evidence that they come from."""
    from kd_bench.report.board_loading import load_board
    from kd_bench.report.relations import read_evidence, relate

    board = load_board(results, names, suite)
    evidence = read_evidence(board)
    return relate(board, evidence, main), evidence


def _tables(board: "Board", compare: str | None) -> "list[Table]":
    """What stands on a terminal; refuses before anything is written."""
    from kd_bench.report.leaderboard import terminal_tables
    from kd_bench.report.published import comparison

    tables = terminal_tables(board)
    return tables if compare is None else [*tables, comparison(board, compare)]


def render_training(trainings: Sequence[Path], destination: Path) -> Path:
    """Plot training folders, unfinished ones too; returns the path of `index.html`.

    Raises:
        UsageError: a folder has no log.
    """
    from kd_bench.report.training_page import render_training as render

    return render(trainings, destination)


def render_trend(
    results: Path,
    destination: Path,
    names: Sequence[str] | None = None,
    *,
    suite: str | None = None,
) -> Path:
    """The averages of a suite's runs by date and the baseline's moves; returns `index.html`.

    Raises:
        UsageError: there is no finished run of that suite.
    """
    from kd_bench.report.trend import render_trend as render

    return render(results, destination, names, suite=suite)
