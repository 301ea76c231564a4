"""What changes over time, each with its page: a training's losses by step, a suite's runs by date.

In `report --trend` every finished run has a point, an earlier one of the same model too. Its
difference is from the run that the baseline was when it finished; of older stores, which kept no
moves, from today's.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kd_bench.compare.estimates import Estimate, Evidence
from kd_bench.errors import UsageError
from kd_bench.files import read_json
from kd_bench.records import AVERAGE, Interval
from kd_bench.report.board import Board, Entry, load_board
from kd_bench.report.page import claim_report, flatten, titled, write_report
from kd_bench.report.plots import training_plots, trend
from kd_bench.report.relations import read_evidence
from kd_bench.report.style import plotting
from kd_bench.report.tables import (
    Cell,
    Column,
    Row,
    Table,
    clean,
    to_csv,
    to_json_text,
    to_markdown,
)
from kd_bench.store import Run, baseline_moves, baselines

# --- training ------------------------------------------------------------------------------------

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
    """The training logs in the checkpoints' folders or beside them, one a seed where there is."""
    logs = []
    for run, model in zip(entry.runs, (each.model for each in entry.manifests), strict=True):
        path = training_file(run, model.path, LOG_NAME)
        logs.append(read_log(path, model.name) if path else None)
    return [log for log in logs if log is not None]


def training_file(run: Run, checkpoint: str, name: str) -> Path | None:
    """A file in a checkpoint's folder or beside it; None where there is none.

    The checkpoint's path is looked up below the store first: a store that travels has it there.
    """
    for place in (run.path.parents[1] / checkpoint, Path(checkpoint)):
        for folder in (place, place.parent):
            if (folder / name).is_file():
                return folder / name
    return None


def read_log(path: Path, name: str = "") -> TrainingLog | None:
    """Read a log or a folder's, finished or not; lines that are not sound JSON are passed over."""
    if path.is_dir():
        path = path / LOG_NAME
    try:
        rows = log_rows(path)
    except OSError:
        return None
    return _collect(rows, name or path.parent.name) if rows else None


def log_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of train_log.jsonl without lines that a killed training left torn.

    Raises:
        OSError: it cannot be read.
    """
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
    return rows


def _collect(rows: list[dict[str, Any]], name: str) -> TrainingLog:
    steps: list[float] = []
    stages: list[tuple[str, float]] = []
    offset = last = 0.0
    for row in rows:
        stage, step = str(row.get("stage", "")), _number(row["step"])
        if not stages or stage != stages[-1][0]:
            if stages and step <= last:
                offset = steps[-1]  # a stage counts its steps from one
            stages.append((stage, steps[-1] if steps else 0.0))
        last = step
        steps.append(offset + step)
    columns = [_columns(row) for row in rows]
    names = dict.fromkeys(key for row in columns for key in row)
    series = {key: tuple(row.get(key, math.nan) for row in columns) for key in names}
    knees = {key: values for key, values in series.items() if key.startswith("knee_")}
    terms = {key: values for key, values in series.items() if key not in knees}
    planned = _number(rows[-1].get("steps"))
    return TrainingLog(name, tuple(steps), terms, knees, tuple(stages), planned)


def _columns(row: dict[str, Any]) -> dict[str, float]:
    """`loss`, the terms by name, and the knee's quantiles of one line."""
    terms = row.get("terms")
    found = {"loss": row.get("loss")} | (terms if isinstance(terms, dict) else {})
    found |= {key: value for key, value in row.items() if key.startswith("knee_")}
    return {str(key): float(v) for key, v in found.items() if isinstance(v, int | float)}


def _number(value: Any) -> float:
    with suppress(TypeError, ValueError):
        return number if math.isfinite(number := float(value)) else 0.0
    return 0.0


def render_training(trainings: Sequence[Path], destination: Path) -> Path:
    """Plot training folders (or log files), unfinished ones too; returns the path of `index.html`.

    Raises:
        UsageError: a folder has no readable log.
    """
    logs = []
    for path in trainings:
        log = read_log(path)
        if log is None:
            raise UsageError(
                f"{path} has no {LOG_NAME} with a logged step.",
                "Give the folder that `kd-bench train` writes to, after its first logging step.",
            )
        logs.append(log)
    plots = training_plots(logs)
    claim_report(destination, (), [plot.name for plot in plots])
    one = len(logs) == 1
    context: dict[str, Any] = {
        "title": f"Training of {clean(logs[0].name)}" if one else f"{len(logs)} trainings",
        "eyebrow": "kd-bench report",
        "lead": [_state(log) for log in logs],
        "runs": [
            _facts(path, log, number)
            for number, (path, log) in enumerate(zip(trainings, logs, strict=True))
        ],
    }
    layout = [("training", "Curves", "As logged so far.", ("losses", "knees"))]
    return write_report(destination, context, {}, plots, layout)


def _state(log: TrainingLog) -> str:
    """`switch-kd-1: stage distil, step 300 of 1,500, loss 1.23`."""
    stage, steps = log.stages[-1][0], log.planned
    done = log.steps[-1] - log.stages[-1][1]
    of = f" of {steps:,.0f}" if steps else ""
    losses = log.terms.get("loss", ())
    loss = f", loss {losses[-1]:.3g}" if losses else ""
    where = f"stage {clean(stage)}, " if stage else ""
    return f"{clean(log.name)}: {where}step {done:,.0f}{of}{loss}."


def _facts(path: Path, log: TrainingLog, number: int) -> dict[str, Any]:
    lineage: Any = None
    with suppress(OSError, ValueError):
        lineage = read_json((path if path.is_dir() else path.parent) / "lineage.json")
    if not isinstance(lineage, dict):
        lineage = {}
    status = lineage.get("status")
    return {
        "name": clean(log.name),
        "role": "training",
        "status": clean(str(status or "")),
        "health": status not in (None, "complete", "finished", "done"),
        "color": 2 + number % 7,
        "facts": [(titled(name), clean(text)) for name, text in flatten(lineage)],
    }


