"""What the study trains, and the tables that it writes."""

import csv
import shutil
from pathlib import Path

import pytest

pytest.importorskip("PIL")

from kd_bench.cli import study
from kd_bench.distill.recipe import METHODS, load_recipe
from kd_bench.errors import UsageError
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
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "TABLES", tmp_path / "map")
    make_store(study.Cell(25, 600).experiment((), ()).results, units=12)
    study.write_map()
    rows = table(tmp_path / "map" / "map.csv")
    assert {(row["wrong_percent"], row["conversations"]) for row in rows} == {("25", "600")}
    by_method = {row["method"]: row for row in rows}
    assert by_method["sft"]["above_sft"] == ""
    assert float(by_method["kl"]["low"]) < float(by_method["kl"]["above_sft"])
    assert by_method["switch-kd"]["seeds"] == "3"
    drawn = (tmp_path / "map" / "map.svg").read_text(encoding="utf-8")
    assert "in 1 of 16 cells" in drawn
    assert all(f"{error} % wrong" in drawn for error in (0, 10, 25, 40))


@pytest.mark.slow
def test_arms_are_compared_with_both_floors_as_compare_methods_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd_bench.compare.methods import compare_methods, runs_of_method

    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(study, "_seconds_a_step", lambda student: 0.25)
    arms: dict[str, tuple[str, ...]] = {m: (f"method={m}",) for m in ("sft", "kl", "switch-kd")}
    experiment = study.Experiment("arms", {**arms, "jsd": ("method=jsd",)}, [0, 1])
    models = [model for model in demo_models((0, 1)) if model.method in arms]
    make_store(experiment.results, models, units=12)
    assert set(experiment.runs()) == {(arm, seed) for arm in arms for seed in (0, 1)}
    study.write_arms(experiment)
    rows = {row["arm"]: row for row in table(tmp_path / "tables" / "arms.csv")}
    assert set(rows) == set(arms), "an arm without runs has no row"
    pair = (runs_of_method(experiment.results, name) for name in ("sft", "kl"))
    found = compare_methods(*pair)["average"]
    assert float(rows["kl"]["above_sft"]) == pytest.approx(found.value, rel=1e-3)
    assert float(rows["kl"]["p_sft"]) >= found.p * (1 - 1e-3)
    assert rows["sft"]["above_sft"] == ""
    assert 0 < float(rows["sft"]["memory_mb"]) < float(rows["switch-kd"]["memory_mb"])
    drawn = (tmp_path / "tables" / "arms.svg").read_text(encoding="utf-8")
    assert "Points above Switch-KD" in drawn
    shutil.rmtree(experiment.results)
    assert len(list(experiment._evaluations())) == 4


def test_a_part_that_it_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="'arm' is none"):
        study.run_study(["arm"], ["sft"], [0], 1)
