"""`evaluate`: one model over one suite, into one run folder that can be continued.

plan      which benchmarks, which data, which run folder; what is committed already is skipped
answer    every answer goes to the journal as it is produced; known ones are read back
score     upstream's scoring, our samples, and a check that the two agree
commit    samples and result; then the manifest that names them with their digests

Nothing is written before the run is held, its data was checked and its model is loaded.
"""

import contextlib
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kd_bench.distill import processes
from kd_bench.distill.chat import read_template
from kd_bench.errors import IncompleteRunError, KdBenchError, UsageError, closest, one_line
from kd_bench.evals.benchmark import (
    REASONING_TAGS,
    Answer,
    PreparedTask,
    data_digest,
    lmms_eval,
    prepare,
    quiet,
    simple_evaluate,
    upstream_metrics,
)
from kd_bench.evals.checkpoint import Checkpoint, Model, chosen_dtype, inspect_model
from kd_bench.evals.content import Thinking
from kd_bench.evals.documents import IMAGES, load_documents
from kd_bench.evals.scoring import headline, rates, score, submission, tokens
from kd_bench.files import Journal, digest_text, write_json
from kd_bench.provenance import collect
from kd_bench.records import Cost, Protocol, Role, RunManifest, RunStatus, TaskResult
from kd_bench.registry import Suite, TaskSpec, load_suite, load_task
from kd_bench.stats import score_interval
from kd_bench.store import Run, catalogue, held_run, wanted_run

if TYPE_CHECKING:
    import pandas as pd


ENGINE = "kd-bench 2"
"""Part of every journal key: counts up when the engine's answers may change."""

FAILURE = "commonest failure: "
"""How a result's note begins that says why answers failed."""


@dataclass(frozen=True)
class EvalSettings:
    """How a model is evaluated.

    Attributes:
        suite: name of a suite, or path of its YAML.
        tasks: only these benchmarks of it, ids or paths of YAML files.
        data: folder of parquet files; None for the suite's own data.
        profiles: protocol variant by benchmark.
        limit: about that many documents a benchmark; pairs and rotations stay whole.
        batch_size: questions at a time; None for as many as fit into memory.
        dtype: auto, float32, bfloat16 or float16; see `checkpoint.chosen_dtype`.
        quantize: nf4 or int8 rounds the weights while they are loaded.
        device_map: auto, balanced, balanced_low_0 or sequential spreads a model that does not fit
            one device over all, by accelerate; its answers are the same, and take longer.
        prompt_template: instead of the checkpoint's own; a name, a file or Jinja text.
        chat_template_kwargs: variables of the chat template, such as enable_thinking=False.
        reasoning_tags: a JSON list of [open, close] tags around thoughts, which are left out before
            an answer is scored, as the stock command does; `none` scores answers as they are.
        images: `blank` asks about grey images, `shuffled` about other documents': what is left of
            the score was guessed. Such a run stands beside the model's own, never in its place.
        name, role, method, seed: as tables show the model; None reads the checkpoint's lineage.
        error_limit: share of failed answers in a task above which the run is unhealthy.
        truncated_limit: of answers that were cut off at the token limit. Some answers of a wordy
            model are, on every short-answer benchmark; most are where it never learnt to stop.
        results: the store's folder.
        progress: show bars, or lines off a terminal.
        debug: let an exception through, and upstream's own output.
    """

    suite: str = "mini"
    tasks: Sequence[str] | None = None
    data: Path | None = None
    profiles: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int | None = None
    dtype: str = "auto"
    quantize: str = ""
    device_map: str = ""
    prompt_template: str = ""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_tags: str = REASONING_TAGS
    images: str = ""
    name: str | None = None
    role: str | None = None
    method: str | None = None
    seed: int | None = None
    error_limit: float = 0.01
    truncated_limit: float = 0.5
    results: Path = Path("results")
    progress: bool = True
    debug: bool = False


@dataclass(frozen=True)
class Plan:
    """What one call of `evaluate` was asked to do.

    Attributes:
        digests: `data_digest` of each benchmark as the run was planned.
    """

    checkpoint: Checkpoint
    specs: list[TaskSpec]
    data: Path
    protocol: Protocol
    digests: dict[str, str]
    settings: EvalSettings = field(default_factory=EvalSettings)


