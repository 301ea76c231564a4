"""Ask one benchmark's questions of a model, through upstream's evaluation and our journal."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_bench.distill import processes
from kd_bench.evals.questions import Answer
from kd_bench.evals.tasks import PreparedTask
from kd_bench.files import Journal, digest_text
from kd_bench.store import Run

if TYPE_CHECKING:
    import pandas as pd


_FIELDS = tuple(field.name for field in fields(Answer) if field.name != "index")


@dataclass(frozen=True)
class Asked:
    """One benchmark, answered and scored.

    Attributes:
        samples: one row a document.
        metrics: upstream's numbers by their own names.
        computed, resumed: answers generated now, and read back.
    """

    samples: "pd.DataFrame"
    metrics: dict[str, float]
    computed: int
    resumed: int


class TaskJournal:
    """A benchmark's answers on disk; each process appends to a file of its own."""

    def __init__(self, run: Run, task: str) -> None:
        self._folder = run.path / "journal"
        self._task = task
        number = processes.rank()
        name = task if number == 0 else f"{task}.{number}"
        self._own = run.journal(name)

    def known(self) -> dict[str, Answer]:
        """Answers of all processes by key; failed ones are left out, to be tried again."""
        entries: list[dict[str, Any]] = []
        if processes.rank() == 0:
            files = [self._folder / f"{self._task}.jsonl"]
            files += sorted(self._folder.glob(f"{self._task}.[0-9]*.jsonl"))
            entries = [entry for file in files for entry in Journal(file).read()]
        entries = processes.broadcast(entries)
        return {
            str(entry["key"]): Answer(index=-1, **{name: entry[name] for name in _FIELDS})
            for entry in entries
            if entry.get("status") != "error" and all(name in entry for name in _FIELDS)
        }

    def append(self, pairs: Iterable[tuple[str, Answer]]) -> None:
        """Keep a batch of answers."""
        self._own.append({"key": key, **_fields(answer)} for key, answer in pairs)


def _fields(answer: Answer) -> dict[str, Any]:
    values = asdict(answer)
    return {name: values[name] for name in _FIELDS}


def answer_keys(prepared: PreparedTask, *model_digests: str) -> list[str]:
    """Journal key of each document: model, document with pictures, prompt, settings."""
    settings = str(sorted(prepared.settings.model_dump().items()))
    return [
        digest_text(*model_digests, content, prompt, settings)[:40]
        for content, prompt in zip(prepared.contents, prepared.prompts, strict=True)
    ]


def ask(
    prepared: PreparedTask,
    source: Any,
    keys: list[str],
    *,
    known: dict[str, Answer] | None = None,
    record: Callable[[list[tuple[str, Answer]]], None] = lambda pairs: None,
    reasoning_tags: str = "none",
    debug: bool = False,
) -> Asked | None:
    """Answer and score all documents of a benchmark; None on every process but the first.

    Args:
        source: what answers: `KdBench`, `StockModel`, or anything with their `answers`.
        keys: of `answer_keys`.
        known: answers that need not be computed.
        record: is given each batch of (key, answer) as it is produced.
        reasoning_tags: as in `records.Protocol`.

    Raises:
        IncompleteRunError: a document cannot be scored, or samples and upstream disagree.
    """
    from kd_bench.evals.adapter import Journalled
    from kd_bench.evals.content import Thinking
    from kd_bench.evals.scoring import agree, own_metrics, rescored, samples_frame
    from kd_bench.evals.upstream import quiet, simple_evaluate

    thinking = Thinking(reasoning_tags)
    known = dict(known or {})
    before = len(known.keys() & set(keys))
    prepared.task.recorded.clear()
    prepared.task.guessed.clear()
    places = list(zip(keys, prepared.pictures, strict=True))
    model = Journalled(source, places.__getitem__, known, record)
    with tempfile.TemporaryDirectory() as scratch, quiet(debug):
        outcome = simple_evaluate(model, prepared.task, Path(scratch), reasoning_tags)
    shares = processes.gather((model.answered, model.computed))
    if outcome is None:
        return None
    answers = {index: answer for share, _ in shares for index, answer in share.items()}
    metrics = _metrics(outcome, prepared.task.task_name)
    samples = samples_frame(prepared, answers, thinking, getattr(source, "count_tokens", None))
    agree(prepared, samples, metrics)
    metrics |= own_metrics(prepared, samples, thinking)
    return Asked(
        rescored(prepared, samples, thinking),
        metrics,
        sum(computed for _, computed in shares),
        before,
    )


def _metrics(outcome: dict[str, Any], task: str) -> dict[str, float]:
    found = {}
    for key, value in outcome["results"][task].items():
        name, _, filtered = key.partition(",")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if filtered and number and "_stderr" not in name:
            found[name] = float(value)
    return found
