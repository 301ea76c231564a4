"""What a report shows: a board of entries with their scores, and how it is read from a store.

Several seeds of one method are one `Entry` with a mean and a spread over seeds; the sampling
interval is kept apart. Entries are named and sorted, and what is wrong with a run is said. Nothing
here knows about tables, plots or HTML.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median_high, stdev
from typing import TYPE_CHECKING, Any

from kd_bench.errors import KdBenchError, UsageError, closest
from kd_bench.records import AVERAGE, Cost, Interval, RunManifest, TaskResult
from kd_bench.registry import SKILLS, TaskSpec, load_tasks
from kd_bench.store import Run, blank_runs, catalogue, cautions

if TYPE_CHECKING:
    import pandas as pd

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

    Attributes:
        blanks: by a run's folder, the run of the same model with blank images.
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
    blanks: dict[Path, Run] = field(default_factory=dict)

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
        stages = (stage for manifest in self.manifests for stage in _stages(manifest))
        return "/".join(sorted({str(stage.get("device", "")) for stage in stages} - {""}))

    def tokens(self, kind: str) -> float | None:
        """Generated tokens an answer over all benchmarks and seeds, `thinking` or `answer`.

        None where they were not counted.
        """
        counted = [r for found in self.results for r in found.values() if r.tokens]
        documents = sum(result.documents for result in counted)
        total = sum(r.tokens.get(kind, 0.0) * r.documents for r in counted)
        return total / documents if documents else None

    def _spent(self, key: str) -> float | None:
        totals = []
        for stages in map(_stages, self.manifests):
            known = [float(v) for s in stages if isinstance(v := s.get(key), int | float)]
            if not stages or len(known) < len(stages):
                return None
            totals.append(sum(known))
        return sum(totals) / len(totals) if totals else None

    @property
    def label(self) -> str:
        """The name with the number of seeds where there are several."""
        return f"{self.name} ({len(self.runs)} seeds)" if len(self.runs) > 1 else self.name

    @property
    def status(self) -> str:
        """The worst status among the runs, `check` where only answers failed."""
        found = {manifest.status for manifest in self.manifests}
        order = ("unhealthy", "partial", "running")
        return next((status for status in order if status in found), "check")

    def score(self, task: str) -> Score:
        """The score of a benchmark, or a missing one."""
        return self.scores.get(task, MISSING)

    def samples(
        self, task: str, columns: Sequence[str]
    ) -> "Iterator[tuple[Run, TaskResult, pd.DataFrame]]":
        """A benchmark's samples of every run; a damaged file costs its run, not the report."""
        for run, results in zip(self.runs, self.results, strict=True):
            if task in results:
                try:
                    frame = run.samples(task, columns)
                except KdBenchError:
                    continue
                yield run, results[task], frame


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
        like = entry.manifests
        if (mine := entry.cost).parameters is not None:
            every = (manifest for other in self.entries for manifest in other.manifests)
            size = mine.parameters, mine.weight_bytes
            like = tuple(m for m in every if (m.cost.parameters, m.cost.weight_bytes) == size)
        return sorted(float(v) for m in like if (v := getattr(m.cost, cost)) is not None)

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


# --- from a store --------------------------------------------------------------------------------

# Shares of answers above which a score carries a mark; hovering tells every share.
TOLERATED = {"error": 0.0, "unparsed": 0.05}
METHOD_TITLES = {
    "sft": "SFT",
    "kl": "KL",
    "rkl": "Reverse KL",
    "jsd": "JSD",
    "bild": "BiLD",
    "dbild": "DBiLD",
    "vsd": "VSD",
    "switch-kd": "Switch-KD",
    "llava-kd": "LLaVA-KD",
    "align-kd": "Align-KD",
}

Listed = tuple[Run, RunManifest]
Loaded = tuple[Run, RunManifest, dict[str, TaskResult], str]


