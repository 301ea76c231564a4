"""`evaluate`: one checkpoint over one suite, into one run folder that can be continued.

plan      which benchmarks, which data, which run folder; what is committed already is skipped
answer    every answer goes to the journal as it is produced; known ones are read back
score     upstream's scoring, our samples, and a check that the two agree
commit    samples, then the result whose presence means done
"""

import contextlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd_bench.distill import processes
from kd_bench.errors import KdBenchError, UsageError, one_line
from kd_bench.evals.checkpoint import (
    Checkpoint,
    chosen_dtype,
    inspect_checkpoint,
    inspect_hybrid,
    inspect_stock,
)
from kd_bench.evals.progress import SuiteProgress
from kd_bench.evals.worker import ENGINE, Plan, Worker
from kd_bench.provenance import collect
from kd_bench.records import Protocol, RunStatus
from kd_bench.registry import Suite, TaskSpec, load_suite, load_task
from kd_bench.store import Run, open_run

__all__ = ["ERROR_LIMIT", "evaluate"]

ERROR_LIMIT = 0.01
"""Share of failed answers in a task above which a run is unhealthy."""


def evaluate(
    checkpoint: str | Path | None = None,
    *,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    model: str | None = None,
    model_args: str = "",
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
    dtype: str = "auto",
    quantize: str = "",
    profiles: dict[str, str] | None = None,
    progress: bool = True,
    debug: bool = False,
    error_limit: float = ERROR_LIMIT,
) -> Run:
    """Evaluate a model; a run that was stopped is continued, a finished one returned.

    Args:
        checkpoint: folder that save_pretrained wrote, adapter folder of peft, hub name, or
            `embedded:weights/...`.
        vision, language: instead of it, the visual switch of two checkpoints: the first one's
            vision tower before the second one's projector and language model.
        model, model_args: instead of it, any model that lmms-eval knows, with its arguments.
        suite: name of a suite, or path of its YAML.
        tasks: only these benchmarks of it.
        data: folder of parquet files; None for the suite's own data.
        limit: about that many documents a benchmark; pairs and rotations stay whole.
        role, name, method, seed: as tables show the model; None reads the checkpoint's lineage.
        dtype: auto, float32, bfloat16 or float16; see `checkpoint.chosen_dtype`.
        quantize: nf4 or int8 rounds the weights while they are loaded.
        profiles: protocol variant by benchmark.
        error_limit: share of failed answers above which the run is unhealthy.

    Returns:
        The run; its manifest's status is complete, partial or unhealthy.

    Raises:
        UsageError: checkpoint, suite, benchmark, profile or data cannot be used.
    """
    chosen = load_suite(suite)
    specs = [load_task(task) for task in tasks or chosen.tasks]
    for task, profile in (profiles or {}).items():
        load_task(task).profile(profile)
    labels = {"role": role, "name": name, "method": method, "seed": seed}
    known = _subject(checkpoint, vision, language, model, model_args, labels)
    if quantize and name is None:  # stands beside the run of the float weights, under its own name
        known = replace(known, ref=replace(known.ref, name=f"{known.ref.name}-{quantize}"))
    protocol = Protocol(
        chosen.name,
        dict(profiles or {}),
        limit,
        chosen_dtype(known, dtype),
        batch_size,
        ENGINE,
        quantize,
    )
    plan = Plan(known, specs, data or _suite_data(chosen), protocol, debug)
    processes.join()
    run = None
    if processes.rank() == 0:
        run = open_run(results, known.ref, protocol, [spec.id for spec in specs])
    run = processes.broadcast(run)
    with run.locked() if processes.rank() == 0 else contextlib.nullcontext():
        _execute(run, plan, progress and processes.rank() == 0, error_limit)
        processes.barrier()
    return run


