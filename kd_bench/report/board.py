"""What a report shows: a board of entries with their scores, before how it is shown.

Several seeds of one method are one `Entry` with a mean and a spread over seeds; the sampling
interval is kept apart. Nothing here knows about tables, pictures or HTML.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kd_bench.errors import UsageError
from kd_bench.records import Cost, Interval, RunManifest, TaskResult
from kd_bench.registry import SKILLS, TaskSpec, load_tasks
from kd_bench.store import Run

if TYPE_CHECKING:
    from kd_bench.compare.estimates import Claim


# In the order of the board.
ROLE_TITLES = {
    "teacher": "Teacher (ceiling)",
    "switch": "Visual-switch hybrids",
    "kd": "Distilled students",
    "student": "Students",
    "baseline": "Baselines",
    "sft": "SFT (floor)",
    "model": "Models",
}


@dataclass(frozen=True)
class TaskInfo:
    """What the report says about a benchmark.

    Attributes:
        short: column title.
        group: skill group; columns of one group stand together.
        spec: the registry's entry; None for a benchmark that it does not know.
    """

    id: str
    title: str
    short: str
    group: str
    spec: TaskSpec | None = None

    def aggregator(self, profile: str) -> str:
        """Name of the aggregator that the score comes from under a protocol profile."""
        if self.spec is None:
            return "mean"
        try:
            return self.spec.profile(profile).aggregator or self.spec.aggregator
        except UsageError:
            return self.spec.aggregator


@dataclass(frozen=True)
class Score:
    """A number in points (0-100 scale), with what is known about its uncertainty.

    Attributes:
        spread: standard deviation over training seeds (n - 1); None with fewer than two seeds.
        interval: from resampling the benchmark's units; it does not hold the spread over seeds
            unless `holds_seeds`.
        rank: 1 + the number of students that are significantly better; None for other roles.
        marks: why the number must be read with care, as short sentences.
    """

    value: float
    spread: float | None = None
    interval: Interval | None = None
    documents: int = 0
    comparable: bool = True
    holds_seeds: bool = False
    rank: int | None = None
    marks: tuple[str, ...] = ()
    seeds: tuple[float, ...] = ()

    @property
    def known(self) -> bool:
        """Whether there is a number at all."""
        return math.isfinite(self.value)


MISSING = Score(float("nan"))


@dataclass(frozen=True)
class Entry:
    """One row: a model, or several seeds of one method.

    `scores`, `differences` and `retentions` are keyed by benchmark id, and by `AVERAGE`.
    `runs`, `manifests` and `results` are parallel, one a seed, ordered by seed.
    """

    key: str
    name: str
    role: str
    method: str
    runs: tuple[Run, ...]
    manifests: tuple[RunManifest, ...]
    results: tuple[dict[str, TaskResult], ...]
    cost: Cost
    health: tuple[str, ...] = ()
    scores: dict[str, Score] = field(default_factory=dict)
    differences: dict[str, Score] = field(default_factory=dict)
    retentions: dict[str, Score] = field(default_factory=dict)
    gap_closed: Score = MISSING

    @property
    def training_tokens(self) -> float | None:
        """Tokens that training read, mean over seeds; None where the lineage does not say."""
        return self._spent("tokens")

    @property
    def training_hours(self) -> float | None:
        """Hours of training on all devices together, mean over seeds."""
        seconds = self._spent("device_seconds")
        return None if seconds is None else seconds / 3600

    @property
    def training_devices(self) -> str:
        """`cuda`, `cpu`, or both: what the hours are hours of."""
        found = (str(stage.get("device", "")) for m in self.manifests for stage in _stages(m))
        return "/".join(sorted(set(found) - {""}))

    def _spent(self, key: str) -> float | None:
        totals = []
        for manifest in self.manifests:
            stages = [stage.get(key) for stage in _stages(manifest)]
            known = [float(v) for v in stages if isinstance(v, int | float)]
            if not stages or len(known) < len(stages):
                return None
            totals.append(sum(known))
        return sum(totals) / len(totals) if totals else None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds that are known."""
        return tuple(m.model.seed for m in self.manifests if m.model.seed is not None)

    @property
    def label(self) -> str:
        """The name with the number of seeds where there are several."""
        return f"{self.name} ({len(self.runs)} seeds)" if len(self.runs) > 1 else self.name

    def score(self, task: str) -> Score:
        """The score of a benchmark, or a missing one."""
        return self.scores.get(task, MISSING)


