"""The gate: a policy and two models (or methods, over their seeds) -> verdicts and one exit code.

A benchmark is *not worse than the margin* when a drop as large as its margin can be ruled out,
*improved* or *regressed* when the difference is real, *inconclusive* otherwise.

    pass        the average is not worse than its margin, and no benchmark is shown worse
    regression  a benchmark or the average is regressed, or a further rule failed
    cannot tell the rest

With `every: true` in the policy each benchmark must be shown not worse, not only the average.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kd_bench.compare.align import (
    Difference,
    Resampled,
    align,
    ambiguous,
    common_tasks,
    evidence_of,
    label,
    numeric_notes,
    paired_difference,
    resample,
    with_holm,
)
from kd_bench.compare.estimates import Estimate
from kd_bench.compare.methods import seeds_of_one_method, training_noise
from kd_bench.errors import ExitCode, IncompleteRunError, NotComparableError, UsageError
from kd_bench.policy import (
    Margins,
    Policy,
    RuleOutcome,
    judge_rules,
    judged,
    require_teacher,
)
from kd_bench.records import AVERAGE, Interval
from kd_bench.stats import (
    NonInferiority,
    holm_levels,
    non_inferiority,
    percentile_interval,
    unchanged_draws,
)
from kd_bench.store import Run, cautions, suite_tasks

# Stored samples must give the stored score back, up to upstream's rounding (points).
ROUNDING = 0.05

NOT_WORSE = "not worse than the margin"
VerdictName = Literal["improved", "not worse than the margin", "regressed", "inconclusive"]


@dataclass(frozen=True)
class Verdict:
    """What the gate says about one benchmark, or about their `average`.

    Attributes:
        difference: candidate minus baseline, with its two-sided 95 % interval and p.
        non_inferiority: its one-sided test against the margin.
        real_drop: the drop is significant; with "not worse than the margin" it is a small one.
        advisory: shown, decides nothing.
        corrected: the two-sided interval at the level that Holm gave the test of the difference;
            it excludes zero when the difference is real.
        units: what was resampled: images, pairs, groups or documents.
        same: both gave the same answer to every document of every benchmark.
        score: what was judged: `upstream`, `content`, or, of an average, `mixed`.
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
    corrected: Interval | None = None
    units: int = 0
    same: bool = False
    score: str = "upstream"

    @property
    def title(self) -> str:
        """The name, with the score that was judged where it is not upstream's."""
        said = {"upstream": "", "content": " (by content)", "mixed": " (partly by content)"}
        return self.name + said[self.score]

    @property
    def decided_by(self) -> str:
        """The interval or bound that the verdict rests on, with its level."""
        test = self.non_inferiority
        if self.same:
            return "the same answers"
        if self.difference.interval is None:
            return self.difference.span
        if self.verdict == NOT_WORSE:
            return f"above {test.bound:+.1f} ({_percent(1 - test.level)}, one-sided)"
        if self.corrected is None:
            return self.difference.span
        low, high = self.corrected.low, self.corrected.high
        return f"{low:+.1f} to {high:+.1f} ({_percent(self.corrected.level)})"

    @property
    def sentence(self) -> str:
        """The verdict in words and numbers."""
        test, change = self.non_inferiority, self.difference
        text = (
            f"{self.title} {self.verdict}: {self.baseline:.1f} -> {self.candidate:.1f} "
            f"({change.value:+.2f}; {self.decided_by}; p {_probability(change.p_holm)} after "
            f"Holm); margin {test.margin:g}, bound {test.bound:+.2f} "
            f"({_percent(1 - test.level)}, one-sided); {self.units:,} units"
        )
        if self.verdict == "inconclusive" and change.detectable is not None:
            z = NormalDist().inv_cdf
            kept = (z(1 - test.level) + z(0.8)) * change.standard_error
            text += (
                f"; four times in five these units find a drop of {change.detectable:.1f} points "
                f"after Holm, and show an equal model not worse than {kept:.1f}"
            )
        elif self.real_drop and self.verdict == NOT_WORSE:
            text += "; a real drop, smaller than the margin"
        return text + "."


def _percent(level: float) -> str:
    return f"{100 * level:.3g} %"


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


