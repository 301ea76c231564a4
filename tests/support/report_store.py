"""A store with known contents for the report's tests: answers drawn from a small skill model."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from kd_bench.aggregators import aggregate
from kd_bench.files import digest_text
from kd_bench.records import (
    SAMPLE_COLUMNS,
    Cost,
    Interval,
    ModelRef,
    Protocol,
    RunManifest,
    RunStatus,
    TaskResult,
)
from kd_bench.registry import load_task
from kd_bench.store import Run, held_run, wanted_run

TASKS = (
    "mme",
    "mmbench_en",
    "mmbench_cn",
    "vqav2",
    "gqa",
    "scienceqa_img",
    "mmmu",
    "textvqa",
    "vizwiz_vqa",
    "pope",
)
# Rows that form one resampling unit, and the subsets of each benchmark.
ROWS_PER_UNIT = {"mme": 2, "mmbench_en": 4, "mmbench_cn": 4, "vqav2": 4, "gqa": 8, "pope": 6}
CATEGORIES = {
    "mme": ("existence", "count", "color", "position"),
    "mmbench_en": ("attribute", "relation"),
    "mmbench_cn": ("attribute", "relation"),
    "pope": ("adversarial", "popular", "random"),
    "mmmu": ("Math", "Art"),
}
WORDS = ("red", "blue", "circle", "square", "7", "left", "two", "green", "star", "A")


@dataclass(frozen=True)
class Model:
    """One evaluated model of the synthetic store."""

    name: str
    role: str
    method: str
    skill: float
    seed: int | None = None
    parameters: int = 220_000
    latency_ms: float = 11.0


def demo_models(seeds: Sequence[int] = (0, 1, 2)) -> list[Model]:
    """Teacher, floor, methods with seeds, the hybrid."""
    models = [Model("teacher", "teacher", "", 1.55, None, 610_000, 24.0)]
    for method, role, skill in (
        ("sft", "sft", -0.1),
        ("kl", "kd", 0.1),
        ("bild", "kd", 0.2),
        ("llava-kd", "baseline", 0.3),
        ("switch-kd", "kd", 0.75),
        ("switch-kd", "switch", 1.2),
    ):
        for seed in seeds:
            name = f"{method}-seed{seed}" + ("-hybrid" if role == "switch" else "")
            wobble = (seed - 1) * 0.06
            size = (460_000, 21.0) if role == "switch" else (220_000, 11.0)
            models.append(Model(name, role, method, skill + wobble, seed, *size))
    return models


def samples(task: str, model: Model, units: int = 30, seed: int = 0) -> pd.DataFrame:
    """Samples of one benchmark; every model meets the same documents."""
    documents = np.random.default_rng([seed, TASKS.index(task)])
    per_unit = ROWS_PER_UNIT.get(task, 1)
    rows = units * per_unit
    difficulty = documents.normal(0, 1, units).repeat(per_unit) * 0.7
    difficulty += documents.normal(0, 1, rows) * 0.7
    targets = documents.integers(0, len(WORDS), rows)
    yes = documents.random(rows) < 0.5
    own = np.random.default_rng([int(digest_text(model.name)[:8], 16), TASKS.index(task)])
    right = model.skill + own.normal(0, 0.6, rows) > difficulty
    wrong = (targets + own.integers(1, len(WORDS), rows)) % len(WORDS)
    yes_no = task in ("mme", "pope")
    categories = CATEGORIES.get(task, ("",))
    frame = []
    for row in range(rows):
        unit = row // per_unit
        if yes_no:
            target = "yes" if yes[row] else "no"
            answer = target if right[row] else ("no" if yes[row] else "yes")
        else:
            target = WORDS[targets[row]]
            answer = target if right[row] else WORDS[wrong[row]]
        frame.append(
            {
                "document_id": f"{task}-{row}",
                "unit_id": f"{task}-u{unit}",
                "category": categories[unit % len(categories)],
                "question": f"What is at place {row} of the picture {unit}?",
                "target": target,
                "answer": answer,
                "parsed": answer,
                "score": float(right[row]),
                "status": "ok",
                "image_digest": digest_text(task, str(unit)),
                "answer_confidence": float(
                    np.clip(0.55 + 0.2 * right[row] + own.normal(0, 0.12), 0.05, 0.999)
                )
                if yes_no
                else float("nan"),
            }
        )
    return pd.DataFrame(frame, columns=list(SAMPLE_COLUMNS))


@cache
def aggregator_of(task: str) -> str:
    """The benchmark's default aggregator."""
    return load_task(task).aggregator