# --- trend ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One finished run on the way.

    Attributes:
        line: what it is a point of: its method, or its name.
        average: mean of all benchmarks; None where it lacks one or had another protocol.
        baseline: folder name of the run that the baseline was then; empty for none.
        change: points beside that baseline, paired by sample; None where it was another's.
    """

    when: datetime
    run: Run
    name: str
    line: str
    average: float | None
    interval: Interval | None
    baseline: str
    change: Estimate | None


def render_trend(
    results: Path,
    destination: Path,
    names: Sequence[str] | None = None,
    *,
    suite: str | None = None,
) -> Path:
    """The averages of a suite's runs by date and the baseline's moves; returns `index.html`.

    Beside it stand `trend.md`, `.csv`, `.json` and the plot.

    Raises:
        UsageError: there is no finished run of that suite.
    """
    board = _by_run(load_board(results, names, suite, every=True))
    if not board.entries:
        raise UsageError(
            f"No finished run of the suite {suite or board.suite!r} in {results}.",
            "`kd-bench runs list` shows what there is.",
        )
    moves = [(when, run) for when, name, run in baseline_moves(results) if name == board.suite]
    today = baselines(results).get(board.suite)
    evidence = read_evidence(board, columns=False)
    steps = []
    for entry in sorted(board.entries, key=lambda e: (_when(e), e.key)):
        past = [run for when, run in moves if when <= _when(entry)]
        then = past[-1] if past else "" if moves or today is None else today.run
        steps.append(_step(board, evidence, entry, then))
    table = _table(steps, board)
    files = {
        "trend.md": to_markdown(table), "trend.csv": to_csv(table),
        "trend.json": to_json_text([table]),
    }  # fmt: skip
    claim_report(destination, files, ["trend"])
    with plotting():
        plot = trend(steps, moves)
    intro = "Differences are from the baseline of that day, paired by sample, with their interval."
    context: dict[str, Any] = {
        "title": f"{len(steps)} runs of the suite {clean(board.suite)}",
        "eyebrow": "kd-bench report",
        "mini": board.mini,
        "lead": [_moved(moves, steps)],
        "trend": {"table": table, "intro": intro},
        "downloads": [(name, "the same table") for name in files],
    }
    layout = [("plots", "Trend", "The average of every finished run by date.", ("trend",))]
    return write_report(destination, context, files, [plot] if plot else [], layout)


def _by_run(board: Board) -> Board:
    """A board with a row for each finished run, seeds unfolded."""
    rows = []
    for entry in board.entries:
        seeds = zip(entry.runs, entry.manifests, entry.results, strict=True)
        for number, (run, manifest, results) in enumerate(seeds):
            if manifest.status != "complete":
                continue
            scores = {
                key: replace(score, value=(score.seeds or {number: score.value})[number],
                             spread=None)
                for key, score in entry.scores.items()
            }  # fmt: skip
            row = replace(entry, key=run.path.name, name=manifest.model.name, runs=(run,),
                          manifests=(manifest,), results=(results,), scores=scores)  # fmt: skip
            rows.append(row)
    return replace(board, entries=tuple(rows))


def _step(board: Board, evidence: Evidence, entry: Entry, baseline: str) -> Step:
    score, method = entry.score(AVERAGE), entry.method
    whole = set(evidence.tasks) == {task.id for task in board.tasks}
    mine = [entry.key]
    known = whole and score.comparable and evidence.has(AVERAGE, mine)
    change = None
    if known and baseline not in ("", entry.key) and evidence.has(AVERAGE, [baseline]):
        change = evidence.difference(AVERAGE, [baseline], mine)
    return Step(
        when=_when(entry),
        run=entry.runs[0],
        name=entry.name,
        line=f"{method} ({entry.role})" if method else entry.name,
        average=score.value if score.known and score.comparable else None,
        interval=evidence.score(AVERAGE, mine).interval if known else None,
        baseline=baseline,
        change=change,
    )


def _when(entry: Entry) -> datetime:
    manifest = entry.manifests[0]
    when = datetime.fromisoformat(manifest.finished or manifest.created)
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _moved(moves: Sequence[tuple[datetime, str]], steps: Sequence[Step]) -> str:
    if not moves:
        return "No move of the baseline was recorded: differences are from the one that is set now."
    names = {step.run.path.name: step.name for step in steps}
    told = (f"{when:%Y-%m-%d}: {clean(names.get(run, run))}" for when, run in moves)
    return f"The baseline moved {len(moves)} times: {'; '.join(told)}."


def _table(steps: Sequence[Step], board: Board) -> Table:
    columns = (
        Column("date", "Finished", "text"),
        Column("model", "Model", "text"),
        Column("run", "Run", "text"),
        Column("average", "Average", "score", interval=True),
        Column("change", "Δ baseline", "difference"),
        Column("baseline", "Baseline then", "text"),
    )
    rows = tuple(
        Row.of(
            (name := step.run.path.name),
            f"{step.when:%Y-%m-%d %H:%M}",
            step.name,
            name,
            Cell(step.average, None, step.interval),
            Cell(step.change.value, None, step.change.interval) if step.change else None,
            "itself" if step.baseline == name else step.baseline or "none",
        )
        for step in steps
    )
    warning = "Embedded mini world: not the real benchmarks." if board.mini else ""
    caption = f"Suite {board.suite}. In brackets: 95 % intervals over samples."
    return Table("Runs by date", columns, rows, caption, warning=warning)