def load_board(
    results: Path,
    names: Sequence[str] | None = None,
    suite: str | None = None,
    *,
    every: bool = False,
) -> Board:
    """The board of the named runs, or of all runs of one suite (default: the newest run's).

    Args:
        every: also the runs that a newer one of the same model has taken the place of.

    Raises:
        UsageError: a name fits no run, or no run is of that suite.
    """
    there = catalogue(results)
    left_out: list[str] = []
    if names:
        found = {run.path.resolve(): run for run in there.find(names)}
        listed = [(run, run.manifest) for run in found.values()]
        left_out += [line for run in found.values() for line in cautions(run)]
    else:
        listed = list(there.runs)
    if not listed:
        damaged = [f"{run.path.name}: {error.problem}" for run, error in there.damaged]
        return Board(suite or "", (), (), left_out=tuple(damaged))
    # The newest finished run's: an unfinished one moves no page.
    newest = max(
        listed, key=lambda p: (p[1].status == "complete", not p[1].protocol.images, p[1].created)
    )
    suite = suite or newest[1].protocol.suite
    others = [pair for pair in listed if pair[1].protocol.suite != suite]
    left_out += [f"{m.model.name}: suite {m.protocol.suite}, not {suite}" for _, m in others]
    if len(others) == len(listed):
        known = sorted({manifest.protocol.suite for _, manifest in listed})
        raise UsageError(
            f"No run of the suite {suite!r}.{closest(suite, known)}",
            f"There are runs of: {', '.join(known)}.",
        )
    if names or every:
        # One without its images is shown where it was named, and else is no score of its own.
        seeing = [pair for pair in listed if names or not pair[1].protocol.images]
        chosen = [pair for pair in seeing if pair not in others]
    else:
        chosen, passed = there.board(suite)
        left_out += passed
    loaded = [_verified(run, manifest) for run, manifest in chosen]
    groups = _fold(loaded)
    # Of several seeds the sound ones are shown, marked; a model without a sound run is left out.
    rows = [members for members in groups if not all(problem for *_, problem in members)]
    left_out += [problem for members in groups for *_, problem in members if problem]
    tasks = task_infos(task for _, manifest in chosen for task in manifest.tasks)
    blanks, unused = blank_runs(chosen, there)
    left_out += [reason.rstrip(".") for reason in unused]  # joined into one sentence
    entries = _name([_entry(members, tasks, blanks) for members in rows])
    entries = _mark_protocols(entries, tasks)
    return Board(suite, tasks, tuple(entries), left_out=tuple(left_out))


def _verified(run: Run, manifest: RunManifest) -> Loaded:
    """A run with its verified results, or with none and what is damaged."""
    try:
        return run, manifest, run.results(), ""
    except KdBenchError as error:
        return run, manifest, {}, f"{manifest.model.name} ({run.path.name}): {error.problem}"


def _fold(runs: Sequence[Loaded]) -> list[list[Loaded]]:
    """Group seeds of one method."""
    groups: dict[tuple[object, ...], dict[object, Loaded]] = {}
    for loaded in runs:
        manifest = loaded[1]
        model = manifest.model
        alone = (model.role, "", model.name, None, None, loaded[0].path.name)
        key: tuple[object, ...] = alone
        # An unfinished or unhealthy run stands beside its method's mean, not in it.
        if model.method and model.seed is not None and manifest.status == "complete":
            key = (
                model.role,
                model.method,
                model.architecture,
                manifest.cost.parameters,
                manifest.identity.conditions,
            )
            if model.seed in groups.get(key, {}):
                key = alone  # another recipe of the same method: a row of its own
        groups.setdefault(key, {})[model.seed] = loaded
    return [
        sorted(members.values(), key=lambda each: (each[1].model.seed or 0, each[1].model.name))
        for members in groups.values()
    ]