def _subject(
    checkpoint: str | Path | None,
    vision: str | Path | None,
    language: str | Path | None,
    model: str | None,
    model_args: str,
    labels: dict[str, Any],
) -> Checkpoint:
    """What is to be evaluated.

    Raises:
        UsageError: nothing, too much or half a hybrid was named.
    """
    ways = "Name a checkpoint, --vision with --language, or --model."
    if (vision is None) != (language is None):
        raise UsageError("--vision and --language belong together.", ways)
    if sum(given is not None for given in (checkpoint, vision, model)) != 1:
        raise UsageError("One model is evaluated at a time.", ways)
    if model is not None:
        return inspect_stock(model, model_args, **labels)
    if vision is not None and language is not None:
        return inspect_hybrid(vision, language, name=labels["name"], seed=labels["seed"])
    return inspect_checkpoint(checkpoint or "", **labels)


def _suite_data(suite: Suite) -> Path:
    if suite.data == "embedded":
        from kd_bench.world.embedded import resolve

        return resolve("embedded:data/test")
    raise UsageError(
        f"The suite {suite.name!r} needs the real data sets.",
        "Fetch them with `kd-bench tasks fetch --to DIR`, then pass --data DIR.",
    )


def _execute(run: Run, plan: Plan, shown: bool, error_limit: float) -> None:
    """Evaluate what is not committed yet and set the run's status."""
    notes: list[str] = []
    first = processes.rank() == 0
    todo = [spec.id for spec in plan.specs if first and not _settled(run, spec, plan)]
    todo = processes.broadcast(todo)
    bars = SuiteProgress(plan.checkpoint.ref.name, len(plan.specs), shown)
    with bars.running():
        for spec in plan.specs:
            if spec.id not in todo:
                bars.finish(f"{spec.id}: {_told(run, spec)}, known")
        if todo:
            if first:
                run.write_manifest(replace(run.manifest, status="running", finished=None))
            worker = _worker(run, plan, bars)
            for spec in plan.specs:
                if spec.id in todo:
                    line, failed = _attempt(worker, spec, plan.debug)
                    notes += [line] if failed else []
                    bars.finish(line)
            if first:
                run.write_manifest(replace(run.manifest, cost=worker.cost()))
    if first:
        _finish(run, plan, notes, error_limit)


def _told(run: Run, spec: TaskSpec) -> str:
    score = run.result(spec.id).score
    return "not scored" if math.isnan(score) else f"{score:.1f}"


def _worker(run: Run, plan: Plan, bars: SuiteProgress) -> Worker:
    """Load the model; when that is refused, no run is left behind that never had an answer."""
    try:
        return Worker(run, plan, bars)
    except UsageError:
        if not any((run.path / "journal").glob("*")):
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def _attempt(worker: Worker, spec: TaskSpec, debug: bool) -> tuple[str, bool]:
    """Run one task; its failure is a line and does not cost the others."""
    try:
        return worker.run_task(spec), False
    except UsageError:
        raise
    except Exception as error:
        # Another process would wait for this one for ever.
        if debug or processes.world_size() > 1:
            raise
        told = isinstance(error, KdBenchError)
        reason = one_line(error) if told else f"{type(error).__name__}: {one_line(error)}"
        return f"{spec.id}: failed: {reason}", True


def _settled(run: Run, spec: TaskSpec, plan: Plan) -> bool:
    """Whether the task's committed result stands: same set-up, and no failed answers."""
    if not run.done(spec.id):
        return False
    result = run.result(spec.id)
    same = result.settings.get("setup_digest") == plan.checkpoint.setup_digest
    if same and result.rates.get("error", 0.0) == 0.0:
        return True
    run.discard(spec.id)
    return False


def _finish(run: Run, plan: Plan, notes: list[str], error_limit: float) -> None:
    results = run.results()
    missing = [task for task in run.manifest.tasks if task not in results]
    sick = [
        f"{task}: {result.rates['error']:.1%} of the answers failed"
        for task, result in results.items()
        if result.rates.get("error", 0.0) > error_limit
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
