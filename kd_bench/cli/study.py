"""`kd-bench demo --study`: what the embedded world can tell about distillation, with many seeds.

Three parts: `trials` of learning rates and weights, on validation scenes; the `map`, which asks
when a teacher pays, and the `arms`, which vary Switch-KD, on the test sets. What is finished is
not run again; the tables are of what is there so far.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kd_bench.cli.demo import FLOOR, SWITCHED, TEACHER, Student, evaluation, seconds_of
from kd_bench.cli.jobs import run_jobs
from kd_bench.errors import UsageError, closest
from kd_bench.files import read_json, write_text
from kd_bench.records import AVERAGE

if TYPE_CHECKING:
    import pandas as pd

    from kd_bench.compare.estimates import Estimate
    from kd_bench.report.style import Plot
    from kd_bench.store import Run

CHECKPOINTS = Path("checkpoints/study")
RESULTS = Path("results/study")
TABLES = Path("reports/study")


@dataclass(frozen=True)
class Experiment:
    """Trainings of `mini` whose students answer the same documents.

    Attributes:
        arms: overrides of the recipe by the name that an arm has in tables and folders.
        data: folder of the documents below the embedded world's.
    """

    name: str
    arms: dict[str, tuple[str, ...]]
    seeds: Sequence[int]
    data: str = "test"

    @property
    def results(self) -> Path:
        """The store of its evaluations."""
        return RESULTS / self.name

    def students(self, arm: str) -> list[Student]:
        """An arm's trainings, which differ in nothing but their seed."""
        root, settings = CHECKPOINTS / self.name, self.arms[arm]
        return [Student(arm, seed, root, settings) for seed in self.seeds]

    def run(self, workers: int, *, switched: bool = False) -> None:
        """Train and evaluate what is missing.

        Args:
            switched: evaluate the teacher, and every student's vision before the teacher's
                language model, too.
        """
        students = [student for arm in self.arms for student in self.students(arm)]
        training = [s.train() for s in students if not Path(s.checkpoint).exists()]
        asked = [*self._evaluations(), *(self._switched() if switched else ())]
        groups = {f"{self.name}-train": training, f"{self.name}-eval": asked}
        run_jobs(groups, workers, CHECKPOINTS / "logs", seconds_of)

    def runs(self) -> "dict[tuple[str, int], Run]":
        """Its students' complete runs by arm and seed."""
        return {
            (run.manifest.model.method or "", run.manifest.model.seed or 0): run
            for run in self._complete()
            if run.manifest.model.role not in ("teacher", "switch")
        }

    def switched_runs(self) -> "dict[str, Run]":
        """The complete runs of the teacher and of the visual switches, by name."""
        named = {run.manifest.model.name: run for run in self._complete()}
        return {k: r for k, r in named.items() if r.manifest.model.role in ("teacher", "switch")}

    def _complete(self) -> "list[Run]":
        from kd_bench.store import list_runs

        found = list_runs(self.results) if self.results.exists() else []
        return [run for run in found if run.manifest.status == "complete"]

    def _evaluations(self) -> Iterator[list[str]]:
        """What the store lacks of the students, a command an arm."""
        from kd_bench.world.build import world_folder

        data = [] if self.data == "test" else ["--data", str(world_folder() / self.data)]
        done = self.runs()
        for arm in self.arms:
            missing = [s.checkpoint for s in self.students(arm) if (arm, s.seed) not in done]
            if missing:
                yield evaluation(missing, self.results, "--method", arm, *data)

    def _switched(self) -> Iterator[list[str]]:
        """What the store lacks of the teacher and of the visual switches."""
        done = self.switched_runs()
        if "teacher" not in done:
            yield evaluation([TEACHER], self.results, "--role", "teacher", "--name", "teacher")
        for arm in self.arms:
            for student in self.students(arm):
                if (name := switched_name(arm, student.seed)) not in done:
                    yield student.hybrid(self.results, "--name", name)


