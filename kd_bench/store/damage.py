"""What is wrong in a store, found without changing it, and the little that is mended safely.

It lists what the store's reader finds in every run, and adds what no reader meets: that a stored
score comes out of its samples, torn journals, files that killed processes left. Locks need no
care: they end with the process that held them, whatever file they leave.
"""

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd_bench.errors import KdBenchError, UsageError, one_line
from kd_bench.files import Journal
from kd_bench.records import RunManifest
from kd_bench.store import baselines, exists
from kd_bench.store.run import AGAIN, Run

State = Literal["damaged", "unfinished", "harmless", "repaired"]

# What `files.atomic_path` leaves when its process is killed.
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
_ABANDONED_SECONDS = 3600
"""A temporary file that no lock guards is left over when it is older than this."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        state: `damaged` and `unfinished` ask for something to be done; `harmless` does not, and
            `repaired` was mended just now.
    """

    path: Path
    state: State
    problem: str
    hint: str = ""

    @property
    def open(self) -> bool:
        """Whether something remains to be done."""
        return self.state in ("damaged", "unfinished")


def examine(results: Path, *, repair: bool = False) -> list[Finding]:
    """Examine a store: its runs, their files and the named baselines; oldest run first.

    Args:
        repair: cut torn journal tails and remove temporary files that nobody writes any more;
            nothing else is ever changed.

    Raises:
        UsageError: there is no such folder.
    """
    if not results.is_dir():
        raise UsageError(f"There is no folder {results}.", "Name the store with --results.")
    return list(_examine(results, repair))


def _examine(results: Path, repair: bool) -> Iterator[Finding]:
    runs = results / "runs"
    old = time.time() - _ABANDONED_SECONDS
    shared = _temporary([results, runs, results / "images"])
    yield from _leftovers([file for file in shared if file.stat().st_mtime < old], repair)
    for folder in sorted(runs.glob("*/")):
        yield from _examine_run(Run(folder), repair)
    yield from _examine_baselines(results)
    yield from _examine_images(results)


def _examine_run(run: Run, repair: bool) -> Iterator[Finding]:
    with _held(run) as free:
        if not free:
            yield Finding(run.path, "harmless", "is being written now and was not examined")
            return
        inner = (run.path / name for name in ("journal", "tasks", "submissions"))
        yield from _leftovers(_temporary([run.path, *inner]), repair)
        path = run.path / "manifest.json"
        try:
            manifest = run.manifest
        except KdBenchError as error:
            yield from _examine_journals(run, [], repair)
            if path.exists():
                yield Finding(path, "damaged", _what(error, path), error.hint)
            else:
                hint = "The same eval command makes it anew and keeps the answers"
                hint += "; or delete the folder."
                yield Finding(run.path, "damaged", "has no manifest.json", hint)
            return
        done = run.done_tasks(manifest)
        yield from _examine_journals(run, done, repair)
        yield from _examine_tasks(run, manifest, done)
        yield from _examine_status(run, manifest, done)


@contextmanager
def _held(run: Run) -> Iterator[bool]:
    """Hold a run that was ever locked; False while another process does."""
    with ExitStack() as stack:
        free = True
        if run.lock_file.exists():
            try:
                stack.enter_context(run.locked())
            except UsageError:
                free = False
            except OSError:  # a read-only store is nobody's to write
                pass
        yield free


def _what(error: KdBenchError, path: Path) -> str:
    """The problem without the file's name before it, which a finding has beside it."""
    text = one_line(Exception(error.problem))
    for name in (path, path.parent):
        text = text.removeprefix(f"{name} ").removeprefix(f"{name}: ")
    return text.removesuffix(".")


# --- left behind by a killed process -----------------------------------------------------------


def _temporary(folders: Iterable[Path]) -> list[Path]:
    entries = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
    return sorted(path for path in entries if _TEMPORARY.fullmatch(path.name) and path.is_file())


def _leftovers(files: list[Path], repair: bool) -> Iterator[Finding]:
    for file in files:
        if repair:
            file.unlink(missing_ok=True)
            yield Finding(file, "repaired", "was left over from a stopped write; removed")
        else:
            problem = "is left over from a stopped write"
            yield Finding(file, "damaged", problem, "--repair removes it.")


