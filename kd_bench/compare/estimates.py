"""The one estimator: scores, differences, retention and gaps of methods, with their intervals.

`compare`, `check` and the report all ask `Evidence`. A method is a group of runs, its training
seeds; a single run is a group of one. Every interval holds the choice of test documents and,
where a group has several seeds, the choice of seeds; every difference is paired by unit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

from kd_bench.records import AVERAGE, Interval
from kd_bench.stats import (
    FEWEST_UNITS,
    RESAMPLES,
    binomial_interval,
    content_digest,
    effective_units,
    paired_bootstrap,
    percentile_interval,
    pooled_freedom,
    seed_variance,
    smoothed,
    stretched,
    unchanged_draws,
    unit_seed,
)

Array = NDArray[np.float64]

Group = Sequence[str]
"""Run folder names of one method's training seeds; one name is a single model."""

CONTENT = "content"
"""The column of what a run's answers say, whatever their form."""
BLANK = "blank"
"""The column of what the same model scores on the same documents with blank images."""

PARTS = {
    CONTENT: ("content difference", "form difference"),
    BLANK: ("guessing difference", "sight difference"),
}
"""The two parts of a difference, by the column that splits it."""
PART_NAMES = tuple(part for parts in PARTS.values() for part in parts)
GAPS = ("form gap", "sight")
"""What a run's columns tell of it alone."""

_NOTHING = ""
"""The name of a run that has no points: what a gap is the difference from."""


def beside(column: str, run: str) -> str:
    """The name under which evidence holds a further column of a run; "" is its score itself."""
    return f"{column} of {run}" if column else run


@dataclass(frozen=True)
class Measure:
    """A number with its interval; None where it is undefined (a ratio over nothing)."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Estimate:
    """A number with everything that is known about its uncertainty.

    Attributes:
        value: points, or percent for `retention` and `gap_closed`.
        interval: None with too few units, or where a ratio has no finite one.
        error, freedom: standard error and its degrees of freedom.
        p: two-sided, that the true value is zero; only of differences, NaN elsewhere.
        seeds: number of runs of each group.
        holds_seeds: some group has several seeds, so training noise is in the interval.
        units: resampling units behind it.
        unchanged: no unit of the groups differs: the interval is the exact binomial one.
        distribution: sorted draws whose quantiles are the bounds at every level, [resamples].
    """

    value: float
    interval: Interval | None
    error: float
    freedom: float
    p: float
    seeds: tuple[int, ...]
    holds_seeds: bool
    units: int
    unchanged: bool = False
    distribution: Array = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)

    @property
    def too_few(self) -> bool:
        """Whether there are too few units for an interval, a rank or a verdict."""
        return self.units < FEWEST_UNITS

    @property
    def one_seed(self) -> bool:
        """Whether a group has a single run, so that training noise is unknown."""
        return min(self.seeds) < 2


@dataclass(frozen=True)
class TaskEvidence:
    """One benchmark of several runs on the same units.

    Attributes:
        scores, sizes, draws, contents: by run name: the score, its effective number of items,
            smoothed bootstrap scores [resamples], and a digest of the run's unit statistics.
    """

    units: int
    scores: dict[str, float]
    sizes: dict[str, float]
    draws: dict[str, Array]
    contents: dict[str, str]

    @classmethod
    def of(
        cls,
        aggregator: str,
        units: Sequence[str] | NDArray[np.object_],
        statistics: Mapping[str, Array],
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> "TaskEvidence":
        """Bootstrap one benchmark for all of its runs at once.

        Args:
            statistics: by run name, [units, m] of `aggregators.unit_statistics`.
        """
        names = list(statistics)
        stacked = np.stack([statistics[name] for name in names])
        seeds = unit_seed(units, seed)
        draws = paired_bootstrap(aggregator, stacked, resamples, seeds)
        return cls.from_draws(aggregator, names, stacked, draws, seeds)

    @classmethod
    def from_draws(
        cls,
        aggregator: str,
        names: Sequence[str],
        statistics: Array,
        draws: Array,
        seed: int | tuple[int, ...],
    ) -> "TaskEvidence":
        """From statistics [runs, units, m] and their paired bootstrap scores [runs, resamples]."""
        sized = [effective_units(aggregator, values) for values in statistics]
        return cls(
            units=statistics.shape[1],
            scores={name: score for name, (score, _) in zip(names, sized, strict=True)},
            sizes={name: size for name, (_, size) in zip(names, sized, strict=True)},
            draws={
                name: smoothed(drawn, *found, values, seed)
                for name, drawn, found, values in zip(names, draws, sized, statistics, strict=True)
            },
            contents={
                name: content_digest(values) for name, values in zip(names, statistics, strict=True)
            },
        )

    def between(self, lower: str, upper: str) -> "TaskEvidence":
        """Column `upper` minus column `lower` of every run that has both, by the run's name."""
        scores, draws, contents = {_NOTHING: 0.0}, {}, {_NOTHING: ""}
        for run in self.scores:
            one, other = beside(lower, run), beside(upper, run)
            if one in self.scores and other in self.scores:
                scores[run] = self.scores[other] - self.scores[one]
                draws[run] = self.draws[other] - self.draws[one]
                told = self.contents[one], self.contents[other]
                contents[run] = "" if told[0] == told[1] else " ".join(told)
        count = len(next(iter(self.draws.values())))
        return TaskEvidence(self.units, scores, {}, {_NOTHING: np.zeros(count), **draws}, contents)


