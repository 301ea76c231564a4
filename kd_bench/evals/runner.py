"""`evaluate`: one checkpoint over one suite, into one run folder that can be continued.

plan      which benchmarks, which data, which run folder; what is committed already is skipped
answer    every answer goes to the journal as it is produced; known ones are read back
score     upstream's scoring, our samples, and a check that the two agree
commit    samples, then the result whose presence means done
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from kd_bench.errors import KdBenchError, UsageError, one_line
from kd_bench.evals.checkpoint import Checkpoint, inspect_checkpoint
from kd_bench.evals.progress import SuiteProgress
from kd_bench.evals.questions import Answer
from kd_bench.files import digest_text
from kd_bench.provenance import collect
from kd_bench.records import Protocol, RunStatus, TaskResult
from kd_bench.registry import Suite, TaskSpec, load_suite, load_task
from kd_bench.store import Run, open_run

__all__ = ["ERROR_LIMIT", "evaluate"]

ERROR_LIMIT = 0.01
"""Share of failed answers in a task above which a run is unhealthy."""

ENGINE = "kd-bench 1"


@dataclass(frozen=True)
class _Plan:
    """What one call of `evaluate` was asked to do."""

    checkpoint: Checkpoint
    suite: Suite
    specs: list[TaskSpec]
    data: Path
    protocol: Protocol
    progress: bool
    debug: bool
    error_limit: float


def evaluate(
    checkpoint: str | Path,
    *,
    suite: str = "mini",
    tasks: Sequence[str] | None = None,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    role: str | None = None,
    name: str | None = None,
    method: str | None = None,
    seed: int | None = None,
    results: Path = Path("results"),
    dtype: str = "float32",
    profiles: dict[str, str] | None = None,
    progress: bool = True,
    debug: bool = False,
    error_limit: float = ERROR_LIMIT,
) -> Run:
    """Evaluate a checkpoint; a run that was stopped is continued, a finished one returned.

    Args:
        suite: name of a suite, or path of its YAML.
        tasks: only these benchmarks of it.
        data: folder of parquet files; None for the suite's own data.
        limit: about that many documents a benchmark; pairs and rotations stay whole.
        role, name, method, seed: as tables show the model; None reads the checkpoint's lineage.
        profiles: protocol variant by benchmark.
        error_limit: share of failed answers above which the run is unhealthy.

    Returns:
        The run; its manifest's status is complete, partial or unhealthy.

    Raises:
        UsageError: checkpoint, suite, benchmark, profile or data cannot be used.
    """
    chosen = load_suite(suite)
    specs = [load_task(task) for task in tasks or chosen.tasks]
    profiles = dict(profiles or {})
    for task, profile in profiles.items():
        load_task(task).profile(profile)
    known = inspect_checkpoint(Path(checkpoint), role=role, name=name, method=method, seed=seed)
    protocol = Protocol(chosen.name, profiles, limit, dtype, batch_size, ENGINE)
    folder = data or _suite_data(chosen)
    plan = _Plan(known, chosen, specs, folder, protocol, progress, debug, error_limit)
    run = open_run(results, known.ref, protocol, [spec.id for spec in specs])
    with run.locked():
        _execute(run, plan)
    return run


def _suite_data(suite: Suite) -> Path:
    if suite.data == "embedded":
        from kd_bench.world.embedded import resolve

        return resolve("embedded:data/test")
    raise UsageError(
        f"The suite {suite.name!r} needs the real data sets.",
        "Fetch them with `kd-bench tasks fetch --to DIR`, then pass --data DIR.",
    )


def _execute(run: Run, plan: _Plan) -> None:
    """Evaluate what is not committed yet and set the run's status."""
    notes: list[str] = []
    todo = [spec for spec in plan.specs if not _settled(run, spec, plan)]
    bars = SuiteProgress(plan.checkpoint.ref.name, len(plan.specs), plan.progress)
    with bars.running():
        for spec in plan.specs:
            if spec not in todo:
                bars.finish(f"{spec.id}: {run.result(spec.id).score:.1f}, known")
        if todo:
            run.write_manifest(replace(run.manifest, status="running", finished=None))
            worker = _Worker(run, plan, bars)
            for spec in todo:
                try:
                    line = worker.run_task(spec)
                except UsageError:
                    raise
                except Exception as error:
                    if plan.debug:
                        raise
                    line = f"{spec.id}: failed: {_reason(error)}"
                    notes.append(line)
                bars.finish(line)
            run.write_manifest(replace(run.manifest, cost=worker.cost()))
    _finish(run, plan, notes)


def _settled(run: Run, spec: TaskSpec, plan: _Plan) -> bool:
    """Whether the task's committed result stands: same set-up, and no failed answers."""
    if not run.done(spec.id):
        return False
    result = run.result(spec.id)
    same = result.settings.get("setup_digest") == plan.checkpoint.setup_digest
    if same and result.rates.get("error", 0.0) == 0.0:
        return True
    run.discard(spec.id)
    return False


def _finish(run: Run, plan: _Plan, notes: list[str]) -> None:
    results = run.results()
    missing = [task for task in run.manifest.tasks if task not in results]
    sick = [
        f"{task}: {result.rates['error']:.1%} of the answers failed"
        for task, result in results.items()
        if result.rates.get("error", 0.0) > plan.error_limit
    ]
    status: RunStatus = "partial" if missing else "unhealthy" if sick else "complete"
    told = {note.split(":")[0] for note in notes}
    notes += [f"{task}: not evaluated" for task in missing if task not in told]
    run.finish(
        status,
        notes=[*notes, *sick],
        training=plan.checkpoint.lineage,
        provenance=collect(seed=plan.checkpoint.ref.seed),
    )


