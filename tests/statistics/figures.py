"""The figures behind the gate, measured by simulation and printed as one table.

python -m tests.statistics.figures            2,000 simulated pairs, an hour or more on 2 cores
python -m tests.statistics.figures --quick    a tenth of that
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kd_bench.aggregators import get_aggregator
from kd_bench.compare.align import AlignedTask, Resampled, evidence_of, resample
from kd_bench.compare.estimates import Estimate, Evidence, TaskEvidence
from kd_bench.gate import Verdict, judge
from kd_bench.policy import load_policy
from kd_bench.records import AVERAGE
from kd_bench.stats import (
    bootstrap_sums,
    exact_or_swap,
    holm,
    minimum_detectable_effect,
    two_sided,
    unit_seed,
)
from tests.statistics.simulate import (
    Benchmark,
    answers,
    frame,
    real_benchmarks,
    rho_for,
    sums_by_unit,
    true_score,
    write_run,
)
from tests.support.memory import measure_command

MU = 0.4  # about 66 % of documents right
Array = NDArray[np.float64]
DISCORDANCES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
RESAMPLES = 1_000
SMALL = 10_000  # units; larger benchmarks are drawn collapsed
POLICY = load_policy().model_copy(update={"resamples": RESAMPLES})
MARGINS = POLICY.margins_for("ten")


@dataclass(frozen=True)
class Figure:
    """One row of the table."""

    name: str
    target: str
    measured: str
    reached: bool


def aligned(shape: Benchmark, right: NDArray[np.bool_]) -> AlignedTask:
    """What `compare.align` would make of these answers, without files and texts."""
    return AlignedTask(
        task=shape.task,
        aggregator=shape.aggregator,
        samples=tuple(pd.DataFrame({"score": row.astype(float)}) for row in right),
        units=np.arange(shape.units).astype(object),
        statistics=np.stack([sums_by_unit(shape, row) for row in right]),
    )


def distinct_rows(values: Array) -> tuple[Array, NDArray[np.int64]]:
    """Distinct rows of [units, m] and how often each occurs; one sort of numbers, not of rows."""
    code = np.zeros(len(values))
    for column in values.T:
        levels, place = np.unique(column, return_inverse=True)
        code = code * len(levels) + place
    _, first, counts = np.unique(code, return_index=True, return_counts=True)
    return values[first], counts


class Collapsed(Resampled):
    """Resampled with units of equal content drawn together.

    The same distribution as the program's own draws (a test compares them), and hundreds of
    times faster for VQAv2's 40,504 pictures, which hold few different sums of rights and wrongs.
    """

    def null_draws(self, first: int, second: int, seed: int = 0) -> Array:
        one, other = self.aligned.statistics[first], self.aligned.statistics[second]
        changes, counts = distinct_rows(other - one)
        swapped = np.random.default_rng(seed).binomial(counts, 0.5, (RESAMPLES, len(counts)))
        moved = swapped @ changes
        combine = get_aggregator(self.aligned.aggregator).combine
        drawn: Array = combine(other.sum(0) - moved) - combine(one.sum(0) + moved)
        return drawn


def resampled(task: AlignedTask, seed: int, draws: bool = True) -> Resampled:
    """Bootstrap a simulated benchmark; the program's own code but for VQAv2."""
    models, units, width = task.statistics.shape
    empty = np.zeros((models, RESAMPLES))
    if units < SMALL:
        return resample(task, RESAMPLES) if draws else Resampled(task, task.scores, empty)
    if not draws:
        return Collapsed(task, task.scores, empty)
    flat = task.statistics.transpose(1, 0, 2).reshape(units, -1)
    distinct, counts = distinct_rows(flat)
    weights = np.random.default_rng([6, seed]).multinomial(units, counts / units, RESAMPLES)
    sums = (weights @ distinct).reshape(RESAMPLES, models, width)
    return Collapsed(task, task.scores, get_aggregator(task.aggregator).combine(sums).T)


def in_parallel(job: Callable[[int], Any], count: int) -> list[Any]:
    """`job(seed)` for `count` seeds on all cores."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(job, range(count), chunksize=max(1, count // 64)))


# --- false regressions ---------------------------------------------------------------------------


def simulated_suite(
    rng: np.random.Generator, rho: float, drops: dict[str, float] | None = None
) -> list[AlignedTask]:
    """Baseline and candidate on the ten; `drops` lowers the candidate's mu on some."""
    return [
        aligned(shape, answers(rng, shape, [MU, MU - (drops or {}).get(task, 0.0)], rho))
        for task, shape in real_benchmarks().items()
    ]


