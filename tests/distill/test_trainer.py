"""The training story: resuming, stopping, refusing, and what lies on disk afterwards."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file, save_file

from kd_bench.distill import teacher_states
from kd_bench.distill import train as train_module
from kd_bench.distill.checkpoints import weights_digest
from kd_bench.distill.encoding import Collator
from kd_bench.distill.recipe import load_recipe
from kd_bench.distill.train import train
from kd_bench.distill.trainer import DistillationTrainer
from kd_bench.errors import TrainingError, UsageError
from tests.support import tiny
from tests.support.counting import counted
from tests.support.torchrun import torchrun

KILLED_AT = """
import os, signal, sys
from kd_bench.distill.trainer import DistillationTrainer
from kd_bench.distill.recipe import load_recipe
from kd_bench.distill.train import train

step, recipe, *overrides = sys.argv[1:]
before = DistillationTrainer.training_step

def training_step(self, *arguments, **named):
    if self.state.global_step == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return before(self, *arguments, **named)

DistillationTrainer.training_step = training_step
train(load_recipe(recipe, overrides))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with teacher, student, data and recipe."""
    folder = tmp_path_factory.mktemp("training")
    tiny.write_recipe(folder)
    return folder


def recipe_in(place, output, *overrides):
    return load_recipe(place / "recipe.yaml", [f"output={place / output}", *overrides])


def killed(place, output, step, *overrides):
    """Run a training in a process that is killed -9 when it reaches `step`."""
    arguments = [str(step), str(place / "recipe.yaml"), f"output={place / output}", *overrides]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def assert_close_weights(expected, found, **tolerance):
    ours, theirs = load_file(expected / "model.safetensors"), load_file(found / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # Softmax ignores a bias of the keys: its gradient is rounding noise, which Adam scales up.
        if "vision_tower" in name and name.endswith("k_proj.bias"):
            continue
        torch.testing.assert_close(theirs[name], tensor, msg=name, **tolerance)


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted switch-kd training."""
    return train(recipe_in(place, "whole"))