def result(task: str, frame: pd.DataFrame, fingerprint: str = "") -> TaskResult:
    """The benchmark's result, scored by its aggregator."""
    score = aggregate(aggregator_of(task), frame) if len(frame) else float("nan")
    half = 196 * float(frame["score"].std(ddof=0)) / max(1, len(frame)) ** 0.5
    return TaskResult(
        task=task,
        fingerprint=fingerprint or digest_text("fingerprint", task),
        metric="exact_match",
        score=score,
        metrics={"exact_match": score / 100},
        documents=len(frame),
        units=frame["unit_id"].nunique(),
        rates={"unparsed": 0.0, "empty": 0.0, "truncated": 0.0, "error": 0.0},
        interval=Interval(score - half, score + half),
        seconds=1.5,
        computed=len(frame),
    )


def add_run(
    results: Path,
    model: Model,
    *,
    tasks: Sequence[str] = TASKS,
    planned: Sequence[str] | None = None,
    units: int = 30,
    status: RunStatus = "complete",
    suite: str = "mini",
    created: str = "2026-05-01T10:00:00+00:00",
    notes: Sequence[str] = (),
    training: dict[str, object] | None = None,
    change: dict[str, pd.DataFrame] | None = None,
    checkpoint: str = "",
    images: str = "",
    ambiguous: float = 0.0,
) -> Run:
    """Commit one run; `change` replaces a benchmark's samples.

    Args:
        images: what stands in for them; the run lies beside that of the same model.
        ambiguous: share of answers that can be read in two ways.
    """
    digest = digest_text(model.name, model.role)
    checkpoint = checkpoint or f"checkpoints/{model.name}"
    run = Run(results / "runs" / f"20260501-{model.name}-{digest[:8]}-mini000{len(images)}")
    reference = ModelRef(
        model.name,
        model.role,
        checkpoint,
        digest,
        model.method,
        model.seed,  # type: ignore[arg-type]
    )
    cost = Cost(model.parameters, model.parameters * 4, model.latency_ms, 90_000_000)
    run.write_manifest(
        RunManifest(
            run.path.name,
            status,
            created,
            reference,
            Protocol(suite, batch_size=16, engine="shared prefix", images=images),
            list(planned or tasks),
            finished=created,
            cost=cost,
            training=training,
            provenance={
                "command": f"kd-bench eval {checkpoint} --suite {suite}",
                "git": {"commit": "0123456789abcdef", "dirty": False},
                "versions": {"kd-bench": "0.1.0", "torch": "2.9.0", "lmms-eval": "0.7.3"},
                "hardware": {"cpu": "2 cores", "accelerator": "none"},
            },
            notes=list(notes),
        )
    )
    for task in tasks:
        frame = (change or {}).get(task)
        frame = samples(task, model, units) if frame is None else frame
        found = result(task, frame)
        if ambiguous:
            found = replace(found, rates={**found.rates, "ambiguous": ambiguous})
        run.commit(found, frame)
    return run


def with_content(frame: pd.DataFrame, share: float) -> pd.DataFrame:
    """The same with what the answers say: of the wrong ones, a share is right but for its form."""
    said = frame["answer"].to_numpy(dtype=object)
    wrong = np.flatnonzero(frame["score"] == 0)
    said[wrong[: round(share * len(wrong))]] = frame["target"].to_numpy(dtype=object)[
        wrong[: round(share * len(wrong))]
    ]
    right = (said == frame["target"].to_numpy(dtype=object)).astype(float)
    return frame.assign(content=said, score_by_content=right)


