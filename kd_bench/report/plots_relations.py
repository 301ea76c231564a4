"""Plots of how models relate: differences from SFT, retention, vision and language gaps."""

from collections.abc import Iterable, Sequence
from typing import Any

from kd_bench.compare.estimates import Evidence
from kd_bench.records import AVERAGE
from kd_bench.report.board import Board, Entry, Score
from kd_bench.report.relations import hybrid_gaps
from kd_bench.report.style import (
    GRID,
    INK,
    MUTED,
    WIDTH,
    Plot,
    canvas,
    colours,
    legend,
    marker,
    series,
    short,
    to_plot,
)
from kd_bench.report.tables import clean

SHOWN = 16  # more intervals side by side cannot be read


def _keys(board: Board) -> list[tuple[str, str]]:
    """The average first, then the benchmarks, as (key, title)."""
    tasks = [(task.id, clean(task.short)) for task in board.tasks]
    return [(AVERAGE, board.average_title), *tasks]


def forest(board: Board) -> Plot | None:
    """Difference from SFT by benchmark, with intervals."""
    entries = [e for e in board.students if e.differences]
    if not entries or board.floor is None:
        return None
    figure = _side_by_side(
        board,
        [(entry, entry.differences) for entry in entries[:SHOWN]],
        reference=0,
        label=f"Points above {short(board.floor.name)}",
    )
    level = _level(score for entry in entries for score in entry.differences.values())
    summary = f"Points above plain fine-tuning{level}.{_more(entries)}"
    return to_plot(figure, "forest", "Difference from SFT", summary)


def retention(board: Board) -> Plot | None:
    """Share of the teacher's score by benchmark."""
    entries = [e for e in board.students if e.retentions]
    if not entries or board.teacher is None:
        return None
    figure = _side_by_side(
        board,
        [(entry, entry.retentions) for entry in entries[:SHOWN]],
        reference=100,
        label=f"Percent of the score of {short(board.teacher.name)}",
    )
    level = _level(score for entry in entries for score in entry.retentions.values())
    summary = f"Percent of the teacher's score that a student keeps{level}; 100 is the teacher."
    summary += _more(entries)
    return to_plot(figure, "retention", "Retention", summary)


def _level(scores: Iterable[Score]) -> str:
    levels = sorted({f"{100 * s.interval.level:g} %" for s in scores if s.interval is not None})
    return f", with {' and '.join(levels)} intervals" if levels else ""


def _more(entries: Sequence[Entry]) -> str:
    """What is not drawn must not be thought to be absent."""
    more = len(entries) - SHOWN
    return f" {more} more, of lower average, stand in the table alone." if more > 0 else ""


def _side_by_side(
    board: Board, rows: list[tuple[Entry, dict[str, Score]]], *, reference: float, label: str
) -> Any:
    """One row a benchmark; the entries' points and intervals stand below each other in it."""
    figure, axes = canvas(WIDTH, 0.7 + (len(board.tasks) + 1) * (0.16 + 0.11 * len(rows)))
    numbers = colours(board)
    keys = _keys(board)
    step = 0.72 / len(rows)
    for row, (key, _) in enumerate(keys):
        for place, (entry, scores) in enumerate(rows):
            score = scores.get(key)
            if score is None or not score.known:
                continue
            y = row + (place - (len(rows) - 1) / 2) * step
            number = numbers[entry.key]
            if score.interval is not None:
                ends = [score.interval.low, score.interval.high]
                axes.plot(ends, [y, y], color=series(number), linewidth=1.3)
            axes.plot(
                score.value, y, marker=marker(number), color=series(number), markersize=4.2,
                linestyle="", label=short(entry.name) if row == 0 else None,
            )  # fmt: skip
    _benchmark_axis(axes, keys)
    axes.axvline(reference, color=INK, linewidth=0.9)
    axes.set_xlabel(label)
    legend(figure, axes)
    return figure


def _benchmark_axis(axes: Any, keys: list[tuple[str, str]]) -> None:
    """Titles from top to bottom; the average, which comes first, stands apart."""
    axes.set_yticks(range(len(keys)), [title for _, title in keys])
    axes.set_ylim(len(keys) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    if keys[0][0] == AVERAGE:
        axes.axhline(0.5, color=MUTED, linewidth=0.8)
        axes.get_yticklabels()[0].set_fontweight("bold")


def gaps(board: Board, evidence: Evidence) -> Plot | None:
    """What the student's vision and what its language model cost, from the switch hybrid."""
    found = hybrid_gaps(board, evidence)
    if not found:
        return None
    gap = found[0]
    keys = [(key, title) for key, title in _keys(board) if key in gap.vision]
    figure, axes = canvas(WIDTH, 0.7 + 0.36 * len(keys))
    parts = (("Vision gap: teacher − hybrid", gap.vision, 7, -0.19),
             ("Language gap: hybrid − student", gap.language, 6, 0.19))  # fmt: skip
    for name, scores, number, shift in parts:
        for row, (key, _) in enumerate(keys):
            score = scores[key]
            y = row + shift
            axes.barh(
                y, score.value, height=0.34, color=series(number),
                label=name if row == 0 else None,
            )  # fmt: skip
            if score.interval is not None:
                ends = [score.interval.low, score.interval.high]
                axes.plot(ends, [y, y], color=INK, linewidth=0.9)
    _benchmark_axis(axes, keys)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_xlabel("Points")
    axes.spines["bottom"].set_color(GRID)
    legend(figure, axes, columns=2)
    student, hybrid = clean(gap.student.name), clean(gap.hybrid.name)
    summary = (
        f"{hybrid} has the vision of {student} and the teacher's language model. "
        "What it loses to the teacher is vision; what it has over the student is language."
    )
    return to_plot(figure, "gaps", "Vision gap and language gap", summary)