def switched_name(arm: str, seed: int) -> str:
    """Of the run of a student's vision before the teacher's language model."""
    return f"{arm}-seed{seed}-switched"


def run_study(
    parts: Sequence[str], methods: Sequence[str], seeds: Sequence[int], workers: int
) -> None:
    """Run parts of the study one after the other; `methods` and `seeds` are the map's.

    Raises:
        UsageError: no methods, no seeds, or no such part.
    """
    if not methods or not seeds:
        raise UsageError("The study needs methods and seeds.", "For example --seeds 0,1,2.")
    known = {
        "trials": lambda: run_trials(workers),
        "map": lambda: draw_map(methods, seeds, workers),
        "arms": lambda: run_arms(workers),
    }
    for part in parts:
        if part not in known:
            raise UsageError(
                f"The study needs parts that it has: {part!r} is none.{closest(part, list(known))}",
                f"Known: {', '.join(known)}.",
            )
    for part in parts:
        known[part]()


def _write(table: "pd.DataFrame", name: str) -> None:
    text = table.to_csv(index=False, float_format="%.4g", lineterminator="\n")
    write_text(TABLES / name, text)
    typer.echo(f"Table: {TABLES / name}")


# --- trials: as many for each method ------------------------------------------------------------

TRIAL_SEED = 5
"""None of the seeds whose scores are reported."""
TRIED: dict[str, tuple[tuple[float, float], ...]] = {
    FLOOR: tuple((r, 1) for r in (0.4, 0.6, 0.75, 1.1, 1.5, 2.1, 3, 4.2, 6, 0.1, 0.2, 0.3, 0.5)),
    "others": (
        *((rate, weight) for rate in (0.75, 1.5, 3) for weight in (0.5, 1, 2)),
        *((0.4, 1), (0.4, 2), (0.4, 4), (0.75, 4)),
    ),
}
"""Learning rates in thousandths, and weights of what the teacher says: nine trials a method, then
four where the best of the nine lay at an end."""
WEIGHTED = {
    "kl": "{{loss: kl, weight: {0}}}",
    SWITCHED: "{{loss: dbild, name: align, weight: {0}}}, "
    "{{loss: dbild, of: switch, name: switch, weight: {0}}}",
}
"""A method's terms beside `ce`, all with one weight."""


def trials() -> Experiment:
    """Learning rates and weights of every method in the demo's regime, on validation scenes."""
    arms: dict[str, tuple[str, ...]] = {}
    for rate, _ in TRIED[FLOOR]:
        arms[f"{FLOOR}-rate{rate}e-3"] = (f"method={FLOOR}", f"learning_rate={rate}e-3")
    for method, terms in WEIGHTED.items():
        for rate, weight in TRIED["others"]:
            weighted = f"terms=[{{loss: ce}}, {terms.format(weight)}]"
            name = f"{method}-rate{rate}e-3-weight{weight}"
            arms[name] = (weighted, f"learning_rate={rate}e-3")
    return Experiment("trials", arms, [TRIAL_SEED], "validation")


def run_trials(workers: int) -> None:
    """Run every trial; `trials.csv` has a row each: its arm, the ten benchmarks and their mean."""
    import pandas as pd

    experiment = trials()
    experiment.run(workers)
    rows = []
    for (arm, _), run in experiment.runs().items():
        scores = {key: result.score for key, result in run.results().items()}
        rows.append({"arm": arm, **scores, "mean": sum(scores.values()) / len(scores)})
    table = pd.DataFrame(rows).sort_values("mean", ascending=False)
    _write(table, "trials.csv")


# --- the map: when does a teacher pay? -----------------------------------------------------------

COUNTS = (120, 300, 600, 1200)
COLUMNS = ("wrong_percent", "conversations", "method", "seeds", "mean", "above_sft", "low", "high")