@pytest.mark.slow
def test_a_training_leaves_a_checkpoint_log_recipe_and_lineage(place, whole):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    LlavaForConditionalGeneration.from_pretrained(whole)
    AutoProcessor.from_pretrained(whole)
    lines = (place / "whole" / "train_log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in log] == [4, 8, 12]
    assert log[-1]["loss"] < log[0]["loss"]
    for entry in log:
        assert entry["terms"].keys() == {"ce", "align", "switch"}
        assert sum(entry["terms"].values()) == pytest.approx(entry["loss"], rel=1e-4)
        assert entry["knee_teacher_p50"] >= 2
        assert entry["samples_per_second"] > 0
    lineage = json.loads((whole / "lineage.json").read_text())
    assert lineage["status"] == "complete"
    assert lineage["teacher"]["weights_sha256"] == weights_digest(place / "teacher")
    assert lineage["stages"]["train"]["data"]["conversations"] == 24
    seconds = sum(entry["seconds"] for entry in log)
    assert lineage["stages"]["train"]["device_seconds"] == pytest.approx(seconds, abs=0.01)
    assert lineage["stages"]["train"]["device"] == log[0]["device"] == "cpu"
    assert lineage["stages"]["train"]["tokens"] == log[-1]["num_input_tokens_seen"] > 0
    assert load_recipe(whole / "recipe.yaml") == recipe_in(place, "whole")
    assert not list(place.glob("whole/stages/*/checkpoint-*"))


@pytest.mark.slow
def test_the_same_command_leaves_a_finished_training_alone(place, whole, capsys):
    before = (whole / "model.safetensors").stat().st_mtime_ns
    assert train(recipe_in(place, "whole", "log_every=3")) == whole
    assert (whole / "model.safetensors").stat().st_mtime_ns == before
    assert "Already trained" in capsys.readouterr().out


def test_another_recipe_does_not_take_over_a_folder(place, whole):
    with pytest.raises(UsageError, match=r"stages\.0\.learning_rate: 0\.003 there, 0\.01 now"):
        train(recipe_in(place, "whole", "learning_rate=0.01"))


def test_other_weights_at_the_same_path_do_not_continue_a_training(place, whole):
    from kd_bench.distill.models import load_model

    recipe = recipe_in(place, "whole")
    file = Path(recipe.teacher) / "model.safetensors"
    before = file.read_bytes()
    teacher = load_model(recipe.teacher)
    torch.nn.init.zeros_(teacher.get_output_embeddings().weight)
    try:
        teacher.save_pretrained(recipe.teacher)
        with pytest.raises(UsageError, match="other weights of the teacher"):
            train(recipe)
    finally:
        file.write_bytes(before)
    assert train(recipe) == whole


@pytest.mark.parametrize(
    "step", [6, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 4, 8, 11))]
)
@pytest.mark.slow
def test_killed_and_resumed_gives_the_very_same_weights(place, whole, step):
    output = f"killed{step}"
    killed(place, output, step)
    assert not (place / output / "final").exists()
    final = train(recipe_in(place, output))
    expected, found = load_file(whole / "model.safetensors"), load_file(final / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    logs = [
        [json.loads(line) for line in (place / name / "train_log.jsonl").open()]
        for name in ("whole", output)
    ]
    for key in ("step", "loss", "terms"):
        assert [line[key] for line in logs[0]] == [line[key] for line in logs[1]]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_names_step_and_samples(place, monkeypatch):
    before = DistillationTrainer.compute_loss

    def compute_loss(self, model, inputs, *arguments, **named):
        if self.state.global_step == 5:
            self.model.student.get_output_embeddings().weight.data[0, 0] = float("nan")
        return before(self, model, inputs, *arguments, **named)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_loss)
    with pytest.raises(TrainingError, match=r"became nan at step 6, on the samples (image|text)\d"):
        train(recipe_in(place, "broken"))
    kept = list((place / "broken").glob("stages/*/checkpoint-*"))
    assert [path.name for path in kept] == ["checkpoint-4"]
    assert json.loads((place / "broken" / "lineage.json").read_text())["status"] == "stopped"
    monkeypatch.undo()
    train(recipe_in(place, "broken"))


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint_whole(place, whole, monkeypatch):
    before = DistillationTrainer._save_optimizer_and_scheduler

    def full(self, folder):
        if self.state.global_step == 8:
            raise OSError(28, "No space left on device")
        before(self, folder)

    monkeypatch.setattr(DistillationTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(TrainingError, match=r"step 8 could not be written.*No space left"):
        train(recipe_in(place, "full"))
    kept = [path.name for path in (place / "full").glob("stages/*/*")]
    assert kept == ["checkpoint-4"]
    monkeypatch.undo()
    final = train(recipe_in(place, "full"))
    assert weights_digest(final) == weights_digest(whole)


@pytest.mark.slow
def test_stages_run_in_order_and_are_not_repeated(place, monkeypatch):
    stage = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "log_every": 2, "method": "sft"}
    path = tiny.write_recipe(
        place / "two",
        stages=[
            {**stage, "name": "projector", "trainable": ["projector"]},
            {**stage, "name": "distil", "method": "switch-kd"},
        ],
    )
    recipe = load_recipe(path)
    final = train(recipe)
    stages = recipe.output_folder / "stages"
    start, middle, end = (
        load_file(folder / "model.safetensors")
        for folder in (place / "two" / "student", stages / "01-projector" / "model", final)
    )
    changed = {name for name in start if not torch.equal(start[name], middle[name])}
    assert changed
    assert all("projector" in name for name in changed)
    assert all(not torch.equal(middle[name], end[name]) for name in end if "embed_tokens" in name)
    # The first stage is taken as it lies there when the last one has to be made again.
    digest = weights_digest(final)
    for folder in (final, stages / "02-distil"):
        folder.rename(folder.with_name("away-" + folder.name))
    ran = []
    before = DistillationTrainer.train
    monkeypatch.setattr(
        DistillationTrainer,
        "train",
        lambda self, **k: ran.append(self.stage.name) or before(self, **k),
    )
    assert weights_digest(train(recipe)) == digest
    assert ran == ["distil"]


@pytest.mark.slow
def test_frozen_weights_do_not_move(place):
    final = train(recipe_in(place, "frozen", "method=dbild", "trainable=[language_model]"))
    start = load_file(place / "student" / "model.safetensors")
    end = load_file(final / "model.safetensors")
    frozen = [name for name in start if "language_model" not in name]
    assert frozen
    assert all(torch.equal(start[name], end[name]) for name in frozen)


