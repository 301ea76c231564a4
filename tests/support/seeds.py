"""Runs of several training seeds of several methods, whose answers are known."""

from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from kd_bench.cli import app
from kd_bench.store import Run
from tests.compare.test_compare import samples
from tests.statistics.simulate import write_run

TASKS = ("gqa", "mmmu", "textvqa")


def right(seed: int, skill: float, documents: int = 600, noise: float = 0.6) -> list[float]:
    """Answers of one seed: a difficulty that all share, and noise of its own."""
    difficulty = np.random.default_rng(0).normal(0, 1, documents)
    own = np.random.default_rng([1, seed]).normal(0, noise, documents)
    return (skill + own > difficulty).astype(float).tolist()


def seeds_of(results: Path, method: str, skill: float, count: int = 3, first: int = 0) -> list[Run]:
    """The runs of a method; `first` starts the seeds of its answers."""
    return [
        write_run(
            results,
            f"{method}-seed{seed}",
            {
                task: samples(task, right(first + 10 * seed + place, skill))
                for place, task in enumerate(TASKS)
            },
            role="sft" if method == "sft" else "kd",
            method=method,
            seed=seed,
        )
        for seed in range(count)
    ]


def store_of_methods(results: Path) -> Path:
    """Three seeds of sft and of switch-kd, one of kl."""
    seeds_of(results, "sft", 0.4)
    seeds_of(results, "switch-kd", 0.9, first=100)
    seeds_of(results, "kl", 0.4, count=1, first=200)
    return results


def command(*words: object, code: int | None = 0) -> str:
    """What the command line prints, after its exit code was checked."""
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert code is None or done.exit_code == code, done.output
    return done.output


def named(store: Path, *names: str) -> list[Run]:
    """Runs of a store by their models' names."""
    return [Run(next((store / "runs").glob(f"*-{name}-*"))) for name in names]
