"""`kd-bench demo`: the whole product on the embedded world, by its own commands."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kd_bench.cli.jobs import run_jobs
from kd_bench.cli.options import comma_separated, whole_numbers

RESULTS = Path("results/demo")
CHECKPOINTS = Path("checkpoints/demo")
LOGS = CHECKPOINTS / "logs"
REPORT = Path("reports/demo")
TEACHER = "embedded:weights/teacher"
FLOOR = "sft"
SWITCHED = "switch-kd"
"""The method whose students' eyes are tried before the teacher's language model, too."""
PAIRS = (("kl", "sft"), ("switch-kd", "kl"), ("switch-kd", "sft"))
"""Who is compared with whom, the question that the demo is about last."""


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
    from kd_bench.world.build import world_folder

    start = time.monotonic()
    typer.echo("Train, evaluate, report. Ctrl-C stops; the same command goes on from there.")
    workers = processes or os.cpu_count() or 1
    if study:
        from kd_bench.cli.study import draw_map

        draw_map(comma_separated(methods) or [], whole_numbers(seeds, "--seeds"), workers)
        return
    world_folder()
    typer.echo(_introduction())
    names = comma_separated(methods) or []
    numbers = whole_numbers(seeds, "--seeds")
    students = [Student(method, seed) for method in names for seed in numbers]
    # The slow methods first: nothing long is left over when the cores run out of work.
    run_jobs("train", [student.train() for student in reversed(students)], workers, LOGS)
    teacher = evaluation([TEACHER], RESULTS, "--role", "teacher", "--name", "teacher")
    checkpoints = [student.checkpoint for student in students]
    parts = range(min(workers, len(students)))
    shares = [evaluation(checkpoints[part::workers], RESULTS) for part in parts]
    hybrids = [student.hybrid() for student in students if student.method == SWITCHED]
    # Shares first: they take longest.
    run_jobs("eval", [*shares, teacher, *hybrids], workers, LOGS)
    _report(names, time.monotonic() - start)


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
        return self.root / f"{self.method}-seed{self.seed}"

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "final")

    def train(self) -> list[str]:
        settings = [f"method={self.method}", f"seed={self.seed}", f"output={self.folder}"]
        return ["train", "mini", *settings, *self.settings]

    def hybrid(self) -> list[str]:
        """The visual switch of this student and the teacher."""
        return evaluation([], RESULTS, "--vision", self.checkpoint, "--language", TEACHER)


def evaluation(checkpoints: Sequence[str], results: Path, *options: str) -> list[str]:
    """The command that evaluates checkpoints into a store."""
    return ["eval", *checkpoints, *options, "--results", str(results)]


def _introduction() -> str:
    """What is about to be learnt from, and how good it is."""
    from kd_bench.distill.recipe import load_recipe
    from kd_bench.world.build import ERROR, VERSION

    recipe = load_recipe("mini")
    source, stage = recipe.data_of(recipe.stages[-1]), recipe.stages[-1]
    return (
        f"Embedded world {VERSION}. Students learn from {source.limit} conversations whose "
        f"annotators give a wrong answer {ERROR:.0%} of the time (a neighbouring colour, another "
        f"letter, a count off by one), {stage.steps} steps of {stage.batch_size}, every method "
        "with the same settings. The answers of the ten test sets are right."
    )


def _report(methods: list[str], seconds: float) -> None:
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
