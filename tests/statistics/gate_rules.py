"""The gate's rules and the page's headline in 2,000 simulated worlds each, printed as tables.

    python -m tests.statistics.gate_rules             a minute

A benchmark's difference is drawn from a normal distribution with the standard error that the suite
has at its real sizes and a churn (share of documents that change between equal students); the
rules are the program's own, written for arrays. `figures.py` judges simulated answers one by one.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from kd_bench.aggregators import get_aggregator
from kd_bench.policy import load_policy
from tests.statistics.simulate import Benchmark, answers, real_benchmarks, rho_for, sums_by_unit

Array = NDArray[np.float64]

MU = 0.4  # about 66 % of documents right
WORLDS = 2_000
CHURNS = (0.05, 0.10, 0.15, 0.26)
ALPHA = 0.05
TASKS = tuple(real_benchmarks())
SHIPPED = load_policy().margins_for("ten")
MARGINS = np.array([*(SHIPPED.tasks[task] for task in TASKS), SHIPPED.average])


def influence(shape: Benchmark, values: Array) -> Array:
    """What each unit adds to the score, in points, by the delta method, [units]."""
    combine = get_aggregator(shape.aggregator).combine
    sums = values.sum(axis=0)
    steps = np.diag(1e-4 * np.maximum(sums, 1.0))
    slopes = (combine(sums + steps) - combine(np.maximum(sums - steps, 0))) / (
        np.diag(steps) + np.minimum(np.diag(steps), sums)
    )
    return np.asarray(values @ slopes)


@lru_cache(maxsize=16)
def standard_errors(churn: float, pairs: int = 6) -> Array:
    """Of the difference of two equal students, by benchmark and (last) on the average."""
    rng = np.random.default_rng([8, round(1000 * churn)])
    rho = rho_for(churn, MU)
    found = []
    for shape in real_benchmarks().values():
        variances = []
        for _ in range(pairs):
            one, other = answers(rng, shape, [MU, MU], rho)
            apart = influence(shape, sums_by_unit(shape, other))
            apart -= influence(shape, sums_by_unit(shape, one))
            variances.append(len(apart) * apart.var())
        found.append(float(np.sqrt(np.mean(variances))))
    errors = np.array(found)
    return np.append(errors, np.sqrt(np.sum(errors**2)) / len(errors))


# --- the rules, for many worlds at once --------------------------------------------------------


def holm_rejects(p: Array, alpha: float = ALPHA) -> NDArray[np.bool_]:
    """Holm's step-down in each row, [worlds, tests]."""
    order = np.argsort(p, axis=1)
    count = p.shape[1]
    passed = np.take_along_axis(p, order, 1) <= alpha / (count - np.arange(count))
    rejected = np.logical_and.accumulate(passed, axis=1)
    back = np.empty_like(rejected)
    np.put_along_axis(back, order, rejected, 1)
    return back


def exit_codes(differences: Array, errors: Array, margins: Array, every: bool) -> NDArray[np.int64]:
    """0, 1 or 3 in each world; differences [worlds, benchmarks + average]."""
    z = differences / errors
    real = holm_rejects(2 * stats.norm.sf(np.abs(z)))
    kept = stats.norm.sf((differences + margins) / errors)
    passed = holm_rejects(kept)
    if not every:
        passed[:, -1] = kept[:, -1] <= ALPHA
    improved = real & (differences > 0)
    regressed = (real & ~improved & ~passed).any(axis=1)
    fine = passed | improved
    undecided = ~fine.all(axis=1) if every else ~fine[:, -1]
    return np.where(regressed, 1, np.where(undecided, 3, 0))


def worlds_of(rng: np.random.Generator, errors: Array, drop: Array, worlds: int = WORLDS) -> Array:
    """Differences of `worlds` pairs; `drop` [benchmarks] is what the candidate truly lost."""
    found = rng.normal(-drop, errors[:-1], (worlds, len(drop)))
    return np.column_stack([found, found.mean(axis=1)])


def planned(errors: Array, every: bool = False) -> tuple[Array, Array]:
    """The planner's margins and the drops that it says are found, as `gate_plan` has them."""
    tests = len(errors)
    z = stats.norm.ppf
    level = np.full(tests, ALPHA / tests)
    passing = np.full(tests, 0.95)
    if not every:
        level[-1], passing[-1] = ALPHA, 0.975
    margins = np.ceil(10 * (z(1 - level) + z(passing)) * errors) / 10
    seen = (z(1 - ALPHA / 2 / tests) + z(0.96)) * errors
    outside = margins - z(1 - ALPHA) * errors + z(0.96) * errors
    return margins, np.ceil(10 * np.maximum(seen, outside)) / 10


@dataclass(frozen=True)
class Rates:
    """Shares of worlds by exit code."""

    passed: float
    regressed: float
    undecided: float


def rates(codes: NDArray[np.int64]) -> Rates:
    """Shares of exit codes 0, 1 and 3."""
    return Rates(*(float(np.mean(codes == code)) for code in (0, 1, 3)))


