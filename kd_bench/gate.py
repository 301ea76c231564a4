"""The gate: a policy and two runs -> verdicts and one exit code.

A benchmark is *equal within margin* when a drop as large as its margin can be ruled out,
*improved* or *regressed* when the difference is real, *inconclusive* otherwise. Every claim is
corrected over the benchmarks and their average after Holm.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from kd_bench.compare.align import align, common_tasks, label, numeric_notes
from kd_bench.compare.differences import (
    Difference,
    Resampled,
    average_difference,
    resample,
    task_difference,
    with_holm,
)
from kd_bench.errors import ExitCode, IncompleteRunError
from kd_bench.policy import CostLimits, Margins, Policy, Retention
from kd_bench.records import AVERAGE
from kd_bench.stats import NonInferiority, non_inferiority, ratio_interval
from kd_bench.store import Run, find_run

__all__ = ["GateReport", "RuleOutcome", "Verdict", "check", "judge"]

# Stored samples must give the stored score back, up to upstream's rounding (points).
ROUNDING = 0.05

VerdictName = Literal["improved", "equal within margin", "regressed", "inconclusive"]
RuleState = Literal["passed", "failed", "inconclusive", "not checked"]


@dataclass(frozen=True)
class Verdict:
    """What the gate says about one benchmark, or about their `average`.

    Attributes:
        difference: candidate minus baseline, with its two-sided interval and p.
        non_inferiority: its one-sided test against the margin.
        real_drop: the drop is significant; with "equal within margin" it is a small one.
        advisory: shown, decides nothing.
    """

    name: str
    verdict: VerdictName
    baseline: float
    candidate: float
    difference: Difference
    non_inferiority: NonInferiority
    documents: int
    real_drop: bool
    advisory: bool = False

    @property
    def sentence(self) -> str:
        """The verdict in words and numbers."""
        test, change = self.non_inferiority, self.difference
        text = (
            f"{self.name} {self.verdict}: {self.baseline:.1f} -> {self.candidate:.1f} "
            f"({change.value:+.2f}, {change.span}); "
            f"margin {test.margin:g}, bound {test.bound:+.2f}"
        )
        if self.verdict == "inconclusive":
            text += f"; this test set finds differences of {change.detectable:.1f} points"
        elif self.real_drop and self.verdict == "equal within margin":
            text += "; a real drop, smaller than the margin"
        return text + "."


@dataclass(frozen=True)
class RuleOutcome:
    """A further rule of the policy and how it came out."""

    name: str
    state: RuleState
    sentence: str


@dataclass(frozen=True)
class GateReport:
    """Everything that the table, the JUnit file, the job summary and the exit code say."""

    candidate: str
    baseline: str
    suite: str
    alpha: float
    verdicts: list[Verdict]
    rules: list[RuleOutcome]
    notes: list[str]

    @property
    def exit_code(self) -> ExitCode:
        """Any regression or failed rule: 1; else anything undecided: 3; else 0."""
        deciding = [each.verdict for each in self.verdicts if not each.advisory]
        states = [each.state for each in self.rules]
        if "regressed" in deciding or "failed" in states:
            return ExitCode.REGRESSION
        if "inconclusive" in deciding or "inconclusive" in states:
            return ExitCode.INCONCLUSIVE
        return ExitCode.PASS

    @property
    def outcome(self) -> str:
        """The exit code in words."""
        return {
            ExitCode.PASS: "pass",
            ExitCode.REGRESSION: "regression",
            ExitCode.INCONCLUSIVE: "cannot tell",
        }[self.exit_code]

    def to_json(self) -> str:
        """JSON text with a format version."""
        body = {"format": 1, "outcome": self.outcome, "exit_code": int(self.exit_code)}
        return json.dumps({**body, **asdict(self)}, indent=2, ensure_ascii=False)


def check(candidate: Run, baseline: Run, policy: Policy) -> GateReport:
    """Has the candidate regressed against the baseline?

    Raises:
        NotComparableError: the runs measured different things.
        IncompleteRunError: a run is partial or unhealthy, or lacks a benchmark of the baseline.
        UsageError: the policy does not fit the runs.
    """
    margins = policy.margins_for(candidate.manifest.protocol.suite)
    notes = _require_sound(candidate, baseline, policy)
    tasks = common_tasks([baseline, candidate])
    sampled = [_resample(baseline, candidate, task, policy) for task in tasks]
    verdicts = judge(sampled, margins, policy)
    return GateReport(
        candidate=label(candidate),
        baseline=label(baseline),
        suite=candidate.manifest.protocol.suite,
        alpha=policy.alpha,
        verdicts=verdicts,
        rules=_rules(candidate, baseline, policy, tasks, verdicts[-1]),
        notes=notes,
    )


def judge(sampled: Sequence[Resampled], margins: Margins, policy: Policy) -> list[Verdict]:
    """Verdicts on resampled benchmarks of (baseline, candidate) and, last, on their average."""
    tasks = [each.aligned.task for each in sampled]
    differences = _differences(sampled, policy.seed)
    draws = [each.draws[1] - each.draws[0] for each in sampled]
    draws.append(np.mean(draws, axis=0))
    allowed = [margins.tasks.get(task, margins.default) for task in tasks] + [margins.average]
    tests = non_inferiority(draws, allowed, policy.alpha)
    scores = [each.scores for each in sampled]
    scores.append(np.mean(scores, axis=0))
    documents = [len(each.aligned.samples[0]) for each in sampled]
    documents.append(sum(documents))
    return [
        Verdict(
            name=name,
            verdict=_verdict(difference, test, policy.alpha),
            baseline=float(score[0]),
            candidate=float(score[1]),
            difference=difference,
            non_inferiority=test,
            documents=count,
            real_drop=difference.value < 0 and difference.p_holm <= policy.alpha,
            advisory=name in policy.advisory,
        )
        for name, difference, test, score, count in zip(
            [*tasks, AVERAGE], differences, tests, scores, documents, strict=True
        )
    ]


def _verdict(difference: Difference, test: NonInferiority, alpha: float) -> VerdictName:
    """The one rule. Two runs that answer alike everywhere are equal under any margin."""
    real = difference.p_holm <= alpha
    if real and difference.value > 0:
        return "improved"
    same = difference.fixed == difference.broken == 0 and difference.value == 0
    if test.passed or same:
        return "equal within margin"
    return "regressed" if real else "inconclusive"


def _differences(sampled: Sequence[Resampled], seed: int) -> list[Difference]:
    """Of every benchmark and, last, of the average; Holm over all of them."""
    nulls = [each.null_draws(0, 1, seed) for each in sampled]
    found = [task_difference(each, 0, 1, null) for each, null in zip(sampled, nulls, strict=True)]
    return with_holm([*found, average_difference(list(sampled), nulls, 0, 1)])


def _resample(baseline: Run, candidate: Run, task: str, policy: Policy) -> Resampled:
    """Bootstrap one benchmark after its samples have given the stored scores back."""
    sampled = resample(align([baseline, candidate], task), policy.resamples, policy.seed)
    for run, score in zip((baseline, candidate), sampled.scores, strict=True):
        if np.isnan(score):
            raise IncompleteRunError(
                f"{task} of {label(run)} has too few documents to score.", "Raise --limit."
            )
        stored = run.result(task).score
        if not abs(stored - score) <= ROUNDING:
            raise IncompleteRunError(
                f"{task} of {label(run)}: the stored samples give {score:.2f}, the stored score "
                f"is {stored:.2f}.",
                "Delete the task's .json in the run folder and run the same eval command again.",
            )
    return sampled


# --- before and beside the verdicts ------------------------------------------------------------


def _require_sound(candidate: Run, baseline: Run, policy: Policy) -> list[str]:
    """Refuse partial and unhealthy runs; what remains worth a note comes back."""
    for run in (candidate, baseline):
        status = run.manifest.status
        if status != "complete":
            why = f" ({run.manifest.notes[0]})" if run.manifest.notes else ""
            raise IncompleteRunError(
                f"{label(run)} is {'not finished' if status == 'running' else status}{why}.",
                "Finish it with the same eval command, or look at its errors.",
            )
    done, expected = candidate.results(), baseline.results()
    common_tasks([baseline, candidate])
    missing = [task for task in expected if task not in done]
    if missing:
        raise IncompleteRunError(
            f"{label(candidate)} lacks {', '.join(missing)}, which the baseline has.",
            "Evaluate it on the same benchmarks.",
        )
    for run, results in ((candidate, done), (baseline, expected)):
        for task, result in results.items():
            for kind, limit in policy.health:
                rate = result.rates.get(kind)
                if limit is not None and rate is not None and rate > limit:
                    raise IncompleteRunError(
                        f"{task} of {label(run)} is unhealthy: {rate:.1%} of its answers are "
                        f"{kind}, the policy allows {limit:.1%}.",
                        "Look at those answers, then evaluate again or raise health in the policy.",
                    )
    notes = [
        f"{task}: the baseline does not have it; not checked." for task in done.keys() - expected
    ]
    notes += numeric_notes([baseline, candidate])
    limit = candidate.manifest.protocol.limit
    if limit is not None:
        notes.append(f"Only the first {limit} documents of every benchmark were evaluated.")
    return sorted(notes)


def _rules(
    candidate: Run, baseline: Run, policy: Policy, tasks: list[str], average: Verdict
) -> list[RuleOutcome]:
    """The policy's further rules, in the order of the policy file."""
    rules = []
    if policy.retention is not None:
        rules.append(_retention_rule(candidate, policy, policy.retention, tasks))
    if policy.broken_per_thousand is not None:
        rate = 1000 * average.difference.broken / average.documents
        budget = policy.broken_per_thousand
        rules.append(
            RuleOutcome(
                "broken answers",
                "failed" if rate > budget else "passed",
                f"{average.difference.broken} of {average.documents:,} documents broke: "
                f"{rate:.1f} in a thousand, budget {budget:g}.",
            )
        )
    return rules + _cost_rules(candidate, baseline, policy.cost)