@dataclass(frozen=True)
class GateReport:
    """Everything that the table, the JUnit file, the job summary and the exit code say.

    Attributes:
        candidate_runs, baseline_runs: run folders of each side.
        every: the policy wants every benchmark shown not worse.
        about: `these weights`, or `this recipe` where both sides have several seeds.
        policy, policy_digest: which policy judged.
        warnings: what a reader must know before believing the verdict.
    """

    candidate: str
    baseline: str
    suite: str
    alpha: float
    verdicts: list[Verdict]
    rules: list[RuleOutcome]
    notes: list[str]
    every: bool = False
    about: str = "these weights"
    policy: str = ""
    policy_digest: str = ""
    warnings: tuple[str, ...] = ()
    candidate_runs: tuple[str, ...] = ()
    baseline_runs: tuple[str, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        """Any regression or failed rule: 1; else anything undecided that decides: 3; else 0."""
        deciding = [each for each in self.verdicts if not each.advisory]
        states = [each.state for each in self.rules]
        if "regressed" in (each.verdict for each in deciding) or "failed" in states:
            return ExitCode.REGRESSION
        averages = [each for each in deciding if each.name == AVERAGE]
        must = averages if averages and not self.every else deciding
        if "inconclusive" in (each.verdict for each in must) or "inconclusive" in states:
            return ExitCode.INCONCLUSIVE
        return ExitCode.PASS

    @property
    def outcome(self) -> str:
        """The exit code in words."""
        words = {ExitCode.PASS: "pass", ExitCode.REGRESSION: "regression"}
        return words.get(self.exit_code, "cannot tell")

    @property
    def statement(self) -> str:
        """What the outcome says, about what, and under which policy."""
        by = {
            name: [each.name for each in self.verdicts if each.verdict == name]
            for name in ("regressed", "inconclusive")
        }
        averaged = any(each.name == AVERAGE for each in self.verdicts)
        rule = (
            f"every benchmark{' and the average' * averaged} must be shown not worse than the "
            "margin"
            if self.every
            else "the average must be shown not worse than its margin, and no benchmark worse"
        )
        text = f"{self.outcome}, about {self.about}: {rule} (error rate {self.alpha:g}, Holm)."
        if by["regressed"]:
            text += f" Shown worse: {', '.join(by['regressed'])}."
        if by["inconclusive"]:
            text += f" Cannot tell: {', '.join(by['inconclusive'])}."
        tasks = [each for each in self.verdicts if each.name != AVERAGE]
        said = [each.name for each in tasks if each.score == "content"]
        if said:
            whole = "every benchmark" if len(said) == len(tasks) else ", ".join(said)
            text += f" Judged by content: {whole}."
        return text

    @property
    def title(self) -> str:
        """Both sides, with the runs of a side that has several."""
        sides = ((self.candidate, self.candidate_runs), (self.baseline, self.baseline_runs))
        return " against ".join(
            f"{name}: {', '.join(runs)}" if len(runs) > 1 else name for name, runs in sides
        )

    @property
    def policy_line(self) -> str:
        """Name and digest of the policy."""
        return f"Policy: {self.policy or 'given in code'}, digest {self.policy_digest[:12]}."

    def to_json(self) -> str:
        """JSON text with a format version."""
        body = {
            "format": 1,
            "outcome": self.outcome,
            "exit_code": int(self.exit_code),
            "statement": self.statement,
        }
        return json.dumps({**body, **asdict(self)}, indent=2, ensure_ascii=False)


def check(
    candidate: Run | Sequence[Run], baseline: Run | Sequence[Run], policy: Policy
) -> GateReport:
    """Has the candidate regressed against the baseline?

    Several runs on a side are the training seeds of one method: the verdict is then about the
    method, over seeds and documents.

    Raises:
        NotComparableError: the runs measured different things, or a part of the suite that the
            policy does not name.
        IncompleteRunError: a run is partial or unhealthy, or lacks a benchmark of the baseline.
        UsageError: the policy does not fit the runs, or seeds are not of one method.
    """
    new, old = ([side] if isinstance(side, Run) else list(side) for side in (candidate, baseline))
    for side in (new, old):
        seeds_of_one_method(side)
    suite = new[0].manifest.protocol.suite
    require_teacher(new, policy)
    margins = policy.margins_for(suite)
    notes = require_sound(new, old, policy)
    tasks, whole = counted(new, old, policy)
    averaged = whole and policy.benchmarks is None
    if not averaged and set(tasks) <= set(policy.advisory):
        raise UsageError(
            f"Under this policy no benchmark decides: {', '.join(tasks)} are advisory.",
            "Take one out of `advisory`, or count another in `benchmarks`.",
        )
    if not whole:  # an average of fewer benchmarks is none: each of them must hold
        policy = policy.model_copy(update={"every": True})
    _require_resamples(len(tasks) + 1, policy)
    sampled = [_resample([*old, *new], task, policy) for task in tasks]
    verdicts = judge(sampled, margins, policy, split=len(old))
    verdicts = [verdict for verdict in verdicts if whole or verdict.name != AVERAGE]
    over_seeds = min(len(old), len(new)) > 1
    return GateReport(
        candidate=_title(new),
        baseline=_title(old),
        candidate_runs=tuple(run.path.name for run in new),
        baseline_runs=tuple(run.path.name for run in old),
        suite=suite,
        alpha=policy.alpha,
        verdicts=verdicts,
        rules=judge_rules(new, old, policy, tasks, sampled),
        notes=notes + _upstream_beside(new, old, policy, tasks) + ambiguous([*old, *new], sampled),
        every=policy.every,
        about="this recipe" if over_seeds else "these weights",
        policy=policy.source,
        policy_digest=policy.digest,
        warnings=tuple(training_noise(new, old)),
    )


def _upstream_beside(
    new: Sequence[Run], old: Sequence[Run], policy: Policy, tasks: Sequence[str]
) -> list[str]:
    """Upstream's scores of the benchmarks that were judged by content."""
    found = []
    for task in (task for task in tasks if policy.score_of(task) == "content"):
        before, after = (np.mean([run.result(task).score for run in side]) for side in (old, new))
        found.append(f"{task} {before:.1f} -> {after:.1f} ({after - before:+.2f})")
    return (
        [f"Upstream's scores of what was judged by content: {', '.join(found)}."] if found else []
    )


def _require_resamples(tests: int, policy: Policy) -> None:
    """Refuse a policy whose alpha no p can reach: of R draws p is never below 1 / (R + 1).

    Raises:
        UsageError: the first step of Holm over all tests is out of reach.
    """
    needed = math.ceil(tests / policy.alpha - 1e-9) - 1
    if policy.resamples < needed:
        raise UsageError(
            f"With {policy.resamples:,} resamples no p of {tests} tests falls to alpha "
            f"{policy.alpha:g} after Holm: nothing could be shown.",
            f"Set resamples: {needed} or more in the policy.",
        )


def _title(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return label(runs[0])
    return f"{runs[0].manifest.model.method} ({len(runs)} seeds)"


def judge(
    sampled: Sequence[Resampled], margins: Margins, policy: Policy, split: int = 1
) -> list[Verdict]:
    """Verdicts on resampled benchmarks and, last, on their average.

    The first `split` runs of each benchmark are the baseline's seeds, the others the candidate's.
    """
    tasks = [each.aligned.task for each in sampled]
    names = [str(number) for number in range(len(sampled[0].scores))]
    old, new = names[:split], names[split:]
    nulls = None
    if len(names) == 2:
        nulls = {each.aligned.task: each.null_draws(0, 1, policy.seed) for each in sampled}
    evidence, keys = evidence_of(sampled), [*tasks, AVERAGE]
    found = [evidence.difference(key, old, new) for key in keys]
    differences = with_holm([paired_difference(sampled, key, old, new, nulls) for key in keys])
    levels = holm_levels([each.p for each in differences], policy.alpha)
    allowed = [margins.tasks.get(task, margins.default) for task in tasks] + [margins.average]
    tests = _margin_tests(found, allowed, policy)
    scores = [each.scores for each in sampled]
    scores.append(np.mean(scores, axis=0))
    documents = [len(each.aligned.samples[0]) for each in sampled]
    documents.append(sum(documents))
    alike = _same_answers(sampled)
    verdicts = []
    for number, name in enumerate(keys):
        difference, one = differences[number], found[number]
        baseline, candidate = scores[number][:split].mean(), scores[number][split:].mean()
        # A benchmark that nobody gets right (or wrong) says nothing, the same answers or not.
        same = alike and 0 < baseline < 100
        verdicts.append(
            Verdict(
                name=name,
                verdict=_verdict(difference, tests[number], policy.alpha, same),
                baseline=float(baseline),
                candidate=float(candidate),
                difference=difference,
                non_inferiority=tests[number],
                documents=documents[number],
                real_drop=difference.value < 0 and difference.p_holm <= policy.alpha,
                advisory=name in policy.advisory,
                corrected=None
                if one.interval is None
                else percentile_interval(one.distribution, 1 - levels[number]),
                units=one.units,
                same=same,
                score=_judged_score(tasks if name == AVERAGE else [name], policy),
            )
        )
    return verdicts


def _judged_score(tasks: Sequence[str], policy: Policy) -> str:
    found = {policy.score_of(task) for task in tasks}
    return found.pop() if len(found) == 1 else "mixed"


def _verdict(difference: Difference, test: NonInferiority, alpha: float, same: bool) -> VerdictName:
    """The one rule. Two models that answer alike everywhere are equal under any margin."""
    real = difference.p_holm <= alpha and difference.interval is not None
    if real and difference.value > 0:
        return "improved"
    if test.passed or same:
        return "not worse than the margin"
    return "regressed" if real else "inconclusive"


def _margin_tests(
    found: Sequence[Estimate], margins: Sequence[float], policy: Policy
) -> list[NonInferiority]:
    """Tests of drops against margins, the average's last.

    Holm over all of them. By default the average alone decides, so it is tested alone, at alpha;
    the benchmarks' tests only word a verdict and excuse a real drop smaller than the margin.
    """
    draws = [_drops(each) for each in found]
    tests = non_inferiority(draws, margins, policy.alpha)
    if policy.every:
        return tests
    return [*tests[:-1], *non_inferiority(draws[-1:], margins[-1:], policy.alpha)]


def _drops(found: Estimate) -> NDArray[np.float64]:
    """Draws whose lower quantiles bound a drop; nothing is ruled out with too few units."""
    count = found.distribution.size
    if found.too_few:
        return np.full(max(count, 1), -100.0)
    if found.unchanged:
        return unchanged_draws(found.units, count, exact=True)
    return found.distribution


def _same_answers(sampled: Sequence[Resampled]) -> bool:
    """Whether all runs gave the same understood answer to every document of every benchmark."""
    for one in sampled:
        first, *others = one.aligned.samples
        if "parsed" not in first.columns:
            return False
        told = ["parsed", "score"]
        if not all((frame[told].to_numpy() == first[told].to_numpy()).all() for frame in others):
            return False
    return True


def _resample(runs: Sequence[Run], task: str, policy: Policy) -> Resampled:
    """Bootstrap one benchmark after its samples have given the stored scores back."""
    sampled = resample(judged(runs, task, policy), policy.resamples, policy.seed)
    upstream = sampled.scores if policy.score_of(task) == "upstream" else align(runs, task).scores
    for run, score in zip(runs, upstream, strict=True):
        if np.isnan(score):
            raise IncompleteRunError(
                f"{task} of {label(run)} has too few documents to score.",
                "Evaluate it with a larger `eval --limit`.",
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


def require_sound(new: Sequence[Run], old: Sequence[Run], policy: Policy) -> list[str]:
    """Refuse partial and unhealthy runs; what remains worth a note comes back."""
    for run in (*new, *old):
        status = run.manifest.status
        if status != "complete":
            why = f" ({run.manifest.notes[0]})" if run.manifest.notes else ""
            raise IncompleteRunError(
                f"{label(run)} is {'not finished' if status == 'running' else status}{why}.",
                "Finish it with the same eval command, or look at its errors.",
            )
    results = {run.path: run.results() for run in (*new, *old)}
    if len(results) > 1:
        common_tasks([*old, *new])
    expected = dict.fromkeys(task for run in old for task in results[run.path])
    if policy.benchmarks is not None:
        expected = dict.fromkeys(policy.benchmarks)
    for run in (*new, *old):
        missing = [task for task in expected if task not in results[run.path]]
        if missing:
            raise IncompleteRunError(
                f"{label(run)} lacks {', '.join(missing)}, which "
                f"{'the baseline has' if policy.benchmarks is None else 'the policy counts'}.",
                "Evaluate it on the same benchmarks.",
            )
    for run in (*new, *old):
        for task, result in results[run.path].items():
            for kind, limit in policy.health:
                rate = result.rates.get(kind)
                if limit is not None and rate is not None and rate > limit:
                    raise IncompleteRunError(
                        f"{task} of {label(run)} is unhealthy: {rate:.1%} of its answers are "
                        f"{kind}, the policy allows {limit:.1%}.",
                        "Look at those answers, then evaluate again or raise health in the policy.",
                    )
    notes = [
        *numeric_notes([*old, *new]),
        *(line for run in (*new, *old) for line in cautions(run)),
    ]
    return sorted(dict.fromkeys(notes))


def counted(new: Sequence[Run], old: Sequence[Run], policy: Policy) -> tuple[list[str], bool]:
    """The benchmarks that are judged, and whether they are the whole suite.

    Raises:
        NotComparableError: some are missing on a side, and the policy does not name those that
            count.
    """
    runs = [*old, *new]
    common = common_tasks(runs) if len(runs) > 1 else runs[0].done_tasks()
    suite = dict.fromkeys(task for run in runs for task in suite_tasks(run.manifest))
    suite |= dict.fromkeys(task for run in runs for task in run.done_tasks())
    if policy.benchmarks is not None:
        counted = [task for task in common if task in policy.benchmarks]
        return counted, len(counted) == len(suite)
    if len(common) < len(suite):
        fewest = min(runs, key=lambda run: len(run.done_tasks()))
        raise NotComparableError(
            f"{label(fewest)} has {len(fewest.done_tasks())} of {len(suite)} benchmarks; a verdict "
            "is about the whole suite.",
            "Evaluate the others too, or name those that count in the policy: "
            f"benchmarks: [{', '.join(common)}].",
        )
    return common, True
