"""`kd-bench doctor`: what is installed here and whether it works, down to a self-test.

Which packages belong to which extra is read from kd-bench's own metadata, so that it cannot differ
from what pip installs.
"""

import contextlib
import importlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kd_bench.errors import ExitCode, one_line

if TYPE_CHECKING:
    from rich.console import Console

EXTRAS = ("", "train", "eval", "quantize", "all")
"""From the base to the largest; a package is named with the first that installs it."""
ENGINES = {
    "train": ("kd_bench.distill.train",),
    "eval": (
        "kd_bench.evals.run",
        "kd_bench.evals.models",
        "lmms_eval.evaluator",
        "filelock._api",  # lmms-eval 0.7.3 imports it when it evaluates
    ),
}
"""What `kd-bench train` and `kd-bench eval` import, which is more than their packages' faces."""
STEP_SECONDS = 600
GIB = 1 << 30


def doctor(
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Also train, evaluate and report, very small.")
    ] = False,
) -> None:
    """What is installed, what is missing and how to get it; does it work?"""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    installed = packages()
    problems = [
        Problem(package.problem, f'pip install "{package.name}{package.needed}"')
        for package in installed
        if package.problem
    ]
    problems += _import_problems(installed)
    _show_machine(console)
    _show_packages(console, installed)
    console.print()
    for place in folders():
        state = "writable" if place.writable else "[bold yellow]not writable[/]"
        note = f", {place.note}" if place.note else ""
        free = f"{place.free_bytes / GIB:.1f} GiB free"
        console.print(f"{place.title:<15} {_inert(str(place.path))}: {state}, {free}{note}")
    if self_test:
        problems += _show_self_test(console, installed)
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
    from kd_bench.provenance import code_version, hardware

    code, machine = code_version(), hardware()
    commit = f", commit {code['commit'][:12]}" if code["commit"] else ""
    memory, threads = machine["memory_bytes"], machine["omp_num_threads"]
    seen = "none that torch sees" if "torch" in sys.modules else "unknown without torch"
    lines = {
        "kd-bench": f"{code['version']}{commit}{', changed' if code['dirty'] else ''}",
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "Processor": f"{machine['processor']}, {machine['cores']} cores"
        + (f", {memory / GIB:.1f} GiB memory" if memory else "")
        + (f", OMP_NUM_THREADS={threads}" if threads else ""),
        "Accelerator": ", ".join(machine["accelerators"]) or seen,
    }
    for title, line in lines.items():
        console.print(f"{title:<13} {line}")


def _show_packages(console: "Console", installed: "list[Package]") -> None:
    from rich.table import Table

    table = Table("Package", "Version", "Needed", "Extra", box=None)
    table.title, table.title_justify = "Packages", "left"
    for package in installed:
        found = package.version or f"[yellow]missing[/]: {_inert(package.install)}"
        style = "bold red" if package.problem else ""
        table.add_row(package.name, found, package.needed, package.extra or "base", style=style)
    console.print()
    console.print(table)


