"""Run folders: created, continued, committed, verified.

    <results>/runs/<date>-<model>-<weights8>-<identity8>/
      manifest.json   journal/<task>.jsonl   tasks/<task>.json   tasks/<task>.samples.parquet
    <results>/runs/.<model>-<weights8>-<identity8>.lock
    <results>/images/<first 16 digits of the pixels' digest>.png

The folder is the list of runs; there is no database. Every file of a run is written aside,
flushed and renamed, its digest goes into the manifest, and the manifest holds its own: a task is
done when the manifest names its files, and what is read is compared with their digests. Only who
holds a run's lock writes into it. Which run a name stands for is the catalogue's business.
"""

import io
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_bench import registry
from kd_bench.aggregators import AGGREGATORS, aggregate
from kd_bench.errors import IncompleteRunError, KdBenchError, one_line
from kd_bench.files import (
    Journal,
    digest_bytes,
    digest_text,
    locked,
    parse_json,
    write_bytes,
    write_json,
)
from kd_bench.records import (
    CONTENT_COLUMNS,
    FORMAT,
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


AGAIN = "Run the same eval command again: what is damaged is made anew, answers are kept."
MANIFEST_LOST = (
    "Restore it, or delete that file and run the same eval command again: answers are kept; "
    "`kd-bench runs fsck` tells what else is damaged."
)
TOLERANCE = 0.05
"""Points between a stored score and that of its samples: upstream's rounding."""


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path

    # --- reading: nothing is believed because it is there ---------------------------------------

    @property
    def manifest(self) -> RunManifest:
        """The manifest as it lies on disk now.

        Raises:
            IncompleteRunError: it is damaged, was changed, or is of a newer format.
        """
        path = self.path / "manifest.json"
        try:
            value = parse_json(path.read_bytes(), path)
        except (OSError, ValueError) as error:
            raise IncompleteRunError(
                f"{path} cannot be read: {one_line(error)}.", MANIFEST_LOST
            ) from None
        _check_seal(value, path)
        return from_json(RunManifest, value, str(path))

    def done(self, task: str) -> bool:
        """Whether the task was committed."""
        return task in self.done_tasks()

    def done_tasks(self, manifest: RunManifest | None = None) -> list[str]:
        """Committed tasks in the order in which they were planned."""
        manifest = manifest or self.manifest
        names = ((task, _result_name(task)) for task in manifest.tasks)
        if manifest.verified:
            return [task for task, name in names if name in manifest.files]
        return [task for task, name in names if (self.path / name).exists()]

    def result(self, task: str) -> TaskResult:
        """The committed result of one task.

        Raises:
            IncompleteRunError: the task was not finished, or its file is damaged.
        """
        name = _result_name(task)
        path = self.path / name
        if not self.done(task):
            raise IncompleteRunError(
                f"Run {self.path.name} has no result for {task}.",
                "Run the same eval command again: it continues where it stopped.",
            )
        try:
            value = parse_json(self._read(name), path)
        except ValueError as error:
            raise IncompleteRunError(f"{one_line(error)}.", AGAIN) from None
        result = from_json(TaskResult, value, str(path))
        if result.task != task:
            raise IncompleteRunError(f"{path} is the result of {result.task}.", AGAIN)
        if _needs_score(result) and not math.isfinite(result.score):
            raise IncompleteRunError(f"{path} holds no score.", AGAIN)
        return result

    def results(self) -> dict[str, TaskResult]:
        """Committed results by task, in the order in which they were planned.

        Their samples are verified, too: by their digests, or, in a run from before there were
        any, by giving the stored score.

        Raises:
            IncompleteRunError: a file is damaged or was changed.
        """
        return {task: self.verified_result(task) for task in self.done_tasks()}

    def verified_result(self, task: str) -> TaskResult:
        """`result`, after its samples were verified as well; raises the same."""
        result = self.result(task)
        if self.manifest.verified:
            self._read(_samples_name(task))
        elif problem := self.contradiction(task):
            path = self.path / _samples_name(task)
            raise IncompleteRunError(f"{path} {problem}.", "Evaluate it again.")
        return result

    def samples(self, task: str, columns: Sequence[str] = SAMPLE_COLUMNS) -> "pd.DataFrame":
        """One row a sample; columns are `records.SAMPLE_COLUMNS`, or the asked ones of them.

        Those of `records.CONTENT_COLUMNS` can be asked for too.
        """
        import pandas as pd
        from pyarrow.parquet import read_schema

        path = self.path / _samples_name(task)
        data = self._read(_samples_name(task))
        try:
            stored = read_schema(io.BytesIO(data)).names
            kept = [column for column in columns if column in stored]
            frame = pd.read_parquet(io.BytesIO(data), columns=kept, page_checksum_verification=True)
        except Exception as error:  # a flipped bit may surface anywhere inside the reader
            problem = f"{path} cannot be read: {type(error).__name__}."
            raise IncompleteRunError(problem, AGAIN) from None
        for column in set(columns) & CONTENT_COLUMNS.keys() - set(frame.columns):
            frame[column] = CONTENT_COLUMNS[column]
        missing = [column for column in columns if column not in frame.columns]
        if missing:
            raise IncompleteRunError(f"{path} has no column {missing[0]}.", "Evaluate it again.")
        return frame[list(columns)]

    def _read(self, name: str) -> bytes:
        """The content of a committed file, compared with its digest.

        A writer may replace the file between two looks: then the manifest has changed as well,
        and both are read again.
        """
        path = self.path / name
        for _ in range(8):
            manifest = self.manifest
            wanted = manifest.files.get(name)
            try:
                data = path.read_bytes()
            except OSError as error:
                reason = error.strerror or type(error).__name__
                lost = isinstance(error, FileNotFoundError)
                problem = f"{path} is missing" if lost else f"{path} cannot be read: {reason}"
            else:
                if not manifest.verified or digest_bytes(data) == wanted:
                    return data
                problem = f"{path} is not what was written: its digest differs"
                if wanted is None:
                    problem = f"{path} belongs to no committed task"
            if self.manifest.files.get(name) == wanted:
                break
        raise IncompleteRunError(f"{problem}.", AGAIN)

    def contradiction(self, task: str) -> str | None:
        """Where samples and result of a task disagree; None when they tell the same story."""
        result = self.result(task)
        samples = self.samples(task)
        if len(samples) != result.documents:
            return f"has {len(samples)} rows, {task}.json says {result.documents} documents"
        units = int(samples["unit_id"].nunique())
        if units != result.units:
            return f"has {units} units, {task}.json says {result.units}"
        name = str(result.settings.get("aggregator", ""))
        if name not in AGGREGATORS or not math.isfinite(result.score):
            return None
        try:
            score = aggregate(name, samples)
        except (TypeError, ValueError) as error:
            return f"cannot be scored: {one_line(error)}"
        if abs(score - result.score) <= TOLERANCE:
            return None
        return f"gives a score of {score:.2f}, {task}.json says {result.score:.2f}"

    @property
    def images(self) -> Path:
        """Folder of the images that all runs of the store share."""
        return self.path.parents[1] / "images"

    def image(self, digest: str) -> Path | None:
        """The stored image with this digest of its pixels, if there is one."""
        path = self.images / f"{digest[:16]}.png"
        return path if digest and path.is_file() else None

    # --- writing: only by who holds the lock ----------------------------------------------------

    def write_manifest(self, manifest: RunManifest) -> None:
        """Replace the manifest, sealed by a digest of its own."""
        body = to_json(manifest)
        write_json(self.path / "manifest.json", {**body, "digest": _seal(body)})

    def journal(self, task: str) -> Journal:
        """The task's append-only answers."""
        return Journal(self.path / "journal" / f"{task}.jsonl")

    def commit(self, result: TaskResult, samples: "pd.DataFrame") -> None:
        """Store one task; it is done when the manifest names both files with their digests.

        Raises:
            IncompleteRunError: a scored benchmark came out without a score.
        """
        if _needs_score(result) and not math.isfinite(result.score):
            raise IncompleteRunError(
                f"{result.task} has no score ({result.documents} documents); nothing was stored.",
                "Look at its data, or raise --limit.",
            )
        buffer = io.BytesIO()
        further = [column for column in CONTENT_COLUMNS if column in samples.columns]
        # Of a file of a few hundred rows, statistics and a second schema would be half.
        samples.loc[:, [*SAMPLE_COLUMNS, *further]].to_parquet(
            buffer,
            index=False,
            write_page_checksum=True,
            compression="zstd",
            write_statistics=False,
            store_schema=False,
        )
        self.discard(result.task)
        files = {
            _samples_name(result.task): write_bytes(
                self.path / _samples_name(result.task), buffer.getvalue()
            ),
            _result_name(result.task): write_json(
                self.path / _result_name(result.task), to_json(result)
            ),
        }
        manifest = self.manifest
        self.write_manifest(replace(manifest, files={**manifest.files, **files}))

    def discard(self, task: str) -> None:
        """Forget a task's result (not its journal), so that it is scored again."""
        manifest = self.manifest
        ours = (_result_name(task), _samples_name(task))
        if any(name in manifest.files for name in ours):
            kept = {name: digest for name, digest in manifest.files.items() if name not in ours}
            self.write_manifest(replace(manifest, files=kept))
        (self.path / _result_name(task)).unlink(missing_ok=True)

    def begin(self, wanted: RunManifest, status: RunStatus | None = None) -> RunManifest:
        """Write down what is evaluated: a new manifest, or the old one with further tasks.

        Args:
            status: of a known run; None leaves it.
        """
        if not (self.path / "manifest.json").exists():
            _inherit_journals(self, wanted)
            manifest = replace(wanted, run_id=self.path.name)
        else:
            old = self.manifest
            manifest = replace(
                old,
                status=status or old.status,
                finished=None if status == "running" else old.finished,
                model=wanted.model,
                protocol=wanted.protocol,
                tasks=[*old.tasks, *(task for task in wanted.tasks if task not in old.tasks)],
                suite_tasks=wanted.suite_tasks or old.suite_tasks,
                data={**old.data, **wanted.data},
            )
            if manifest == old:
                return old
        self.write_manifest(manifest)
        return manifest

    def finish(self, status: RunStatus, **changes: Any) -> RunManifest:
        """Set the final status and any other manifest field."""
        manifest = replace(self.manifest, status=status, finished=now(), **changes)
        self.write_manifest(manifest)
        return manifest

    @property
    def lock_file(self) -> Path:
        """Lies beside the folder, which need not exist to be held."""
        return self.path.parent / f".{_tail(self.path)}.lock"

    def locked(self) -> AbstractContextManager[None]:
        """Hold the run for writing.

        Raises:
            UsageError: another process holds it.
        """
        return locked(
            self.lock_file,
            f"{self.path} is being written by another kd-bench process.",
            "Wait for it, or give this run another --name.",
        )


def _result_name(task: str) -> str:
    return f"tasks/{task}.json"


def _samples_name(task: str) -> str:
    return f"tasks/{task}.samples.parquet"


def _needs_score(result: TaskResult) -> bool:
    """Whether the benchmark is one that has a score; a hidden test split has none."""
    if result.task not in registry.task_names():
        return True
    spec = registry.load_task(result.task)
    return result.profile not in spec.profiles or spec.profiles[result.profile].scored


# --- the manifest's own digest ------------------------------------------------------------------


def _seal(body: Mapping[str, Any]) -> str:
    import json

    return digest_text(json.dumps(body, sort_keys=True, ensure_ascii=True))


def _check_seal(value: Any, path: Path) -> None:
    """Refuse a manifest of a newer format, and one that is not as it was written."""
    if not isinstance(value, dict):
        return  # the validation of its fields says what is missing
    told = value.setdefault("format", 1)
    if isinstance(told, int) and told > FORMAT:
        raise IncompleteRunError(
            f"{path} was written by a newer kd-bench: its format is {told}, known is {FORMAT}.",
            "Upgrade kd-bench.",
        )
    seal = value.pop("digest", None)
    if seal == _seal(value) or (seal is None and told == 1 and "files" not in value):
        return
    raise IncompleteRunError(f"{path} is not what was written: its digest differs.", MANIFEST_LOST)


# --- making and continuing ----------------------------------------------------------------------


def wanted_run(
    model: ModelRef,
    protocol: Protocol,
    tasks: Sequence[str],
    *,
    data: Mapping[str, str] | None = None,
    setup: str = "",
    suite_tasks: Sequence[str] = (),
) -> RunManifest:
    """What is to be evaluated, as the manifest of a run that has not begun."""
    return RunManifest(
        "",
        "running",
        now(),
        model,
        protocol,
        list(tasks),
        suite_tasks=list(suite_tasks),
        setup=setup,
        data=dict(data or {}),
    )


@contextmanager
def held_run(results: Path, wanted: RunManifest) -> Iterator[Run]:
    """Hold the run of this model and identity: the existing folder, else the name of a new one.

    Nothing is written but the lock: `Run.begin` makes the manifest.

    Raises:
        UsageError: another process holds it.
        IncompleteRunError: its manifest is damaged or of a newer format.
    """
    while True:
        run = _place(results, wanted)
        with run.locked():
            # Whoever held the lock before may have made the folder meanwhile.
            if _place(results, wanted) == run:
                yield run
                return


def _place(results: Path, wanted: RunManifest) -> Run:
    """The folder that holds, or will hold, the results of this identity under this name."""
    weights, identity = wanted.model.weights_digest, wanted.identity.digest
    tail = f"{slug(wanted.model.name)}-{weights[:8]}-{identity[:8]}"
    for path in sorted((results / "runs").glob("*/manifest.json"), reverse=True):
        run = Run(path.parent)
        try:
            there = run.manifest
        except KdBenchError:
            if _tail(run.path) == tail:
                raise
            continue
        named = there.model.name == wanted.model.name
        if there.verified and named and there.identity.holds(wanted.identity):
            return run
    # A folder whose manifest was lost still has its journal.
    kept = sorted(path for path in (results / "runs").glob(f"*-{tail}") if _tail(path) == tail)
    return Run(kept[-1] if kept else results / "runs" / f"{datetime.now(UTC):%Y%m%d}-{tail}")


def _tail(path: Path) -> str:
    """A run folder's name without its date: what names the lock."""
    return re.sub(r"^\d{8}-", "", path.name)


def _inherit_journals(run: Run, wanted: RunManifest) -> None:
    """Take over the answers of the same weights from before a run knew its data.

    An answer's key holds model, document, prompt and settings: what fits no document is not used.
    """
    for path in sorted(run.path.parent.glob("*/manifest.json")):
        try:
            old = Run(path.parent).manifest
        except KdBenchError:
            continue
        if old.verified or old.model.weights_digest != wanted.model.weights_digest:
            continue
        for journal in sorted((path.parent / "journal").glob("*.jsonl")):
            copy = run.path / "journal" / journal.name
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(journal, copy)


def slug(name: str) -> str:
    """The name as part of a folder's name; what that loses is kept apart by a digest."""
    made = re.sub(r"[^a-zA-Z0-9._]+", "-", name).strip("-.")[:60] or "model"
    return made if made == name else f"{made}.{digest_text(name)[:4]}"


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
