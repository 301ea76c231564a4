"""The gate's policy: margins by suite, and the further rules that a candidate must keep."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field, PrivateAttr, field_validator

from kd_bench import config, registry
from kd_bench.compare.align import (
    CONTENT_READ,
    AlignedTask,
    Resampled,
    align,
    common_tasks,
    evidence_of,
    has_content,
    label,
    resample,
)
from kd_bench.config import StrictModel
from kd_bench.errors import IncompleteRunError, UsageError, closest
from kd_bench.files import digest_text
from kd_bench.records import AVERAGE
from kd_bench.store import Run, find_run

Share = Annotated[float, Field(ge=0, le=1)]
Points = Annotated[float, Field(ge=0, le=100)]


class Margins(StrictModel):
    """Drops that are tolerated, in points on the 0-100 scale.

    Attributes:
        average: for the mean over benchmarks.
        default: for a benchmark that `tasks` does not name.
    """

    average: Points
    default: Points
    tasks: dict[str, Points] = Field(default={})


class Retention(StrictModel):
    """Candidate / teacher on the average must not fall below `floor`, a share: 0.9 is 90 %."""

    teacher: str
    floor: float = Field(gt=0)

    @field_validator("floor")
    @classmethod
    def _is_a_share(cls, floor: float) -> float:
        if floor > 1.5:
            raise ValueError(
                f"{floor:g} would be {100 * floor:g} % of the teacher; "
                f"a share is meant, {floor / 100:g} for {floor:g} %"
            )
        return floor


class HealthLimits(StrictModel):
    """Largest shares of answers that errored, were empty, cut off or not understood."""

    error: Share | None = None
    empty: Share | None = None
    truncated: Share | None = None
    unparsed: Share | None = None


class CostLimits(StrictModel):
    """Largest candidate / baseline ratios; timed ones only count on identical hardware."""

    parameters: float | None = Field(default=None, gt=0)
    weight_bytes: float | None = Field(default=None, gt=0)
    latency_ms: float | None = Field(default=None, gt=0)
    peak_memory_bytes: float | None = Field(default=None, gt=0)


ScoreName = Literal["upstream", "content"]
SCORES: tuple[str, ...] = get_args(ScoreName)


class Policy(StrictModel):
    """What `check` tolerates.

    Attributes:
        alpha: error rate of each kind of claim over all benchmarks together; one-sided for
            "not worse than the margin", two-sided for "improved" and "regressed".
        every: each benchmark must be shown not worse than its margin, not only the average.
        margins: by suite; `default` serves every other suite.
        benchmarks: those that count, where it is not the whole suite: each must be shown not
            worse, and there is no average.
        advisory: benchmarks whose verdict is shown and decides nothing.
        score: what is judged, `upstream` (the benchmark's own score) or `content` (what the
            answers say, whatever their form): one word, or by benchmark and `default`.
        broken_per_thousand: budget of documents that broke minus those that were mended; the
            rule fails when the interval of that net number lies above.
    """

    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    resamples: int = Field(default=10_000, ge=1_000, le=1_000_000)
    seed: int = Field(default=0, ge=0)
    every: bool = False
    margins: dict[str, Margins]
    benchmarks: list[str] | None = Field(default=None, min_length=1)
    advisory: list[str] = Field(default=[])
    score: dict[str, ScoreName] = Field(default={})
    retention: Retention | None = None
    broken_per_thousand: float | None = Field(default=None, ge=0)
    health: HealthLimits = Field(default=HealthLimits())
    cost: CostLimits = Field(default=CostLimits())

    _source: str = PrivateAttr(default="")

    @field_validator("score", mode="before")
    @classmethod
    def _names_a_score(cls, score: Any) -> Any:
        by_task = {"default": score} if isinstance(score, str) else score
        if not isinstance(by_task, dict):
            raise ValueError("write `score: content`, or a score by benchmark: {pope: content}")
        for name in by_task.values():
            if name not in SCORES:
                raise ValueError(
                    f"there is no score {name!r}.{closest(str(name), list(SCORES))} "
                    f"Known: {', '.join(SCORES)}"
                )
        return by_task

    def score_of(self, task: str) -> ScoreName:
        """Which score of a benchmark is judged."""
        return self.score.get(task, self.score.get("default", "upstream"))

    @property
    def source(self) -> str:
        """Where it was read from; empty for one made in code."""
        return self._source

    @property
    def digest(self) -> str:
        """sha256 of what the policy says, defaults included; comments do not count."""
        told = self.model_dump()
        if set(self.score.values()) <= {"upstream"}:
            del told["score"]  # policies of before there was another keep their digest
        return digest_text(json.dumps(told, sort_keys=True))

    def margins_for(self, suite: str) -> Margins:
        """The margins of a suite.

        Raises:
            UsageError: neither the suite nor `default` is there.
        """
        found = self.margins.get(suite) or self.margins.get("default")
        if found is None:
            raise UsageError(
                f"The policy has no margins for the suite {suite!r}.",
                "Add them below `margins:`, or a `default` entry.",
            )
        return found


def load_policy(path: Path | None = None, suites: Sequence[str] = ()) -> Policy:
    """A policy file; None is the one that comes with kd-bench.

    Args:
        suites: further names that may have margins, those of suites of one's own.

    Raises:
        UsageError: unreadable, an unknown key, or a suite or benchmark that does not exist.
    """
    source = path or registry.tasks_folder() / "policy.yaml"
    policy = config.load(Policy, source)
    policy._source = "shipped" if path is None else str(path)
    there = [*registry.suite_names(), "default", *suites]
    for suite in policy.margins:
        if suite not in there:
            raise UsageError(
                f"{source}: margins are of suites, and there is no suite {suite!r}."
                f"{closest(suite, there)}",
                f"Known: {', '.join(dict.fromkeys(there))}.",
            )
    known = registry.task_names()
    named = [task for margins in policy.margins.values() for task in margins.tasks]
    named += [task for task in policy.score if task != "default"]
    for task in [*named, *policy.advisory, *(policy.benchmarks or [])]:
        if task not in known:
            raise UsageError(
                f"{source}: there is no benchmark {task!r}.{closest(task, known)}",
                f"Known: {', '.join(known)}.",
            )
    return policy


def judged(runs: Sequence[Run], task: str, policy: Policy) -> AlignedTask:
    """One benchmark's samples of several runs, with the scores that the policy judges.

    Raises:
        IncompleteRunError: by content, and a run has no such scores; else as `align`.
    """
    if policy.score_of(task) == "upstream":
        return align(runs, task)
    aligned = align(runs, task, columns=CONTENT_READ)
    for run, frame in zip(runs, aligned.samples, strict=True):
        if not has_content(frame):
            raise IncompleteRunError(
                f"{task} of {label(run)} has no scores by content, which the policy judges.",
                "Evaluate it again with this version, or set `score: upstream` in the policy.",
            )
    return aligned.by_content()


# --- the further rules -------------------------------------------------------------------------


@dataclass(frozen=True)
class RuleOutcome:
    """A further rule of the policy and how it came out."""

    name: str
    state: Literal["passed", "failed", "inconclusive", "not checked"]
    sentence: str


def judge_rules(
    new: Sequence[Run],
    old: Sequence[Run],
    policy: Policy,
    tasks: list[str],
    sampled: Sequence[Resampled],
) -> list[RuleOutcome]:
    """The policy's further rules, in the order of the policy file.

    Args:
        sampled: the benchmarks that count, the baseline's runs first.

    Raises:
        IncompleteRunError: the teacher of `retention` lacks a benchmark.
    """
    rules = []
    if policy.retention is not None:
        rules.append(_retention_rule(new, policy, policy.retention, tasks))
    if policy.broken_per_thousand is not None:
        rules.append(_broken_rule(sampled, len(old), policy.broken_per_thousand, policy.alpha))
    return rules + _cost_rules(new[0], old[0], policy.cost)


def require_teacher(new: Sequence[Run], policy: Policy) -> None:
    """Refuse a retention rule that measures the candidate against itself.

    Raises:
        UsageError: it does.
    """
    if policy.retention is None:
        return
    teacher = find_run(new[0].path.parents[1], policy.retention.teacher)
    if teacher.path.resolve() in [run.path.resolve() for run in new]:
        raise UsageError(
            f"retention: teacher {policy.retention.teacher!r} of the policy is the candidate "
            "itself.",
            "Name the candidate's teacher in `retention`, or drop the rule.",
        )


def _retention_rule(
    new: Sequence[Run], policy: Policy, rule: Retention, tasks: list[str]
) -> RuleOutcome:
    teacher = find_run(new[0].path.parents[1], rule.teacher)
    shared = common_tasks([teacher, *new])
    missing = [task for task in tasks if task not in shared]
    if missing:
        raise IncompleteRunError(
            f"The teacher {label(teacher)} lacks {', '.join(missing)}.",
            "Evaluate it on the same benchmarks, or drop `retention` from the policy.",
        )
    evidence = evidence_of(
        [
            resample(judged([teacher, *new], task, policy), policy.resamples, policy.seed)
            for task in tasks
        ]
    )
    students = [str(number) for number in range(1, len(new) + 1)]
    level = 1 - 2 * policy.alpha
    found = evidence.retention(AVERAGE, students, ["0"], level)
    name = teacher.manifest.model.name
    if found is None or found.interval is None:
        return RuleOutcome(
            "retention", "inconclusive", f"There is no interval of the share of {name}'s average."
        )
    low, high, floor = found.interval.low, found.interval.high, 100 * rule.floor
    return RuleOutcome(
        "retention",
        "passed" if low / 100 >= rule.floor else "failed" if high / 100 < rule.floor
        else "inconclusive",
        f"{found.value:.1f} % of {name}'s average ({100 * level:.3g} % interval {low:.1f} to "
        f"{high:.1f} %), floor {floor:.4g} %.",
    )  # fmt: skip


def _broken_rule(
    sampled: Sequence[Resampled], split: int, budget: float, alpha: float
) -> RuleOutcome:
    """Documents that broke minus those that were mended, in a thousand, with an interval.

    Equal models break as many as they mend: only the net number says that something is lost. The
    rule fails when even the interval's lower end is above the budget.
    """
    from scipy.special import stdtrit

    broken, fixed, documents, variance, units = 0.0, 0.0, 0, 0.0, 0
    for one in sampled:
        frames = one.aligned.samples
        scores = np.stack([frame["score"].to_numpy(dtype=np.float64) for frame in frames])
        changes = [after - before for before in scores[:split] for after in scores[split:]]
        lost = np.mean([change < -1e-9 for change in changes], axis=0)
        won = np.mean([change > 1e-9 for change in changes], axis=0)
        _, unit = np.unique(frames[0]["unit_id"].to_numpy().astype(str), return_inverse=True)
        by_unit = np.bincount(unit, weights=lost - won)
        broken, fixed = broken + float(lost.sum()), fixed + float(won.sum())
        documents, units = documents + len(lost), units + len(by_unit)
        variance += float(len(by_unit) * by_unit.var(ddof=1)) if len(by_unit) > 1 else 1.0
    net = 1000 * (broken - fixed) / documents
    reach = 1000 * float(stdtrit(max(units - 1, 1), 1 - alpha)) * variance**0.5 / documents
    return RuleOutcome(
        "broken answers",
        "failed" if net - reach > budget else "passed",
        f"{broken:.0f} of {documents:,} documents broke ({1000 * broken / documents:.1f} in a "
        f"thousand) and {fixed:.0f} were mended: net {net:+.1f} in a thousand "
        f"({100 * (1 - 2 * alpha):.3g} % interval {net - reach:+.1f} to {net + reach:+.1f}), "
        f"budget {budget:g} net.",
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
            made = RuleOutcome(title, "not checked", f"{title} was not measured in both.")
        elif timed and not same_hardware:
            made = RuleOutcome(title, "not checked", f"{title}: the runs are of other hardware.")
        else:
            sentence = f"{title} is {b / a:.2f} x the baseline's, limit {limit:g} x."
            made = RuleOutcome(title, "failed" if b / a > limit else "passed", sentence)
        rules.append(made)
    return rules
