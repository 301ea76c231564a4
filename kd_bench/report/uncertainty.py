"""Intervals, ranks and relations of a board, all from one paired bootstrap.

Every run of a benchmark meets the same resampled units, so whatever is derived from the draws
(differences, averages, retention, gap closed) is paired as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_bench.aggregators import get_aggregator, unit_statistics
from kd_bench.compare.estimates import Evidence, TaskEvidence
from kd_bench.errors import KdBenchError
from kd_bench.records import AVERAGE, Interval
from kd_bench.report.board import MISSING, Board, Entry, Score, TaskInfo
from kd_bench.stats import (
    RESAMPLES,
    gap_closed,
    percentile_interval,
    ratio_interval,
)
from kd_bench.store import Run

__all__ = ["Draws", "Gap", "difference", "draw_scores", "hybrid_gaps", "relate"]

Array = NDArray[np.float64]

SCORED = ("document_id", "unit_id", "category", "target", "parsed", "score")
# Stored samples that miss the stored score by more than this (points) are not resampled.
AGREES = 0.05


@dataclass
class Draws:
    """Bootstrap scores by benchmark (and `AVERAGE`) and run folder name, [resamples]."""

    scores: dict[str, dict[str, Array]] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    evidence: Evidence = field(default_factory=lambda: Evidence({}))

    def entry(self, key: str, entry: Entry) -> Array | None:
        """[seeds, resamples], or None where a seed's draws are missing."""
        found = [self.scores.get(key, {}).get(run.path.name) for run in entry.runs]
        known = [draws for draws in found if draws is not None]
        return np.stack(known) if known and len(known) == len(found) else None

    def mean(self, key: str, entry: Entry) -> Array | None:
        """Draws of the mean over seeds, [resamples]."""
        draws = self.entry(key, entry)
        return None if draws is None else np.asarray(draws.mean(axis=0))


def draw_scores(board: Board, resamples: int = RESAMPLES) -> Draws:
    """Resample every benchmark once for all runs of the board that can be compared."""
    draws = Draws()
    for task in board.tasks:
        found = _draw_task(board, task, resamples)
        draws.scores[task.id] = found.draws if found else {}
        draws.units[task.id] = found.units if found else 0
        if found:
            draws.evidence.tasks[task.id] = found
    names = [run.path.name for entry in board.entries for run in entry.runs]
    draws.units[AVERAGE] = sum(draws.units.values())
    draws.scores[AVERAGE] = {
        name: np.mean([draws.scores[task.id][name] for task in board.tasks], axis=0)
        for name in names
        if board.tasks and all(name in draws.scores[task.id] for task in board.tasks)
    }
    return draws


def _draw_task(board: Board, info: TaskInfo, resamples: int) -> TaskEvidence | None:
    """Evidence by run folder name; runs over other units than the first one's are left out."""
    task = info.id
    aggregator = get_aggregator(info.aggregator(_profile(board, task)))
    names: list[str] = []
    stacked: list[Array] = []
    units: NDArray[np.object_] | None = None
    for entry in board.entries:
        if not entry.score(task).comparable:
            continue
        for run, results in zip(entry.runs, entry.results, strict=True):
            if task not in results:
                continue
            statistics = _statistics(run, task, aggregator.name)
            if statistics is None:
                continue
            observed = float(aggregator.combine(statistics.values.sum(axis=0)))
            if not abs(observed - results[task].score) <= AGREES:
                continue
            if units is None:
                units = statistics.units
            same = np.array_equal(units, statistics.units)
            if same and (not stacked or stacked[0].shape == statistics.values.shape):
                names.append(run.path.name)
                stacked.append(statistics.values)
    if units is None or len(units) == 0:
        return None
    by_run = dict(zip(names, stacked, strict=True))
    return TaskEvidence.of(aggregator.name, units, by_run, resamples)


def _statistics(run: Run, task: str, aggregator: str) -> Any:
    try:
        return unit_statistics(aggregator, run.samples(task, SCORED))
    except (KdBenchError, ValueError, KeyError, TypeError):
        return None  # a damaged file costs the interval, not the report


def _profile(board: Board, task: str) -> str:
    for entry in board.entries:
        for results in entry.results:
            if task in results:
                return results[task].profile
    return "default"


# --- relations ---------------------------------------------------------------------------------


def relate(board: Board, draws: Draws) -> Board:
    """The board with intervals, ranks, differences from SFT, retention and gap closed."""
    keys = [task.id for task in board.tasks] + [AVERAGE]
    teacher = next((e for e in board.entries if e.role == "teacher"), None)
    floor = next((e for e in board.entries if e.role == "sft"), None)
    ranks = {key: _ranks(board, draws, key) for key in keys}
    entries = []
    for entry in board.entries:
        scores = dict(entry.scores)
        for key in keys:
            scores[key] = replace(
                scores[key], interval=_interval(entry, key, draws), rank=ranks[key].get(entry.key)
            )
        student = entry.role != "teacher"
        from_floor = student and floor is not None and floor is not entry
        entries.append(
            replace(
                entry,
                scores=scores,
                differences={
                    key: found
                    for key in keys
                    if from_floor and floor and (found := difference(draws, key, floor, entry))
                },
                retentions={
                    key: found
                    for key in keys
                    if student and teacher and (found := _retention(draws, key, entry, teacher))
                },
                gap_closed=_gap(draws, entry, floor, teacher)
                if from_floor and floor and teacher
                else MISSING,
            )
        )
    by_key = {entry.key: entry for entry in entries}
    return replace(
        board,
        entries=tuple(entries),
        teacher=by_key[teacher.key] if teacher else None,
        floor=by_key[floor.key] if floor else None,
    )


