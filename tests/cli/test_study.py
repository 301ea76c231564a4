"""What the study trains, and the tables that it writes."""

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

from kd_bench.cli import jobs, study
from kd_bench.cli.demo import Student
from kd_bench.distill.recipe import METHODS, load_recipe, recipe_yaml
from kd_bench.errors import UsageError
from kd_bench.files import write_text
from kd_bench.world.build import ERROR, LABELLED, STUDY_ERRORS
from tests.support.report_store import demo_models, make_store


def settings(experiment: study.Experiment, arm: str) -> dict[str, object]:
    """A training's recipe without its seed and folder."""
    command = experiment.students(arm)[0].train()
    assert command[:2] == ["train", "mini"]
    recipe = load_recipe("mini", command[2:]).model_dump()
    return {key: value for key, value in recipe.items() if key not in ("seed", "output")}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_method_gets_the_same_number_of_trials_and_none_is_a_reported_seed() -> None:
    experiment = study.trials()
    methods = ("sft", "kl", "switch-kd")
    counts = [sum(arm.startswith(f"{method}-") for arm in experiment.arms) for method in methods]
    assert counts == [13, 13, 13]
    assert not set(experiment.seeds) & {*range(5), *study.arms().seeds}
    assert experiment.data == "validation"
    recipes = [settings(experiment, arm) for arm in experiment.arms]
    assert len({str(recipe) for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize("method", ["kl", "switch-kd"])
def test_the_trial_of_weight_one_is_the_method(method: str) -> None:
    experiment = study.trials()
    tried = settings(experiment, f"{method}-rate0.4e-3-weight1")["stages"][0]  # type: ignore[index]
    plain = load_recipe("mini", [f"method={method}"]).model_dump()["stages"][0]
    terms = [term.model_dump() for term in METHODS[method]]
    assert {**tried, "method": method, "terms": None} == plain
    for one, other in zip(tried["terms"], terms, strict=True):
        assert one == other


def test_every_arm_is_another_recipe_that_is_valid() -> None:
    experiment = study.arms()
    recipes = {str(settings(experiment, arm)) for arm in experiment.arms}
    assert len(recipes) == len(experiment.arms)
    assert len(experiment.seeds) == 5


def test_the_map_has_every_cell_once_and_begins_with_the_demos() -> None:
    every = study.cells()
    assert len({(cell.error, cell.count) for cell in every}) == len(every) == 16
    source = load_recipe("mini").data
    assert source is not None
    assert (every[0].error, every[0].count) == (round(100 * ERROR), source.limit)
    assert max(cell.count for cell in every) == LABELLED


@pytest.mark.slow
def test_every_cell_finds_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_BENCH_CACHE", str(tmp_path))
    from kd_bench.distill.conversations import read_conversations

    labels = []
    for error in STUDY_ERRORS:
        cell = study.Cell(round(100 * error), 300).experiment(["kl"], [0])
        source = load_recipe("mini", cell.students("kl")[0].train()[2:]).data
        found, broken = read_conversations(source)
        assert len(found) == 300
        assert not broken
        labels.append([turn.pieces for one in found for turn in one.turns])
    demos, _ = read_conversations(load_recipe("mini", ["data.limit=300"]).data)
    assert [turn.pieces for one in demos for turn in one.turns] in labels


@pytest.mark.slow
def test_the_map_is_of_the_cells_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kd_bench.compare.methods import compare_methods, runs_of_method

    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    methods = ("sft", "kl", "switch-kd")
    experiment = study.Cell(25, 600).experiment(methods, [0, 1, 2])
    make_store(experiment.results, units=12)
    found = study.look_at(study.Cell(25, 600), experiment)
    study.write_map([found], tmp_path / "map", [(c.error, c.count) for c in study.cells()])
    (row,) = table(tmp_path / "map" / "map.csv")
    assert (row["wrong_percent"], row["conversations"]) == ("25", "600")
    for method, floor in (("kl", "sft"), ("switch-kd", "sft"), ("switch-kd", "kl")):
        pair = (runs_of_method(experiment.results, name) for name in (floor, method))
        told, key = compare_methods(*pair)["average"], f"{method}_above_{floor}"
        assert told.interval is not None
        assert float(row[key]) == pytest.approx(told.value, rel=1e-4)
        assert float(row[f"{key}_low"]) == pytest.approx(told.interval.low, rel=1e-4)
        assert float(row[method]) - float(row[floor]) == pytest.approx(told.value, abs=1e-3)
    assert f"kl {float(row['kl']):.1f} ({float(row['kl_above_sft']):+.1f} above sft" in str(found)
    assert "| 25 | 600 |" in (tmp_path / "map" / "map.md").read_text(encoding="utf-8")
    drawn = (tmp_path / "map" / "map.svg").read_text(encoding="utf-8")
    assert "in 1 of 16 cells" in drawn
    assert all(f"{error} % wrong" in drawn for error in (0, 10, 25, 40))


def leave(student: Student, *changes: str) -> None:
    """Leave what a training that has ended leaves."""
    recipe = load_recipe("mini", [*student.train()[2:], *changes])
    Path(student.checkpoint).mkdir(parents=True, exist_ok=True)
    Path(student.checkpoint, "model.safetensors").touch()
    (student.folder / "recipe.yaml").write_text(recipe_yaml(recipe), encoding="utf-8")


@pytest.mark.slow
def test_a_study_goes_on_behind_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is started for finished cells, and an earlier table is not cut short."""
    for name in ("RESULTS", "CHECKPOINTS", "TABLES"):
        monkeypatch.setattr(study, name, tmp_path / name)
    monkeypatch.setattr("kd_bench.world.build.world_folder", lambda study=False: tmp_path)
    cells = [study.Cell(25, count) for count in (600, 120, 300)]
    monkeypatch.setattr(study, "cells", lambda: cells)
    models = [model for model in demo_models((0,)) if model.method == "sft"]

    def finish(cell: study.Cell) -> None:
        experiment = cell.experiment(["sft"], [0])
        make_store(experiment.results, models, units=4)
        for student in experiment.students("sft"):
            leave(student)

    def interrupted(groups: dict[str, list[list[str]]], *rest: Any) -> None:
        if any(groups.values()):
            raise KeyboardInterrupt
        jobs.run_jobs(groups, *rest)

    monkeypatch.setattr(study, "run_jobs", interrupted)
    finish(cells[0])
    finish(cells[1])
    before = tmp_path / "TABLES" / "map.md"
    write_text(before, "of two cells")
    with pytest.raises(KeyboardInterrupt):
        study.draw_map(["sft"], [0], 1)
    assert before.read_text(encoding="utf-8") == "of two cells"
    finish(cells[2])
    study.draw_map(["sft"], [0], 1)
    assert len(table(tmp_path / "TABLES" / "map.csv")) == 3
    assert not (tmp_path / "CHECKPOINTS" / "logs").exists()


@pytest.mark.slow
def test_a_student_that_is_trained_again_is_evaluated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "CHECKPOINTS", tmp_path / "checkpoints")
    asked: list[dict[str, list[list[str]]]] = []
    monkeypatch.setattr(study, "run_jobs", lambda groups, *_: asked.append(groups))
    experiment = study.Cell(25, 600).experiment(["sft"], [0, 1])
    models = [model for model in demo_models((0, 1)) if model.method == "sft"]
    make_store(experiment.results, models, units=4)
    first, second = experiment.students("sft")
    leave(first)
    experiment.run(1)
    ((training,), (evaluation,)) = asked[0].values()
    assert training == second.train()
    assert evaluation[1] == second.checkpoint
    assert first.checkpoint not in evaluation
    leave(second)
    assert not experiment.run(1)
    leave(second, "steps=5")
    assert experiment.run(1), "a student of another recipe"
    assert asked[-1] == asked[0]


@pytest.mark.slow
def test_arms_are_compared_with_both_floors_as_compare_methods_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd_bench.compare.methods import compare_methods, runs_of_method
    from kd_bench.stats import holm

    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "_seconds_a_step", lambda student: 0.25)
    arms: dict[str, tuple[str, ...]] = {m: (f"method={m}",) for m in ("sft", "kl", "switch-kd")}
    experiment = study.Experiment("arms", {**arms, "jsd": ("method=jsd",)}, [0, 1])
    models = [model for model in demo_models((0, 1)) if model.method in arms]
    make_store(experiment.results, models, units=12)
    assert set(experiment.runs()) == {(arm, seed) for arm in arms for seed in (0, 1)}
    study.write_arms(study.arms_of(experiment), tmp_path)
    rows = {row["arm"]: row for row in table(tmp_path / "arms.csv")}
    assert set(rows) == set(arms), "an arm without runs has no row"
    by_method = {name: runs_of_method(experiment.results, name) for name in arms}
    others = ("kl", "switch-kd")
    found = {m: compare_methods(by_method["sft"], by_method[m])["average"] for m in others}
    assert float(rows["kl"]["above_sft"]) == pytest.approx(found["kl"].value, rel=1e-4)
    corrected = holm([found["kl"].p, found["switch-kd"].p])[0]
    assert rows["kl"]["p_sft"] == ("<0.001" if corrected < 0.001 else f"{corrected:.3f}")
    assert rows["sft"]["above_sft"] == rows["sft"]["p_sft"] == ""
    assert rows["kl"]["step_ms"] == "250"
    assert 0 < float(rows["sft"]["memory_bytes"]) < float(rows["switch-kd"]["memory_bytes"])
    scores = {row["arm"]: row for row in table(tmp_path / "arms_by_benchmark.csv")}
    assert scores["kl"]["mean"] == rows["kl"]["mean"]
    assert "Points above switch-kd" in (tmp_path / "arms.svg").read_text(encoding="utf-8")
    shutil.rmtree(experiment.results)
    assert len(list(experiment._evaluations())) == 4


@pytest.mark.parametrize("parts, told", [(["map", "arm"], "no part 'arm'"), ([], "names no part")])
def test_a_part_that_it_does_not_have_is_refused_before_anything_runs(
    parts: list[str], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        study.run_study(parts, ["sft"], [0], 1)


def test_parts_run_in_the_order_asked_for_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name, part in (("run_trials", "trials"), ("draw_map", "map"), ("run_arms", "arms")):
        monkeypatch.setattr(study, name, lambda *_, part=part: ran.append(part))
    study.run_study(["arms", "map", "arms"], ["sft"], [0], 1)
    study.run_study(None, ["sft"], [0], 1)
    assert ran == ["arms", "map", "trials", "map", "arms"]
