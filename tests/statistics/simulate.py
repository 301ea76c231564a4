"""Benchmarks of the real sizes with made-up answers whose true scores are known.

Every document of a model has a latent z ~ N(0, 1), correlated within its unit (`icc`) and between
models (`rho`); the answer is right when z < mu. So models with equal mu are exchangeable, `rho`
sets how often they disagree, `icc` how much a unit's documents stand and fall together, and the
population's score is known for every aggregator.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import integrate, optimize, stats

from kd_bench.aggregators import MME_COGNITION, MME_PERCEPTION, aggregate
from kd_bench.files import digest_text
from kd_bench.records import (
    SAMPLE_COLUMNS,
    ModelRef,
    Protocol,
    Role,
    RunManifest,
    RunStatus,
    TaskResult,
)
from kd_bench.store import Run

Array = NDArray[np.float64]
norm = stats.norm

# Pairs by category in lmms-lab-encoder/MME: 1,187 in all.
MME_PAIRS = dict(
    zip(
        (*MME_PERCEPTION, *MME_COGNITION),
        (30, 30, 30, 30, 147, 170, 200, 200, 200, 20, 70, 20, 20, 20),
        strict=True,
    )
)


@dataclass(frozen=True)
class Benchmark:
    """The shape of one benchmark: rows, and the unit and category that each belongs to.

    Attributes:
        unit: unit number of every row, [rows]; rows of a unit stand together.
        category: category number of every row, into `categories`.
        icc: correlation of the latents within a unit.
        yes: answers are yes or no; half of the targets are yes.
    """

    task: str
    aggregator: str
    unit: NDArray[np.int64]
    category: NDArray[np.int64]
    categories: tuple[str, ...] = ("",)
    icc: float = 0.0
    yes: bool = False

    @property
    def rows(self) -> int:
        """Number of documents."""
        return len(self.unit)

    @property
    def units(self) -> int:
        """Number of resampling units."""
        return int(self.unit[-1]) + 1


def _even(rows: int, units: int) -> NDArray[np.int64]:
    """Unit of each row when `rows` are spread over `units` as evenly as they go."""
    return np.arange(rows) * units // rows


@lru_cache(maxsize=1)
def real_benchmarks() -> dict[str, Benchmark]:
    """The ten at their real numbers of documents and units; 258,971 rows."""
    plain = {"scienceqa_img": 2017, "mmmu": 900, "textvqa": 5000, "vizwiz_vqa": 4319}
    pairs = np.repeat(np.arange(1187), 2)
    kind = np.repeat(np.repeat(np.arange(14), list(MME_PAIRS.values())), 2)
    pope = _even(9000, 500)
    zeros = np.zeros
    made = [Benchmark("mme", "mme", pairs, kind, tuple(MME_PAIRS), 0.3)]
    made += [
        *(
            Benchmark(task, "circular", _even(4329, 1164), zeros(4329, int), icc=0.6)
            for task in ("mmbench_en", "mmbench_cn")
        ),
        Benchmark("vqav2", "mean", _even(214_354, 40_504), zeros(214_354, int), icc=0.2),
        Benchmark("gqa", "mean", _even(12_578, 398), zeros(12_578, int), icc=0.1),
        *(Benchmark(t, "mean", np.arange(n), zeros(n, int)) for t, n in plain.items()),
        Benchmark(
            "pope", "f1", pope, np.arange(9000) % 3, ("adversarial", "popular", "random"), 0.15,
            yes=True,
        ),
    ]  # fmt: skip
    order = ("mme", "mmbench_en", "mmbench_cn", "vqav2", "gqa", "scienceqa_img", "mmmu", "textvqa",
             "vizwiz_vqa", "pope")  # fmt: skip
    by_name = {each.task: each for each in made}
    return {task: by_name[task] for task in order}


def latents(
    rng: np.random.Generator, shape: Benchmark, models: int, rho: float
) -> NDArray[np.float32]:
    """[models, rows], each N(0, 1): `icc` within units, `rho` between models."""

    def correlated(size: int) -> NDArray[np.float32]:
        shared = rng.standard_normal((1, size), dtype=np.float32)
        own = rng.standard_normal((models, size), dtype=np.float32)
        return np.float32(math.sqrt(rho)) * shared + np.float32(math.sqrt(1 - rho)) * own

    rows = correlated(shape.rows)
    if shape.icc == 0:
        return rows
    common = correlated(shape.units)[:, shape.unit]
    return np.float32(math.sqrt(shape.icc)) * common + np.float32(math.sqrt(1 - shape.icc)) * rows


def answers(
    rng: np.random.Generator, shape: Benchmark, mus: list[float], rho: float
) -> NDArray[np.bool_]:
    """Which rows each model gets right, [models, rows]."""
    return latents(rng, shape, len(mus), rho) < np.asarray(mus, dtype=np.float32)[:, None]


@lru_cache(maxsize=4096)
def rho_for(discordance: float, mu: float) -> float:
    """The correlation at which two models with this mu disagree on that share of rows."""
    p = float(norm.cdf(mu))
    most = 2 * p * (1 - p)
    if discordance >= most:
        return 0.0
    if discordance <= 0:
        return 1.0

    def excess(rho: float) -> float:
        both = stats.multivariate_normal.cdf([mu, mu], cov=[[1, rho], [rho, 1]])
        return 2 * (p - float(both)) - discordance

    return float(optimize.brentq(excess, 0.0, 1 - 1e-9))


# --- the same two things as the program sees them: frames, and sums of units -----------------


def frame(shape: Benchmark, right: NDArray[np.bool_]) -> pd.DataFrame:
    """A samples frame of one model; targets and texts depend on the document only."""
    rows = np.arange(shape.rows)
    documents = np.char.add(f"{shape.task}-", rows.astype(str)).astype(object)
    # Alternates inside units and categories: half of each are yes.
    said_yes = (rows // 3 % 2 == 0) if shape.yes else np.zeros(shape.rows, bool)
    if shape.yes:
        target = np.where(said_yes, "yes", "no").astype(object)
        parsed = np.where(said_yes == right, "yes", "no").astype(object)
    else:
        target = np.full(shape.rows, "a", dtype=object)
        parsed = np.where(right, "a", "b").astype(object)
    units = np.char.add(f"{shape.task}-u", shape.unit.astype(str)).astype(object)
    return pd.DataFrame(
        {
            "document_id": documents,
            "unit_id": units,
            "category": np.asarray(shape.categories, dtype=object)[shape.category],
            "question": "What is it?",
            "target": target,
            "answer": parsed,
            "parsed": parsed,
            "score": right.astype(float),
            "status": "ok",
            "image_digest": units,
            "answer_confidence": float("nan"),
        },
        columns=list(SAMPLE_COLUMNS),
    )


def sums_by_unit(shape: Benchmark, right: NDArray[np.bool_]) -> Array:
    """`aggregators.unit_statistics` of `frame(shape, right)` without the frame, [units, m].

    Up to the order of the units; a test holds the two together.
    """
    unit, count = shape.unit, shape.units

    def by_unit(values: NDArray[np.bool_]) -> Array:
        return np.bincount(unit, weights=values, minlength=count)

    sizes = np.bincount(unit, minlength=count).astype(float)
    if shape.aggregator == "mean":
        return np.stack([by_unit(right), sizes], axis=1)
    if shape.aggregator == "circular":
        return np.stack([(by_unit(right) == sizes).astype(float), np.ones(count)], axis=1)
    if shape.aggregator == "f1":
        yes = np.arange(shape.rows) // 3 % 2 == 0
        columns = [right & yes, ~right & ~yes, ~right & yes]
        return np.stack([*(by_unit(each) for each in columns), sizes], axis=1)
    kind = shape.category[::2]
    kept = kind < len(MME_PERCEPTION)
    pairs = by_unit(right)
    points = ((pairs / 2 + (pairs == 2)) / 2)[kept]
    order = np.argsort(MME_PERCEPTION)  # columns are in the order of the names
    member = (kind[kept][:, None] == order).astype(float)
    return np.concatenate([points[:, None] * member, member], axis=1)


def true_score(shape: Benchmark, mu: float) -> float:
    """The population's score of a model with this mu, 0-100."""
    p = float(norm.cdf(mu))
    if shape.aggregator == "mean":
        return 100 * p
    if shape.aggregator == "f1":
        # Half of the rows are yes: true positives p / 2, false ones and misses (1 - p) / 2 each.
        return 100 * 2 * p / (2 * p + 2 * (1 - p))
    if shape.aggregator == "mme":
        return 100 * (p + _all_right(mu, shape.icc, 2)) / 2
    sizes = np.bincount(np.bincount(shape.unit))
    shares = sizes / sizes.sum()
    return 100 * sum(
        share * _all_right(mu, shape.icc, size) for size, share in enumerate(shares) if share
    )