def verdicts_of(suite: list[AlignedTask], seed: int, always: bool = False) -> list[Verdict]:
    """The gate's verdicts.

    Without a significant drop nothing can be "regressed"; then the bootstrap, which takes most
    of the time, is spared unless `always`.
    """
    if not always and not significant_drops(suite, seed):
        return []
    policy = POLICY.model_copy(update={"seed": seed})
    return judge([resampled(each, seed) for each in suite], MARGINS, policy)


def significant_drops(suite: list[AlignedTask], seed: int) -> set[str]:
    """Benchmarks (and the average) with a drop that is significant after Holm."""
    nulls = [resampled(each, seed, draws=False).null_draws(0, 1, seed) for each in suite]
    changes = [float(each.scores[1] - each.scores[0]) for each in suite]
    p = [
        exact_or_swap(each.aggregator, *each.statistics, null)[0]
        for each, null in zip(suite, nulls, strict=True)
    ]
    changes.append(float(np.mean(changes)))
    p.append(two_sided(changes[-1], np.mean(nulls, axis=0)))
    names = [*(each.task for each in suite), AVERAGE]
    return {
        name
        for name, change, adjusted in zip(names, changes, holm(p), strict=True)
        if change < 0 and adjusted <= POLICY.alpha
    }


def false_regression(seed: int) -> bool:
    """Whether the gate calls one of two equal models regressed anywhere."""
    rng = np.random.default_rng([1, seed])
    rho = rho_for(DISCORDANCES[seed % len(DISCORDANCES)], MU)
    return any(each.verdict == "regressed" for each in verdicts_of(simulated_suite(rng, rho), seed))


# --- power -----------------------------------------------------------------------------------


def detectable(task: str, discordance: float) -> float:
    """The benchmark's minimum detectable effect at its n, units and this discordance."""
    shape = real_benchmarks()[task]
    rho = rho_for(discordance, MU)
    rng = np.random.default_rng([2, shape.rows])
    pairs = [aligned(shape, answers(rng, shape, [MU, MU], rho)) for _ in range(12)]
    variances = [np.var(np.diff(resampled(pair, 0).draws, axis=0)) for pair in pairs]
    return minimum_detectable_effect(float(np.sqrt(np.mean(variances))), pairs[0].items)


def mu_for(shape: Benchmark, drop: float) -> float:
    """How much lower a candidate's mu must be for its true score to fall by `drop` points."""
    from scipy import optimize

    goal = true_score(shape, MU) - drop
    return float(optimize.brentq(lambda lower: true_score(shape, MU - lower) - goal, 0, 6))


def planted_drop(
    seed: int, task: str, discordance: float, lower: float, always: bool = False
) -> tuple[bool, bool]:
    """Whether a planted drop was found significant, and whether its verdict was "regressed"."""
    rng = np.random.default_rng([3, seed, len(task), int(1000 * discordance)])
    suite = simulated_suite(rng, rho_for(discordance, MU), {task: lower})
    if not always:
        return task in significant_drops(suite, seed), False
    verdict = next(each for each in verdicts_of(suite, seed, always=True) if each.name == task)
    return verdict.real_drop, verdict.verdict == "regressed"


# --- coverage --------------------------------------------------------------------------------


def coverage(seed: int, names: tuple[str, ...]) -> dict[str, bool]:
    """Which 95 % intervals hold the truth: floor, student and teacher on these benchmarks."""
    rng = np.random.default_rng([4, seed])
    mus = [0.2, MU, 0.8]
    shapes = [real_benchmarks()[name] for name in names]
    sampled = [
        resampled(aligned(shape, answers(rng, shape, mus, rho_for(0.15, MU))), seed)
        for shape in shapes
    ]
    evidence = evidence_of(sampled)
    truth = np.array([[true_score(shape, mu) for mu in mus] for shape in shapes])
    floor, student, teacher = ["0"], ["1"], ["2"]
    held: dict[str, bool] = {}
    for key, (low, own, high) in zip(
        [*(shape.task for shape in shapes), AVERAGE], [*truth, truth.mean(0)], strict=True
    ):
        held[key] = holds(evidence.score(key, student), own)
        change = evidence.difference(key, floor, student)
        held[f"{key}, difference"] = holds(change, own - low)
        if key == AVERAGE:
            closed = evidence.gap_closed(key, student, floor, teacher)
            held["gap closed"] = holds(closed, 100 * (own - low) / (high - low))
            held["retention"] = holds(evidence.retention(key, student, teacher), 100 * own / high)
    return held


