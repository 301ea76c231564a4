"""Training logs of the runs on a board, read once for the curves."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_bench.records import RunManifest
from kd_bench.report.board import Entry

LOG_NAME = "train_log.jsonl"


@dataclass(frozen=True)
class TrainingLog:
    """The logged steps of one training.

    Attributes:
        terms: values by name (`loss` and each weighted term), [steps], NaN where not logged.
        knees: quantiles of the knee by name, [steps].
        stages: (stage name, position at which it starts).
        planned: steps of the last stage, 0 where the log does not say.
    """

    name: str
    steps: tuple[float, ...]
    terms: dict[str, tuple[float, ...]]
    knees: dict[str, tuple[float, ...]]
    stages: tuple[tuple[str, float], ...] = ()
    planned: float = 0.0


def logs_of(entry: Entry) -> list[TrainingLog]:
    """The training logs that can be found for an entry's runs, one a seed."""
    logs = (_log_of(manifest) for manifest in entry.manifests)
    return [log for log in logs if log is not None]


def _log_of(manifest: RunManifest) -> TrainingLog | None:
    """The log in a checkpoint's folder or beside it; None where there is none."""
    checkpoint = Path(manifest.model.path)
    for folder in (checkpoint, checkpoint.parent):
        if (folder / LOG_NAME).is_file():
            return read_log(folder / LOG_NAME, manifest.model.name)
    return None


def read_log(path: Path, name: str = "") -> TrainingLog | None:
    """Read a log, finished or not; lines that are not sound JSON are passed over."""
    if path.is_dir():
        path = path / LOG_NAME
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    if not rows:
        return None
    return _collect(rows, name or path.parent.name)


def _collect(rows: list[dict[str, Any]], name: str) -> TrainingLog:
    steps: list[float] = []
    stages: list[tuple[str, float]] = []
    offset = last = 0.0
    for row in rows:
        stage = str(row.get("stage", ""))
        step = _number(row["step"])
        if stages and stage != stages[-1][0] and step <= last:
            offset = steps[-1]  # a stage counts its steps from one
        if not stages or stage != stages[-1][0]:
            stages.append((stage, steps[-1] if steps else 0.0))
        last = step
        steps.append(offset + step)
    columns = [_columns(row) for row in rows]
    names = list(dict.fromkeys(key for row in columns for key in row))
    nothing = float("nan")
    series = {key: tuple(row.get(key, nothing) for row in columns) for key in names}
    knees = {key: values for key, values in series.items() if key.startswith("knee_")}
    terms = {key: values for key, values in series.items() if key not in knees}
    planned = _number(rows[-1].get("steps"))
    return TrainingLog(name, tuple(steps), terms, knees, tuple(stages), planned)


def _columns(row: dict[str, Any]) -> dict[str, float]:
    """`loss`, the terms by name, and the knee's quantiles of one line."""
    terms = row.get("terms")
    found = {"loss": row.get("loss")} | (terms if isinstance(terms, dict) else {})
    found |= {key: value for key, value in row.items() if key.startswith("knee_")}
    numeric = {k: v for k, v in found.items() if isinstance(v, int | float)}
    return {str(key): float(value) for key, value in numeric.items()}


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if math.isfinite(number) else 0.0