def _entry(members: list[Loaded], tasks: tuple[TaskInfo, ...], blanks: dict[Path, Run]) -> Entry:
    """Fold one group's results into scores by benchmark, and their average."""
    manifests = tuple(manifest for _, manifest, _, _ in members)
    results = tuple(found for _, _, found, _ in members)
    health = [problem for *_, problem in members if problem]
    health += [line for _, manifest, found, _ in members for line in _health(manifest, found)]
    model = manifests[0].model
    several = len(members) > 1
    name = METHOD_TITLES.get(model.method, model.method) if several else model.name
    scores = {task.id: _fold_scores(manifests, results, task.id) for task in tasks}
    scores[AVERAGE] = average([scores[task.id] for task in tasks])
    extents = (manifest.extent(*found.values()) for _, manifest, found, _ in members)
    if scores[AVERAGE].known and (limited := tuple(dict.fromkeys(filter(None, extents)))):
        scores[AVERAGE] = replace(scores[AVERAGE], marks=limited)
    cost = _fold_costs([manifest.cost for manifest in manifests])
    return Entry(
        key="",
        name=name,
        role=model.role,
        method=model.method,
        runs=tuple(run for run, *_ in members),
        manifests=manifests,
        results=results,
        cost=cost,
        health=tuple(health),
        scores=scores,
        blanks={run.path: blanks[run.path] for run, *_ in members if run.path in blanks},
    )


def _health(manifest: RunManifest, results: dict[str, TaskResult]) -> list[str]:
    """Sentences on what is wrong with a run; empty for a sound one."""
    name = manifest.model.name
    found = []
    if manifest.status != "complete":
        found.append(f"{name} is {manifest.status}: {len(results)} of {len(manifest.tasks)} done")
        found.extend(f"{name}: {note}" for note in manifest.notes)
    if not manifest.verified:
        found.append(f"{name} is not verified by digests: it was written before there were any")
    for task, result in results.items():
        errors = result.rates.get("error", 0.0)
        if errors > 0:
            found.append(f"{name}: {errors:.1%} of the answers on {task} are errors")
    return found


def _fold_scores(
    manifests: Sequence[RunManifest], by_run: Sequence[dict[str, TaskResult]], task: str
) -> Score:
    """Mean and spread over seeds; a seed without the benchmark makes the mean partial."""
    results = [found.get(task) for found in by_run]
    found = [r for r in results if r is not None]
    values = [r.score for r in found if math.isfinite(r.score)]
    if not values:
        return MISSING
    extents = (m.extent(r) for m, r in zip(manifests, results, strict=True) if r is not None)
    marks = list(dict.fromkeys(extent for extent in extents if extent))
    if len(values) < len(results):
        marks.append(f"{len(values)} of {len(results)} seeds")
    for kind, most in TOLERATED.items():
        if (rate := max(result.rates.get(kind, 0.0) for result in found)) > most:
            marks.append(f"{rate:.1%} {kind}")
    return Score(
        value=sum(values) / len(values),
        spread=stdev(values) if len(values) > 1 else None,
        interval=found[0].interval if len(results) == 1 else None,
        documents=found[0].documents,
        marks=tuple(marks),
        seeds=tuple(r.score if r else float("nan") for r in results),
    )


def average(scores: list[Score]) -> Score:
    """The mean over all benchmarks; missing as soon as one is, or comes from other seeds."""
    if not scores or not all(score.known for score in scores):
        return MISSING
    if len({tuple(map(math.isfinite, score.seeds)) for score in scores if score.seeds}) > 1:
        return MISSING
    seeds: tuple[float, ...] = ()
    if len({len(score.seeds) for score in scores}) == 1:
        by_seed = zip(*(score.seeds for score in scores), strict=True)
        seeds = tuple(sum(column) / len(column) for column in by_seed)
    whole = [value for value in seeds if math.isfinite(value)]
    return Score(
        value=sum(score.value for score in scores) / len(scores),
        spread=stdev(whole) if len(whole) > 1 else None,
        documents=sum(score.documents for score in scores),
        seeds=seeds,
    )


