"""The samples of several runs on the same documents in the same order, and their differences.

A difference has an interval, a test, counts of what changed, and what could have been seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kd_bench import registry
from kd_bench.aggregators import UnitStatistics, by_content, get_aggregator, unit_statistics
from kd_bench.compare.estimates import BLANK, CONTENT, Evidence, Group, TaskEvidence, beside
from kd_bench.errors import (
    IncompleteRunError,
    KdBenchError,
    NotComparableError,
    UsageError,
    closest,
)
from kd_bench.records import (
    AMBIGUOUS,
    AVERAGE,
    CONTENT_COLUMNS,
    SAMPLE_COLUMNS,
    Interval,
    TaskResult,
)
from kd_bench.stats import (
    RESAMPLES,
    exact_or_swap,
    holm,
    minimum_detectable_effect,
    paired_bootstrap,
    swap_draws,
    two_sided,
    unit_seed,
)
from kd_bench.store import Run, blank_runs

if TYPE_CHECKING:
    import pandas as pd


Array = NDArray[np.float64]

# What a score needs; texts are read only where somebody wants to see them.
STATISTICS_COLUMNS = ("document_id", "unit_id", "category", "target", "parsed", "score")
# What a document has whatever was answered.
ALIKE = ("unit_id", "target")
# What its further column by content needs as well.
CONTENT_READ = ("content", "score_by_content")


@dataclass(frozen=True)
class AlignedTask:
    """One benchmark's samples of several runs, the same documents in the same order.

    Attributes:
        samples: one frame a run.
        units, statistics: unit ids [units]; sufficient statistics [runs, units, m].
        comparable: False when the fingerprints differ and that was allowed.
        notes: what a reader must know about the alignment.
        further: statistics [units, m] of further columns, by `estimates.beside` of a position.
    """

    task: str
    aggregator: str
    samples: tuple["pd.DataFrame", ...]
    units: NDArray[np.object_]
    statistics: Array
    comparable: bool = True
    notes: tuple[str, ...] = ()
    further: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        task: str,
        aggregator: str,
        frames: Sequence["pd.DataFrame"],
        notes: Sequence[str] = (),
    ) -> "AlignedTask":
        """From frames of the same documents in the same order; notes say what is not comparable."""
        found = [unit_statistics(aggregator, frame) for frame in frames]
        values = np.stack([each.values for each in found])
        return cls(task, aggregator, tuple(frames), found[0].units, values, not notes, tuple(notes))

    @property
    def scores(self) -> Array:
        """Scores of the aligned documents, [runs], 0-100."""
        combine = get_aggregator(self.aggregator).combine
        return combine(self.statistics.sum(axis=1))

    @property
    def items(self) -> int:
        """How many things can be right or wrong: documents, or groups scored as a whole."""
        whole = get_aggregator(self.aggregator).item == "unit"
        return len(self.units) if whole else len(self.samples[0])

    def by_content(self) -> "AlignedTask":
        """The same with what the answers say in place of what upstream read (`CONTENT_READ`)."""
        frames = [by_content(frame) for frame in self.samples]
        return self.of(self.task, self.aggregator, frames, self.notes)

    @property
    def columns(self) -> dict[str, Array]:
        """Statistics [units, m] of the runs, by position, and of their further columns."""
        return {**{str(run): each for run, each in enumerate(self.statistics)}, **self.further}

    def draws(self, resamples: int = RESAMPLES, seed: int = 0) -> Array:
        """Paired bootstrap scores of `columns`, [runs and further, resamples]."""
        stacked = np.stack(list(self.columns.values()))
        return paired_bootstrap(self.aggregator, stacked, resamples, unit_seed(self.units, seed))

    def changes(self, first: int, second: int) -> tuple[int, int]:
        """Items that the second run fixed and broke against the first."""
        if get_aggregator(self.aggregator).item == "unit":
            change = self.statistics[second, :, 0] - self.statistics[first, :, 0]
        else:
            change = _scores(self.samples[second]) - _scores(self.samples[first])
        return int((change > 1e-9).sum()), int((change < -1e-9).sum())


def _scores(samples: "pd.DataFrame") -> Array:
    return samples["score"].to_numpy(dtype=np.float64)


def label(run: Run) -> str:
    """How messages name a run."""
    return f"{run.manifest.model.name} ({run.path.name})"


def aggregator_of(result: TaskResult) -> str:
    """The aggregator that the registry gives to a result's benchmark and profile.

    A benchmark that the registry no longer knows is a plain mean of its documents.
    """
    if result.task not in registry.task_names():
        return "mean"
    spec = registry.load_task(result.task)
    known = result.profile in (*spec.profiles, "default")
    return (spec.profile(result.profile).aggregator if known else None) or spec.aggregator


def common_tasks(runs: Sequence[Run], chosen: Sequence[str] | None = None) -> list[str]:
    """Benchmarks that every run has finished, in the first run's order.

    Raises:
        UsageError: fewer than two runs, the same run twice, or an unknown benchmark was chosen.
        IncompleteRunError: a run has no finished benchmark.
        NotComparableError: there is none in common.
    """
    if len(runs) < 2:
        raise UsageError("A comparison needs two runs.", "Name a second one.")
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise UsageError(f"{label(runs[0])} was named twice.", "Name two different runs.")
    done = [run.done_tasks() for run in runs]
    for run, tasks in zip(runs, done, strict=True):
        if not tasks:
            raise IncompleteRunError(
                f"{label(run)} has no finished benchmark.", "Run its eval command again."
            )
    common = [task for task in done[0] if all(task in tasks for tasks in done)]
    for task in chosen or ():
        if task not in common:
            raise UsageError(
                f"Not every run has {task!r}.{closest(task, common)}",
                f"In common: {', '.join(common) or 'nothing'}.",
            )
    if not common:
        raise NotComparableError(
            "The runs have no finished benchmark in common.", "Evaluate both on the same suite."
        )
    return [task for task in common if chosen is None or task in chosen]


def align(
    runs: Sequence[Run],
    task: str,
    *,
    allow_different: bool = False,
    columns: Sequence[str] = STATISTICS_COLUMNS,
) -> AlignedTask:
    """Read one benchmark's samples of every run and align them by document id.

    Raises:
        NotComparableError: other protocol or other documents, unless `allow_different`; never
            allowed when no document is shared.
        IncompleteRunError: the samples are damaged.
    """
    results = [run.result(task) for run in runs]
    notes: list[str] = []
    for run, result in zip(runs[1:], results[1:], strict=True):
        if result.fingerprint != results[0].fingerprint:
            text = f"{task}: {_what_differs(runs[0], results[0], run, result)}"
            _refuse_unless(allow_different, text, notes)
    frames = [_read(run, task, columns) for run in runs]
    shared = set(frames[0].index).intersection(*(frame.index for frame in frames[1:]))
    most = max(len(frame) for frame in frames)
    if not shared:
        raise NotComparableError(
            f"{task}: the runs share no document.", "Evaluate both on the same data."
        )
    if len(shared) < most:
        text = f"{task}: the runs share only {len(shared):,} of {most:,} documents"
        _refuse_unless(allow_different, text, notes)
    order = sorted(shared)
    frames = [frame.loc[order].reset_index() for frame in frames]
    for frame in frames[1:]:
        if not np.array_equal(frame["unit_id"].to_numpy(), frames[0]["unit_id"].to_numpy()):
            raise NotComparableError(
                f"{task}: the runs group the same documents differently.",
                "Evaluate both with the same version of kd-bench.",
            )
        frame["category"] = frames[0]["category"]
    return AlignedTask.of(task, aggregator_of(results[0]), frames, notes)


def has_content(samples: "pd.DataFrame") -> bool:
    """Whether every sample has a score by content."""
    return "score_by_content" in samples and not samples["score_by_content"].isna().any()


def content_statistics(aggregator: str, samples: "pd.DataFrame") -> UnitStatistics | None:
    """Unit statistics of what the answers say; None where some have no score by content."""
    if not has_content(samples):
        return None
    return unit_statistics(aggregator, by_content(samples))


def _with_columns(
    aligned: AlignedTask, blanks: Sequence[Run | None]
) -> tuple[AlignedTask, list[str]]:
    """The same with the runs' further columns, and why a blank run is not used.

    Args:
        aligned: read with `CONTENT_READ`.
        blanks: of each run, as `blank_runs` finds them.
    """
    further: dict[str, Array] = {}
    notes = []
    for place, (frame, blank) in enumerate(zip(aligned.samples, blanks, strict=True)):
        found, unused = further_columns(aligned.aggregator, aligned.task, str(place), frame, blank)
        further |= found
        notes += [unused] if unused else []
    return replace(aligned, further=further), notes


def further_columns(
    aggregator: str, task: str, name: str, samples: "pd.DataFrame", blank: Run | None
) -> tuple[dict[str, Array], str]:
    """Statistics [units, m] of a run's columns by content and with blank images, where known.

    Args:
        name: of the run, which `beside` makes the columns' keys of.

    Returns:
        Also why its blank run is not used, if it is not.
    """
    found = {}
    content = content_statistics(aggregator, samples)
    if content is not None:
        found[beside(CONTENT, name)] = content.values
    if blank is not None and blank.done(task):
        try:
            found[beside(BLANK, name)] = blank_statistics(aggregator, samples, blank, task)
        except KdBenchError as error:
            return found, error.problem
    return found, ""


def blank_statistics(aggregator: str, samples: "pd.DataFrame", run: Run, task: str) -> Array:
    """Statistics [units, m] of a run with blank images on the documents of `samples`.

    Raises:
        IncompleteRunError: its samples are damaged.
        NotComparableError: it lacks documents, or groups them differently.
    """
    frame, order = _read(run, task, STATISTICS_COLUMNS), samples["document_id"]
    if order.isin(frame.index).all():
        frame = frame.loc[order].reset_index()
        frame["category"] = samples["category"]
        if all((frame[name].to_numpy() == samples[name].to_numpy()).all() for name in ALIKE):
            return unit_statistics(aggregator, frame).values
    raise NotComparableError(
        f"{task} of {label(run)} has other documents than the run with images.",
        "Evaluate both on the same data.",
    )


def numeric_notes(runs: Sequence[Run]) -> list[str]:
    """How the runs' arithmetic and decoding differ: comparable, but part of the difference."""
    notes = []
    first = runs[0].manifest.protocol
    for run in runs[1:]:
        other = run.manifest.protocol
        pairs = {
            "number type": (first.dtype, other.dtype),
            "quantization": (first.quantize or "none", other.quantize or "none"),
            "generation settings of the checkpoint": (_generation(runs[0]), _generation(run)),
        }
        for what, (one, two) in pairs.items():
            if one != two and one and two:
                notes.append(f"{label(runs[0])} and {label(run)} differ in {what}: {one}, {two}.")
    return notes


