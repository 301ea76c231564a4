"""Time and memory of a report at real sizes: `python -m tests.benchmarks.report [--models 12]`.

Writes a store of 259,000 samples a model, renders it in a process of its own, prints a table row.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from kd_bench.files import digest_text
from kd_bench.records import SAMPLE_COLUMNS
from tests.support.memory import peak_memory
from tests.support.report_store import ROWS_PER_UNIT, TASKS, Model, add_run

# Documents of the real benchmarks, in the order of the paper.
SIZES = dict(
    zip(TASKS, (2374, 4329, 4329, 214_354, 12_578, 2017, 900, 5000, 4319, 9000), strict=True)
)
QUESTION = "What is the person in the middle of the picture holding in the left hand, and why?"


def frame(task: str, model: Model) -> pd.DataFrame:
    """Random answers over documents that every model shares."""
    rows = SIZES[task] // ROWS_PER_UNIT.get(task, 1) * ROWS_PER_UNIT.get(task, 1)
    generator = np.random.default_rng([int(digest_text(model.name)[:8], 16), TASKS.index(task)])
    unit = np.arange(rows) // ROWS_PER_UNIT.get(task, 1)
    yes = np.where(np.arange(rows) % 2, "yes", "no")
    right = generator.random(rows) < 0.45 + 0.1 * model.skill
    said = np.where(right, yes, np.where(yes == "yes", "no", "yes"))
    categories = np.array(["existence", "count", "color", "position"])
    digests = np.array([digest_text(task, str(u)) for u in range(int(unit[-1]) + 1)])
    data = {
        "document_id": [f"{task}-{i}" for i in range(rows)],
        "unit_id": [f"u{u}" for u in unit],
        "category": categories[unit % 4],
        "question": [f"{QUESTION} ({i})" for i in range(rows)],
        "target": yes,
        "answer": said,
        "parsed": said,
        "score": right.astype(float),
        "status": "ok",
        "image_digest": digests[unit],
        "answer_confidence": np.where(right, 0.9, 0.6),
    }
    return pd.DataFrame(data)[list(SAMPLE_COLUMNS)]


def make(results: Path, models: int) -> None:
    """One teacher, one floor, methods with three seeds each."""
    kinds = [("teacher", "", 3.0, None), ("sft", "sft", 0.0, 0), ("sft", "sft", 0.1, 1)]
    methods = ("kl", "bild", "switch-kd")
    kinds += [("kd", methods[i // 3 % 3], 0.3 * i, i % 3) for i in range(models - len(kinds))]
    for number, (role, method, skill, seed) in enumerate(kinds[:models]):
        model = Model(f"{method or role}-{number}", role, method, skill, seed)
        add_run(results, model, suite="ten", change={task: frame(task, model) for task in TASKS})
        sys.stderr.write(f"stored {model.name}\n")


def render(results: str, destination: str) -> None:
    """In the child: render, and tell time and peak memory."""
    from kd_bench.report import render_report

    start, busy = time.perf_counter(), time.process_time()
    page = render_report(Path(results), Path(destination))
    figures = {
        "seconds": round(time.perf_counter() - start, 1),
        "processor seconds": round(time.process_time() - busy, 1),
        "peak memory GB": round(peak_memory() / 1e9, 2),
        "page MB": round(page.stat().st_size / 1e6, 2),
        "samples.parquet MB": round((page.parent / "samples.parquet").stat().st_size / 1e6, 1),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=12)
    parser.add_argument("--store", type=Path, help="keep and reuse the store here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = options.store or Path(folder) / "results"
        if not (results / "runs").exists():
            make(results, options.models)
        code = "import sys; from tests.benchmarks.report import render; render(*sys.argv[1:])"
        command = [sys.executable, "-c", code, str(results), str(Path(folder) / "report")]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
