"""Upstream's tasks on our documents: their prompts and their scoring, only the source is ours.

Where lmms-eval's own behaviour would mislead, the exception is made here and nowhere else:
submission writers are dropped, MMBench is scored without a judge model in both languages, MMMU
keeps each image at its own placeholder, GQA looks its images up instead of downloading them.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL.Image import Image

from kd_bench.aggregators import AGGREGATORS
from kd_bench.errors import (
    IncompleteRunError,
    KdBenchError,
    MissingExtraError,
    UsageError,
    closest,
    one_line,
)
from kd_bench.evals.documents import Document, Documents, data_files, load_documents
from kd_bench.files import digest_files, digest_text
from kd_bench.records import Status
from kd_bench.registry import Profile, TaskSpec

PLACEHOLDER = "<image>"
"""Where an image stands inside a question; a question without it has its images in front."""


@dataclass(frozen=True, order=True)
class Settings:
    """Greedy generation: at most `max_new_tokens`, stopped before the first of `until`."""

    max_new_tokens: int
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        index: the asker's number for it; comes back with the answer.
        text: the question as the benchmark words it, without chat template.
        images: decodes its images, in the order of their placeholders.
        image_key: equal for questions about the same images; empty means "do not share".
    """

    index: int
    text: str
    images: Callable[[], Sequence[Image]]
    settings: Settings
    image_key: str = ""


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        tokens: generated tokens, the end mark included.
        confidence: probability of the first token, None where there was none.
        image_digest: of the decoded pixels of the first image; empty without one.
        error: what went wrong, when the status is `error`.
    """

    index: int
    text: str
    status: Status
    tokens: int = 0
    confidence: float | None = None
    image_digest: str = ""
    error: str = ""


def lmms_eval() -> Any:
    """The module `lmms_eval.evaluator`; importing it costs seconds and about a gigabyte."""
    already = "lmms_eval.evaluator" in sys.modules
    try:
        import lmms_eval.evaluator as evaluator
    except ImportError as error:
        raise MissingExtraError("eval", "eval", error.name or "lmms-eval") from error
    if not already:
        from loguru import logger

        logger.disable("lmms_eval")
        _remember_normalised_answers()
    from lmms_eval import utils

    if not hasattr(utils.get_git_commit_hash, "cache_info"):  # git was run four times a task
        for name in ("get_git_commit_hash", "get_git_branch_name"):
            remembered = functools.cache(getattr(utils, name))
            for module in (utils, evaluator):
                setattr(module, name, remembered)
    return evaluator


def _remember_normalised_answers() -> None:
    """Let upstream normalise each wording of an answer once.

    VQA scores normalise ten annotators' answers a question, most of them alike, and took most of
    the time outside the model. Both functions look at their text alone.
    """
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor as Normaliser

    def remembering(normalise: Callable[[Any, str], str]) -> Callable[[Any, str], str]:
        of_text = functools.partial(normalise, Normaliser())
        remembered = functools.lru_cache(maxsize=2**16)(of_text)
        return functools.wraps(normalise)(lambda _, text: remembered(text))

    Normaliser.process_punctuation = remembering(Normaliser.process_punctuation)
    Normaliser.process_digit_article = remembering(Normaliser.process_digit_article)


@contextlib.contextmanager
def quiet(debug: bool = False) -> Iterator[None]:
    """Keep upstream's prints and progress bars off the terminal, unless debugging."""
    if debug:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def task_config(name: str) -> dict[str, Any]:
    """Upstream's own configuration of a task, with its prompt and scoring functions.

    Raises:
        UsageError: lmms-eval has no such task.
    """
    evaluator = lmms_eval()
    from lmms_eval.utils import load_yaml_config

    folder = Path(evaluator.__file__).parent / "tasks"
    found = sorted(folder.glob(f"*/{name}.yaml")) or sorted(folder.rglob(f"{name}.yaml"))
    if not found:
        raise UsageError(
            f"lmms-eval {version('lmms-eval')} has no task {name!r}.",
            "`lmms-eval --tasks list` shows those it has.",
        )
    with quiet():
        config = load_yaml_config(str(found[0]), mode="full")
    return dict(config)


REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
"""What the stock `lmms-eval` command leaves out of an answer by default (`--reasoning_tags`)."""


def simple_evaluate(
    model: Any, task: Any, folder: Path, reasoning_tags: str = "none"
) -> dict[str, Any] | None:
    """Upstream's evaluation of one task; what its aggregations write goes to `folder`.

    None on every process but the first.
    """
    evaluator = lmms_eval()
    from lmms_eval.tasks import TaskManager

    arguments = argparse.Namespace(
        output_path=str(folder), process_with_media=False, reasoning_tags=reasoning_tags
    )
    result: dict[str, Any] | None = evaluator.simple_evaluate(
        model,
        tasks=[task],
        task_manager=TaskManager("ERROR", include_defaults=False),
        bootstrap_iters=0,
        log_samples=False,
        process_docs_parallel=1,
        cli_args=arguments,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        fewshot_random_seed=None,
        verbosity="ERROR",
    )
    task._instances = None  # a kilobyte a document that nobody asks for any more
    return result


