"""What Python users call; the command line is a thin layer over the same functions.

    train -> evaluate -> compare, check, report;  load_runs and samples give DataFrames

Every function raises a `KdBenchError` with one line that says what is wrong and what to do.
Scores, differences and interval ends are in points (0 to 100); latencies in milliseconds.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from kd_bench.errors import UsageError, needs_extra
from kd_bench.store import Run, catalogue, missing_tasks

if TYPE_CHECKING:
    import pandas as pd

    from kd_bench.compare import Comparison
    from kd_bench.compare.methods import MethodsComparison
    from kd_bench.distill.recipe import Recipe
    from kd_bench.evals.checkpoint import StockModel, VisualSwitch
    from kd_bench.gate import GateReport
    from kd_bench.policy import Policy

RunLike = Run | str | Path
"""A run, its folder, the beginning of its folder's name, or a model (its newest whole run)."""


@dataclass(frozen=True)
class Training:
    """A training's folder: finished, or stopped and to be continued by the same call.

    Attributes:
        folder: holds recipe.yaml, lineage.json, train_log.jsonl, stages/ and final/.
    """

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The finished student, for `from_pretrained` and `evaluate`."""
        return self.folder / "final"

    @property
    def recipe(self) -> "Recipe":
        """The recipe as it was resolved."""
        with needs_extra("Training.recipe", "train"):
            from kd_bench.distill.recipe import load_recipe

        return load_recipe(self.folder / "recipe.yaml")

    @property
    def lineage(self) -> dict[str, Any]:
        """Status, seed, digests of data, teacher and student, and what each stage spent."""
        from kd_bench.files import read_json

        found: dict[str, Any] = read_json(self.folder / "lineage.json")
        return found

    def log(self) -> "pd.DataFrame":
        """One row a logged step: stage, step, loss, learning_rate, term_*, knee_*, speed.

        Raises:
            UsageError: nothing has been logged.
        """
        import pandas as pd

        from kd_bench.report.history import log_rows

        path = self.folder / "train_log.jsonl"
        if not path.exists():
            raise UsageError(f"There is no {path}.", "Train first.")
        rows = []
        for row in log_rows(path):
            terms = row.pop("terms", {})
            rows.append({**row, **{f"term_{name}": value for name, value in terms.items()}})
        return pd.DataFrame(rows)


def train(
    recipe: str | Path, *, resume: bool = True, quiet: bool = False, **overrides: Any
) -> Training:
    """Train a student; the same call continues a stopped training and leaves a finished one alone.

    Args:
        recipe: name of a shipped recipe, or a YAML file.
        resume: False starts over and deletes what was there.
        quiet: no progress on the terminal.
        overrides: settings of the recipe, or of its last stage: method="kl", steps=100, seed=1,
            data={"path": "pairs.json"}, or pretrain={"steps": 100} for a stage of that name.

    Raises:
        UsageError: recipe, checkpoints or data do not fit; nothing was trained.
        TrainingError: training stopped (a loss that is not finite, a full disk); what was reached
            is kept.
    """
    from rich.console import Console

    with needs_extra("kd_bench.train", "train"):
        from kd_bench.distill.recipe import load_recipe
        from kd_bench.distill.train import train as run_recipe

    loaded = load_recipe(recipe, list(_settings(overrides)))
    final = run_recipe(loaded, resume=resume, console=Console(quiet=quiet))
    return Training(final.parent)


def _settings(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`steps=100`, `data.path="x"`: overrides as the command line takes them."""
    for name, value in overrides.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            plain = str(value) if isinstance(value, Path) else value
            yield f"{prefix}{name}={json.dumps(plain, ensure_ascii=False)}"