@dataclass(frozen=True)
class Cell:
    """One place of the map."""

    error: int  # wrong labels in percent
    count: int  # labelled conversations

    def experiment(self, methods: Sequence[str], seeds: Sequence[int]) -> Experiment:
        """Methods on the labels of this cell."""
        data = f"data.path=embedded:data/study/errors-{self.error:02d}/conversations.json"
        limit = f"data.limit={self.count}"
        arms: dict[str, tuple[str, ...]] = {m: (f"method={m}", data, limit) for m in methods}
        return Experiment(f"errors{self.error:02d}-labels{self.count}", arms, seeds)


def cells() -> list[Cell]:
    """Every cell, the demo's own regime first, then those farthest from what is known."""
    from kd_bench.world.build import STUDY_ERRORS

    errors = [round(100 * error) for error in STUDY_ERRORS]
    every = [Cell(error, count) for count in COUNTS for error in errors]
    first = [Cell(25, 600), Cell(0, 600), Cell(40, 600), Cell(25, 120), Cell(25, 1200)]
    return [*first, *(cell for cell in every if cell not in first)]


def draw_map(methods: Sequence[str], seeds: Sequence[int], workers: int) -> None:
    """Fill the map cell by cell; `map.csv` and `map.svg` are written anew after each."""
    from kd_bench.world.build import world_folder

    world_folder(study=True)
    for cell in cells():
        cell.experiment(methods, seeds).run(workers)
        typer.echo(_line(cell))
        write_map()


def findings(*chosen: Cell) -> "pd.DataFrame":
    """A row a cell and method, in points; none of cells that are empty yet.

    Columns: wrong_percent, conversations, method, seeds, mean of ten, above_sft with the ends
    low and high of its 95 % interval, NaN where there is none.
    """
    import pandas as pd

    from kd_bench.report.relations import read_board

    rows: list[tuple[int | float | str | None, ...]] = []
    for cell in chosen:
        results = cell.experiment((), ()).results
        if not results.exists():
            continue
        board, _ = read_board(results)
        for entry in board.entries:
            mean, above = entry.score(AVERAGE), entry.differences.get(AVERAGE)
            if mean.known:
                points = above.value if above is not None and above.known else None
                ends = above.interval if above is not None else None
                low, high = (ends.low, ends.high) if ends else (None, None)
                known = (cell.error, cell.count, entry.method, len(entry.runs), mean.value)
                rows.append((*known, points, low, high))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict.fromkeys(COLUMNS[4:], float))


def _line(cell: Cell) -> str:
    parts = []
    for row in findings(cell).itertuples():
        ends = f"{row.low:+.1f} to {row.high:+.1f}"
        above = "" if ends == "+nan to +nan" else f" ({row.above_sft:+.1f}, {ends})"
        parts.append(f"{row.method} {row.mean:.1f}{above}")
    return f"{cell.error} % wrong, {cell.count} conversations: {'; '.join(parts)}"


def write_map() -> None:
    """`map.csv`, a row a cell and method, in points; and `map.svg`, which shows the rows."""
    found = findings(*sorted(cells(), key=lambda cell: (cell.error, cell.count)))
    _write(found, "map.csv")
    write_text(TABLES / "map.svg", _map_plot(found).standalone())


