"""How a board's rows relate: intervals, ranks, differences, retention, gaps, headline, categories.

All of them are asked of the one estimator, `compare.estimates`; here is only which runs of the
board it may be asked about.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kd_bench.aggregators import Aggregator, get_aggregator, unit_statistics
from kd_bench.compare.align import CONTENT_READ, further_columns
from kd_bench.compare.estimates import (
    PART_NAMES,
    Estimate,
    Evidence,
    TaskEvidence,
    headline,
)
from kd_bench.errors import UsageError, closest
from kd_bench.records import AVERAGE
from kd_bench.report.board import MISSING, Board, Entry, Score, TaskInfo, load_board
from kd_bench.report.tables import Cell, Column, Row, Table, clean
from kd_bench.stats import RESAMPLES

SCORED = ("document_id", "unit_id", "category", "target", "parsed", "score")
READ = (*SCORED, *CONTENT_READ)
# Stored samples that miss the stored score by more than this (points) are not resampled.
AGREES = 0.05


def read_board(
    results: Path,
    names: Sequence[str] | None = None,
    suite: str | None = None,
    main: str | None = None,
) -> tuple[Board, Evidence]:
    """The board of a store with all its relations, and the evidence that they come from.

    Raises:
        UsageError: as `load_board` and `relate`.
    """
    board = load_board(results, names, suite)
    evidence = read_evidence(board)
    return relate(board, evidence, main), evidence


def read_evidence(board: Board, resamples: int = RESAMPLES, *, columns: bool = True) -> Evidence:
    """Resample every benchmark once for all runs of the board that can be compared.

    Args:
        columns: also what the answers say and what blank images give, for form gap and sight.
    """
    found = {task.id: _task_evidence(board, task, resamples, columns) for task in board.tasks}
    return Evidence({task: evidence for task, evidence in found.items() if evidence is not None})


def _task_evidence(
    board: Board, info: TaskInfo, resamples: int, columns: bool
) -> TaskEvidence | None:
    """Evidence by run folder name; runs over other units than the first one's are left out."""
    task = info.id
    aggregator = aggregator_of(board, info)
    by_run: dict[str, NDArray[np.float64]] = {}
    units: NDArray[np.object_] | None = None
    for entry in sorted(board.entries, key=_limited):  # a limited one sets no units for the others
        if not entry.score(task).comparable:
            continue
        for run, result, frame in entry.samples(task, READ if columns else SCORED):
            try:
                statistics = unit_statistics(aggregator.name, frame)
            except (ValueError, KeyError, TypeError):
                continue  # what cannot be scored costs the interval, not the report
            observed = float(aggregator.combine(statistics.values.sum(axis=0)))
            if not abs(observed - result.score) <= AGREES:
                continue
            if units is None:
                units = statistics.units
            first = next(iter(by_run.values()), statistics.values)
            if np.array_equal(units, statistics.units) and first.shape == statistics.values.shape:
                by_run[run.path.name] = statistics.values
                if columns:  # a damaged blank run costs its column, not the report
                    named = (aggregator.name, task, run.path.name)
                    by_run |= further_columns(*named, frame, entry.blanks.get(run.path))[0]
    if units is None or len(units) == 0:
        return None
    return TaskEvidence.of(aggregator.name, units, by_run, resamples)


def aggregator_of(board: Board, task: TaskInfo) -> Aggregator:
    """The rule that a benchmark's scores come from, in the profile of the first run that has it."""
    if task.spec is None:
        return get_aggregator("mean")
    found = (r[task.id].profile for e in board.entries for r in e.results if task.id in r)
    try:
        variant = task.spec.profile(next(found, None))
    except UsageError:  # a profile that the benchmark had once
        return get_aggregator(task.spec.aggregator)
    return get_aggregator(variant.aggregator or task.spec.aggregator)


# --- relations ---------------------------------------------------------------------------------


def relate(board: Board, evidence: Evidence, main: str | None = None) -> Board:
    """The board with intervals, ranks, differences from SFT, retention, gap closed and headline.

    Args:
        main: name or method of the row that the headline is about; default: it speaks of what
            holds simultaneously over all methods.

    Raises:
        UsageError: no student is called `main`.
    """
    teacher, floor = _reference(board, "teacher"), _reference(board, "sft")
    asked = _Asked(board, evidence)
    named = _named(board, main, floor)
    entries = [asked.entry(entry, floor, teacher) for entry in board.entries]
    by_key = {entry.key: entry for entry in entries}
    claim = None
    if floor is not None and asked.knows(AVERAGE, floor):
        methods = asked.groups(AVERAGE, [e for e in board.students if e is not floor])
        claim = headline(evidence, asked.group(floor), methods, named.key if named else None)
    return replace(
        board,
        entries=tuple(entries),
        teacher=by_key[teacher.key] if teacher else None,
        floor=by_key[floor.key] if floor else None,
        main=by_key[named.key] if named else None,
        claim=claim,
    )


