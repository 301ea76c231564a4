"""`kd-bench doctor`."""

from typing import TYPE_CHECKING, Annotated

import typer

from kd_bench.errors import ExitCode

if TYPE_CHECKING:
    from rich.console import Console

    from kd_bench.doctor import Folder, Package

GIB = 1 << 30


def doctor(
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Also train, evaluate and report, very small.")
    ] = False,
) -> None:
    """What is installed, what is missing and how to get it; does it work?"""
    from rich.console import Console

    from kd_bench import doctor as facts

    console = Console(soft_wrap=True, highlight=False)
    installed = facts.packages()
    problems = [
        facts.Problem(package.problem, f'pip install "{package.name}{package.needed}"')
        for package in installed
        if package.problem
    ]
    problems += facts.import_problems(installed)
    _show_machine(console)
    _show_packages(console, installed)
    places = facts.folders()
    _show_folders(console, places)
    if self_test:
        problems += [facts.Problem(text) for text in _self_test(console, installed)]
    console.print()
    for problem in problems:
        console.print(f"[bold red]problem[/] {_inert(problem.text)}")
        if problem.mend:
            console.print(f"[bold]mend it[/] {_inert(problem.mend)}")
    if problems:
        raise typer.Exit(ExitCode.INCOMPLETE)
    more = "" if self_test else " `kd-bench doctor --self-test` tries train, eval and report."
    console.print(f"No problem found.{more}")


def _show_machine(console: "Console") -> None:
    import platform
    import sys

    from kd_bench.provenance import code_version, hardware

    code, machine = code_version(), hardware()
    commit = f", commit {code['commit'][:12]}" if code["commit"] else ""
    memory = machine["memory_bytes"]
    threads = machine["omp_num_threads"]
    console.print(f"kd-bench      {code['version']}{commit}{', changed' if code['dirty'] else ''}")
    console.print(f"Python        {platform.python_version()}, {platform.platform()}")
    console.print(
        f"Processor     {machine['processor']}, {machine['cores']} cores"
        + (f", {memory / GIB:.1f} GiB memory" if memory else "")
        + (f", OMP_NUM_THREADS={threads}" if threads else "")
    )
    seen = "none that torch sees" if "torch" in sys.modules else "unknown without torch"
    console.print(f"Accelerator   {', '.join(machine['accelerators']) or seen}")


def _show_packages(console: "Console", installed: list["Package"]) -> None:
    from rich.table import Table

    table = Table("Package", "Version", "Needed", "Extra", box=None)
    for package in installed:
        found = package.version or f"[yellow]missing[/]: {_inert(package.install)}"
        style = "bold red" if package.problem else ""
        table.add_row(package.name, found, package.needed, package.extra or "base", style=style)
    console.print()
    console.print(table)


def _show_folders(console: "Console", places: list["Folder"]) -> None:
    console.print()
    for place in places:
        state = "writable" if place.writable else "[bold yellow]not writable[/]"
        note = f", {place.note}" if place.note else ""
        free = f"{place.free_bytes / GIB:.1f} GiB free"
        console.print(f"{place.title:<15} {_inert(str(place.path))}: {state}, {free}{note}")


def _self_test(console: "Console", installed: list["Package"]) -> list[str]:
    """Run it, one line a command; the problems."""
    import tempfile
    from pathlib import Path

    from kd_bench import doctor as facts

    console.print("\nSelf-test")
    problems = []
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
        for step in facts.self_test(installed, Path(folder)):
            seconds = f"{step.seconds:4.0f} s" if step.seconds else ""
            style = {"works": "green", "fails": "bold red"}.get(step.state, "yellow")
            state = f"[{style}]{step.state:<8}[/]"
            console.print(f"{step.name:<8} {state}{seconds} {_inert(step.reason)}")
            if step.state == "fails":
                problems.append(f"`kd-bench {step.name}` does not work: {step.reason}")
    return problems


def _inert(text: str) -> str:
    from rich.markup import escape

    return escape(text)
