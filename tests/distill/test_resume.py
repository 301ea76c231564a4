"""A stopped training goes on from a sound state with the same data, or says why it does not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd_bench.distill.recipe import load_recipe
from kd_bench.distill.train import train
from kd_bench.distill.trainer import DistillationTrainer
from kd_bench.errors import TrainingError, UsageError
from kd_bench.files import MARKER
from tests.support import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny.write_recipe(folder)
    return folder


def recipe_in(place, output):
    return load_recipe(place / "recipe.yaml", [f"output={place / output}"])


@pytest.fixture(scope="module")
def whole(place):
    """The weights of an uninterrupted training."""
    return load_file(train(recipe_in(place, "whole")) / "model.safetensors")


@pytest.fixture(scope="module")
def stopped(place):
    """A training that was interrupted at step 10 of 12, with checkpoints at 4 and 8."""

    def step(self, *arguments, **named):
        if self.state.global_step == 10:
            raise KeyboardInterrupt
        return before(self, *arguments, **named)

    before = DistillationTrainer.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(recipe_in(place, "stopped"))
    return place / "stopped"


def copied(stopped, name):
    folder = stopped.parent / name
    shutil.copytree(stopped, folder)
    return folder


def checkpoint(folder, step=8):
    (found,) = folder.glob(f"stages/*/checkpoint-{step}")
    return found


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 4
    path.write_bytes(data)


def tear(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "weights flipped": ("weights.safetensors", flip),
    "optimizer flipped": ("optimizer.pt", flip),
    "optimizer gone": ("optimizer.pt", Path.unlink),
    "scheduler gone": ("scheduler.pt", Path.unlink),
    "optimizer torn": ("optimizer.pt", tear),
    "state torn": ("trainer_state.json", tear),
    "random states torn": ("rng_state.pth", tear),
    "random states gone": ("rng_state.pth", Path.unlink),
    "digests torn": ("digests.json", tear),
}


QUICK = ("weights flipped", "scheduler gone", "state torn")


@pytest.mark.parametrize(
    "damage",
    [*QUICK, *(pytest.param(d, marks=pytest.mark.slow) for d in DAMAGES if d not in QUICK)],
)
@pytest.mark.slow
def test_an_unsound_checkpoint_is_named_and_the_one_before_it_used(
    place, stopped, whole, damage, capsys
):
    folder = copied(stopped, damage.replace(" ", "-"))
    name, harm = DAMAGES[damage]
    harm(checkpoint(folder) / name)
    final = train(recipe_in(place, folder.name))
    told = "".join(capsys.readouterr().out.split())
    assert name in told
    assert "resumingatstep4" in told
    found = load_file(final / "model.safetensors")
    assert all(torch.equal(whole[key], found[key]) for key in whole)


@pytest.mark.slow
def test_without_any_sound_checkpoint_the_stage_begins_again(place, stopped, whole, capsys):
    folder = copied(stopped, "none")
    for step in (4, 8):
        flip(checkpoint(folder, step) / "weights.safetensors")
    found = load_file(train(recipe_in(place, "none")) / "model.safetensors")
    assert "resuming" not in capsys.readouterr().out
    assert all(torch.equal(whole[key], found[key]) for key in whole)


@pytest.mark.slow
def test_a_checkpoint_from_before_there_were_digests_is_still_used(place, stopped, whole, capsys):
    folder = copied(stopped, "old")
    for step in (4, 8):
        (checkpoint(folder, step) / "digests.json").unlink()
    tear(checkpoint(folder) / "optimizer.pt")
    found = load_file(train(recipe_in(place, "old")) / "model.safetensors")
    assert "resuming at step 4" in capsys.readouterr().out
    assert all(torch.equal(whole[key], found[key]) for key in whole)


@pytest.mark.slow
def test_a_torn_lineage_is_taken_from_the_checkpoint(place, stopped, capsys):
    folder = copied(stopped, "lineage")
    tear(folder / "lineage.json")
    train(recipe_in(place, "lineage"))
    assert "lineage.json is damaged" in " ".join(capsys.readouterr().out.split())


def test_a_torn_lineage_without_a_copy_is_one_line(place, stopped):
    folder = copied(stopped, "lost")
    tear(folder / "lineage.json")
    for step in (4, 8):
        (checkpoint(folder, step) / "lineage.json").unlink()
    with pytest.raises(TrainingError, match=r"lineage\.json is damaged"):
        train(recipe_in(place, "lost"))


@pytest.mark.slow
def test_a_damaged_log_does_not_stop_a_training(place, stopped):
    folder = copied(stopped, "log")
    log = folder / "train_log.jsonl"
    log.write_bytes(log.read_bytes()[:-20] + b'\xff\n[1]\n{"stage": 1}\n')
    train(recipe_in(place, "log"))
    steps = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").split("\n")[:-1]]
    assert steps == [4, 12] or steps == [4, 8, 12]


@pytest.fixture
def changed_data(place):
    """The first conversation's answer is another one while the test runs."""
    path = place / "data" / "conversations.json"
    before = path.read_text("utf-8")
    entries = json.loads(before)
    entries[0]["conversations"][-1]["value"] += " indeed"
    path.write_text(json.dumps(entries), "utf-8")
    yield
    path.write_text(before, "utf-8")


@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_changed_data_does_not_continue_or_finish_a_training(place, stopped, whole, state, request):
    folder = copied(stopped if state == "stopped" else place / "whole", f"data-{state}")
    lineage = (folder / "lineage.json").read_bytes()
    request.getfixturevalue("changed_data")
    with pytest.raises(UsageError, match="has changed"):
        train(recipe_in(place, folder.name))
    assert (folder / "lineage.json").read_bytes() == lineage


@pytest.mark.slow
def test_a_damaged_student_is_written_again_from_its_last_stage(place, whole, capsys):
    folder = copied(place / "whole", "rebuilt")
    flip(folder / "final" / "model.safetensors")
    found = load_file(train(recipe_in(place, "rebuilt")) / "model.safetensors")
    assert "written again" in " ".join(capsys.readouterr().out.split())
    assert all(torch.equal(whole[key], found[key]) for key in whole)
    shutil.rmtree(folder / "stages")
    flip(folder / "final" / "model.safetensors")
    with pytest.raises(TrainingError, match="not as it was written"):
        train(recipe_in(place, "rebuilt"))


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["final/model.bin", "stages/mine.txt", "recipe.yaml"])
def test_what_somebody_else_made_is_not_replaced(place, tmp_path, name):
    mine = tmp_path / "own" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine", encoding="utf-8")
    recipe = load_recipe(place / "recipe.yaml", [f"output={tmp_path / 'own'}"])
    for resume in (True, False):
        with pytest.raises(UsageError, match="not made by kd-bench"):
            train(recipe, resume=resume)
    assert mine.read_text(encoding="utf-8") == "mine"


def test_a_final_folder_of_somebody_else_in_a_folder_of_ours_stays(place, stopped):
    folder = copied(stopped, "mixed")
    (folder / "final").mkdir()
    with pytest.raises(UsageError, match="not made by kd-bench"):
        train(recipe_in(place, "mixed"))


def test_a_training_from_before_folders_were_marked_is_ours(place, whole, capsys):
    folder = copied(place / "whole", "unmarked")
    (folder / MARKER).unlink()
    train(recipe_in(place, "unmarked"))
    assert "Already trained" in capsys.readouterr().out