def _generation(run: Run) -> str:
    """The checkpoint's own settings that changed its answers; empty where they were not kept."""
    for task in run.manifest.tasks:
        if run.done(task):
            found = run.result(task).settings.get("checkpoint_generation")
            if not isinstance(found, dict):
                return ""
            return ", ".join(f"{name} {value}" for name, value in sorted(found.items())) or "none"
    return ""


def _refuse_unless(allowed: bool, text: str, notes: list[str]) -> None:
    if not allowed:
        raise NotComparableError(
            f"{text}.",
            "Evaluate both under one protocol; `compare --allow-different` shows them, marked.",
        )
    notes.append(f"{text}: not comparable.")


def _read(run: Run, task: str, columns: Sequence[str]) -> "pd.DataFrame":
    """Checked samples of one run, indexed by document id."""
    known = (*SAMPLE_COLUMNS, *CONTENT_COLUMNS)
    wanted = [column for column in known if column in {*columns, *STATISTICS_COLUMNS}]
    frame = run.samples(task, wanted).set_index("document_id")
    scores = frame["score"].to_numpy(dtype=np.float64)
    problem = ""
    if not frame.index.is_unique:
        problem = "two samples of one document"
    elif not np.all((scores >= 0) & (scores <= 1)):
        problem = "a score outside 0 to 1"
    elif frame["unit_id"].isna().any():
        problem = "a sample without unit"
    if problem:
        raise IncompleteRunError(
            f"{task} of {label(run)} is damaged: {problem}.",
            "Delete the task's .json in the run folder and run the same eval command again.",
        )
    return frame