def test_a_switch_term_with_frozen_eyes_is_refused_before_training(place):
    with pytest.raises(UsageError, match=r"freezes the vision tower.*method=dbild"):
        train(recipe_in(place, "eyes", "trainable=[projector, language_model]"))
    assert not (place / "eyes" / "stages").exists()


@pytest.mark.slow
def test_accumulation_gives_the_same_weights_to_rounding(place, whole):
    final = train(recipe_in(place, "pieces", "gradient_accumulation=2"))
    assert_close_weights(whole, final, atol=2e-4, rtol=2e-3)


@pytest.mark.slow
def test_recomputation_and_small_chunks_give_the_same_weights_to_rounding(place, whole):
    final = train(recipe_in(place, "recomputed", "gradient_checkpointing=true", "head_chunk=5"))
    assert_close_weights(whole, final, atol=2e-4, rtol=2e-3)


@pytest.mark.slow
def test_adapters_are_merged_into_an_ordinary_checkpoint(place):
    final = train(recipe_in(place, "adapted", "lora={r: 2, alpha: 4}", "steps=6"))
    start = load_file(place / "student" / "model.safetensors")
    end = load_file(final / "model.safetensors")
    assert start.keys() == end.keys()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert "language_model.model.layers.0.mlp.up_proj.weight" in moved
    assert "language_model.model.embed_tokens.weight" not in moved
    assert any("vision_tower" in name for name in moved)
    log = json.loads((place / "adapted" / "lineage.json").read_text())
    counts = log["stages"]["train"]["parameters"]
    assert counts["trainable"] < counts["total"]


@pytest.mark.slow
def test_adapters_resume_to_the_very_same_weights(place):
    settings = ("lora={r: 2, alpha: 4}", "steps=6")
    whole = train(recipe_in(place, "adapted", *settings))
    killed(place, "adapted-killed", 5, *settings)
    again = train(recipe_in(place, "adapted-killed", *settings))
    assert weights_digest(again) == weights_digest(whole)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0, teacher_states.STATES_BUDGET])
def test_a_cached_teacher_gives_the_same_losses(place, monkeypatch, budget):
    """Written as its states are met, or all of them before the first step."""
    monkeypatch.setattr(teacher_states, "STATES_BUDGET", budget)
    cached = [f"teacher_cache={place / f'cache-{budget}'}", "log_every=1", "steps=12"]
    names = (f"{name}-{budget}" for name in ("first", "second"))
    folders = [train(recipe_in(place, name, *cached)).parent for name in names]
    monkeypatch.setattr(teacher_states, "STATES_BUDGET", 0)
    plain = train(recipe_in(place, f"plain-{budget}", "log_every=1", "steps=12")).parent
    logs = [
        [json.loads(line) for line in (folder / "train_log.jsonl").open()]
        for folder in (plain, *folders)
    ]
    for entries in zip(*logs, strict=True):
        for name, value in entries[0]["terms"].items():
            for entry in entries[1:]:
                assert entry["terms"][name] == pytest.approx(value, rel=1e-6, abs=1e-6)


@pytest.mark.slow
def test_teacher_states_are_computed_once_for_all_epochs_and_seeds(place, monkeypatch, tmp_path):
    """To the bit, whoever wrote them and in whatever order the samples are met."""
    from kd_bench.distill.vision_language import VisionLanguageModel

    passes = []
    before = VisionLanguageModel.answer_states

    def counted(self, inputs):
        passes.append(0 if self.whole.training else len(inputs["input_ids"]))
        return before(self, inputs)

    monkeypatch.setattr(VisionLanguageModel, "answer_states", counted)
    monkeypatch.setenv("KD_BENCH_CACHE", str(tmp_path))
    found = []
    for number, seed in enumerate((5, 5, 6)):
        settings = ("method=kl", "steps=12", f"seed={seed}")  # two epochs of 24 samples
        final = train(recipe_in(place, f"kept-{number}", *settings))
        taught = [size for size in passes if size]
        assert taught == ([16, 8] if number == 0 else [])
        assert len(passes) - len(taught) == 12  # the student's
        passes.clear()
        found.append(weights_digest(final))
    assert found[0] == found[1] != found[2]
    train(recipe_in(place, "met-once", "method=kl", "steps=6", "seed=5"))
    assert sum(size > 0 for size in passes) == 6
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "teacher-states").write_text("no folder can be made here")
    monkeypatch.setenv("KD_BENCH_CACHE", str(elsewhere))
    final = train(recipe_in(place, "not-kept", "method=kl", "steps=12", "seed=5"))
    assert weights_digest(final) == found[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "kl", "switch-kd"])
