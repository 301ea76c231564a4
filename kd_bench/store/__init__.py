"""Results on disk: run folders, and which of them a name stands for."""

from kd_bench.store.catalogue import (
    Baseline,
    Catalogue,
    baseline_moves,
    baseline_run,
    baselines,
    catalogue,
    cautions,
    find_run,
    find_runs,
    list_runs,
    missing_tasks,
    runs_elsewhere,
    set_baseline,
    shortcomings,
    suite_tasks,
)
from kd_bench.store.run import TOLERANCE, Run, held_run, wanted_run

__all__ = [
    "TOLERANCE",
    "Baseline",
    "Catalogue",
    "Run",
    "baseline_moves",
    "baseline_run",
    "baselines",
    "catalogue",
    "cautions",
    "find_run",
    "find_runs",
    "held_run",
    "list_runs",
    "missing_tasks",
    "runs_elsewhere",
    "set_baseline",
    "shortcomings",
    "suite_tasks",
    "wanted_run",
]
