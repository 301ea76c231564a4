"""The records that the layers share: one model, evaluated once, as it lies on disk.

    RunManifest   manifest.json               which model, which protocol, where it came from
    TaskResult    tasks/<task>.json           one benchmark's score; its presence means done
    columns       tasks/<task>.samples.parquet, one row a sample: SAMPLE_, CONTENT_COLUMNS

All are plain frozen dataclasses; `from_json` validates what was read from a file.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal, TypeVar, get_args

from kd_bench.errors import IncompleteRunError

FORMAT = 2
"""Of a manifest. 1: no digests of files, nothing on the data; 2: both."""

Role = Literal["teacher", "sft", "kd", "switch", "baseline", "student", "model"]
ROLES: tuple[str, ...] = get_args(Role)

RunStatus = Literal["running", "complete", "partial", "unhealthy"]

Status = Literal["ok", "empty", "truncated", "error"]

AVERAGE = "average"
"""The mean over benchmarks, wherever it stands beside their ids."""


@dataclass(frozen=True)
class ModelRef:
    """The model that was evaluated.

    Attributes:
        name: what tables show; several seeds of one method share `method`.
        role: teacher, sft (the floor), kd, switch (student's vision, teacher's language), ...;
            `model` when nobody said.
        path: the checkpoint as the user gave it.
        weights_digest: sha256 of the weights, hexadecimal.
        method: `sft`, `switch-kd`, ...; rows with equal method and role fold into mean and spread.
        seed: training seed, when known.
    """

    name: str
    role: Role
    path: str
    weights_digest: str
    method: str = ""
    seed: int | None = None
    architecture: str = ""


@dataclass(frozen=True)
class Cost:
    """What the model costs to run. None is "not measured", never zero.

    Attributes:
        parameters: number of weights.
        weight_bytes: size of the weights in memory at the evaluation's dtype.
        latency_ms: median milliseconds for one answer at batch 1.
        peak_memory_bytes: of the evaluation; on a CPU, of the weights and a few answers.
    """

    parameters: int | None = None
    weight_bytes: int | None = None
    latency_ms: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Protocol:
    """How the answers were made: what two runs must share to be compared, and what is only noted.

    Attributes:
        suite: `mini`, `ten`, ...
        profiles: protocol variant by task where it is not the default.
        limit: documents per task, None for all.
        dtype, batch_size, engine: noted, not part of a task's fingerprint.
        quantize: what the weights were rounded to while they were loaded: nf4, int8 or nothing.
        prompt_template: Jinja text that stood in for the checkpoint's own; empty for its own.
        chat_template_kwargs: variables of the template, as JSON; empty for none.
        images: `blank` or `shuffled` where the documents' own were taken away; such a run tells
            what a model guesses and is no score of its own.
        reasoning_tags: JSON list of [open, close] tags around a thought, which is left out before
            an answer is scored; `none` scores the answer as it was generated.
    """

    suite: str
    profiles: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    dtype: str = "float32"
    batch_size: int | None = None
    engine: str = ""
    quantize: str = ""
    prompt_template: str = ""
    reasoning_tags: str = "none"
    chat_template_kwargs: str = ""
    images: str = ""


@dataclass(frozen=True)
class Identity:
    """What a run measured. Equal identities give equal numbers; nothing else names a result.

    Attributes:
        weights: digest of the weights.
        setup: digest of the configuration, tokenizer and processor files beside them.
        protocol: suite, profiles, limit, dtype, engine, ...; its batch size is only noted.
        data: by benchmark, the digest of its data files and of what is asked of them; empty
            where it is not known.
    """

    weights: str
    setup: str
    protocol: Protocol
    data: dict[str, str]

    @property
    def conditions(self) -> str:
        """Digest of the protocol alone: runs of two models can be compared where it is equal."""
        told = {k: v for k, v in asdict(self.protocol).items() if k != "batch_size"}
        for name in ("chat_template_kwargs", "images"):
            if not told[name]:  # runs of before it was known keep their digest
                del told[name]
        return _digest(told)

    @property
    def digest(self) -> str:
        """sha256 over all of it, hexadecimal."""
        return _digest([self.weights, self.setup, self.conditions, self.data])

    def holds(self, other: "Identity") -> bool:
        """Whether a run of this identity may hold the other's results, too.

        Benchmarks that only one of the two has do not stand against it.
        """
        shared = self.data.keys() & other.data.keys()
        own, its = ((each.weights, each.setup, each.conditions) for each in (self, other))
        return own == its and all(self.data[task] == other.data[task] for task in shared)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class RunManifest:
    """One evaluation of one model over one suite.

    Attributes:
        tasks: planned benchmark ids, in order.
        suite_tasks: all benchmarks of the suite; empty where they are not known.
        setup, data: of `Identity`.
        files: sha256 of every committed file by its path inside the run's folder.
        training: lineage of a checkpoint trained by kd-bench (recipe, digests, method, seed).
        provenance: versions, git commit and dirty flag, hardware, command line.
        notes: what a reader must know, e.g. why the run is unhealthy or that it was imported.
    """

    run_id: str
    status: RunStatus
    created: str
    model: ModelRef
    protocol: Protocol
    tasks: list[str]
    finished: str | None = None
    cost: Cost = field(default_factory=Cost)
    training: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    format: int = FORMAT
    suite_tasks: list[str] = field(default_factory=list)
    setup: str = ""
    data: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> Identity:
        """What was measured."""
        return Identity(self.model.weights_digest, self.setup, self.protocol, self.data)

    def extent(self, *results: "TaskResult") -> str:
        """`n = 4 of 600` where a limit left documents of these benchmarks out, else nothing."""
        documents = sum(result.documents for result in results)
        totals = [result.total for result in results if result.total is not None]
        if self.protocol.limit is None or not results or documents == sum(totals):
            return ""
        if len(totals) < len(results):  # a run from before it was stored
            return f"n = {documents:,}, limited"
        return f"n = {documents:,} of {sum(totals):,}"

    @property
    def verified(self) -> bool:
        """Whether the run's files are known by digests; older ones are only as good as found."""
        return self.format >= 2


