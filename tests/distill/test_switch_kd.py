"""The objective in loops that are not ours: a plain one, transformers' Trainer, TRL's."""

import copy
import json

import pytest
import torch

from kd_bench.distill import losses
from kd_bench.distill.conversations import read_conversations
from kd_bench.distill.distiller import Distiller
from kd_bench.distill.encoding import BatchOrder, Collator, ConversationDataset, Encoder
from kd_bench.distill.models import load_model
from kd_bench.distill.recipe import METHODS, Term, load_recipe
from kd_bench.distill.switch_kd import SwitchKD
from kd_bench.distill.train import train
from kd_bench.distill.vision_language import VisionLanguageModel, answer_positions, put_vision
from kd_bench.errors import UsageError
from tests.distill.test_vision_language import token_counts
from tests.support import tiny
from tests.support.tiny_families import FAMILIES, batch_for, kinds_for, make


@pytest.fixture
def pair():
    return tiny.model(width=32, seed=2), tiny.model(width=48, layers=2, seed=1)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    recipe = load_recipe(tiny.write_recipe(tmp_path_factory.mktemp("data")))
    return dataset_of(recipe)


def dataset_of(recipe):
    conversations, _ = read_conversations(recipe.data)
    dataset = ConversationDataset(conversations, Encoder(tiny.processor()))
    dataset.prepare()
    return dataset


@pytest.fixture
def batch(samples):
    return Collator(0)([samples[index] for index in range(6)])


@pytest.mark.slow
def test_a_plain_loop_gives_the_very_losses_of_the_projects_trainer(tmp_path):
    settings = ["steps=4", "log_every=1", "schedule=constant", "warmup=0", "save_every=0"]
    recipe = load_recipe(tiny.write_recipe(tmp_path), settings)
    train(recipe)
    log = (recipe.output_folder / "train_log.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, log) if "loss" in line]
    student, teacher = (load_model(tmp_path / name) for name in ("student", "teacher"))
    objective = SwitchKD(
        student, teacher, processor=tiny.processor(), teacher_processor=tiny.processor()
    )
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3, weight_decay=0.0)
    order = BatchOrder(dataset_of(recipe), 4, 4, recipe.seed)
    objective.train()
    for expected, indices in zip(logged, order, strict=False):
        batch = Collator(0)([order.dataset[index] for index in indices])
        loss, parts = objective(batch, return_parts=True)
        assert float(loss.detach()) == pytest.approx(expected["loss"], rel=1e-4)
        assert {name: float(part) for name, part in parts.items()} == pytest.approx(
            expected["terms"], rel=1e-4, abs=1e-6
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
def test_it_learns_in_a_plain_loop(pair, batch):
    objective = SwitchKD(*pair)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = objective(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is None for p in pair[1].parameters())


def test_only_the_student_learns_and_is_moved_into_training(pair):
    objective = SwitchKD(*pair)
    assert {id(p) for p in objective.parameters()} == {id(p) for p in pair[0].parameters()}
    objective.train()
    assert pair[0].training
    assert not pair[1].training


def test_micro_batches_add_up_to_the_whole_batch(pair, samples):
    objective = SwitchKD(*pair)
    whole = Collator(0)([samples[index] for index in range(4)])
    answers = (whole["labels"][:, 1:] != -100).sum()
    pieces = [Collator(0)([samples[index]]) for index in range(4)]
    total = sum(objective(piece, answers) for piece in pieces)
    torch.testing.assert_close(total, objective(whole))


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_is_the_distillers_own(pair, batch, method):
    torch.manual_seed(0)  # align-kd draws a map between the widths
    objective = SwitchKD(*pair, method=method)
    torch.manual_seed(0)
    expected, values = Distiller(*pair, METHODS[method])(
        batch, (batch["labels"][:, 1:] != -100).sum()
    )
    loss, parts = objective(batch, return_parts=True)
    assert torch.equal(loss, expected)
    assert parts.keys() == values.keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_gives_the_sum_over_its_own_logits(family):
    """z_T and z_S of transformers' own forward, z_SW of the teacher with the student's tower."""
    student, teacher = make(family, 32, seed=1), make(family, 64, seed=2)
    batch = batch_for(family, token_counts(family, VisionLanguageModel(student)))
    batch |= kinds_for(family, batch)
    loss, parts = SwitchKD(student, teacher)(batch, return_parts=True)
    loss.backward()
    answers = answer_positions(batch["labels"])
    targets = batch["labels"][:, 1:][answers[:, :-1]]
    given = {name: value for name, value in batch.items() if name != "labels"}
    hybrid = copy.deepcopy(teacher)
    put_vision(VisionLanguageModel(student), into=VisionLanguageModel(hybrid))
    with torch.no_grad():
        z_t, z_s, z_sw = (m(**given).logits[answers] for m in (teacher, student, hybrid))
    expected = {
        "ce": torch.nn.functional.cross_entropy(z_s, targets),
        "align": losses.dbild(z_t, z_s).mean(),
        "switch": losses.dbild(z_t, z_sw).mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-5, msg=name)
    torch.testing.assert_close(loss.detach(), sum(expected.values()), rtol=1e-3, atol=1e-5)
    tower = VisionLanguageModel(student).vision_tower
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in tower.parameters())