def holds(found: Estimate | None, true: float) -> bool:
    """Whether the interval is there and holds the truth."""
    assert found is not None
    assert found.interval is not None
    return found.interval.low - 1e-9 <= true <= found.interval.high + 1e-9


def few_shapes(units: int) -> list[Benchmark]:
    """One benchmark of each kind with this many units."""
    zeros = np.zeros
    return [
        Benchmark("documents", "mean", np.arange(units), zeros(units, int)),
        Benchmark("groups", "circular", np.repeat(np.arange(units), 4), zeros(4 * units, int),
                  icc=0.6),
        Benchmark("pictures", "mean", np.repeat(np.arange(units), 6), zeros(6 * units, int),
                  icc=0.2),
        Benchmark("f1", "f1", np.repeat(np.arange(units), 6), zeros(6 * units, int), icc=0.15,
                  yes=True),
    ]  # fmt: skip


def coverage_few(seed: int, units: int, mus: tuple[float, float], churn: float) -> dict[str, bool]:
    """The same with few units: scores and differences of two models by kind of benchmark."""
    rng = np.random.default_rng([7, seed, units])
    shapes = few_shapes(units)
    rho = rho_for(churn, mus[0])
    evidence = evidence_of(
        [resample(aligned(shape, answers(rng, shape, list(mus), rho)), RESAMPLES)
         for shape in shapes]
    )  # fmt: skip
    truth = [[true_score(shape, mu) for mu in mus] for shape in shapes]
    truth.append([float(each) for each in np.mean(truth, axis=0)])
    held = {}
    for key, (one, other) in zip([*(s.task for s in shapes), AVERAGE], truth, strict=True):
        held[key] = holds(evidence.score(key, ["0"]), one)
        held[f"{key}, difference"] = holds(evidence.difference(key, ["0"], ["1"]), other - one)
    return held


# --- coverage over training seeds --------------------------------------------------------------

CHURN = 0.15


@dataclass(frozen=True)
class Training:
    """A method whose seeds' skills are drawn about `mu` with a standard deviation of `spread`."""

    mu: float
    spread: float

    def seeds(self, rng: np.random.Generator, count: int) -> list[float]:
        """The skill of each of `count` seeds."""
        return [float(mu) for mu in rng.normal(self.mu, self.spread, count)]

    def truth(self, shape: Benchmark) -> float:
        """The mean true score over all seeds that there could be, 0-100."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(7)
        scores = [true_score(shape, float(self.mu + self.spread * node)) for node in nodes]
        return float(np.dot(weights, scores) / weights.sum())


@lru_cache(maxsize=1)
def seeded_shapes() -> tuple[Benchmark, ...]:
    """600 documents, and twice 200 pictures with six questions each."""
    _, _, pictures, yes_or_no = few_shapes(200)
    return few_shapes(600)[0], pictures, yes_or_no


@lru_cache(maxsize=64)
def trained(number: int, mu: float, noise: float) -> tuple[Training, float]:
    """A method on one of `seeded_shapes`, and its true score.

    Args:
        noise: standard deviation of a seed's true score, over what the score of a single run
            owes to the documents that it alone gets right or wrong at a churn of `CHURN`.
    """
    shape = seeded_shapes()[number]
    combine = get_aggregator(shape.aggregator).combine
    rng = np.random.default_rng(14)
    apart = [
        float(np.diff([combine(sums_by_unit(shape, each).sum(0)) for each in pair])[0])
        for pair in (answers(rng, shape, [mu, mu], rho_for(CHURN, mu)) for _ in range(2_000))
    ]
    slope = (true_score(shape, mu + 1e-3) - true_score(shape, mu - 1e-3)) / 2e-3
    made = Training(mu, float(noise * np.std(apart) / np.sqrt(2) / slope))
    return made, made.truth(shape)


@lru_cache(maxsize=8)
def weights_of(units: int) -> Array:
    """How often the program's bootstrap draws each of so many units, [resamples, units]."""
    return bootstrap_sums(np.eye(units), RESAMPLES, unit_seed(np.arange(units).astype(object)))


