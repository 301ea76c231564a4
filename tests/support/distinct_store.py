"""A store in which every number is another one, and what a report of it must say.

The truth is worked out here from the files as they lie on disk, by arithmetic of its own: nothing
of `kd_bench.report` is asked. A number that stands in the wrong place is then a wrong number.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from kd_bench.records import AVERAGE, Cost
from kd_bench.store import Run
from tests.support.report_store import WORDS, Model, add_run, add_training
from tests.support.report_store import samples as documents_of

TITLES = {
    "mme": "MME", "gqa": "GQA", "scienceqa_img": "SQA-I", "mmmu": "MMMU", "textvqa": "TextVQA",
    "pope": "POPE",
}  # fmt: skip
TASKS = tuple(TITLES)  # in the report's order
LUCK = 374  # of the numbers tried, the one that makes all shown values differ
UNITS = {"mme": 24, "gqa": 24, "scienceqa_img": 61, "mmmu": 83, "textvqa": 97, "pope": 24}
# name, role, method, seed, share that is right, parameters, weights, latency, memory
MODELS: tuple[tuple[Model, int, int], ...] = (
    (Model("teacher", "teacher", "", 0.87, None, 3_210_000_000, 97.3), 6_480_000_000,
     9_150_000_000),
    (Model("sft-seed0", "sft", "sft", 0.44, 0, 512_000_000, 21.4), 871_000_000, 2_310_000_000),
    (Model("sft-seed1", "sft", "sft", 0.47, 1, 512_000_000, 22.6), 871_000_000, 2_330_000_000),
    (Model("kl", "kd", "kl", 0.55, 0, 523_000_000, 23.8), 1_246_000_000, 2_570_000_000),
    (Model("switch-kd-seed0", "kd", "switch-kd", 0.69, 0, 534_000_000, 25.9), 1_430_000_000,
     2_690_000_000),
    (Model("switch-kd-seed1", "kd", "switch-kd", 0.66, 1, 534_000_000, 26.7), 1_430_000_000,
     2_710_000_000),
    (Model("switch-kd-seed0-hybrid", "switch", "switch-kd", 0.78, 0, 2_990_000_000, 88.1),
     5_980_000_000, 7_930_000_000),
)  # fmt: skip


@dataclass
class Truth:
    """One row of the report, by hand: points, percent, and the units of `records.Cost`."""

    label: str
    role: str
    runs: list[Path]
    seeds: int
    scores: dict[str, float] = field(default_factory=dict)
    by_seed: dict[str, list[float]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    retentions: dict[str, float] = field(default_factory=dict)
    gap_closed: float = math.nan

    def spread(self, key: str) -> float | None:
        """Standard deviation over seeds."""
        values = self.by_seed[key]
        return statistics.stdev(values) if len(values) > 1 else None


def make_distinct(folder: Path, tasks: Sequence[str] = TASKS) -> Path:
    """Write the store with its training logs; returns `results`."""
    results = folder / "results"
    for number, (model, weights, memory) in enumerate(MODELS):
        checkpoint = ""
        if model.role not in ("teacher", "switch"):
            checkpoint = str(add_training(folder / "checkpoints" / model.name, model))
        run = add_run(
            results,
            model,
            tasks=tasks,
            created=f"2026-05-01T10:{number:02d}:00+00:00",
            change={task: answers(task, model) for task in tasks},
            checkpoint=checkpoint,
        )
        cost = Cost(model.parameters, weights, model.latency_ms, memory)
        run.write_manifest(replace(run.manifest, cost=cost))
    return results


def answers(task: str, model: Model) -> pd.DataFrame:
    """Everyone's documents, of which this model has a share of its own right."""
    frame = documents_of(task, Model("documents", "student", "", 0.0), UNITS[task])
    place = list(TASKS).index(task)
    noise = np.random.default_rng([LUCK, place, sum(map(ord, model.name))])
    hardness = np.random.default_rng(place).normal(0, 1, len(frame))
    order = np.argsort(hardness + noise.normal(0, 0.5, len(frame)))
    right = np.zeros(len(frame), dtype=bool)
    right[
        order[
            : round((model.skill + 0.021 * (place - 2.5) + noise.uniform(-0.02, 0.02)) * len(frame))
        ]
    ] = True
    other = {"yes": "no", "no": "yes"} | dict(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
    said = [t if r else other[t] for t, r in zip(frame["target"], right, strict=True)]
    sure = np.where(right, 0.72, 0.61) + noise.uniform(-0.25, 0.25, len(frame))
    stored = frame["answer_confidence"].notna()
    return frame.assign(
        answer=said,
        parsed=said,
        score=right.astype(float),
        answer_confidence=np.where(stored, sure, np.nan),
    )


def truths(results: Path, tasks: Sequence[str] = TASKS) -> list[Truth]:
    """What stands in each row, by label; read from the JSON files alone."""
    rows = {
        "teacher": Truth("teacher", "teacher", [], 1),
        "switch-kd-seed0-hybrid": Truth("switch-kd-seed0-hybrid", "switch", [], 1),
        "Switch-KD": Truth("Switch-KD", "kd", [], 2),
        "kl": Truth("kl", "kd", [], 1),
        "SFT": Truth("SFT", "sft", [], 2),
    }
    titles = {"sft": "SFT", "switch-kd": "Switch-KD"}
    for path in sorted((results / "runs").iterdir()):
        model = json.loads((path / "manifest.json").read_text())["model"]
        several = model["role"] != "switch" and model["method"] in titles
        rows[titles[model["method"]] if several else model["name"]].runs.append(path)
    for row in rows.values():
        _measured(row, tasks)
    teacher, floor = rows["teacher"], rows["SFT"]
    for row in rows.values():
        if row is not teacher:
            row.retentions = {k: 100 * v / teacher.scores[k] for k, v in row.scores.items()}
        if row not in (teacher, floor):
            row.differences = {k: v - floor.scores[k] for k, v in row.scores.items()}
            row.gap_closed = (
                100 * row.differences[AVERAGE] / (teacher.scores[AVERAGE] - floor.scores[AVERAGE])
            )
    return list(rows.values())


def _measured(row: Truth, tasks: Sequence[str]) -> None:
    for task in tasks:
        values = [
            json.loads((path / "tasks" / f"{task}.json").read_text())["score"] for path in row.runs
        ]
        row.by_seed[task] = values
        row.scores[task] = sum(values) / len(values)
    row.by_seed[AVERAGE] = [
        sum(row.by_seed[task][seed] for task in tasks) / len(tasks) for seed in range(row.seeds)
    ]
    row.scores[AVERAGE] = sum(row.scores[task] for task in tasks) / len(tasks)
    costs = [json.loads((path / "manifest.json").read_text())["cost"] for path in row.runs]
    for key in ("parameters", "weight_bytes", "latency_ms", "peak_memory_bytes"):
        row.measured[key] = sorted(cost[key] for cost in costs)
        row.costs[key] = row.measured[key][len(costs) // 2]


def run_named(results: Path, name: str) -> Run:
    """The run of one model."""
    (path,) = (results / "runs").glob(f"*-{name}-????????-*")
    return Run(path)


def raw_score(run: Run, task: str) -> float:
    """The score as the file has it."""
    return float(json.loads((run.path / "tasks" / f"{task}.json").read_text())["score"])