def _what_differs(first: Run, one: TaskResult, second: Run, other: TaskResult) -> str:
    """Which parts of the protocol differ, as far as the results tell."""
    pairs = {
        "suite": (first.manifest.protocol.suite, second.manifest.protocol.suite),
        "limit": (first.manifest.protocol.limit, second.manifest.protocol.limit),
        "images": tuple(r.manifest.protocol.images or "its own" for r in (first, second)),
        "profile": (one.profile, other.profile),
        "metric": (one.metric, other.metric),
        "documents": (one.documents, other.documents),
    }
    for key in sorted(one.settings.keys() | other.settings.keys()):
        pairs[key] = (one.settings.get(key), other.settings.get(key))
    found = [f"{key} {_short(a)} and {_short(b)}" for key, (a, b) in pairs.items() if a != b]
    what = "; ".join(found) or "data, prompts or scorer differ"
    return f"{label(first)} and {label(second)} measured different things ({what})"


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


# --- differences ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Another run minus the reference, in points (0-100 scale).

    Attributes:
        interval: None with fewer than `stats.FEWEST_UNITS` units.
        p: two-sided, of this benchmark alone; `p_holm` corrected over the benchmarks.
        test: which test gave `p`.
        fixed, broken: items (documents, or groups scored as a whole) that changed.
        detectable: the smallest true difference that the test finds four times in five at the
            first step of Holm over the benchmarks; None without an interval or over seeds.
        standard_error: of the difference.
        units: resampling units.
        items: documents or groups that can change.
    """

    value: float
    interval: Interval | None
    p: float
    p_holm: float
    test: str
    fixed: int
    broken: int
    detectable: float | None
    standard_error: float
    units: int = 0
    items: int = 0

    @property
    def span(self) -> str:
        """The interval in words; "too few units" where there is none."""
        if self.interval is None:
            return f"too few units: {self.units}"
        return f"{self.interval.low:+.2f} to {self.interval.high:+.2f}"


@dataclass(frozen=True)
class Resampled:
    """One benchmark's scores [runs] and paired bootstrap draws of its columns, runs first."""

    aligned: AlignedTask
    scores: Array
    draws: Array

    def null_draws(self, first: int, second: int, seed: int = 0) -> Array:
        """Differences that two equal models would show, [resamples]."""
        return swap_draws(
            self.aligned.aggregator,
            self.aligned.statistics[first],
            self.aligned.statistics[second],
            self.draws.shape[1],
            unit_seed(self.aligned.units, seed + 1),
        )

    @cached_property
    def evidence(self) -> TaskEvidence:
        """What the estimator takes; runs are named by their position."""
        columns = self.aligned.columns
        return TaskEvidence.from_draws(
            self.aligned.aggregator,
            list(columns),
            np.stack(list(columns.values())),
            self.draws,
            unit_seed(self.aligned.units),
        )