def coverage_seeds(world: int, seeds: int, noise: float) -> dict[str, bool]:
    """Which 95 % intervals hold the truth: two methods of several seeds, and a teacher of one."""
    rng = np.random.default_rng([12, world, seeds, round(100 * noise)])
    names = [str(number) for number in range(2 * seeds + 1)]
    tasks, truth = {}, []
    for number, shape in enumerate(seeded_shapes()):
        floor, student = (trained(number, mu, noise) for mu in (0.2, MU))
        mus = [*floor[0].seeds(rng, seeds), *student[0].seeds(rng, seeds), 0.8]
        rows = answers(rng, shape, mus, rho_for(CHURN, MU))
        values = np.stack([sums_by_unit(shape, row) for row in rows])
        draws = get_aggregator(shape.aggregator).combine(weights_of(shape.units) @ values)
        tasks[shape.task] = TaskEvidence.from_draws(
            shape.aggregator, names, values, draws, unit_seed(np.arange(shape.units).astype(object))
        )
        truth.append([floor[1], student[1], true_score(shape, 0.8)])
    evidence = Evidence(tasks)
    first, second, teacher = names[:seeds], names[seeds:-1], names[-1:]
    truth.append([float(each) for each in np.mean(truth, axis=0)])
    held = {}
    for key, (low, own, _) in zip([*tasks, AVERAGE], truth, strict=True):
        held[key] = holds(evidence.score(key, second), own)
        held[f"{key}, difference"] = holds(evidence.difference(key, first, second), own - low)
    low, own, high = truth[-1]
    kept = evidence.retention(AVERAGE, second, teacher)
    held["retention"] = holds(kept, 100 * own / high)
    closed = evidence.gap_closed(AVERAGE, second, first, teacher)
    if closed is not None and closed.interval is not None:  # a floor may come out too high
        held["gap closed"] = holds(closed, 100 * (own - low) / (high - low))
    return held


# --- the whole suite at its real size --------------------------------------------------------


def check_at_real_size(folder: Path) -> tuple[float, float, float, int]:
    """`kd-bench check` on 2 x 259,200 samples: seconds, busy seconds, peak GB, exit code."""
    rng = np.random.default_rng(5)
    suite: list[dict[str, pd.DataFrame]] = [{}, {}]
    for task, shape in real_benchmarks().items():
        for frames, right in zip(
            suite, answers(rng, shape, [MU, MU], rho_for(0.1, MU)), strict=True
        ):
            frames[task] = frame(shape, right)
    for name, frames in zip(("baseline", "candidate"), suite, strict=True):
        write_run(folder, name, frames)
    command = ["check", "candidate", "--against", "baseline", "--results", str(folder)]
    started = time.perf_counter()
    found = measure_command([sys.executable, "-m", "kd_bench", *command])
    return time.perf_counter() - started, found.busy, found.peak / 1e9, found.code


# --- the table -------------------------------------------------------------------------------


def figure_false_regressions(pairs: int = 2_000) -> Figure:
    """Equal models at the real n, discordance 0 to 20 %, correlated within units."""
    rate = float(np.mean(in_parallel(false_regression, pairs)))
    return Figure(
        f'equal models, {pairs:,} pairs: "regressed" anywhere', "<= 5 %", f"{rate:.1%}",
        rate <= 0.05,
    )  # fmt: skip


def figures_power(pairs: int = 100, judged: int = 10) -> list[Figure]:
    """A drop of twice the detectable effect on one benchmark, each of the ten in turn."""
    found, regressed = [], []
    for task, shape in real_benchmarks().items():
        for discordance in (0.05, 0.2):
            lower = mu_for(shape, 2 * detectable(task, discordance))
            job = partial(planted_drop, task=task, discordance=discordance, lower=lower)
            found += [hit for hit, _ in in_parallel(job, pairs)]
            regressed += [hit for _, hit in in_parallel(partial(job, always=True), judged)]
    rate, called = float(np.mean(found)), float(np.mean(regressed))
    return [
        Figure(
            f"a drop of twice the detectable effect, {len(found):,} pairs: found",
            ">= 95 %", f"{rate:.1%}", rate >= 0.95,
        ),
        Figure(
            f'the same, {len(regressed):,} pairs: verdict "regressed" under the shipped margins',
            "reported", f"{called:.1%}", True,
        ),
    ]  # fmt: skip


