"""The forward pass of a step: which models run, what they share, where gradients go."""

import pytest
import torch
import torch.nn.functional as F

from kd_bench.distill import distiller as distiller_module
from kd_bench.distill import losses
from kd_bench.distill.conversations import read_conversations
from kd_bench.distill.distiller import (
    LAST,
    Distiller,
    FirstLayerProbe,
    default_chunk,
    text_and_images,
)
from kd_bench.distill.encoding import Collator, Encoder
from kd_bench.distill.objective import count_items, image_correlation
from kd_bench.distill.recipe import METHODS, DataSource, Term
from kd_bench.distill.vision_language import VisionLanguageModel, answer_positions, places_of
from tests.support import tiny
from tests.support.counting import counted


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = tiny.write_data(tmp_path_factory.mktemp("data"), count=8)
    conversations, _ = read_conversations(DataSource(path=str(path)))
    made = Encoder(tiny.processor()).encode_many(conversations)
    return [{**sample, "sample_index": torch.tensor(i)} for i, sample in enumerate(made)]


def batch_of(samples):
    batch = Collator(0)(samples)
    batch.pop("sample_index")
    return batch


@pytest.fixture
def batch(samples):
    return batch_of(samples)


@pytest.fixture
def text_batch(samples):
    return batch_of([sample for sample in samples if "pixel_values" not in sample])


@pytest.fixture
def pair():
    return tiny.model(width=32, seed=2), tiny.model(width=48, layers=2, seed=1)


def test_switch_kd_is_the_sum_of_its_terms_on_the_models_own_logits(pair, batch):
    student, teacher = pair
    answers = answer_positions(batch["labels"])
    targets = batch["labels"][:, 1:][answers[:, :-1]]
    items = len(targets)
    given = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    hybrid = tiny.model(width=48, layers=2, seed=1)
    hybrid.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
    rows = {
        name: model(**given).logits[answers]
        for name, model in (("s", student), ("t", teacher), ("sw", hybrid))
    }
    expected = (
        F.cross_entropy(rows["s"], targets)
        + losses.dbild(rows["t"], rows["s"]).mean()
        + losses.dbild(rows["t"], rows["sw"]).mean()
    )
    loss, values = Distiller(student, teacher, METHODS["switch-kd"])(batch, items)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sum(values.values()), loss.detach())