def _inert(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@dataclass(frozen=True)
class Problem:
    """Something that does not work here, and the command that mends it where one is known."""

    text: str
    mend: str = ""


# --- packages -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """A package that kd-bench uses.

    Attributes:
        version: empty when it is not installed.
        needed: versions that fit, as pip writes them.
        extra: what installs it; empty for the base.
    """

    name: str
    version: str
    needed: str
    extra: str
    problem: str = ""

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f'pip install "kd-bench[{self.extra}]"' if self.extra else "pip install kd-bench"


def packages() -> list[Package]:
    """Every package of the base and of the extras, base first; none in a bare copy of the code."""
    from packaging.requirements import Requirement

    try:
        lines = requires("kd-bench") or []
    except PackageNotFoundError:
        return []
    found: dict[str, Package] = {}
    for requirement in map(Requirement, lines):
        name, marker = requirement.name, requirement.marker
        fitting = (e for e in EXTRAS if marker is None or marker.evaluate({"extra": e}))
        extra = next(fitting, None)  # None: developers' tools
        known = found.get(name)
        if extra is None or (known and EXTRAS.index(known.extra) <= EXTRAS.index(extra)):
            continue
        needed, there, problem = str(requirement.specifier), "", ""
        with contextlib.suppress(PackageNotFoundError):
            there = version(name)
        if there and not requirement.specifier.contains(there, prereleases=True):
            problem = f"{name} {there} is installed, {needed} is needed"
        elif not there and not extra:
            problem = f"{name} is missing"
        found[name] = Package(name, there, needed, extra, problem)
    return sorted(found.values(), key=lambda each: (EXTRAS.index(each.extra), each.name))


def _import_problems(installed: list[Package]) -> list[Problem]:
    """Load the installed packages of the extras, then what the commands import of them.

    Classic causes are a torchvision that was built for another torch, a missing driver, and a
    package whose newest version lost what another one imports.
    """
    problems = []
    broken: set[str] = set()
    for package in installed:
        if not package.version or not package.extra:
            continue
        error = _import_error(package.name.replace("-", "_"))
        if error is not None:
            broken.add(package.extra)
            text = f"{package.name} {package.version} does not load: {_described(error)}"
            problems.append(Problem(text, _mend(error, installed) or package.install))
    absent = {package.extra for package in installed if not package.version}
    for extra, modules in ENGINES.items():
        if (broken | absent) & {"train", extra}:
            continue
        for module in modules:
            error = _import_error(module)
            if error is not None:
                text = f"`kd-bench {extra}` does not load ({module}): {_described(error)}"
                reinstall = f'pip install --upgrade "kd-bench[{extra}]"'
                problems.append(Problem(text, _mend(error, installed) or reinstall))
                break
    return problems


def _import_error(module: str) -> Exception | None:
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # whatever a broken package raises is its problem
        return error
    return None


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)[:200]}"


def _mend(error: Exception, installed: list[Package]) -> str:
    """The command that brings a version that fits, where the error says whose module lacks."""
    module = (getattr(error, "name", None) or "").partition(".")[0]
    owners = {name.lower() for name in packages_distributions().get(module, [])}
    for package in installed:
        if package.name.lower() in owners:
            return f'pip install "{package.name}{package.needed}"'
    return f"pip install {module}" if module and not owners else ""


# --- folders --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """A place that kd-bench writes to."""

    title: str
    path: Path
    writable: bool
    free_bytes: int
    note: str = ""


def folders(environment: Mapping[str, str] = os.environ) -> list[Folder]:
    """The caches, the store of this working folder and the temporary folder."""
    from kd_bench.world.build import VERSION, wanted_cache

    world = wanted_cache(environment) / f"world-{VERSION}"
    note = "drawn" if world.is_dir() else "drawn on first use"
    general = environment.get("XDG_CACHE_HOME") or "~/.cache"
    hub = environment.get("HF_HOME") or f"{general}/huggingface"
    offline = "HF_HUB_OFFLINE is set" if environment.get("HF_HUB_OFFLINE") else ""
    return [
        _folder("embedded world", world, note),
        _folder("Hugging Face", Path(hub).expanduser(), offline),
        _folder("results", Path(environment.get("KD_BENCH_RESULTS") or "results").resolve()),
        _folder("temporary", Path(tempfile.gettempdir())),
    ]


def _folder(title: str, path: Path, note: str = "") -> Folder:
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return Folder(title, path, writable, shutil.disk_usage(there).free, note)


# --- the self-test --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One command of the self-test.

    Attributes:
        state: `works`, `fails` or `skipped`.
        reason: the command's last words, or why it was skipped.
    """

    name: str
    state: str
    seconds: float = 0.0
    reason: str = ""


# Command, what it needs of the extras, the file that it has to leave.
_STEPS = {
    "train": (
        ("mini", "method=switch-kd", "steps=2", "batch_size=4", "output=checkpoint"),
        ("train",),
        "checkpoint/final/config.json",
    ),
    "eval": (
        ("checkpoint/final", "--tasks", "mme,gqa", "--limit", "12", "--results", "store"),
        ("train", "eval"),
        "store/runs/*/tasks/gqa.json",
    ),
    "report": (("--results", "store", "--to", "page"), (), "page/index.html"),
}


def self_test(installed: list[Package], folder: Path) -> Iterator[Step]:
    """Train, evaluate and report on a very small thing inside `folder`, command by command."""
    missing = {each.extra: each.name for each in installed if not each.version}
    broken = False
    if missing.keys() & {"train", "eval"}:
        _store_run(folder / "store")  # nothing can be evaluated here, something can be reported
    for name, (arguments, needs, product) in _STEPS.items():
        absent = next((extra for extra in needs if extra in missing), None)
        if absent is not None:
            reason = f'{missing[absent]} is missing: pip install "kd-bench[{name}]"'
            yield Step(name, "skipped", reason=reason)
        elif broken:
            yield Step(name, "skipped", reason="what it needs did not work")
        else:
            step = _run(name, arguments, product, folder)
            broken = step.state == "fails"
            yield step


def _store_run(results: Path) -> None:
    """A run of four made-up answers."""
    import pandas as pd

    from kd_bench.records import SAMPLE_COLUMNS, ModelRef, Protocol, TaskResult
    from kd_bench.store import held_run, wanted_run

    answers = [(f"d{number}", "red" if number else "blue") for number in range(4)]
    samples = pd.DataFrame(
        [
            (name, name, "", "?", "red", said, said, float(said == "red"), "ok", "", float("nan"))
            for name, said in answers
        ],
        columns=list(SAMPLE_COLUMNS),
    )
    result = TaskResult("gqa", "self-test", "exact_match", 75.0, {}, 4, 4, {})
    model = ModelRef("self-test", "model", "nowhere", "0" * 64)
    wanted = wanted_run(model, Protocol("self-test"), ["gqa"])
    with held_run(results, wanted) as run:
        run.begin(wanted)
        run.commit(result, samples)
        run.finish("complete")


def _run(name: str, arguments: tuple[str, ...], product: str, folder: Path) -> Step:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kd_bench", name, *arguments],
            cwd=folder, env=environment, capture_output=True, text=True, errors="replace",
            timeout=STEP_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Step(name, "fails", STEP_SECONDS, f"was not done after {STEP_SECONDS} s")
    seconds = time.monotonic() - start
    last = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-1:]
    if done.returncode:
        reason = one_line(Exception("".join(last)))[:400]
        return Step(name, "fails", seconds, f"exit code {done.returncode}: {reason}")
    if not any(folder.glob(product)):
        return Step(name, "fails", seconds, f"wrote no {product}")
    return Step(name, "works", seconds)


def _show_self_test(console: "Console", installed: list[Package]) -> list[Problem]:
    """Run it, one line a command."""
    console.print("\nSelf-test")
    problems = []
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
        for step in self_test(installed, Path(folder)):
            seconds = f"{step.seconds:4.0f} s" if step.seconds else ""
            style = {"works": "green", "fails": "bold red"}.get(step.state, "yellow")
            state = f"[{style}]{step.state:<8}[/]"
            console.print(f"{step.name:<8} {state}{seconds} {_inert(step.reason)}")
            if step.state == "fails":
                text = f"`kd-bench {step.name}` does not work: {step.reason}"
                problems.append(Problem(text))
    return problems
