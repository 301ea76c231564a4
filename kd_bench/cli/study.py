"""`kd-bench demo --study`: when does a teacher pay? Label errors by number of labels, by method.

Every cell of the map trains each method with each seed on the same labels and evaluates on the ten
test sets. What is finished is not run again; the table and the plot are of the cells so far.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kd_bench.cli.demo import Student, evaluation
from kd_bench.cli.jobs import run_jobs
from kd_bench.errors import UsageError
from kd_bench.files import write_text

if TYPE_CHECKING:
    from kd_bench.report.style import Plot

CHECKPOINTS = Path("checkpoints/study")
RESULTS = Path("results/study")
LOGS = CHECKPOINTS / "logs"
MAP = Path("reports/study")
COUNTS = (120, 300, 600, 1200)


@dataclass(frozen=True)
class Cell:
    """One place of the map."""

    error: int  # wrong labels in percent
    count: int  # labelled conversations

    @property
    def name(self) -> str:
        return f"errors{self.error:02d}-labels{self.count}"

    def student(self, method: str, seed: int) -> Student:
        data = f"embedded:data/study/errors-{self.error:02d}/conversations.json"
        settings = (f"data.path={data}", f"data.limit={self.count}")
        return Student(method, seed, CHECKPOINTS / self.name, settings)


def cells() -> list[Cell]:
    """Every cell, the demo's own regime first, then those farthest from what is known."""
    from kd_bench.world.build import STUDY_ERRORS

    errors = [round(100 * error) for error in STUDY_ERRORS]
    every = [Cell(error, count) for count in COUNTS for error in errors]
    first = [Cell(25, 600), Cell(0, 600), Cell(40, 600), Cell(25, 120), Cell(25, 1200)]
    return [*first, *(cell for cell in every if cell not in first)]


def draw_map(methods: Sequence[str], seeds: Sequence[int], workers: int) -> None:
    """Fill the map cell by cell; the table is written anew after each.

    Raises:
        UsageError: no methods or no seeds.
    """
    from kd_bench.world.build import world_folder

    if not methods or not seeds:
        raise UsageError("The study needs methods and seeds.", "For example --seeds 0,1,2.")
    world_folder(study=True)
    for cell in cells():
        students = [cell.student(method, seed) for method in methods for seed in seeds]
        unfinished = [s for s in students if not Path(s.checkpoint).exists()]
        commands = [student.train() for student in reversed(unfinished)]
        if commands:
            run_jobs(f"{cell.name}-train", commands, workers, LOGS)
        asked = _unanswered(cell, students)
        shares = [asked[part::workers] for part in range(workers)]
        commands = [evaluation(share, RESULTS / cell.name) for share in shares if share]
        if commands:
            run_jobs(f"{cell.name}-eval", commands, workers, LOGS)
        typer.echo(_line(cell))
        write_map()
    typer.echo(f"Map: {MAP / 'map.csv'}, {MAP / 'map.svg'}")


def _unanswered(cell: Cell, students: Sequence[Student]) -> list[str]:
    """Checkpoints without a complete run in the cell's store."""
    from kd_bench.store import list_runs

    folder = RESULTS / cell.name
    runs = list_runs(folder) if folder.exists() else []
    done = {
        (run.manifest.model.method, run.manifest.model.seed)
        for run in runs
        if run.manifest.status == "complete"
    }
    return [s.checkpoint for s in students if (s.method, s.seed) not in done]


@dataclass(frozen=True)
class Found:
    """What a cell says about one method: mean of ten and points above SFT, with 95 % intervals."""

    cell: Cell
    method: str
    seeds: int
    mean: float
    difference: float | None
    low: float | None
    high: float | None


def findings(cell: Cell) -> list[Found]:
    """Every method of a cell, or nothing while the cell is empty."""
    from kd_bench.records import AVERAGE
    from kd_bench.report.board_loading import load_board
    from kd_bench.report.relations import read_evidence, relate

    folder = RESULTS / cell.name
    if not folder.exists():
        return []
    board = load_board(folder)
    board = relate(board, read_evidence(board))
    made = []
    for entry in board.entries:
        score = entry.score(AVERAGE)
        if not score.known:
            continue
        above = entry.differences.get(AVERAGE)
        interval = above.interval if above is not None else None
        made.append(
            Found(
                cell,
                entry.method,
                len(entry.runs),
                score.value,
                above.value if above is not None and above.known else None,
                interval.low if interval else None,
                interval.high if interval else None,
            )
        )
    return made


def _line(cell: Cell) -> str:
    parts = []
    for found in findings(cell):
        text = f"{found.method} {found.mean:.1f}"
        if found.difference is not None and found.low is not None:
            text += f" ({found.difference:+.1f}, {found.low:+.1f} to {found.high:+.1f})"
        parts.append(text)
    return f"{cell.error} % wrong, {cell.count} conversations: {'; '.join(parts)}"


def write_map() -> None:
    """`map.csv`, a row a cell and method, in points; and `map.svg`, which shows the rows."""
    MAP.mkdir(parents=True, exist_ok=True)
    every = sorted(cells(), key=lambda cell: (cell.error, cell.count))
    found = [each for cell in every for each in findings(cell)]
    titles = ["wrong_percent", "conversations", "method", "seeds", "mean", "above_sft", "low",
              "high"]  # fmt: skip
    with (MAP / "map.csv").open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(titles)
        for each in found:
            numbers = (each.mean, each.difference, each.low, each.high)
            table.writerow(
                [each.cell.error, each.cell.count, each.method, each.seeds]
                + ["" if number is None else f"{number:.2f}" for number in numbers]
            )
    write_text(MAP / "map.svg", map_plot(found).standalone())


def map_plot(found: Sequence[Found]) -> "Plot":
    """Points above SFT by number of conversations: a panel an error rate, a line a method."""
    from kd_bench.report.style import GRID, canvas, legend, marker, plotting, series, to_plot

    errors = sorted({cell.error for cell in cells()})
    methods = sorted({each.method for each in found if each.difference is not None})
    with plotting():
        figure, grid = canvas(7.2, 2.6, 1, len(errors))
        for axes, error in zip(grid[0], errors, strict=True):
            axes.set_title(f"{error} % wrong")
            axes.axhline(0, color=GRID)
            axes.set(xscale="log", xlim=(90, 1600), xticks=COUNTS, xticklabels=COUNTS)
            axes.minorticks_off()
            for number, method in enumerate(methods):
                rows = [f for f in found if (f.cell.error, f.method) == (error, method)]
                heights = [f.difference or 0.0 for f in rows]
                ends = [(f.low or 0.0, f.high or 0.0) for f in rows]
                bars = [[h - e[0], e[1] - h] for h, e in zip(heights, ends, strict=True)]
                axes.errorbar(
                    [f.cell.count * 1.06**number for f in rows], heights,
                    yerr=list(zip(*bars, strict=True)) or None, color=series(number),
                    marker=marker(number), capsize=2, label=method,
                )  # fmt: skip
        grid[0][0].set_ylabel("Points above SFT")
        figure.supxlabel("Labelled conversations", fontsize=8.5)
        legend(figure, grid[0][0])
        summary = (
            f"Points above SFT on the mean of ten, with 95 % intervals, in "
            f"{len({f.cell for f in found})} of {len(cells())} cells."
        )
        return to_plot(figure, "map", "When does a teacher pay?", summary)