@lru_cache(maxsize=4096)
def _all_right(mu: float, icc: float, size: int) -> float:
    """Probability that all rows of a unit are right, over the unit's shared part."""

    def integrand(u: float) -> float:
        inner = norm.cdf((mu - math.sqrt(icc) * u) / math.sqrt(1 - icc))
        return float(inner**size * norm.pdf(u))

    return float(integrate.quad(integrand, -8, 8)[0])


# --- runs on disk ----------------------------------------------------------------------------


def write_run(
    results: Path,
    name: str,
    frames: dict[str, pd.DataFrame],
    *,
    role: Role = "kd",
    method: str = "",
    seed: int | None = None,
    status: RunStatus = "complete",
    suite: str = "ten",
    planned: list[str] | None = None,
    **changes: object,
) -> Run:
    """Commit a run whose samples are these frames; `changes` go into every task's result."""
    from kd_bench.compare.align import aggregator_of

    run = Run(results / "runs" / f"20260101-{name}-00000000-00000000")
    model = ModelRef(name, role, f"checkpoints/{name}", digest_text(name), method, seed)
    created = f"2026-01-01T00:{len(list((results / 'runs').glob('*'))):02d}:00+00:00"
    run.write_manifest(
        RunManifest(run.path.name, status, created, model, Protocol(suite), planned or list(frames))
    )
    for task, samples in frames.items():
        result = TaskResult(
            task=task,
            fingerprint=digest_text("protocol", task),
            metric="metric",
            score=0.0,
            metrics={},
            documents=len(samples),
            units=samples["unit_id"].nunique(),
            rates={"error": 0.0, "empty": 0.0, "truncated": 0.0, "unparsed": 0.0},
        )
        fields = {"score": aggregate(aggregator_of(result), samples), **changes}
        run.commit(TaskResult(**{**vars(result), **fields}), samples)  # type: ignore[arg-type]
    return run


def small_frames(
    seed: int = 0, mu: float = 0.4, rho: float = 0.8, models: int = 2, shrink: int = 10
) -> list[dict[str, pd.DataFrame]]:
    """Frames of several models on benchmarks a tenth of the real sizes (VQAv2: a thousandth)."""
    rng = np.random.default_rng(seed)
    made: list[dict[str, pd.DataFrame]] = [{} for _ in range(models)]
    for task, shape in real_benchmarks().items():
        factor = shrink * 100 if task == "vqav2" else shrink
        kept = shape.unit % factor == 0
        _, unit = np.unique(shape.unit[kept], return_inverse=True)
        small = Benchmark(
            task, shape.aggregator, unit, shape.category[kept], shape.categories, shape.icc,
            shape.yes,
        )  # fmt: skip
        right = answers(rng, small, [mu] * models, rho)
        for model in range(models):
            made[model][task] = frame(small, right[model])
    return made