class Evidence:
    """Benchmarks of several runs, and every number with an interval that is made of them.

    Keys are benchmark ids and `AVERAGE`, the mean over all benchmarks of the runs that have all.
    """

    def __init__(self, tasks: Mapping[str, TaskEvidence], reach: float = 100.0) -> None:
        self.tasks = dict(tasks)
        self.reach = reach  # no difference is larger
        self._columns: dict[tuple[str, str, str], TaskEvidence] = {}

    def has(self, key: str, *groups: Group) -> bool:
        """Whether every run of the groups has this benchmark (all of them, for the average)."""
        wanted = self.tasks.values() if key == AVERAGE else [self.tasks.get(key)]
        return bool(self.tasks) and all(
            task is not None and all(run in task.draws for run in group) and len(group) > 0
            for task in wanted
            for group in groups
        )

    def units(self, key: str) -> int:
        """Resampling units behind a key; of an average with too few in a part, that part's."""
        if key == AVERAGE:
            counts = [task.units for task in self.tasks.values()]
            return min(counts) if min(counts) < FEWEST_UNITS else sum(counts)
        return self.tasks[key].units

    def scores(self, key: str, group: Group) -> Array:
        """Scores of a group's runs, [seeds]."""
        if key == AVERAGE:
            return np.asarray(np.mean([self.scores(task, group) for task in self.tasks], axis=0))
        return np.array([self.tasks[key].scores[run] for run in group])

    def draws(self, key: str, group: Group) -> Array:
        """Bootstrap scores of a group's runs, [seeds, resamples]."""
        if key == AVERAGE:
            return np.asarray(np.mean([self.draws(task, group) for task in self.tasks], axis=0))
        return np.stack([self.tasks[key].draws[run] for run in group])

    # --- what is asked ---------------------------------------------------------------------

    def score(self, key: str, group: Group, level: float = 0.95) -> Estimate:
        """The mean score of a group, 0-100."""
        found = self._contrast(key, [group], lambda mean: mean[0], level)
        if found.too_few or found.interval is None:
            return found
        if key == AVERAGE or found.holds_seeds:
            low, high = max(found.interval.low, 0.0), min(found.interval.high, 100.0)
            return replace(found, interval=Interval(low, high, level))
        size = self.tasks[key].sizes[group[0]]
        exact = binomial_interval(found.value / 100, size, found.units, level)
        return replace(found, interval=exact)

    def difference(self, key: str, first: Group, second: Group, level: float = 0.95) -> Estimate:
        """`second` minus `first`, in points."""
        if self._unchanged(key, first, second):
            count = len(self.draws(key, first[:1])[0])
            drawn = unchanged_draws(self.units(key), count)
            found = self._estimate(key, [first, second], 0.0, drawn, float(drawn.std()), 1e9, level)
            return replace(found, p=1.0, unchanged=True)
        found = self._contrast(key, [second, first], lambda mean: mean[0] - mean[1], level)
        drawn = np.clip(found.distribution, -self.reach, self.reach)
        p = 1.0 if found.value == 0 else 0.0
        if found.error > 0:
            p = 2 * float(special.stdtr(found.freedom, -abs(found.value) / found.error))
        error, freedom = found.error, found.freedom
        found = self._estimate(key, [first, second], found.value, drawn, error, freedom, level)
        return replace(found, p=p)

    def form_gap(self, key: str, group: Group, level: float = 0.95) -> Estimate | None:
        """Points that the answers' form costs: content minus score; None where not known of all."""
        return self._gap(key, group, "", CONTENT, level)

    def sight(self, key: str, group: Group, level: float = 0.95) -> Estimate | None:
        """Points that the images give: score minus blank score; None where not known of all."""
        return self._gap(key, group, BLANK, "", level)

    def split(
        self, key: str, first: Group, second: Group, column: str, level: float = 0.95
    ) -> tuple[Estimate, Estimate] | None:
        """`difference` in two parts that add up to it: of a column, and of the score over it.

        Of `CONTENT` these are content and form, of `BLANK` guessing and sight. Paired by run and
        unit, so that what a run's two columns share is in no interval twice.

        Returns:
            None where some run lacks the column.
        """
        own = [[beside(column, run) for run in group] for group in (first, second)]
        if not self.has(key, first, second, *own):
            return None
        over = self._between(key, column, "", 2 * self.reach)
        return (
            self.difference(key, own[0], own[1], level),
            over.difference(key, first, second, level),
        )

    def gaps(self, key: str, group: Group, level: float = 0.95) -> dict[str, Estimate]:
        """Those of `GAPS` that are known."""
        found = (self.form_gap(key, group, level), self.sight(key, group, level))
        return {kind: each for kind, each in zip(GAPS, found, strict=True) if each is not None}

    def parts(
        self, key: str, first: Group, second: Group, level: float = 0.95
    ) -> dict[str, Estimate]:
        """The parts of a difference by their names in `PARTS`, of the columns that are known."""
        found: dict[str, Estimate] = {}
        for column, kinds in PARTS.items():
            split = self.split(key, first, second, column, level)
            found |= dict(zip(kinds, split, strict=True)) if split else {}
        return found

    def _gap(self, key: str, group: Group, lower: str, upper: str, level: float) -> Estimate | None:
        """The mean of column `upper` minus column `lower` over a group's runs."""
        if not self.has(key, *([beside(each, run) for run in group] for each in (lower, upper))):
            return None
        gap = self._between(key, lower, upper, self.reach)
        found = gap.difference(key, [_NOTHING], group, level)
        return replace(found, seeds=(len(group),))

    def _between(self, key: str, lower: str, upper: str, reach: float) -> "Evidence":
        tasks = self.tasks if key == AVERAGE else [key]
        for task in tasks:
            if (task, lower, upper) not in self._columns:
                self._columns[task, lower, upper] = self.tasks[task].between(lower, upper)
        return Evidence({task: self._columns[task, lower, upper] for task in tasks}, reach)

    def retention(
        self, key: str, student: Group, teacher: Group, level: float = 0.95
    ) -> Estimate | None:
        """Percent of the teacher's score; None where the teacher has none."""
        if self.scores(key, teacher).mean() <= 0:
            return None
        return self._contrast(
            key, [student, teacher], lambda m: 100 * m[0] / m[1], level, lambda m: m[1]
        )

    def gap_closed(
        self, key: str, student: Group, floor: Group, teacher: Group, level: float = 0.95
    ) -> Estimate | None:
        """Percent of the way from the floor to the teacher; None where the floor is no lower."""
        if self.scores(key, teacher).mean() <= self.scores(key, floor).mean():
            return None
        return self._contrast(
            key,
            [student, floor, teacher],
            lambda m: 100 * (m[0] - m[1]) / (m[2] - m[1]),
            level,
            lambda m: m[2] - m[1],
        )

    def ranks(self, key: str, groups: Mapping[str, Group], level: float = 0.95) -> dict[str, int]:
        """1 + how many groups are better beyond doubt; ties share a rank. Empty with too few."""
        known = {name: group for name, group in groups.items() if self.has(key, group)}
        if len(known) < 2 or self.units(key) < FEWEST_UNITS:
            return {}
        means = {name: float(self.scores(key, group).mean()) for name, group in known.items()}
        ranks = {}
        for name, group in known.items():
            gaps = [
                self.difference(key, group, known[other], level).interval
                for other in known
                if means[other] > means[name]
            ]
            ranks[name] = 1 + sum(gap is not None and gap.low > 0 for gap in gaps)
        return ranks

    # --- how it is made --------------------------------------------------------------------

    def _contrast(
        self,
        key: str,
        groups: Sequence[Group],
        function: Callable[[Array], Array],
        level: float,
        denominator: Callable[[Array], Array] | None = None,
    ) -> Estimate:
        """Any function of the groups' mean scores, linearised for the seeds' part.

        `function` and `denominator` take [groups, ...] and give [...]; no interval where the
        denominator may be zero.
        """
        means = np.array([self.scores(key, group).mean() for group in groups])
        drawn_means = np.stack([self.draws(key, group).mean(axis=0) for group in groups])
        for other in groups[1:]:  # where no unit tells them apart, they need not be alike
            drawn_means[0] += self._unseen(key, other, groups[0], drawn_means.shape[1])
        value = float(function(means))
        net, parts = 0.0, []
        for group, slope in zip(groups, _slopes(function, means), strict=True):
            if len(group) > 1:
                pure, raw = seed_variance(self.scores(key, group), self.draws(key, group))
                net += slope**2 * pure
                parts.append((slope**2 * raw, len(group) - 1))
        drawn, own = function(drawn_means), self._freedom(key, groups, function)
        if denominator is not None:
            below = denominator(drawn_means)
            below = below[~np.isnan(below)]
            if below.size == 0 or np.mean(below <= 0) > (1 - level) / 20:
                return self._estimate(key, groups, value, np.zeros(0), math.nan, 1.0, level)
        sampling = float(np.nanvar(drawn, ddof=1))
        variance = sampling + net
        if parts:
            own = pooled_freedom(variance, [(sampling, own), *parts])
            q = (np.arange(drawn.size) + 0.5) / drawn.size
            made = value + math.sqrt(variance) * special.stdtrit(own, q)
        else:
            made = stretched(drawn, value, own)
        return self._estimate(key, groups, value, made, math.sqrt(variance), own, level)

    def _estimate(
        self,
        key: str,
        groups: Sequence[Group],
        value: float,
        distribution: Array,
        error: float,
        freedom: float,
        level: float,
    ) -> Estimate:
        units = self.units(key)
        known = distribution.size > 0 and units >= FEWEST_UNITS
        return Estimate(
            value=value,
            interval=percentile_interval(distribution, level) if known else None,
            error=error,
            freedom=freedom,
            p=math.nan,
            seeds=tuple(len(group) for group in groups),
            holds_seeds=any(len(group) > 1 for group in groups),
            units=units,
            distribution=distribution,
        )

    def _unchanged(self, key: str, first: Group, second: Group) -> bool:
        """Whether no unit of any run differs."""
        if key == AVERAGE:
            return all(self._unchanged(task, first, second) for task in self.tasks)
        contents = self.tasks[key].contents
        return len({contents[run] for run in (*first, *second)}) == 1

    def _unseen(self, key: str, first: Group, second: Group, count: int) -> Array:
        """What benchmarks without any changed unit add to the difference, [count]."""
        added = np.zeros(count)
        tasks = self.tasks if key == AVERAGE else {key: self.tasks[key]}
        for name, task in tasks.items():
            if self._unchanged(name, first, second):
                generator = np.random.default_rng([task.units, len(name), *name.encode()])
                added += generator.permutation(unchanged_draws(task.units, count))
        return added / len(tasks)

    def _freedom(
        self, key: str, groups: Sequence[Group], function: Callable[[Array], Array]
    ) -> float:
        """Degrees of freedom of the documents' part: units - 1, pooled after Satterthwaite."""
        if key != AVERAGE:
            return float(max(self.tasks[key].units - 1, 1))
        variances, freedoms = [], []
        slopes = _slopes(function, np.array([self.scores(key, g).mean() for g in groups]))
        for name, task in self.tasks.items():
            means = np.stack([self.draws(name, group).mean(axis=0) for group in groups])
            variances.append(float(np.nanvar(slopes @ means)))
            freedoms.append(max(task.units - 1, 1))
        total = sum(v**2 / df for v, df in zip(variances, freedoms, strict=True))
        return sum(variances) ** 2 / total if total > 0 else float(max(sum(freedoms), 1))


