"""Scores by category: the subsets of each benchmark, one row a subset, one column a model."""

from collections.abc import Iterator

import pandas as pd

from kd_bench.aggregators import get_aggregator, unit_statistics
from kd_bench.compare.estimates import Evidence, TaskEvidence
from kd_bench.errors import KdBenchError
from kd_bench.report.board import Board, TaskInfo
from kd_bench.report.relations import SCORED, profile_of
from kd_bench.report.tables import Cell, Column, Row, Table, clean

RESAMPLES = 2_000  # categories are many and small: enough draws for a 95 % interval


def category_tables(board: Board) -> list[Table]:
    """A table for each benchmark that has at least two named subsets; scores as it scores them."""
    return [table for task in board.tasks if (table := _table(board, task)) is not None]


def _table(board: Board, task: TaskInfo) -> Table | None:
    frames = dict(_frames(board, task.id))
    if not frames:
        return None
    first = next(iter(frames.values()))
    names = sorted({name for name in first["category"].astype(str) if name})
    if len(names) < 2:
        return None
    aggregator = get_aggregator(task.aggregator(profile_of(board, task.id))).category
    evidence = Evidence(
        {name: subset for name in names if (subset := _subset(aggregator, frames, name))}
    )
    entries = [e for e in board.entries if any(run.path.name in frames for run in e.runs)]
    columns = (
        Column("category", "Category", "text"),
        Column("n", "n", "rank"),
        *(Column(e.key, e.name, "score", interval=True) for e in entries),
    )
    rows = []
    for name in names:
        cells = [Cell(name), Cell(int((first["category"].astype(str) == name).sum()))]
        for entry in entries:
            group = [run.path.name for run in entry.runs]
            if not entry.score(task.id).comparable or not evidence.has(name, group):
                cells.append(Cell())
                continue
            found = evidence.score(name, group)
            scores = evidence.scores(name, group)
            spread = float(scores.std(ddof=1)) if len(scores) > 1 else None
            cells.append(Cell(found.value, spread, found.interval))
        rows.append(Row(name, tuple(cells)))
    return Table(f"{clean(task.title)} by category", columns, tuple(rows))


def _frames(board: Board, task: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Samples by run folder name, of the runs with the first one's documents."""
    documents: list[str] | None = None
    for entry in board.entries:
        for run, results in zip(entry.runs, entry.results, strict=True):
            if task not in results:
                continue
            try:
                frame = run.samples(task, SCORED).sort_values("document_id", ignore_index=True)
            except (KdBenchError, ValueError, KeyError, TypeError):
                continue  # a damaged file costs its column, not the report
            if documents is None:
                documents = frame["document_id"].tolist()
            if frame["document_id"].tolist() == documents:
                yield run.path.name, frame


def _subset(aggregator: str, frames: dict[str, pd.DataFrame], name: str) -> TaskEvidence | None:
    try:
        found = {
            run: unit_statistics(aggregator, frame[frame["category"].astype(str) == name])
            for run, frame in frames.items()
        }
        units = next(iter(found.values())).units
        values = {run: each.values for run, each in found.items()}
        return TaskEvidence.of(aggregator, units, values, RESAMPLES)
    except (ValueError, KeyError, TypeError):
        return None  # a subset that this benchmark's rule cannot score alone
