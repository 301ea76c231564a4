"""The loaded model of one evaluation: its tasks are asked, scored and committed one by one."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_bench.distill import processes
from kd_bench.errors import IncompleteRunError, explained
from kd_bench.evals.asking import Asked, TaskJournal, answer_keys, ask
from kd_bench.evals.checkpoint import Checkpoint
from kd_bench.evals.progress import SuiteProgress
from kd_bench.evals.questions import Answer
from kd_bench.files import digest_files, digest_text, write_json
from kd_bench.records import Cost, Protocol, TaskResult
from kd_bench.registry import TaskSpec
from kd_bench.store import Run

if TYPE_CHECKING:
    from kd_bench.evals.pictures import PictureStore
    from kd_bench.evals.tasks import PreparedTask


ENGINE = "kd-bench 2"
"""Part of every journal key: counts up when the engine's answers may change."""

FAILURE = "commonest failure: "
"""How a result's note begins that says why answers failed."""


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
    debug: bool = False


class Worker:
    """A model and what its tasks have in common."""

    def __init__(self, run: Run, plan: Plan, bars: SuiteProgress) -> None:
        from kd_bench.evals.cost import MemoryMeter

        self._run = run
        self._plan = plan
        self._bars = bars
        self._memory = MemoryMeter()
        self._source = _load(plan)

    def run_task(self, spec: TaskSpec) -> str:
        """Answer, score and commit one benchmark; returns a line that says how it went."""
        started = time.perf_counter()
        plan = self._plan
        profile = plan.protocol.profiles.get(spec.id)
        chat = not getattr(getattr(self._source, "model", self._source), "is_simple", True)
        prepared = _prepare(plan, spec, profile, chat)
        digests = (plan.checkpoint.ref.weights_digest, plan.checkpoint.setup_digest, ENGINE)
        keys = answer_keys(prepared, *digests)
        journal = TaskJournal(self._run, spec.id)
        known = journal.known()
        missing = len(set(keys) - known.keys())
        self._bars.start(spec.id, -(-missing // processes.world_size()))

        failures: Counter[str] = Counter()

        def record(pairs: list[tuple[str, Answer]]) -> None:
            journal.append(pairs)
            failures.update(answer.error for _, answer in pairs if answer.status == "error")
            self._bars.advance(len(pairs))

        asked = ask(
            prepared,
            self._source,
            keys,
            known=known,
            record=record,
            reasoning_tags=plan.protocol.reasoning_tags,
            debug=plan.debug,
        )
        if asked is None:
            return spec.id
        result = self._result(prepared, asked, time.perf_counter() - started)
        for reason, _ in failures.most_common(1):
            result.notes.append(f"{FAILURE}{reason}")
        outcome = f"{result.score:.1f}"
        if not prepared.variant.scored:
            outcome = f"not scored, wrote {self._write_submission(prepared)}"
        self._keep_pictures(prepared, asked)
        if data_digest(spec, plan.data, profile) != plan.digests[spec.id]:
            raise IncompleteRunError(
                f"The data of {spec.id} in {plan.data} changed while it was evaluated.",
                "Run the same eval command again: the changed data makes a new run.",
            )
        self._run.commit(result, asked.samples)
        failed = f", {result.rates['error']:.1%} failed" if result.rates["error"] else ""
        endless = result.rates.get("truncated", 0.0)
        cut = f", {endless:.1%} never ended" if endless > 0.01 else ""
        return (
            f"{spec.id}: {outcome} "
            f"({result.documents} documents, {result.seconds:.1f} s{failed}{cut})"
        )

    def _result(self, prepared: "PreparedTask", asked: Asked, seconds: float) -> TaskResult:
        from kd_bench.evals.scoring import headline, rates
        from kd_bench.stats import score_interval

        spec = prepared.spec
        variant, aggregator = prepared.variant, prepared.aggregator
        return TaskResult(
            task=spec.id,
            fingerprint=_fingerprint(prepared, self._plan.protocol),
            metric=variant.metric or spec.metric,
            score=headline(prepared, asked.samples),
            metrics=asked.metrics,
            documents=len(asked.samples),
            total=prepared.total,
            units=int(asked.samples["unit_id"].nunique()),
            rates=rates(asked.samples),
            interval=score_interval(aggregator, asked.samples) if variant.scored else None,
            profile=prepared.profile,
            seconds=round(seconds, 3),
            computed=asked.computed,
            resumed=asked.resumed,
            notes=list(spec.notes),
            settings={
                "aggregator": aggregator,
                "setup_digest": self._plan.checkpoint.setup_digest,
                "generation": prepared.settings.model_dump(),
                "checkpoint_generation": self._source.generation,
                "batch_size": self._source.batch_size,
                "engine": ENGINE,
                "path": self._source.path,
            },
        )

    def _keep_pictures(self, prepared: "PreparedTask", asked: Asked) -> None:
        from kd_bench.evals.pictures import keep_pictures

        def decode(number: int) -> Any:
            return prepared.task.doc_to_visual(prepared.documents[number])

        keep_pictures(self._run.images, list(asked.samples["image_digest"]), decode)

    def _write_submission(self, prepared: "PreparedTask") -> str:
        """Write the file for the evaluation server; returns its place in the run's folder."""
        from kd_bench.evals.scoring import submission

        name = f"submissions/{prepared.spec.id}.json"
        write_json(self._run.path / name, submission(prepared))
        return name

    def cost(self) -> Cost:
        """What the model costs to run."""
        cost: Cost = self._source.cost(self._memory)
        return cost


def _fingerprint(prepared: "PreparedTask", protocol: Protocol) -> str:
    """The task's, with what of the protocol decides how an answer is scored."""
    if protocol.reasoning_tags == "none":  # as runs had it that name no tags
        return prepared.fingerprint
    return digest_text(prepared.fingerprint, "reasoning tags", protocol.reasoning_tags)


def _load(plan: Plan) -> Any:
    """What answers: our engine on a checkpoint or hybrid, or a stock model of lmms-eval."""
    from kd_bench.distill import models
    from kd_bench.evals.adapter import KdBench
    from kd_bench.evals.hybrid import load_hybrid
    from kd_bench.evals.stock import load_stock
    from kd_bench.evals.upstream import quiet

    checkpoint, protocol = plan.checkpoint, plan.protocol
    if not plan.debug:
        models.quiet()  # what did not load is told in one line of ours
    with quiet(plan.debug):
        if checkpoint.stock is not None:
            return load_stock(*checkpoint.stock, protocol.batch_size)
        named = checkpoint.ref.path
        hint = "Do config.json, processor and weights belong together?"
        with explained(f"{named} cannot be evaluated", hint):
            parts: dict[str, Any] = {"pretrained": str(checkpoint.path)}
            if checkpoint.vision is not None:
                parts = load_hybrid(
                    checkpoint.vision, checkpoint.path, protocol.dtype, protocol.quantize
                )
            model = KdBench(
                **parts,
                batch_size=protocol.batch_size,
                dtype=protocol.dtype,
                quantize=protocol.quantize,
                prompt_template=protocol.prompt_template,
                pictures=_pictures(),
            )
            model.check(named)
        return model


_STORES: "dict[str, PictureStore]" = {}
_PREPARED: "dict[str, PreparedTask]" = {}


def _pictures() -> "PictureStore":
    """Prepared pictures, shared by all checkpoints that this process evaluates."""
    from kd_bench.evals.pictures import PictureStore

    return _STORES.setdefault("pictures", PictureStore())


def _prepare(plan: Plan, spec: TaskSpec, profile: str | None, chat: bool) -> "PreparedTask":
    """`tasks.prepare`, remembered while the data stays as it is."""
    from kd_bench.evals.tasks import prepare

    limit = plan.protocol.limit
    key = digest_text(plan.digests[spec.id], str(limit), str(chat))
    if key not in _PREPARED:
        while len(_PREPARED) >= 24:
            _PREPARED.pop(next(iter(_PREPARED)))
        _PREPARED[key] = prepare(spec, plan.data, profile=profile, limit=limit, chat=chat)
    return _PREPARED[key]


_DIGESTS: dict[tuple[object, ...], str] = {}


def data_digest(spec: TaskSpec, folder: Path, profile: str | None) -> str:
    """sha256 of what a benchmark asks: its files, its registry entry, profile and upstream.

    Files that this process has read before are not read again while their inode is unchanged.

    Raises:
        UsageError: the folder lacks the benchmark.
    """
    from kd_bench.evals.documents import data_files
    from kd_bench.evals.tasks import SCORING_VERSION
    from kd_bench.evals.upstream import lmms_eval_version

    files = data_files(spec, folder, profile)
    states = [file.stat() for file in files]
    key = tuple(
        (str(file), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        for file, state in zip(files, states, strict=True)
    )
    if key not in _DIGESTS:
        _DIGESTS[key] = digest_files(files)
    asked = f"{profile or spec.default_profile} scoring {SCORING_VERSION}"
    upstream = f"lmms-eval {lmms_eval_version()}"
    return digest_text(_DIGESTS[key], spec.model_dump_json(), asked, upstream)
