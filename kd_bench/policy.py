"""The gate's policy: margins by suite, and the further rules that a candidate must keep."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, PrivateAttr, field_validator

from kd_bench import config, registry
from kd_bench.config import StrictModel
from kd_bench.errors import UsageError, closest
from kd_bench.files import digest_text

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
    retention: Retention | None = None
    broken_per_thousand: float | None = Field(default=None, ge=0)
    health: HealthLimits = Field(default=HealthLimits())
    cost: CostLimits = Field(default=CostLimits())

    _source: str = PrivateAttr(default="")

    @property
    def source(self) -> str:
        """Where it was read from; empty for one made in code."""
        return self._source

    @property
    def digest(self) -> str:
        """sha256 of what the policy says, defaults included; comments do not count."""
        return digest_text(json.dumps(self.model_dump(), sort_keys=True))

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
    for task in [*named, *policy.advisory, *(policy.benchmarks or [])]:
        if task not in known:
            raise UsageError(
                f"{source}: there is no benchmark {task!r}.{closest(task, known)}",
                f"Known: {', '.join(known)}.",
            )
    return policy
