"""Training logs of the runs on a board, read once for the curves."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_bench.records import RunManifest

__all__ = ["TrainingLog", "log_of", "read_log"]

_NOT_TERMS = {
    "step", "epoch", "learning_rate", "samples_per_second", "grad_norm", "seconds", "time",
    "steps", "progress", "eta", "tokens", "samples",
}  # fmt: skip
LOG_NAME = "train_log.jsonl"


@dataclass(frozen=True)
class TrainingLog:
    """The logged steps of one training.

    Attributes:
        terms: values by name (`loss` and each weighted term), [steps], NaN where not logged.
        knees: quantiles of the knee by name, [steps].
        stages: (stage name, position at which it starts).
    """

    name: str
    steps: tuple[float, ...]
    terms: dict[str, tuple[float, ...]]
    knees: dict[str, tuple[float, ...]]
    stages: tuple[tuple[str, float], ...] = ()


def log_of(manifest: RunManifest, base: Path | None = None) -> TrainingLog | None:
    """The log that a run's lineage names; None where there is none to be found."""
    training = manifest.training or {}
    for key in ("log", "train_log", "folder", "output", "path", "checkpoint"):
        place = training.get(key)
        if not isinstance(place, str):
            continue
        for path in _places(place, base):
            if path.is_file():
                return read_log(path, manifest.model.name)
    for path in _places(manifest.model.path, base):
        if path.is_file():
            return read_log(path, manifest.model.name)
    return None


def _places(place: str, base: Path | None) -> Iterable[Path]:
    path = Path(place)
    starts = [path] if path.is_absolute() or base is None else [path, base / path]
    for start in starts:
        yield from (
            [start] if start.suffix == ".jsonl" else [start / LOG_NAME, start.parent / LOG_NAME]
        )


def read_log(path: Path, name: str = "") -> TrainingLog | None:
    """Read a log, finished or not; lines that are not sound JSON are passed over."""
    if path.is_dir():
        path = path / LOG_NAME
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
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
    flat = [_flatten(row) for row in rows]
    names = list(dict.fromkeys(key for row in flat for key in row))
    series = {key: tuple(row.get(key, float("nan")) for row in flat) for key in names}
    knees = {key: values for key, values in series.items() if key.startswith("knee")}
    terms = {key: v for key, v in series.items() if key not in knees and key not in _NOT_TERMS}
    return TrainingLog(name, tuple(steps), terms, knees, tuple(stages))


def _flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a row; nested mappings such as `knee: {q50: 12}` become `knee_q50`."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            outer = "" if key == "terms" else f"{prefix}{key}_"
            found |= _flatten(value, outer)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if math.isfinite(number) else 0.0