def evaluate(
    model: "str | Path | Training | VisualSwitch | StockModel",
    *,
    suite: str = "mini",
    tasks: Sequence[str] | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    results: str | Path = "results",
    **settings: Any,
) -> Run:
    """Evaluate a model; a run that was stopped is continued, a finished one returned.

    Args:
        model: a checkpoint's folder, a hub name, a `Training`, the `VisualSwitch` of two
            checkpoints, or a `StockModel` of lmms-eval.
        suite: mini (the embedded world), ten (the real benchmarks), or a YAML file.
        tasks: only these benchmarks of it.
        data: folder of parquet files, <benchmark>/<split>-*.parquet; None: the suite's own.
        limit: documents a benchmark; pairs and rotations stay whole.
        results: the store that the run is written to.
        settings: further fields of `evals.run.EvalSettings`: name, role, method, seed, batch_size,
            dtype, quantize, profiles, progress, ...

    Returns:
        The run. `run.manifest.status` is complete, partial or unhealthy; `run.results()` holds a
        `TaskResult` by benchmark.

    Raises:
        UsageError: model, suite, benchmark, setting or data cannot be used; nothing was written.
    """
    with needs_extra("kd_bench.evaluate", "eval"):
        from kd_bench.evals.run import EvalSettings
        from kd_bench.evals.run import evaluate as run_model

    if hasattr(model, "save_pretrained"):
        raise UsageError(
            "evaluate takes a checkpoint, not a model in memory.",
            "Save the model and its processor with save_pretrained, and name the folder.",
        )
    known = EvalSettings.__dataclass_fields__
    for name in settings:
        if name not in known:
            from kd_bench.errors import closest

            hint = closest(name, list(known))
            raise UsageError(
                f"evaluate has no setting {name!r}.{hint}", f"Known: {', '.join(known)}."
            )
    return run_model(
        model.checkpoint if isinstance(model, Training) else model,
        EvalSettings(
            suite=suite,
            tasks=tasks,
            data=None if data is None else Path(data),
            limit=limit,
            results=Path(results),
            **settings,
        ),
    )


# --- reading a store ------------------------------------------------------------------------------


def load_runs(results: str | Path = "results") -> "pd.DataFrame":
    """One row a run, oldest first: who and how, then a score by benchmark, then `average`.

    A benchmark that a run has not done is NaN; so is the average of a run without all benchmarks
    of its suite. `why_not` says why a run does not stand for its model (limited, unfinished, a
    newer one); empty where it does.

    Raises:
        UsageError: there is no such folder.
        IncompleteRunError: a run is damaged.
    """
    import pandas as pd

    folder = Path(results)
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}.", "Name a store, normally `results`.")
    there = catalogue(folder)
    for _, error in there.damaged:
        raise error
    rows: list[dict[str, Any]] = []
    benchmarks: dict[str, None] = {}
    for run, manifest in there.runs:
        model, protocol = manifest.model, manifest.protocol
        scores = {task: result.score for task, result in run.results().items()}
        benchmarks |= dict.fromkeys(scores)
        whole = bool(scores) and not missing_tasks(run, manifest)
        rows.append(
            {
                "run": run.path.name,
                "model": model.name,
                "role": model.role,
                "method": model.method,
                "seed": model.seed,
                "suite": protocol.suite,
                "limit": protocol.limit,
                "status": manifest.status,
                "created": pd.Timestamp(manifest.created),
                "why_not": there.reason(run, manifest),
                "parameters": manifest.cost.parameters,
                "latency_ms": manifest.cost.latency_ms,
                **scores,
                "average": sum(scores.values()) / len(scores) if whole else float("nan"),
            }
        )
    facts = ["run", "model", "role", "method", "seed", "suite", "limit", "status", "created"]
    facts += ["why_not", "parameters", "latency_ms"]
    frame = pd.DataFrame(rows, columns=[*facts, *benchmarks, "average"])
    whole_numbers = dict.fromkeys(("seed", "limit", "parameters"), "Int64")
    return frame.astype({**whole_numbers, "latency_ms": "float64", "average": "float64"})


def samples(
    run: RunLike, tasks: Sequence[str] | None = None, *, results: str | Path = "results"
) -> "pd.DataFrame":
    """One row a document of a run: `task`, then `records.SAMPLE_COLUMNS` and `CONTENT_COLUMNS`.

    `score` is what the benchmark's scorer gave the row, in [0, 1]; rows of one `unit_id` are
    resampled together.

    Args:
        tasks: only these benchmarks; None: all that the run has done.

    Raises:
        UsageError: no such run.
        IncompleteRunError: a benchmark was not done, or a file is damaged.
    """
    import pandas as pd

    from kd_bench.records import CONTENT_COLUMNS, SAMPLE_COLUMNS

    (found,) = _find([run], results)
    frames = []
    for task in tasks if tasks is not None else found.done_tasks():
        found.result(task)  # says what a benchmark lacks that was not done
        frame = found.samples(task, [*SAMPLE_COLUMNS, *CONTENT_COLUMNS])
        frame.insert(0, "task", task)
        frames.append(frame)
    if not frames:
        return pd.DataFrame(columns=["task", *SAMPLE_COLUMNS, *CONTENT_COLUMNS])
    return pd.concat(frames, ignore_index=True)