def in_columns(
    kind: str, measures: "Sequence[Estimate | Measure | None]"
) -> dict[str, list[float]]:
    """Values and bounds as columns of a table: `kind`, `kind_low` and `kind_high`; NaN unknown."""
    name, spans = kind.replace(" ", "_"), [each and each.interval for each in measures]
    return {
        name: [each.value if each else math.nan for each in measures],
        f"{name}_low": [span.low if span else math.nan for span in spans],
        f"{name}_high": [span.high if span else math.nan for span in spans],
    }


def _slopes(function: Callable[[Array], Array], means: Array) -> Array:
    """Derivative of `function` by each group's mean score, [groups]."""
    step = 1e-4
    moved = means[:, None] + step * np.eye(len(means))
    back = means[:, None] - step * np.eye(len(means))
    return np.asarray((function(moved) - function(back)) / (2 * step))


# --- the page's headline -----------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What may be said in a headline: one method against the floor, on the average.

    Attributes:
        method: name of the group.
        difference: method minus floor; chosen from several methods, its interval is simultaneous
            over all of them (Bonferroni), and says that level.
        p: corrected over the methods that it was chosen from.
        candidates: how many methods it was chosen from; 1 for the one named as main.
        weights_only: a group has one seed: the claim is about these weights, training noise is
            unknown.
    """

    method: str
    difference: Estimate
    p: float
    candidates: int
    weights_only: bool

    @property
    def sentence(self) -> str:
        """The headline in words and numbers, with what limits it."""
        change, interval = self.difference, self.difference.interval
        assert interval is not None
        text = (
            f"{self.method} {'gains' if change.value > 0 else 'loses'} {abs(change.value):.1f} "
            f"points ({100 * interval.level:.3g} % interval {interval.low:+.1f} to "
            f"{interval.high:+.1f}"
        )
        text += f", holds over all {self.candidates} methods)" if self.candidates > 1 else ")"
        if self.weights_only:
            text += "; one training seed: of these weights, training noise is unknown"
        return text


def headline(
    evidence: Evidence,
    floor: Group,
    methods: Mapping[str, Group],
    main: str | None = None,
    alpha: float = 0.05,
) -> Claim | None:
    """The one claim that a page may open with, or None when nothing can be said.

    Of the recipe named as main, if its difference from the floor is real; else of the best of
    those methods whose gain holds simultaneously over every method of the page.
    """
    known = {
        name: group
        for name, group in methods.items()
        if main in (None, name) and evidence.has(AVERAGE, group, floor)
    }
    level = 1 - alpha / max(len(known), 1)
    claims = []
    for name, group in known.items():
        found = evidence.difference(AVERAGE, floor, group, level)
        real = found.interval is not None and (
            found.interval.low > 0 or (main is not None and found.interval.high < 0)
        )
        if real:
            p = min(found.p * len(known), 1.0)
            claims.append(Claim(name, found, p, len(known), found.one_seed))
    return max(claims, key=lambda claim: claim.difference.value, default=None)
