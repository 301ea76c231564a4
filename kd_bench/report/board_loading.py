"""Runs of a store -> a board: seeds folded, entries named and sorted, what is wrong said."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kd_bench.errors import KdBenchError, UsageError, closest
from kd_bench.records import AVERAGE, Cost, RunManifest, TaskResult
from kd_bench.report.board import MISSING, ROLE_TITLES, Board, Entry, Score, TaskInfo, task_infos
from kd_bench.store import Run, catalogue, cautions

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
    suite = suite or _newest_suite(listed)
    others = [pair for pair in listed if pair[1].protocol.suite != suite]
    left_out += [f"{m.model.name}: suite {m.protocol.suite}, not {suite}" for _, m in others]
    if len(others) == len(listed):
        known = sorted({manifest.protocol.suite for _, manifest in listed})
        raise UsageError(
            f"No run of the suite {suite!r}.{closest(suite, known)}",
            f"There are runs of: {', '.join(known)}.",
        )
    if names or every:
        chosen = [pair for pair in listed if pair not in others]
    else:
        chosen, passed = there.board(suite)
        left_out += passed
    loaded = [_verified(run, manifest) for run, manifest in chosen]
    groups = _fold(loaded)
    # Of several seeds the sound ones are shown, marked; a model without a sound run is left out.
    rows = [members for members in groups if not all(problem for *_, problem in members)]
    left_out += [problem for members in groups for *_, problem in members if problem]
    tasks = task_infos(task for _, manifest in chosen for task in manifest.tasks)
    entries = _name([_entry(members, tasks) for members in rows])
    entries = _mark_protocols(entries, tasks)
    return Board(suite, tasks, tuple(entries), left_out=tuple(left_out))


def _newest_suite(listed: Sequence[Listed]) -> str:
    """The suite of the newest finished run; an unfinished one moves no page."""
    return max(listed, key=lambda pair: (pair[1].status == "complete", pair[1].created))[
        1
    ].protocol.suite


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


def _entry(members: list[Loaded], tasks: tuple[TaskInfo, ...]) -> Entry:
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


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:.2g}B" if parameters >= 1e8 else f"{parameters / 1e6:.2g}M"


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
            marks = (
                *scores[AVERAGE].marks,
                "holds benchmarks measured under another protocol",
            )
            scores[AVERAGE] = replace(scores[AVERAGE], comparable=False, marks=marks)
        marked.append(replace(entry, scores=scores))
    return marked