def test_a_step_of_the_trainer_waits_four_times_at_most(place, monkeypatch, method):
    """Counted as on a GPU, transformers' own part included; what 18 steps wait more than 12 do."""
    from kd_bench.distill import distiller

    monkeypatch.setattr(distiller, "HOST_READS", ())
    waits, quiet = [], ("log_every=100", "save_every=0")
    for steps in (12, 18):
        with counted() as operations, pytest.MonkeyPatch.context() as patch:
            # Batches are made on the host; losses are checked there, and only there, in each step.
            for owner, name in ((Collator, "__call__"), (DistillationTrainer, "check_finite")):
                patch.setattr(owner, name, operations.not_counting(getattr(owner, name)))
            output = f"waits-{method}-{steps}"
            train(recipe_in(place, output, f"method={method}", f"steps={steps}", *quiet))
        waits.append(operations.waits.total())
    assert (waits[1] - waits[0]) / 6 <= (3.2 if method == "switch-kd" else 2.2)


@pytest.mark.slow
def test_the_caches_answers_spare_the_teachers_forward(place, monkeypatch):
    from kd_bench.distill.distiller import Distiller

    settings = [f"teacher_cache={place / 'spared'}", "method=dbild", "steps=6"]
    train(recipe_in(place, "fills", *settings))
    calls = []
    before = Distiller._forward
    monkeypatch.setattr(
        Distiller,
        "_forward",
        lambda self, name, *rest: calls.append(name) or before(self, name, *rest),
    )
    train(recipe_in(place, "reads", *settings))
    assert set(calls) == {"student"}


def test_image_terms_and_a_cache_do_not_go_together(place):
    with pytest.raises(UsageError, match=r"'image_kl' looks at images"):
        train(recipe_in(place, "both", f"teacher_cache={place / 'c'}", "method=llava-kd"))


@pytest.mark.slow
def test_samples_are_also_read_on_the_way(place, tmp_path, monkeypatch):
    from kd_bench.distill import encoding

    whole = train(recipe_in(place, "ahead", "method=sft", "steps=6"))
    monkeypatch.setattr(train_module, "SMALL_DATA", 0)
    lazily = train(recipe_in(place, "lazily", "method=sft", "steps=6"))
    assert weights_digest(lazily) == weights_digest(whole)
    monkeypatch.undo()
    monkeypatch.setattr(encoding, "MEMORY_BUDGET", 1)
    assert weights_digest(
        train(recipe_in(place, "big", "method=sft", "steps=6"))
    ) == weights_digest(whole)


@pytest.mark.slow
def test_a_picture_that_vanishes_on_the_way_is_skipped_and_counted(place, tmp_path, monkeypatch):

    monkeypatch.setattr(train_module, "SMALL_DATA", 0)
    data = tiny.write_data(tmp_path / "data", count=8)
    for index in (0, 1):
        (tmp_path / "data" / f"{index}.png").unlink()
    settings = (f"data.path={data}", "method=sft", "steps=4", "batch_size=2")
    final = train(recipe_in(place, "vanished", *settings))
    unreadable = json.loads((final / "lineage.json").read_text())["stages"]["train"]["unreadable"]
    assert sorted(name for name, _ in unreadable) == ["image0", "image1"]
    with pytest.raises(TrainingError, match=r"more than the 1 allowed"):
        train(recipe_in(place, "vanished-stops", *settings, "data.unreadable_limit=1"))


@pytest.mark.slow
def test_unreadable_samples_are_skipped_up_to_the_limit_then_listed(place, tmp_path):
    data = tiny.write_data(tmp_path / "data", count=12)
    (tmp_path / "data" / "0.png").write_bytes(b"not a picture")
    (tmp_path / "data" / "5.png").unlink()
    settings = (f"data.path={data}", "method=sft", "steps=2")
    final = train(recipe_in(place, "skips", *settings))
    unreadable = json.loads((final / "lineage.json").read_text())["stages"]["train"]["unreadable"]
    assert [name for name, _ in unreadable] == ["image0", "image5"]
    with pytest.raises(
        TrainingError, match=r"2 samples .* 1 allowed: image0: .*image5: 5\.png is m"
    ):
        train(recipe_in(place, "stops", *settings, "data.unreadable_limit=1"))


