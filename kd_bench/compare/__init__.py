"""Runs beside each other, aligned by document.

align.py        the same documents in the same order, or a refusal
differences.py  paired differences with interval, test and detectable effect
agreement.py    same answers, same mistakes, flips
comparison.py   `compare`: all of it for two or more runs
estimates.py    the one estimator: every score, difference and ratio with its interval
methods.py      methods over their training seeds; what one seed does not tell
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
from kd_bench.compare.estimates import Claim, Estimate, Evidence, TaskEvidence, headline
from kd_bench.compare.methods import (
    MethodsComparison,
    compare_all_methods,
)

__all__ = [
    "Agreement",
    "CategoryComparison",
    "Claim",
    "Comparison",
    "Difference",
    "Estimate",
    "Evidence",
    "Flip",
    "Measure",
    "MethodsComparison",
    "Relation",
    "RunFacts",
    "TaskComparison",
    "TaskEvidence",
    "compare",
    "compare_all_methods",
    "headline",
    "list_flips",
]
