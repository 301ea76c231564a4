"""Curves of training: losses by term, and the knee that decides how many logits are compared."""

import math
from collections.abc import Sequence

from kd_bench.report.board import Board
from kd_bench.report.style import (
    MUTED,
    WIDTH,
    Plot,
    canvas,
    colours,
    legend,
    plotting,
    series,
    short,
    to_plot,
)
from kd_bench.report.training import TrainingLog

POINTS = 90  # a curve's points; more cannot be seen and make the page heavy


Curve = tuple[int, str, TrainingLog]
"""Number of its colour, name, log."""


def losses(board: Board, logs: dict[str, list[TrainingLog]]) -> Plot | None:
    """One panel a term, one line a run, in the colours of the board."""
    return _losses(_curves(board, logs))


def knees(board: Board, logs: dict[str, list[TrainingLog]]) -> Plot | None:
    """Median and 10 to 90 % band of the knee, one panel a side."""
    return _knees(_curves(board, logs))


def training_plots(logs: Sequence[TrainingLog]) -> list[Plot]:
    """The same plots for trainings without an evaluated run, unfinished ones too."""
    curves = [(2 + place, short(log.name), log) for place, log in enumerate(logs)]
    with plotting():
        drawn = [_losses(curves), _knees(curves)]
    return [plot for plot in drawn if plot is not None]


def _curves(board: Board, logs: dict[str, list[TrainingLog]]) -> list[Curve]:
    numbers = colours(board)
    return [
        (numbers[entry.key], short(entry.name), log)
        for entry in board.entries
        for log in logs.get(entry.key, [])
    ]


def _losses(curves: Sequence[Curve]) -> Plot | None:
    terms = list(dict.fromkeys(term for _, _, log in curves for term in log.terms))
    if not terms:
        return None
    columns = 2 if len(terms) > 1 else 1
    rows = math.ceil(len(terms) / columns)
    figure, grid = canvas(WIDTH, 1.75 * rows + 0.2, rows, columns)
    for place, axes in enumerate(grid.flat):
        if place >= len(terms):
            axes.set_visible(False)
            continue
        term = terms[place]
        axes.set_title("total loss" if term == "loss" else term, pad=4, fontweight="bold")
        seen: set[str] = set()
        lowest, highest = math.inf, 0.0
        for number, name, log in curves:
            x, y = _thin(log.steps, log.terms.get(term, ()))
            if not y:
                continue
            lowest, highest = min(lowest, *y), max(highest, *y)
            label = name if name not in seen else None
            seen.add(name)
            axes.plot(x, y, color=series(number), linewidth=1.1, alpha=0.85, label=label)
        if highest > 30 * lowest > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter("")
        elif lowest >= 0:
            axes.set_ylim(bottom=0)
        _mark_stages(axes, curves)
        axes.set_xlim(left=0)
        axes.tick_params(axis="y", labelcolor=MUTED)
        if place >= len(terms) - columns:
            axes.set_xlabel("Step")
    _curve_legend(figure, curves)
    runs = len(curves)
    summary = (
        f"Logged loss of {runs} training{'s' * (runs != 1)} by step, each term before its weight. "
        "Faint upright lines: a new stage."
    )
    return to_plot(figure, "losses", "Losses", summary)


def _knees(curves: Sequence[Curve]) -> Plot | None:
    curves = [curve for curve in curves if curve[2].knees]
    sides = list(
        dict.fromkeys(
            key.removeprefix("knee_").rpartition("_")[0]
            for _, _, log in curves
            for key in log.knees
            if key.endswith("_p50")
        )
    )
    if not sides:
        return None
    figure, grid = canvas(WIDTH, 1.75 * len(sides) + 0.3, len(sides), 1)
    for place, (axes, side) in enumerate(zip(grid.flat, sides, strict=True)):
        axes.set_title(side, pad=4, fontweight="bold")
        for number, _, log in curves:
            x, y = _thin(log.steps, log.knees.get(f"knee_{side}_p50", ()))
            axes.plot(x, y, color=series(number), linewidth=1.2)
            low_x, low = _thin(log.steps, log.knees.get(f"knee_{side}_p10", ()))
            _, high = _thin(log.steps, log.knees.get(f"knee_{side}_p90", ()))
            if low and len(low) == len(high):
                axes.fill_between(low_x, low, high, color=series(number), alpha=0.1, linewidth=0)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.set_ylabel("logits above")
        if place == len(sides) - 1:
            axes.set_xlabel("Step")
    _curve_legend(figure, curves)
    summary = (
        "How many logits stand above the knee at an answer position, by side: "
        "median, and the band from 10 to 90 %."
    )
    return to_plot(figure, "knees", "Knee", summary)


def _curve_legend(figure: object, curves: Sequence[Curve]) -> None:
    from matplotlib.lines import Line2D

    handles = {name: Line2D([], [], color=series(number)) for number, name, _ in curves}
    legend(figure, None, handles=list(handles.values()), labels=list(handles))


def _mark_stages(axes: object, curves: Sequence[Curve]) -> None:
    starts = sorted({start for _, _, log in curves for _, start in log.stages[1:]})
    for start in starts[:8]:
        axes.axvline(start, color=MUTED, linewidth=0.6, linestyle=(0, (1, 2)))  # type: ignore[attr-defined]


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over equal stretches, so that a long log is as light as a short one."""
    pairs = [(a, b) for a, b in zip(x, y, strict=False) if math.isfinite(b)]
    step = max(1, math.ceil(len(pairs) / POINTS))
    parts = [pairs[start : start + step] for start in range(0, len(pairs), step)]
    thin_x = [sum(a for a, _ in part) / len(part) for part in parts]
    return thin_x, [sum(b for _, b in part) / len(part) for part in parts]
