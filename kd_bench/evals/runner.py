"""`evaluate`: one checkpoint over one suite, into one run folder that can be continued.

plan      which benchmarks, which data, which run folder; what is committed already is skipped
answer    every answer goes to the journal as it is produced; known ones are read back
score     upstream's scoring, our samples, and a check that the two agree
commit    samples and result; then the manifest that names them with their digests

Nothing is written before the run is held, its data was checked and its model is loaded.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd_bench.distill import processes
from kd_bench.distill.chat import read_template
from kd_bench.errors import IncompleteRunError, KdBenchError, UsageError, one_line
from kd_bench.evals.checkpoint import (
    Checkpoint,
    chosen_dtype,
    inspect_checkpoint,
    inspect_hybrid,
    inspect_stock,
    with_role,
)
from kd_bench.evals.content import Thinking
from kd_bench.evals.progress import SuiteProgress
from kd_bench.evals.upstream import REASONING_TAGS
from kd_bench.evals.worker import ENGINE, FAILURE, Plan, Worker, data_digest
from kd_bench.files import digest_text
from kd_bench.provenance import collect
from kd_bench.records import Protocol, RunManifest, RunStatus, TaskResult
from kd_bench.registry import Suite, TaskSpec, load_suite, load_task
from kd_bench.store import Run, catalogue, held_run, wanted_run

ERROR_LIMIT = 0.01
"""Share of failed answers in a task above which a run is unhealthy."""
TRUNCATED_LIMIT = 0.5
"""Share of answers without an end (cut off at the token limit) above which a run is unhealthy.

Some answers of a wordy model are cut off on every short-answer benchmark; most of them are where it
never learnt to stop."""


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
    prompt_template: str = "",
    reasoning_tags: str = REASONING_TAGS,
    profiles: dict[str, str] | None = None,
    progress: bool = True,
    debug: bool = False,
    error_limit: float = ERROR_LIMIT,
    truncated_limit: float = TRUNCATED_LIMIT,
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
        reasoning_tags: a JSON list of [open, close] tags around thoughts, which are left out before
            an answer is scored, as the stock command does; `none` scores answers as they are.
        profiles: protocol variant by benchmark.
        error_limit, truncated_limit: share of failed answers, and of answers that never ended,
            above which the run is unhealthy.

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
        read_template(prompt_template) if prompt_template else "",
        reasoning_tags,
    )
    Thinking(reasoning_tags)
    if protocol.prompt_template:  # answers of the same checkpoint under its own are others
        setup = digest_text(known.setup_digest, protocol.prompt_template)
        known = replace(known, setup_digest=setup)
    processes.join()
    if role is None:
        known = _with_recorded_role(known, results)
    folder = data or _suite_data(chosen)
    plan = Plan(known, specs, folder, protocol, _digests(specs, folder, protocol), debug)
    wanted = wanted_run(
        known.ref,
        protocol,
        [spec.id for spec in specs],
        data=plan.digests,
        setup=known.setup_digest,
        suite_tasks=chosen.tasks,
    )
    limits = {"error": error_limit, "truncated": truncated_limit}
    first = processes.rank() == 0
    with held_run(results, wanted) if first else contextlib.nullcontext() as held:
        run = processes.broadcast(held)
        _execute(run, plan, wanted, progress and first, limits)
        processes.barrier()
    return run


def _with_recorded_role(known: Checkpoint, results: Path) -> Checkpoint:
    """The role that the store knows for these weights, where neither command nor lineage told one.

    What an earlier command said comes first; then the lineage; then whether the training of
    another model of the store names these weights as its teacher. Nothing is guessed.
    """
    if known.vision is not None:  # a visual switch is one by how it was made
        return known
    there = catalogue(results)
    weights = known.ref.weights_digest
    recorded = there.role_of(known.ref.name, weights)
    if not recorded and known.ref.role == "model" and there.teaches(weights):
        recorded = "teacher"
    return with_role(known, recorded) if recorded else known


def _digests(specs: Sequence[TaskSpec], folder: Path, protocol: Protocol) -> dict[str, str]:
    """What each benchmark asks; the first process reads the data for all of them."""
    found = {}
    if processes.rank() == 0:
        for spec in specs:
            found[spec.id] = data_digest(spec, folder, protocol.profiles.get(spec.id))
    digests: dict[str, str] = processes.broadcast(found)
    return digests


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
        from kd_bench.world.build import resolve

        return resolve("embedded:data/test")
    raise UsageError(
        f"The suite {suite.name!r} needs the real data sets.",
        "Fetch them with `kd-bench tasks fetch --to DIR`, then pass --data DIR.",
    )


def _execute(
    run: Run, plan: Plan, wanted: RunManifest, shown: bool, limits: dict[str, float]
) -> None:
    """Evaluate what is not committed yet and set the run's status."""
    notes: list[str] = []
    first = processes.rank() == 0
    todo = [spec.id for spec in plan.specs if first and not _settled(run, spec)]
    todo = processes.broadcast(todo)
    if first:
        _check_data([spec for spec in plan.specs if spec.id in todo], plan)
    bars = SuiteProgress(plan.checkpoint.ref.name, len(plan.specs), shown)
    with bars.running():
        for spec in plan.specs:
            if spec.id not in todo:
                bars.finish(f"{spec.id}: {_told(run, spec)}, known")
        worker = Worker(run, plan, bars) if todo else None
        if first:
            run.begin(wanted, "running" if todo else None)
        if worker is not None:
            for spec in plan.specs:
                if spec.id in todo:
                    line, failed = _attempt(worker, spec, plan.debug)
                    notes += [line] if failed else []
                    bars.finish(line)
            if first:
                run.write_manifest(replace(run.manifest, cost=worker.cost()))
    if first:
        _finish(run, plan, notes, limits, anew=bool(todo))


