"""Recipes: shipped ones hold, overrides land where they should, mistakes are named."""

import pytest

from kd_bench.config import dump_yaml, parse_yaml
from kd_bench.distill.recipe import METHODS, list_recipes, load_recipe, plan, recipe_yaml
from kd_bench.errors import UsageError


@pytest.mark.parametrize("name", list(list_recipes()))
def test_shipped_recipes_hold_and_open_with_their_command(name):
    recipe = load_recipe(name)
    first = list_recipes()[name].read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert f"kd-bench train {name}" in first or f"kd_bench train {name}" in first
    assert recipe.name == name


def test_resolved_recipe_reads_back_equal(tmp_path):
    recipe = load_recipe("mini", ["method=kl", "seed=3"])
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_a_stage_key_without_a_stage_goes_to_the_last():
    plain = load_recipe("switch-kd-0.5b")
    changed = load_recipe("switch-kd-0.5b", ["learning_rate=7e-4", "method=sft", "seed=5"])
    assert changed.stages[-1].learning_rate == 7e-4
    assert changed.stages[-1].method == "sft"
    assert changed.stages[0] == plain.stages[0]
    assert changed.seed == 5
    assert changed.method == "sft"


def test_a_stage_is_addressed_by_name_and_by_number():
    assert load_recipe("switch-kd-0.5b", ["pretrain.steps=7"]).stages[0].steps == 7
    assert load_recipe("switch-kd-0.5b", ["stages.0.steps=8"]).stages[0].steps == 8


def test_epochs_take_the_place_of_steps_and_a_method_that_of_terms():
    stage = load_recipe("mini", ["epochs=2", "terms=[{loss: ce}]"]).stages[-1]
    assert (stage.steps, stage.epochs) == (None, 2)
    assert (stage.method, len(stage.objective)) == (None, 1)


def test_terms_replaced_by_a_method(tmp_path):
    mapping = parse_yaml(recipe_yaml(load_recipe("mini")))
    del mapping["stages"][-1]["method"]
    mapping["stages"][-1]["terms"] = [
        {"loss": "ce"},
        {"loss": "dbild", "of": "switch", "weight": 0.5, "temperature": 2, "curve": "probs"},
    ]
    path = tmp_path / "own.yaml"
    path.write_text(dump_yaml(mapping), encoding="utf-8")
    recipe = load_recipe(path)
    assert recipe.method == "custom"
    assert recipe.stages[-1].objective[1].options == {"temperature": 2, "curve": "probs"}
    assert load_recipe(path, ["method=sft"]).stages[-1].objective == METHODS["sft"]


@pytest.mark.parametrize(
    "override,meant",
    [
        ("learning_rat=1", "learning_rate"),
        ("method=switchkd", "switch-kd"),
        ("distil.stepz=3", "steps"),
        ("teachr=x", "teacher"),
    ],
)
def test_a_mistyped_key_names_what_was_meant(override, meant):
    with pytest.raises(UsageError, match=meant):
        load_recipe("mini", [override])


@pytest.mark.parametrize(
    "override,part",
    [
        ("steps=0", "steps"),
        ("learning_rate=-1", "learning_rate"),
        ("trainable=[]", "trainable"),
        ("gradient_accumulation=7", "multiple"),
        ("teacher=null", "needs a teacher"),
        ("terms=[{loss: bild, curve: probs}]", "no option 'curve'"),
        ("terms=[{loss: ce, of: switch}]", "switch"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(override, part):
    with pytest.raises(UsageError, match=part):
        load_recipe("mini", [override])


def test_an_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(UsageError, match=r"mini-teacher.*mini"):
        load_recipe("mimi-teacher")


def test_a_sweep_gives_every_training_its_own_folder():
    recipes = plan("mini", [], methods=["all"], seeds=[0, 1])
    assert len(recipes) == 2 * len(METHODS)
    assert len({recipe.output_folder for recipe in recipes}) == len(recipes)
    own = plan("mini", ["output=there"], methods=["sft", "kl"], seeds=[4])
    assert [str(r.output_folder) for r in own] == ["there/sft-seed4", "there/kl-seed4"]


def test_a_sweep_refuses_an_unknown_method():
    with pytest.raises(UsageError, match="Did you mean 'switch-kd'"):
        plan("mini", [], methods=["switch_kd"])
