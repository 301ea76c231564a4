"""What `kd-bench demo --study` found: tables as CSV and Markdown, and plots."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kd_bench.cli.demo import FLOOR, SWITCHED
from kd_bench.files import write_text
from kd_bench.records import AVERAGE

if TYPE_CHECKING:
    from kd_bench.compare.estimates import Estimate
    from kd_bench.report.style import Plot
    from kd_bench.report.tables import Cell, Table
    from kd_bench.store import Run

GAPS = ("vision_gap", "language_gap")
"""The teacher less the visual switch; the visual switch less the student."""


@dataclass(frozen=True)
class Arm:
    """What came out of one way to train, over its seeds.

    Attributes:
        scores: by benchmark, the mean of its seeds.
        differences: in points, by what it is compared with, and the `GAPS`.
        step: milliseconds.
        memory: bytes of its training.
    """

    name: str
    scores: Mapping[str, float]
    differences: "Mapping[str, Estimate]" = field(default_factory=dict)
    step: float | None = None
    memory: int | None = None

    @property
    def mean(self) -> float:
        """Of the benchmarks."""
        return sum(self.scores.values()) / len(self.scores)


def scores_of(runs: "Sequence[Run]") -> dict[str, float]:
    """By benchmark, the mean of runs that differ in their seed."""
    results = [run.results() for run in runs]
    return {task: sum(r[task].score for r in results) / len(runs) for task in results[0]}


def difference(floor: "Sequence[Run]", runs: "Sequence[Run]") -> "Estimate":
    """Points above other runs on the average, over seeds and documents."""
    from kd_bench.compare.methods import compare_methods

    return compare_methods(floor, runs)[AVERAGE]


@dataclass(frozen=True)
class MapCell:
    """What the methods gave on labels of one error rate (in percent) and number."""

    error: int
    count: int
    arms: Sequence[Arm]

    def __str__(self) -> str:
        told = []
        for arm in self.arms:
            told.append(f"{arm.name} {arm.mean:.1f}")
            for floor, found in arm.differences.items():
                ends = found.interval
                known = f", {ends.low:+.1f} to {ends.high:+.1f}" if ends else ""
                told[-1] += f" ({found.value:+.1f} above {floor}{known})"
        return f"{self.error} % wrong, {self.count} conversations: {'; '.join(told)}"


def write_map(found: Iterable[MapCell], folder: Path, cells: Iterable[tuple[int, int]]) -> None:
    """Write `map`, a row a cell, and `map.svg`, of those that are known among all cells."""
    from kd_bench.report.tables import Column, Row, Table

    known = sorted(found, key=lambda cell: (cell.error, cell.count))
    methods = list(dict.fromkeys(arm.name for cell in known for arm in cell.arms))
    pairs = [(a.name, floor) for cell in known for a in cell.arms for floor in a.differences]
    pairs = list(dict.fromkeys(pairs))
    columns = (
        Column("wrong_percent", "Wrong labels, %", "rank"),
        Column("conversations", "Conversations", "rank"),
        *(Column(method, method) for method in methods),
        *(Column(f"{m}_above_{floor}", f"{m} above {floor}", "difference") for m, floor in pairs),
    )
    rows = []
    for cell in known:
        by_name = {arm.name: arm for arm in cell.arms}
        means = (by_name[m].mean if m in by_name else None for m in methods)
        above = (_cell(by_name[m].differences.get(f)) if m in by_name else None for m, f in pairs)
        name = f"{cell.error}-{cell.count}"
        rows.append(Row.of(name, cell.error, cell.count, *means, *above))
    _write(Table("When does a teacher pay?", columns, tuple(rows)), folder / "map")
    write_text(folder / "map.svg", _map_plot(known, sorted(cells)).standalone())


def _map_plot(known: Sequence[MapCell], cells: Sequence[tuple[int, int]]) -> "Plot":
    """Points above SFT by number of conversations: a panel an error rate, a line a method."""
    from kd_bench.report.style import INK, canvas, legend, marker, plotting, series, to_plot

    errors, counts = (sorted(set(values)) for values in zip(*cells, strict=True))
    methods = list(dict.fromkeys(a.name for c in known for a in c.arms if FLOOR in a.differences))
    with plotting():
        figure, grid = canvas(7.2, 2.6, 1, len(errors))
        for axes, error in zip(grid[0], errors, strict=True):
            axes.set_title(f"{error} % wrong")
            axes.axhline(0, color=INK, linewidth=0.9)
            axes.set(xscale="log", xlim=(0.75 * counts[0], 1.33 * counts[-1]), xticks=counts)
            axes.set_xticklabels([f"{count:,}" for count in counts])
            axes.minorticks_off()
            axes.sharey(grid[0][0])
            axes.tick_params(labelleft=axes is grid[0][0])
            for number, method in enumerate(methods):
                beside = 1.14 ** (number - (len(methods) - 1) / 2)
                shown = [
                    (cell.count * beside, arm.differences[FLOOR])
                    for cell in known
                    for arm in cell.arms
                    if (cell.error, arm.name) == (error, method)
                ]
                _intervals(
                    axes, shown, label=method, color=series(2 + number), marker=marker(2 + number)
                )
        grid[0][0].set_ylabel("Points above SFT")
        figure.supxlabel("Labelled conversations", fontsize=8.5)
        legend(figure, *grid[0][0].get_legend_handles_labels())
        summary = (
            f"Points above SFT on the mean of ten, with 95 % intervals, in {len(known)} of "
            f"{len(cells)} cells."
        )
        return to_plot(figure, "map", "When does a teacher pay?", summary)


def write_arms(arms: Sequence[Arm], folder: Path) -> None:
    """Write `arms`, `arms_by_benchmark` and, where there is what to compare with, `arms.svg`.

    p is corrected by Holm over all arms that are compared with the same one.
    """
    from kd_bench.report.tables import Column, Row, Table
    from kd_bench.report.verdicts import probability
    from kd_bench.stats import holm

    corrected: dict[tuple[str, str], str] = {}
    for floor in (FLOOR, SWITCHED):
        asked = [arm for arm in arms if floor in arm.differences]
        adjusted = holm([arm.differences[floor].p for arm in asked])
        corrected |= {(a.name, floor): probability(p) for a, p in zip(asked, adjusted, strict=True)}
    columns = (
        Column("arm", "Arm", "text"),
        Column("mean", "Mean of ten"),
        Column(f"above_{FLOOR}", f"Above {FLOOR}", "difference"),
        Column(f"p_{FLOOR}", f"p, {FLOOR} (Holm)", "text"),
        Column(f"above_{SWITCHED}", f"Above {SWITCHED}", "difference"),
        Column(f"p_{SWITCHED}", f"p, {SWITCHED} (Holm)", "text"),
        *(Column(gap, gap.replace("_", " ").capitalize(), "difference") for gap in GAPS),
        Column("step_ms", "A step", "milliseconds"),
        Column("memory_bytes", "Memory", "bytes"),
    )
    rows = []
    for arm in arms:
        above = [
            value
            for floor in (FLOOR, SWITCHED)
            for value in (_cell(arm.differences.get(floor)), corrected.get((arm.name, floor)))
        ]
        gaps = [_cell(arm.differences.get(gap)) for gap in GAPS]
        rows.append(Row.of(arm.name, arm.name, arm.mean, *above, *gaps, arm.step, arm.memory))
    told = "Differences and gaps in points, with 95 % intervals over seeds and documents."
    _write(Table("What the paper left open", columns, tuple(rows), told), folder / "arms")
    write_scores(arms, folder / "arms_by_benchmark", "The arms by benchmark")
    if corrected:
        write_text(folder / "arms.svg", _arms_plot(arms).standalone())


def _arms_plot(arms: Sequence[Arm]) -> "Plot":
    """Points above SFT and above Switch-KD: a panel each, a row an arm."""
    from kd_bench.report.style import INK, canvas, marker, plotting, series, to_plot

    with plotting():
        figure, grid = canvas(7.2, 0.6 + 0.19 * len(arms), 1, 2)
        for axes, floor in zip(grid[0], (FLOOR, SWITCHED), strict=True):
            known = [
                (y, a.differences[floor]) for y, a in enumerate(arms) if floor in a.differences
            ]
            axes.axvline(0, color=INK, linewidth=0.9)
            _intervals(axes, known, lying=True, color=series(2), marker=marker(2))
            axes.set_yticks(range(len(arms)), [a.name for a in arms] if floor == FLOOR else [])
            axes.set(ylim=(len(arms) - 0.4, -0.6), xlabel=f"Points above {floor}")
        summary = "Differences on the mean of ten, with 95 % intervals over seeds and documents."
        return to_plot(figure, "arms", "What the paper left open", summary)


def write_scores(arms: Sequence[Arm], path: Path, title: str) -> None:
    """Write a row an arm: its benchmarks and their mean."""
    from kd_bench.registry import load_tasks
    from kd_bench.report.tables import Column, Row, Table

    titles = {task.id: task.short for task in load_tasks()}
    keys = list(arms[0].scores) if arms else []
    columns = (Column("arm", "Arm", "text"), *(Column(key, titles[key]) for key in keys))
    rows = (Row.of(arm.name, arm.name, *map(arm.scores.get, keys), arm.mean) for arm in arms)
    _write(Table(title, (*columns, Column("mean", "Mean of ten")), tuple(rows)), path)


def _write(table: "Table", path: Path) -> None:
    from kd_bench.report.tables import to_csv, to_markdown

    write_text(path.with_suffix(".csv"), to_csv(table))
    write_text(path.with_suffix(".md"), to_markdown(table))
    typer.echo(f"Table: {path}.md and .csv")


def _cell(found: "Estimate | None") -> "Cell":
    from kd_bench.report.tables import Cell

    return Cell(found.value, interval=found.interval) if found else Cell()


def _intervals(
    axes: Any, shown: "Sequence[tuple[float, Estimate]]", *, lying: bool = False, **look: Any
) -> None:
    """Draw estimates with their intervals, each at a position of the other axis."""
    at, values = [position for position, _ in shown], [found.value for _, found in shown]
    ends = [found.interval for _, found in shown]
    below = [value - end.low if end else 0.0 for value, end in zip(values, ends, strict=True)]
    above = [end.high - value if end else 0.0 for value, end in zip(values, ends, strict=True)]
    look |= {"markersize": 4, "capsize": 2}
    if lying:
        axes.errorbar(values, at, xerr=(below, above), linestyle="", **look)
    else:
        axes.errorbar(at, values, yerr=(below, above), **look)