def make_store(
    results: Path, models: Sequence[Model] | None = None, units: int = 30, suite: str = "mini"
) -> Path:
    """A complete store of the demo's models."""
    for number, model in enumerate(models if models is not None else demo_models()):
        minute = f"2026-05-01T10:{number:02d}:00+00:00"
        add_run(results, model, units=units, created=minute, suite=suite)
    return results


def make_demo(folder: Path, units: int = 30, seeds: Sequence[int] = (0, 1, 2)) -> Path:
    """A store as the demo leaves it: training logs and pictures too. Returns `results`."""
    results = folder / "results"
    for number, model in enumerate(demo_models(seeds)):
        minute = f"2026-05-01T10:{number:02d}:00+00:00"
        trained = folder / "checkpoints" / model.name
        student = model.role not in ("teacher", "switch")
        checkpoint = str(add_training(trained, model)) if student else ""
        run = add_run(results, model, units=units, created=minute, checkpoint=checkpoint)
        if number == 0:
            add_pictures(run)
    return results


def add_training(folder: Path, model: Model, steps: int = 300) -> Path:
    """A training folder as the trainer leaves it; returns the checkpoint's path."""
    (folder / "final").mkdir(parents=True)
    noise = np.random.default_rng(int(digest_text(model.name)[:8], 16))
    lines = []
    terms = {"ce": 1.0, "dbild": 0.5, "vsd": 0.6} if model.method == "switch-kd" else {"ce": 1.0}
    for stage, start in (("warm-up", 2.5), ("distil", 1.6)):
        for step in range(10, steps + 1, 10):
            decay = start * float(np.exp(-step / 150)) + 0.4
            values = {name: w * decay * float(noise.normal(1, 0.05)) for name, w in terms.items()}
            line = {
                "stage": stage,
                "step": step,
                "steps": steps,
                "loss": sum(values.values()),
                "learning_rate": 1e-3,
                "epoch": step / steps,
                "terms": values,
                "samples_per_second": 180.0,
            }
            if "dbild" in terms:
                middle = 12 + 30 * decay
                for side, factor in (("teacher", 1.0), ("student", 1.4)):
                    for percent, share in ((10, 0.5), (50, 1.0), (90, 1.8)):
                        line[f"knee_{side}_p{percent}"] = middle * factor * share
            lines.append(json.dumps(line) + "\n")
    (folder / "train_log.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "final"


def add_pictures(run: Run, tasks: Sequence[str] = TASKS, size: int = 32) -> None:
    """Thumbnails by image digest, as the runner stores them."""
    folder = run.images
    folder.mkdir(exist_ok=True)
    for task in tasks:
        for digest in run.samples(task, ("image_digest",))["image_digest"].unique():
            pixels = np.random.default_rng(int(digest[:8], 16)).integers(60, 255, (2, 2, 3))
            picture = Image.fromarray(pixels.astype(np.uint8)).resize((size, size), 0)
            picture.save(folder / f"{digest[:16]}.png")


def with_status(run: Run, status: RunStatus) -> None:
    """Change a stored run's status."""
    run.write_manifest(replace(run.manifest, status=status))


def open_run(results: Path, model: ModelRef, protocol: Protocol, tasks: list[str]) -> Run:
    """The run of this model under this protocol, begun; further tasks are added to a known one."""
    wanted = wanted_run(model, protocol, tasks)
    with held_run(results, wanted) as run:
        run.begin(wanted)
    return run


@contextmanager
def written_elsewhere(run: Run) -> Iterator[None]:
    """Let another process hold the run for writing; it is killed at the end."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom kd_bench.store import Run\n"
        "with Run(Path(sys.argv[1])).locked():\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        yield
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def printed(
    results: Path, names: Sequence[str] | None = None, *, compare: str | None = None
) -> str:
    """What `report` prints, in 100 columns, without a page."""
    from kd_bench.report.leaderboard import terminal_tables
    from kd_bench.report.papers import comparison
    from kd_bench.report.relations import read_board
    from kd_bench.report.tables import to_terminal

    board, _ = read_board(results, names)
    tables = terminal_tables(board)
    tables += [] if compare is None else [comparison(board, compare)]
    return "\n".join(map(to_terminal, tables))
