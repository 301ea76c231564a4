"""`kd-bench demo`: the whole product on the embedded world, by its own commands."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kd_bench.cli.jobs import run_jobs
from kd_bench.cli.options import comma_separated, this_program, whole_numbers
from kd_bench.errors import UsageError

RESULTS = Path("results/demo")
CHECKPOINTS = Path("checkpoints/demo")
REPORT = Path("reports/demo")
TEACHER = "embedded:weights/teacher"
FLOOR = "sft"
SWITCHED = "switch-kd"
"""The method whose students' vision is tried before the teacher's language model, too."""
PAIRS = (("kl", "sft"), ("switch-kd", "kl"), ("switch-kd", "sft"))
"""Who is compared with whom, the question that the demo is about last."""
TRAINING = {"sft": 22.0, "kl": 24.0, "switch-kd": 54.0}
EVALUATION = 4.0
"""CPU seconds of a training by method and of a checkpoint's ten benchmarks, measured on an AMD EPYC
(30, 31 and 71; 5 beside six busy processes): a first guess for the time left, which the commands
that have ended correct."""


def demo(
    methods: Annotated[str, typer.Option(help="Training methods to compare.")] = "sft,kl,switch-kd",
    seeds: Annotated[str, typer.Option(help="Training seeds, three or more.")] = "0,1,2",
    processes: Annotated[
        int | None, typer.Option(help="Commands side by side; default: one a core.", min=1)
    ] = None,
    study: Annotated[
        bool, typer.Option(help="The study of docs/study.md instead; hours, in parts.")
    ] = False,
    parts: Annotated[
        str | None,
        typer.Option(
            help="Of the study: trials, map, arms; default: all. "
            "--methods and --seeds are the map's."
        ),
    ] = None,
) -> None:
    """Train, evaluate and report on the embedded world; a second call continues the first."""
    start = time.monotonic()
    names, numbers = methods_of(methods), whole_numbers(seeds, "--seeds")
    if not numbers:
        raise UsageError("--seeds names no seed.", "Write 0,1,2.")
    if parts is not None and not study:
        raise UsageError("--parts is of the study.", "Add --study.")
    typer.echo("Train, evaluate, report. Ctrl-C stops; the same command goes on from there.")
    workers = processes or os.cpu_count() or 1
    if study:
        from kd_bench.cli.study import run_study

        run_study(comma_separated(parts), names, numbers, workers)
        return
    students = [Student(method, seed) for method in names for seed in numbers]
    groups = commands_of(students)
    tell_plan(names, numbers, groups, workers)
    run_jobs(groups, workers, CHECKPOINTS / "logs", seconds_of)
    tell_report(names, time.monotonic() - start)
    tell_next(names)


def methods_of(text: str) -> list[str]:
    """The methods that --methods names.

    Raises:
        UsageError: none, one that there is not, or one twice.
    """
    from kd_bench.distill.recipe import METHODS, check_method

    names = comma_separated(text) or []
    if not names:
        raise UsageError("--methods names no method.", f"Known: {', '.join(METHODS)}.")
    for name in names:
        check_method(name)
    if len(set(names)) < len(names):
        raise UsageError(f"--methods {text}: a method stands twice.", "Name each once.")
    return names


def commands_of(students: Sequence["Student"]) -> dict[str, list[list[str]]]:
    """Every command of the demo: slow ones first, so that no core is idle at the end.

    A student is evaluated once it is trained, when no training waits.
    """
    teacher = evaluation([TEACHER], RESULTS, "--role", "teacher", "--name", "teacher")
    hybrids = [student.hybrid(RESULTS) for student in students if student.method == SWITCHED]
    slow_first = sorted(students, key=lambda student: -TRAINING.get(student.method, 0.0))
    return {
        "train": [student.train() for student in slow_first],
        "eval": [
            teacher,
            *(evaluation([student.checkpoint], RESULTS) for student in slow_first),
            *hybrids,
        ],
    }


def seconds_of(command: Sequence[str]) -> float:
    """What a command of the demo may take on one core."""
    if command[0] == "train":
        method = next((w for w in command if w.startswith("method=")), "").partition("=")[2]
        if method == "vsd" or any("of: switch" in word for word in command):
            method = SWITCHED
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
        method: in tables; the recipe's method, unless `settings` say what it is.
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

    @property
    def is_trained(self) -> bool:
        """Whether the finished student of this recipe is there."""
        from kd_bench.distill.recipe import load_recipe

        kept = self.folder / "recipe.yaml"
        if not (Path(self.checkpoint, "model.safetensors").exists() and kept.exists()):
            return False
        recipe = load_recipe("mini", self.train()[2:])
        return load_recipe(kept).model_copy(update={"output": recipe.output}) == recipe

    def train(self) -> list[str]:
        """The command that trains it."""
        settings = self.settings or (f"method={self.method}",)
        return ["train", "mini", *settings, f"seed={self.seed}", f"output={self.folder}"]

    def hybrid(self, results: Path, *options: str) -> list[str]:
        """The command that evaluates the visual switch of this student and the teacher."""
        switch = ("--vision", self.checkpoint, "--language", TEACHER)
        return evaluation([], results, *switch, *options)


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
        "with the same settings. The targets of the ten test sets are the truth."
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