def _reference(board: Board, role: str) -> Entry | None:
    """The first row of a role; a sound and unlimited one where there is one."""

    def doubt(entry: Entry) -> tuple[bool, bool]:
        unsound = any(manifest.status != "complete" for manifest in entry.manifests)
        return unsound, _limited(entry)

    return min((e for e in board.entries if e.role == role), key=doubt, default=None)


def _limited(entry: Entry) -> bool:
    return any(manifest.protocol.limit is not None for manifest in entry.manifests)


def _named(board: Board, main: str | None, floor: Entry | None) -> Entry | None:
    if main is None:
        return None
    students = [entry for entry in board.students if entry is not floor]
    found = [e for e in students if e.name == main] or [e for e in students if e.method == main]
    if len(found) != 1:
        names = sorted(entry.name for entry in students)
        wrong = "Several rows are" if found else "No student on this page is"
        raise UsageError(
            f"{wrong} {main!r}.{closest(main, names)}", f"There are: {', '.join(names)}."
        )
    return found[0]


class _Asked:
    """What a board may ask its evidence."""

    def __init__(self, board: Board, evidence: Evidence) -> None:
        self.evidence = evidence
        self.keys = [task.id for task in board.tasks] + [AVERAGE]
        # The average of a page is over all of its benchmarks or it is none.
        self.whole = set(evidence.tasks) == {task.id for task in board.tasks}
        self.board = board

    @cached_property
    def ranks(self) -> dict[str, dict[str, int]]:
        """Ranks of the students by key, then by entry key."""
        students = self.board.students
        return {key: self.evidence.ranks(key, self.groups(key, students)) for key in self.keys}

    @staticmethod
    def group(entry: Entry) -> list[str]:
        """An entry's runs as the evidence names them."""
        return [run.path.name for run in entry.runs]

    def knows(self, key: str, *entries: Entry) -> bool:
        """Whether every number is comparable and every run's samples could be read."""
        if key == AVERAGE and not self.whole:
            return False
        known = all(e.score(key).known and e.score(key).comparable for e in entries)
        return known and self.evidence.has(key, *map(self.group, entries))

    def groups(self, key: str, entries: Sequence[Entry]) -> dict[str, Sequence[str]]:
        """The groups of those entries that are known, by key."""
        return {entry.key: self.group(entry) for entry in entries if self.knows(key, entry)}

    def entry(self, entry: Entry, floor: Entry | None, teacher: Entry | None) -> Entry:
        """An entry with everything that its scores are related to."""
        above = floor if entry.role != "teacher" and entry is not floor else None
        below = teacher if entry.role != "teacher" else None
        differences = {key: self.difference(key, above, entry) for key in self.keys if above}
        retentions = {key: self._retention(key, entry, below) for key in self.keys if below}
        return replace(
            entry,
            scores=entry.scores | {key: self._score(entry, key) for key in self.keys},
            differences={key: found for key, found in differences.items() if found},
            retentions={key: found for key, found in retentions.items() if found},
            gap_closed=(self._gap(entry, above, below) if above and below else None) or MISSING,
        )

    def _score(self, entry: Entry, key: str) -> Score:
        score = replace(entry.score(key), interval=None, rank=self.ranks[key].get(entry.key))
        if not self.knows(key, entry):
            return score
        found = self.evidence.score(key, self.group(entry))
        few = (f"{found.units} units: too few for an interval or a rank",)
        return replace(
            score,
            interval=found.interval,
            holds_seeds=found.holds_seeds,
            marks=score.marks + few * found.too_few,
        )

    def difference(self, key: str, first: Entry, second: Entry) -> Score | None:
        """`second` minus `first` in points; None where one of them cannot be compared."""
        value = second.score(key).value - first.score(key).value
        return self._related(key, value, self.evidence.difference, first, second)

    def _retention(self, key: str, entry: Entry, teacher: Entry) -> Score | None:
        """Percent of the teacher's score."""
        ceiling = teacher.score(key).value
        if not ceiling > 0:
            return None
        value = 100 * entry.score(key).value / ceiling
        return self._related(key, value, self.evidence.retention, entry, teacher)

    def _gap(self, entry: Entry, floor: Entry, teacher: Entry) -> Score | None:
        """Percent of the way from SFT to the teacher, on the average."""
        own, low, high = (e.score(AVERAGE).value for e in (entry, floor, teacher))
        if not high > low:
            return None
        value = 100 * (own - low) / (high - low)
        return self._related(AVERAGE, value, self.evidence.gap_closed, entry, floor, teacher)

    def _related(
        self, key: str, value: float, ask: Callable[..., Estimate | None], *entries: Entry
    ) -> Score | None:
        """A number of several entries, with its interval where the evidence has them all."""
        if not _comparable(key, *entries):
            return None
        found = ask(key, *map(self.group, entries)) if self.knows(key, *entries) else None
        if found is None:
            return Score(value)
        return Score(value, interval=found.interval, holds_seeds=found.holds_seeds)


