"""`compare`: two or more runs beside each other, benchmark by benchmark and on average.

align.py      the same documents in the same order, or a refusal; their paired differences
estimates.py  the one estimator: every score, difference and ratio with its interval
methods.py    methods over their training seeds; what one seed does not tell
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kd_bench.aggregators import get_aggregator
from kd_bench.compare.align import (
    AlignedTask,
    Difference,
    Resampled,
    align,
    common_tasks,
    evidence_of,
    label,
    numeric_notes,
    paired_difference,
    resample,
    resample_columns,
    with_holm,
)
from kd_bench.compare.estimates import GAPS, PART_NAMES, Evidence, Measure, in_columns
from kd_bench.compare.methods import training_noise
from kd_bench.errors import NotComparableError, UsageError, closest
from kd_bench.records import AVERAGE, SAMPLE_COLUMNS, Interval
from kd_bench.stats import RESAMPLES
from kd_bench.store import Run, cautions

if TYPE_CHECKING:
    import pandas as pd

# Categories are many and small: enough draws for a 95 % interval.
CATEGORY_RESAMPLES = 2_000
# A soft score of half or more counts as right (VQAv2: two of ten people gave that answer).
RIGHT = 0.5


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
class Agreement:
    """A student beside its teacher on one benchmark; shares in [0, 1], None where undefined.

    Attributes:
        same_answer: documents with the same parsed answer.
        both_wrong: documents that both got wrong.
        same_wrong: of those, the share with the same wrong answer.
        same_wrong_beyond_chance: 0 when wrong answers meet as often as unrelated ones of the
            same two models would, 1 when always; see `_chance`.
        right_where_teacher_wrong: of the teacher's wrong documents, those the student got right.
    """

    same_answer: float
    both_wrong: int
    same_wrong: float | None
    same_wrong_beyond_chance: float | None
    right_where_teacher_wrong: float | None


@dataclass(frozen=True)
class Flip:
    """One document whose score changed; `change` is `fixed` or `broken`.

    `picture` is the path of the stored image, empty where none was kept.
    """

    document_id: str
    category: str
    change: str
    question: str
    target: str
    reference_answer: str
    other_answer: str
    reference_score: float
    other_score: float
    image_digest: str
    picture: str = ""


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
    """What the roles and the further columns of the runs make of the scores.

    Attributes:
        kind: retention, gap closed, vision gap, language gap, where the roles are there;
            form gap (content minus score) and sight (score minus blank score) of a run that
            knows them; content and form difference, guessing and sight difference, the parts of
            a run's difference from the first, which add up to it.
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

    `average` and `average_differences` are over the benchmarks that all runs have; `warnings`
    say where one training seed stands for a method.
    """

    runs: list[RunFacts]
    tasks: list[TaskComparison]
    average: list[Measure]
    average_differences: list[Difference]
    relations: list[Relation]
    notes: list[str]
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """JSON text with a format version; a number that does not exist is null."""
        return json.dumps({"format": 1, **_finite(asdict(self))}, indent=2, ensure_ascii=False)

    def measures(self, kind: str, run_id: str) -> dict[str, Measure]:
        """A run's relations of one kind by benchmark, and `average`; empty where there are none."""
        return {
            each.task: each.measure
            for each in self.relations
            if (each.kind, each.run_id) == (kind, run_id)
        }

    def to_frame(self) -> "pd.DataFrame":
        """One row a run and benchmark, `average` last; what is not known is NaN.

        Columns: task, run, model, method, seed, documents; score with low and high; and, for every
        run but the first, difference (minus the first) with difference_low, difference_high, p,
        p_holm and detectable. Points, but for p. Then form_gap and sight, and the parts of the
        difference (`estimates.PARTS`), each with low and high, where any run has them.
        """
        import pandas as pd

        documents = sum(task.documents for task in self.tasks)
        blocks = [(t.task, t.documents, t.scores, t.differences) for t in self.tasks]
        blocks.append((AVERAGE, documents, self.average, self.average_differences))
        nothing = float("nan")
        rows = []
        for task, count, scores, differences in blocks:
            for place, (run, score) in enumerate(zip(self.runs, scores, strict=True)):
                found = differences[place - 1] if place else None
                row: dict[str, Any] = {
                    "task": task,
                    "run": run.run_id,
                    "model": run.name,
                    "method": run.method,
                    "seed": run.seed,
                    "documents": count,
                    "score": score.value,
                    "low": score.interval.low if score.interval else nothing,
                    "high": score.interval.high if score.interval else nothing,
                    "difference": found.value if found else nothing,
                }
                span = found.interval if found else None
                row["difference_low"] = span.low if span else nothing
                row["difference_high"] = span.high if span else nothing
                for name in ("p", "p_holm", "detectable"):
                    row[name] = getattr(found, name, nothing)
                rows.append(row)
        frame = pd.DataFrame(rows).astype({"seed": "Int64", "detectable": "float64"})
        for kind in (*GAPS, *PART_NAMES):
            known = {run.run_id: self.measures(kind, run.run_id) for run in self.runs}
            cells = zip(frame["run"], frame["task"], strict=True)
            measures = [known[run].get(task) for run, task in cells]
            if any(known.values()):
                frame = frame.assign(**in_columns(kind, measures))
        return frame


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
    found, told = resample_columns(
        runs, chosen, allow_different=allow_different, resamples=resamples, seed=seed
    )
    notes += told
    unscored = [one.aligned.task for one in found if np.isnan(one.scores).any()]
    notes += [f"{task}: too few documents to score; left out." for task in unscored]
    sampled = [one for one in found if one.aligned.task not in unscored]
    if not sampled:
        raise NotComparableError(
            "No benchmark has enough documents to score.",
            "Evaluate with a larger `eval --limit`.",
        )
    columns = [_against_first(sampled, run, seed, level) for run in range(1, len(runs))]
    evidence = evidence_of(sampled)
    relations = [
        relation
        for key in [AVERAGE, *(one.aligned.task for one in sampled)]
        for relate in (_relations, _gaps_and_parts)
        for relation in relate(evidence, key, facts, level)
    ]
    warnings = [line for run in runs[1:] for line in training_noise([runs[0]], [run])]
    return Comparison(
        runs=facts,
        tasks=[
            TaskComparison(
                task=task.aligned.task,
                aggregator=task.aligned.aggregator,
                documents=len(task.aligned.samples[0]),
                units=len(task.aligned.units),
                scores=_measures(evidence, task.aligned.task, len(runs), level),
                differences=[differences[number] for differences, _ in columns],
                categories=_categories(task.aligned, seed, level) if categories else [],
                agreement=_agreements(task.aligned, facts),
                comparable=task.aligned.comparable,
            )
            for number, task in enumerate(sampled)
        ],
        average=_measures(evidence, AVERAGE, len(runs), level),
        average_differences=[average for _, average in columns],
        relations=relations,
        notes=notes,
        warnings=list(dict.fromkeys(warnings)),
    )


