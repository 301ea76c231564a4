"""Every plot of a report; drawn here are skill groups, benchmarks and score against cost."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from kd_bench.compare.estimates import Evidence
from kd_bench.records import AVERAGE
from kd_bench.report.board import Board, Entry, Score
from kd_bench.report.calibration import reliability
from kd_bench.report.plots_relations import forest, gaps, retention
from kd_bench.report.plots_training import knees, losses
from kd_bench.report.style import (
    GRID,
    INK,
    MUTED,
    PAPER,
    WIDTH,
    Plot,
    canvas,
    colours,
    legend,
    marker,
    plotting,
    series,
    short,
    spread_out,
    to_plot,
)
from kd_bench.report.tables import clean, format_number
from kd_bench.report.training import TrainingLog


def board_plots(
    board: Board, evidence: Evidence, logs: dict[str, list[TrainingLog]] | None = None
) -> list[Plot]:
    """Every plot that there is data for; `logs` are training logs by entry key."""
    if not board.entries:
        return []
    with plotting():
        drawn = [
            radar(board),
            bars(board),
            forest(board),
            retention(board),
            gaps(board, evidence),
            pareto(board),
            reliability(board),
            losses(board, logs or {}),
            knees(board, logs or {}),
        ]
    return [plot for plot in drawn if plot is not None]


def group_scores(board: Board, entry: Entry) -> dict[str, float]:
    """Mean over each skill group's benchmarks; NaN where one is missing."""
    groups: dict[str, list[float]] = {}
    for task in board.tasks:
        score = entry.score(task.id)
        value = score.value if score.comparable else float("nan")
        groups.setdefault(task.group, []).append(value)
    return {group: sum(values) / len(values) for group, values in groups.items()}


def radar(board: Board) -> Plot | None:
    """Mean score by skill group, one polygon an entry, on straight rings."""
    groups = list(dict.fromkeys(task.group for task in board.tasks))
    whole = [
        (entry, [means[group] for group in groups])
        for entry in board.entries
        if all(map(math.isfinite, (means := group_scores(board, entry)).values()))
    ]
    if len(groups) < 3 or not whole:
        return None
    figure, axes = canvas(WIDTH, 3.7)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_xlim(-1.6, 1.6)  # room for the names beside the outer ring
    low = max(0, 20 * math.floor((min(min(values) for _, values in whole) - 6) / 20))
    spokes = [2 * math.pi * place / len(groups) for place in range(len(groups))]

    def ring(values: Sequence[float]) -> tuple[list[float], list[float]]:
        radii = [(value - low) / (100 - low) for value in values]
        x = [r * math.sin(a) for r, a in zip(radii, spokes, strict=True)]
        y = [r * math.cos(a) for r, a in zip(radii, spokes, strict=True)]
        return [*x, x[0]], [*y, y[0]]

    for tick in range(low + 20, 101, 20):
        x_ring, y_ring = ring([tick] * len(groups))
        axes.plot(x_ring, y_ring, color=GRID, linewidth=0.8, zorder=0)
        x, y = (x_ring[0] + x_ring[-2]) / 2, (y_ring[0] + y_ring[-2]) / 2
        axes.text(x, y, str(tick), color=MUTED, fontsize=7.5, ha="center", va="center")
    for angle, group in zip(spokes, groups, strict=True):
        x, y = math.sin(angle), math.cos(angle)
        axes.plot([0, x], [0, y], color=GRID, linewidth=0.8, zorder=0)
        side = "center" if abs(x) < 0.1 else "left" if x > 0 else "right"
        axes.text(1.07 * x, 1.09 * y, clean(group), ha=side, va="center", color=INK)
    numbers = colours(board)
    for entry, values in reversed(whole):
        number = numbers[entry.key]
        axes.plot(
            *ring(values), color=series(number), marker=marker(number), markersize=3.8,
            linestyle=(0, (4, 2)) if entry.role in ("teacher", "switch") else "-",
            label=short(entry.name),
        )  # fmt: skip
    legend(figure, axes, reverse=True)
    names = ", ".join(clean(entry.name) for entry, _ in whole)
    summary = f"Mean score in {len(groups)} skill groups of {names}."
    return to_plot(figure, "radar", "Skill groups", summary)


def bars(board: Board) -> Plot | None:
    """One small panel a benchmark, one bar an entry; the line on a bar is the seeds' spread."""
    if not board.tasks:
        return None
    columns = 2
    rows = math.ceil(len(board.tasks) / columns)
    count = len(board.entries)
    figure, grid = canvas(WIDTH, rows * (0.32 + 0.175 * count), rows, columns)
    numbers = colours(board)
    names = [short(entry.name) for entry in board.entries]
    for place, axes in enumerate(grid.flat):
        if place >= len(board.tasks):
            axes.set_visible(False)
            continue
        task = board.tasks[place]
        axes.set_title(clean(task.short), pad=3, fontweight="bold")
        for row, entry in enumerate(board.entries):
            _bar(axes, row, entry.score(task.id), numbers[entry.key])
        axes.set_yticks(range(count), names if place % columns == 0 else [""] * count, fontsize=8)
        axes.set_ylim(count - 0.4, -0.6)
        axes.set_xlim(0, 114)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.axvline(0, color=GRID, linewidth=1)
        axes.grid(visible=False)
    spread = " The line at a bar's end is the spread over seeds." * any(
        len(entry.runs) > 1 for entry in board.entries
    )
    summary = f"Score of every model on {len(board.tasks)} benchmarks, 0 to 100.{spread}"
    return to_plot(figure, "bars", "Benchmarks", summary)


