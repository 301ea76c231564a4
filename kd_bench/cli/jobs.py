"""Commands side by side: forked from one process that has imported what they need.

A training or an evaluation imports for five seconds. A server imports once and forks a process for
each command; it runs no thread of its own. A command has an interpreter of its own on other systems
than Linux and where there is an accelerator, whose driver does not survive a fork.

Every command leads a process group. Whatever ends this process in an orderly way, an error of one
command, Ctrl-C, SIGTERM or SIGHUP, ends all groups with all their children first. If this process
is killed, the server asks them to end.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import typer

import kd_bench
from kd_bench.cli import process
from kd_bench.errors import IncompleteRunError, MissingExtraError

GRACE = 3.0
"""Seconds that a command has to end by itself before it is killed; its state survives both."""

SURROUNDINGS = {
    "OMP_NUM_THREADS": "1",  # tiny models are many times slower with several threads a process
    "HF_HUB_OFFLINE": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # a thread would be lost in a fork
}
FORKED = (
    "kd_bench.distill.train", "transformers.trainer", "kd_bench.evals.run", "kd_bench.evals.models",
    "kd_bench.api", "PIL.PngImagePlugin", "rich._emoji_codes",
)  # fmt: skip
"""What is imported before anything is forked, beside what its functions import on demand."""


@dataclass
class _Job:
    """One command, of one thread; `seconds` are of its clock, `expected` before it was run."""

    command: list[str]
    log: Path
    pid: int
    expected: float
    begin: float
    seconds: float = 0.0

    @property
    def line(self) -> str:
        return f"kd-bench {' '.join(self.command)}"

    @property
    def short(self) -> str:
        """What it works on, in a word or two."""
        made = _output(self.command)
        places = [made] if made else [Path(word) for word in self.command[1:] if "/" in word]
        name = places[0].parent.name if places and places[0].name == "final" else ""
        return name or (places[0].name if places else self.command[0])


def run_jobs(
    groups: Mapping[str, Sequence[list[str]]],
    workers: int,
    logs: Path,
    expected: Callable[[list[str]], float] | None = None,
) -> None:
    """Run commands in their order, `workers` at a time.

    One that names something below another's `output=` waits for that; those behind it go first.

    Args:
        groups: commands by the first part of their logs' names; without any, nothing is started.
        expected: seconds that a command may take; those that have ended correct the time left.

    Raises:
        IncompleteRunError: one ended with an error; its last lines are shown, the others ended.
    """
    groups = {title: commands for title, commands in groups.items() if commands}
    if not groups:
        return
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [
        (command, logs / f"{title}-{number}.log", expected(command) if expected else 0.0)
        for title, commands in groups.items()
        for number, command in enumerate(commands)
    ]
    count = len(waiting)
    ended: list[_Job] = []
    running: list[_Job] = []
    server = _Server(logs) if sys.platform == "linux" else _Interpreters()
    with _shown([seconds for *_, seconds in waiting], workers) as show, server:
        try:
            for title, commands in groups.items():
                show(ended, running, f"{title}: {len(commands)} commands, logs in {logs}")
            while waiting or running:
                while waiting and len(running) < workers:
                    place = _next([each for each, *_ in waiting], [job.command for job in running])
                    if place is None:
                        break
                    command, log, seconds = waiting.pop(place)
                    pid = server.start(command, log)
                    running.append(_Job(command, log, pid, seconds, time.monotonic()))
                    show(ended, running, f"started     {running[-1].line}")
                time.sleep(0.1)
                for job in list(running):
                    job.seconds = time.monotonic() - job.begin
                    code = server.ended(job.pid)
                    if code is None:
                        continue
                    if code:
                        raise _failed(job, code)
                    running.remove(job)
                    ended.append(job)
                    told = f"[{len(ended)}/{count}]"
                    show(ended, running, f"{told} {job.seconds:4.0f} s  {job.line}")
                show(ended, running)
        finally:
            _end(server, [job.pid for job in running])


def _next(waiting: Sequence[list[str]], running: Sequence[list[str]]) -> int | None:
    """The first waiting command that needs nothing of another; None where all do."""
    makers = [(command, _output(command)) for command in [*waiting, *running]]
    for place, command in enumerate(waiting):
        named = {parent for word in command for parent in Path(word).parents}
        if not any(made in named for other, made in makers if made and other is not command):
            return place
    return None if running else 0


def _output(command: Sequence[str]) -> Path | None:
    outputs = [word.partition("=")[2] for word in command if word.startswith("output=")]
    return Path(outputs[-1]) if outputs else None


def _failed(job: _Job, code: int) -> IncompleteRunError:
    text = job.log.read_text(encoding="utf-8", errors="replace")
    typer.echo("\n".join(text.rstrip("\n").split("\n")[-12:]), err=True)
    return IncompleteRunError(
        f"`kd-bench {job.command[0]}` ended with exit code {code}; its log is {job.log}.",
        "Mend that and run the same command again: it continues.",
    )


def _end(server: "_Interpreters", pids: Sequence[int]) -> None:
    """End process groups: asked first, so that they say where they stopped, then killed."""
    try:
        for pid in pids:
            _signal(pid, signal.SIGTERM)
        until = time.monotonic() + GRACE
        while time.monotonic() < until and any(server.ended(pid) is None for pid in pids):
            time.sleep(0.05)
    finally:  # also after a second Ctrl-C, and for what a command itself has left behind
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        while any(server.ended(pid) is None for pid in pids):
            time.sleep(0.01)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _time_left(
    total: float, workers: int, ended: Sequence[_Job], running: Sequence[_Job]
) -> tuple[float, str]:
    """Expected seconds that are done, and the time left at the pace so far; empty if unknown."""
    before = sum(job.expected for job in ended)
    pace = sum(job.seconds for job in ended) / before if before else 1.0
    pace = max([pace, *(job.seconds / job.expected for job in running if job.expected)])
    done = before + sum(min(job.seconds / pace, job.expected) for job in running)
    minutes = pace * (total - done) / workers / 60
    told = f"about {minutes:.0f} min left" if minutes >= 1 else "less than a minute left"
    return done, told if total and done < total else ""


@contextlib.contextmanager
def _shown(seconds: Sequence[float], workers: int) -> Iterator[Callable[..., None]]:
    """A function that shows what runs: live on a terminal, else a line a start and an end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(soft_wrap=True, highlight=False)
    total, count = sum(seconds), len(seconds)
    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[names]}"),
    )
    live = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not live) as bar:
        task = bar.add_task("", total=total or count, count=f"0/{count}", left="", names="")

        def show(ended: Sequence[_Job], running: Sequence[_Job], line: str = "") -> None:
            done, left = _time_left(total, min(workers, count), ended, running)
            if not live and left and line.startswith("["):
                line += f"; {left}"
            if line.startswith("[") or (line and not live):
                console.print(line, markup=False)
            names = ", ".join(job.short for job in running)
            counted = f"{len(ended)}/{count}"
            completed = done if total else len(ended)
            bar.update(task, completed=completed, count=counted, left=left, names=names)

        yield show