def _check_data(specs: Sequence[TaskSpec], plan: Plan) -> None:
    """Refuse unusable data before there is a run."""
    from kd_bench.evals.documents import load_documents

    for spec in specs:
        load_documents(spec, plan.data, plan.protocol.profiles.get(spec.id))


def _told(run: Run, spec: TaskSpec) -> str:
    score = run.result(spec.id).score
    return "not scored" if math.isnan(score) else f"{score:.1f}"


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


def _settled(run: Run, spec: TaskSpec) -> bool:
    """Whether the task's committed result stands: its files are sound, and no answer failed."""
    if not (run.path / "manifest.json").exists() or not run.done(spec.id):
        return False
    try:
        return run.verified_result(spec.id).rates.get("error", 0.0) == 0.0
    except IncompleteRunError:  # made anew from the journal
        return False


def _finish(run: Run, plan: Plan, notes: list[str], limits: dict[str, float], anew: bool) -> None:
    """Set the run's status; a run of which nothing was made anew is left as it is."""
    results = run.results()
    manifest = run.manifest
    missing = [task for task in manifest.tasks if task not in results]
    sick = [
        line
        for task, result in results.items()
        for kind, limit in limits.items()
        if result.rates.get(kind, 0.0) > limit
        for line in _complaint(task, result, kind)
    ]
    status: RunStatus = "partial" if missing else "unhealthy" if sick else "complete"
    told = {note.split(":")[0] for note in notes}
    notes += [f"{task}: not evaluated" for task in missing if task not in told]
    changes: dict[str, Any] = {"notes": [*notes, *sick], "training": plan.checkpoint.lineage}
    if anew:
        run.finish(status, provenance=collect(seed=plan.checkpoint.ref.seed), **changes)
    elif replace(manifest, status=status, **changes) != manifest:
        run.finish(status, **changes)


def _complaint(task: str, result: TaskResult, kind: str) -> list[str]:
    """What is wrong with a task's answers, and why where that is known."""
    share = f"{result.rates[kind]:.1%} of the answers"
    if kind == "truncated":
        return [f"{task}: {share} never ended: they were cut off at the token limit"]
    reasons = [f"{task}: {note}" for note in result.notes if note.startswith(FAILURE)]
    return [f"{task}: {share} failed", *reasons]
