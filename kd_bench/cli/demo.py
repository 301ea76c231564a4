"""`kd-bench demo`: the whole product on the embedded world, by its own commands; and its study.

`--study` asks when a teacher pays: label errors by number of labels, by method. Every cell of that
map trains each method with each seed on the same labels and evaluates on the ten test sets. What
is finished is not run again; the table and the plot are of the cells so far.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kd_bench.cli.options import comma_separated, this_program, whole_numbers
from kd_bench.cli.process import run_jobs
from kd_bench.errors import UsageError
from kd_bench.files import write_text

if TYPE_CHECKING:
    import pandas as pd

    from kd_bench.report.style import Plot

RESULTS = Path("results/demo")
CHECKPOINTS = Path("checkpoints/demo")
REPORT = Path("reports/demo")
TEACHER = "embedded:weights/teacher"
FLOOR = "sft"
SWITCHED = "switch-kd"
"""The method whose students' vision is tried before the teacher's language model, too."""
PAIRS = (("kl", "sft"), ("switch-kd", "kl"), ("switch-kd", "sft"))
"""Who is compared with whom, the question that the demo is about last."""
TRAINING = {"sft": 30.0, "kl": 40.0, "switch-kd": 60.0}
EVALUATION = 25.0
"""Seconds of one core, of a training by method and of a checkpoint's ten benchmarks: a first guess
for the time left, which the commands that have ended correct."""


def demo(
    methods: Annotated[str, typer.Option(help="Training methods to compare.")] = "sft,kl,switch-kd",
    seeds: Annotated[str, typer.Option(help="Training seeds, three or more.")] = "0,1,2",
    processes: Annotated[
        int | None, typer.Option(help="Commands side by side; default: one a core.", min=1)
    ] = None,
    study: Annotated[
        bool, typer.Option(help="The map of docs/study.md instead: label errors by labels; hours.")
    ] = False,
) -> None:
    """Train, evaluate and report on the embedded world; a second call continues the first."""
    start = time.monotonic()
    typer.echo("Train, evaluate, report. Ctrl-C stops; the same command goes on from there.")
    workers = processes or os.cpu_count() or 1
    names, numbers = comma_separated(methods) or [], whole_numbers(seeds, "--seeds")
    if study:
        draw_map(names, numbers, workers)
        return
    students = [Student(method, seed) for method in names for seed in numbers]
    groups = commands_of(students, workers)
    tell_plan(names, numbers, groups, workers)
    run_jobs(groups, workers, CHECKPOINTS / "logs", seconds_of)
    tell_report(names, time.monotonic() - start)
    tell_next(names)


def commands_of(students: Sequence["Student"], workers: int) -> dict[str, list[list[str]]]:
    """Every command of the demo: slow ones first, so that no core is idle at the end."""
    checkpoints = [student.checkpoint for student in students]
    parts = range(min(workers, len(students)))
    shares = [evaluation(checkpoints[part::workers], RESULTS) for part in parts]
    teacher = evaluation([TEACHER], RESULTS, "--role", "teacher", "--name", "teacher")
    hybrids = [student.hybrid() for student in students if student.method == SWITCHED]
    return {
        "train": [student.train() for student in reversed(students)],
        "eval": [*shares, teacher, *hybrids],
    }


def seconds_of(command: Sequence[str]) -> float:
    """What a command of the demo may take on one core."""
    if command[0] == "train":
        method = next(word for word in command if word.startswith("method=")).partition("=")[2]
        return TRAINING.get(method, TRAINING["kl"])
    return EVALUATION * max(1, sum(word.endswith("/final") for word in command[:-2]))


def tell_plan(
    methods: Sequence[str],
    seeds: Sequence[int],
    groups: dict[str, list[list[str]]],
    workers: int,
) -> None:
    """Say what will be done and how long it may take, then draw the world where it is missing."""
    from rich.console import Console

    from kd_bench.world.build import VERSION, wanted_cache, world_folder

    commands = [command for group in groups.values() for command in group]
    minutes = sum(map(seconds_of, commands)) / workers / 60
    cores = "1 core" if workers == 1 else f"{workers} cores"
    typer.echo(f"The plan, about {max(1, round(minutes))} min on {cores}:")
    if not (wanted_cache() / f"world-{VERSION}").is_dir():
        typer.echo("  draw the embedded world, only this once")
    every = f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'} of {', '.join(methods)}"
    typer.echo(f"  train {every}: {len(groups['train'])} commands")
    typer.echo(f"  evaluate them and the teacher on ten benchmarks: {len(groups['eval'])} commands")
    typer.echo(f"  report: {REPORT / 'index.html'}")
    with Console().status("Drawing the embedded world"):
        world_folder()
    typer.echo(introduction())


def tell_next(methods: Sequence[str]) -> None:
    """What to type next, each line as it stands."""
    store, program = f"--results {RESULTS}", this_program()
    typer.echo("\nNext:")
    typer.echo(f"  {program} runs list {store}")
    if len(methods) > 1:
        typer.echo(f"  {program} compare {' '.join(methods)} --methods {store}")
    else:
        typer.echo(f"  {program} runs show teacher {store}")
    typer.echo(f"  {program} report {store}")


@dataclass(frozen=True)
class Student:
    """One training run of `mini`.

    Attributes:
        root: folder of its checkpoint's folder.
        settings: overrides of the recipe.
    """

    method: str
    seed: int
    root: Path = CHECKPOINTS
    settings: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where its training writes."""
        return self.root / f"{self.method}-seed{self.seed}"

    @property
    def checkpoint(self) -> str:
        """The finished student."""
        return str(self.folder / "final")

    def train(self) -> list[str]:
        """The command that trains it."""
        settings = [f"method={self.method}", f"seed={self.seed}", f"output={self.folder}"]
        return ["train", "mini", *settings, *self.settings]

    def hybrid(self) -> list[str]:
        """The visual switch of this student and the teacher."""
        return evaluation([], RESULTS, "--vision", self.checkpoint, "--language", TEACHER)


