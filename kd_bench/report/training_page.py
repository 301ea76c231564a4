"""The page of one or more trainings, finished or not."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kd_bench.errors import UsageError
from kd_bench.files import read_json
from kd_bench.report.page import PlotSection, claim_report, flatten, titled, write_report
from kd_bench.report.plots import training_plots
from kd_bench.report.tables import clean
from kd_bench.report.training import LOG_NAME, TrainingLog, read_log

LAYOUT: tuple[PlotSection, ...] = (
    ("training", "Curves", "As logged so far.", ("losses", "knees")),
)


def render_training(trainings: Sequence[Path], destination: Path) -> Path:
    """Plot the logs of training folders (or log files); returns the path of `index.html`.

    Raises:
        UsageError: a folder has no readable log.
    """
    logs = [_read(path) for path in trainings]
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
    return write_report(destination, context, {}, plots, LAYOUT)


def _read(path: Path) -> TrainingLog:
    log = read_log(path)
    if log is None:
        raise UsageError(
            f"{path} has no {LOG_NAME} with a logged step.",
            "Give the folder that `kd-bench train` writes to, after its first logging step.",
        )
    return log


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
    lineage: Any = {}
    folder = path if path.is_dir() else path.parent
    with suppress(OSError, ValueError):
        lineage = read_json(folder / "lineage.json")
    facts = flatten(lineage) if isinstance(lineage, dict) else iter(())
    status = lineage.get("status") if isinstance(lineage, dict) else None
    return {
        "name": clean(log.name),
        "role": "training",
        "status": clean(str(status or "")),
        "health": status not in (None, "complete", "finished", "done"),
        "color": 2 + number % 7,
        "facts": [(titled(name), clean(text)) for name, text in facts],
    }