def _comparable(key: str, *entries: Entry) -> bool:
    """Whether the numbers were measured, under one protocol and, where limited, on as much."""
    if any(map(_limited, entries)) and len({_documents(entry, key) for entry in entries}) > 1:
        return False
    return all(entry.score(key).known and entry.score(key).comparable for entry in entries)


def _documents(entry: Entry, key: str) -> tuple[int, ...]:
    """Documents of a benchmark, or of each of them behind an average."""
    keys = [task for task in entry.scores if task != AVERAGE] if key == AVERAGE else [key]
    return tuple(entry.score(task).documents for task in sorted(keys))


# --- vision and language gap -------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """What a student's vision and what its language model cost, by benchmark and `AVERAGE`."""

    student: Entry
    hybrid: Entry
    vision: dict[str, Score]
    language: dict[str, Score]


def hybrid_gaps(board: Board, evidence: Evidence) -> list[Gap]:
    """Teacher - hybrid (vision gap) and hybrid - student (language gap) for each hybrid."""
    asked = _Asked(board, evidence)
    gaps = []
    for hybrid in board.entries:
        student = _student_of(board, hybrid) if hybrid.role == "switch" else None
        if student is None or board.teacher is None:
            continue
        vision, language = {}, {}
        for key in asked.keys:
            seen = asked.difference(key, hybrid, board.teacher)
            said = asked.difference(key, student, hybrid)
            if seen and said:
                vision[key], language[key] = seen, said
        if vision:
            gaps.append(Gap(student, hybrid, vision, language))
    return gaps


def _student_of(board: Board, hybrid: Entry) -> Entry | None:
    """The student whose vision a hybrid has: same method, else the only distilled one."""
    same = [e for e in board.students if hybrid.method and e.method == hybrid.method]
    distilled = [e for e in board.students if e.role == "kd"]
    return same[0] if same else distilled[0] if len(distilled) == 1 else None


# --- form gap and sight ---------------------------------------------------------------------------

OWN_GAPS = {
    "form gap": "Form gap: content − score",
    "sight": "Sight: score − score with blank images",
}
FROM_SFT = {kind: f"Δ SFT, {kind.removesuffix(' difference')}" for kind in PART_NAMES}


ABOUT_FORM = ("form gap", "content difference", "form difference")
IN_FORM = "Form gap: none. All answers have a form that their benchmarks read. "
EXPLAINED = (
    "Points, with paired 95 % intervals. Scores are lmms-eval's; content is what an answer says "
    "whatever its form, blank images are grey. Content and form, and guessing and sight, add up to "
    "Δ SFT."
)
TWO_WAYS = " Ambiguous: answers that can be read in two ways; by content they are wrong."


def gap_table(board: Board, evidence: Evidence) -> Table | None:
    """Form gap and sight of every model, and what differences from SFT are made of.

    One row a model in each of these sections, one column a benchmark, then the average and how
    many answers could be read in two ways. No rows on form where no answer's form costs points.
    None where nothing is known.
    """
    asked = _Asked(board, evidence)
    found = {entry.key: _estimates(asked, entry, board.floor) for entry in board.entries}
    if not any(found.values()):
        return None
    forms = [each for kinds in found.values() for each in kinds.get("form gap", {}).values()]
    in_form = all(each.unchanged for each in forms) and not any(map(_ambiguous, board.entries))
    rows = tuple(
        _gap_row(board, entry, kind, title, measures)
        for kind, title in (OWN_GAPS | FROM_SFT).items()
        for entry in board.entries
        if (measures := found[entry.key].get(kind)) and not (in_form and kind in ABOUT_FORM)
    )
    columns = [Column("model", "Model", "text")]
    columns += [Column(t.id, t.short, "difference", t.group) for t in board.tasks]
    columns += [Column(AVERAGE, board.average_title, "difference", "overall")]
    columns += [Column("ambiguous", "Ambiguous", "rank", "answers")]
    caption = IN_FORM * (in_form and bool(forms)) + EXPLAINED * bool(rows)
    if all(row.cells[-1].value is None for row in rows):
        rows = tuple(replace(row, cells=row.cells[:-1]) for row in rows)
        columns.pop()
    else:
        caption += TWO_WAYS
    return Table(
        "Form gap and sight",
        tuple(columns),
        rows,
        caption.strip(),
    )