def evaluation(checkpoints: Sequence[str], results: Path, *options: str) -> list[str]:
    """The command that evaluates checkpoints into a store."""
    return ["eval", *checkpoints, *options, "--results", str(results)]


def introduction() -> str:
    """What is about to be learnt from, and how good it is."""
    from kd_bench.distill.recipe import load_recipe
    from kd_bench.world.build import ERROR, VERSION

    recipe = load_recipe("mini")
    stage = recipe.stages[-1]
    (source,) = recipe.data_of(stage)
    return (
        f"Embedded world {VERSION}. Students learn from {source.limit} conversations whose "
        f"annotators give a wrong answer {ERROR:.0%} of the time (a neighbouring colour, another "
        f"letter, a count off by one), {stage.steps} steps of {stage.batch_size}, every method "
        "with the same settings. The answers of the ten test sets are right."
    )


def tell_report(methods: list[str], seconds: float) -> None:
    """Write the page; the last lines are the table and the verdicts."""
    from rich.console import Console

    from kd_bench.report import render_report

    console = Console()
    with console.capture() as tables:
        main = SWITCHED if SWITCHED in methods else None
        page = render_report(RESULTS, REPORT, console=console, main=main)
    typer.echo(f"{seconds / 60:.1f} minutes. Report: {page}\n")
    typer.echo(tables.get())
    for method, floor in PAIRS:
        if method in methods and floor in methods:
            typer.echo(_verdict(method, floor))
    for method in methods:
        if FLOOR in methods and method != FLOOR and (method, FLOOR) not in PAIRS:
            typer.echo(_verdict(method, FLOOR))


def _verdict(method: str, floor: str) -> str:
    """One method against another over the seeds, with an interval: whatever came out."""
    from kd_bench.compare.methods import compare_methods, runs_of_method
    from kd_bench.records import AVERAGE

    ours, theirs = runs_of_method(RESULTS, method), runs_of_method(RESULTS, floor)
    found = compare_methods(theirs, ours)[AVERAGE]
    interval = found.interval
    if interval is None:
        return f"Verdict: too few documents to compare {method} with {floor}."
    low, high = interval.low, interval.high
    if low > 0:
        outcome = f"{method} is better than {floor}"
    elif high < 0:
        outcome = f"{method} is worse than {floor}"
    else:
        outcome = f"{method} and {floor} cannot be told apart"
    p = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.3f}"
    return (
        f"Verdict: {outcome} on the mini world: {found.value:+.1f} points on the mean of ten "
        f"(95 % interval {low:+.1f} to {high:+.1f}, {p}; {len(ours)} and "
        f"{len(theirs)} seeds)."
    )


# --- study
STUDY = Path("checkpoints/study")
STUDY_RESULTS = Path("results/study")
MAP = Path("reports/study")
COUNTS = (120, 300, 600, 1200)
COLUMNS = ("wrong_percent", "conversations", "method", "seeds", "mean", "above_sft", "low", "high")


