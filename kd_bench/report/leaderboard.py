"""A board -> the tables of a report: leaderboard, summary, published rows, run facts."""

from collections.abc import Iterable, Sequence
from typing import Literal

from kd_bench.records import AVERAGE
from kd_bench.report.board import ROLE_TITLES, Board, Entry, Score
from kd_bench.report.tables import Cell, Column, Kind, Row, Table

__all__ = [
    "SUMMARY_COLUMNS",
    "Mode",
    "benchmark_table",
    "emphasis_of",
    "leaderboard",
    "summary",
    "terminal_tables",
    "values_of",
]

Mode = Literal["scores", "differences", "retention"]
MINI = "embedded mini world: not the real benchmarks"


class _Notes:
    """Numbers each distinct note once, in order of appearance."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: Iterable[str]) -> tuple[int, ...]:
        found = []
        for text in texts:
            if text not in self.texts:
                self.texts.append(text)
            found.append(self.texts.index(text))
        return tuple(found)


def suite_label(board: Board) -> str:
    """What was measured, with the warning that mini scores need."""
    return f"Suite {board.suite} ({MINI})" if board.mini else f"Suite {board.suite}"


def leaderboard(board: Board, mode: Mode = "scores") -> Table:
    """Every column of the leaderboard: benchmarks, average, relations, cost."""
    notes = _Notes()
    columns = [Column("model", "Model", "text")]
    kind: Kind = {"scores": "score", "differences": "difference", "retention": "percent"}[mode]  # type: ignore[assignment]
    columns += [Column(task.id, task.short, kind, task.group) for task in board.tasks]
    columns.append(Column(AVERAGE, board.average_title, kind, "overall"))
    columns += SUMMARY_COLUMNS
    rows = []
    for entry in board.entries:
        cells = [_name_cell(entry, notes)]
        cells += [_score_cell(board, entry, task.id, mode, notes) for task in board.tasks]
        cells.append(_score_cell(board, entry, AVERAGE, mode, notes))
        cells += _summary_cells(entry)
        rows.append(Row(entry.key, tuple(cells), ROLE_TITLES.get(entry.role, entry.role)))
    title = {"scores": "Leaderboard", "differences": "Differences from SFT, in points"}.get(
        mode, "Retention: share of the teacher's score, in percent"
    )
    return Table(title, tuple(columns), tuple(rows), _caption(board), tuple(notes.texts))


def terminal_tables(board: Board) -> list[Table]:
    """What a terminal shows: the summary, then the benchmarks."""
    return [summary(board), benchmark_table(board)] if board.entries else [summary(board)]


SUMMARY_COLUMNS = (
    Column("difference", "Δ SFT", "difference", "relation"),
    Column("retention", "Retention", "percent", "relation"),
    Column("gap_closed", "Gap closed", "percent", "relation"),
    Column("parameters", "Params", "count", "cost"),
    Column("weight_bytes", "Weights", "bytes", "cost"),
    Column("latency_ms", "Latency", "milliseconds", "cost"),
    Column("peak_memory_bytes", "Memory", "bytes", "cost"),
)


def summary(board: Board) -> Table:
    """The leaderboard without benchmarks: rank, average, relations, cost."""
    notes = _Notes()
    columns = (
        Column("model", "Model", "text"),
        Column("rank", "Rank", "rank", "overall"),
        Column(AVERAGE, board.average_title, "score", "overall"),
        *SUMMARY_COLUMNS,
    )
    rows = tuple(
        Row(
            entry.key,
            (
                _name_cell(entry, notes),
                Cell(entry.score(AVERAGE).rank),
                _score_cell(board, entry, AVERAGE, "scores", notes),
                *_summary_cells(entry),
            ),
            ROLE_TITLES.get(entry.role, entry.role),
        )
        for entry in board.entries
    )
    return Table("Summary", columns, rows, _caption(board), tuple(notes.texts))


def benchmark_table(board: Board) -> Table:
    """The leaderboard's benchmark columns alone, for narrow places."""
    notes = _Notes()
    columns = [Column("model", "Model", "text")]
    columns += [Column(task.id, task.short, "score", task.group) for task in board.tasks]
    rows = tuple(
        Row(
            entry.key,
            (
                Cell(entry.label),
                *(_score_cell(board, entry, task.id, "scores", notes) for task in board.tasks),
            ),
            ROLE_TITLES.get(entry.role, entry.role),
        )
        for entry in board.entries
    )
    return Table("Benchmarks", tuple(columns), rows, "", tuple(notes.texts))


def _caption(board: Board) -> str:
    seeds = any(len(entry.runs) > 1 for entry in board.entries)
    parts = [suite_label(board) + "."]
    if seeds:
        parts.append("± is the spread over training seeds.")
    if board.floor is not None:
        parts.append("Δ SFT is in points, with its 95 % interval where one could be had.")
    return " ".join(parts)


def _name_cell(entry: Entry, notes: _Notes) -> Cell:
    return Cell(entry.label, notes=notes(entry.health))


def values_of(entry: Entry, mode: Mode) -> dict[str, Score]:
    """An entry's numbers by benchmark in one of the three views."""
    return {
        "scores": entry.scores,
        "differences": entry.differences,
        "retention": entry.retentions,
    }[mode]


def _score_cell(board: Board, entry: Entry, key: str, mode: Mode, notes: _Notes) -> Cell:
    score = values_of(entry, mode).get(key)
    if score is None or not score.known:
        return Cell(None)
    emphasis: Literal["", "best", "second"] = ""
    if mode == "scores":
        emphasis = emphasis_of(board, entry, key)
    return Cell(score.value, score.spread, score.interval, emphasis, notes(score.marks))


def emphasis_of(board: Board, entry: Entry, key: str) -> Literal["", "best", "second"]:
    """Best and second by rank among the students; none where nobody can be told apart."""
    ranks = sorted({r for e in board.students if (r := e.score(key).rank) is not None})
    rank = entry.score(key).rank
    if rank is None or len(ranks) < 2 or rank not in ranks[:2]:
        return ""
    return "best" if rank == ranks[0] else "second"


def _summary_cells(entry: Entry) -> Sequence[Cell]:
    difference = entry.differences.get(AVERAGE)
    retention = entry.retentions.get(AVERAGE)
    gap = entry.gap_closed
    return (
        Cell(difference.value, None, difference.interval) if difference else Cell(),
        Cell(retention.value, None, retention.interval) if retention else Cell(),
        Cell(gap.value, None, gap.interval) if gap.known else Cell(),
        Cell(entry.cost.parameters),
        Cell(entry.cost.weight_bytes),
        Cell(entry.cost.latency_ms),
        Cell(entry.cost.peak_memory_bytes),
    )