def _map_plot(found: "pd.DataFrame") -> "Plot":
    """Points above SFT by number of conversations: a panel an error rate, a line a method."""
    from kd_bench.report.style import INK, canvas, legend, marker, plotting, series, to_plot

    errors = sorted({cell.error for cell in cells()})
    methods = sorted(found[found["above_sft"].notna()]["method"].unique())
    points = found.fillna({"above_sft": 0.0, "low": 0.0, "high": 0.0})
    with plotting():
        figure, grid = canvas(7.2, 2.6, 1, len(errors))
        reach = min(points["low"].min(), 0) - 0.3, max(points["high"].max(), 0) + 0.3
        for axes, error in zip(grid[0], errors, strict=True):
            axes.set_title(f"{error} % wrong")
            axes.axhline(0, color=INK, linewidth=0.9)
            axes.set(xscale="log", xlim=(90, 1600), xticks=COUNTS, ylim=reach)
            axes.set_xticklabels([f"{count:,}" for count in COUNTS])
            axes.minorticks_off()
            if axes is not grid[0][0]:
                axes.set_yticklabels([])
            for number, method in enumerate(methods):
                rows = points[(points["wrong_percent"] == error) & (points["method"] == method)]
                heights, side = rows["above_sft"], number - (len(methods) - 1) / 2
                axes.errorbar(
                    rows["conversations"] * 1.14**side, heights,
                    yerr=(heights - rows["low"], rows["high"] - heights), color=series(2 + number),
                    marker=marker(2 + number), markersize=4, capsize=2, label=method,
                )  # fmt: skip
        grid[0][0].set_ylabel("Points above SFT")
        figure.supxlabel("Labelled conversations", fontsize=8.5)
        legend(figure, *grid[0][0].get_legend_handles_labels())
        summary = (
            f"Points above SFT on the mean of ten, with 95 % intervals, in "
            f"{len(found.drop_duplicates(list(COLUMNS[:2])))} of {len(cells())} cells."
        )
        return to_plot(figure, "map", "When does a teacher pay?", summary)


# --- the arms: what the paper left open ----------------------------------------------------------

ARM_SEEDS = range(5)
METHODS_ALONE = ("sft", "kl", "rkl", "jsd", "bild", "dbild", "vsd", "switch-kd")
READINGS = {
    "forward": "direction: forward",
    "pairs-none": "pairs: none",
    "row-wise": "pairs: row-wise",
    "union256": "ids: union, candidates: 256",
    "k8": "k_min: 8, k_max: 8",
    "k32": "k_min: 32, k_max: 32",
    "k128": "k_min: 128, k_max: 128",
    "entropy32": "k_min: 32, k_max: 32, weight_by: entropy",
    "knee-of-probabilities": "curve: probs",
    "knee-of-top64": "candidates: 64",
}
"""Options of both of Switch-KD's terms; see `losses.dbild`."""


def arms() -> Experiment:
    """Methods, weights and readings in the demo's regime, on the test sets."""
    terms = "terms=[{{loss: ce}}, {{loss: dbild, name: align, {0}}}, "
    terms += "{{loss: dbild, of: switch, name: switch, {0}}}]"
    found: dict[str, tuple[str, ...]] = {name: (f"method={name}",) for name in METHODS_ALONE}
    for weight in (0.5, 2):
        found[f"switch-kd-weight{weight}"] = (terms.format(f"weight: {weight}"),)
    for name, options in READINGS.items():
        found[f"switch-kd-{name}"] = (terms.format(options),)
    found["dbild-frozen-tower"] = ("method=dbild", "trainable=[projector, language_model]")
    return Experiment("arms", found, ARM_SEEDS)


def run_arms(workers: int) -> None:
    """Run every arm, its visual switches, too; tables and `arms.svg`."""
    experiment = arms()
    experiment.run(workers, switched=True)
    write_arms(experiment)


