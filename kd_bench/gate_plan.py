"""Margins that a test set can carry: `kd-bench check --plan BASELINE [OTHER-SEED...]`.

An equal student passes 95 times in 100 when its margin is as large as what the test can rule out:
(z_level + z_pass) standard errors of the paired difference, which depend on the units of the test
set and on how many answers change between two equal students. That is measured between training
seeds where some are given, else assumed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
from scipy.special import ndtri

from kd_bench.aggregators import get_aggregator
from kd_bench.compare.align import AlignedTask, Resampled, evidence_of, label, resample
from kd_bench.compare.estimates import Evidence
from kd_bench.compare.methods import seeds_of_one_method
from kd_bench.errors import UsageError
from kd_bench.gate import counted, require_sound
from kd_bench.policy import Policy, judged
from kd_bench.records import AVERAGE
from kd_bench.stats import FEWEST_UNITS, seed_variance
from kd_bench.store import Run

# Share of answers that change between equal students where no second seed tells it.
ASSUMED_CHURN = 0.15
PASS = 0.95
# A little more than 95 in 100, so that 95 holds for the least of ten benchmarks.
FIND = 0.96
# Made-up equal students of a run that is alone.
TIMES = 6


@dataclass(frozen=True)
class PlanLine:
    """One benchmark, or the `average`; points on the 0-100 scale.

    Attributes:
        churn: share of items (documents or groups) that change between two equal students.
        error: standard error of their paired difference over test documents.
        seed_error: standard deviation of their true difference, from training noise; 0 unknown.
        margin: the smallest that passes an equal student 95 times in 100.
        found: the drop that ends in a regression 95 times in 100.
    """

    name: str
    units: int
    churn: float
    error: float
    seed_error: float
    margin: float
    found: float


@dataclass(frozen=True)
class Plan:
    """Margins for a suite, and the policy file that holds them; `warnings` are shown loudly."""

    baseline: str
    suite: str
    lines: list[PlanLine]
    notes: tuple[str, ...]
    policy: str
    warnings: tuple[str, ...] = ()

    def to_json(self) -> str:
        """JSON text with a format version."""
        return json.dumps({"format": 1, **asdict(self)}, indent=2, ensure_ascii=False)


def plan(baseline: Run, others: Sequence[Run], policy: Policy) -> Plan:
    """Margins that the baseline's stored units can carry.

    Args:
        others: further training seeds of the baseline's recipe; with two or more the training
            noise of the benchmarks is allowed for as well.

    Raises:
        UsageError: no benchmark has enough units, or the runs are not seeds of one method.
        NotComparableError, IncompleteRunError: `gate.check` would not judge these runs.
    """
    runs = [baseline, *others]
    seeds_of_one_method(runs)
    limits = require_sound(others, [baseline], policy)
    tasks, _ = counted(others, [baseline], policy)
    aligned = [
        judged(runs, task, policy) if others else _with_equals(baseline, task, policy)
        for task in tasks
    ]
    frames = [resample(each, policy.resamples, policy.seed) for each in aligned]
    few = [each.aligned.task for each in frames if len(each.aligned.units) < FEWEST_UNITS]
    known = [each for each in frames if each.aligned.task not in few]
    if not known:
        raise UsageError(
            f"No benchmark of {label(baseline)} has {FEWEST_UNITS} units.",
            "Evaluate more documents.",
        )
    evidence = evidence_of(known)
    keys = [*(each.aligned.task for each in known), AVERAGE]
    lines = [_line(key, known, evidence, bool(others), policy, len(keys)) for key in keys]
    suite = baseline.manifest.protocol.suite
    named = few or policy.benchmarks is not None
    text = _policy_text(suite, lines, policy, [*keys[:-1]] if named else [])
    warnings: tuple[str, ...] = ()
    if limited := [label(run) for run in runs if run.manifest.protocol.limit is not None]:
        warning = (
            f"LIMITED: {', '.join(limited)}. These margins are for equally limited runs; whole "
            "runs carry smaller ones, from a plan of their own."
        )
        warnings, text = (warning,), f"# {warning}\n{text}"
    notes = (*_notes(runs, few), *limits)
    return Plan(label(baseline), suite, lines, notes, text, warnings)


def _line(
    key: str,
    known: Sequence[Resampled],
    evidence: Evidence,
    measured: bool,
    policy: Policy,
    tests: int,
) -> PlanLine:
    """Errors over all pairs of seeds, and the margin and drop that follow from them."""
    count = len(known[0].scores)
    pairs = list(combinations(range(count), 2)) if measured else [(0, n) for n in range(1, count)]
    errors = [evidence.difference(key, [str(a)], [str(b)]).error for a, b in pairs]
    error = float(np.sqrt(np.mean(np.square(errors))))
    names = [str(number) for number in range(count)]
    net = 0.0
    if measured and count > 2:
        net = seed_variance(evidence.scores(key, names), evidence.draws(key, names))[0] * count
    seed_error = float(np.sqrt(2 * net))
    chosen = [task for task in known if key in (AVERAGE, task.aligned.task)]
    changed = [sum(sum(task.aligned.changes(*pair)) for task in chosen) for pair in pairs]
    churn = float(np.mean(changed)) / sum(task.aligned.items for task in chosen)
    # The average is tested alone at alpha; a benchmark at the first step of Holm, at worst.
    alone = key == AVERAGE and not policy.every
    level = policy.alpha if alone else policy.alpha / tests
    # An equal student is called worse somewhere in up to half of alpha: the average may lose that.
    passing = 1 - (1 - PASS) / 2 if alone else PASS
    z_level, z_pass, z_find, z_seen, z_last = (
        float(each)
        for each in ndtri([1 - level, passing, FIND, 1 - policy.alpha / 2 / tests,
                           1 - policy.alpha])
    )  # fmt: skip
    reach = float(np.hypot(error, seed_error))
    margin = _up(z_level * error + z_pass * reach)
    # A regression: a two-sided test after Holm, and no pass of the margin test at its last step.
    found = max(z_seen * error + z_find * reach, margin - z_last * error + z_find * reach)
    return PlanLine(key, evidence.units(key), churn, error, seed_error, margin, _up(found))


def _up(points: float) -> float:
    """Rounded up to a tenth of a point."""
    return float(np.ceil(round(points * 10, 6)) / 10)


def _notes(runs: Sequence[Run], few: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if len(runs) == 1:
        notes.append(
            f"No other seed was named: {ASSUMED_CHURN:.0%} of the answers are assumed to change "
            "between equal students, each by itself. `check --plan BASELINE OTHER-SEED` measures "
            "it."
        )
    elif len(runs) == 2:
        notes.append(
            "Churn is measured between two seeds; training noise of the scores is not allowed "
            "for: that needs a third seed."
        )
    else:
        notes.append(f"Churn and training noise are measured between {len(runs)} seeds.")
    if few:
        notes.append(
            f"Too few units for a margin: {', '.join(few)}. The policy names the others as those "
            "that count."
        )
    return tuple(notes)


def _policy_text(
    suite: str, lines: Sequence[PlanLine], policy: Policy, named: Sequence[str]
) -> str:
    """The policy file to paste; `named` are the benchmarks that count where not all do."""
    *benchmarks, average = lines
    tasks = ", ".join(f"{each.name}: {each.margin:g}" for each in benchmarks)
    rule = "every: true\n" if policy.every else ""
    rule += f"benchmarks: [{', '.join(named)}]\n" if named else ""
    scores = ", ".join(f"{task}: {score}" for task, score in policy.score.items())
    rule += f"score: {{{scores}}}\n" if scores else ""
    return (
        f"alpha: {policy.alpha:g}\n{rule}margins:\n  {suite}:\n    average: {average.margin:g}\n"
        f"    default: {max(each.margin for each in benchmarks):g}\n    tasks: {{{tasks}}}\n"
    )


def _with_equals(run: Run, task: str, policy: Policy) -> AlignedTask:
    """The run and students that are right as often, each with `ASSUMED_CHURN` of items changed.

    A changed document (where groups are scored as a whole: a group) swaps between right and
    wrong, as many each way on average.
    """
    alone = judged([run], task, policy)
    rng = np.random.default_rng([policy.seed, len(alone.units)])
    frame = alone.samples[0]
    whole = get_aggregator(alone.aggregator).item == "unit"
    units = frame["unit_id"].astype(str).to_numpy()
    item = np.unique(units, return_inverse=True)[1] if whole else np.arange(len(frame))
    score = frame["score"].to_numpy(dtype=np.float64)
    right = np.ones(item.max() + 1, dtype=bool)
    np.logical_and.at(right, item, score >= (1.0 if whole else 0.5))
    share = right.mean()
    rate = np.where(right, 0.5 / max(share, 1e-9), 0.5 / max(1 - share, 1e-9))
    # POPE's F1 reads answers: yes and no change places.
    parsed = frame["parsed"].astype(str)
    other = parsed.str.lower().map({"yes": "no", "no": "yes"})
    made = [frame]
    for _ in range(TIMES):
        rows = (rng.random(len(right)) < np.minimum(ASSUMED_CHURN * rate, 1.0))[item]
        new = np.where(rows, np.where(right[item], 0.0, 1.0), score)
        swapped = parsed.where(~rows | other.isna(), other)
        made.append(frame.assign(score=new, parsed=swapped))
    return AlignedTask.of(task, alone.aggregator, made)