def _retention_rule(
    candidate: Run, policy: Policy, rule: Retention, tasks: list[str]
) -> RuleOutcome:
    teacher = find_run(candidate.path.parents[1], rule.teacher)
    shared = common_tasks([teacher, candidate])
    missing = [task for task in tasks if task not in shared]
    if missing:
        raise IncompleteRunError(
            f"The teacher {label(teacher)} lacks {', '.join(missing)}.",
            "Evaluate it on the same benchmarks, or drop `retention` from the policy.",
        )
    sampled = [
        resample(align([teacher, candidate], task), policy.resamples, policy.seed) for task in tasks
    ]
    scores = np.mean([each.scores for each in sampled], axis=0)
    draws = np.mean([each.draws for each in sampled], axis=0)
    interval = ratio_interval(draws[1], draws[0], 1 - 2 * policy.alpha)
    low, high = (interval.low, interval.high) if interval else (-np.inf, np.inf)
    state: RuleState = "inconclusive"
    if low >= rule.floor:
        state = "passed"
    elif high < rule.floor:
        state = "failed"
    return RuleOutcome(
        "retention",
        state,
        f"{scores[1] / scores[0]:.1%} of {teacher.manifest.model.name}'s average "
        f"({low:.1%} to {high:.1%}), floor {rule.floor:.1%}.",
    )


def _cost_rules(candidate: Run, baseline: Run, limits: CostLimits) -> list[RuleOutcome]:
    new, old = candidate.manifest, baseline.manifest
    same_hardware = new.provenance.get("hardware") == old.provenance.get("hardware") is not None
    rules = []
    for name, limit in limits:
        if limit is None:
            continue
        title = name.removesuffix("_ms").removesuffix("_bytes").replace("_", " ")
        a, b = getattr(old.cost, name), getattr(new.cost, name)
        timed = name in ("latency_ms", "peak_memory_bytes")
        if not a or b is None:
            rules.append(RuleOutcome(title, "not checked", f"{title} was not measured in both."))
        elif timed and not same_hardware:
            rules.append(
                RuleOutcome(title, "not checked", f"{title}: the runs are of other hardware.")
            )
        else:
            state: RuleState = "failed" if b / a > limit else "passed"
            sentence = f"{title} is {b / a:.2f} x the baseline's, limit {limit:g} x."
            rules.append(RuleOutcome(title, state, sentence))
    return rules
