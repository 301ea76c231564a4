"""kd-bench: train, evaluate and compare distilled vision-language models.

    import kd_bench

    training = kd_bench.train("mini", method="switch-kd", steps=200)
    run = kd_bench.evaluate(training)
    print(kd_bench.load_runs("results"))

Each name is imported when it is first used: `import kd_bench` costs milliseconds.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_bench import plots
    from kd_bench.api import (
        Training,
        check,
        compare,
        evaluate,
        load_runs,
        report,
        samples,
        train,
    )
    from kd_bench.distill import losses
    from kd_bench.distill.switch_kd import SwitchKD
    from kd_bench.errors import KdBenchError
    from kd_bench.evals.checkpoint import StockModel, VisualSwitch
    from kd_bench.store import Run

__version__ = "0.2.0"

__all__ = [
    "KdBenchError",
    "Run",
    "StockModel",
    "SwitchKD",
    "Training",
    "VisualSwitch",
    "__version__",
    "check",
    "compare",
    "evaluate",
    "load_runs",
    "losses",
    "plots",
    "report",
    "samples",
    "train",
]

_MODULES = {"losses": "kd_bench.distill.losses", "plots": "kd_bench.plots"}
_HOMES = {
    "KdBenchError": "kd_bench.errors",
    "Run": "kd_bench.store",
    "StockModel": "kd_bench.evals.checkpoint",
    "SwitchKD": "kd_bench.distill.switch_kd",
    "VisualSwitch": "kd_bench.evals.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kd_bench.errors import needs_extra

    extra = "train" if name in ("SwitchKD", "losses") else "eval"
    with needs_extra(f"kd_bench.{name}", extra):
        home = import_module(_MODULES.get(name) or _HOMES.get(name, "kd_bench.api"))
    value = home if name in _MODULES else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Face(ModuleType):
    """`compare` and `report` are functions here, though packages of these names hold their code."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in ("compare", "report") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
