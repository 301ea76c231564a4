"""`compare`: two or more runs beside each other, benchmark by benchmark and on average."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_bench.aggregators import get_aggregator
from kd_bench.compare.agreement import Agreement, Flip, agreement, flips
from kd_bench.compare.align import AlignedTask, align, common_tasks, label, numeric_notes
from kd_bench.compare.differences import (
    Difference,
    Resampled,
    average_difference,
    resample,
    task_difference,
    with_holm,
)
from kd_bench.errors import NotComparableError, UsageError, closest
from kd_bench.records import AVERAGE, SAMPLE_COLUMNS, Interval
from kd_bench.stats import RESAMPLES, gap_closed, percentile_interval, ratio_interval
from kd_bench.store import Run, cautions

__all__ = [
    "CategoryComparison",
    "Comparison",
    "Measure",
    "Relation",
    "RunFacts",
    "TaskComparison",
    "compare",
    "list_flips",
]

Array = NDArray[np.float64]
# Categories are many and small: enough draws for a 95 % interval.
CATEGORY_RESAMPLES = 2_000


@dataclass(frozen=True)
class RunFacts:
    """Who stands in a column."""

    run_id: str
    name: str
    role: str
    method: str
    seed: int | None
    status: str


@dataclass(frozen=True)
class Measure:
    """A number with its interval; None where it is undefined (a ratio over nothing)."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class CategoryComparison:
    """One subset of a benchmark; `p_holm` corrects over the benchmark's subsets."""

    category: str
    documents: int
    scores: list[Measure]
    differences: list[Difference]


@dataclass(frozen=True)
class TaskComparison:
    """One benchmark.

    Attributes:
        scores: in the order of the runs.
        differences: every run after the first minus the first.
        agreement: every run with the teacher, None for the teacher itself; empty without one.
        comparable: False when different protocols were allowed.
    """

    task: str
    aggregator: str
    documents: int
    units: int
    scores: list[Measure]
    differences: list[Difference]
    categories: list[CategoryComparison]
    agreement: list[Agreement | None]
    comparable: bool


@dataclass(frozen=True)
class Relation:
    """What the roles make of the scores: retention, gap closed, vision gap, language gap.

    Attributes:
        run_id: the student (for the vision gap: the hybrid's student).
        task: a benchmark id, or `average`.
        unit: `ratio` or `points`.
    """

    kind: str
    run_id: str
    task: str
    measure: Measure
    unit: str


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other; differences are against the first one.

    `average` and `average_differences` are over the benchmarks that all runs have.
    """

    runs: list[RunFacts]
    tasks: list[TaskComparison]
    average: list[Measure]
    average_differences: list[Difference]
    relations: list[Relation]
    notes: list[str]

    def to_json(self) -> str:
        """JSON text with a format version; a number that does not exist is null."""
        return json.dumps({"format": 1, **_finite(asdict(self))}, indent=2, ensure_ascii=False)


def compare(
    runs: Sequence[Run],
    *,
    allow_different: bool = False,
    tasks: Sequence[str] | None = None,
    categories: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Compare runs sample by sample; the first one is the reference.

    Raises:
        NotComparableError: other protocol or documents, unless `allow_different`.
        IncompleteRunError: a run is empty or damaged.
        UsageError: fewer than two runs, or an unknown benchmark in `tasks`.
    """
    chosen = common_tasks(runs, tasks)
    facts = [_facts(run) for run in runs]
    notes = _notes(runs, chosen if tasks is None else None)
    sampled: list[Resampled] = []
    for task in chosen:
        one = resample(align(runs, task, allow_different=allow_different), resamples, seed)
        notes.extend(one.aligned.notes)
        if np.isnan(one.scores).any():
            notes.append(f"{task}: too few documents to score; left out.")
        else:
            sampled.append(one)
    if not sampled:
        raise NotComparableError("No benchmark has enough documents to score.", "Raise --limit.")
    columns = [_against_first(sampled, run, seed, level) for run in range(1, len(runs))]
    mean = np.mean([task.scores for task in sampled], axis=0)
    mean_draws = np.mean([task.draws for task in sampled], axis=0)
    relations = _relations(AVERAGE, mean, mean_draws, facts, level)
    for one in sampled:
        relations += _relations(one.aligned.task, one.scores, one.draws, facts, level)
    return Comparison(
        runs=facts,
        tasks=[
            TaskComparison(
                task=task.aligned.task,
                aggregator=task.aligned.aggregator,
                documents=len(task.aligned.samples[0]),
                units=len(task.aligned.units),
                scores=_measures(task.scores, task.draws, level),
                differences=[differences[number] for differences, _ in columns],
                categories=_categories(task.aligned, seed, level) if categories else [],
                agreement=_agreements(task.aligned, facts),
                comparable=task.aligned.comparable,
            )
            for number, task in enumerate(sampled)
        ],
        average=_measures(mean, mean_draws, level),
        average_differences=[average for _, average in columns],
        relations=relations,
        notes=notes,
    )


def list_flips(runs: Sequence[Run], task: str, *, allow_different: bool = False) -> list[Flip]:
    """Documents whose score changed between the first run and the second, broken ones first."""
    common = common_tasks(runs)
    if task not in common:
        raise UsageError(
            f"Not every run has {task!r}.{closest(task, common)}",
            f"In common: {', '.join(common)}.",
        )
    columns = [column for column in SAMPLE_COLUMNS if column != "answer_confidence"]
    found = flips(align(runs, task, allow_different=allow_different, columns=columns), 0, 1)
    return [replace(flip, picture=str(runs[0].picture(flip.image_digest) or "")) for flip in found]


# --- parts -----------------------------------------------------------------------------------