# --- parts -----------------------------------------------------------------------------------


def _against_first(
    sampled: list[Resampled], run: int, seed: int, level: float
) -> tuple[list[Difference], Difference]:
    """One run minus the first: by benchmark with Holm over them, and on average."""
    nulls = {one.aligned.task: one.null_draws(0, run, seed) for one in sampled}
    *tasks, average = (
        paired_difference(sampled, key, ["0"], [str(run)], nulls, level)
        for key in [*nulls, AVERAGE]
    )
    return with_holm(tasks), average


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
        done = run.done_tasks()
        extra = [task for task in done if task not in common]
        if extra:
            notes.append(f"Only some runs have {', '.join(extra)}: left out.")
    return list(dict.fromkeys(notes))


def _measures(evidence: Evidence, key: str, runs: int, level: float) -> list[Measure]:
    found = [evidence.score(key, [str(run)], level) for run in range(runs)]
    return [Measure(each.value, each.interval) for each in found]


def _categories(aligned: AlignedTask, seed: int, level: float) -> list[CategoryComparison]:
    """Every named subset, scored by the benchmark's rule for one subset."""
    names = aligned.samples[0]["category"].astype(str)
    subsets = [name for name in sorted(set(names)) if name]
    if len(subsets) < 2:
        return []
    runs, task = len(aligned.samples), aligned.task
    rule = get_aggregator(aligned.aggregator).category
    compared = []
    for name in subsets:
        rows = (names == name).to_numpy()
        frames = [frame.loc[rows].reset_index(drop=True) for frame in aligned.samples]
        one = resample(AlignedTask.of(task, rule, frames), CATEGORY_RESAMPLES, seed)
        if np.isnan(one.scores).any():
            continue
        compared.append(
            CategoryComparison(
                category=name,
                documents=len(one.aligned.samples[0]),
                scores=_measures(evidence_of([one]), task, runs, level),
                differences=[
                    paired_difference(
                        [one], task, ["0"], [str(run)], {task: one.null_draws(0, run, seed)}, level
                    )
                    for run in range(1, runs)
                ],
            )
        )
    columns = zip(*(each.differences for each in compared), strict=True)
    corrected = zip(*(with_holm(list(column)) for column in columns), strict=True)
    return [
        replace(each, differences=list(row)) for each, row in zip(compared, corrected, strict=True)
    ]


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
    evidence: Evidence, task: str, facts: list[RunFacts], level: float
) -> list[Relation]:
    """Retention, gap closed, vision and language gap wherever the roles are there."""
    teacher, floor = _first(facts, "teacher"), _first(facts, "sft")
    found: list[Relation] = []
    for run, fact in enumerate(facts):
        if teacher is None or fact.role in ("teacher", "switch"):
            continue
        own, top = [str(run)], [str(teacher)]
        shares = {"retention": evidence.retention(task, own, top, level)}
        if floor is not None and fact.role != "sft":
            shares["gap closed"] = evidence.gap_closed(task, own, [str(floor)], top, level)
        for kind, share in shares.items():  # the estimator has percent, a comparison shares
            bounds = share and share.interval
            measure = Measure(
                share.value / 100 if share else math.nan,
                Interval(bounds.low / 100, bounds.high / 100, level) if bounds else None,
            )
            found.append(Relation(kind, fact.run_id, task, measure, "ratio"))
        hybrid = _hybrid_of(fact, facts)
        if hybrid is not None:
            middle = [str(hybrid)]
            for kind, lower, upper in (
                ("vision gap", middle, top),
                ("language gap", own, middle),
            ):
                gap = evidence.difference(task, lower, upper, level)
                measure = Measure(gap.value, gap.interval)
                found.append(Relation(kind, fact.run_id, task, measure, "points"))
    return found


