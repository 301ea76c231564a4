"""Progress of an evaluation: one bar a task and one for the suite, plain lines off a terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class SuiteProgress:
    """Counts answers; silent when not shown."""

    def __init__(self, title: str, tasks: int, shown: bool = True) -> None:
        # The stream is taken now: while upstream works, sys.stderr points elsewhere.
        self._console = Console(file=sys.stderr, soft_wrap=True)
        self._shown = shown
        self._title = title
        self._tasks = tasks
        self._done = 0
        self._bars: Progress | None = None
        self._suite: TaskID | None = None
        self._task: TaskID | None = None
        self._answers = 0
        self._started = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show the bars while the block runs."""
        if not self._shown or not self._console.is_terminal:
            yield
            return
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with self._bars:
            self._suite = self._bars.add_task(self._title, total=self._tasks, speed="")
            yield

    def start(self, task: str, total: int) -> None:
        """A task begins with `total` answers to compute."""
        self._answers = 0
        self._started = time.perf_counter()
        if self._bars is not None:
            self._task = self._bars.add_task(f"  {task}", total=total, speed="")

    def advance(self, answers: int) -> None:
        """More answers were computed."""
        self._answers += answers
        if self._bars is not None and self._task is not None:
            speed = self._answers / max(1e-9, time.perf_counter() - self._started)
            self._bars.update(self._task, advance=answers, speed=f"{speed:.0f} answers/s")

    def finish(self, line: str) -> None:
        """A task ended; `line` says how."""
        self._done += 1
        if self._bars is not None:
            if self._task is not None:
                self._bars.remove_task(self._task)
                self._task = None
            if self._suite is not None:
                self._bars.advance(self._suite)
        if self._shown:
            self._console.print(f"[{self._done}/{self._tasks}] {line}", markup=False)