def write_arms(experiment: Experiment) -> None:
    """Write the tables of arms with a run of each seed.

    `arms.csv` has a row an arm: its mean of ten, the differences from SFT and from Switch-KD with
    95 % intervals and p corrected by Holm over all arms, the vision and language gap (the
    teacher less the visual switch, the visual switch less the student), seconds a step, and the
    memory of its training in MB as `kd-bench train --plan` counts it.
    """
    import pandas as pd

    from kd_bench.compare.methods import compare_methods
    from kd_bench.stats import holm

    runs, switched = experiment.runs(), experiment.switched_runs()
    whole = {
        arm: [runs[arm, seed] for seed in experiment.seeds]
        for arm in experiment.arms
        if all((arm, seed) in runs for seed in experiment.seeds)
    }
    rows: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    for arm, own in whole.items():
        results = [run.results() for run in own]
        by_task = {t: sum(r[t].score for r in results) / len(own) for t in results[0]}
        mean = sum(by_task.values()) / len(by_task)
        scores.append({"arm": arm, **by_task, "mean": mean})
        row = {"arm": arm, "seeds": len(own), "mean": mean}
        for floor in (FLOOR, SWITCHED):
            if floor in whole and arm != floor:
                found = compare_methods(whole[floor], own)[AVERAGE]
                row |= _columns(f"above_{floor}", found) | {f"p_{floor}": found.p}
        both = [switched.get(switched_name(arm, seed)) for seed in experiment.seeds]
        eyes = [run for run in both if run is not None]
        if len(eyes) == len(both) and "teacher" in switched:
            row |= _columns("vision_gap", compare_methods(eyes, [switched["teacher"]])[AVERAGE])
            row |= _columns("language_gap", compare_methods(own, eyes)[AVERAGE])
        students = experiment.students(arm)
        row["seconds_a_step"] = sum(map(_seconds_a_step, students)) / len(own)
        row["memory_mb"] = _memory_mb(students[0])
        rows.append(row)
    table = pd.DataFrame(rows)
    for floor in (FLOOR, SWITCHED):
        if (column := f"p_{floor}") in table:
            asked = table[column].notna()
            table.loc[asked, column] = holm(table.loc[asked, column].tolist())
    _write(table, "arms.csv")
    _write(pd.DataFrame(scores), "arms_by_benchmark.csv")
    if f"above_{FLOOR}" in table and f"above_{SWITCHED}" in table:
        write_text(TABLES / "arms.svg", _arms_plot(table).standalone())


def _arms_plot(table: "pd.DataFrame") -> "Plot":
    """Points above SFT and above Switch-KD: a panel each, a row an arm."""
    from kd_bench.report.style import INK, canvas, marker, plotting, series, to_plot

    floors = {FLOOR: "SFT", SWITCHED: "Switch-KD"}
    with plotting():
        figure, grid = canvas(7.2, 0.6 + 0.19 * len(table), 1, len(floors))
        for number, (axes, (floor, title)) in enumerate(zip(grid[0], floors.items(), strict=True)):
            value, low, high = (table[f"above_{floor}{end}"] for end in ("", "_low", "_high"))
            axes.axvline(0, color=INK, linewidth=0.9)
            axes.errorbar(
                value, range(len(table)), xerr=(value - low, high - value), color=series(2),
                marker=marker(number), markersize=4, linestyle="", capsize=2,
            )  # fmt: skip
            axes.set_yticks(range(len(table)), table["arm"] if number == 0 else [])
            axes.set(ylim=(len(table) - 0.4, -0.6), xlabel=f"Points above {title}")
        seeds = f"{table['seeds'].min()} seeds"
        summary = f"Differences on the mean of ten, with 95 % intervals over {seeds} and documents."
        return to_plot(figure, "arms", "What the paper left open", summary)


def _columns(name: str, found: "Estimate") -> dict[str, float | None]:
    ends = (found.interval.low, found.interval.high) if found.interval else (None, None)
    return {name: found.value, f"{name}_low": ends[0], f"{name}_high": ends[1]}


def _seconds_a_step(student: Student) -> float:
    """Of a finished training, on whatever shared its processors."""
    (stage,) = read_json(student.folder / "lineage.json")["stages"].values()
    return float(stage["device_seconds"] / stage["steps"])


def _memory_mb(student: Student) -> float:
    """Counted: a CPU's own peak would be the libraries'."""
    from kd_bench.distill.recipe import load_recipe
    from kd_bench.distill.train import plan_training

    (plan,) = plan_training(load_recipe("mini", student.train()[2:]))
    return plan.needed / 1e6