@dataclass(frozen=True)
class Interval:
    """A confidence interval in the score's own unit."""

    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True)
class TaskResult:
    """One benchmark's outcome.

    Attributes:
        fingerprint: digest of data, split, prompts, generation settings, scorer version and n;
            only results with equal fingerprints are comparable.
        score: the headline number on the paper's 0-100 scale.
        metrics: every number upstream reported, in upstream's own scale.
        interval: cluster bootstrap over units of `score`.
        documents, units: number of rows and of resampling units.
        total: documents that the benchmark has without a limit, where that is known.
        tokens: generated ones an answer, on average: of a thought (`thinking`) and of the rest
            (`answer`); empty where they were not counted.
        rates: shares in [0, 1]: `unparsed`, `empty`, `truncated`, `error`; and `ambiguous`, where
            answers can be read in two ways (by content they are wrong).
        seconds: wall time of this task; `computed` answers were generated, `resumed` read back.
    """

    task: str
    fingerprint: str
    metric: str
    score: float
    metrics: dict[str, float]
    documents: int
    units: int
    rates: dict[str, float]
    interval: Interval | None = None
    profile: str = "default"
    seconds: float = 0.0
    computed: int = 0
    resumed: int = 0
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    total: int | None = None
    tokens: dict[str, float] = field(default_factory=dict)


SAMPLE_COLUMNS: tuple[str, ...] = (
    "document_id", "unit_id", "category", "question", "target", "answer", "parsed", "score",
    "status", "image_digest", "answer_confidence",
)  # fmt: skip
"""One document's answer and what it was worth.

document_id: stable id of the row inside its benchmark.
unit_id: the resampling unit: pair of images' questions (MME), circular group (MMBench),
    image (GQA, VQAv2, POPE), document elsewhere.
category: subset inside the benchmark; empty when it has none.
parsed: the answer as the scorer understood it; empty when it could not.
score: what upstream gave this row, in [0, 1].
status: of `Status`.
image_digest: digest of the decoded pixels of the first image.
answer_confidence: probability of the first answer token, NaN when not stored.
"""

CONTENT_COLUMNS: dict[str, Any] = {
    "content": "",
    "score_by_content": float("nan"),
    "tokens": 0,
    "thinking_tokens": 0,
}
"""Further columns of a sample, with what they hold in runs that were stored without them.

What the answer says whatever its form (`evals.scoring`), what that is worth in [0, 1], and the
generated tokens, those of a thought among them.
"""

AMBIGUOUS = "(ambiguous)"
"""The content of an answer that can be read in two ways: by content it is wrong."""

T = TypeVar("T")


def to_json(record: Any) -> dict[str, Any]:
    """A record as a JSON-ready mapping."""
    return asdict(record)


def from_json(kind: type[T], mapping: Any, where: str) -> T:
    """Validate a mapping read from the file `where` into a record.

    Raises:
        IncompleteRunError: a field is missing or has the wrong type.
    """
    from pydantic import ValidationError

    try:
        validated: T = _validator(kind).validate_python(mapping)  # type: ignore[arg-type]
        return validated
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(part) for part in first["loc"]) or "the file"
        raise IncompleteRunError(
            f"{where} is damaged: {field_name}: {first['msg']}.",
            "Delete that file (or its run folder) and run the same eval command again.",
        ) from None


@cache  # building one costs milliseconds, and a store holds hundreds of records of few kinds
def _validator(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
