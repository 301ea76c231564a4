"""Loading and its refusals, digests, freezing, recomputation, adapters, students from parts."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_bench.distill.build import add_lora, build_student, merge_lora
from kd_bench.distill.checkpoints import weights_digest
from kd_bench.distill.distiller import Distiller
from kd_bench.distill.models import (
    checkpoint_activations,
    load_model,
    load_processor,
    parameter_counts,
    set_trainable,
)
from kd_bench.distill.recipe import METHODS, LoraSettings, StudentParts
from kd_bench.errors import UsageError
from tests.support import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_a_checkpoint_loads_in_the_type_asked_for(checkpoint):
    model = load_model(checkpoint, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert load_processor(checkpoint).image_token == "<image>"


def test_nothing_there(tmp_path):
    with pytest.raises(UsageError, match="There is no checkpoint at"):
        load_model(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"has no config\.json.*final/"):
        load_model(tmp_path)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no weights"):
        load_model(copy)


def test_a_damaged_config(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is not valid JSON"):
        load_model(copy)


def test_damaged_weights_are_one_line(copy):
    (copy / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(UsageError, match="could not be loaded") as caught:
        load_model(copy)
    assert "\n" not in caught.value.problem
    with pytest.raises(UsageError, match="is damaged"):
        weights_digest(copy)


def test_pickled_weights_need_consent(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"pickled weights \(pytorch_model\.bin\).*allow_pickle"):
        load_model(copy)
    assert load_model(copy, allow_pickle=True).config.model_type == "llava"


def test_code_in_a_checkpoint_needs_consent(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoModel": "modeling_strange.Strange"}}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"its own model code.*trust_remote_code=true"):
        load_model(copy)


@pytest.mark.slow
def test_a_language_model_is_no_vision_language_model(tmp_path):
    model = tiny.model()
    model.model.language_model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="vision-language model"):
        load_model(tmp_path)


def test_a_folder_without_processor(copy):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(UsageError, match="processor"):
        load_processor(copy)


def test_the_digest_sees_values_and_names_and_nothing_else(copy):
    before = weights_digest(copy)
    tensors = load_file(copy / "model.safetensors")
    names = list(tensors)
    (copy / "model.safetensors").unlink()
    save_file({n: tensors[n] for n in names[:9]}, copy / "a.safetensors", metadata={"by": "me"})
    save_file({n: tensors[n] for n in names[9:]}, copy / "b.safetensors")
    assert weights_digest(copy) == before
    tensors[names[0]].view(-1)[0] += 1e-6
    save_file({n: tensors[n] for n in names[:9]}, copy / "a.safetensors")
    changed = weights_digest(copy)
    assert changed != before
    tensors["renamed"] = tensors.pop(names[0])
    save_file({n: tensors[n] for n in ["renamed", *names[1:9]]}, copy / "a.safetensors")
    assert weights_digest(copy) not in (before, changed)


@pytest.mark.parametrize("part", ["vision_tower", "projector", "language_model"])
def test_only_the_named_part_learns(part):
    model = tiny.model()
    set_trainable(model, [part])
    counts = parameter_counts(model)
    assert counts["trainable"] == counts[part]
    assert counts["total"] == sum(
        counts[name] for name in ("vision_tower", "projector", "language_model")
    )
    mark = {"vision_tower": "vision_tower", "projector": "projector"}.get(part, "language_model")
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all(mark in name for name in learning)


def test_an_untied_head_belongs_to_the_language_model():
    model = tiny.model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    set_trainable(model, ["language_model"])
    assert model.lm_head.weight.requires_grad
    set_trainable(model, ["projector"])
    assert not model.lm_head.weight.requires_grad


def batch():
    ids = torch.tensor([[4, 7, 2, 2, 2, 2, 12, 13, 5, 7, 8, 1]])
    labels = ids.clone()
    labels[:, :10] = -100
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
    }


def test_recomputation_changes_no_gradient_and_reaches_the_switch():
    results = []
    for recompute in (False, True):
        student, teacher = tiny.model(seed=2), tiny.model(width=48, layers=2, seed=1)
        distiller = Distiller(student, teacher, METHODS["switch-kd"])
        calls = []
        if recompute:
            checkpoint_activations(student)
            checkpoint_activations(teacher, frozen=True)
        distiller.train()
        layer = teacher.model.language_model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        loss, _ = distiller(batch(), 2.0)
        loss.backward()
        gradients = {name: p.grad for name, p in student.named_parameters()}
        results.append((loss.detach(), gradients, len(calls)))
        assert not teacher.model.language_model.layers[0].self_attn.training
    (loss, gradients, plain), (again, recomputed, twice) = results
    assert torch.equal(loss, again)
    assert (plain, twice) == (2, 3)  # teacher and switch; the switch once more in the backward
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_adapters_learn_alone_and_merge_into_a_plain_model(tmp_path):
    model = tiny.model(seed=2)
    set_trainable(model, ["vision_tower", "projector", "language_model"])
    keys = set(model.state_dict())
    wrapped = add_lora(model, LoraSettings(r=2, alpha=8))
    learning = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("vision_tower" in name for name in learning)
    assert any("projector" in name for name in learning)
    assert all("lora_" in name for name in learning if "language_model" in name)
    distiller = Distiller(wrapped, tiny.model(width=48, layers=2, seed=1), METHODS["switch-kd"])
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        distiller(batch(), 2.0)[0].backward()
        optimizer.step()
    with torch.no_grad():
        before = distiller(batch(), 2.0)[0]
        plain = merge_lora(wrapped)
        after = Distiller(plain, distiller.teacher.model, METHODS["switch-kd"])(batch(), 2.0)[0]
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    assert set(plain.state_dict()) == keys
    plain.save_pretrained(tmp_path)
    assert "lora" not in " ".join(load_file(tmp_path / "model.safetensors"))


def test_adapters_on_layers_that_do_not_exist_are_refused():
    with pytest.raises(UsageError, match="No layer of the language model"):
        add_lora(tiny.model(), LoraSettings(target_modules=["nope"]))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A vision tower and a language model, saved apart."""
    from transformers import Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("parts")
    whole = tiny.model(seed=4)
    processor = tiny.processor()
    whole.model.vision_tower.save_pretrained(folder / "eyes")
    processor.image_processor.save_pretrained(folder / "eyes")
    language = Qwen2ForCausalLM(whole.config.text_config)
    language.model.load_state_dict(whole.model.language_model.state_dict())
    language.tie_weights()
    language.save_pretrained(folder / "words")
    processor.tokenizer.save_pretrained(folder / "words")
    return folder, whole


