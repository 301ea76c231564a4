"""Runs beside each other, aligned by document.

align.py        the same documents in the same order, or a refusal
differences.py  paired differences with interval, test and detectable effect
agreement.py    same answers, same mistakes, flips
comparison.py   `compare`: all of it for two or more runs
methods.py      `compare_methods`: training seeds as a second source of error
"""

from kd_bench.compare.agreement import Agreement, Flip
from kd_bench.compare.comparison import (
    CategoryComparison,
    Comparison,
    Measure,
    Relation,
    RunFacts,
    TaskComparison,
    compare,
    list_flips,
)
from kd_bench.compare.differences import Difference
from kd_bench.compare.methods import MethodComparison, compare_methods

__all__ = [
    "Agreement",
    "CategoryComparison",
    "Comparison",
    "Difference",
    "Flip",
    "Measure",
    "MethodComparison",
    "Relation",
    "RunFacts",
    "TaskComparison",
    "compare",
    "compare_methods",
    "list_flips",
]