def _stages(manifest: RunManifest) -> list[dict[str, Any]]:
    """What the checkpoint's lineage tells of each stage of its training."""
    stages = (manifest.training or {}).get("stages")
    found = list(stages.values()) if isinstance(stages, dict) else []
    return found if all(isinstance(stage, dict) for stage in found) else []


@dataclass(frozen=True)
class Board:
    """Everything that a report shows about one suite.

    Attributes:
        teacher, floor: the entries that retention, gap closed and differences refer to.
        main: the entry that the reader named as the page's subject.
        claim: the one claim that may stand in the headline, about the entry with its key.
        left_out: runs that are in the store but not on the board, and why.
    """

    suite: str
    tasks: tuple[TaskInfo, ...]
    entries: tuple[Entry, ...]
    teacher: Entry | None = None
    floor: Entry | None = None
    left_out: tuple[str, ...] = ()
    main: Entry | None = None
    claim: "Claim | None" = None

    def measured(self, entry: Entry, cost: str) -> list[float]:
        """A measured cost of every run of models of this entry's size, ascending.

        Models of one size cost the same: what differs among them is the noise of measuring.
        """

        def size(cost: Cost) -> tuple[int | None, int | None]:
            return cost.parameters, cost.weight_bytes

        known = entry.cost.parameters is not None
        runs = [
            manifest.cost
            for other in self.entries
            for manifest in other.manifests
            if (size(manifest.cost) == size(entry.cost) if known else other is entry)
        ]
        return sorted(float(v) for each in runs if (v := getattr(each, cost)) is not None)

    @cached_property
    def colours(self) -> dict[str, int]:
        """Series number by entry key: teacher and floor are neutral, methods follow in order.

        A hybrid takes a light blue, or what is left last, so that methods keep their colours
        without it.
        """
        numbers: dict[str, int] = {}
        free = iter(range(2, len(self.entries) + 2))
        hybrid = 7
        for entry in sorted(self.entries, key=lambda e: e.role == "switch"):
            if self.teacher is not None and entry.key == self.teacher.key:
                numbers[entry.key] = 0
            elif self.floor is not None and entry.key == self.floor.key:
                numbers[entry.key] = 1
            elif entry.role == "switch" and hybrid not in numbers.values():
                numbers[entry.key] = hybrid
            else:
                numbers[entry.key] = next(free)
        return numbers

    @property
    def mini(self) -> bool:
        """Whether the scores are of the embedded world, not of the real benchmarks."""
        return self.suite == "mini" or self.suite.startswith("mini-")

    @property
    def average_title(self) -> str:
        """`Avg10`, or how many benchmarks the average is over."""
        return f"Avg{len(self.tasks)}"

    @property
    def students(self) -> tuple[Entry, ...]:
        """Entries that compete: all but the teacher and the hybrids."""
        return tuple(e for e in self.entries if e.role not in ("teacher", "switch"))


def task_infos(tasks: Iterable[str]) -> tuple[TaskInfo, ...]:
    """Titles and skill groups from the registry; groups together, each in the papers' order.

    Benchmarks that the registry does not know come last.
    """
    specs = {spec.id: spec for spec in load_tasks()}
    places = {task: place for place, task in enumerate(specs)}

    def place(task: str) -> tuple[int, int, str]:
        if task not in specs:
            return len(SKILLS), 0, task
        return SKILLS.index(specs[task].skill), places[task], task

    return tuple(
        task_info(specs[task]) if task in specs else TaskInfo(task, task, task, "other")
        for task in sorted(set(tasks), key=place)
    )


def task_info(spec: TaskSpec) -> TaskInfo:
    """What the report says about a benchmark of the registry."""
    group = "OCR" if spec.skill == "ocr" else spec.skill
    return TaskInfo(spec.id, spec.title, spec.short, group, spec)
