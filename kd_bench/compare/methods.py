"""Training methods compared over their seeds, and what one seed alone does not tell."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kd_bench.compare.align import (
    align,
    common_tasks,
    evidence_of,
    label,
    resample,
    resample_columns,
)
from kd_bench.compare.estimates import PART_NAMES, Estimate, in_columns
from kd_bench.errors import KdBenchError, UsageError, closest
from kd_bench.records import AVERAGE
from kd_bench.stats import RESAMPLES, holm
from kd_bench.store import Run, catalogue, list_runs, shortcomings

if TYPE_CHECKING:
    import pandas as pd

# Roles that carry a method and are no student of it.
NOT_STUDENTS = ("teacher", "switch")


def compare_methods(
    a_runs: Sequence[Run],
    b_runs: Sequence[Run],
    *,
    allow_different: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Estimate]:
    """Method B minus method A, whose runs are their training seeds, in points.

    By benchmark and on the `average`, over seeds and documents; see `compare.estimates`.
    """
    runs = [*a_runs, *b_runs]
    tasks = common_tasks(runs)
    aligned = [align(runs, task, allow_different=allow_different) for task in tasks]
    evidence = evidence_of([resample(each, resamples, seed) for each in aligned])
    names = [str(number) for number in range(len(runs))]
    first, second = names[: len(a_runs)], names[len(a_runs) :]
    return {key: evidence.difference(key, first, second, level) for key in [*tasks, AVERAGE]}


# --- any method against any --------------------------------------------------------------------


@dataclass(frozen=True)
class MethodPair:
    """Two methods: `second` minus `first`, by benchmark and on the `average`.

    Attributes:
        estimates: with 95 % intervals of each difference alone.
        p_holm: on the average, corrected over all pairs of methods; of a benchmark, over all
            pairs and benchmarks.
        parts: by the name of the part (`estimates.PARTS`), then as `estimates`, as far as known.
    """

    first: str
    second: str
    estimates: dict[str, Estimate]
    p_holm: dict[str, float]
    parts: dict[str, dict[str, Estimate]] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodsComparison:
    """Every method against every other, over seeds and documents.

    Attributes:
        methods: number of seeds by method, in the order asked for.
        scores: by method, then by benchmark and `average`.
        warnings: methods with one seed or with changed recipes, runs passed over, and what is
            not comparable.
        gaps: by method, form gap and sight, then as `scores`, as far as known.
    """

    methods: dict[str, int]
    scores: dict[str, dict[str, Estimate]]
    pairs: list[MethodPair]
    warnings: list[str]
    gaps: dict[str, dict[str, dict[str, Estimate]]] = field(default_factory=dict)

    def to_json(self) -> str:
        """JSON text with a format version."""
        body = asdict(self)
        groups = [*body["scores"].values()]
        groups += [each for by_method in body["gaps"].values() for each in by_method.values()]
        for pair in body["pairs"]:
            groups += [pair["estimates"], *pair["parts"].values()]
        for each in (each for by_key in groups for each in by_key.values()):
            del each["distribution"]
            each["p"] = each["p"] if each["p"] == each["p"] else None
        return json.dumps({"format": 1, **body}, indent=2, ensure_ascii=False)

    def to_frame(self) -> "pd.DataFrame":
        """One row a pair of methods and benchmark (and `average`): second minus first, in points.

        Columns: task, first, second, first_seeds, second_seeds, difference, low, high (NaN where
        there is no interval), p, p_holm; then each part of the difference with low and high,
        where any pair knows it.
        """
        import pandas as pd

        frame = pd.DataFrame(
            {
                "task": task,
                "first": pair.first,
                "second": pair.second,
                "first_seeds": self.methods[pair.first],
                "second_seeds": self.methods[pair.second],
                "difference": found.value,
                "low": found.interval.low if found.interval else float("nan"),
                "high": found.interval.high if found.interval else float("nan"),
                "p": found.p,
                "p_holm": pair.p_holm.get(task, float("nan")),
            }
            for pair in self.pairs
            for task, found in pair.estimates.items()
        )
        for kind in PART_NAMES:
            parts = [p.parts.get(kind, {}).get(key) for p in self.pairs for key in p.estimates]
            if any(parts):
                frame = frame.assign(**in_columns(kind, parts))
        return frame


def runs_of_method(results: Path, method: str, suite: str | None = None) -> list[Run]:
    """The run of each training seed of a method's students, ordered by seed.

    Which run of a model it is, is the catalogue's business; of the suite of its newest one where
    none is named.

    Raises:
        UsageError: no run is of that method.
        IncompleteRunError: a manifest is damaged: it may be a seed's.
    """
    return _chosen_runs(results, method, suite)[0]


def _chosen_runs(
    results: Path, method: str, suite: str | None = None, recipe: str | None = None
) -> tuple[list[Run], list[str]]:
    """`runs_of_method`, only of one recipe where its key is given, and which runs it passed over.

    A limited or unfinished run is left out where another of the method is neither.
    """
    list_runs(results)  # none may be missing
    there = catalogue(results)
    suites = [suite] if suite else list(dict.fromkeys(m.protocol.suite for _, m in there.runs))
    shown = sorted(
        (each for name in suites for each in there.board(name)[0]),
        key=lambda each: each[1].created,
    )
    students = [each for each in shown if each[1].model.role not in NOT_STUDENTS]
    known = {manifest.model.method for _, manifest in students if manifest.model.method}
    found = [each for each in students if each[1].model.method == method and method]
    found = [each for each in found if each[1].protocol.suite == found[-1][1].protocol.suite]
    if recipe is not None:
        found = [each for each in found if recipe_key(each[0]) == recipe]
    faults = {run.path: shortcomings(run, manifest) for run, manifest in found}
    some_whole = not all(faults.values())
    by_seed: dict[tuple[int, str], Run] = {}
    left_out = []
    for run, manifest in found:
        model = manifest.model
        if some_whole and faults[run.path]:
            left_out.append(f"{label(run)} is left out: {'; '.join(faults[run.path])}.")
            continue
        key = (model.seed or 0, "" if model.seed is not None else model.name)
        if key in by_seed:
            left_out.append(
                f"{label(by_seed[key])} is left out: {label(run)} is newer and also seed "
                f"{model.seed} of {method}."
            )
        by_seed[key] = run
    if not by_seed:
        raise UsageError(
            f"No run of a method {method!r} below {results}.{closest(method, sorted(known))}",
            f"Methods there: {', '.join(sorted(known)) or 'none'}.",
        )
    return [by_seed[key] for key in sorted(by_seed)], left_out


def compare_all_methods(
    results: Path,
    methods: Sequence[str],
    *,
    allow_different: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> MethodsComparison:
    """Every method of a store against every other, corrected over all pairs after Holm.

    Raises:
        UsageError: fewer than two methods, one twice, or one that the store does not have.
    """
    if len(set(methods)) < 2 or len(set(methods)) < len(methods):
        raise UsageError("--methods needs two or more different methods.", "Name another.")
    suite = runs_of_method(results, methods[0])[-1].manifest.protocol.suite
    chosen = {method: _chosen_runs(results, method, suite) for method in methods}
    groups = {method: group for method, (group, _) in chosen.items()}
    runs = [run for group in groups.values() for run in group]
    tasks = common_tasks(runs)
    sampled, notes = resample_columns(
        runs, tasks, allow_different=allow_different, resamples=resamples, seed=seed
    )
    evidence = evidence_of(sampled)
    places = map(str, range(len(runs)))
    names = {method: [next(places) for _ in group] for method, group in groups.items()}
    keys = [*tasks, AVERAGE]
    pairs = [
        (one, other, {key: evidence.difference(key, names[one], names[other]) for key in keys})
        for one, other in combinations(methods, 2)
    ]
    whole = holm([found[AVERAGE].p for _, _, found in pairs])
    single = iter(holm([found[task].p for _, _, found in pairs for task in tasks]))
    return MethodsComparison(
        methods={method: len(group) for method, group in groups.items()},
        scores={
            method: {key: evidence.score(key, names[method]) for key in keys} for method in methods
        },
        pairs=[
            MethodPair(
                one,
                other,
                found,
                {**{task: next(single) for task in tasks}, AVERAGE: p},
                _by_kind({key: evidence.parts(key, names[one], names[other]) for key in keys}),
            )
            for (one, other, found), p in zip(pairs, whole, strict=True)
        ],
        gaps={
            method: _by_kind({key: evidence.gaps(key, names[method]) for key in keys})
            for method in methods
        },
        warnings=[
            f"{method} has one training seed here: its training noise is unknown."
            for method, group in groups.items()
            if len(group) == 1
        ]
        + [line for _, left_out in chosen.values() for line in left_out]
        + [line for group in groups.values() for line in _changed_recipes(group)]
        + notes,
    )


def _by_kind(by_key: dict[str, dict[str, Estimate]]) -> dict[str, dict[str, Estimate]]:
    """Estimates by key and kind -> by kind and key, without kinds that no key has."""
    kinds = dict.fromkeys(kind for found in by_key.values() for kind in found)
    return {
        kind: {key: found[kind] for key, found in by_key.items() if kind in found} for kind in kinds
    }


# --- one seed ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingNoise:
    """How far training seeds of one recipe are apart in this store.

    Attributes:
        churn: share of documents whose score changes between two seeds, mean over pairs.
        spread: standard deviation of the average over seeds, in points.
    """

    method: str
    seeds: int
    churn: float
    spread: float

    @property
    def sentence(self) -> str:
        """What seeds of this recipe are known to do."""
        return (
            f"{self.seeds} seeds of {self.method} in this store change {self.churn:.1%} of the "
            f"answers between each other, and their averages spread by {self.spread:.1f} points "
            "(standard deviation)"
        )


def noise_of(run: Run, most: int = 4) -> TrainingNoise | None:
    """The training noise of a run's recipe, as far as its store knows; None with one seed."""
    model, protocol = run.manifest.model, run.manifest.protocol
    if not model.method or model.seed is None:
        return None
    recipe = recipe_key(run)
    try:
        siblings, _ = _chosen_runs(run.path.parents[1], model.method, protocol.suite, recipe)
        siblings = [
            each
            for each in siblings
            if each.manifest.model.role == model.role and each.manifest.model.seed is not None
        ][:most]
        if len(siblings) < 2:
            return None
        changed, documents, averages = 0.0, 0, []
        for task in common_tasks(siblings):
            aligned = align(siblings, task)
            pairs = list(combinations(range(len(siblings)), 2))
            changed += float(np.mean([sum(aligned.changes(*pair)) for pair in pairs]))
            documents += aligned.items
            averages.append(aligned.scores)
    except KdBenchError:
        return None  # a damaged or foreign sibling costs this line only
    spread = float(np.mean(averages, axis=0).std(ddof=1))
    return TrainingNoise(model.method, len(siblings), changed / documents, spread)


