"""A training's first use: what is wrong is said before the first step, and costs nothing."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from kd_bench.cli.train import attribute_lines, write_starter
from kd_bench.distill import train as train_module
from kd_bench.distill.recipe import (
    DataSource,
    LoraSettings,
    Recipe,
    Stage,
    StudentParts,
    list_recipes,
    load_recipe,
    recipe_yaml,
)
from kd_bench.distill.train import train
from kd_bench.distill.trainer import ProgressReport, check_loggers
from kd_bench.errors import UsageError
from tests.support import tiny

STAGES = [
    {"name": "warm", "method": "sft", "steps": 1, "batch_size": 2, "trainable": ["projector"]},
    {"name": "distil", "method": "kl", "steps": 1, "batch_size": 2},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    tiny.write_recipe(folder, stages=STAGES)
    return folder


def two_stages(place, output, *overrides):
    return load_recipe(place / "recipe.yaml", [f"output={place / output}", *overrides])


@pytest.mark.slow
def test_the_readmes_command_needs_two_checkpoints_and_one_json(place):
    recipe = load_recipe(
        "switch-kd-0.5b",
        [
            f"teacher={place / 'teacher'}",
            f"student={place / 'student'}",
            f"data.path={place / 'data' / 'conversations.json'}",
            f"data.images={place / 'data'}",
            # Only what makes it small:
            *("steps=1", "batch_size=4", "workers=0", f"output={place / 'readme'}"),
        ],
    )
    assert [stage.name for stage in recipe.stages] == ["distil"]
    assert (train(recipe) / "model.safetensors").exists()


def test_a_student_of_parts_keeps_the_stage_of_its_projector():
    assert [stage.name for stage in load_recipe("switch-kd-0.5b").stages] == ["pretrain", "distil"]
    kept = ["student=S", "pretrain.new_projector_only=false", "pretrain.steps=3"]
    assert load_recipe("switch-kd-0.5b", kept).stages[0].steps == 3
    with pytest.raises(UsageError, match="'pretrain' is left out, since the student"):
        load_recipe("switch-kd-0.5b", ["student=S", "pretrain.steps=3"])


def test_a_stage_is_dropped_by_null():
    assert len(load_recipe("switch-kd-0.5b", ["pretrain=null"]).stages) == 1
    later = load_recipe("switch-kd-0.5b", ["pretrain=null", "distil.steps=7"])
    assert later.stages[0].steps == 7


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("data.path=nowhere.json", r"'(warm|distil)': There is no training data at nowhere"),
        ("distil.data.path=nowhere.json", r"'distil': There is no training data at nowhere"),
        ("data.images=nowhere", r"no folder of images at nowhere"),
        ("distil.lora.target_modules=[nothing]", r"No layer of the language model"),
        ("distil.batch_size=999", r"'distil': the data holds \d+ usable samples, fewer than one"),
        ("report_to=[trackio]", r"package trackio is not installed"),
        ("distil.method=switch-kd distil.trainable=[projector]", r"'distil'.*freezes"),
    ],
)
@pytest.mark.slow
def test_every_stage_is_checked_before_the_first_step(place, wrong, message, monkeypatch):
    def no_step(*_):
        raise AssertionError("a stage was trained")

    monkeypatch.setattr(train_module, "_run_stage", no_step)
    folder = place / f"checked{abs(hash(wrong))}"
    with pytest.raises(UsageError, match=message):
        train(two_stages(place, folder.name, *wrong.split()))
    monkeypatch.undo()
    # The corrected command, another recipe, is not refused for what the wrong one left.
    assert (train(two_stages(place, folder.name, "seed=4")) / "config.json").exists()


@pytest.mark.slow
def test_what_no_stage_has_begun_may_still_change(place, monkeypatch):
    before = train_module._run_stage

    def stops(run, stage, folder, student):
        if stage.name == "distil":
            raise KeyboardInterrupt
        return before(run, stage, folder, student)

    monkeypatch.setattr(train_module, "_run_stage", stops)
    with pytest.raises(KeyboardInterrupt):
        train(two_stages(place, "changed"))
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"another recipe \(stages.0.learning_rate"):
        train(two_stages(place, "changed", "warm.learning_rate=0.5"))
    final = train(two_stages(place, "changed", "distil.learning_rate=0.01", "distil.method=sft"))
    lineage = json.loads((final / "lineage.json").read_text())
    assert list(lineage["stages"]) == ["warm", "distil"]
    assert lineage["stages"]["distil"]["method"] == "sft"
    with pytest.raises(UsageError, match="another recipe"):
        train(two_stages(place, "changed", "distil.learning_rate=0.02"))


def test_a_stages_keys_may_stand_at_the_top_of_a_file(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("student: S\nteacher: T\ndata: {path: D}\nmethod: kl\nsteps: 017\n")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.method, recipe.stages[0].steps) == ("own", "kl", 17)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe_yaml(recipe))
    assert load_recipe(resolved) == recipe
    path.write_text("student: S\ndata: {path: D}\nmethod: sft\nstages: [{steps: 3}]\n")
    assert load_recipe(path).stages[0].method == "sft"
    path.write_text("student: S\ndata: {path: D}\nmethod: sft\nstages: [{method: sft, steps: 3}]")
    with pytest.raises(UsageError, match="'method' stands at the top and in the last stage"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["steps: 1:30", "steps: 3\nsteps: 4", "steps: 3\nseed: 2001-1-1"])
def test_yaml_is_read_as_it_is_written(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_text(f"student: S\ndata: {{path: D}}\nmethod: sft\n{text}\n")
    with pytest.raises(UsageError, match=r"own\.yaml"):
        load_recipe(path)


@pytest.mark.parametrize(
    "override",
    [
        *("steps=abc", "steps=1e3", "steps=0", "steps=99999999999999999999", "steps=true"),
        *("seed=2001-13-45", "seed=-1", "seed=true", "seed=1.5", "seed=1e400", "seed=4294967296"),
        *("stages=5", "stages=null", "stages.0=5", "stages.²=null", "stages.².steps=1"),
        *("warmup=.inf", "warmup=.nan", "betas=[2,3]", "betas=[0.9]", "betas=0.9"),
        *("learning_rate=.inf", "learning_rate=1e400", "weight_decay=.nan"),
        *("name=../../x", "name=a/b", "name=", "name=.", "distil.name=../x", "output=5"),
        *("trainable=projector", "terms=[ce]", "terms=[{loss: ce, weight: .inf}]", "lora=true"),
        *("distil.data=5", "data.path=[1]", "data.limit=1.5", "report_to=wandb", "method=[]"),
    ],
)
def test_a_value_that_does_not_fit_names_the_argument(override):
    with pytest.raises(UsageError) as caught:
        load_recipe("mini", [override])
    assert caught.value.problem.startswith(repr(override)), caught.value.problem


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mini", "--seeds", "a"], "'a' is not a seed"),
        (["mini", "--seeds", "-1"], "'-1' is not a seed"),
        (["mini", "--seeds", "1,1"], "a seed stands twice"),
        (["mini", "--steps", "5"], "write steps=VALUE"),
        (["mini", "--learning-rate=3"], "write learning_rate=VALUE"),
    ],
)
def test_a_wrong_option_of_train_is_one_line(arguments, message):
    line = [sys.executable, "-m", "kd_bench", "train", *arguments]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_show_prints_every_training_of_a_sweep():
    line = [
        sys.executable,
        "-m",
        "kd_bench",
        "train",
        "mini",
        "--method",
        "sft,kl",
        "--seeds",
        "3,4",
    ]
    done = subprocess.run([*line, "--show"], capture_output=True, text=True, check=True)
    shown = done.stdout.split("---\n")
    assert [("method: sft" in text, "seed: 3" in text) for text in shown] == [
        (True, True),
        (False, True),
        (True, False),
        (False, False),
    ]


def test_a_logger_without_its_key_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("kd_bench.distill.trainer.find_spec", lambda name: name)
    with pytest.raises(UsageError, match="Weights & Biases has no key"):
        check_loggers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_loggers(["wandb"])


@pytest.mark.parametrize("width", [60, 80, 120])
def test_stage_step_and_time_left_are_never_cut(width):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    report = ProgressReport("distil", console)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=600, global_step=0)
    report.on_train_begin(None, state, None)
    state.global_step = 7
    report.on_step_end(None, state, None)
    logs = {"loss": 2.31, "terms": {"ce": 1.9, "align": 0.25, "switch": 0.2}, "learning_rate": 1e-3}
    report.on_log(None, state, None, logs)
    report._bar.refresh()
    report.close()
    last = [line for line in stream.getvalue().replace("\r", "\n").split("\n") if "distil" in line]
    assert "7/600" in last[-1]
    assert ":" in last[-1].split("7/600")[1].split("loss")[0]  # the time left
    assert "loss 2.310" in last[-1]


def test_every_setting_of_a_recipe_says_what_it_means():
    for model in (Recipe, Stage, DataSource, StudentParts, LoraSettings):
        assert set(attribute_lines(model)) == set(model.model_fields), model.__name__


def test_the_recipe_that_is_written_to_start_from_holds(tmp_path):
    path = tmp_path / "my.yaml"
    write_starter(path)
    recipe = load_recipe(path)
    assert (recipe.name, recipe.method, len(recipe.stages)) == ("my", "switch-kd", 1)
    with pytest.raises(UsageError, match="exists already"):
        write_starter(path)


def test_the_shipped_recipes_are_listed_and_shown_as_they_are_written():
    line = [sys.executable, "-m", "kd_bench", "recipes"]
    listed = subprocess.run([*line, "list"], capture_output=True, text=True, check=True).stdout
    shown = subprocess.run([*line, "show", "mini"], capture_output=True, text=True, check=True)
    assert all(name in listed for name in list_recipes())
    assert shown.stdout == list_recipes()["mini"].read_text(encoding="utf-8")


def test_a_part_of_a_student_that_is_a_path_names_the_override():
    with pytest.raises(UsageError, match=r"^'student.vision_tower=x': student is a checkpoint"):
        load_recipe("mini", ["student=somewhere", "student.vision_tower=x"])
    both = ["student.vision_tower=x", "student.language_model=y"]
    assert load_recipe("mini", both).student == StudentParts(vision_tower="x", language_model="y")


def test_no_key_shows_the_branch_that_was_tried():
    for override in ("data.path=5", "data.path=[5]", "student=5", "student={vision_tower: x}"):
        with pytest.raises(UsageError) as caught:
            load_recipe("mini", [override])
        assert not any(sign in str(caught.value) for sign in (".str", ".list", "StudentParts"))
    with pytest.raises(UsageError, match="names no file"):
        load_recipe("mini", ["data.path=[]"])


def test_a_checkpoint_is_no_recipe(place):
    with pytest.raises(UsageError, match=r"is a checkpoint, not a recipe.*student="):
        load_recipe(place / "student")
    with pytest.raises(UsageError, match=r"is a folder, not a recipe.*recipe\.yaml"):
        load_recipe(place)


def test_the_folder_of_a_stages_own_images_is_named_as_its_own(place):
    own = ["distil.data.path=nowhere.json", "distil.data.images=nowhere"]
    with pytest.raises(UsageError, match=r"Set distil\.data\.images="):
        train(two_stages(place, "images", *own))
