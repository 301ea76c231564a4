"""A sweep trains one after another, goes on after a stopped training, and continues."""

import pytest

from kd_bench.distill import train as train_module
from kd_bench.distill.recipe import plan
from kd_bench.distill.train import sweep
from kd_bench.errors import TrainingError
from tests.support import tiny


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny.write_recipe(tmp_path_factory.mktemp("sweep"))


@pytest.mark.slow
def test_a_stopped_training_costs_no_other_and_is_continued(recipe, monkeypatch):
    before = train_module.train

    def stops(single, **options):
        if single.method == "kl":
            raise TrainingError("The loss became nan.", "Look.")
        return before(single, **options)

    monkeypatch.setattr(train_module, "train", stops)
    settings = ["steps=2"]
    with pytest.raises(TrainingError, match="1 of 3 trainings stopped: kl with seed 1"):
        sweep(plan(recipe, settings, methods=["sft", "kl", "rkl"], seeds=[1]))
    monkeypatch.undo()
    done = (recipe.parent / "out" / "rkl-seed1" / "final" / "model.safetensors").stat().st_mtime_ns
    folders = sweep(plan(recipe, settings, methods=["sft", "kl", "rkl"], seeds=[1]))
    assert [folder.parent.name for folder in folders] == ["sft-seed1", "kl-seed1", "rkl-seed1"]
    assert (folders[2] / "model.safetensors").stat().st_mtime_ns == done
