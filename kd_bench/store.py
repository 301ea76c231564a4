"""Run folders: create, continue, commit, list, load.

    <results>/runs/<date>-<model>-<weights8>-<protocol8>/
      manifest.json   journal/<task>.jsonl   tasks/<task>.json   tasks/<task>.samples.parquet
    <results>/images/<first 16 digits of the pixels' digest>.png

The folder is the list of runs; there is no database. A task is done when its JSON is there; the
samples are written before it.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_bench.errors import IncompleteRunError, UsageError, closest
from kd_bench.files import Journal, atomic_path, digest_text, read_json, write_json, write_text
from kd_bench.records import (
    SAMPLE_COLUMNS,
    ModelRef,
    Protocol,
    RunManifest,
    RunStatus,
    TaskResult,
    from_json,
    to_json,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Run",
    "baseline_run",
    "baselines",
    "find_run",
    "list_runs",
    "open_run",
    "set_baseline",
]


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path

    @property
    def manifest(self) -> RunManifest:
        """The manifest as it lies on disk now."""
        return from_json(RunManifest, _read(self.path / "manifest.json"), str(self.path))

    @property
    def images(self) -> Path:
        """Folder of the pictures that all runs of the store share."""
        return self.path.parents[1] / "images"

    def picture(self, digest: str) -> Path | None:
        """The stored picture with this digest of its pixels, if there is one."""
        path = self.images / f"{digest[:16]}.png"
        return path if digest and path.is_file() else None

    def write_manifest(self, manifest: RunManifest) -> None:
        """Replace the manifest."""
        write_json(self.path / "manifest.json", to_json(manifest))

    def journal(self, task: str) -> Journal:
        """The task's append-only answers."""
        return Journal(self.path / "journal" / f"{task}.jsonl")

    def done(self, task: str) -> bool:
        """Whether the task was committed."""
        return self._result_path(task).exists()

    def commit(self, result: TaskResult, samples: "pd.DataFrame") -> None:
        """Store one task: samples first, then the JSON whose presence means done."""
        with atomic_path(self._samples_path(result.task)) as temporary:
            samples.loc[:, list(SAMPLE_COLUMNS)].to_parquet(
                temporary, index=False, write_page_checksum=True
            )
        write_json(self._result_path(result.task), to_json(result))

    def discard(self, task: str) -> None:
        """Forget a task's result (not its journal), so that it is scored again."""
        self._result_path(task).unlink(missing_ok=True)

    def result(self, task: str) -> TaskResult:
        """The committed result of one task.

        Raises:
            IncompleteRunError: the task was not finished, or its file is damaged.
        """
        path = self._result_path(task)
        if not path.exists():
            raise IncompleteRunError(
                f"Run {self.path.name} has no result for {task}.",
                "Run the same eval command again: it continues where it stopped.",
            )
        return from_json(TaskResult, _read(path), str(path))

    def results(self) -> dict[str, TaskResult]:
        """Committed results by task, in the order in which they were planned."""
        return {task: self.result(task) for task in self.manifest.tasks if self.done(task)}

    def samples(self, task: str, columns: Sequence[str] = SAMPLE_COLUMNS) -> "pd.DataFrame":
        """One row a sample; columns are `records.SAMPLE_COLUMNS`, or the asked ones of them."""
        import pandas as pd
        from pyarrow.parquet import read_schema

        path = self._samples_path(task)
        try:
            stored = read_schema(path).names
            kept = [column for column in columns if column in stored]
            frame = pd.read_parquet(path, columns=kept, page_checksum_verification=True)
        except Exception as error:  # a flipped bit may surface anywhere inside the reader
            raise IncompleteRunError(
                f"{path} cannot be read: {type(error).__name__}.",
                "Delete the task's .json and run the same eval command again.",
            ) from None
        missing = [column for column in columns if column not in frame.columns]
        if missing:
            raise IncompleteRunError(f"{path} has no column {missing[0]}.", "Evaluate it again.")
        return frame

    def finish(self, status: RunStatus, **changes: Any) -> RunManifest:
        """Set the final status and any other manifest field."""
        manifest = replace(self.manifest, status=status, finished=_now(), **changes)
        self.write_manifest(manifest)
        return manifest

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder for writing.

        Raises:
            UsageError: another process holds it.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UsageError(
                f"{self.path} is being written by another kd-bench process.",
                "Wait for it, or give this run another --name.",
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _result_path(self, task: str) -> Path:
        return self.path / "tasks" / f"{task}.json"

    def _samples_path(self, task: str) -> Path:
        return self.path / "tasks" / f"{task}.samples.parquet"


def open_run(results: Path, model: ModelRef, protocol: Protocol, tasks: list[str]) -> Run:
    """The run of this model under this protocol: the existing folder, else a new one.

    Asking for further tasks of a known run adds them to it.
    """
    identity = digest_text(
        protocol.suite,
        str(sorted(protocol.profiles.items())),
        str(protocol.limit),
        protocol.dtype,
        *([protocol.quantize] if protocol.quantize else []),
    )
    tail = f"{_slug(model.name)}-{model.weights_digest[:8]}-{identity[:8]}"
    runs = results / "runs"
    known = sorted(path for path in runs.glob(f"*-{tail}") if path.name[9:] == tail)
    run = Run(known[-1] if known else runs / f"{datetime.now(UTC):%Y%m%d}-{tail}")
    if (run.path / "manifest.json").exists():
        old = run.manifest
        union = [*old.tasks, *(task for task in tasks if task not in old.tasks)]
        run.write_manifest(replace(old, tasks=union, model=model, protocol=protocol))
    else:
        run.write_manifest(
            RunManifest(run.path.name, "running", _now(), model, protocol, list(tasks))
        )
    return run


def list_runs(results: Path) -> list[Run]:
    """All runs below `results`, oldest first."""
    runs = [Run(path.parent) for path in (results / "runs").glob("*/manifest.json")]
    return sorted(runs, key=lambda run: (run.manifest.created, run.path.name))


def find_run(results: Path, name: str) -> Run:
    """A run by folder name, run id prefix, model name or path; the newest where several fit.

    Raises:
        UsageError: none fits.
    """
    for path in (Path(name), results / "runs" / name):
        with suppress(OSError):  # a name too long for a file is not a path
            if name and (path / "manifest.json").exists():
                # `.` has no parents, where the store's pictures and other runs are.
                return Run(Path(os.path.abspath(path)))  # noqa: PTH100 - links stay as they are
    runs, damaged = [], None
    for run in (Run(path.parent) for path in (results / "runs").glob("*/manifest.json")):
        try:
            runs.append((run.manifest.created, run.path.name, run.manifest.model.name, run))
        except IncompleteRunError as error:  # must not hide the sound ones
            damaged = error
    runs.sort(key=lambda each: each[:2])
    fits = [run for *_, model, run in runs if model == name]
    fits = fits or [run for _, folder, _, run in runs if name and folder.startswith(name)]
    if fits:
        return fits[-1]
    if damaged is not None:
        raise damaged
    raise UsageError(
        f"No run named {name!r} below {results}.{closest(name, [model for *_, model, _ in runs])}",
        "`kd-bench runs list` shows what is there.",
    )


def set_baseline(results: Path, name: str, run: Run) -> None:
    """Name a run as baseline. The only thing that moves one.

    Raises:
        IncompleteRunError: the run is not complete and healthy.
    """
    from kd_bench.config import dump_yaml

    status = run.manifest.status
    if status != "complete":
        raise IncompleteRunError(
            f"Run {run.path.name} is {status}; a baseline must be complete and healthy.",
            "Finish it with the same eval command, or choose another run.",
        )
    named = {**baselines(results), name: run.path.name}
    write_text(results / "baselines.yaml", dump_yaml(dict(sorted(named.items()))))


def baseline_run(results: Path, name: str) -> Run:
    """The run that a baseline name stands for.

    Raises:
        UsageError: no baseline has that name.
    """
    named = baselines(results)
    if name not in named:
        path = results / "baselines.yaml"
        raise UsageError(
            f"No baseline named {name!r} in {path}.{closest(name, list(named))}",
            "Set one with `kd-bench runs baseline set NAME RUN`, or pass --against RUN.",
        )
    return find_run(results, named[name])


def baselines(results: Path) -> dict[str, str]:
    """Run folder names by baseline name.

    Raises:
        UsageError: their file cannot be read.
    """
    from kd_bench.config import read_yaml

    path = results / "baselines.yaml"
    return {str(k): str(v) for k, v in read_yaml(path).items()} if path.exists() else {}


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise IncompleteRunError(str(error) + ".", "`kd-bench runs fsck` explains.") from None


def _slug(name: str) -> str:
    """The name as part of a folder's name; what that loses is kept apart by a digest."""
    slug = re.sub(r"[^a-zA-Z0-9._]+", "-", name).strip("-.")[:60] or "model"
    return slug if slug == name else f"{slug}.{digest_text(name)[:4]}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