def equal_students(churn: float, margins: Array | None, every: bool = False) -> Rates:
    """Two equal students; margins None are the planner's."""
    errors = standard_errors(churn)
    chosen = planned(errors, every)[0] if margins is None else margins
    rng = np.random.default_rng([9, round(1000 * churn)])
    return rates(exit_codes(worlds_of(rng, errors, np.zeros(10)), errors, chosen, every))


def found_drops(churn: float, margins: Array, drops: Array) -> tuple[Array, float]:
    """Exit-1 rates of a drop in one benchmark [benchmarks], and of one in all alike (average)."""
    errors = standard_errors(churn)
    rng = np.random.default_rng([10, round(1000 * churn)])

    def share(drop: Array) -> float:
        return rates(exit_codes(worlds_of(rng, errors, drop), errors, margins, False)).regressed

    single = np.array([share(np.eye(10)[task] * drops[task]) for task in range(10)])
    return single, share(np.full(10, drops[-1]))


# --- the page's headline -----------------------------------------------------------------------


def headlines(methods: int, seeds: int, noise: float, worlds: int = WORLDS) -> float:
    """Share of pages with a headline where all methods equal the floor.

    Args:
        noise: standard deviation of a seed's true average from training, over that of what a
            single run's average owes to its own documents.
    """
    rng = np.random.default_rng([11, methods, seeds, round(100 * noise)])
    own = 1.0  # variance of a run's average from documents that it alone gets right or wrong
    runs = rng.normal(0, np.sqrt(own + noise**2), (worlds, methods + 1, seeds))
    difference = runs[:, 1:].mean(2) - runs[:, :1].mean(2)
    sampling = 2 * own / seeds
    level = ALPHA / methods
    if seeds == 1:
        reach = stats.norm.ppf(1 - level / 2) * np.sqrt(sampling)
        return float((difference > reach).any(axis=1).mean())
    seen = runs.var(axis=2, ddof=1) / seeds
    net = np.maximum(seen - own / seeds, 0)
    variance = sampling + net[:, 1:] + net[:, :1]
    whole = sampling + seen[:, 1:] + seen[:, :1]
    spread = (seen[:, 1:] ** 2 + seen[:, :1] ** 2) / (seeds - 1)
    freedom = np.maximum(variance * whole / spread, seeds - 1)
    reach = stats.t.ppf(1 - level / 2, freedom) * np.sqrt(variance)
    return float((difference > reach).any(axis=1).mean())


# --- tables --------------------------------------------------------------------------------------


def tables() -> list[str]:
    """The lines that docs/statistics.md has."""
    lines = ["| equal students, churn | 5 % | 10 % | 15 % | 26 % |", "|---|---|---|---|---|"]
    for title, margins, every in (
        ("default rule, shipped margins", MARGINS, False),
        ("default rule, planner's margins", None, False),
        ("`every: true`, shipped margins", MARGINS, True),
        ("`every: true`, planner's margins", None, True),
    ):
        found = [equal_students(churn, margins, every) for churn in CHURNS]
        for word, pick in (("exit 0", "passed"), ("exit 1", "regressed")):
            cells = " | ".join(f"{getattr(each, pick):.3f}" for each in found)
            lines.append(f"| {title}: {word} | {cells} |")
    for title, own in (("shipped margins", False), ("planner's margins", True)):
        single, average = [], []
        for churn in CHURNS:
            margins = planned(standard_errors(churn))[0] if own else MARGINS
            one, all_alike = found_drops(churn, margins, 2 * margins)
            single.append(f"{one.min():.3f}")
            average.append(f"{all_alike:.3f}")
        lines.append(f"| twice the margin in one benchmark, {title}: exit 1, lowest of ten | "
                     f"{' | '.join(single)} |")  # fmt: skip
        lines.append(f"| twice the average's margin, {title}: exit 1 | {' | '.join(average)} |")
    single, average = [], []
    for churn in CHURNS:
        margins, drops = planned(standard_errors(churn))
        one, all_alike = found_drops(churn, margins, drops)
        single.append(f"{one.min():.3f}")
        average.append(f"{all_alike:.3f}")
    lines.append(f"| the drop that the planner says is found, one benchmark | "
                 f"{' | '.join(single)} |")  # fmt: skip
    lines.append(f"| the same, average | {' | '.join(average)} |")
    lines += ["", "| all methods equal: pages with a headline | 1 method | 4 | 9 |"]
    lines.append("|---|---|---|---|")
    for seeds, noise in ((1, 0.0), (1, 1.0), (3, 0.0), (3, 1.0), (3, 3.0)):
        cells = " | ".join(f"{headlines(count, seeds, noise):.1%}" for count in (1, 4, 9))
        lines.append(f"| {seeds} seed(s), training noise {noise:g} | {cells} |")
    return lines


if __name__ == "__main__":
    for line in tables():
        print(line, flush=True)  # noqa: T201