def figures_coverage(worlds: int = 2_000) -> list[Figure]:
    """95 % intervals against the known truth."""
    held = pd.DataFrame(in_parallel(partial(coverage, names=tuple(real_benchmarks())), worlds))
    shown = {
        "mean, clustered (GQA)": "gqa", "mean, documents (MMMU)": "mmmu", "MME": "mme",
        "POPE F1": "pope", "circular accuracy (MMBench)": "mmbench_en", "Avg10": "average",
        "Avg10 difference": "average, difference", "gap closed": "gap closed",
        "retention": "retention",
    }  # fmt: skip
    rates = held.mean()
    return [
        Figure(
            f"95 % interval of {title}, {worlds:,} worlds: coverage", "93.5 to 96.5 %",
            f"{rates[column]:.1%}", bool(0.935 <= rates[column] <= 0.965),
        )
        for title, column in shown.items()
    ]  # fmt: skip


def figures_few(worlds: int = 2_000) -> list[Figure]:
    """Intervals of benchmarks with few units, also of models that are nearly always right."""
    made = []
    for units in (5, 15, 40):
        for mus, churn in (((0.4, 0.4), 0.15), ((0.4, -0.2), 0.3), ((1.6, 1.6), 0.05),
                           ((-1.5, -1.5), 0.05)):  # fmt: skip
            job = partial(coverage_few, units=units, mus=mus, churn=churn)
            rates = pd.DataFrame(in_parallel(job, worlds)).mean()
            made.append(
                Figure(
                    f"{units} units, mu {mus[0]:g} and {mus[1]:g}, churn {churn:.0%}, {worlds:,} "
                    "worlds: coverage, lowest and highest of ten intervals", "93 % and more",
                    f"{rates.min():.1%} to {rates.max():.1%}", bool(rates.min() >= 0.93),
                )
            )  # fmt: skip
    return made


def figures_seeds(worlds: int = 2_000) -> list[Figure]:
    """Intervals over training seeds, by number of seeds and training noise."""
    made = []
    for seeds in (2, 3, 5):
        for noise in (0.0, 1.0, 3.0):
            job = partial(coverage_seeds, seeds=seeds, noise=noise)
            rates = pd.DataFrame(in_parallel(job, worlds)).mean()
            keys = [shape.task for shape in seeded_shapes()] + [AVERAGE]
            scores, changes = rates[keys], rates[[f"{key}, difference" for key in keys]]
            made.append(
                Figure(
                    f"{seeds} seeds, training noise {noise:g}, {worlds:,} worlds: coverage",
                    "93 % and more",
                    f"differences {changes.min():.1%} to {changes.max():.1%}, scores "
                    f"{scores.min():.1%} to {scores.max():.1%}, retention "
                    f"{rates['retention']:.1%}, gap closed {rates['gap closed']:.1%}",
                    bool(rates.min() >= 0.93),
                )
            )
    return made


def figures_speed() -> list[Figure]:
    """`kd-bench check` on the whole suite at its real size, 10,000 resamples."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, busy, gigabytes, code = check_at_real_size(Path(folder))
    return [
        Figure(
            "`check`, 2 x 259,200 samples, 10,000 resamples: time", "< 30 s",
            f"{seconds:.1f} s, {busy:.1f} s of them busy (exit code {code})",
            seconds < 30 and code in (0, 3),
        ),
        Figure("the same: peak memory", "< 2 GB", f"{gigabytes:.2f} GB", gigabytes < 2),
    ]  # fmt: skip


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the simulations")
    share = 10 if parser.parse_args().quick else 1
    print("| figure | to reach | measured | |\n|---|---|---|---|")  # noqa: T201
    for measure in (
        figures_speed,
        lambda: [figure_false_regressions(2_000 // share)],
        lambda: figures_power(100 // share, 10 // share),
        lambda: figures_coverage(2_000 // share),
        lambda: figures_few(2_000 // share),
        lambda: figures_seeds(2_000 // share),
    ):
        for each in measure():
            mark = "yes" if each.reached else "NO"
            row = f"| {each.name} | {each.target} | {each.measured} | {mark} |"
            print(row, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
