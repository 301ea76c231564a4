"""Two processes on one results folder, their file operations put in every order that a seed draws.

Each child stops before every rename, read, unlink and lock, and goes on when the parent says so.
What `eval` asks a model is a stub: `run.Worker` is replaced by one that commits given samples;
looking up, holding, beginning, committing and finishing a run are the real ones.
"""

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kd_bench.errors import KdBenchError
from kd_bench.records import Cost, Protocol
from kd_bench.store import Run, find_run, held_run, set_baseline, wanted_run
from tests.faults import fault
from tests.faults.stores import MODELS, TASKS, judge, run_of, template
from tests.support.report_store import result, samples

PATIENCE = 30
"""Seconds that a child may take between two file operations."""


# --- what a process does --------------------------------------------------------------------------


class Stub:
    """Stands for `run.Worker`: answers that are known beforehand."""

    def __init__(self, run: Run, plan: Any, bars: Any) -> None:
        self.run = run
        self.limit = plan.protocol.limit

    def run_task(self, spec: Any) -> str:
        """Commit the samples that the sound store has of this model."""
        model = next(m for m in MODELS if m.name == self.run.manifest.model.name)
        frame = samples(spec.id, model, units=2 if self.limit else 12)
        self.run.journal(spec.id).append([{"key": "a", "text": "yes"}])
        self.run.commit(replace(result(spec.id, frame), total=600), frame)
        return f"{spec.id}: stub"

    def cost(self) -> Cost:
        """Of the sound store's student."""
        return Cost(220_000, 880_000, 11.0, 90_000_000)


def evaluate(store: Path, name: str, **changes: Any) -> None:
    """`run.evaluate` from where the checkpoint is known, with a stub for the model."""
    from kd_bench.evals import run as runs
    from kd_bench.evals.checkpoint import Checkpoint
    from kd_bench.registry import load_task

    runs.Worker = Stub  # type: ignore[assignment,misc]
    runs.load_documents = lambda *_: None  # type: ignore[assignment,return-value]
    ref = run_of(template(), name).manifest.model
    protocol = replace(Protocol("mini", batch_size=16, engine="shared prefix"), **changes)
    plan = runs.Plan(
        Checkpoint(Path("nowhere"), ref, "", None),
        [load_task(task) for task in TASKS],
        store,
        protocol,
        {},
        runs.EvalSettings(progress=False),
    )
    wanted = wanted_run(ref, protocol, TASKS)
    with held_run(store, wanted) as run:
        runs.execute(run, plan, wanted)


def evaluate_again(store: Path) -> None:
    evaluate(store, "student")


def evaluate_limited(store: Path) -> None:
    evaluate(store, "student", limit=4)


def evaluate_another_dtype(store: Path) -> None:
    evaluate(store, "teacher", dtype="bfloat16")


def mend(store: Path) -> None:
    """Score a task again, as after damage: its files are replaced while others read."""
    run = run_of(store, "student")
    with run.locked():
        run.commit(run.result("pope"), run.samples("pope"))


def imported(store: Path) -> None:
    """What `runs import` does to a store: a run of another suite, whole in one go."""
    known = run_of(template(), "student").manifest.model
    ref = replace(known, name="theirs", weights_digest="1" * 64)
    wanted = wanted_run(ref, Protocol("imported", engine="lmms-eval, imported"), ["pope"])
    with held_run(store, wanted) as run:
        run.begin(wanted)
        frame = samples("pope", MODELS[0], units=3)
        run.commit(result("pope", frame), frame)
        run.finish("complete", notes=["imported"])


def set_the_baseline(store: Path) -> None:
    set_baseline(store, "mini", find_run(store, "floor"))


def read(store: Path) -> None:
    """`report`, `runs list`, `runs show`, `compare` and `check`: no other number, or a word."""
    judge(store)


WRITERS = (
    evaluate_again, evaluate_limited, evaluate_another_dtype, mend, imported, set_the_baseline,
)  # fmt: skip


# --- the order of their file operations -----------------------------------------------------------


@contextmanager
def stepping(turn: Connection) -> Iterator[None]:
    """Ask the parent before every file operation of this process."""
    import filelock

    def asking(operation: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            turn.send("ready")
            turn.recv()
            return operation(*arguments, **options)

        return step

    for owner, name in (
        (Path, "replace"), (Path, "read_bytes"), (Path, "read_text"), (Path, "unlink"),
        (filelock.FileLock, "acquire"),
    ):  # fmt: skip
        setattr(owner, name, asking(getattr(owner, name)))
    yield


def child(work: Callable[[Path], None], store: Path) -> tuple[int, Connection]:
    """A forked process that does `work` step by step; its last word is "done" or what failed."""
    ours, theirs = Pipe()
    process = os.fork()
    if process:
        theirs.close()
        return process, ours
    with suppress(BaseException):
        word = "done"
        try:
            with stepping(theirs):
                work(store)
        except KdBenchError:  # refused by name: another process was writing
            pass
        except BaseException as error:
            word = f"{work.__name__}: {type(error).__name__}: {error}"
        theirs.send(word)
    os._exit(0)


def interleave(works: tuple[Callable[[Path], None], ...], store: Path, dice: random.Random) -> None:
    """Run the processes, one file operation of one of them at a time."""
    children = [child(work, store) for work in works]
    turns = [turn for _, turn in children]
    words = []
    try:
        while turns:
            turn = dice.choice(turns)
            assert turn.poll(PATIENCE), "a process does not go on"
            word = turn.recv()
            if word == "ready":
                turn.send("go")
            else:
                words.append(word)
                turns.remove(turn)
    finally:
        for process, _ in children:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    wrong = [word for word in words if word != "done"]
    assert not wrong, wrong[0]


@fault("two processes: orders of their file operations", tries=200)
def interleaved_file_operations(folder: Path, number: int) -> None:
    dice = random.Random(number)
    store = Path(shutil.copytree(template(), folder / "results"))
    first = dice.choice(WRITERS)
    second = dice.choice([read, read, *WRITERS])
    interleave((first, second), store, dice)
    judge(store)
