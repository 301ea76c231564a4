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
from kd_bench.store import Run, baselines

State = Literal["damaged", "unfinished", "harmless", "repaired"]

AGAIN = "Run the same eval command again: what is damaged is made anew, answers are kept."

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
    runs = results / "runs"
    old = time.time() - _ABANDONED_SECONDS
    shared = _temporary([results, runs, results / "images"])
    abandoned = [file for file in shared if file.stat().st_mtime < old]
    found = _leftovers(abandoned, repair)
    if runs.is_dir():
        folders = (path for path in runs.iterdir() if path.is_dir())
        for folder in sorted(folders):
            found += _examine_run(Run(folder), repair)
    return found + _examine_baselines(results) + _examine_pictures(results)


def _examine_run(run: Run, repair: bool) -> list[Finding]:
    with _held(run) as free:
        if not free:
            return [Finding(run.path, "harmless", "is being written now and was not examined")]
        found = _leftovers(_temporary([run.path, *_folders(run.path)]), repair)
        try:
            manifest = run.manifest
        except KdBenchError as error:
            return [*found, *_examine_journals(run, set(), repair), _lost_manifest(run, error)]
        done = set(run.done_tasks(manifest))
        found += _examine_journals(run, done, repair)
        for task in _stored_tasks(run, manifest):
            found += _examine_task(run, task, manifest)
        return found + _examine_status(run, manifest, done)


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


def _lost_manifest(run: Run, error: KdBenchError) -> Finding:
    path = run.path / "manifest.json"
    if not path.exists():
        hint = "The same eval command makes it anew and keeps the answers; or delete the folder."
        return Finding(run.path, "damaged", "has no manifest.json", hint)
    return Finding(path, "damaged", _what(error, path), error.hint)


def _what(error: KdBenchError, path: Path) -> str:
    """The problem without the file's name before it, which a finding has beside it."""
    text = one_line(Exception(error.problem))
    for name in (path, path.parent):
        text = text.removeprefix(f"{name} ").removeprefix(f"{name}: ")
    return text.removesuffix(".")


# --- left behind by a killed process -----------------------------------------------------------


def _folders(folder: Path) -> list[Path]:
    return [folder / name for name in ("journal", "tasks", "submissions")]


def _temporary(folders: Iterable[Path]) -> list[Path]:
    entries = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
    return sorted(path for path in entries if _TEMPORARY.fullmatch(path.name) and path.is_file())


def _leftovers(files: Iterable[Path], repair: bool) -> list[Finding]:
    found = []
    for file in files:
        if repair:
            file.unlink(missing_ok=True)
            found.append(Finding(file, "repaired", "was left over from a stopped write; removed"))
        else:
            problem = "is left over from a stopped write"
            found.append(Finding(file, "damaged", problem, "--repair removes it."))
    return found


def _examine_journals(run: Run, done: set[str], repair: bool) -> list[Finding]:
    found = []
    for path in sorted((run.path / "journal").glob("*.jsonl")):
        journal = Journal(path)
        try:
            torn = journal.examine()
            # Through a link, a file outside of the store would be cut.
            if torn and repair and not _linked(path, run.path):
                journal.cut(torn)
                found.append(
                    Finding(path, "repaired", f"ended in the middle of a line; {torn} bytes cut")
                )
            elif torn:
                problem = f"ends in the middle of a line ({torn} bytes)"
                found.append(Finding(path, "damaged", problem, "--repair cuts the piece off."))
        except OSError as error:
            found.append(Finding(path, "damaged", f"cannot be read: {one_line(error)}", AGAIN))
            continue
        if journal.damaged:
            lines = "1 line" if journal.damaged == 1 else f"{journal.damaged} lines"
            problem = f"{lines} fail their checksum and are not used"
            settled = path.name.split(".")[0] in done
            hint = "" if settled else f"{AGAIN} Those answers are made again."
            state: State = "harmless" if settled else "damaged"
            found.append(Finding(path, state, problem, hint))
    return found


def _linked(path: Path, folder: Path) -> bool:
    return path.is_symlink() or path.parent.is_symlink() or folder.is_symlink()


# --- committed tasks ---------------------------------------------------------------------------


def _stored_tasks(run: Run, manifest: RunManifest) -> list[str]:
    """Planned tasks first, then whatever else has a file in tasks/."""
    files = sorted((run.path / "tasks").glob("[!.]*"))
    names = [file.name.removesuffix(".json").removesuffix(".samples.parquet") for file in files]
    stored = set(names)
    planned = [task for task in manifest.tasks if task in stored]
    return planned + sorted(stored - set(planned))


def _examine_task(run: Run, task: str, manifest: RunManifest) -> list[Finding]:
    folder = run.path / "tasks"
    if task not in manifest.tasks:
        file = next(iter(sorted(folder.glob(f"{task}*"))), folder)
        return [Finding(file, "harmless", "belongs to no benchmark of this run and is not used")]
    if task not in run.done_tasks(manifest):
        file = next(iter(sorted(folder.glob(f"{task}.*"))), folder)
        return [Finding(file, "harmless", "belongs to no committed task yet and is not used")]
    path = folder / f"{task}.json"
    try:
        run.result(task)
        path = folder / f"{task}.samples.parquet"
        problem = run.contradiction(task)
    except KdBenchError as error:
        problem = _what(error, path)
    return [Finding(path, "damaged", problem, AGAIN)] if problem else []


# --- runs and baselines as a whole -------------------------------------------------------------


def _examine_status(run: Run, manifest: RunManifest, done: set[str]) -> list[Finding]:
    missing = [task for task in manifest.tasks if task not in done]
    if manifest.status == "complete" and missing:
        problem = f"calls itself complete and has no result for {', '.join(missing)}"
        return [Finding(run.path, "damaged", problem, AGAIN)]
    if manifest.status in ("running", "partial"):
        progress = f"{len(done)} of {len(manifest.tasks)} benchmarks done"
        word = "was stopped" if manifest.status == "running" else "is partial"
        answered = any((run.path / "journal").glob("*.jsonl")) or done
        hint = f"{AGAIN} It continues. Or delete the folder."
        if not answered:
            hint = "Delete the folder: nothing was answered yet."
        return [Finding(run.path, "unfinished", f"{word}: {progress}", hint)]
    return []


def _examine_baselines(results: Path) -> list[Finding]:
    path = results / "baselines.yaml"
    try:
        named = baselines(results)
    except KdBenchError as error:
        return [Finding(path, "damaged", _what(error, path), "Set the baselines anew.")]
    return [
        Finding(
            path,
            "damaged",
            f"{name} stands for {entry.run}, which is not there",
            f"Restore the run, or `kd-bench runs baseline set {name} RUN`.",
        )
        for name, entry in named.items()
        if not _exists(results / "runs" / entry.run / "manifest.json")
    ]


def _examine_pictures(results: Path) -> list[Finding]:
    """The kept pictures by their own checksums."""
    from PIL import Image

    found = []
    for path in sorted((results / "images").glob("*.png")):
        try:
            with Image.open(path) as picture:
                picture.verify()
        except Exception as error:  # a broken picture may raise anything
            hint = "Delete it: it is there to be looked at, no score depends on it."
            problem = f"is no sound picture: {type(error).__name__}"
            found.append(Finding(path, "damaged", problem, hint))
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a file
        return False