def evaluate(model: Model, settings: EvalSettings | None = None) -> Run:
    """Evaluate a model; a run that was stopped is continued, a finished one returned.

    Args:
        model: a checkpoint's folder or name, a `VisualSwitch`, or a `StockModel` of lmms-eval.

    Returns:
        The run; its manifest's status is complete, partial or unhealthy.

    Raises:
        UsageError: checkpoint, suite, benchmark, profile or data cannot be used.
    """
    settings = settings or EvalSettings()
    suite = load_suite(settings.suite)
    specs = [load_task(task) for task in settings.tasks or suite.tasks]
    for task, profile in settings.profiles.items():
        load_task(task).profile(profile)
    checkpoint, protocol = _subject(model, suite, settings)
    processes.join(timedelta(days=1))  # one may have answered long before the last
    if settings.role is None:
        checkpoint = _with_recorded_role(checkpoint, settings.results)
    folder = settings.data
    if folder is None and suite.data == "embedded":
        from kd_bench.world.build import resolve

        folder = resolve("embedded:data/test")
    if folder is None:
        raise UsageError(
            f"The suite {suite.name!r} needs the real data sets.",
            "Fetch them with `kd-bench tasks fetch --to DIR`, then pass --data DIR.",
        )
    first = processes.rank() == 0
    # The first process reads the data for all of them.
    profiles = protocol.profiles
    digests = {spec.id: data_digest(spec, folder, profiles.get(spec.id)) for spec in specs if first}
    plan = Plan(checkpoint, specs, folder, protocol, processes.broadcast(digests), settings)
    wanted = wanted_run(
        checkpoint.ref,
        protocol,
        [spec.id for spec in specs],
        data=plan.digests,
        setup=checkpoint.setup_digest,
        suite_tasks=suite.tasks,
    )
    with held_run(settings.results, wanted) if first else contextlib.nullcontext() as held:
        run: Run = processes.broadcast(held)
        execute(run, plan, wanted)
        processes.barrier()
    return run


def _subject(model: Model, suite: Suite, settings: EvalSettings) -> tuple[Checkpoint, Protocol]:
    """What is evaluated and how, as the run's manifest names it."""
    if settings.images and settings.images not in IMAGES:
        raise UsageError(
            f"There are no images {settings.images!r}.{closest(settings.images, list(IMAGES))}",
            f"Take one of: {', '.join(IMAGES)}.",
        )
    labels = {key: getattr(settings, key) for key in ("name", "role", "method", "seed")}
    known = inspect_model(model, **labels)
    # It stands beside the run of the float weights, and of the documents' own images.
    variants = [each for each in (settings.quantize, settings.images) if each]
    if variants and settings.name is None:
        known = replace(known, ref=replace(known.ref, name="-".join([known.ref.name, *variants])))
    template, variables = settings.prompt_template, settings.chat_template_kwargs
    protocol = Protocol(
        suite.name,
        dict(settings.profiles),
        settings.limit,
        "" if known.stock else chosen_dtype(known.path, settings.dtype),
        settings.batch_size,
        ENGINE,
        settings.quantize,
        read_template(template) if template else "",
        Thinking(settings.reasoning_tags).tags,
        json.dumps(variables, sort_keys=True) if variables else "",
        settings.images,
    )
    if told := [each for each in (protocol.prompt_template, protocol.chat_template_kwargs) if each]:
        setup = digest_text(known.setup_digest, *told)  # other answers than under its own
        known = replace(known, setup_digest=setup)
    return known, protocol


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
    if not recorded:
        return known
    return replace(known, ref=replace(known.ref, role=cast(Role, recorded)))


# --- one run ------------------------------------------------------------------------------------