def _bar(axes: Any, row: int, score: Score, number: int) -> None:
    if not score.known:
        axes.text(1.5, row, "–", va="center", color=MUTED, fontsize=7.5)
        return
    alpha = 1.0 if score.comparable else 0.35
    axes.barh(row, score.value, height=0.64, color=series(number), alpha=alpha)
    end = score.value
    if score.spread is not None and score.spread > 0:
        axes.plot([score.value - score.spread, score.value], [row, row], color=PAPER, linewidth=1)
        end = score.value + score.spread
        axes.plot([score.value, end], [row, row], color=INK, linewidth=1)
    axes.text(end + 1.8, row, f"{score.value:.1f}", va="center", color=MUTED, fontsize=7.5)


def pareto(board: Board) -> Plot | None:
    """Average against latency and size; the line joins what nothing beats in both."""
    costs = {
        "latency_ms": "Latency, ms an answer",
        "parameters": "Parameters",
    }
    panels = {}
    for key, title in costs.items():
        points = [
            Point(middle, entry.score(AVERAGE).value, entry, (values[0], values[-1]))
            for entry in board.entries
            if (values := board.measured(entry, key)) and entry.score(AVERAGE).known
            for middle in [values[len(values) // 2]]
        ]
        if len(points) > 1:
            panels[key] = (title, points)
    if not panels:
        return None
    height = max(2.9, 0.6 + 0.17 * len(board.entries))
    figure, grid = canvas(WIDTH, height * len(panels), len(panels), 1)
    for axes, (key, (title, points)) in zip(grid.flat, panels.items(), strict=True):
        _pareto_panel(axes, board, points, title, key)
    front = ", ".join(clean(p.entry.name) for p in _front(next(iter(panels.values()))[1]))
    summary = (
        f"{board.average_title} against cost; up and left is better. On the front: {front}. "
        "Models of equal size stand at their common latency; a level line is its range over them."
    )
    return to_plot(figure, "pareto", "Score against cost", summary)


class Point(NamedTuple):
    """A model by cost and score, with the least and the most that its like were measured at."""

    cost: float
    score: float
    entry: Entry
    ends: tuple[float, float]


def _front(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats in cost and score, by cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def _pareto_panel(axes: Any, board: Board, points: Sequence[Point], title: str, key: str) -> None:
    from matplotlib.ticker import LogLocator

    numbers = colours(board)
    front = _front(points)
    steps_x, steps_y = [], []
    for place, point in enumerate(front):
        if place:
            steps_x.append(point.cost)
            steps_y.append(front[place - 1].score)
        steps_x.append(point.cost)
        steps_y.append(point.score)
    axes.plot(steps_x, steps_y, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
    low, high = min(p.ends[0] for p in points), max(p.ends[1] for p in points)
    wide = high > 5 * low > 0
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # powers of ten alone are few
    room = (high / low) ** 0.5 if wide else (high - low) * 0.5 or high * 0.3 or 1
    axes.set_xlim(low / 1.15 if wide else low - room * 0.2, high * room if wide else high + room)
    heights = [p.score for p in points]
    least = 0.17 / axes.figure.get_figheight() * (1.4 if len(points) > 6 else 1)
    span = max(max(heights) - min(heights), 5)
    axes.set_ylim(min(heights) - 0.14 * span, max(heights) + 0.14 * span)
    above = 0.06 * span  # clear of the front's line
    labels = spread_out([p.score + above * (p in front) for p in points], max(0.085, least) * span)
    for point, label in zip(points, labels, strict=True):
        x, y = point.cost, point.score
        number = numbers[point.entry.key]
        axes.plot(point.ends, [y, y], color=series(number), linewidth=0.9, alpha=0.6)
        axes.plot(x, y, marker=marker(number), color=series(number), markersize=6, linestyle="")
        far = abs(label - y) > 0.07 * span  # a label that had to leave its point leads back to it
        shift, end = 0.14 if far else 0.05, point.ends[1]
        axes.annotate(
            short(point.entry.name), (end, y),
            (end * room**shift if wide else end + room * shift, label),
            va="center", fontsize=8, color=INK,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 1,
                        "shrinkB": 4} if far else None,
        )  # fmt: skip
    axes.set_xlabel(title)
    axes.set_ylabel(board.average_title)
    kind: Any = "count" if key == "parameters" else "milliseconds"
    axes.xaxis.set_major_formatter(lambda value, _: format_number(value, kind))
    axes.xaxis.set_minor_formatter("")
    axes.tick_params(axis="y", labelcolor=MUTED)