def training_noise(first: Sequence[Run], second: Sequence[Run]) -> list[str]:
    """What a reader must know where one seed stands for a method, or changed recipes for seeds."""
    if min(len(first), len(second)) > 1:
        return [line for side in (first, second) for line in _changed_recipes(side)]
    models = [run.manifest.model for run in (*first, *second)]
    methods = list(dict.fromkeys(model.method for model in models))
    if not all(methods) or any(model.seed is None for model in models):
        return []
    if _seeds_of_one_recipe([*first, *second]):
        text = (
            f"ONE RECIPE: these are training seeds of {methods[0]}. What differs between them is "
            "training noise, not a method"
        )
    else:
        text = (
            f"ONE SEED of {' and of '.join(methods)}: this is about these weights, not about "
            "the recipes; another seed may say otherwise"
        )
    of_method = {run.manifest.model.method: run for run in reversed([*first, *second])}
    known = [noise for method in methods if (noise := noise_of(of_method[method])) is not None]
    if known:
        return [f"{text}. {'; '.join(noise.sentence for noise in known)}."]
    return [f"{text}. How far seeds are apart, this store does not know."]


def recipe_key(run: Run) -> str:
    """Equal for runs of one stored recipe, whatever their seed; empty where no recipe is stored.

    A lineage without a digest is known by its recipe's name only, and one without the digest
    that leaves the seed out (older ones) is equal to another only where both say the same.
    """
    told = run.manifest.training or {}
    for name in ("seedless_digest", "recipe_digest", "recipe"):
        if told.get(name):
            return f"{name} {told[name]}"
    return ""