def _gaps_and_parts(
    evidence: Evidence, task: str, facts: list[RunFacts], level: float
) -> list[Relation]:
    """Form gap and sight of every run, and the parts of its difference from the first."""
    found = []
    for place, fact in enumerate(facts):
        own = [str(place)]
        known = evidence.gaps(task, own, level)
        known |= evidence.parts(task, ["0"], own, level) if place else {}
        found += [
            Relation(kind, fact.run_id, task, Measure(each.value, each.interval), "points")
            for kind, each in known.items()
        ]
    return found


def _hybrid_of(student: RunFacts, facts: list[RunFacts]) -> int | None:
    """The visual switch made from this student: the same method and seed, or the only pair."""
    hybrids = [number for number, fact in enumerate(facts) if fact.role == "switch"]
    students = [fact for fact in facts if fact.role not in ("teacher", "switch", "sft")]
    for number in hybrids:
        if (facts[number].method, facts[number].seed) == (student.method, student.seed):
            return number
    return hybrids[0] if len(hybrids) == 1 and students == [student] else None


def _finite(value: Any) -> Any:
    """NaN and infinity have no JSON."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- agreement and flips --------------------------------------------------------------------------


def _text(frame: "pd.DataFrame", column: str) -> NDArray[np.object_]:
    return frame[column].astype(str).str.strip().str.lower().to_numpy(dtype=object)


def agreement(aligned: AlignedTask, teacher: int, student: int) -> Agreement:
    """Agreement of two of the aligned runs on the answers as the scorer understood them.

    An answer that could not be parsed equals no other.
    """
    one, other = aligned.samples[teacher], aligned.samples[student]
    target, a, b = _text(one, "target"), _text(one, "parsed"), _text(other, "parsed")
    same = (a == b) & (a != "")
    teacher_wrong = one["score"].to_numpy() < RIGHT
    student_wrong = other["score"].to_numpy() < RIGHT
    both = teacher_wrong & student_wrong
    same_wrong = float(same[both].mean()) if both.any() else None
    chance = _chance(target[both], a[both], b[both])
    beyond = None
    if same_wrong is not None and chance is not None and chance < 1 - 1e-9:
        beyond = (same_wrong - chance) / (1 - chance)
    return Agreement(
        same_answer=float(same.mean()),
        both_wrong=int(both.sum()),
        same_wrong=same_wrong,
        same_wrong_beyond_chance=beyond,
        right_where_teacher_wrong=(
            float((~student_wrong)[teacher_wrong].mean()) if teacher_wrong.any() else None
        ),
    )


def _chance(
    target: NDArray[np.object_], a: NDArray[np.object_], b: NDArray[np.object_]
) -> float | None:
    """How often a wrong answer of one model meets one that the other gave to another document.

    Over pairs of different documents i, j such that b_j would be wrong for i too: the share
    with a_i == b_j. It knows both models' habits (always C) and the number of options: with
    yes and no it is 1, so nothing can lie beyond it. None when there is no such pair.
    """
    words, codes = np.unique(np.concatenate([target, a, b]).astype(str), return_inverse=True)
    t, a_codes, b_codes = codes.reshape(3, -1) if len(target) else np.zeros((3, 0), dtype=int)
    given = np.bincount(b_codes, minlength=len(words))
    count = len(target)
    wrong_elsewhere = b_codes != t  # b_i is wrong for i itself unless the score was soft
    pairs = float((count - given[t]).sum() - wrong_elsewhere.sum())
    if pairs <= 0:
        return None
    unread = words[a_codes] == ""
    possible = (a_codes != t) & ~unread
    meets = given[a_codes] * possible - ((a_codes == b_codes) & possible)
    return float(meets.sum()) / pairs


def list_flips(runs: Sequence[Run], task: str, *, allow_different: bool = False) -> list[Flip]:
    """Documents whose score changed between the first run and the second, broken ones first.

    Raises:
        UsageError: not every run has that benchmark; else as `compare`.
    """
    common = common_tasks(runs)
    if task not in common:
        raise UsageError(
            f"Not every run has {task!r}.{closest(task, common)}",
            f"In common: {', '.join(common)}.",
        )
    columns = [column for column in SAMPLE_COLUMNS if column != "answer_confidence"]
    aligned = align(runs, task, allow_different=allow_different, columns=columns)
    one, two = aligned.samples[:2]
    change = two["score"].to_numpy() - one["score"].to_numpy()
    rows = [int(row) for row in np.argsort(change, kind="stable") if abs(change[row]) > 1e-9]
    return [
        Flip(
            **{
                column: str(one[column].iloc[row])
                for column in ("document_id", "category", "question", "target", "image_digest")
            },
            change="fixed" if change[row] > 0 else "broken",
            reference_answer=str(one["answer"].iloc[row]),
            other_answer=str(two["answer"].iloc[row]),
            reference_score=float(one["score"].iloc[row]),
            other_score=float(two["score"].iloc[row]),
            picture=str(runs[0].image(str(one["image_digest"].iloc[row])) or ""),
        )
        for row in rows
    ]