def resample(aligned: AlignedTask, resamples: int = RESAMPLES, seed: int = 0) -> Resampled:
    """Bootstrap one benchmark for all of its runs at once."""
    return Resampled(aligned, aligned.scores, aligned.draws(resamples, seed))


def resample_columns(
    runs: Sequence[Run],
    tasks: Sequence[str],
    *,
    allow_different: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[list[Resampled], list[str]]:
    """Benchmarks with all columns of the runs that are known, and what a reader must know of them.

    Raises:
        NotComparableError, IncompleteRunError: as `align`.
    """
    blanks, notes = blank_runs([(run, run.manifest) for run in runs])
    sampled = []
    for task in tasks:
        aligned = align(runs, task, allow_different=allow_different, columns=CONTENT_READ)
        aligned, unused = _with_columns(aligned, [blanks.get(run.path) for run in runs])
        sampled.append(resample(aligned, resamples, seed))
        notes += [*aligned.notes, *unused]
    scored = [one for one in sampled if not np.isnan(one.scores).any()]
    return sampled, notes + _without_content(runs, scored) + ambiguous(runs, scored)


def _without_content(runs: Sequence[Run], tasks: Sequence[Resampled]) -> list[str]:
    """A line for each run without scores by content, where another run has them."""
    names = [task.aligned.task for task in tasks]
    missing = [
        [
            task.aligned.task
            for task in tasks
            if beside(CONTENT, f"{place}") not in task.aligned.further
        ]
        for place in range(len(runs))
    ]
    return [
        f"{label(run)} has no scores by content for {', '.join(lacking)}: no form gap."
        for run, lacking in zip(runs, missing, strict=True)
        if lacking and any(other != names for other in missing)
    ]


def ambiguous(runs: Sequence[Run], tasks: Sequence[Resampled]) -> list[str]:
    """A line for each run with answers that can be read in two ways (`records.AMBIGUOUS`)."""
    lines = []
    for place, run in enumerate(runs):
        frames = {task.aligned.task: task.aligned.samples[place] for task in tasks}
        counts = {
            task: int((frame["content"] == AMBIGUOUS).sum())
            for task, frame in frames.items()
            if "content" in frame
        }
        found = [f"{task} {count:,}" for task, count in counts.items() if count]
        if found:
            lines.append(
                f"{label(run)}: answers that can be read in two ways, by content wrong: "
                f"{', '.join(found)}."
            )
    return lines


def evidence_of(tasks: Sequence[Resampled]) -> Evidence:
    """All benchmarks of the same runs; runs are named by their position."""
    return Evidence({task.aligned.task: task.evidence for task in tasks})


def paired_difference(
    tasks: Sequence[Resampled],
    key: str,
    first: Group,
    second: Group,
    nulls: Mapping[str, Array] | None = None,
    level: float = 0.95,
) -> Difference:
    """Second group of runs minus the first, on a benchmark or on the average over `tasks`.

    Args:
        first, second: positions of runs, as `evidence_of` names them; several are seeds, and
            what changed is then the mean over all pairs of them.
        nulls: of two single runs, `Resampled.null_draws` by benchmark; None tests over seeds.
    """
    chosen = [task for task in tasks if key in (AVERAGE, task.aligned.task)]
    found = evidence_of(chosen).difference(key, first, second, level)
    pairs = [(int(a), int(b)) for a in first for b in second]
    changes = np.mean(
        [np.sum([task.aligned.changes(*pair) for task in chosen], axis=0) for pair in pairs],
        axis=0,
    )
    items = sum(task.aligned.items for task in chosen)
    known = found.interval is not None and nulls is not None
    if nulls is None:
        p, test = found.p, "Student's t over seeds and documents"
    elif key == AVERAGE:
        drawn = np.mean([nulls[task.aligned.task] for task in chosen], axis=0)
        p, test = two_sided(found.value, drawn), "sign-flip by unit"
    else:
        one = chosen[0].aligned
        before, after = one.statistics[list(pairs[0])]
        p, test = exact_or_swap(one.aggregator, before, after, nulls[key])
    return Difference(
        value=found.value,
        interval=found.interval,
        p=p,
        p_holm=p,
        test=test,
        fixed=round(float(changes[0])),
        broken=round(float(changes[1])),
        detectable=minimum_detectable_effect(found.error, items) if known else None,
        standard_error=found.error,
        units=found.units,
        items=items,
    )


def with_holm(differences: list[Difference]) -> list[Difference]:
    """The same differences with p, and what could be detected, corrected over all of them."""
    adjusted = holm([each.p for each in differences])
    alpha = 0.05 / max(len(differences), 1)
    return [
        replace(
            each,
            p_holm=p,
            detectable=None
            if each.detectable is None
            else minimum_detectable_effect(each.standard_error, each.items, alpha),
        )
        for each, p in zip(differences, adjusted, strict=True)
    ]