def test_the_switch_term_reaches_the_students_eyes_and_nothing_else(pair, batch):
    student, teacher = pair
    distiller = Distiller(student, teacher, [Term(loss="dbild", of="switch")])
    loss, _ = distiller(batch, 1.0)
    loss.backward()
    touched = {name for name, p in student.named_parameters() if p.grad is not None}
    assert touched
    assert all("vision_tower" in name for name in touched)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    "method,student_calls,teacher_calls",
    [("sft", 1, 0), ("kl", 1, 1), ("dbild", 1, 1), ("vsd", 1, 2), ("switch-kd", 1, 2)],
)
def test_only_what_a_term_needs_runs(pair, batch, method, student_calls, teacher_calls):
    student, teacher = pair
    calls = {"student": 0, "teacher": 0, "eyes": 0, "teacher eyes": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    student.model.language_model.register_forward_hook(count("student"))
    teacher.model.language_model.register_forward_hook(count("teacher"))
    student.model.vision_tower.register_forward_hook(count("eyes"))
    teacher.model.vision_tower.register_forward_hook(count("teacher eyes"))
    Distiller(student, teacher, METHODS[method])(batch, 1.0)
    assert calls == {
        "student": student_calls,
        "teacher": teacher_calls,
        "eyes": 1,  # shared by student and switch
        "teacher eyes": min(teacher_calls, 1),
    }


@pytest.mark.parametrize("method", ["sft", "switch-kd", "llava-kd", "align-kd"])
def test_a_text_only_batch_never_reaches_a_vision_tower(pair, text_batch, method):
    for model in pair:
        model.model.vision_tower.register_forward_hook(lambda *_: pytest.fail("looked"))
    loss, values = Distiller(*pair, METHODS[method])(text_batch, 1.0)
    assert loss.isfinite()
    assert "switch" not in values


@pytest.mark.parametrize("method", ["sft", "vsd", "switch-kd", "align-kd"])
def test_a_text_only_batch_gives_a_gradient_to_the_same_weights(pair, batch, text_batch, method):
    """Devices that exchange gradients weight by weight would otherwise wait for each other."""
    distiller = Distiller(*pair, METHODS[method])
    distiller.freeze_unreached(batch)
    frozen = {name for name, p in pair[0].named_parameters() if not p.requires_grad}
    assert frozen == {f"model.vision_tower.post_layernorm.{name}" for name in ("weight", "bias")}
    language = {id(p) for p in pair[0].model.language_model.parameters()}
    for inputs in (batch, text_batch):
        distiller.zero_grad()
        loss, _ = distiller(inputs, 1.0)
        loss.backward()
        learning = [p for p in distiller.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in learning)
    seen = [p for p in learning if id(p) not in language | {id(pair[0].lm_head.weight)}]
    assert seen
    assert all(float(p.grad.abs().max()) == 0 for p in seen)


def test_the_teacher_stays_out_of_what_is_trained_and_saved(pair):
    student, teacher = pair
    distiller = Distiller(student, teacher, METHODS["switch-kd"])
    assert set(distiller.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    distiller.train()
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_image_terms_by_hand(pair, batch):
    student, teacher = pair
    given = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    places = batch["input_ids"] == 2
    with torch.no_grad():
        out = [model(**given, output_hidden_states=True) for model in (student, teacher)]
        rows = [o.logits[places] for o in out]
        kl = F.kl_div(rows[0].log_softmax(-1), rows[1].softmax(-1), reduction="batchmean")
        cosines = []
        for index in places.any(1).nonzero()[:, 0]:
            relations = []
            for o in out:
                states = o.hidden_states[-1][index][places[index]]
                relations.append((states @ states.T).flatten())
            cosines.append(F.cosine_similarity(*relations, dim=0))
    terms = METHODS["llava-kd"]
    answers = int((batch["labels"] != -100).sum())
    _, values = Distiller(student, teacher, terms)(batch, answers)
    torch.testing.assert_close(values["image_kl"], kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        values["image_correlation"], 1 - torch.stack(cosines).mean(), rtol=1e-3, atol=1e-6
    )


def test_the_probe_sees_the_attention_that_the_eager_model_reports(batch):
    model = tiny.model(seed=3)
    given = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad(), FirstLayerProbe(VisionLanguageModel(model)) as probe:
        model(**given)
    found = probe.weights(batch["attention_mask"])
    assert model.config.text_config._attn_implementation != "eager"
    eager = tiny.model(seed=3)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected = eager(**given, output_attentions=True).attentions[0]
    real = batch["attention_mask"].bool()
    for row in range(len(real)):
        torch.testing.assert_close(found[row][:, real[row]], expected[row][:, real[row]])


def test_align_kd_bridges_widths_with_an_adapter_that_learns(pair, batch):
    distiller = Distiller(*pair, METHODS["align-kd"])
    loss, values = distiller(batch, float((batch["labels"] != -100).sum()))
    loss.backward()
    assert distiller.adapter.weight.shape == (32, 48)
    assert distiller.adapter.weight.grad.abs().sum() > 0
    assert values["attention_mse"] > 0
    same = tiny.model(width=48, layers=2, seed=5)
    assert Distiller(same, pair[1], METHODS["align-kd"]).adapter is None


def test_correlation_of_equal_states_is_zero_whatever_their_scale():
    states = torch.randn(6, 4)
    slots = torch.tensor([0, 1, 2, 8, 9, 10])  # of the first and the last of three samples
    assert image_correlation(states, 3 * states, slots, [3, 4]).item() == pytest.approx(0, abs=1e-6)
    other = torch.randn(6, 9)
    expected = 0.0
    for part in (slice(0, 3), slice(3, 6)):
        relations = ((each[part] @ each[part].T).flatten() for each in (states, other))
        expected += 1 - F.cosine_similarity(*relations, dim=0).item()
    assert image_correlation(states, other, slots, [3, 4]).item() == pytest.approx(expected)


def test_attention_of_text_to_images_is_averaged_without_all_heads_at_once(batch):
    model = tiny.model(seed=3)
    parts = VisionLanguageModel(model)
    places = places_of(batch, 2)
    with FirstLayerProbe(parts) as probe:
        parts.hidden_states(batch)
    text, images = text_and_images(batch, places, 2)
    weights = list(parts.language_model.layers[0].self_attn.parameters())[:4]  # queries and keys
    saved: list[tuple[int, ...]] = []
    keep = (lambda tensor: saved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor)
    with counted() as operations, torch.autograd.graph.saved_tensors_hooks(*keep):
        found = probe.averaged(batch["attention_mask"], text, images)
    assert not operations.waits
    length = batch["input_ids"].shape[1]
    assert saved
    assert not [shape for shape in saved if shape[-2:] == (text.shape[1], length)]  # no head's
    whole = probe.weights(batch["attention_mask"]).mean(1)
    expected = torch.zeros_like(found)
    real = torch.zeros_like(found, dtype=torch.bool)
    for row, (rows, columns) in enumerate(zip(text.tolist(), images.tolist(), strict=True)):
        for i, position in enumerate(rows):
            for j, place in enumerate(columns):
                if place < position < LAST:
                    expected[row, i, j] = whole[row, position, place]
                    real[row, i, j] = True
    assert int(real.sum()) == int(count_items(batch, 2)["image_pairs"])
    torch.testing.assert_close(found[real], expected[real])
    scale = torch.arange(int(real.sum())).float()
    for ours, theirs in zip(
        torch.autograd.grad((found[real] * scale).sum(), weights, retain_graph=True),
        torch.autograd.grad((expected[real] * scale).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_heads_take_as_many_positions_as_their_vocabulary_allows() -> None:
    assert default_chunk(891) == 512
    assert 64 <= default_chunk(151_936) <= 128
    assert default_chunk(10**9) == 16
    assert default_chunk(151_936, free=40 * 2**30) == 1024  # bytes of a GPU
    assert default_chunk(151_936, free=12 * 2**30) == 512
    assert default_chunk(151_936, free=0) == 16


@pytest.mark.parametrize("method", ["sft", "kl", "switch-kd", "llava-kd", "align-kd"])
@pytest.mark.parametrize("chunk", [3, 512])
def test_a_step_waits_for_its_device_four_times_at_most(samples, monkeypatch, method, chunk):
    """Counted as on a GPU; the passes themselves never wait. A foreign batch asks once more."""
    monkeypatch.setattr(distiller_module, "HOST_READS", ())
    student, teacher = tiny.model(width=32, seed=2), tiny.model(width=48, layers=2, seed=1)
    distiller = Distiller(student, teacher, METHODS[method], head_chunk=chunk)
    for count in (2, 8):
        batch = Collator(0, (2, 2))(samples[:count])
        foreign = {name: each for name, each in batch.items() if not name.startswith("places_")}
        items = count_items(batch, 2)
        with counted() as in_passes:
            distiller.run({**batch, "places": places_of(batch, 2)})
        assert not in_passes.waits
        waits = []
        for given in (batch, foreign):
            with counted() as in_step:
                distiller(given, items)[0].backward()
            waits.append(in_step.waits.total())
        assert waits[0] == (1 if method == "switch-kd" else 0)
        assert waits[1] <= 8  # all but one of them on the copy that the host holds


@pytest.mark.parametrize("method", ["llava-kd", "align-kd", "switch-kd"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_batch_gives_the_same_in_any_number_of_micro_batches(samples, method, size):
    """Means over image tokens were once weighed by the answers of each micro-batch."""
    # Answers of unequal length, so that wrong weights would show; text-only samples among them.
    student, teacher = tiny.model(width=32, seed=2), tiny.model(width=48, layers=2, seed=1)
    distiller = Distiller(student, teacher, METHODS[method])
    whole = batch_of(samples)
    expected, terms = distiller(whole, float(answer_positions(whole["labels"]).sum()))
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None}
    distiller.zero_grad(set_to_none=True)
    pieces = [batch_of(samples[i : i + size]) for i in range(0, len(samples), size)]
    counts = [count_items(piece, 2) for piece in pieces]
    items = {name: sum(count[name] for count in counts) for name in counts[0]}
    found = [distiller(piece, items) for piece in pieces]
    sum(loss for loss, _ in found).backward()
    torch.testing.assert_close(sum(loss.detach() for loss, _ in found), expected.detach())
    for name, value in terms.items():
        total = sum(values.get(name, torch.zeros(())) for _, values in found)
        torch.testing.assert_close(total, value)
    for name, parameter in distiller.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6)