def upstream_metrics(aggregates: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of one task by their own names, out of lmms-eval's `results`."""
    return {
        key.partition(",")[0]: float(value)
        for key, value in aggregates.items()
        if "," in key
        and "_stderr" not in key
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }


SCORING_VERSION = "1"
"""Counts up when our own part of prompts, parsing or scoring changes."""


@dataclass(frozen=True)
class PreparedTask:
    """One benchmark, ready to be asked and scored.

    Attributes:
        task: upstream's task object on our documents.
        prompts: the question of each document as upstream words it.
        content_digests: of each document with its images.
        image_digests: of each document's stored image files; empty where it has none.
        total: documents of the benchmark without the limit.
        fingerprint: the protocol; only results with equal fingerprints are comparable.
    """

    spec: TaskSpec
    profile: str
    documents: Documents
    task: Any
    prompts: list[str]
    content_digests: list[str]
    image_digests: list[str]
    fingerprint: str
    total: int

    @property
    def variant(self) -> Profile:
        """The profile itself."""
        return self.spec.profile(self.profile)

    @property
    def aggregator(self) -> str:
        """Name of the aggregator that turns the samples into the score."""
        return self.variant.aggregator or self.spec.aggregator


def prepare(
    spec: TaskSpec,
    folder: Path,
    *,
    profile: str | None = None,
    limit: int | None = None,
    chat: bool = False,
    images: str = "",
    together: bool = False,
) -> PreparedTask:
    """Read a benchmark's documents and render its prompts.

    Args:
        limit: about that many documents from the front; pairs and rotations stay whole.
        chat: for one of lmms-eval's chat models, which is given messages.
        images: what stands in for the documents' own, of `documents.IMAGES`.
        together: every process prepares the same; they share out the reading of the images.

    Raises:
        UsageError: data, columns or the upstream task are missing.
        IncompleteRunError: upstream cannot render a document.
    """
    name = spec.default_profile if profile in (None, "default") else str(profile)
    variant = spec.profile(name)
    documents = load_documents(spec, folder, name)
    if images:
        documents = documents.with_images(images, spec.id)
    total = len(documents)
    if limit is not None and limit < len(documents):
        documents = documents.select(_first_units(spec, documents, limit))
    if together:
        documents.hash_together()
    upstream = variant.upstream or spec.upstream
    config = _configure(spec, upstream, name)
    with quiet():
        task = _task_class(chat)(config, documents, spec)
    prompts = []
    for document in documents:
        with _naming(spec, document, "has no prompt"):
            prompts.append(str(task.doc_to_text(document)))
    contents = documents.content_digests()
    columns = [documents.image_digests(column) for column in documents.image_columns]
    shown = ["+".join(filter(None, row)) for row in zip(*columns, strict=True)]
    fingerprint = digest_text(
        spec.id,
        name,
        variant.split or spec.dataset.split,
        str(len(documents)),
        digest_text(*contents),
        digest_text(*prompts),
        json.dumps(spec.generation_of(name).model_dump(), sort_keys=True),
        f"{upstream} lmms-eval {version('lmms-eval')} scoring {SCORING_VERSION}",
    )
    return PreparedTask(spec, name, documents, task, prompts, contents, shown, fingerprint, total)


def data_digest(spec: TaskSpec, folder: Path, profile: str | None) -> str:
    """sha256 of what a benchmark asks: its files, its registry entry, profile and upstream.

    Files that this process has read before are not read again while their inode is unchanged.

    Raises:
        UsageError: the folder lacks the benchmark.
    """
    files = data_files(spec, folder, profile)
    states = (file.stat() for file in files)
    digest = _digest_of(
        tuple(files),
        tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states),
    )
    asked = f"{profile or spec.default_profile} scoring {SCORING_VERSION}"
    return digest_text(digest, spec.model_dump_json(), asked, f"lmms-eval {version('lmms-eval')}")


@functools.cache
def _digest_of(files: tuple[Path, ...], states: tuple[tuple[int, ...], ...]) -> str:
    del states  # part of the cache's key only
    return digest_files(files)


def unit_ids(spec: TaskSpec, documents: Documents) -> list[str]:
    """The resampling unit of each document."""
    if spec.unit == "document":
        return [str(number) for number in range(len(documents))]
    if spec.unit == "picture" and not spec.unit_columns:
        return list(documents.as_stored.image_digests("image"))
    return [unit_of(spec, document) for document in documents]


