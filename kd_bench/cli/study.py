"""`kd-bench demo --study`: what the embedded world can tell about distillation, with many seeds.

Three parts: `trials` of learning rates and weights, on validation scenes; the `map`, which asks
when a teacher pays, and the `arms`, which vary Switch-KD, on the test sets. What is finished is
not run again. The map is written anew after each cell, the other tables once all runs are there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kd_bench.cli.demo import FLOOR, SWITCHED, TEACHER, Student, evaluation, seconds_of
from kd_bench.cli.findings import (
    GAPS,
    Arm,
    MapCell,
    difference,
    scores_of,
    write_arms,
    write_map,
    write_scores,
)
from kd_bench.cli.jobs import run_jobs
from kd_bench.errors import UsageError, closest
from kd_bench.files import read_json

if TYPE_CHECKING:
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

    def run(self, workers: int, *, switched: bool = False) -> bool:
        """Train and evaluate what is missing; whether anything was.

        Args:
            switched: evaluate the teacher, and every student's vision before the teacher's
                language model, too.
        """
        students = [student for arm in self.arms for student in self.students(arm)]
        untrained = [student for student in students if not student.is_trained]
        training = [student.train() for student in untrained]
        asked = [*self._evaluations(untrained), *(self._switched(untrained) if switched else ())]
        groups = {f"{self.name}-train": training, f"{self.name}-eval": asked}
        run_jobs(groups, workers, CHECKPOINTS / "logs", seconds_of)
        return any(groups.values())

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

    def whole_arms(self) -> "dict[str, list[Run]]":
        """The runs of each arm that has one of every seed."""
        runs = self.runs()
        return {
            arm: [runs[arm, seed] for seed in self.seeds]
            for arm in self.arms
            if all((arm, seed) in runs for seed in self.seeds)
        }

    def _evaluations(self, untrained: Sequence[Student] = ()) -> Iterator[list[str]]:
        """What the store lacks of the students, or has of one to be trained again."""
        from kd_bench.world.build import world_folder

        data = [] if self.data == "test" else ["--data", str(world_folder() / self.data)]
        done = self.runs()
        for arm in self.arms:
            missing = [s for s in self.students(arm) if s in untrained or (arm, s.seed) not in done]
            if missing:
                checkpoints = [student.checkpoint for student in missing]
                yield evaluation(checkpoints, self.results, "--method", arm, *data)

    def _switched(self, untrained: Sequence[Student]) -> Iterator[list[str]]:
        """The same of the teacher and of the visual switches."""
        done = self.switched_runs()
        if "teacher" not in done:
            yield evaluation([TEACHER], self.results, "--role", "teacher", "--name", "teacher")
        for arm in self.arms:
            for student in self.students(arm):
                name = switched_name(arm, student.seed)
                if student in untrained or name not in done:
                    yield student.hybrid(self.results, "--name", name)


def switched_name(arm: str, seed: int) -> str:
    """Of the run of a student's vision before the teacher's language model."""
    return f"{arm}-seed{seed}-switched"


def run_study(
    parts: Sequence[str] | None, methods: Sequence[str], seeds: Sequence[int], workers: int
) -> None:
    """Run parts of the study one after the other, by default all.

    Args:
        methods, seeds: the map's; trials and arms have their own.

    Raises:
        UsageError: no part, or one that there is not.
    """
    known = {
        "trials": lambda: run_trials(workers),
        "map": lambda: draw_map(methods, seeds, workers),
        "arms": lambda: run_arms(workers),
    }
    asked = list(known) if parts is None else list(dict.fromkeys(parts))
    if not asked:
        raise UsageError("--parts names no part of the study.", f"Known: {', '.join(known)}.")
    for part in asked:
        if part not in known:
            raise UsageError(
                f"The study has no part {part!r}.{closest(part, list(known))}",
                f"Known: {', '.join(known)}.",
            )
    for part in asked:
        known[part]()


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
    """Run every trial; `trials` has a row each, the best first."""
    experiment = trials()
    experiment.run(workers)
    found = [Arm(arm, scores_of([run])) for (arm, _), run in experiment.runs().items()]
    found.sort(key=lambda arm: -arm.mean)
    write_scores(found, TABLES / "trials", "Trials on validation scenes")


# --- the map: when does a teacher pay? -----------------------------------------------------------

COUNTS = (120, 300, 600, 1200)
FLOORS = {SWITCHED: (FLOOR, "kl")}
"""What a method is compared with where that is not SFT alone."""


@dataclass(frozen=True)
class Cell:
    """One cell of the map."""

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
    """Fill the map cell by cell; `map` and `map.svg` are written anew after each.

    Cells that were there before are written with the first one that was not, so that what an
    earlier call has written is never cut short.
    """
    from kd_bench.world.build import world_folder

    world_folder(study=True)
    found: list[MapCell] = []
    every = cells()
    for cell in every:
        experiment = cell.experiment(methods, seeds)
        is_new = experiment.run(workers)
        found.append(look_at(cell, experiment))
        typer.echo(str(found[-1]))
        if is_new or cell == every[-1]:
            write_map(found, TABLES, [(each.error, each.count) for each in every])


def look_at(cell: Cell, experiment: Experiment) -> MapCell:
    """Compare the methods of a cell that has been run."""
    groups = experiment.whole_arms()
    arms = []
    for method, own in groups.items():
        floors = [floor for floor in FLOORS.get(method, (FLOOR,)) if floor in groups]
        above = {floor: difference(groups[floor], own) for floor in floors if floor != method}
        arms.append(Arm(method, scores_of(own), above))
    return MapCell(cell.error, cell.count, arms)


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
    """Run every arm, its visual switches, too; see `write_arms`."""
    experiment = arms()
    experiment.run(workers, switched=True)
    write_arms(arms_of(experiment), TABLES)


def arms_of(experiment: Experiment) -> list[Arm]:
    """Compare the arms that have a run of each seed with SFT and with Switch-KD."""
    whole, switched = experiment.whole_arms(), experiment.switched_runs()
    arms = []
    for arm, own in whole.items():
        floors = [floor for floor in (FLOOR, SWITCHED) if floor in whole and floor != arm]
        found = {floor: difference(whole[floor], own) for floor in floors}
        names = [switched_name(arm, seed) for seed in experiment.seeds]
        if {"teacher", *names} <= set(switched):
            hybrids = [switched[name] for name in names]
            gaps = difference(hybrids, [switched["teacher"]]), difference(own, hybrids)
            found |= dict(zip(GAPS, gaps, strict=True))
        students = experiment.students(arm)
        step = 1e3 * sum(map(_seconds_a_step, students)) / len(students)
        arms.append(Arm(arm, scores_of(own), found, step, _memory(students[0])))
    return arms


def _seconds_a_step(student: Student) -> float:
    """Of a finished training, on whatever shared its CPU."""
    (stage,) = read_json(student.folder / "lineage.json")["stages"].values()
    return float(stage["device_seconds"] / stage["steps"])


def _memory(student: Student) -> int:
    """Bytes, counted: a CPU's own peak would be the libraries'."""
    from kd_bench.distill.plan import plan_training
    from kd_bench.distill.recipe import load_recipe

    (plan,) = plan_training(load_recipe("mini", student.train()[2:]))
    return plan.needed