def test_two_processes_do_not_share_a_folder(place):
    recipe = recipe_in(place, "busy")
    recipe.output_folder.parent.mkdir(parents=True, exist_ok=True)
    script = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    line = [sys.executable, "-c", script, f"{recipe.output_folder}.lock"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline().strip() == b"held"
        with pytest.raises(UsageError, match="Another"):
            train(recipe)


SHARDED = """
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

begin = AcceleratorState.__init__

def begin_sharded(self, *arguments, fsdp_plugin=None, **named):
    '''On a CPU accelerate would fall back to whole copies of the weights.'''
    begin(self, *arguments, fsdp_plugin=fsdp_plugin, **named)
    chosen = fsdp_plugin or self._shared_state.get("fsdp_plugin")
    self.fsdp_plugin = chosen or FullyShardedDataParallelPlugin()
    self.distributed_type = DistributedType.FSDP

AcceleratorState.__init__ = begin_sharded
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # accelerate launch's default
}
EVERYTHING = "trainable=[vision_tower, projector, language_model]"


def in_two_processes(place, output, *settings, sharded=False, killed_at=-1):
    """Two gloo processes under torchrun, each with half of every batch; the folder's `final`."""
    script = place / "script.py"
    script.write_text((SHARDED if sharded else "") + KILLED_AT)
    arguments = [str(killed_at), str(place / "recipe.yaml"), f"output={place / output}", *settings]
    done = torchrun(2, script, *arguments, environment=FSDP if sharded else None)
    assert (done.returncode == 0) == (killed_at < 0), done.stderr[-3000:]
    return place / output / "final"


def assert_same_training(expected, found):
    """Weights and logs of two finished trainings are equal within 1e-5."""
    assert_close_weights(expected, found, atol=1e-5, rtol=0)
    logs = [
        [json.loads(line) for line in (folder.parent / "train_log.jsonl").open()]
        for folder in (expected, found)
    ]
    for left, right in zip(*logs, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        assert left["terms"] == pytest.approx(right["terms"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(place):
    settings = ("steps=8", EVERYTHING)
    one = train(recipe_in(place, "one", *settings))
    assert_same_training(one, in_two_processes(place, "two-processes", *settings))


@pytest.mark.slow
def test_image_terms_in_two_processes_give_what_one_gives(place):
    settings = ("method=llava-kd", "steps=8", EVERYTHING)
    one = train(recipe_in(place, "llava-one", *settings))
    assert_same_training(one, in_two_processes(place, "llava-two", *settings))


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [(), ("lora={r: 2}", "gradient_checkpointing=true")])
def test_two_processes_with_sharded_weights_give_what_one_gives(place, adapted):
    """Killed after the first checkpoint and continued; the batches mix pictures and plain text."""
    settings = ("steps=8", EVERYTHING, *adapted)
    name = f"sharded-{len(adapted)}"
    one = train(recipe_in(place, f"{name}-one", *settings))
    in_two_processes(place, name, *settings, sharded=True, killed_at=6)
    assert list((place / name).rglob("checkpoint-4/pytorch_model_fsdp_0/*.distcp"))
    assert_same_training(one, in_two_processes(place, name, *settings, sharded=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("method=switch-kd",),
        ("method=vsd", "gradient_checkpointing=true"),
        ("method=dbild", "gradient_accumulation=2"),
    ],
    ids=", ".join,
)
def test_a_teacher_shared_by_two_processes_gives_what_one_gives(place, settings):
    """The switch's gradient passes through its gathered layers; plain text and images mix."""
    settings = ("steps=8", EVERYTHING, "teacher_sharding=fsdp2", *settings)
    name = f"shared-teacher-{settings[3].partition('=')[2]}"
    one = train(recipe_in(place, f"{name}-one", *settings))
    assert_same_training(one, in_two_processes(place, name, *settings))


GRADIENT_THROUGH_SHARDS = """
import torch
from kd_bench.distill import processes
from kd_bench.distill.distiller import Distiller
from kd_bench.distill.recipe import Term
from tests.support import tiny

def gradients(shared):
    student, teacher = tiny.model(width=32, seed=2), tiny.model(width=48, layers=2, seed=1)
    distiller = Distiller(student, teacher, [Term(loss="dbild", of="switch")])
    layers = distiller.teacher.layers
    whole = sum(p.numel() for layer in layers for p in layer.parameters())
    if shared:
        processes.shard_layers(layers)
        own = sum(p.to_local().numel() for layer in layers for p in layer.parameters())
        assert own == whole / 2, (own, whole)
    torch.manual_seed(0)
    ids = torch.tensor([[2, 2, 2, 2, 8, 9, 10, 11]] * 2)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(torch.arange(8) < 5, -100),
        "pixel_values": torch.randn(2, 3, 16, 16),
    }
    loss, _ = distiller(batch, 6)
    loss.backward()
    return loss.detach(), [p.grad for p in distiller.parts.vision_tower.parameters()]

whole, shared = gradients(False), gradients(True)
assert float(whole[0]) > 0 and any(g is not None and g.abs().max() > 1e-4 for g in whole[1])
torch.testing.assert_close(shared, whole, atol=1e-5, rtol=0)
"""


def test_the_gradient_of_the_switch_passes_through_a_shared_teacher(tmp_path):
    """Half of each layer on each of two processes: z_SW and the tower's gradient are the same."""
    script = tmp_path / "script.py"
    script.write_text(GRADIENT_THROUGH_SHARDS)
    done = torchrun(2, script)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_student_and_teacher_both_sharded_give_what_one_process_gives(place):
    settings = ("steps=8", EVERYTHING, "teacher_sharding=fsdp2")
    one = train(recipe_in(place, "all-shared-one", *settings))
    assert_same_training(one, in_two_processes(place, "all-shared", *settings, sharded=True))


def test_a_shared_teacher_goes_without_a_cache(place):
    with pytest.raises(UsageError, match="exclude each other"):
        recipe_in(place, "none", "teacher_sharding=fsdp2", "teacher_cache=somewhere")


def test_the_first_version_of_fsdp_is_refused(place, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="first version") as refused:
        train(recipe_in(place, "flattened"))
    assert "--fsdp_version 2" in refused.value.hint
    assert not (place / "flattened").exists()


@pytest.mark.slow
def test_mixed_precision_trains_float32_weights_and_logs_to_tensorboard(place):
    settings = ("precision=bfloat16", "steps=4", "report_to=[tensorboard]")
    final = train(recipe_in(place, "mixed", *settings))
    tensors = load_file(final / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = (place / "mixed").rglob("events.out.tfevents*")
    plotted = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"train/loss", "train/term_switch", "train/knee_teacher_p50"} <= set(plotted)


@pytest.mark.slow
def test_every_logger_has_the_run_under_one_name(place, monkeypatch):
    """Weights & Biases as it runs without a network; trackio is given the same two names."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(place))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    try:
        train(recipe_in(place, "named", "steps=1", "report_to=[tensorboard,wandb]"))
        assert (wandb.run.project, wandb.run.name) == ("kd-bench", "named-train")
    finally:
        wandb.finish()
        monkeypatch.delenv("WANDB_PROJECT", raising=False)
    [events] = (place / "named").rglob("events.out.tfevents*")
    assert events.parent.name == "named-train"


def saved_types(folder):
    tensors = load_file(folder / "model.safetensors")
    return {
        side: {t.dtype for name, t in tensors.items() if ("vision_tower" in name) == (side == "v")}
        for side in "vl"
    }


def stored_in(place, name, tower, rest):
    """The student again, its weights in other float types."""
    shutil.copytree(place / "student", place / name)
    file = place / name / "model.safetensors"
    tensors = {
        key: tensor.to(tower if "vision_tower" in key else rest)
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return place / name


@pytest.mark.slow
def test_the_finished_student_has_the_float_types_that_it_came_with(place):
    half = stored_in(place, "half", torch.bfloat16, torch.bfloat16)
    mixed = stored_in(place, "towered", torch.float32, torch.bfloat16)
    settings = ("method=sft", "steps=2")
    final = train(recipe_in(place, "from-half", f"student={half}", *settings))
    assert saved_types(final) == {"v": {torch.bfloat16}, "l": {torch.bfloat16}}
    assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"
    assert (final / "model.safetensors").stat().st_size < 1.1 * (
        half / "model.safetensors"
    ).stat().st_size
    stage = load_file(place / "from-half" / "stages" / "01-train" / "model" / "model.safetensors")
    for name, tensor in load_file(final / "model.safetensors").items():
        assert torch.equal(tensor, stage[name].to(torch.bfloat16))
    final = train(recipe_in(place, "from-mixed", f"student={mixed}", *settings))
    assert saved_types(final) == {"v": {torch.float32}, "l": {torch.bfloat16}}
    chosen = ("final_dtype=float32", f"student={half}", *settings)
    final = train(recipe_in(place, "from-half-chosen", *chosen))
    assert saved_types(final) == {"v": {torch.float32}, "l": {torch.float32}}


@pytest.mark.parametrize(
    "trainable,learns",
    [
        ("[projector]", {"projector"}),
        ("[vision_tower]", {"vision_tower"}),
        ("[vision_tower, projector]", {"vision_tower", "projector"}),
        ("[language_model]", {"language_model"}),
    ],
)
@pytest.mark.parametrize("lora", [(), ("lora={r: 2}",)])
@pytest.mark.slow
def test_what_trainable_does_not_name_does_not_train(place, trainable, learns, lora):
    """With `lora` the language model's adapters once trained whether named or not."""
    name = f"only-{trainable}-{len(lora)}"
    settings = ("method=sft", "steps=2", "learning_rate=0.01", f"trainable={trainable}", *lora)
    final = train(recipe_in(place, name, *settings))
    before = load_file(place / "student" / "model.safetensors")
    after = load_file(final / "model.safetensors")
    assert after.keys() == before.keys()
    parts = ("vision_tower", "projector", "language_model")
    moved = {
        next((part for part in parts if part in name), name)
        for name in before
        if not torch.equal(before[name], after[name])
    }
    assert moved == learns


@pytest.mark.parametrize("method", ["llava-kd", "align-kd"])
@pytest.mark.slow
def test_image_terms_are_the_same_with_any_accumulation(place, method):
    """They were once weighed by the answer tokens of each micro-batch."""
    logs = []
    for pieces in (1, 2, 4):
        settings = (f"method={method}", "steps=2", "log_every=1", f"gradient_accumulation={pieces}")
        final = train(recipe_in(place, f"{method}-by-{pieces}", *settings))
        lines = (final.parent / "train_log.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["terms"] for line in lines])
    for log in logs[1:]:
        for found, expected in zip(log, logs[0], strict=True):
            assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["llava-kd", "align-kd", "jsd", "bild", "vsd"])
@pytest.mark.slow
def test_every_other_method_trains(place, method):
    final = train(
        recipe_in(place, f"method-{method}", f"method={method}", "steps=2", "log_every=1")
    )
    lines = (final.parent / "train_log.jsonl").read_text().splitlines()
    assert all(value == value for value in json.loads(lines[-1])["terms"].values())


@pytest.fixture(scope="module")
def as_parquet(place):
    """The place's conversations in two parquet files, images inside."""
    rows = json.loads(Path(load_recipe(place / "recipe.yaml").data.path).read_text())
    folder = Path(load_recipe(place / "recipe.yaml").data.path).parent
    said = [{"from": Value("string"), "value": Value("string")}]
    features = Features({"id": Value("string"), "image": Image(), "conversations": said})
    for row in rows:
        name = row.pop("image", None)
        row["image"] = name and {"bytes": (folder / name).read_bytes(), "path": None}
    whole = Dataset.from_list(rows, features=features)
    whole.select(range(10)).to_parquet(place / "rows-0.parquet")
    whole.select(range(10, len(whole))).to_parquet(place / "rows-1.parquet")
    return str(place / "rows-*.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "stream", "mixture"])
def test_every_form_of_data_resumes_and_does_not_depend_on_processes_or_workers(
    place, as_parquet, form
):
    data = {
        "parquet": f"data={{path: '{as_parquet}'}}",
        "stream": f"data={{path: '{as_parquet}', streaming: true}}",
        "mixture": f"data=[{{path: '{as_parquet}', weight: 0.5, limit: 12}}, "
        f"{{path: '{as_parquet}', weight: 2, skip: 12}}]",
    }[form]
    settings = (data, "steps=10", EVERYTHING)
    one = train(recipe_in(place, f"{form}-one", *settings))
    killed(place, f"{form}-killed", 6, *settings, "workers=2")
    resumed = train(recipe_in(place, f"{form}-killed", *settings, "workers=2"))
    assert_close_weights(one, resumed, atol=0, rtol=0)
    two = in_two_processes(place, f"{form}-two", *settings, "workers=2")
    assert_same_training(one, two)