def unit_of(spec: TaskSpec, row: Mapping[str, Any]) -> str:
    """The unit that a row's columns name."""
    values = [row[column] for column in spec.unit_columns]
    if spec.unit == "circular":
        # Rotations of one question differ by multiples of a million (MMBench_Evaluator).
        return str(int(values[0]) % 1_000_000)
    return "/".join(str(value) for value in values)


def _first_units(spec: TaskSpec, documents: Documents, limit: int) -> list[int]:
    if spec.unit not in ("pair", "circular"):
        return list(range(limit))
    units = unit_ids(spec, documents)
    kept: set[str] = set()
    rows = 0
    for unit, count in Counter(units).items():  # in the order of their first rows
        if rows < limit:
            kept.add(unit)
            rows += count
    return [index for index, unit in enumerate(units) if unit in kept]


def _configure(spec: TaskSpec, upstream: str, profile: str) -> dict[str, Any]:
    variant, settings = spec.profile(profile), spec.generation_of(profile)
    config = task_config(upstream)
    metrics = [entry for entry in config["metric_list"] if entry["metric"] != "submission"]
    config["metric_list"] = metrics
    config["process_docs"] = None
    generation = dict(config.get("generation_kwargs") or {})
    generation.update(max_new_tokens=settings.max_new_tokens, temperature=0, do_sample=False)
    generation["until"] = list(settings.until)
    config["generation_kwargs"] = generation
    wording = config.setdefault("lmms_eval_specific_kwargs", {})
    wording.setdefault("default", {}).update(variant.prompt)
    if spec.id == "mmbench_cn":
        # By rules in Chinese too: without a key upstream would draw random letters.
        from lmms_eval.tasks.mmbench.en_utils import mmbench_aggregate_dev_results_static

        by_rules = {"aggregation": mmbench_aggregate_dev_results_static, "higher_is_better": True}
        config["metric_list"] = [{"metric": "gpt_eval_score", **by_rules}]
    if spec.id == "mmmu":
        _own_placeholders(config)
    return config