# --- processes ------------------------------------------------------------------------------------


class _Interpreters:
    """A fresh interpreter a command."""

    def __init__(self) -> None:
        self._started: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def start(self, command: list[str], log: Path) -> int:
        """Begin a command; its process's number, which is its group's."""
        with log.open("w", encoding="utf-8") as stream:
            started = subprocess.Popen(
                [sys.executable, "-m", "kd_bench", *command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **SURROUNDINGS},
                start_new_session=True,
            )
        self._started[started.pid] = started
        return started.pid

    def ended(self, pid: int) -> int | None:
        """A command's exit code, minus the signal that ended it; None while it runs."""
        return self._started[pid].poll()


class _Server(_Interpreters):
    """The process that commands are forked from, as its client sees it.

    It first tells whether it will fork here. Requests and replies are lines of JSON: a command with
    its log; its process's number when it leads a group, that and its exit code when it has ended.
    """

    def __init__(self, logs: Path) -> None:
        super().__init__()
        self._log = logs / "server.log"
        self._forks: bool | None = None
        self._begun: list[int] = []
        self._codes: dict[int, int | None] = {}
        self._unread = b""

    def __enter__(self) -> None:
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from kd_bench import cli; cli.jobs.serve(cli.entry)"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **SURROUNDINGS},
                start_new_session=True,  # signals to this process's group are this process's
                bufsize=0,
            )

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with contextlib.suppress(IncompleteRunError):  # until all it has forked have told that
            while True:
                self._read(None)
        for pid, code in self._codes.items():
            if code is None:  # an interrupt came between a request and its reply
                _signal(pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()

    def start(self, command: list[str], log: Path) -> int:
        """Begin a command; its process's number, which is its group's."""
        while self._forks is None:
            self._read(None)
        if not self._forks:
            return super().start(command, log)
        assert self._process.stdin is not None
        request = json.dumps({"command": command, "log": str(log.absolute())}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # read below as the end of the replies
            self._process.stdin.write(request.encode())
        while not self._begun:
            self._read(None)
        return self._begun.pop()

    def ended(self, pid: int) -> int | None:
        """A command's exit code, minus the signal that ended it; None while it runs."""
        if not self._forks:
            return super().ended(pid)
        self._read(0.0)
        return self._codes[pid]

    def _read(self, patience: float | None) -> None:
        """Take in replies, waiting so many seconds for one.

        Raises:
            IncompleteRunError: the server has ended, by whoever killed it.
        """
        pipe = self._process.stdout
        assert pipe is not None
        if not select.select([pipe], [], [], patience)[0]:
            return
        told = os.read(pipe.fileno(), 1 << 16)
        if not told:
            raise IncompleteRunError(
                f"The process that starts commands has ended; its log is {self._log}.",
                "Run the same command again: it continues.",
            )
        *lines, self._unread = (self._unread + told).split(b"\n")
        for reply in map(json.loads, lines):
            if isinstance(reply, bool):
                self._forks = reply
                continue
            pid, code = reply
            self._codes[pid] = code
            self._begun += [pid] if code is None else []


def serve(entry: Callable[[], None]) -> NoReturn:
    """Fork a command for each line of standard input until it ends; see `_Server`."""
    replies = os.dup(1)
    os.dup2(2, 1)  # what imports print is no reply
    forks = _import_all()
    os.write(replies, f"{json.dumps(forks)}\n".encode())
    if not forks:
        os._exit(0)
    running: set[int] = set()
    unread = b""
    while True:
        readable = select.select([0], [], [], 0.05)[0]
        if readable:
            told = os.read(0, 1 << 16)
            if not told:  # who asks was killed: what ends in an orderly way kills this process
                for pid in running:
                    _signal(pid, signal.SIGTERM)
                os._exit(0)
            *lines, unread = (unread + told).split(b"\n")
            for line in lines:
                sys.stdout.flush()
                sys.stderr.flush()
                if (pid := os.fork()) == 0:
                    _become(entry, replies, **json.loads(line))
                running.add(pid)
        with contextlib.suppress(ChildProcessError, BrokenPipeError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                code = os.waitstatus_to_exitcode(ended[1])
                running.discard(ended[0])
                os.write(replies, f"[{ended[0]}, {code}]\n".encode())


def _import_all() -> bool:
    """Import what commands need; whether they can be forked.

    What is not installed is left to the command, which says so.
    """
    gc.disable()
    for name in FORKED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError, MissingExtraError):
        from kd_bench.distill import models
        from kd_bench.evals.benchmark import lmms_eval
        from kd_bench.evals.checkpoint import best_device

        if best_device() != "cpu":
            return False
        models.preload()
        lmms_eval()
    from kd_bench.registry import load_tasks

    load_tasks()  # each file is read once a process
    gc.freeze()  # so that no collection in a forked process copies pages by looking at them
    gc.enable()
    return True


def _become(entry: Callable[[], None], replies: int, command: list[str], log: str) -> NoReturn:
    """Run a command in this forked process as an interpreter of its own would."""
    os.setsid()
    os.write(replies, f"[{os.getpid()}, null]\n".encode())
    os.close(replies)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    told = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for number, stream in enumerate((nowhere, told, told)):
        os.dup2(stream, number)
    sys.argv = [str(Path(kd_bench.__file__).with_name("__main__.py")), *command]
    code: object = 1
    try:
        entry()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    process.leave(code)