def _interval(entry: Entry, key: str, draws: Draws) -> Interval | None:
    mean = draws.mean(key, entry)
    if mean is not None:
        return percentile_interval(mean)
    return entry.score(key).interval


def difference(draws: Draws, key: str, first: Entry, second: Entry) -> Score | None:
    """`second` minus `first` in points; the interval holds seeds where there are several."""
    one, other = first.score(key), second.score(key)
    if not both_comparable(one, other):
        return None
    one_group, other_group = ([run.path.name for run in each.runs] for each in (first, second))
    whole = key != AVERAGE or len(draws.evidence.tasks) == len(draws.units) - 1
    if not (whole and draws.evidence.has(key, one_group, other_group)):
        return Score(other.value - one.value)
    found = draws.evidence.difference(key, one_group, other_group)
    return Score(other.value - one.value, interval=found.interval, holds_seeds=found.holds_seeds)


def both_comparable(one: Score, other: Score) -> bool:
    """Whether two numbers were measured, and under one protocol."""
    return one.known and other.known and one.comparable and other.comparable


def _ranks(board: Board, draws: Draws, key: str) -> dict[str, int]:
    """1 + how many students are better beyond doubt (95 % interval); ties share a rank."""
    students = [e for e in board.students if e.score(key).known and e.score(key).comparable]
    ranks: dict[str, int] = {}
    if len(students) < 2:
        return ranks
    for entry in students:
        better = 0
        for other in students:
            if other is entry or other.score(key).value <= entry.score(key).value:
                continue
            gap = difference(draws, key, entry, other)
            better += gap is not None and (gap.interval is None or gap.interval.low > 0)
        ranks[entry.key] = 1 + better
    return ranks


def _retention(draws: Draws, key: str, entry: Entry, teacher: Entry) -> Score | None:
    """Percent of the teacher's score."""
    one, ceiling = entry.score(key), teacher.score(key)
    if not both_comparable(one, ceiling) or ceiling.value <= 0:
        return None
    mean, top = draws.mean(key, entry), draws.mean(key, teacher)
    interval = None if mean is None or top is None else ratio_interval(100 * mean, top)
    return Score(100 * one.value / ceiling.value, interval=interval)


def _gap(draws: Draws, entry: Entry, floor: Entry, teacher: Entry) -> Score:
    """Percent of the way from SFT to the teacher, on the average."""
    low, high, own = (e.score(AVERAGE) for e in (floor, teacher, entry))
    if not (both_comparable(low, high) and both_comparable(own, low)) or high.value <= low.value:
        return MISSING
    means = [draws.mean(AVERAGE, e) for e in (entry, floor, teacher)]
    interval = None
    if all(mean is not None for mean in means):
        closed = gap_closed(means[0], means[1], means[2])  # type: ignore[arg-type]
        interval = closed and Interval(100 * closed.low, 100 * closed.high, closed.level)
    return Score(100 * (own.value - low.value) / (high.value - low.value), interval=interval)


@dataclass(frozen=True)
class Gap:
    """What a student's eyes and what its language model cost, by benchmark and `AVERAGE`."""

    student: Entry
    hybrid: Entry
    vision: dict[str, Score]
    language: dict[str, Score]


def hybrid_gaps(board: Board, draws: Draws) -> list[Gap]:
    """Teacher - hybrid (vision gap) and hybrid - student (language gap) for each hybrid."""
    gaps = []
    for hybrid in board.entries:
        student = _student_of(board, hybrid) if hybrid.role == "switch" else None
        if student is None or board.teacher is None:
            continue
        keys = [task.id for task in board.tasks] + [AVERAGE]
        vision = {key: difference(draws, key, hybrid, board.teacher) for key in keys}
        language = {key: difference(draws, key, student, hybrid) for key in keys}
        known = [key for key in keys if vision[key] and language[key]]
        gaps.append(
            Gap(
                student,
                hybrid,
                {key: score for key in known if (score := vision[key])},
                {key: score for key in known if (score := language[key])},
            )
        )
    return [gap for gap in gaps if gap.vision]


def _student_of(board: Board, hybrid: Entry) -> Entry | None:
    """The student whose eyes a hybrid has: same method, else the only distilled one."""
    students: Sequence[Entry] = [e for e in board.students if e.method == hybrid.method]
    if not students or not hybrid.method:
        students = [e for e in board.students if e.role == "kd"]
        return students[0] if len(students) == 1 else None
    return students[0]