def _own_placeholders(config: dict[str, Any]) -> None:
    """MMMU names its images in the text; upstream sorts the names and fills places in order."""
    render: Callable[..., str] = config["doc_to_text"]
    numbered = re.compile(r"<image ([1-7])>")

    def doc_to_text(doc: Document, settings: dict[str, Any] | None = None) -> str:
        return numbered.sub(PLACEHOLDER, render(doc, settings))

    def doc_to_visual(doc: Document) -> list[Any]:
        names = [f"image_{number}" for number in numbered.findall(render(doc))]
        return [doc[name].convert("RGB") for name in names]

    def doc_to_messages(
        doc: Document, lmms_eval_specific_kwargs: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One user turn with each image at its placeholder."""
        images = doc_to_visual(doc)
        content: list[dict[str, Any]] = []
        for number, text in enumerate(
            doc_to_text(doc, lmms_eval_specific_kwargs).split(PLACEHOLDER)
        ):
            if text.strip():
                content.append({"type": "text", "text": text.strip()})
            if number < len(images):
                content.append({"type": "image", "url": images[number]})
        return [{"role": "user", "content": content}]

    config.update(
        doc_to_text=doc_to_text, doc_to_visual=doc_to_visual, doc_to_messages=doc_to_messages
    )


def _task_class(chat: bool) -> type[Any]:
    """The task class, made late because its base is lmms-eval's."""
    lmms_eval()
    from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask

    base: type[Any] = ConfigurableMessagesTask if chat else ConfigurableTask

    class LocalTask(base):
        """Upstream's task on documents of ours, remembering what it scored.

        Attributes:
            recorded: upstream's metrics of each scored document, by document index.
            guessed: documents whose choice upstream drew at random.
        """

        def __init__(self, config: dict[str, Any], documents: Documents, spec: TaskSpec) -> None:
            self._documents = documents
            self._spec = spec
            self.recorded: dict[int, dict[str, Any]] = {}
            self.guessed: set[int] = set()
            super().__init__(config=config, model_name=None)

        def download(self, dataset_kwargs: Any = None) -> None:
            del dataset_kwargs
            split = self.config.test_split or self.config.validation_split
            assert split is not None
            self.dataset = {split: self._documents}
            self.dataset_no_image = self.dataset  # images are decoded only when asked for

        def build_all_requests(self, *, rank: int = 0, world_size: int = 1, **more: Any) -> None:
            """All requests in every process, as they lie in the files.

            Which process answers one is decided by its image: `models.own_share`.
            """
            del rank, world_size
            super().build_all_requests(**more)
            place = self._documents.image_place
            self._instances.sort(key=lambda request: place(request.doc_id))

        def process_results(self, doc: Document, results: list[str], full_docs: Any = None) -> Any:
            metrics, guessed = self._scored(doc, results, full_docs)
            self.recorded[doc.index] = metrics
            if guessed:
                self.guessed.add(doc.index)
            return metrics

        def score_of(self, doc: Document, answer: str, metric: str) -> float:
            """What upstream would give another wording of an answer; a guess is worth nothing."""
            metrics, guessed = self._scored(doc, [answer])
            value = metrics[metric]
            if isinstance(value, dict):  # MMMU's open questions
                value = mmmu_right(value, *value["parsed_pred"])
            return 0.0 if guessed else float(value)

        def _scored(
            self, doc: Document, results: list[str], full_docs: Any = None
        ) -> tuple[dict[str, Any], bool]:
            """Upstream's metrics of a document, and whether it drew the choice at random."""
            # The undecorated function: upstream's retries would hide an exception for seconds.
            score = ConfigurableTask.process_results.__wrapped__
            with _naming(self._spec, doc, "cannot be scored"), _seeded_guess(doc) as drawn:
                return score(self, doc, results, full_docs), bool(drawn)

    return LocalTask


def mmmu_right(logged: dict[str, Any], said: Any) -> float:
    """Whether a parsed answer is right, by upstream's functions."""
    from lmms_eval.tasks.mmmu.utils import eval_multi_choice, eval_open

    choice = logged["question_type"] == "multiple-choice"
    return float((eval_multi_choice if choice else eval_open)(logged["answer"], said))


@contextlib.contextmanager
def _seeded_guess(doc: Document) -> Iterator[list[str]]:
    """Upstream guesses an unparsable choice: make the guess depend on the document alone.

    Yields what was drawn.
    """
    from lmms_eval.tasks._task_utils import mmmu_mcq_utils

    drawn: list[str] = []

    def choose(options: list[str]) -> str:
        identity = str(doc.get("id", doc.index))
        seed = hashlib.sha256(identity.encode()).digest()
        drawn.append(random.Random(seed).choice(options))
        return drawn[-1]

    mmmu_mcq_utils.random = SimpleNamespace(choice=choose)
    try:
        yield drawn
    finally:
        mmmu_mcq_utils.random = random


@contextlib.contextmanager
def _naming(spec: TaskSpec, doc: Document, problem: str) -> Iterator[None]:
    """Name the document on which one of upstream's functions fails."""
    try:
        yield
    except Exception as error:
        raise IncompleteRunError(
            f"{spec.id}: document {doc.index} {problem}: {type(error).__name__}: {one_line(error)}",
            "Check that row of the data.",
        ) from error


def preview(
    spec: TaskSpec, data: Path, folder: Path, *, document: int = 0, profile: str | None = None
) -> tuple[PreparedTask, int, list[Path]]:
    """A benchmark, the number of one of its documents, and the images of it written to `folder`.

    Args:
        document: which one; beyond the last it is the last.

    Raises:
        UsageError: the data cannot be used.
    """
    prepared = prepare(spec, data, profile=profile)
    index = min(document, len(prepared.documents) - 1)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, image in enumerate(prepared.task.doc_to_visual(prepared.documents[index]), 1):
        written.append(folder / f"{spec.id}-{index}-{number}.png")
        image.save(written[-1])
    return prepared, index, written


def validate(spec: TaskSpec) -> list[str]:
    """Problems of a registry entry that its schema cannot see; none means that it fits."""
    from kd_bench.evals.scoring import RULES

    problems = []
    for name, profile in spec.profiles.items():
        where = f"{spec.id}, profile {name}"
        try:
            config = task_config(profile.upstream or spec.upstream)
        except KdBenchError as error:
            problems.append(f"{where}: {one_line(error)}")
            continue
        reported = [str(entry["metric"]) for entry in config.get("metric_list") or []]
        metric = profile.metric or spec.metric
        if profile.scored and metric not in reported:
            problems.append(
                f"{where}: upstream reports {', '.join(reported)}, not {metric}."
                f"{closest(metric, reported)}"
            )
        aggregator = profile.aggregator or spec.aggregator
        if aggregator not in AGGREGATORS:
            hint = closest(aggregator, list(AGGREGATORS))
            problems.append(f"{where}: no aggregator {aggregator!r}.{hint}")
        if profile.rescore is not None and profile.rescore not in RULES:
            problems.append(f"{where}: no rule {profile.rescore!r} for raw answers")
        if config.get("output_type") != "generate_until":
            problems.append(f"{where}: {config.get('output_type')} tasks are not supported")
        split = config.get("test_split") or config.get("validation_split")
        if not profile.split and split != spec.dataset.split:
            problems.append(f"{where}: upstream's split is {split}, not {spec.dataset.split}")
    return problems
