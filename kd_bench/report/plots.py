"""The plots of a report, drawn with matplotlib from a board."""

import math
from collections.abc import Sequence
from typing import Any

from kd_bench.report.frames import AVERAGE, Board, Entry, Score
from kd_bench.report.style import GRID, INK, MUTED, PAPER, Plot, marker, plotting, series, to_plot
from kd_bench.report.tables import clean
from kd_bench.report.uncertainty import Draws

__all__ = ["bars", "board_plots", "colours", "radar"]

WIDTH = 5.6  # inches; the page scales pictures to their column


def board_plots(board: Board, draws: Draws | None = None) -> list[Plot]:
    """Every plot that the board has data for, in the order of the page."""
    with plotting():
        drawn = (draw(board) for draw in (radar, bars))
        return [plot for plot in drawn if plot is not None]


def colours(board: Board) -> dict[str, int]:
    """Series number by entry: the teacher and the floor are neutral, methods follow by order."""
    numbers: dict[str, int] = {}
    free = 2
    for entry in sorted(board.entries, key=lambda e: (e.role == "switch", board.entries.index(e))):
        if board.teacher is not None and entry.key == board.teacher.key:
            numbers[entry.key] = 0
        elif board.floor is not None and entry.key == board.floor.key:
            numbers[entry.key] = 1
        else:
            numbers[entry.key] = free
            free += 1
    return numbers


def _new(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def _legend(figure: Any, axes: Any, columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns,
        handlelength=1.4, columnspacing=1.4, labelcolor=INK,
    )  # fmt: skip


def group_scores(board: Board, entry: Entry) -> dict[str, float]:
    """Mean over each skill group's benchmarks; NaN where one is missing."""
    groups: dict[str, list[float]] = {}
    for task in board.tasks:
        score = entry.score(task.id)
        value = score.value if score.comparable else float("nan")
        groups.setdefault(task.group, []).append(value)
    return {group: sum(values) / len(values) for group, values in groups.items()}


def radar(board: Board) -> Plot | None:
    """Mean score by skill group, one polygon an entry."""
    groups = list(dict.fromkeys(task.group for task in board.tasks))
    if len(groups) < 3:
        return None
    angles = [2 * math.pi * place / len(groups) for place in range(len(groups))]
    figure, flat = _new(4.4, 4.0)
    flat.remove()
    axes = figure.add_subplot(projection="polar")
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    numbers = colours(board)
    drawn = []
    lowest = 100.0
    for entry in board.entries:
        means = group_scores(board, entry)
        values = [means[group] for group in groups]
        if not all(math.isfinite(value) for value in values):
            continue
        drawn.append(entry)
        lowest = min(lowest, *values)
        number = numbers[entry.key]
        color = series(number)
        axes.plot(
            [*angles, angles[0]], [*values, values[0]], color=color, label=clean(entry.name),
            marker=marker(number), markersize=3.6, linestyle="--" if number == 0 else "-",
        )  # fmt: skip
        axes.fill(angles, values, color=color, alpha=0.05)
    if not drawn:
        return None
    floor = max(0.0, 10 * math.floor((lowest - 8) / 10))
    axes.set_ylim(floor, 100)
    axes.set_xticks(angles, [clean(group) for group in groups])
    axes.tick_params(axis="x", labelcolor=INK, pad=6)
    ticks = list(range(int(floor) + 20 - int(floor) % 20, 101, 20))
    axes.set_yticks(ticks, [str(tick) for tick in ticks], color=MUTED, fontsize=7.5)
    axes.set_rlabel_position(180 / len(groups))
    axes.spines["polar"].set_visible(False)
    _legend(figure, axes)
    names = ", ".join(entry.name for entry in drawn)
    return to_plot(
        figure,
        "radar",
        "Skills",
        f"Radar of the mean score in {len(groups)} skill groups for {names}.",
    )


def bars(board: Board) -> Plot | None:
    """One small panel a benchmark, one bar an entry; the line on a bar is the seeds' spread."""
    if not board.tasks or not board.entries:
        return None
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    columns = 2
    rows = math.ceil(len(board.tasks) / columns)
    count = len(board.entries)
    figure = Figure(figsize=(WIDTH, rows * (0.34 + 0.17 * count)))
    FigureCanvasSVG(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    numbers = colours(board)
    names = [_short(entry.name) for entry in board.entries]
    for place, axes in enumerate(grid.flat):
        if place >= len(board.tasks):
            axes.set_visible(False)
            continue
        task = board.tasks[place]
        axes.set_title(clean(task.title), pad=3)
        for row, entry in enumerate(board.entries):
            _bar(axes, row, entry.score(task.id), numbers[entry.key])
        axes.set_yticks(range(count), names if place % columns == 0 else [""] * count)
        axes.set_ylim(count - 0.4, -0.6)
        axes.set_xlim(0, 112)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.axvline(0, color=GRID, linewidth=1)
        axes.grid(visible=False)
    figure.subplots_adjust(hspace=0.32, wspace=0.06)
    return to_plot(
        figure, "bars", "Scores by benchmark",
        f"Bars of {len(board.tasks)} benchmarks for {count} rows of the leaderboard.",
    )  # fmt: skip


def _bar(axes: Any, row: int, score: Score, number: int) -> None:
    if not score.known:
        axes.text(1, row, "–", va="center", color=MUTED, fontsize=7.5)
        return
    alpha = 1.0 if score.comparable else 0.35
    axes.barh(row, score.value, height=0.66, color=series(number), alpha=alpha)
    end = score.value
    if score.spread is not None:
        low, high = score.value - score.spread, score.value + score.spread
        axes.plot([low, score.value], [row, row], color=PAPER, linewidth=1)
        axes.plot([score.value, high], [row, row], color=INK, linewidth=1)
        end = high
    axes.text(end + 1.5, row, f"{score.value:.1f}", va="center", color=MUTED, fontsize=7.5)


def _short(name: str, limit: int = 22) -> str:
    name = clean(name)
    return name if len(name) <= limit else name[: limit - 1] + "…"


def known_values(scores: Sequence[Score]) -> list[float]:
    """Finite values only."""
    return [score.value for score in scores if score.known]


def average_of(entry: Entry) -> Score:
    """The entry's average over the board's benchmarks."""
    return entry.score(AVERAGE)