def _changed_recipes(runs: Sequence[Run]) -> list[str]:
    """A warning where lineages tell different recipes, or only some of them tell one."""
    if len({recipe_key(run) for run in runs}) < 2:
        return []
    method = runs[0].manifest.model.method
    return [
        f"The stored recipes of {', '.join(run.manifest.model.name for run in runs)} are not the "
        f"same: the spread of {method} may hold more than its seeds."
    ]


def _seeds_of_one_recipe(runs: Sequence[Run]) -> bool:
    """Known digests that are equal, one method and role, every seed and every weight another's."""
    models = [run.manifest.model for run in runs]
    keys = {recipe_key(run) for run in runs}
    known = len(keys) == 1 and "_digest " in keys.pop()
    alike = len({(model.method, model.role) for model in models}) == 1
    apart = all(
        len({getattr(model, name) for model in models}) == len(models)
        for name in ("seed", "weights_digest")
    )
    return known and alike and apart


def seeds_of_one_method(runs: Sequence[Run]) -> None:
    """Several runs on one side must be different training seeds of one method.

    Raises:
        UsageError: they are not.
    """
    if len(runs) < 2:
        return
    first = runs[0].manifest.model
    for place, run in enumerate(runs):
        model = run.manifest.model
        if (model.method, model.role) != (first.method, first.role) or not model.method:
            raise UsageError(
                f"{label(runs[0])} and {label(run)} are not seeds of one method "
                f"({first.method or 'none'} and {model.method or 'none'}).",
                "Name training seeds of one recipe, or one run.",
            )
        for other in runs[:place]:
            again = other.manifest.model
            same_seed = model.seed is not None and model.seed == again.seed
            if same_seed or model.weights_digest == again.weights_digest:
                raise UsageError(
                    f"{label(other)} and {label(run)} are the same training seed.",
                    "Name each seed once.",
                )
