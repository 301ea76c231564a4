"""Runs of a store -> a board: seeds folded, entries named and sorted, what is wrong said."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from kd_bench.errors import KdBenchError, UsageError, closest
from kd_bench.records import AVERAGE, Cost, RunManifest, TaskResult
from kd_bench.report.board import MISSING, ROLE_TITLES, Board, Entry, Score, TaskInfo, task_infos
from kd_bench.store import Run, find_run, list_runs

__all__ = ["load_board"]

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

Loaded = tuple[Run, RunManifest]


def load_board(
    results: Path, names: Sequence[str] | None = None, suite: str | None = None
) -> Board:
    """The board of the named runs, or of all runs of one suite (default: the newest run's).

    Raises:
        UsageError: a name fits no run, or no run is of that suite.
    """
    runs = [find_run(results, name) for name in names] if names else list_runs(results)
    loaded, left_out = _read_runs(runs)
    if not loaded:
        return Board(suite or "", (), (), left_out=tuple(left_out))
    newest = max(loaded, key=lambda pair: (pair[1].created, pair[0].path.name))[1]
    suite = suite or newest.protocol.suite
    chosen = []
    for pair in loaded:
        if pair[1].protocol.suite == suite:
            chosen.append(pair)
        else:
            left_out.append(f"{pair[1].model.name}: suite {pair[1].protocol.suite}, not {suite}")
    if not chosen:
        there = sorted({manifest.protocol.suite for _, manifest in loaded})
        raise UsageError(
            f"No run of the suite {suite!r}.{closest(suite, there)}",
            f"There are runs of: {', '.join(there)}.",
        )
    groups, superseded = _fold(chosen)
    tasks = task_infos(task for _, manifest in chosen for task in manifest.tasks)
    entries = _name([_entry(members, tasks) for members in groups])
    entries = _mark_protocols(entries, tasks)
    return Board(suite, tasks, tuple(entries), left_out=(*left_out, *superseded))


def _read_runs(runs: Iterable[Run]) -> tuple[list[Loaded], list[str]]:
    """Readable runs once each; a damaged one is named, not fatal."""
    loaded: dict[Path, Loaded] = {}
    left_out = []
    for run in runs:
        try:
            loaded[run.path.resolve()] = (run, run.manifest)
        except KdBenchError as error:
            left_out.append(f"{run.path.name}: {error.problem}")
    return list(loaded.values()), left_out


def _fold(runs: list[Loaded]) -> tuple[list[list[Loaded]], list[str]]:
    """Group seeds of one method; a newer run of the same model replaces the older one."""
    groups: dict[tuple[object, ...], dict[object, Loaded]] = {}
    superseded = []
    for run, manifest in sorted(runs, key=lambda pair: (pair[1].created, pair[0].path.name)):
        model = manifest.model
        alone = (model.role, "", model.name, None, None)
        key: tuple[object, ...] = alone
        if model.method and model.seed is not None:
            key = (model.role, model.method, "", model.architecture, manifest.cost.parameters)
            held = groups.get(key, {}).get(model.seed)
            if held is not None and held[1].model.name != model.name:
                key = alone  # another recipe of the same method: a row of its own
        members = groups.setdefault(key, {})
        older = members.get(model.seed)
        if older is not None:
            superseded.append(f"{older[0].path.name}: a newer run of {model.name} is shown")
        members[model.seed] = (run, manifest)
    ordered = [
        sorted(members.values(), key=lambda pair: (pair[1].model.seed or 0, pair[1].model.name))
        for members in groups.values()
    ]
    return ordered, superseded


def _entry(members: list[Loaded], tasks: tuple[TaskInfo, ...]) -> Entry:
    """Fold one group's results into scores by benchmark, and their average."""
    manifests = tuple(manifest for _, manifest in members)
    results = []
    health = []
    for run, manifest in members:
        try:
            results.append(run.results())
        except KdBenchError as error:
            results.append({})
            health.append(f"{manifest.model.name}: {error.problem}")
        health.extend(_health(manifest, results[-1]))
    model = manifests[0].model
    several = len(members) > 1
    name = METHOD_TITLES.get(model.method, model.method) if several else model.name
    scores = {task.id: _fold_scores([r.get(task.id) for r in results]) for task in tasks}
    scores[AVERAGE] = _average([scores[task.id] for task in tasks])
    cost = _fold_costs([manifest.cost for manifest in manifests])
    return Entry(
        key="",
        name=name,
        role=model.role,
        method=model.method,
        runs=tuple(run for run, _ in members),
        manifests=manifests,
        results=tuple(results),
        cost=cost,
        health=tuple(health),
        scores=scores,
    )


def _health(manifest: RunManifest, results: dict[str, TaskResult]) -> list[str]:
    """Sentences on what is wrong with a run; empty for a sound one."""
    name = manifest.model.name
    found = []
    if manifest.status != "complete":
        found.append(f"{name} is {manifest.status}: {len(results)} of {len(manifest.tasks)} done")
        found.extend(f"{name}: {note}" for note in manifest.notes)
    for task, result in results.items():
        errors = result.rates.get("error", 0.0)
        if errors > 0:
            found.append(f"{name}: {errors:.1%} of the answers on {task} are errors")
    return found


def _fold_scores(results: list[TaskResult | None]) -> Score:
    """Mean and spread over seeds; a seed without the benchmark makes the mean partial."""
    found = [r for r in results if r is not None]
    values = [r.score for r in found if math.isfinite(r.score)]
    if not values:
        return MISSING
    marks = []
    if len(values) < len(results):
        marks.append(f"{len(values)} of {len(results)} seeds")
    for kind, most in TOLERATED.items():
        if (rate := _rate(found, kind)) > most:
            marks.append(f"{rate:.1%} {kind}")
    return Score(
        value=sum(values) / len(values),
        spread=_spread(values),
        interval=found[0].interval if len(results) == 1 else None,
        documents=found[0].documents,
        marks=tuple(marks),
        seeds=tuple(r.score if r else float("nan") for r in results),
    )


def _rate(results: list[TaskResult], kind: str) -> float:
    return max((result.rates.get(kind, 0.0) for result in results), default=0.0)


def _spread(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _average(scores: list[Score]) -> Score:
    """The mean over all benchmarks; missing as soon as one of them is."""
    if not scores or not all(score.known for score in scores):
        return MISSING
    seeds: tuple[float, ...] = ()
    if len({len(score.seeds) for score in scores}) == 1:
        by_seed = zip(*(score.seeds for score in scores), strict=True)
        seeds = tuple(sum(column) / len(column) for column in by_seed)
    whole = [value for value in seeds if math.isfinite(value)]
    return Score(
        value=sum(score.value for score in scores) / len(scores),
        spread=_spread(whole),
        documents=sum(score.documents for score in scores),
        seeds=seeds,
    )


def _fold_costs(costs: list[Cost]) -> Cost:
    """Equal for equal architectures; latency and memory are medians over seeds."""

    def middle(pick: Callable[[Cost], float | None]) -> float | None:
        values = sorted(v for cost in costs if (v := pick(cost)) is not None)
        return values[len(values) // 2] if values else None

    peak = middle(lambda c: c.peak_memory_bytes)
    return Cost(
        parameters=costs[0].parameters,
        weight_bytes=costs[0].weight_bytes,
        latency_ms=middle(lambda c: c.latency_ms),
        peak_memory_bytes=None if peak is None else int(peak),
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
            name = f"{name}, {_millions(entry.cost.parameters)}"
        key = _slug(f"{entry.role}-{name}")
        keys[key] += 1
        key = key if keys[key] == 1 else f"{key}-{keys[key]}"
        named.append(replace(entry, name=name, key=key))
    return named


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:.2g}B" if parameters >= 1e8 else f"{parameters / 1e6:.2g}M"


def _slug(text: str) -> str:
    """ASCII letters, digits and dashes; other scripts by code point, so that names stay apart."""
    parts = [
        c if c.isascii() and c.isalnum() else "-" if c.isascii() else f"u{ord(c):x}" for c in text
    ]
    return "-".join(part for part in "".join(parts).lower().split("-") if part) or "entry"


def _mark_protocols(entries: list[Entry], tasks: tuple[TaskInfo, ...]) -> list[Entry]:
    """Mark scores whose fingerprint is not the one that most runs share."""
    reference: dict[str, str] = {}
    for task in tasks:
        prints = [r[task.id].fingerprint for e in entries for r in e.results if task.id in r]
        counts = Counter(prints)
        if counts:
            reference[task.id] = max(counts, key=lambda p: (counts[p], -prints.index(p)))
    marked = []
    for entry in entries:
        scores = dict(entry.scores)
        for task in tasks:
            prints = [r[task.id].fingerprint for r in entry.results if task.id in r]
            if any(p != reference[task.id] for p in prints):
                old = scores[task.id]
                marks = (*old.marks, "measured under another protocol than the other rows")
                scores[task.id] = replace(old, comparable=False, marks=marks)
        if any(not scores[task.id].comparable for task in tasks):
            marks = ("holds benchmarks measured under another protocol",)
            scores[AVERAGE] = replace(scores[AVERAGE], comparable=False, marks=marks)
        marked.append(replace(entry, scores=scores))
    return marked
