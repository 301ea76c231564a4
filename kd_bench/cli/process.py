"""What a process owes its surroundings, and other kd-bench processes beside it.

Its streams have any encoding and readers that leave; a signal ends it with a word. Without this,
`report | head -1` would end in 1, which a script takes for a regression, `--help` would be an
encoding error where the locale is C, and SIGTERM would end a training without a word.

Commands side by side lead a process group each. Whatever ends this process in an orderly way, an
error of one command, Ctrl-C, SIGTERM or SIGHUP, ends all groups with all their children first.
"""

import codecs
import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from kd_bench.errors import IncompleteRunError

PLAIN = {
    "−": "-", "–": "-", "—": "-", "→": ">", "±": "~", "Δ": "d", "×": "x", "·": ".", "…": "...",
    "▲": "^", "▼": "v", "≤": "<=", "≥": ">=", "≈": "~", "•": "*", "†": "+", "‡": "+", "●": "*",
    "“": '"', "”": '"', "‘": "'", "’": "'", "━": "-", "─": "-", "│": "|", "█": "#", "ø": "o",
}  # fmt: skip
"""One column wide wherever tables use it, so that columns still stand in line."""


_received: list[int] = []
_lost: list[OSError] = []


def lost_output() -> OSError | None:
    """Why standard output could not be written to the end; None where it was, or nobody reads."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none
        sys.stdout.flush()
    return _lost[0] if _lost else None


def interrupted_by() -> int:
    """Exit code after an interrupt as shells have it: 128 + the signal's number, else SIGINT's."""
    return 128 + (_received[-1] if _received else signal.SIGINT)


def prepare() -> None:
    """Make the standard streams and the signals of this process behave; for the entry point."""
    codecs.register_error("kd_bench.plain", _plain)
    sys.stdout = _stream(sys.stdout, sys.__stdout__)
    sys.stderr = _stream(sys.stderr, sys.__stderr__)
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # `nohup` has SIGHUP ignored; whoever embeds this may have a handler of his own.
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind as after Ctrl-C, so that locks, children and states are seen to."""
    _received.append(number)
    raise KeyboardInterrupt


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: what the encoding lacks in a plain form, or as a question mark."""
    assert isinstance(error, UnicodeEncodeError)
    lost = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in lost), error.end


class _Pipe(io.FileIO):
    """Standard output or error; when its reader has gone, what is left to say goes nowhere.

    The work itself goes on: a verdict, a page or a checkpoint does not depend on who listens.
    Where the output is a file that takes no more, that is kept for `lost_output`.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BlockingIOError:
            raise  # only full for now
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and self.fileno() == 1:
                _lost.append(error)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


class _AsciiText(io.TextIOWrapper):
    """Encodes to ASCII, and says otherwise: to a stream that says so typer writes UTF-8."""

    encoding = "iso8859-1"


def _stream(stream: Any, original: Any) -> Any:
    """The process's own stream made tolerant; one that a host has put in its place is left."""
    if stream is None or stream is not original or not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    ascii_only = codecs.lookup(stream.encoding).name == "ascii"
    kind = _AsciiText if ascii_only else io.TextIOWrapper
    return kind(
        io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
        encoding="ascii" if ascii_only else stream.encoding,
        errors="kd_bench.plain",
        line_buffering=stream.line_buffering,
    )


# --- commands side by side ------------------------------------------------------------------------

GRACE = 3.0
"""Seconds that a command has to end by itself before it is killed; its state survives both."""


@dataclass
class _Job:
    """One command, of one thread; `seconds` are of its clock, `expected` before it was run."""

    command: list[str]
    log: Path
    process: "subprocess.Popen[bytes]"
    expected: float
    begin: float
    seconds: float = 0.0

    @property
    def line(self) -> str:
        return f"kd-bench {' '.join(self.command)}"

    @property
    def short(self) -> str:
        """What it works on, in a word or two."""
        outputs = [word.partition("=")[2] for word in self.command if word.startswith("output=")]
        places = [Path(word) for word in (outputs or self.command[1:]) if "/" in word]
        name = places[0].parent.name if places and places[0].name == "final" else ""
        return name or (places[0].name if places else self.command[0])


def run_jobs(
    groups: Mapping[str, Sequence[list[str]]],
    workers: int,
    logs: Path,
    expected: Callable[[list[str]], float] | None = None,
) -> None:
    """Run groups of commands one after another, `workers` commands of a group at a time.

    Args:
        groups: commands in order, by the first part of their logs' names.
        expected: seconds that a command may take; those that have ended correct the time left.

    Raises:
        IncompleteRunError: one ended with an error; its last lines are shown, the others ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    every = [command for commands in groups.values() for command in commands]
    seconds = [expected(command) if expected else 0.0 for command in every]
    ended: list[_Job] = []
    running: list[_Job] = []
    with _shown(seconds, workers) as show:
        try:
            for title, commands in groups.items():
                waiting = deque(enumerate(commands))
                show(ended, running, f"{title}: {len(commands)} commands, logs in {logs}")
                while waiting or running:
                    while waiting and len(running) < workers:
                        number, command = waiting.popleft()
                        wanted = expected(command) if expected else 0.0
                        running.append(_start(command, logs / f"{title}-{number}.log", wanted))
                        show(ended, running, f"started     {running[-1].line}")
                    time.sleep(0.1)
                    for job in list(running):
                        job.seconds = time.monotonic() - job.begin
                        if job.process.poll() is None:
                            continue
                        if job.process.returncode:
                            raise _failed(job)
                        running.remove(job)
                        ended.append(job)
                        count = f"[{len(ended)}/{len(every)}]"
                        show(ended, running, f"{count} {job.seconds:4.0f} s  {job.line}")
                    show(ended, running)
        finally:
            _end([job.process for job in running])


def _start(command: list[str], log: Path, expected: float) -> _Job:
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
    return _Job(command, log, process, expected, time.monotonic())


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