def _examine_journals(run: Run, done: list[str], repair: bool) -> Iterator[Finding]:
    for path in sorted((run.path / "journal").glob("*.jsonl")):
        journal = Journal(path)
        # Through a link, a file outside of the store would be cut.
        linked = any(place.is_symlink() for place in (path, path.parent, run.path))
        try:
            torn = journal.examine()
            if torn and repair and not linked:
                journal.cut(torn)
                cut = f"ended in the middle of a line; {torn} bytes cut"
                yield Finding(path, "repaired", cut)
            elif torn:
                problem = f"ends in the middle of a line ({torn} bytes)"
                yield Finding(path, "damaged", problem, "--repair cuts the piece off.")
        except OSError as error:
            yield Finding(path, "damaged", f"cannot be read: {one_line(error)}", AGAIN)
            continue
        if journal.damaged:
            lines = "1 line" if journal.damaged == 1 else f"{journal.damaged} lines"
            problem = f"{lines} fail their checksum and are not used"
            if path.name.split(".")[0] in done:
                yield Finding(path, "harmless", problem)
            else:
                yield Finding(path, "damaged", problem, f"{AGAIN} Those answers are made again.")


# --- runs and baselines ------------------------------------------------------------------------


def _examine_tasks(run: Run, manifest: RunManifest, done: list[str]) -> Iterator[Finding]:
    """Planned tasks first, then whatever else has a file in tasks/."""
    folder = run.path / "tasks"
    files = sorted(folder.glob("[!.]*"))
    names = [file.name.removesuffix(".json").removesuffix(".samples.parquet") for file in files]
    planned = [task for task in manifest.tasks if task in names]
    for task in planned + sorted(set(names) - set(planned)):
        path = folder / f"{task}.json"
        if task not in done:
            stray = "benchmark of this run" if task not in manifest.tasks else "committed task yet"
            file = files[names.index(task)]
            yield Finding(file, "harmless", f"belongs to no {stray} and is not used")
            continue
        try:
            run.result(task)
            path = folder / f"{task}.samples.parquet"
            problem = run.contradiction(task)
        except KdBenchError as error:
            problem = _what(error, path)
        if problem:
            yield Finding(path, "damaged", problem, AGAIN)


def _examine_status(run: Run, manifest: RunManifest, done: list[str]) -> Iterator[Finding]:
    missing = [task for task in manifest.tasks if task not in done]
    if manifest.status == "complete" and missing:
        problem = f"calls itself complete and has no result for {', '.join(missing)}"
        yield Finding(run.path, "damaged", problem, AGAIN)
    elif manifest.status in ("running", "partial"):
        word = "was stopped" if manifest.status == "running" else "is partial"
        problem = f"{word}: {len(done)} of {len(manifest.tasks)} benchmarks done"
        hint = f"{AGAIN} It continues. Or delete the folder."
        if not done and not any((run.path / "journal").glob("*.jsonl")):
            hint = "Delete the folder: nothing was answered yet."
        yield Finding(run.path, "unfinished", problem, hint)


def _examine_baselines(results: Path) -> Iterator[Finding]:
    path = results / "baselines.yaml"
    try:
        named = baselines(results)
    except KdBenchError as error:
        yield Finding(path, "damaged", _what(error, path), "Set the baselines anew.")
        return
    for name, entry in named.items():
        if not exists(results / "runs" / entry.run / "manifest.json"):
            problem = f"{name} stands for {entry.run}, which is not there"
            hint = f"Restore the run, or `kd-bench runs baseline set {name} RUN`."
            yield Finding(path, "damaged", problem, hint)


def _examine_images(results: Path) -> Iterator[Finding]:
    """The kept images by their own checksums."""
    from PIL import Image

    for path in sorted((results / "images").glob("*.png")):
        try:
            with Image.open(path) as image:
                image.verify()
        except Exception as error:  # a broken image may raise anything
            hint = "Delete it: it is there to be looked at, no score depends on it."
            yield Finding(path, "damaged", f"is no sound image: {type(error).__name__}", hint)