def _reason(error: Exception) -> str:
    return (
        one_line(error) if isinstance(error, KdBenchError) else f"{type(error).__name__}: {error}"
    )


class _Worker:
    """The loaded model and what its tasks have in common."""

    def __init__(self, run: Run, plan: _Plan, bars: SuiteProgress) -> None:
        from kd_bench.evals.adapter import KdBench, torch_dtype

        torch_dtype(plan.protocol.dtype)
        self._run = run
        self._plan = plan
        self._bars = bars
        self._source = KdBench(
            str(plan.checkpoint.path),
            batch_size=plan.protocol.batch_size,
            dtype=plan.protocol.dtype,
            pictures=_pictures(),
        )

    def run_task(self, spec: TaskSpec) -> str:
        """Answer, score and commit one benchmark; returns a line that says how it went."""
        from kd_bench.evals.adapter import Journalled
        from kd_bench.evals.scoring import agree, headline, rates, samples_frame
        from kd_bench.evals.upstream import quiet, simple_evaluate
        from kd_bench.stats import score_interval

        started = time.perf_counter()
        plan = self._plan
        profile = plan.protocol.profiles.get(spec.id)
        prepared = _prepare(spec, plan.data, profile, plan.protocol.limit)
        prepared.task.recorded.clear()
        journal = self._run.journal(spec.id)
        known = {
            str(entry["key"]): _from_journal(entry)
            for entry in journal.read()
            if entry.get("status") != "error"  # a failed answer is tried again
        }
        resumed = len(known)
        keys = [self._key(prepared, index) for index in range(len(prepared.documents))]
        wanted = {key for key, _ in keys}
        self._bars.start(spec.id, sum(key not in known for key in wanted))

        def record(pairs: list[tuple[str, Answer]]) -> None:
            journal.append([_to_journal(key, answer) for key, answer in pairs])
            self._bars.advance(len(pairs))

        model = Journalled(self._source, keys.__getitem__, known, record)
        with tempfile.TemporaryDirectory() as scratch, quiet(plan.debug):
            outcome = simple_evaluate(model, prepared.task, Path(scratch))
        assert outcome is not None
        metrics = _metrics(outcome, prepared.task.task_name)
        samples = samples_frame(prepared, model.answered)
        agree(prepared, samples, metrics)
        score = headline(prepared, samples)
        result = TaskResult(
            task=spec.id,
            fingerprint=prepared.fingerprint,
            metric=spec.metric,
            score=score,
            metrics=metrics,
            documents=len(samples),
            units=int(samples["unit_id"].nunique()),
            rates=rates(samples),
            interval=score_interval(spec.aggregator, samples),
            profile=prepared.profile,
            seconds=round(time.perf_counter() - started, 3),
            computed=model.computed,
            resumed=resumed,
            notes=list(spec.notes),
            settings={
                "setup_digest": plan.checkpoint.setup_digest,
                "generation": spec.generation.model_dump(),
                "batch_size": self._source.engine.batch_size,
                "engine": ENGINE,
            },
        )
        self._run.commit(result, samples)
        failed = f", {result.rates['error']:.1%} failed" if result.rates["error"] else ""
        return f"{spec.id}: {score:.1f} ({len(samples)} documents, {result.seconds:.1f} s{failed})"

    def _key(self, prepared: Any, index: int) -> tuple[str, str]:
        """Journal key and picture key of a document."""
        checkpoint = self._plan.checkpoint
        key = digest_text(
            checkpoint.ref.weights_digest,
            checkpoint.setup_digest,
            prepared.contents[index],
            prepared.prompts[index],
            str(sorted(prepared.spec.generation.model_dump().items())),
            ENGINE,
        )
        return key[:40], prepared.pictures[index]

    def cost(self) -> Any:
        """What the model costs to run."""
        from kd_bench.evals.cost import measure

        return measure(self._source.engine)


_STORES: dict[str, Any] = {}
_PREPARED: dict[str, Any] = {}


def _pictures() -> Any:
    """Prepared pictures, shared by all checkpoints that this process evaluates."""
    from kd_bench.evals.pictures import PictureStore

    return _STORES.setdefault("pictures", PictureStore())


def _prepare(spec: TaskSpec, folder: Path, profile: str | None, limit: int | None) -> Any:
    """`tasks.prepare`, remembered while the files stay as they are."""
    from kd_bench.evals.tasks import prepare

    files = sorted(folder.glob(f"{spec.id}*/*.parquet"))
    stamps = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    key = digest_text(spec.model_dump_json(), str(stamps), str(profile), str(limit))
    if key not in _PREPARED:
        _PREPARED[key] = prepare(spec, folder, profile=profile, limit=limit)
    return _PREPARED[key]


_FIELDS = tuple(field.name for field in fields(Answer) if field.name != "index")


def _to_journal(key: str, answer: Answer) -> dict[str, Any]:
    values = asdict(answer)
    return {"key": key, **{name: values[name] for name in _FIELDS}}


def _from_journal(entry: dict[str, Any]) -> Answer:
    return Answer(index=-1, **{name: entry[name] for name in _FIELDS})


def _metrics(outcome: dict[str, Any], task: str) -> dict[str, float]:
    """Upstream's numbers by their own names."""
    found = {}
    for key, value in outcome["results"][task].items():
        name, _, filtered = key.partition(",")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if filtered and number and "_stderr" not in name:
            found[name] = float(value)
    return found
