"""What `train --plan` counts is what a training does: weights, kept bytes, operations, states."""

import json

import pytest

torch = pytest.importorskip("torch")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from kd_bench.cli import app  # noqa: E402
from kd_bench.distill import plan as planning  # noqa: E402
from kd_bench.distill import trainer as training  # noqa: E402
from kd_bench.distill.counting import Counting, Shapes, count  # noqa: E402
from kd_bench.distill.distiller import Distiller  # noqa: E402
from kd_bench.distill.models import parameter_counts  # noqa: E402
from kd_bench.distill.plan import card_of, choices, plan_training  # noqa: E402
from kd_bench.distill.recipe import METHODS, load_recipe  # noqa: E402
from kd_bench.distill.train import train  # noqa: E402
from kd_bench.distill.vision_language import VisionLanguageModel  # noqa: E402
from kd_bench.errors import UsageError  # noqa: E402
from tests.distill.test_vision_language import token_counts  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.tiny_families import FAMILIES, batch_for, kinds_for, make  # noqa: E402

ONE_BATCH = ("data.limit=4", "steps=1", "batch_size=4", "save_every=0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    tiny.write_recipe(folder)
    return folder


def recipe_in(place, *settings):
    return load_recipe(place / "recipe.yaml", [*ONE_BATCH, *settings])


@pytest.fixture
def measured(monkeypatch):
    """What a real training step computes, holds, and keeps of its passes and image terms.

    The graphs of the objective's chunks are let go one after another and no part of the latter.
    """
    found, weights, kept = {}, set(), {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes(), tensor
        return tensor

    def keeping(method):
        def watched(self, *given):
            if not weights:  # a plan is made
                return method(self, *given)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                return method(self, *given)

        return watched

    step = training.DistillationTrainer.training_step

    def training_step(self, model, *given):
        kept.clear()
        owners = [model, *([self.model.teacher.model] if self.model.teacher else [])]
        weights.update(p.untyped_storage()._cdata for each in owners for p in each.parameters())
        with Counting() as operations:
            loss = step(self, model, *given)
        found.update(
            flops=operations.flops,
            kept=sum(size for size, _ in kept.values()),
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            gradients=sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
            trainer=self,
        )
        return loss

    monkeypatch.setattr(training.DistillationTrainer, "training_step", training_step)
    for name in ("run", "image_value"):
        monkeypatch.setattr(Distiller, name, keeping(getattr(Distiller, name)))
    return found


def test_operations_are_those_of_torchs_own_counter():
    """Whose hooks `torch.autograd.grad` inside the objective does not bear."""
    model = tiny.model()
    batch = {
        "input_ids": torch.tensor([[2, 2, 2, 2, 5, 6, 7]]),
        "pixel_values": torch.randn(1, 3, 16, 16),
    }
    with FlopCounterMode(display=False) as torchs, Counting() as ours:
        model(**batch).logits.sum().backward()
    assert ours.flops == torchs.get_total_flops() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_without_values_as_with_them(family):
    tokens = token_counts(family, VisionLanguageModel(make(family)))
    batch = batch_for(family, tokens)
    batch |= kinds_for(family, batch)
    found = []
    for shapes in (None, Shapes()):
        pair = [make(family, width) for width in (32, 64)]
        if shapes is not None:
            pair = [shapes.model(model.config) for model in pair]
        distiller = Distiller(*pair, METHODS["switch-kd"]).train()
        distiller.freeze_unreached(batch)
        counted = count(distiller, batch, mixed=False)
        found.append((counted, *map(parameter_counts, pair)))
    assert found[0] == found[1]


def slow(*settings):
    return pytest.param(settings, marks=pytest.mark.slow)


def kept_of(plan):
    return sum(size for part, size in plan.memory.items() if part.startswith("activations"))


@pytest.mark.parametrize(
    "settings",
    [
        ("method=sft",),
        ("method=switch-kd",),
        ("method=switch-kd", "gradient_checkpointing=true"),
        slow("method=switch-kd", "teacher_gradient_checkpointing=true", "precision=bfloat16"),
        ("method=llava-kd",),
        slow("method=dbild", "trainable=[projector]"),
        slow("method=switch-kd", "lora={r: 4}", "trainable=[vision_tower, language_model]"),
    ],
    ids=", ".join,
)
def test_a_plan_is_what_a_step_does(place, measured, settings):
    recipe = recipe_in(place, f"output={place / str(abs(hash(settings)))}", *settings)
    [plan] = plan_training(recipe)
    train(recipe)
    assert plan.parameters["trainable"] == measured["trainable"]
    assert sum(plan.flops.values()) == pytest.approx(measured["flops"], rel=0.1)
    assert kept_of(plan) == pytest.approx(measured["kept"], rel=0.1)
    assert plan.memory["gradients"] == measured["gradients"]
    states = measured["trainer"].optimizer.state.values()
    moments = sum(t.nbytes for state in states for t in state.values() if t.dim() > 0)
    assert plan.memory["optimizer states"] == moments


def test_bytes_at_the_fullest_moment(place, monkeypatch):
    """The parts beside weights and states, against what is alive in a real step."""
    peaks = []
    step = training.DistillationTrainer.training_step

    def watched(self, model, *given):
        teacher = self.model.teacher.model
        there = [*model.parameters(), *model.buffers(), *teacher.parameters(), *teacher.buffers()]
        with Counting(there) as counting:
            loss = step(self, model, *given)
        peaks.append(counting.peak)
        return loss

    monkeypatch.setattr(training.DistillationTrainer, "training_step", watched)
    recipe = recipe_in(place, f"output={place / 'peak'}", "head_chunk=4")
    [plan] = plan_training(recipe)
    train(recipe)
    states = ("weights", "optimizer", "gradients")
    parts = [size for part, size in plan.memory.items() if not any(s in part for s in states)]
    # Gradients come while activations go: the sum of all parts is an upper bound of the two.
    assert max(peaks) <= 1.1 * (sum(parts) + plan.memory["gradients"])
    assert sum(parts) <= 1.1 * max(peaks)


@pytest.mark.slow
def test_a_full_size_pair_is_counted_in_seconds():
    """0.5B and 3B with SigLIP-so400m, 32 samples of 1,500 tokens, bfloat16."""
    from kd_bench.distill.models import checkpoint_activations
    from tests.benchmarks.training import QWEN_HALF, QWEN_THREE, SIGLIP, batch_of, llava

    shapes = Shapes()
    with shapes.making():
        student, teacher = llava(QWEN_HALF, SIGLIP), llava(QWEN_THREE, SIGLIP)
    batch = batch_of(student, 32, 771 - 96, 96)
    assert batch["input_ids"].shape == (32, 1500)
    kept = []
    for recompute in (False, True):
        distiller = Distiller(student, teacher, METHODS["switch-kd"]).train()
        if recompute:
            checkpoint_activations(student)
            checkpoint_activations(teacher, frozen=True)
        kept.append(count(distiller, batch, mixed=True).kept)
    assert kept[0] > 250e9
    assert kept[1] < 25e9


def test_no_weights_are_read(place, tmp_path):
    """A plan needs configs, tokenizers and data; weights may still lie elsewhere."""
    import shutil

    for name in ("teacher", "student"):
        shutil.copytree(place / name, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    recipe = recipe_in(place, f"student={tmp_path / 'student'}", f"teacher={tmp_path / 'teacher'}")
    [plan] = plan_training(recipe)
    [whole] = plan_training(recipe_in(place))
    assert plan == whole


@pytest.mark.parametrize("start", ["parts", "new"])
def test_a_student_that_is_built_first_is_planned_before(place, tmp_path, start):
    student = {
        "parts": f"student={{vision_tower: {place / 'student'}, language_model: {place / 'lm'}}}",
        "new": "student=embedded:new/student",
    }[start]
    settings = (student, "method=sft", f"output={tmp_path}")
    if start == "parts":
        language = tiny.model(width=32, seed=2)
        from transformers import Qwen2ForCausalLM

        Qwen2ForCausalLM(language.config.text_config).save_pretrained(place / "lm")
        tiny.processor().tokenizer.save_pretrained(place / "lm")
        tiny.processor().image_processor.save_pretrained(place / "student")
    else:
        settings = (*settings, "data.path=embedded:data/train/conversations.json")
    [plan] = plan_training(recipe_in(place, *settings))
    from kd_bench.distill.build import build_start
    from kd_bench.distill.models import load_model

    build_start(recipe_in(place, *settings).student, tmp_path / "built")
    built = parameter_counts(load_model(tmp_path / "built"))
    names = ("vision_tower", "projector", "language_model", "total")
    assert {n: plan.parameters[n] for n in names} == {n: built[n] for n in names}


def test_hours_are_operations_over_what_the_card_reaches(place):
    options = {"card": card_of("80:500"), "devices": 2, "utilisation": 0.25}
    [plan] = plan_training(recipe_in(place, "steps=900"), **options)
    assert plan.hours == pytest.approx(sum(plan.flops.values()) * 900 / (500e12 * 0.25 * 2) / 3600)
    assert (plan.devices, plan.micro_batch) == (2, 2)
    [alone] = plan_training(recipe_in(place), card=card_of("h100"))
    assert sum(alone.flops.values()) == pytest.approx(sum(plan.flops.values()), rel=0.1)


def between(*plans):
    """GB of memory of which the middle of what two plans need can be used."""
    return sum(plan.needed for plan in plans) / 2 / (1 - planning.RESERVED) / planning.GB


def test_what_is_open_is_computed_again_only_where_it_has_to(place):
    settings = ("batch_size=24", "data.limit=24", "head_chunk=4")
    [roomy] = plan_training(recipe_in(place, *settings))
    assert roomy.checkpointing == {"student": False, "teacher": False}
    [least] = plan_training(recipe_in(place, *settings, "gradient_checkpointing=true"))
    limit = between(roomy, least)
    [tight] = plan_training(recipe_in(place, *settings, f"device_memory={limit}"))
    assert any(tight.checkpointing.values())
    assert tight.fits
    [fixed] = plan_training(
        recipe_in(place, *settings, f"device_memory={limit}", "gradient_checkpointing=false")
    )
    assert not fixed.fits
    assert "gradient_checkpointing=true" in fixed.hint


def test_a_training_that_cannot_fit_is_refused_before_models_are_loaded(place, tmp_path):
    import shutil

    shutil.copytree(place / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()  # loading it would fail otherwise
    settings = (f"teacher={tmp_path / 'teacher'}", f"output={tmp_path / 'out'}")
    with pytest.raises(UsageError, match=r"needs about 0\.0 GB of a device's memory") as refused:
        train(recipe_in(place, *settings, "device_memory=0.0001"))
    assert "device_memory=0 trains" in refused.value.hint
    assert "gradient_accumulation=" in refused.value.hint or "lora" in refused.value.hint


def test_a_training_recomputes_what_its_plan_chose(place, measured):
    [roomy] = plan_training(recipe_in(place, "head_chunk=4"))
    [least] = plan_training(recipe_in(place, "head_chunk=4", "gradient_checkpointing=true"))
    limit = between(roomy, least)
    settings = ("head_chunk=4", f"device_memory={limit}", f"output={place / 'chosen'}")
    [plan] = plan_training(recipe_in(place, *settings))
    train(recipe_in(place, *settings))
    assert any(plan.checkpointing.values())
    assert kept_of(plan) == pytest.approx(measured["kept"], rel=0.1)


def test_what_cannot_be_counted_is_trained_all_the_same(place, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(planning, "count", fails)
    train(recipe_in(place, f"output={tmp_path}", "device_memory=1"))
    assert "memory that it needs is not known (NotImplementedError)" in capsys.readouterr().out


def test_weights_and_states_are_shared_over_devices(place):
    settings = ("batch_size=4", "teacher_sharding=fsdp2")
    [alone] = plan_training(recipe_in(place, *settings))
    [spread] = plan_training(recipe_in(place, *settings), devices=2)
    layers = sum(
        p.nbytes
        for layer in VisionLanguageModel(tiny.model(width=48, layers=2)).layers
        for p in layer.parameters()
    )
    name = "teacher's weights"
    assert spread.memory[name] == alone.memory[name] - layers // 2
    assert "gradients on their way between devices" in spread.memory
    assert spread.memory["gradients"] == alone.memory["gradients"]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ((), [(False, False), (True, False), (False, True), (True, True)]),
        (("gradient_checkpointing=true",), [(True, True)]),
        (("gradient_checkpointing=true", "teacher_gradient_checkpointing=false"), [(True, False)]),
        (("teacher_gradient_checkpointing=true",), [(False, True), (True, True)]),
        (("method=sft",), [(False, False), (True, False)]),
        (("method=dbild", "gradient_checkpointing=true"), [(True, False)]),
    ],
)
def test_choices(place, settings, expected):
    assert choices(recipe_in(place, *settings).stages[0]) == expected


def test_a_card_is_a_name_or_two_numbers():
    assert card_of("H100").memory == 85.0e9
    assert card_of("24:125").bfloat16 == 125e12
    for wrong in ("h10", "24", "24:", "x:1", "0:5", "-1:3"):
        with pytest.raises(UsageError, match="There is no card"):
            card_of(wrong)


def test_the_command_prints_a_table_or_json(place):
    line = ["train", str(place / "recipe.yaml"), *ONE_BATCH, "--plan", "--card", "l40s"]
    shown = CliRunner().invoke(app, line)
    assert shown.exit_code == 0, shown.output
    assert "activations kept of the switch pass" in shown.output
    assert "It fits" in shown.output
    told = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    assert [each["stage"] for each in told] == ["train"]
    assert told[0]["fits"] is True
    assert told[0]["needed"] == sum(told[0]["memory"].values())
    assert not (place / "out").exists()