def execute(run: Run, plan: Plan, wanted: RunManifest) -> None:
    """Evaluate what is not committed yet and set the run's status; all processes come here.

    Raises:
        UsageError: the data or the model cannot be used; nothing was written.
    """
    first = processes.rank() == 0
    notes: list[str] = []
    todo = [spec.id for spec in plan.specs if first and not _settled(run, spec)]
    todo = processes.broadcast(todo)
    for spec in plan.specs:
        if first and spec.id in todo:
            documents = load_documents(spec, plan.data, plan.protocol.profiles.get(spec.id))
            if plan.protocol.images == "shuffled":  # refused before anything is written
                documents.with_images("shuffled", spec.id)
    shown = plan.settings.progress and first
    with SuiteProgress(plan.checkpoint.ref.name, len(plan.specs), shown) as bars:
        for spec in plan.specs:
            if spec.id not in todo:
                score = run.result(spec.id).score
                bars.finish(f"{spec.id}: {_told(score)}, known")
        worker = Worker(run, plan, bars) if todo else None
        if first:
            run.begin(wanted, "running" if todo else None)
        if worker is not None:
            for spec in plan.specs:
                if spec.id in todo:
                    line, failed = _attempt(worker, spec, plan.settings.debug)
                    notes += [line] if failed else []
                    bars.finish(line)
            if first:
                run.write_manifest(replace(run.manifest, cost=worker.cost()))
    if first:
        _finish(run, plan, notes, anew=bool(todo))


def _told(score: float) -> str:
    return "not scored" if math.isnan(score) else f"{score:.1f}"


def _extent(result: TaskResult) -> str:
    """Documents and seconds, and how many answers failed or never ended."""
    failed = f", {result.rates['error']:.1%} failed" if result.rates["error"] else ""
    endless = result.rates.get("truncated", 0.0)
    cut = f", {endless:.1%} never ended" if endless > 0.01 else ""
    return f"({result.documents} documents, {result.seconds:.1f} s{failed}{cut})"


def _attempt(worker: "Worker", spec: TaskSpec, debug: bool) -> tuple[str, bool]:
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


def _finish(run: Run, plan: Plan, notes: list[str], anew: bool) -> None:
    """Set the run's status; a run of which nothing was made anew is left as it is."""
    results = run.results()
    manifest = run.manifest
    missing = [task for task in manifest.tasks if task not in results]
    sick = [line for task, result in results.items() for line in _complaints(task, result, plan)]
    status: RunStatus = "partial" if missing else "unhealthy" if sick else "complete"
    told = {note.split(":")[0] for note in notes}
    notes += [f"{task}: not evaluated" for task in missing if task not in told]
    changes: dict[str, Any] = {"notes": [*notes, *sick], "training": plan.checkpoint.lineage}
    if anew:
        run.finish(status, provenance=collect(seed=plan.checkpoint.ref.seed), **changes)
    elif replace(manifest, status=status, **changes) != manifest:
        run.finish(status, **changes)


def _complaints(task: str, result: TaskResult, plan: Plan) -> list[str]:
    """What is wrong with a task's answers, and why where that is known."""
    found = []
    errors, truncated = (result.rates.get(kind, 0.0) for kind in ("error", "truncated"))
    if errors > plan.settings.error_limit:
        found.append(f"{task}: {errors:.1%} of the answers failed")
        found += [f"{task}: {note}" for note in result.notes if note.startswith(FAILURE)]
    if truncated > plan.settings.truncated_limit:
        share = f"{truncated:.1%} of the answers"
        found.append(f"{task}: {share} never ended: they were cut off at the token limit")
    return found


class SuiteProgress:
    """One bar a task and one for the suite, plain lines off a terminal; silent when not shown."""

    def __init__(self, title: str, tasks: int, shown: bool = True) -> None:
        # The stream is taken now: while upstream works, sys.stderr points elsewhere.
        self._console = Console(file=sys.stderr, soft_wrap=True, quiet=not shown)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not (shown and self._console.is_terminal),
        )
        self._suite = self._bars.add_task(title, total=tasks, speed="")

    def __enter__(self) -> "SuiteProgress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, task: str, total: int) -> None:
        """A task begins with `total` answers to compute."""
        self._bars.add_task(f"  {task}", total=total, speed="")

    def advance(self, answers: int) -> None:
        """More answers were computed."""
        task = self._bars.tasks[-1]
        speed = (task.completed + answers) / max(1e-9, task.elapsed or 0.0)
        self._bars.update(task.id, advance=answers, speed=f"{speed:.0f} answers/s")

    def finish(self, line: str) -> None:
        """A task ended; `line` says how."""
        for task in self._bars.tasks[1:]:
            self._bars.remove_task(task.id)
        self._bars.advance(self._suite)
        suite = self._bars.tasks[0]
        self._console.print(f"[{suite.completed:.0f}/{suite.total:.0f}] {line}", markup=False)


