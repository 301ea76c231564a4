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
LEARNING_RATES = {"sft": "2.0e-3", "switch-kd": "1.0e-3"}
"""Each method's best of three on validation scenes (world/TUNING.md); others keep the recipe's."""


def demo(
    methods: Annotated[str, typer.Option(help="Training methods to compare.")] = "sft,switch-kd",
    seeds: Annotated[str, typer.Option(help="Training seeds, three or more.")] = "0,1,2",
    processes: Annotated[
        int | None, typer.Option(help="Commands side by side; default: one a core.", min=1)
    ] = None,
) -> None:
    """Train, evaluate and report on the embedded world; a second call continues the first."""
    from kd_bench.world.embedded import world_folder

    start = time.monotonic()
    typer.echo("Train, evaluate, report. Ctrl-C stops; the same command goes on from there.")
    workers = processes or os.cpu_count() or 1
    world_folder()
    names = comma_separated(methods) or []
    students = [
        Student(method, seed) for method in names for seed in whole_numbers(seeds, "--seeds")
    ]
    # The slow methods first: nothing long is left over when the cores run out of work.
    run_jobs("train", [student.train() for student in reversed(students)], workers, LOGS)
    teacher = _evaluate([TEACHER], "--role", "teacher", "--name", "teacher")
    checkpoints = [student.checkpoint for student in students]
    shares = [_evaluate(checkpoints[part::workers]) for part in range(min(workers, len(students)))]
    hybrids = [student.hybrid() for student in students if student.method == SWITCHED]
    # Shares first: they take longest.
    run_jobs("eval", [*shares, teacher, *hybrids], workers, LOGS)
    _report(names, time.monotonic() - start)


@dataclass(frozen=True)
class Student:
    """One training run of the demo."""

    method: str
    seed: int

    @property
    def folder(self) -> Path:
        return CHECKPOINTS / f"{self.method}-seed{self.seed}"

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "final")

    def train(self) -> list[str]:
        settings = [f"method={self.method}", f"seed={self.seed}", f"output={self.folder}"]
        if self.method in LEARNING_RATES:
            settings.append(f"learning_rate={LEARNING_RATES[self.method]}")
        return ["train", "mini", *settings]

    def hybrid(self) -> list[str]:
        """The visual switch of this student and the teacher."""
        return _evaluate([], "--vision", self.checkpoint, "--language", TEACHER)


def _evaluate(checkpoints: Sequence[str], *options: str) -> list[str]:
    return ["eval", *checkpoints, *options, "--results", str(RESULTS)]


def _report(methods: list[str], seconds: float) -> None:
    from rich.console import Console

    from kd_bench.report import render_report

    page = render_report(RESULTS, REPORT, console=Console())
    for method in methods:
        if method != FLOOR and FLOOR in methods:
            typer.echo(_verdict(method))
    typer.echo(f"{seconds / 60:.1f} minutes. Report: {page}")


def _verdict(method: str) -> str:
    """The method against the floor over the seeds, with an interval: whatever came out."""
    from kd_bench.compare import compare_methods
    from kd_bench.compare.methods import runs_of_method

    ours, floor = runs_of_method(RESULTS, method), runs_of_method(RESULTS, FLOOR)
    found = compare_methods(floor, ours).average
    interval = found.interval
    if interval is None:
        return f"Verdict: too few documents to compare {method} with {FLOOR}."
    low, high = interval.low, interval.high
    if low > 0:
        outcome = f"{method} is better than {FLOOR}"
    elif high < 0:
        outcome = f"{method} is worse than {FLOOR}"
    else:
        outcome = f"{method} and {FLOOR} cannot be told apart"
    return (
        f"Verdict: {outcome} on the mini world: {found.difference:+.1f} points on the mean of ten "
        f"(95 % interval {low:+.1f} to {high:+.1f}, p = {found.p:.3f}; {len(ours)} and "
        f"{len(floor)} seeds)."
    )
