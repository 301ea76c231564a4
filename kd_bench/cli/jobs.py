"""kd-bench commands side by side, each in a process of one thread: shown, and ended together.

Every command leads a process group of its own. Whatever ends this process in an orderly way, an
error of one command, Ctrl-C, SIGTERM or SIGHUP, ends all groups with all their children first.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from kd_bench.errors import IncompleteRunError

GRACE = 3.0
"""Seconds that a command has to end by itself before it is killed; its state survives both."""


@dataclass
class _Job:
    """One running command."""

    command: list[str]
    log: Path
    process: "subprocess.Popen[bytes]"
    begin: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    @property
    def line(self) -> str:
        return f"kd-bench {' '.join(self.command)}"


def run_jobs(title: str, commands: Sequence[list[str]], workers: int, logs: Path) -> None:
    """Run commands, `workers` at a time, in the given order.

    Args:
        title: what they do, and the first part of their logs' names.

    Raises:
        IncompleteRunError: one ended with an error; its last lines are shown, the others ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = deque(enumerate(commands))
    running: list[_Job] = []
    done = 0
    with _shown(title, len(commands), logs) as show:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    number, command = waiting.popleft()
                    running.append(_start(command, logs / f"{title}-{number}.log"))
                    show(done, running, f"started     {running[-1].line}")
                time.sleep(0.1)
                for job in [job for job in running if job.process.poll() is not None]:
                    if job.process.returncode:
                        raise _failed(job)
                    running.remove(job)
                    done += 1
                    said = f"[{done}/{len(commands)}] {job.seconds:4.0f} s  {job.line}"
                    show(done, running, said)
                show(done, running, "")
        finally:
            _end([job.process for job in running])


def _start(command: list[str], log: Path) -> _Job:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "kd_bench", *command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return _Job(command, log, process, time.monotonic())


def _failed(job: _Job) -> IncompleteRunError:
    text = job.log.read_text(encoding="utf-8", errors="replace")
    typer.echo("\n".join(text.rstrip("\n").split("\n")[-12:]), err=True)
    code = job.process.returncode
    return IncompleteRunError(
        f"`kd-bench {job.command[0]}` ended with exit code {code}; its log is {job.log}.",
        "Mend that and run the same command again: it continues.",
    )


def _end(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """End process groups: asked first, so that they say where they stopped, then killed."""
    try:
        for process in processes:
            _signal(process, signal.SIGTERM)
        until = time.monotonic() + GRACE
        while time.monotonic() < until and any(p.poll() is None for p in processes):
            time.sleep(0.05)
    finally:  # also after a second Ctrl-C, and for what a command itself has left behind
        for process in processes:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _shown(title: str, total: int, logs: Path) -> Iterator[Any]:
    """A function that shows what runs: live on a terminal, else a line a start and an end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        typer.echo(f"{title}: {total} commands, logs in {logs}")

        def tell(done: int, running: Sequence[_Job], line: str) -> None:
            if line:
                typer.echo(line)
                sys.stdout.flush()

        yield tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[names]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, names="")

        def draw(done: int, running: Sequence[_Job], line: str) -> None:
            if line.startswith("["):
                bar.console.print(line, markup=False)
            bar.update(task, completed=done, names=", ".join(map(_short, running)))

        yield draw


def _short(job: _Job) -> str:
    """What a command works on, in a word or two."""
    outputs = [word.partition("=")[2] for word in job.command if word.startswith("output=")]
    places = [Path(word) for word in (outputs or job.command[1:]) if "/" in word]
    name = places[0].parent.name if places and places[0].name == "final" else ""
    return name or (places[0].name if places else job.command[0])