@pytest.mark.parametrize("strategy,tokens", [("full", 4), ("default", 3)])
@pytest.mark.slow
def test_a_student_from_parts_keeps_them_and_draws_its_projector(parts, tmp_path, strategy, tokens):
    folder, whole = parts
    settings = StudentParts(
        vision_tower=str(folder / "eyes"),
        language_model=str(folder / "words"),
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
    )
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        build_student(settings, tmp_path / name, seed)
    digests = [weights_digest(tmp_path / name) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    student, processor = load_model(tmp_path / "a"), load_processor(tmp_path / "a")
    for part in ("vision_tower", "language_model"):
        built = getattr(student.model, part).state_dict()
        for key, tensor in getattr(whole.model, part).state_dict().items():
            assert torch.equal(built[key], tensor)
    made = processor(text="<image> say", images=tiny.picture("red"), return_tensors="pt")
    assert (made["input_ids"] == student.config.image_token_id).sum() == tokens
    with torch.no_grad():
        assert student(**made).logits.isfinite().all()


def test_a_tower_is_also_taken_out_of_a_vision_language_model(parts, checkpoint, tmp_path):
    folder, _ = parts
    settings = StudentParts(
        vision_tower=str(checkpoint), language_model=str(folder / "words"), vision_feature_layer=-1
    )
    build_student(settings, tmp_path / "student")
    built = load_file(tmp_path / "student" / "model.safetensors")
    source = load_file(checkpoint / "model.safetensors")
    eyes = [name for name in source if "vision_tower" in name]
    assert eyes
    assert all(torch.equal(built[name], source[name]) for name in eyes)


def test_a_part_that_is_not_there_is_named(parts, tmp_path):
    folder, _ = parts
    settings = StudentParts(vision_tower=str(tmp_path), language_model=str(folder / "words"))
    with pytest.raises(UsageError, match="could not be loaded as a vision tower"):
        build_student(settings, tmp_path / "student")


def test_a_student_of_parts_keeps_their_float_types(parts, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, _ = parts
    AutoModelForCausalLM.from_pretrained(folder / "words").bfloat16().save_pretrained(
        tmp_path / "half"
    )
    tiny.processor().tokenizer.save_pretrained(tmp_path / "half")
    settings = StudentParts(
        vision_tower=str(folder / "eyes"), language_model=str(tmp_path / "half")
    )
    build_student(settings, tmp_path / "student")
    tensors = load_file(tmp_path / "student" / "model.safetensors")
    types = {name: tensor.dtype for name, tensor in tensors.items()}
    assert {t for n, t in types.items() if "vision_tower" in n} == {torch.float32}
    assert {t for n, t in types.items() if "vision_tower" not in n} == {torch.bfloat16}