def _fold_costs(costs: list[Cost]) -> Cost:
    """Equal for equal architectures; latency and memory are medians over seeds."""

    def middle(name: str) -> Any:
        values = [value for cost in costs if (value := getattr(cost, name)) is not None]
        return median_high(values) if values else None

    first = costs[0]
    return Cost(
        first.parameters, first.weight_bytes, middle("latency_ms"), middle("peak_memory_bytes")
    )


def _name(entries: list[Entry]) -> list[Entry]:
    """Sort by role and score; give every entry a key, and a name of its own."""
    order = {role: place for place, role in enumerate(ROLE_TITLES)}

    def place(entry: Entry) -> tuple[int, float, str]:
        average = entry.score(AVERAGE)
        known = [s.value for t, s in entry.scores.items() if t != AVERAGE and s.known]
        value = average.value if average.known else sum(known) / len(known) if known else -1.0
        return (order.get(entry.role, len(order)), -value, entry.name)

    entries = sorted(entries, key=place)
    names = Counter((entry.name, entry.role == "switch") for entry in entries)
    named = []
    keys: Counter[str] = Counter()
    for entry in entries:
        name = entry.name
        if entry.role == "switch" and len(entry.runs) > 1:
            name = f"{name} hybrid"
        elif names[name, entry.role == "switch"] > 1 and entry.cost.parameters:
            size = entry.cost.parameters
            told = f"{size / 1e9:.2g}B" if size >= 1e8 else f"{size / 1e6:.2g}M"
            name = f"{name}, {told}"
        key = _slug(f"{entry.role}-{name}")
        keys[key] += 1
        key = key if keys[key] == 1 else f"{key}-{keys[key]}"
        named.append(replace(entry, name=name, key=key))
    return _apart(named)


def _apart(entries: list[Entry]) -> list[Entry]:
    """Rows that still share a name get their role behind it, or their run's folder."""
    for place in (0, 1):
        tellers = [(entry.role, entry.runs[0].path.name)[place] for entry in entries]
        told: dict[str, set[str]] = {}
        for entry, teller in zip(entries, tellers, strict=True):
            told.setdefault(entry.label, set()).add(teller)
        entries = [
            replace(entry, name=f"{entry.name}, {teller}") if len(told[entry.label]) > 1 else entry
            for entry, teller in zip(entries, tellers, strict=True)
        ]
    return entries


def _slug(text: str) -> str:
    """ASCII letters, digits and dashes; other scripts by code point, so that names stay apart."""
    parts = [
        c if c.isascii() and c.isalnum() else "-" if c.isascii() else f"u{ord(c):x}" for c in text
    ]
    return "-".join(part for part in "".join(parts).lower().split("-") if part) or "entry"


def _mark_protocols(entries: list[Entry], tasks: tuple[TaskInfo, ...]) -> list[Entry]:
    """Mark scores whose fingerprint is not the one that most runs, unlimited ones first, share."""
    reference: dict[str, str] = {}
    for task in tasks:
        found = [
            (manifest.protocol.limit is not None, results[task.id].fingerprint)
            for entry in entries
            for manifest, results in zip(entry.manifests, entry.results, strict=True)
            if task.id in results
        ]
        prints = [each for limited, each in found if not limited] or [each for _, each in found]
        if prints:  # the first of those that are equally common
            reference[task.id] = Counter(prints).most_common(1)[0][0]
    marked = []
    for entry in entries:
        others = {
            task: "measured under another protocol than the other rows"
            for task, shared in reference.items()
            if any(r[task].fingerprint != shared for r in entry.results if task in r)
        }
        if others:
            others[AVERAGE] = "holds benchmarks measured under another protocol"
        scores = {
            task: replace(score, comparable=False, marks=(*score.marks, others[task]))
            if task in others
            else score
            for task, score in entry.scores.items()
        }
        marked.append(replace(entry, scores=scores))
    return marked