@dataclass(frozen=True)
class Cell:
    """One place of the map."""

    error: int  # wrong labels in percent
    count: int  # labelled conversations

    @property
    def name(self) -> str:
        """Of its folders."""
        return f"errors{self.error:02d}-labels{self.count}"

    def student(self, method: str, seed: int) -> Student:
        """A training on the labels of this cell."""
        data = f"embedded:data/study/errors-{self.error:02d}/conversations.json"
        settings = (f"data.path={data}", f"data.limit={self.count}")
        return Student(method, seed, STUDY / self.name, settings)


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
        asked = _unanswered(cell, students)
        shares = [asked[part::workers] for part in range(workers)]
        groups = {
            f"{cell.name}-train": [student.train() for student in reversed(unfinished)],
            f"{cell.name}-eval": [evaluation(s, STUDY_RESULTS / cell.name) for s in shares if s],
        }
        run_jobs(groups, workers, STUDY / "logs", seconds_of)
        typer.echo(_line(cell))
        write_map()
    typer.echo(f"Map: {MAP / 'map.csv'}, {MAP / 'map.svg'}")


def _unanswered(cell: Cell, students: Sequence[Student]) -> list[str]:
    """Checkpoints without a complete run in the cell's store."""
    from kd_bench.store import list_runs

    folder = STUDY_RESULTS / cell.name
    runs = list_runs(folder) if folder.exists() else []
    done = {
        (run.manifest.model.method, run.manifest.model.seed)
        for run in runs
        if run.manifest.status == "complete"
    }
    return [s.checkpoint for s in students if (s.method, s.seed) not in done]


def findings(*chosen: Cell) -> "pd.DataFrame":
    """A row a cell and method, in points; none of cells that are empty yet.

    Columns: wrong_percent, conversations, method, seeds, mean of ten, above_sft with the ends
    low and high of its 95 % interval, NaN where there is none.
    """
    import pandas as pd

    from kd_bench.records import AVERAGE
    from kd_bench.report.relations import read_board

    rows: list[tuple[int | float | str | None, ...]] = []
    for cell in chosen:
        if not (STUDY_RESULTS / cell.name).exists():
            continue
        board, _ = read_board(STUDY_RESULTS / cell.name)
        for entry in board.entries:
            mean, above = entry.score(AVERAGE), entry.differences.get(AVERAGE)
            if mean.known:
                points = above.value if above is not None and above.known else None
                ends = above.interval if above is not None else None
                low, high = (ends.low, ends.high) if ends else (None, None)
                known = (cell.error, cell.count, entry.method, len(entry.runs), mean.value)
                rows.append((*known, points, low, high))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict.fromkeys(COLUMNS[4:], float))


def _line(cell: Cell) -> str:
    parts = []
    for row in findings(cell).itertuples():
        ends = f"{row.low:+.1f} to {row.high:+.1f}"
        above = "" if ends == "+nan to +nan" else f" ({row.above_sft:+.1f}, {ends})"
        parts.append(f"{row.method} {row.mean:.1f}{above}")
    return f"{cell.error} % wrong, {cell.count} conversations: {'; '.join(parts)}"


def write_map() -> None:
    """`map.csv`, a row a cell and method, in points; and `map.svg`, which shows the rows."""
    found = findings(*sorted(cells(), key=lambda cell: (cell.error, cell.count)))
    write_text(MAP / "map.csv", found.to_csv(index=False, float_format="%.2f", lineterminator="\n"))
    write_text(MAP / "map.svg", _map_plot(found).standalone())


def _map_plot(found: "pd.DataFrame") -> "Plot":
    """Points above SFT by number of conversations: a panel an error rate, a line a method."""
    from kd_bench.report.style import GRID, canvas, legend, marker, plotting, series, to_plot

    errors = sorted({cell.error for cell in cells()})
    methods = sorted(found[found["above_sft"].notna()]["method"].unique())
    points = found.fillna({"above_sft": 0.0, "low": 0.0, "high": 0.0})
    with plotting():
        figure, grid = canvas(7.2, 2.6, 1, len(errors))
        for axes, error in zip(grid[0], errors, strict=True):
            axes.set_title(f"{error} % wrong")
            axes.axhline(0, color=GRID)
            axes.set(xscale="log", xlim=(90, 1600), xticks=COUNTS, xticklabels=COUNTS)
            axes.minorticks_off()
            for number, method in enumerate(methods):
                rows = points[(points["wrong_percent"] == error) & (points["method"] == method)]
                heights = rows["above_sft"]
                axes.errorbar(
                    rows["conversations"] * 1.06**number, heights,
                    yerr=(heights - rows["low"], rows["high"] - heights), color=series(number),
                    marker=marker(number), capsize=2, label=method,
                )  # fmt: skip
        grid[0][0].set_ylabel("Points above SFT")
        figure.supxlabel("Labelled conversations", fontsize=8.5)
        legend(figure, *grid[0][0].get_legend_handles_labels())
        summary = (
            f"Points above SFT on the mean of ten, with 95 % intervals, in "
            f"{len(found.drop_duplicates(list(COLUMNS[:2])))} of {len(cells())} cells."
        )
        return to_plot(figure, "map", "When does a teacher pay?", summary)