def _find(
    runs: Sequence[RunLike], results: str | Path = "results", like: Run | None = None
) -> list[Run]:
    """The run that each name stands for; runs are taken as they are."""
    names = [str(run) for run in runs if not isinstance(run, Run)]
    named = iter(
        catalogue(Path(results)).find(names, like.manifest if like else None) if names else []
    )
    return [run if isinstance(run, Run) else next(named) for run in runs]


# --- comparing, judging, showing ------------------------------------------------------------------


@overload
def compare(
    *runs: RunLike | Sequence[RunLike],
    methods: Literal[False] = False,
    results: str | Path = "results",
    allow_different: bool = False,
) -> "Comparison": ...


@overload
def compare(
    *runs: str | Sequence[str],
    methods: Literal[True],
    results: str | Path = "results",
    allow_different: bool = False,
) -> "MethodsComparison": ...


def compare(
    *runs: Any,
    methods: bool = False,
    results: str | Path = "results",
    allow_different: bool = False,
) -> "Comparison | MethodsComparison":
    """Compare runs sample by sample against the first one, or methods over all their seeds.

    Args:
        runs: two or more runs, or a list of them; with `methods`, names of methods, each compared
            with each.
        allow_different: runs of different protocols, too; the result is marked.

    Returns:
        The comparison; `to_frame()` gives a DataFrame, `to_json()` what the command line prints.

    Raises:
        NotComparableError: the runs asked different things.
        IncompleteRunError: a run is empty or damaged.
        UsageError: no such run or method, or fewer than two.
    """
    from kd_bench.compare import compare as compare_runs
    from kd_bench.compare.methods import compare_all_methods

    named = runs[0] if len(runs) == 1 and isinstance(runs[0], list | tuple) else runs
    if methods:
        return compare_all_methods(Path(results), named, allow_different=allow_different)
    return compare_runs(_find(named, results), allow_different=allow_different)


def check(
    candidate: RunLike | Sequence[RunLike],
    against: RunLike | Sequence[RunLike] | None = None,
    *,
    policy: "Policy | str | Path | None" = None,
    results: str | Path = "results",
) -> "GateReport":
    """Did the candidate regress?

    Args:
        candidate, against: a run, or several that are training seeds of one method. None: the
            baseline that `kd-bench runs baseline set` named for the candidate's suite.
        policy: margins and rules; a YAML file; None: the shipped one.

    Returns:
        The verdicts; `report.exit_code` is 0 pass, 1 regression, 3 cannot tell.

    Raises:
        NotComparableError: the runs measured different things.
        IncompleteRunError: a run is partial, damaged or unhealthy.
        UsageError: no such run or baseline, or the policy does not fit.
    """
    from kd_bench import gate
    from kd_bench.policy import Policy, load_policy
    from kd_bench.store import baseline_run

    folder = Path(results)
    new = _find(_several(candidate), folder)
    suite = new[0].manifest.protocol.suite
    old = _find(_several(against), folder, new[0]) if against else [baseline_run(folder, suite)]
    new = _find(_several(candidate), folder, old[0])
    if not isinstance(policy, Policy):
        policy = load_policy(None if policy is None else Path(policy), suites=[suite])
    return gate.check(new, old, policy)


def _several(runs: RunLike | Sequence[RunLike]) -> Sequence[RunLike]:
    return [runs] if isinstance(runs, Run | str | Path) else runs


def report(
    results: str | Path = "results",
    to: str | Path = "reports/latest",
    runs: Sequence[str] | None = None,
    *,
    suite: str | None = None,
    main: str | None = None,
    compare: str | None = None,
) -> Path:
    """Render the self-contained page with tables (Markdown, CSV, LaTeX, JSON) and plots beside it.

    Args:
        to: folder of the page; what an earlier report left there is replaced.
        runs: runs or model names; None: the run that stands for each model of the suite.
        suite: None: the newest run's.
        main: row that the headline is about; None: what holds over all methods.
        compare: `paper` puts the measured rows beside the Switch-KD paper's.

    Returns:
        The path of index.html.

    Raises:
        UsageError: no run to show, or `to` lies among runs or holds what is no report.
        NotComparableError: mini scores were to stand beside the paper's.
    """
    from kd_bench.report import render_report

    return render_report(
        Path(results), Path(to), runs, suite=suite, main=main, compare=compare, allow_empty=False
    )