def test_options_and_weights_are_those_of_the_terms(pair, batch):
    objective = SwitchKD(*pair, temperature=2.0, curve="probs", weights={"switch": 0.5})
    spelt = [
        {"loss": "ce"},
        {"loss": "dbild", "name": "align", "temperature": 2.0, "curve": "probs"},
        Term(loss="dbild", of="switch", name="switch", temperature=2.0, curve="probs", weight=0.5),
    ]
    assert torch.equal(objective(batch), SwitchKD(*pair, terms=spelt)(batch))
    assert not torch.equal(objective(batch), SwitchKD(*pair)(batch))


def test_a_foreign_collators_batch_is_completed(pair, batch):
    """TRL asks for image tokens and padding marks nothing; a loop may leave the mask out."""
    objective = SwitchKD(*pair)
    image = batch["input_ids"] == 2
    asked = {**batch, "labels": batch["labels"].masked_fill(image, 2)}
    assert torch.equal(objective(asked), objective(batch))
    one = {name: tensor[:1] for name, tensor in batch.items() if name != "attention_mask"}
    length = int(batch["attention_mask"][0].sum())
    one |= {name: one[name][:, :length] for name in ("input_ids", "labels")}
    masked = {**one, "attention_mask": torch.ones(1, length, dtype=torch.long)}
    assert torch.equal(objective(one), objective(masked))


def test_what_does_not_fit_is_refused_in_one_line(pair, batch):
    student, teacher = pair
    for options, line in (
        ({"method": "switchkd"}, "unknown method 'switchkd'. Did you mean 'switch-kd'"),
        ({"temprature": 2}, "No term has an option 'temprature'"),
        ({"method": "sft", "temperature": 2}, "No term has an option 'temperature'"),
        ({"temperature": -1}, "temperature"),
        ({"weights": {"vsd": 1.0}}, "No term is called 'vsd'. There are: ce, align, switch"),
        ({"terms": [{"loss": "dbil"}]}, "loss"),
    ):
        with pytest.raises(UsageError, match=line):
            SwitchKD(student, teacher, **options)
    with pytest.raises(UsageError, match="vision width"):
        SwitchKD(tiny.model(vision_width=24), teacher)
    with pytest.raises(UsageError, match="rows: student 30, teacher 22"):
        SwitchKD(tiny.model(rows=30), teacher)
    with pytest.raises(UsageError, match="not an architecture"):
        SwitchKD(torch.nn.Linear(2, 2), teacher)
    frozen = tiny.model()
    frozen.model.vision_tower.requires_grad_(False)
    with pytest.raises(UsageError, match="vision tower is frozen"):
        SwitchKD(frozen, teacher)
    del batch["labels"]
    with pytest.raises(UsageError, match="no labels"):
        SwitchKD(student, teacher)(batch)


@pytest.mark.slow
def test_transformers_own_trainer_wraps_the_objective(pair, samples, tmp_path):
    from transformers import Trainer, TrainingArguments

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, parts = model(inputs, num_items_in_batch, return_parts=True)
            return (loss, parts) if return_outputs else loss

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, remove_unused_columns=False, report_to="none",
        use_cpu=True, save_strategy="no", logging_steps=1, learning_rate=3e-3, disable_tqdm=True,
    )  # fmt: skip
    trainer = Own(SwitchKD(*pair), arguments, data_collator=Collator(0), train_dataset=samples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_trls_trainer_calls_the_objective(pair, tmp_path):
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    seen = []

    class Distilling(trl.SFTTrainer):
        def __init__(self, teacher, **settings):
            super().__init__(**settings)
            self.objective = SwitchKD(self.model, teacher)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, parts = self.objective(inputs, num_items_in_batch, return_parts=True)
            seen.append((dict(inputs), num_items_in_batch, float(loss.detach())))
            return (loss, parts) if return_outputs else loss

    rows = [
        {
            "prompt": [{"role": "user", "content": "what colour is it ?"}],
            "completion": [{"role": "assistant", "content": colour}],
            "images": [tiny.picture(colour)],
        }
        for colour in tiny.COLOURS * 3
    ]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, report_to="none",
        use_cpu=True, bf16=False, save_strategy="no", logging_steps=1, learning_rate=3e-3,
        activation_checkpointing=False, max_length=None, disable_tqdm=True,
    )  # fmt: skip
    student, teacher = pair
    trainer = Distilling(
        teacher,
        model=student,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny.processor(),
    )
    trainer.train()
    losses = [loss for *_, loss in seen]
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]
    inputs, items, _ = seen[-1]
    asked = inputs["labels"][inputs["labels"] != -100]
    assert int(items) == len(asked)  # what TRL counts is what the loss is a mean over
    fresh = SwitchKD(tiny.model(width=32, seed=2), tiny.model(width=48, layers=2, seed=1))
    assert float(fresh(seen[0][0]).detach()) == pytest.approx(seen[0][2], rel=1e-5)