def _against_first(
    sampled: list[Resampled], run: int, seed: int, level: float
) -> tuple[list[Difference], Difference]:
    """One run minus the first: by benchmark with Holm over them, and on average."""
    nulls = [task.null_draws(0, run, seed) for task in sampled]
    differences = [
        task_difference(task, 0, run, null, level)
        for task, null in zip(sampled, nulls, strict=True)
    ]
    return with_holm(differences), average_difference(sampled, nulls, 0, run, level)


def _facts(run: Run) -> RunFacts:
    manifest = run.manifest
    model = manifest.model
    return RunFacts(
        run.path.name, model.name, model.role, model.method, model.seed, manifest.status
    )


def _notes(runs: Sequence[Run], common: list[str] | None) -> list[str]:
    """What a reader must know: unfinished runs, benchmarks that not every run has."""
    notes = [
        f"{label(run)} is {run.manifest.status}."
        for run in runs
        if run.manifest.status != "complete"
    ]
    notes += numeric_notes(runs)
    notes += [line for run in runs for line in cautions(run)]
    if common is None:
        return notes
    for run in runs:
        done = [task for task in run.manifest.tasks if run.done(task)]
        extra = [task for task in done if task not in common]
        if extra:
            notes.append(f"Only some runs have {', '.join(extra)}: left out.")
    return list(dict.fromkeys(notes))


def _measures(scores: Array, draws: Array, level: float) -> list[Measure]:
    return [
        Measure(float(score), percentile_interval(drawn, level))
        for score, drawn in zip(scores, draws, strict=True)
    ]


def _categories(aligned: AlignedTask, seed: int, level: float) -> list[CategoryComparison]:
    """Every named subset, scored by the benchmark's rule for one subset."""
    names = aligned.samples[0]["category"].astype(str)
    subsets = [name for name in sorted(set(names)) if name]
    if len(subsets) < 2:
        return []
    compared = []
    for name in subsets:
        subset = _subset(aligned, (names == name).to_numpy())
        one = resample(subset, CATEGORY_RESAMPLES, seed)
        if np.isnan(one.scores).any():
            continue
        others = range(1, len(one.scores))
        compared.append(
            CategoryComparison(
                category=name,
                documents=len(subset.samples[0]),
                scores=_measures(one.scores, one.draws, level),
                differences=[
                    task_difference(one, 0, other, one.null_draws(0, other, seed), level)
                    for other in others
                ],
            )
        )
    runs = len(aligned.samples) - 1
    corrected = [with_holm([each.differences[run] for each in compared]) for run in range(runs)]
    return [
        replace(each, differences=[differences[number] for differences in corrected])
        for number, each in enumerate(compared)
    ]


def _subset(aligned: AlignedTask, rows: NDArray[np.bool_]) -> AlignedTask:
    from kd_bench.aggregators import unit_statistics

    name = get_aggregator(aligned.aggregator).category
    frames = tuple(frame.loc[rows].reset_index(drop=True) for frame in aligned.samples)
    statistics = [unit_statistics(name, frame) for frame in frames]
    return replace(
        aligned,
        aggregator=name,
        samples=frames,
        units=statistics[0].units,
        statistics=np.stack([each.values for each in statistics]),
    )


def _agreements(aligned: AlignedTask, facts: list[RunFacts]) -> list[Agreement | None]:
    teacher = _first(facts, "teacher")
    if teacher is None:
        return []
    return [
        None if run == teacher else agreement(aligned, teacher, run) for run in range(len(facts))
    ]


def _first(facts: list[RunFacts], role: str) -> int | None:
    return next((number for number, run in enumerate(facts) if run.role == role), None)


def _relations(
    task: str, scores: Array, draws: Array, facts: list[RunFacts], level: float
) -> list[Relation]:
    """Retention, gap closed, vision and language gap wherever the roles are there."""
    teacher, floor = _first(facts, "teacher"), _first(facts, "sft")
    found: list[Relation] = []
    if teacher is None:
        return found

    def add(kind: str, run: int, value: float, interval: Interval | None, unit: str) -> None:
        found.append(Relation(kind, facts[run].run_id, task, Measure(value, interval), unit))

    for run, fact in enumerate(facts):
        if fact.role in ("teacher", "switch"):
            continue
        add(
            "retention",
            run,
            _ratio(scores[run], scores[teacher]),
            ratio_interval(draws[run], draws[teacher], level),
            "ratio",
        )
        if floor is not None and fact.role != "sft":
            closed = _ratio(scores[run] - scores[floor], scores[teacher] - scores[floor])
            interval = gap_closed(draws[run], draws[floor], draws[teacher], level)
            add("gap closed", run, closed, interval, "ratio")
        hybrid = _hybrid_of(fact, facts)
        if hybrid is not None:
            for kind, upper, lower in (
                ("vision gap", teacher, hybrid),
                ("language gap", hybrid, run),
            ):
                interval = percentile_interval(draws[upper] - draws[lower], level)
                add(kind, run, float(scores[upper] - scores[lower]), interval, "points")
    return found  # fmt: skip


def _hybrid_of(student: RunFacts, facts: list[RunFacts]) -> int | None:
    """The visual switch made from this student: the same method and seed, or the only pair."""
    hybrids = [number for number, fact in enumerate(facts) if fact.role == "switch"]
    students = [fact for fact in facts if fact.role not in ("teacher", "switch", "sft")]
    for number in hybrids:
        if (facts[number].method, facts[number].seed) == (student.method, student.seed):
            return number
    return hybrids[0] if len(hybrids) == 1 and students == [student] else None


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else math.nan


def _finite(value: Any) -> Any:
    """NaN and infinity have no JSON."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
