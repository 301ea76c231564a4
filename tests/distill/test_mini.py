"""The tiny teacher and student: plain transformers checkpoints that share eyes and words."""

import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kd_bench.distill import build as mini  # noqa: E402
from kd_bench.distill.build import build_start  # noqa: E402
from kd_bench.world import scenes  # noqa: E402
from kd_bench.world.benchmarks import BENCHMARKS, oracle_answer, prompt  # noqa: E402
from kd_bench.world.build import rows  # noqa: E402
from kd_bench.world.training import MAKERS, conversations  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mini")
    for name in ("teacher", "student"):
        build_start(f"embedded:new/{name}", root / name, seed=1)
    return {name: root / name for name in ("teacher", "student")}


@pytest.fixture(scope="module")
def processor(folders: dict[str, Path]) -> Any:
    return transformers.AutoProcessor.from_pretrained(folders["student"])


def user(*parts: str) -> dict[str, Any]:
    content = [{"type": "image"} if p == "<image>" else {"type": "text", "text": p} for p in parts]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def test_both_are_transformers_own_classes(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
        assert model.config.text_config.model_type == "qwen2"
        assert model.config.vision_config.model_type == "siglip_vision_model"
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert not list(folder.glob("*.py"))


def test_the_pair_fits_the_visual_switch(folders: dict[str, Path]) -> None:
    configs = [transformers.AutoConfig.from_pretrained(f) for f in folders.values()]
    shared = {
        (c.vision_config.hidden_size, c.image_seq_length, c.text_config.vocab_size) for c in configs
    }
    assert len(shared) == 1
    vocabularies = [(f / "tokenizer.json").read_bytes() for f in folders.values()]
    assert vocabularies[0] == vocabularies[1]
    assert configs[0].text_config.hidden_size > configs[1].text_config.hidden_size


def test_each_starts_with_a_tower_of_its_own(folders: dict[str, Path]) -> None:
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    towers = [load(folder).model.vision_tower.state_dict() for folder in folders.values()]
    assert towers[0].keys() == towers[1].keys()
    assert all(towers[0][name].shape == towers[1][name].shape for name in towers[0])


def test_the_same_seed_gives_the_same_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    build_start("embedded:new/student", tmp_path, seed=1)
    first = (folders["student"] / "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == first


@pytest.mark.slow
def test_every_word_of_the_world_is_a_token(processor: Any) -> None:
    tokenizer = processor.tokenizer
    used = set()
    for benchmark in BENCHMARKS:
        for row in [*rows(benchmark, "validation"), *rows(benchmark, "test")]:
            ids = tokenizer(re.sub(r"<image \d>", "", prompt(benchmark, row))).input_ids
            answer = oracle_answer(benchmark, row)
            said = tokenizer(answer).input_ids
            assert len(ids) < 30
            assert len(said) <= 2
            assert tokenizer.decode(said) == answer
            used |= {*ids, *said}
    for kind in MAKERS:
        for _, turns in conversations("words", kind, 300):
            for text in (text for turn in turns for text in turn):
                used.update(tokenizer(text.replace("<image>", "")).input_ids)
    assert tokenizer.unk_token_id not in used
    never = set(tokenizer.get_vocab()) - set(tokenizer.convert_ids_to_tokens(sorted(used)))
    assert never <= {*mini.SPECIAL, *mini.ROLES, *scenes.CHINESE.values(), "E", "哪个", "数字"}


def test_an_options_mark_is_the_answers_letter(processor: Any) -> None:
    tokenizer = processor.tokenizer
    ids = tokenizer("There are several options:\nA. red\nB. green\n ASSISTANT: B").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "There are several options:", "A", "red", "B", "green", "ASSISTANT:", "B",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, ids, back",
    [
        ("red  \n circle", ["red", "circle"], "red circle"),
        ("42", ["4", "2"], "42"),
        ("top left", ["top left"], "top left"),
        ("a zebra?", ["a", "<unk>", "?"], "a <unk>?"),
        ("圆形是什么颜色", ["圆形", "是", "什么", "颜色"], "圆形 是 什么 颜色"),
    ],
)
def test_white_space_is_dropped(processor: Any, text: str, ids: list[str], back: str) -> None:
    tokenizer = processor.tokenizer
    found = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(found) == ids
    assert tokenizer.decode(found) == back


def test_offsets_are_those_of_the_text(processor: Any) -> None:
    text = "What color is the cross?\nA. red\nB. blue"
    made = processor.tokenizer(text, return_offsets_mapping=True)
    tokens = processor.tokenizer.convert_ids_to_tokens(made.input_ids)
    assert [text[start:end] for start, end in made.offset_mapping] == tokens


def test_a_word_is_one_token_wherever_it_stands(processor: Any) -> None:
    question = processor.tokenizer("What is to the left of the red circle?").input_ids
    answer = processor.tokenizer("ASSISTANT: red").input_ids[-1]
    assert answer in question


def test_template_keeps_places_of_pictures_and_turns(processor: Any) -> None:
    from PIL import Image

    talk = [user("First", "<image>", "then", "<image>", "why?"), assistant("red"), user("Where?")]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert text == (
        "USER: First<image>\nthen<image>\nwhy? ASSISTANT: red</s>USER: Where? ASSISTANT:"
    )
    picture = Image.new("RGB", (40, 50))
    made = processor(text=[text], images=[[picture, picture]], return_tensors="pt")
    assert (made["input_ids"] == processor.image_token_id).sum() == 2 * 16
    assert made["pixel_values"].shape == (2, 3, 32, 32)


def test_space_around_a_picture_does_not_matter(processor: Any) -> None:
    tokenizer = processor.tokenizer
    plain = tokenizer("USER: <image>\nWhat? ASSISTANT:").input_ids
    assert tokenizer("USER: <image> What? ASSISTANT:").input_ids == plain
    assert tokenizer("USER:<image>What? ASSISTANT:").input_ids == plain


def test_prompt_ids_are_the_beginning_of_the_whole_conversation(processor: Any) -> None:
    talk = [user("Where is the cross?"), assistant("top left")]
    asked = processor.apply_chat_template(talk[:1], add_generation_prompt=True)
    whole = processor.apply_chat_template(talk)
    ids = processor.tokenizer(asked).input_ids
    full = processor.tokenizer(whole).input_ids
    assert full[: len(ids)] == ids
    assert full[-1] == processor.tokenizer.eos_token_id


def test_it_generates_with_and_without_a_picture(folders: dict[str, Path], processor: Any) -> None:
    from PIL import Image

    model = transformers.LlavaForConditionalGeneration.from_pretrained(folders["student"])
    for parts in (("<image>", "What?"), ("What?",)):
        text = processor.apply_chat_template([user(*parts)], add_generation_prompt=True)
        images = {"images": [[Image.new("RGB", (32, 32))]]} if "<image>" in parts else {}
        made = processor(text=[text], return_tensors="pt", **images)
        with torch.no_grad():
            out = model.generate(**made, max_new_tokens=2, do_sample=False)
        assert out.shape[1] > made["input_ids"].shape[1]
