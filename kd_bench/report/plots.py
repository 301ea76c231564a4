"""Every plot of a report: skills, differences, gaps, cost, calibration, training and trend.

Each function returns a `Plot` with its matplotlib figure, or None where there is nothing to draw;
they are called inside `style.plotting()`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kd_bench.compare.estimates import Evidence
from kd_bench.records import AVERAGE, Interval
from kd_bench.report.board import Board, Entry, Score
from kd_bench.report.relations import hybrid_gaps
from kd_bench.report.style import (
    GRID,
    INK,
    MUTED,
    PAPER,
    WIDTH,
    Plot,
    canvas,
    legend,
    marker,
    plotting,
    series,
    short,
    spread_out,
    to_plot,
)
from kd_bench.report.tables import Kind, clean, format_number

if TYPE_CHECKING:
    from kd_bench.report.history import Step, TrainingLog

Logs = Mapping[str, Sequence["TrainingLog"]]
"""Training logs by entry key."""


def board_plots(
    board: Board, evidence: Evidence, logs: Logs | None = None, only: str | None = None
) -> list[Plot]:
    """Every plot of a board that there is data for, or the one of that name."""
    if not board.entries:
        return []
    curves = [
        (board.colours[entry.key], short(entry.name), log)
        for entry in board.entries
        for log in (logs or {}).get(entry.key, ())
    ]
    drawings: dict[str, Callable[[], Plot | None]] = {
        "radar": lambda: radar(board),
        "bars": lambda: bars(board),
        "forest": lambda: forest(board),
        "retention": lambda: retention(board),
        "gaps": lambda: gaps(board, evidence),
        "pareto": lambda: pareto(board),
        "reliability": lambda: reliability(board),
        "losses": lambda: losses(curves),
        "knees": lambda: knees(curves),
    }
    with plotting():
        drawn = [draw() for name, draw in drawings.items() if only in (None, name)]
    return [plot for plot in drawn if plot is not None]


# --- skills --------------------------------------------------------------------------------------


def group_scores(board: Board, entry: Entry) -> dict[str, float]:
    """Mean over each skill group's benchmarks, 0 to 100; NaN where one is missing."""
    groups: dict[str, list[float]] = {}
    for task in board.tasks:
        score = entry.score(task.id)
        groups.setdefault(task.group, []).append(score.value if score.comparable else math.nan)
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
    axes.set(aspect="equal", xlim=(-1.6, 1.6))  # room for the names beside the outer ring
    axes.axis("off")
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
    for entry, values in reversed(whole):
        number = board.colours[entry.key]
        axes.plot(
            *ring(values), color=series(number), marker=marker(number), markersize=3.8,
            linestyle=(0, (4, 2)) if entry.role in ("teacher", "switch") else "-",
            label=short(entry.name),
        )  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    legend(figure, handles[::-1], labels[::-1])
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
    names = [short(entry.name) for entry in board.entries]
    for place, axes in enumerate(grid.flat):
        if place >= len(board.tasks):
            axes.set_visible(False)
            continue
        task = board.tasks[place]
        axes.set_title(clean(task.short), pad=3, fontweight="bold")
        for row, entry in enumerate(board.entries):
            _bar(axes, row, entry.score(task.id), series(board.colours[entry.key]))
        axes.set_yticks(range(count), names if place % columns == 0 else [""] * count, fontsize=8)
        axes.set(xlim=(0, 114), ylim=(count - 0.4, -0.6), xticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.axvline(0, color=GRID, linewidth=1)
        axes.grid(visible=False)
    spread = " The line at a bar's end is the spread over seeds." * any(
        len(entry.runs) > 1 for entry in board.entries
    )
    summary = f"Score of every model on {len(board.tasks)} benchmarks, 0 to 100.{spread}"
    return to_plot(figure, "bars", "Benchmarks", summary)


def _bar(axes: Any, row: int, score: Score, color: str) -> None:
    if not score.known:
        axes.text(1.5, row, "–", va="center", color=MUTED, fontsize=7.5)
        return
    axes.barh(row, score.value, height=0.64, color=color, alpha=1.0 if score.comparable else 0.35)
    end = score.value
    if score.spread is not None and score.spread > 0:
        axes.plot([score.value - score.spread, score.value], [row, row], color=PAPER, linewidth=1)
        end = score.value + score.spread
        axes.plot([score.value, end], [row, row], color=INK, linewidth=1)
    axes.text(end + 1.8, row, f"{score.value:.1f}", va="center", color=MUTED, fontsize=7.5)


# --- differences, retention and gaps -------------------------------------------------------------

SHOWN = 16  # more intervals side by side cannot be read


def forest(board: Board) -> Plot | None:
    """Difference from SFT by benchmark, with intervals."""
    if board.floor is None:
        return None
    return _side_by_side(
        board,
        [(entry, entry.differences) for entry in board.students if entry.differences],
        (0, f"Points above {short(board.floor.name)}"),
        ("forest", "Difference from SFT", "Points above plain fine-tuning{level}."),
    )


def retention(board: Board) -> Plot | None:
    """Share of the teacher's score by benchmark."""
    if board.teacher is None:
        return None
    told = "Percent of the teacher's score that a student keeps{level}; 100 is the teacher."
    return _side_by_side(
        board,
        [(entry, entry.retentions) for entry in board.students if entry.retentions],
        (100, f"Percent of the score of {short(board.teacher.name)}"),
        ("retention", "Retention", told),
    )


def _side_by_side(
    board: Board,
    every: list[tuple[Entry, dict[str, Score]]],
    reference: tuple[float, str],
    words: tuple[str, str, str],
) -> Plot | None:
    """One row a benchmark; the entries' points and intervals stand below each other in it.

    `reference` is the value and the axis's title, `words` are the plot's name, title and summary.
    """
    rows = every[:SHOWN]
    if not rows:
        return None
    figure, axes = canvas(WIDTH, 0.7 + (len(board.tasks) + 1) * (0.16 + 0.11 * len(rows)))
    keys = _keys(board)
    step = 0.72 / len(rows)
    for row, (key, _) in enumerate(keys):
        for place, (entry, scores) in enumerate(rows):
            score = scores.get(key)
            if score is None or not score.known:
                continue
            y = row + (place - (len(rows) - 1) / 2) * step
            number = board.colours[entry.key]
            _interval(axes, score.interval, y, color=series(number), linewidth=1.3)
            axes.plot(
                score.value, y, marker=marker(number), color=series(number), markersize=4.2,
                linestyle="", label=short(entry.name) if row == 0 else None,
            )  # fmt: skip
    _benchmark_axis(axes, keys)
    axes.axvline(reference[0], color=INK, linewidth=0.9)
    axes.set_xlabel(reference[1])
    legend(figure, *axes.get_legend_handles_labels())
    levels = {
        f"{100 * score.interval.level:g} %"
        for _, scores in every
        for score in scores.values()
        if score.interval is not None
    }
    level = f", with {' and '.join(sorted(levels))} intervals" if levels else ""
    # What is not drawn must not be thought to be absent.
    more = f" {len(every) - SHOWN} more, of lower average, stand in the table alone."
    name, title, told = words
    summary = told.format(level=level) + more * (len(every) > SHOWN)
    return to_plot(figure, name, title, summary)


def _keys(board: Board) -> list[tuple[str, str]]:
    """The average first, then the benchmarks, as (key, title)."""
    tasks = [(task.id, clean(task.short)) for task in board.tasks]
    return [(AVERAGE, board.average_title), *tasks]


def _interval(axes: Any, interval: Interval | None, y: float, **look: Any) -> None:
    if interval is not None:
        axes.plot([interval.low, interval.high], [y, y], **look)


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
            label = name if row == 0 else None
            axes.barh(
                row + shift, scores[key].value, height=0.34, color=series(number), label=label
            )
            _interval(axes, scores[key].interval, row + shift, color=INK, linewidth=0.9)
    _benchmark_axis(axes, keys)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_xlabel("Points")
    axes.spines["bottom"].set_color(GRID)
    legend(figure, *axes.get_legend_handles_labels(), columns=2)
    student, hybrid = clean(gap.student.name), clean(gap.hybrid.name)
    summary = (
        f"{hybrid} has the vision of {student} and the teacher's language model. "
        "What it loses to the teacher is vision; what it has over the student is language."
    )
    return to_plot(figure, "gaps", "Vision gap and language gap", summary)


# --- score against cost --------------------------------------------------------------------------


class Point(NamedTuple):
    """A model by cost and score, with the least and the most that its like were measured at."""

    cost: float
    score: float
    entry: Entry
    ends: tuple[float, float]


def pareto(board: Board) -> Plot | None:
    """Average against latency and size; the line joins what nothing beats in both."""
    costs: tuple[tuple[str, str, Kind], ...] = (
        ("latency_ms", "Latency, ms an answer", "milliseconds"),
        ("parameters", "Parameters", "count"),
    )
    panels = []
    for key, title, kind in costs:
        points = [
            Point(values[len(values) // 2], entry.score(AVERAGE).value, entry,
                  (values[0], values[-1]))
            for entry in board.entries
            if (values := board.measured(entry, key)) and entry.score(AVERAGE).known
        ]  # fmt: skip
        if len(points) > 1:
            panels.append((points, title, kind))
    if not panels:
        return None
    height = max(2.9, 0.6 + 0.17 * len(board.entries))
    figure, grid = canvas(WIDTH, height * len(panels), len(panels), 1)
    for axes, panel in zip(grid.flat, panels, strict=True):
        _pareto_panel(axes, board, *panel)
    front = ", ".join(clean(p.entry.name) for p in _front(panels[0][0]))
    summary = (
        f"{board.average_title} against cost; up and left is better. On the front: {front}. "
        "Models of equal size stand at their common latency; a level line is its range over them."
    )
    return to_plot(figure, "pareto", "Score against cost", summary)


def _front(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats in cost and score, by cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def _pareto_panel(axes: Any, board: Board, points: Sequence[Point], title: str, kind: Kind) -> None:
    from matplotlib.ticker import LogLocator

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
        number = board.colours[point.entry.key]
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
    axes.set(xlabel=title, ylabel=board.average_title)
    axes.xaxis.set_major_formatter(lambda value, _: format_number(value, kind))
    axes.xaxis.set_minor_formatter("")
    axes.tick_params(axis="y", labelcolor=MUTED)


# --- calibration ---------------------------------------------------------------------------------

BINS = 10
LEAST = 5  # a bin with fewer answers is not drawn


@dataclass(frozen=True)
class Reliability:
    """Bins of answers by confidence.

    Attributes:
        confidence, accuracy: means of each bin, in percent; counts: answers in it.
        error: expected calibration error in points: |confidence - accuracy| weighted by count.
    """

    confidence: list[float]
    accuracy: list[float]
    counts: list[int]
    error: float


def measure(confidence: "np.typing.ArrayLike", score: "np.typing.ArrayLike") -> Reliability | None:
    """Equal-width bins over [0, 1] (Guo et al. 2017, arXiv 1706.04599); None without data."""
    probability = np.asarray(confidence, dtype=np.float64)
    right = np.asarray(score, dtype=np.float64)
    known = np.isfinite(probability) & np.isfinite(right)
    probability, right = np.clip(probability[known], 0, 1), right[known]
    if probability.size == 0:
        return None
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    used = counts > 0
    means = 100 * np.bincount(place, probability, BINS)[used] / counts[used]
    accuracy = 100 * np.bincount(place, right, BINS)[used] / counts[used]
    error = float(np.sum(np.abs(means - accuracy) * counts[used]) / counts.sum())
    return Reliability(means.tolist(), accuracy.tolist(), counts[used].tolist(), error)


def reliability(board: Board) -> Plot | None:
    """Accuracy against confidence, pooled over the benchmarks that store log-probabilities."""
    found = [(entry, measured) for entry in board.entries if (measured := _pooled(board, entry))]
    if not found:
        return None
    figure, axes = canvas(WIDTH, 4.0)
    axes.plot([0, 100], [0, 100], color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
    for entry, bins in found:
        number = board.colours[entry.key]
        kept = [i for i, count in enumerate(bins.counts) if count >= LEAST]
        axes.plot(
            [bins.confidence[i] for i in kept], [bins.accuracy[i] for i in kept],
            color=series(number), marker=marker(number), markersize=3.8, linewidth=1.2,
            label=f"{short(entry.name)} ({bins.error:.1f})",
        )  # fmt: skip
    axes.set(xlim=(0, 101), ylim=(0, 101))
    axes.set(xlabel="Confidence of the first answer token, %", ylabel="Right answers, %")
    axes.tick_params(axis="y", labelcolor=MUTED)
    legend(figure, *axes.get_legend_handles_labels())
    summary = (
        "A calibrated model lies on the dotted line; below it, it is too sure. "
        "In brackets: expected calibration error in points."
    )
    return to_plot(figure, "reliability", "Reliability", summary)


def _pooled(board: Board, entry: Entry) -> Reliability | None:
    columns = ("answer_confidence", "score")
    frames = [frame for task in board.tasks for *_, frame in entry.samples(task.id, columns)]
    confidence, scores = (
        [frame[column].to_numpy(dtype=np.float64) for frame in frames] for column in columns
    )
    return measure(np.concatenate(confidence), np.concatenate(scores)) if frames else None


# --- curves of training --------------------------------------------------------------------------

POINTS = 90  # a curve's points; more cannot be seen and make the page heavy

Curve = tuple[int, str, "TrainingLog"]
"""Number of its colour, name, log."""


def training_plots(logs: "Sequence[TrainingLog]") -> list[Plot]:
    """The curves of trainings without an evaluated run, unfinished ones too."""
    curves = [(2 + place, short(log.name), log) for place, log in enumerate(logs)]
    with plotting():
        drawn = [losses(curves), knees(curves)]
    return [plot for plot in drawn if plot is not None]


def losses(curves: Sequence[Curve]) -> Plot | None:
    """One panel a term, one line a run."""
    terms = list(dict.fromkeys(term for _, _, log in curves for term in log.terms))
    if not terms:
        return None
    columns = 2 if len(terms) > 1 else 1
    rows = math.ceil(len(terms) / columns)
    figure, grid = canvas(WIDTH, 1.75 * rows + 0.2, rows, columns)
    starts = sorted({start for _, _, log in curves for _, start in log.stages[1:]})
    for place, axes in enumerate(grid.flat):
        if place >= len(terms):
            axes.set_visible(False)
            continue
        term = terms[place]
        axes.set_title("total loss" if term == "loss" else term, pad=4, fontweight="bold")
        lowest, highest = math.inf, 0.0
        for number, _, log in curves:
            x, y = thin(log.steps, log.terms.get(term, ()))
            if not y:
                continue
            lowest, highest = min(lowest, *y), max(highest, *y)
            axes.plot(x, y, color=series(number), linewidth=1.1, alpha=0.85)
        if highest > 30 * lowest > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter("")
        elif lowest >= 0:
            axes.set_ylim(bottom=0)
        for start in starts[:8]:
            axes.axvline(start, color=MUTED, linewidth=0.6, linestyle=(0, (1, 2)))
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


def knees(curves: Sequence[Curve]) -> Plot | None:
    """Median and 10 to 90 % band of the knee, one panel a side."""
    curves = [curve for curve in curves if curve[2].knees]
    medians = [key for _, _, log in curves for key in log.knees if key.endswith("_p50")]
    sides = list(dict.fromkeys(key[len("knee_") : -len("_p50")] for key in medians))
    if not sides:
        return None
    figure, grid = canvas(WIDTH, 1.75 * len(sides) + 0.3, len(sides), 1)
    for axes, side in zip(grid.flat, sides, strict=True):
        axes.set_title(side, pad=4, fontweight="bold")
        for number, _, log in curves:
            x, y = thin(log.steps, log.knees.get(f"knee_{side}_p50", ()))
            axes.plot(x, y, color=series(number), linewidth=1.2)
            low_x, low = thin(log.steps, log.knees.get(f"knee_{side}_p10", ()))
            _, high = thin(log.steps, log.knees.get(f"knee_{side}_p90", ()))
            if low and len(low) == len(high):
                axes.fill_between(low_x, low, high, color=series(number), alpha=0.1, linewidth=0)
        axes.set(xlim=(0, None), ylim=(0, None), ylabel="logits above")
        axes.tick_params(axis="y", labelcolor=MUTED)
    grid.flat[-1].set_xlabel("Step")
    _curve_legend(figure, curves)
    summary = (
        "How many logits stand above the knee at an answer position, by side: "
        "median, and the band from 10 to 90 %."
    )
    return to_plot(figure, "knees", "Knee", summary)


def _curve_legend(figure: Any, curves: Sequence[Curve]) -> None:
    from matplotlib.lines import Line2D

    handles = {name: Line2D([], [], color=series(number)) for number, name, _ in curves}
    legend(figure, list(handles.values()), list(handles))


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over equal stretches, so that a long log is as light as a short one."""
    pairs = [(a, b) for a, b in zip(x, y, strict=False) if math.isfinite(b)]
    step = max(1, math.ceil(len(pairs) / POINTS))
    parts = [pairs[start : start + step] for start in range(0, len(pairs), step)]
    thin_x = [sum(a for a, _ in part) / len(part) for part in parts]
    return thin_x, [sum(b for _, b in part) / len(part) for part in parts]


# --- trend ---------------------------------------------------------------------------------------


def trend(steps: "Sequence[Step]", moves: Sequence[tuple[datetime, str]]) -> Plot | None:
    """A line a method or name; upright lines where the baseline moved."""
    shown = [step for step in steps if step.average is not None]
    if not shown:
        return None
    from matplotlib.ticker import MaxNLocator

    def day(when: datetime) -> float:
        return when.timestamp() / 86_400

    figure, axes = canvas(WIDTH, 3.4)
    for number, line in enumerate(dict.fromkeys(step.line for step in shown), start=2):
        own = [step for step in shown if step.line == line]
        axes.plot([day(step.when) for step in own], [step.average for step in own],
                  color=series(number), linewidth=1.2, marker=marker(number), markersize=4.5,
                  label=short(line))  # fmt: skip
        for step in own:
            if step.interval is not None:
                ends = [step.interval.low, step.interval.high]
                axes.plot([day(step.when)] * 2, ends, color=series(number), linewidth=0.8,
                          alpha=0.6)  # fmt: skip
    for when, _ in moves:
        axes.axvline(day(when), color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
    axes.xaxis.set_major_formatter(
        lambda value, _: f"{datetime.fromtimestamp(value * 86_400, UTC):%Y-%m-%d}"
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.set_ylabel("Average")
    legend(figure, *axes.get_legend_handles_labels())
    summary = (
        f"Average of {len(shown)} runs by date, with 95 % intervals over samples. "
        f"Broken upright lines: the baseline moved ({len(moves)})."
    )
    return to_plot(figure, "trend", "Average by date", summary)