def _estimates(asked: _Asked, entry: Entry, floor: Entry | None) -> dict[str, dict[str, Estimate]]:
    """A model's gaps and the parts of its difference from SFT, by kind, then by key."""
    found: dict[str, dict[str, Estimate]] = {}
    above = floor if entry.role != "teacher" and entry is not floor else None
    for key in asked.keys:
        if not asked.knows(key, entry):
            continue
        measures = asked.evidence.gaps(key, asked.group(entry))
        if above and asked.knows(key, above) and _comparable(key, above, entry):
            measures |= asked.evidence.parts(key, asked.group(above), asked.group(entry))
        for kind, measure in measures.items():
            found.setdefault(kind, {})[key] = measure
    return found


def _gap_row(
    board: Board, entry: Entry, kind: str, title: str, measures: dict[str, Estimate]
) -> Row:
    keys = [*(task.id for task in board.tasks), AVERAGE]
    # That no answer's form costs anything is seen, not estimated.
    plain = {key for key, each in measures.items() if each.unchanged and "form" in kind}
    cells = [
        Cell(found.value, interval=None if key in plain else found.interval)
        if (found := measures.get(key))
        else Cell()
        for key in keys
    ]
    ambiguous = _ambiguous(entry) if kind == "form gap" else None
    name = Cell(entry.name, remark=f"{len(entry.runs)} seeds" if len(entry.runs) > 1 else "")
    row = Row.of(f"{kind} {entry.key}", name, *cells, ambiguous, section=title)
    return replace(row, series=board.colours[entry.key])


def _ambiguous(entry: Entry) -> int:
    """How many answers of all benchmarks and seeds can be read in two ways."""
    results = [result for found in entry.results for result in found.values()]
    return sum(round(r.rates.get("ambiguous", 0.0) * r.documents) for r in results)


# --- categories ----------------------------------------------------------------------------------

CATEGORY_RESAMPLES = 2_000  # categories are many and small: enough draws for a 95 % interval


def category_tables(board: Board) -> list[Table]:
    """A table for each benchmark that has at least two named subsets; scores as it scores them.

    One row a subset, one column a model.
    """
    return [table for task in board.tasks if (table := _categories(board, task)) is not None]


def _categories(board: Board, task: TaskInfo) -> Table | None:
    frames = dict(_frames(board, task.id))
    first = next(iter(frames.values()), None)
    counts: Counter[str] = Counter(() if first is None else first["category"].astype(str))
    names = sorted(name for name in counts if name)
    if len(names) < 2:
        return None
    aggregator = aggregator_of(board, task).category
    evidence = Evidence(
        {name: subset for name in names if (subset := _subset(aggregator, frames, name))}
    )
    entries = [e for e in board.entries if any(run.path.name in frames for run in e.runs)]
    columns = (
        Column("category", "Category", "text"),
        Column("n", "n", "rank"),
        *(Column(e.key, e.name, "score", interval=True) for e in entries),
    )

    def cell(entry: Entry, name: str) -> Cell:
        group = [run.path.name for run in entry.runs]
        if not entry.score(task.id).comparable or not evidence.has(name, group):
            return Cell()
        found, scores = evidence.score(name, group), evidence.scores(name, group)
        spread = float(scores.std(ddof=1)) if len(scores) > 1 else None
        return Cell(found.value, spread, found.interval)

    rows = (Row.of(n, n, counts[n], *(cell(entry, n) for entry in entries)) for n in names)
    return Table(f"{clean(task.title)} by category", columns, tuple(rows))


def _frames(board: Board, task: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Samples by run folder name, of the runs with the first one's documents."""
    documents: list[str] | None = None
    for entry in board.entries:
        for run, _, samples in entry.samples(task, SCORED):
            frame = samples.sort_values("document_id", ignore_index=True)
            documents = documents or frame["document_id"].tolist()
            if frame["document_id"].tolist() == documents:
                yield run.path.name, frame


def _subset(aggregator: str, frames: dict[str, pd.DataFrame], name: str) -> TaskEvidence | None:
    try:
        found = {
            run: unit_statistics(aggregator, frame[frame["category"].astype(str) == name])
            for run, frame in frames.items()
        }
        units = next(iter(found.values())).units
        values = {run: each.values for run, each in found.items()}
        return TaskEvidence.of(aggregator, units, values, CATEGORY_RESAMPLES)
    except (ValueError, KeyError, TypeError):
        return None  # a subset that this benchmark's rule cannot score alone
