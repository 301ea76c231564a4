"""One function loads a model and says what did not load: damaged, foreign, adapted, quantized."""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_bench.distill.build import build_student
from kd_bench.distill.checkpoints import locate, stored_dtype, weights_digest
from kd_bench.distill.models import load_model, load_processor, parameter_counts
from kd_bench.distill.recipe import StudentParts
from kd_bench.errors import ExitCode, KdBenchError, MissingExtraError, UsageError
from tests.support import tiny
from tests.support.tiny_families import FAMILIES, make

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("checkpoints") / "student", layers=2)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def with_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def set_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_model(folder, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 900
    return line


# --- what did not load -------------------------------------------------------------------------


def test_a_checkpoint_without_its_projector_is_refused_and_a_new_one_is_asked_for(
    copy: Path,
) -> None:
    with_tensors(copy, lambda t: {k: v for k, v in t.items() if "projector" not in k})
    line = refusal(copy)
    assert "4 tensors are missing (model.multi_modal_projector.linear_1.bias, " in line
    assert "new_projector=true" in line
    first, again, other = (load_model(copy, projector_seed=seed) for seed in (1, 1, 2))
    names = [name for name in first.state_dict() if "projector" in name and "weight" in name]
    for name in names:
        assert torch.equal(first.state_dict()[name], again.state_dict()[name])
        assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    whole = load_file(copy / "model.safetensors")
    assert torch.equal(
        first.model.language_model.norm.weight, whole["language_model.model.norm.weight"]
    )


def test_a_new_projector_replaces_none_that_is_there(checkpoint: Path, copy: Path) -> None:
    assert "has a projector" in refusal(checkpoint, projector_seed=0)
    with_tensors(copy, lambda t: {k: v for k, v in t.items() if "linear_1.weight" not in k})
    assert "1 tensor is missing" in refusal(copy, projector_seed=0)


def test_five_names_and_the_wrapper_of_prefixed_weights(copy: Path) -> None:
    with_tensors(copy, lambda t: {f"module.{k}": v for k, v in t.items()})
    line = refusal(copy)
    assert "All its names begin with 'module'" in line
    shown = line.partition("not known to its class (")[2].partition(")")[0]
    assert len([name for name in shown.split(", ") if name != "..."]) == 5


def test_a_head_that_is_neither_there_nor_tied(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = False
    set_config(copy, **config | {"tie_word_embeddings": False})
    line = refusal(copy)
    assert "1 tensor is missing (lm_head.weight)" in line
    assert "tie_word_embeddings" in line


def test_surplus_reshaped_and_broken_weights_are_named(copy: Path) -> None:
    name = "multi_modal_projector.linear_1.weight"
    saved = load_file(copy / "model.safetensors")
    with_tensors(copy, lambda t: {**t, "resampler.weight": torch.zeros(3)})
    assert "1 tensor is not known to its class (resampler.weight)" in refusal(copy)
    with_tensors(copy, lambda _: {**saved, name: torch.zeros(3, 3)})
    assert f"1 tensor is of another shape (model.{name})" in refusal(copy)
    for value in (float("nan"), float("inf")):
        broken = saved[name].clone()
        broken[0, 0] = value
        with_tensors(copy, lambda _, broken=broken: {**saved, name: broken})  # type: ignore[misc]
        assert f"NaN or infinite values in 1 of its tensors: model.{name}" in refusal(copy)
    with_tensors(copy, lambda _: {**saved, name: (saved[name] * 50).to(torch.int8)})
    assert f"{name} (I8)" in refusal(copy)


def test_shards_must_be_whole(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    load_model(checkpoint).save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    load_model(folder)
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    places = json.loads(whole)
    name = next(iter(places["weight_map"]))
    del places["weight_map"][name]
    index.write_text(json.dumps(places))
    assert f"leaves out tensors: {name}" in refusal(folder)
    index.write_text("[]")
    assert "is not a JSON object" in refusal(folder)
    index.unlink()
    assert "neither model.safetensors nor" in refusal(folder)
    index.write_text(whole)
    shards[1].unlink()
    assert f"lacks 1 of its {len(shards)} shards: {shards[1].name}" in refusal(folder)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.slow
def test_every_family_loads_whole_and_misses_what_is_taken(family: str, tmp_path: Path) -> None:
    model = make(family)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    names = sorted(load_file(tmp_path / "model.safetensors"))
    taken = random.Random(family).choice([name for name in names if "embed_tokens" not in name])
    with_tensors(tmp_path, lambda t: {k: v for k, v in t.items() if k != taken})
    line = refusal(tmp_path)
    assert "is missing (" in line or "are missing (" in line


@pytest.mark.slow
def test_parts_of_a_student_must_be_whole_too(tmp_path: Path) -> None:
    from transformers import Qwen2ForCausalLM

    whole = tiny.model(seed=4)
    whole.model.vision_tower.save_pretrained(tmp_path / "tower")
    tiny.processor().image_processor.save_pretrained(tmp_path / "tower")
    Qwen2ForCausalLM(whole.config.text_config).save_pretrained(tmp_path / "words")
    tiny.processor().tokenizer.save_pretrained(tmp_path / "words")
    with_tensors(tmp_path / "tower", lambda t: dict(list(t.items())[1:]))
    parts = StudentParts(
        vision_tower=str(tmp_path / "tower"),
        language_model=str(tmp_path / "words"),
        vision_feature_layer=-1,
    )
    with pytest.raises(UsageError, match="1 tensor is missing"):
        build_student(parts, tmp_path / "student")


# --- where it lies -----------------------------------------------------------------------------


def in_hub_cache(folder: Path, cache: Path, name: str) -> None:
    """Lay a checkpoint as the hub's client keeps downloads."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("a" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)


def test_a_hub_name_is_read_from_the_local_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    in_hub_cache(checkpoint, tmp_path, "some-org/small")
    folder = locate("some-org/small")
    assert weights_digest(folder) == weights_digest(checkpoint)
    assert load_processor("some-org/small").image_token == "<image>"
    load_model("some-org/small")
    with pytest.raises(UsageError, match=r"no folder some-org/other.*HF_HUB_OFFLINE is set"):
        locate("some-org/other")
    with pytest.raises(UsageError, match="There is no checkpoint at"):
        locate("three/deep/folders")


# --- adapters ----------------------------------------------------------------------------------


def adapted(base: Path, folder: Path, rank: int = 2) -> Any:
    """Save an adapter of random values on a base; the model that it makes."""
    from peft import LoraConfig, get_peft_model

    model = load_model(base)
    torch.manual_seed(5)
    names = r".*language_model.*\.(q_proj|down_proj)"
    wrapped = get_peft_model(
        model, LoraConfig(r=rank, target_modules=names, init_lora_weights=False)
    )
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload()


def test_an_adapter_folder_is_read_with_its_base(checkpoint: Path, tmp_path: Path) -> None:
    merged = adapted(checkpoint, tmp_path / "adapter")
    found = load_model(tmp_path / "adapter")
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor)
    assert not torch.equal(
        found.state_dict()["model.language_model.layers.0.self_attn.q_proj.weight"],
        load_model(checkpoint).state_dict()[
            "model.language_model.layers.0.self_attn.q_proj.weight"
        ],
    )
    assert load_processor(tmp_path / "adapter").chat_template == tiny.TEMPLATE
    assert weights_digest(tmp_path / "adapter") != weights_digest(checkpoint)


def test_an_adapter_that_cannot_be_read_says_how_to_merge(
    checkpoint: Path, copy: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    adapted(checkpoint, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())

    def based_on(base: Any) -> str:
        changed = settings | {"base_model_name_or_path": base}
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        return refusal(folder)

    assert "merge_and_unload" in based_on(str(tmp_path / "gone"))
    assert "merge_and_unload" in based_on(None)
    assert "merge_and_unload" in based_on("some-org/gone")
    other = tiny.save(tmp_path / "other", width=48)
    assert "could not be read as an adapter" in based_on(str(other))
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")
    assert "is no adapter of its base: 1 tensor is missing" in refusal(folder)
    shutil.copy(copy / "model.safetensors", folder)
    assert "both a whole checkpoint and an adapter" in refusal(folder)


# --- quantized ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_checkpoint_loads_and_counts_its_weights(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    plain, rounded = load_model(checkpoint), load_model(checkpoint, quantize=kind)
    rounded.save_pretrained(tmp_path / kind)
    tiny.processor().save_pretrained(tmp_path / kind)
    again = load_model(tmp_path / kind)
    assert parameter_counts(again)["total"] == parameter_counts(plain)["total"]
    processor = tiny.processor()
    inputs = processor(
        text="user : <image> what colour ?", images=tiny.picture("red"), return_tensors="pt"
    )
    with torch.no_grad():
        expected, first, second = (m(**inputs).logits for m in (plain, rounded, again))
    torch.testing.assert_close(first, second)
    assert 0 < (first - expected).abs().mean() < 0.3
    assert "is quantized already" in refusal(tmp_path / kind, quantize="int8")


def test_without_bitsandbytes_the_line_says_what_to_install(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r'pip install "kd-bench\[quantize\]"'):
        load_model(checkpoint, quantize="nf4")
    with pytest.raises(UsageError, match="no quantization 'fp3'"):
        load_model(checkpoint, quantize="fp3")


def test_the_stored_type_is_the_configs_else_the_weights_own(copy: Path) -> None:
    assert stored_dtype(copy) == "float32"
    with_tensors(copy, lambda t: {k: v.to(torch.bfloat16) for k, v in t.items()})
    set_config(copy, dtype=None)
    assert stored_dtype(copy) == "bfloat16"
    set_config(copy, torch_dtype="float16")
    assert stored_dtype(copy) == "float16"


# --- as student and teacher ---------------------------------------------------------------------


@pytest.fixture
def rows(checkpoint: Path, tmp_path: Path) -> Path:
    """Conversations; beside them the checkpoint that is trained with the one under test."""
    data = tiny.write_data(tmp_path / "data", 8)
    shutil.copytree(checkpoint, tmp_path / "data" / "whole")
    return data


@pytest.mark.slow
def test_an_adapter_is_a_student_and_a_teacher(
    checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    adapted(checkpoint, tmp_path / "adapter")
    load_as_train(tmp_path / "adapter", rows, tmp_path / "student-out", "student")
    load_as_train(tmp_path / "adapter", rows, tmp_path / "teacher-out", "teacher")
    start = load_model(tmp_path / "adapter").state_dict()
    final = load_model(tmp_path / "student-out" / "final").state_dict()
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert (final[name] - start[name]).abs().max() < 1e-3, "one small step away"


@pytest.mark.slow
def test_a_quantized_teacher_teaches_and_a_quantized_student_is_refused(
    checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    load_model(checkpoint, quantize="nf4").save_pretrained(tmp_path / "nf4")
    tiny.processor().save_pretrained(tmp_path / "nf4")
    load_as_train(tmp_path / "nf4", rows, tmp_path / "out", "teacher")
    with pytest.raises(UsageError, match="is quantized, and its weights cannot learn"):
        load_as_train(tmp_path / "nf4", rows, tmp_path / "refused", "student")


@pytest.mark.slow
def test_a_recipe_asks_for_a_new_projector(copy: Path, rows: Path, tmp_path: Path) -> None:
    with_tensors(copy, lambda t: {k: v for k, v in t.items() if "projector" not in k})
    with pytest.raises(UsageError, match="new_projector=true"):
        load_as_train(copy, rows, tmp_path / "refused", "student")
    load_as_train(copy, rows, tmp_path / "out", "student", new_projector=True)
    load_model(tmp_path / "out" / "final")


# --- mutated at random -------------------------------------------------------------------------


def _paths(value: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of nested objects."""
    if not isinstance(value, dict):
        return []
    return [path for key in value for path in ((*at, key), *_paths(value[key], (*at, key)))]


def _change_json(file: Path, dice: random.Random) -> str:
    """Drop a key, or give it a value of another kind or size."""
    content = json.loads(file.read_text())
    path = dice.choice(_paths(content))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    old = inner[path[-1]]
    choices: list[Any] = [None, "", "strange", -1, 0, 3, [], {}, True, 1e9, [old], {"a": old}]
    if dice.random() < 0.5:
        del inner[path[-1]]
        what = "dropped"
    else:
        inner[path[-1]] = new = dice.choice(choices)
        what = f"= {new!r}"
    file.write_text(json.dumps(content))
    return f"{file.name}: {'.'.join(path)} {what}"


def _change_tensor(folder: Path, dice: random.Random) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = dice.choice(sorted(tensors))
    tensor = tensors[name]
    kind = dice.choice(["removed", "renamed", "nan", "int8", "half", "cut", "transposed", "moved"])
    if kind == "removed":
        del tensors[name]
    elif kind == "renamed":
        tensors["model." + name] = tensors.pop(name)
    elif kind == "nan":
        tensors[name] = torch.full_like(tensor, float("nan"))
    elif kind == "int8":
        tensors[name] = (tensor * 10).to(torch.int8)
    elif kind == "half":
        tensors[name] = tensor.to(torch.float16)
    elif kind == "cut":
        tensors[name] = tensor[: len(tensor) // 2].clone()
    elif kind == "transposed":
        oblong = tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1]  # else nobody could tell
        tensors[name] = tensor.T.contiguous() if oblong else tensor[None].clone()
    else:  # into a second file that no index names
        save_file({name: tensors.pop(name)}, folder / "other.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return f"{name} {kind}"


def _change_file(folder: Path, dice: random.Random) -> str:
    file = dice.choice(sorted(folder.iterdir()))
    content = file.read_bytes()
    kind = dice.choice(["gone", "empty", "cut", "flipped", "garbage"])
    if kind == "gone":
        file.unlink()
    elif kind == "flipped":
        place = dice.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
    else:
        cut = {"empty": b"", "cut": content[: dice.randrange(len(content))], "garbage": b"\xff\x00"}
        file.write_bytes(cut[kind])
    return f"{file.name} {kind}"


def _change_template(folder: Path, dice: random.Random) -> str:
    file = folder / "chat_template.jinja"
    text = file.read_text()
    first, last = sorted(dice.sample(range(len(text)), 2))
    file.write_text(text[:first] + text[last:])
    return f"template without {first}:{last}"


def _change_shards(folder: Path, dice: random.Random) -> str:
    load_model(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    index = folder / "model.safetensors.index.json"
    kind = dice.choice(["missing", "no index", "swapped", "entry", "whole"])
    if kind == "missing":
        dice.choice(shards).unlink()
    elif kind == "no index":
        index.unlink()
    elif kind == "swapped":
        one, two = dice.sample(shards, 2)
        one.rename(folder / "x")
        two.rename(one)
        (folder / "x").rename(two)
    elif kind == "entry":
        return _change_json(index, dice)
    return f"shards {kind}"


def mutate(folder: Path, seed: int) -> str:
    """Damage a checkpoint in one of many ways; what was done."""
    dice = random.Random(seed)
    way = seed % 8
    if way < 2:
        return _change_json(folder / "config.json", dice)
    if way < 4:
        return _change_tensor(folder, dice)
    if way == 4:
        return _change_file(folder, dice)
    if way == 5:
        return _change_template(folder, dice)
    if way == 6:
        return _change_shards(folder, dice)
    names = ["processor_config.json", "tokenizer_config.json", "generation_config.json"]
    return _change_json(folder / dice.choice(names), dice)


def load_as_eval(folder: Path) -> Any:
    """All that `eval` does before its first question."""
    from kd_bench.evals.checkpoint import chosen_dtype, inspect_model
    from kd_bench.evals.models import load_source
    from kd_bench.records import Protocol

    known = inspect_model(str(folder))
    protocol = Protocol("mini", dtype=chosen_dtype(folder, "auto", "cpu"))
    return load_source(known, protocol, debug=True).engine.model


def load_as_train(folder: Path, data: Path, output: Path, role: str, **settings: Any) -> None:
    from rich.console import Console

    from kd_bench.distill.recipe import Recipe
    from kd_bench.distill.train import train

    whole = str(data.parent / "whole")
    models = {"student": whole, "teacher": whole, role: str(folder)}
    stage = {"method": "kl", "steps": 1, "batch_size": 2}
    recipe = {"name": "m", "data": {"path": str(data), "limit": 4}, "stages": [stage], **models}
    recipe |= settings
    train(Recipe(**recipe, output=str(output)), console=Console(quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 152, 19))
def test_mutated_checkpoints_load_rightly_or_are_one_line(
    start: int, checkpoint: Path, tmp_path: Path
) -> None:
    data = tiny.write_data(tmp_path / "data", 8)
    shutil.copytree(checkpoint, tmp_path / "data" / "whole")
    data = Path(shutil.copy(data, tmp_path / "data" / "rows.json"))
    expected = load_model(checkpoint).state_dict()
    for seed in range(start, start + 19):
        folder = Path(shutil.copytree(checkpoint, tmp_path / f"mutated{seed}"))
        what = f"{seed}: {mutate(folder, seed)}"
        problem = problem_of(what, partial(loads_rightly, folder, expected, what))
        if problem:
            assert problem.exit_code == ExitCode.USAGE, f"{what}: {problem}"
        role, output = ("student", "teacher")[seed // 8 % 2], tmp_path / f"out{seed}"
        problem = problem_of(what, partial(load_as_train, folder, data, output, role))
        if problem:
            assert problem.exit_code == ExitCode.USAGE, f"{what}: {problem}"


def problem_of(what: str, work: Callable[[], None]) -> KdBenchError | None:
    """The refusal of one line that a piece of work ends in; nothing else may be raised."""
    try:
        work()
    except KdBenchError as error:
        assert "\n" not in str(error), what  # noqa: PT017 - it may also work
        return error
    except Exception as error:
        raise AssertionError(f"{what}: ends in {error!r}") from error
    return None


def loads_rightly(folder: Path, expected: Tensors, what: str) -> None:
    found = load_as_eval(folder).state_dict()
    for name, tensor in expected.items():
        close = torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-6)
        assert close or "flipped" in what, f"{what}: {name} was loaded with other values"


# --- what fits, before a step or an answer -----------------------------------------------------


def test_a_config_of_another_size_takes_no_memory(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["text_config"]
    (copy / "config.json").write_text(json.dumps(config))
    line = refusal(copy)
    assert "6,624,202,192 weights" in line or "weights, and the files hold 30," in line
    assert "Restore text_config in config.json" in line


@pytest.mark.parametrize("layer, fits", [(-3, True), (2, True), (-4, False), (3, False)])
def test_the_projected_layer_is_one_of_the_tower(copy: Path, layer: int, fits: bool) -> None:
    set_config(copy, vision_feature_layer=layer)
    if fits:
        load_model(copy)
    else:
        assert f"vision_feature_layer is {layer}, and the vision tower has 2" in refusal(copy)


def test_another_image_token_is_refused_by_eval_and_train(
    checkpoint: Path, copy: Path, rows: Path, tmp_path: Path
) -> None:
    set_config(copy, image_token_id=5)
    message = "image_token_id is 5 in config.json"
    with pytest.raises(UsageError, match=message):
        load_as_eval(copy)
    shutil.copytree(checkpoint, rows.parent / "whole", dirs_exist_ok=True)
    for role in ("student", "teacher"):
        with pytest.raises(UsageError, match=message):
            load_as_train(copy, rows, tmp_path / role, role)


def test_an_adapters_own_tokenizer_and_template_count(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapted(checkpoint, folder)
    (folder / "chat_template.jinja").write_text("OWN")
    processor = load_processor(folder)
    assert processor.chat_template == "OWN"
    assert processor.apply_chat_template([{"role": "user", "content": "a"}]) == "OWN"
    tokenizer = load_processor(checkpoint).tokenizer
    tokenizer.chat_template = "TUNED"
    tokenizer.eos_token = "<image>"
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    processor = load_processor(folder)
    assert (processor.chat_template, processor.tokenizer.eos_token) == ("TUNED", "<image>")
    assert processor.image_processor is not None
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="adapter has no usable tokenizer"):
        load_processor(folder)


def test_a_faulty_adapter_file_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapted(checkpoint, folder)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    for kind, message in (("NOPE", "no peft_type 'NOPE'"), ("PREFIX_TUNING", "cannot be merged")):
        file.write_text(json.dumps(settings | {"peft_type": kind}))
        assert message in refusal(folder)
    file.write_text(json.dumps(settings))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert f"{weights} is damaged" in refusal(folder)


def test_a_common_prefix_of_all_names_is_named(copy: Path) -> None:
    with_tensors(copy, lambda t: {f"model.model.{k}": v for k, v in t.items()})
    assert "All its names begin with 'model'" in refusal(copy)