# --- one benchmark ------------------------------------------------------------------------------


class Worker:
    """The loaded model of a run: its benchmarks are asked, scored and committed one by one."""

    def __init__(self, run: Run, plan: Plan, bars: SuiteProgress) -> None:
        with processes.importing():
            lmms_eval()
            from kd_bench.evals.engine import MemoryMeter
            from kd_bench.evals.models import load_source

            self._run = run
            self._plan = plan
            self._bars = bars
            self._memory = MemoryMeter()
            self._source = load_source(
                plan.checkpoint, plan.protocol, plan.settings.debug, plan.settings.device_map
            )

    def run_task(self, spec: TaskSpec) -> str:
        """Answer, score and commit one benchmark; returns a line that says how it went."""
        from kd_bench.evals.inputs import keep_images

        started = time.perf_counter()
        plan, run = self._plan, self._run
        profile = plan.protocol.profiles.get(spec.id)
        prepared = self._prepare(spec, profile)
        digests = (plan.checkpoint.ref.weights_digest, plan.checkpoint.setup_digest, ENGINE)
        keys = answer_keys(prepared, *digests)
        known, rank = _known_answers(run, spec.id), processes.rank()
        own = run.journal(spec.id if rank == 0 else f"{spec.id}.{rank}")
        missing = len(set(keys) - known.keys())
        self._bars.start(spec.id, -(-missing // processes.world_size()))
        failures: Counter[str] = Counter()

        def record(pairs: list[tuple[str, Answer]]) -> None:
            own.append(
                {"key": key, **{name: getattr(answer, name) for name in _FIELDS}}
                for key, answer in pairs
            )
            failures.update(answer.error for _, answer in pairs if answer.status == "error")
            self._bars.advance(len(pairs))

        scored = ask(
            prepared,
            self._source,
            keys,
            known=known,
            record=record,
            reasoning_tags=plan.protocol.reasoning_tags,
            debug=plan.settings.debug,
        )
        if scored is None:
            return spec.id
        result = self._result(prepared, scored, time.perf_counter() - started)
        result.notes.extend(f"{FAILURE}{reason}" for reason, _ in failures.most_common(1))
        file = f"submissions/{spec.id}.json"
        if not prepared.variant.scored:
            write_json(run.path / file, submission(prepared))
        keep_images(
            run.images,
            list(scored.samples["image_digest"]),
            lambda number: prepared.task.doc_to_visual(prepared.documents[number]),
        )
        if data_digest(spec, plan.data, profile) != plan.digests[spec.id]:
            raise IncompleteRunError(
                f"The data of {spec.id} in {plan.data} changed while it was evaluated.",
                "Run the same eval command again: the changed data makes a new run.",
            )
        run.commit(result, scored.samples)
        wrote = "" if prepared.variant.scored else f", wrote {file}"
        return f"{spec.id}: {_told(result.score)}{wrote} {_extent(result)}"

    def _prepare(self, spec: TaskSpec, profile: str | None) -> PreparedTask:
        """`tasks.prepare`, remembered while the data stays as it is."""
        chat = not getattr(getattr(self._source, "model", self._source), "is_simple", True)
        limit, images = self._plan.protocol.limit, self._plan.protocol.images
        key = digest_text(self._plan.digests[spec.id], str(limit), str(chat), images)
        if key not in _PREPARED:
            while len(_PREPARED) >= 24:
                _PREPARED.pop(next(iter(_PREPARED)))
            data = self._plan.data
            _PREPARED[key] = prepare(
                spec, data, profile=profile, limit=limit, chat=chat, images=images, together=True
            )
        return _PREPARED[key]

    def _result(self, prepared: PreparedTask, scored: "ScoredTask", seconds: float) -> TaskResult:
        spec, variant, aggregator = prepared.spec, prepared.variant, prepared.aggregator
        fingerprint, tags = prepared.fingerprint, self._plan.protocol.reasoning_tags
        if tags != "none":  # else as runs had it that name no tags
            fingerprint = digest_text(fingerprint, "reasoning tags", tags)
        return TaskResult(
            task=spec.id,
            fingerprint=fingerprint,
            metric=variant.metric or spec.metric,
            score=headline(prepared, scored.samples),
            metrics=scored.metrics,
            documents=len(scored.samples),
            total=prepared.total,
            units=int(scored.samples["unit_id"].nunique()),
            rates=rates(scored.samples),
            tokens=tokens(scored.samples),
            interval=score_interval(aggregator, scored.samples) if variant.scored else None,
            profile=prepared.profile,
            seconds=round(seconds, 3),
            computed=scored.computed,
            resumed=scored.resumed,
            notes=list(spec.notes),
            settings={
                "aggregator": aggregator,
                "setup_digest": self._plan.checkpoint.setup_digest,
                "generation": spec.generation_of(prepared.profile).model_dump(),
                "checkpoint_generation": self._source.generation,
                "batch_size": self._source.batch_size,
                "engine": ENGINE,
                "path": self._source.path,
            },
        )

    def cost(self) -> Cost:
        """What the model costs to run."""
        return self._source.cost(self._memory)


_PREPARED: dict[str, PreparedTask] = {}


# --- asking -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredTask:
    """One benchmark, answered and scored.

    Attributes:
        samples: one row a document.
        metrics: upstream's numbers by their own names, and ours.
        computed, resumed: answers generated now, and read back.
    """

    samples: "pd.DataFrame"
    metrics: dict[str, float]
    computed: int
    resumed: int


def ask(
    prepared: PreparedTask,
    source: Any,
    keys: list[str],
    *,
    known: dict[str, Answer] | None = None,
    record: Callable[[list[tuple[str, Answer]]], None] = lambda pairs: None,
    reasoning_tags: str = "none",
    debug: bool = False,
) -> ScoredTask | None:
    """Answer and score all documents of a benchmark; None on every process but the first.

    Args:
        source: what answers: `KdBench`, `StockAdapter`, or anything with their `answers`.
        keys: of `answer_keys`.
        known: answers that need not be computed.
        record: is given each batch of (key, answer) as it is produced.
        reasoning_tags: as in `records.Protocol`.

    Raises:
        IncompleteRunError: a document cannot be scored, or samples and upstream disagree.
    """
    from kd_bench.evals.models import Journalled

    thinking = Thinking(reasoning_tags)
    known = dict(known or {})
    before = len(known.keys() & set(keys))
    prepared.task.recorded.clear()
    prepared.task.guessed.clear()
    places = list(zip(keys, prepared.image_digests, strict=True))
    model = Journalled(source, places.__getitem__, known, record)
    with tempfile.TemporaryDirectory() as scratch, quiet(debug):
        outcome = simple_evaluate(model, prepared.task, Path(scratch), reasoning_tags)
    if outcome is None:
        return None
    metrics = upstream_metrics(outcome["results"][prepared.task.task_name])
    count_tokens = getattr(source, "count_tokens", None)
    samples, metrics = score(prepared, model.answered, metrics, thinking, count_tokens)
    return ScoredTask(samples, metrics, model.computed, before)


def answer_keys(prepared: PreparedTask, *model_digests: str) -> list[str]:
    """Journal key of each document: model, document with images, prompt, settings."""
    generation = prepared.spec.generation_of(prepared.profile).model_dump()
    settings = str(sorted(generation.items()))
    return [
        digest_text(*model_digests, content, prompt, settings)[:40]
        for content, prompt in zip(prepared.content_digests, prepared.prompts, strict=True)
    ]


_FIELDS = tuple(each.name for each in fields(Answer) if each.name != "index")


def _known_answers(run: Run, task: str) -> dict[str, Answer]:
    """Answers of all processes by key; failed ones are left out, to be tried again."""
    entries: list[dict[str, Any]] = []
    if processes.rank() == 0:
        folder = run.path / "journal"
        files = [folder / f"{task}.jsonl", *sorted(folder.glob(f"{task}.[0-9]*.jsonl"))]
        entries = [entry for file in files for entry in Journal(file).read()]
    entries = processes.broadcast(entries)
    return {
        str(entry["key"]): Answer(index=-1, **{name: entry[name] for name in _FIELDS})
        for entry in entries
        if entry.get("status") != "error" and all(name in entry for name in _FIELDS)
    }
