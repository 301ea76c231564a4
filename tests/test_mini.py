"""The tiny teacher and student: plain transformers checkpoints that share eyes and words."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kd_bench.distill import mini  # noqa: E402
from kd_bench.distill.mini import build  # noqa: E402
from kd_bench.world import BENCHMARKS, oracle_answer, prompt  # noqa: E402
from kd_bench.world.embedded import resolve  # noqa: E402
from kd_bench.world.testsets import rows  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mini")
    for name in ("teacher", "student"):
        build(name, root / name, seed=1)
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


def test_both_start_from_the_shipped_tower(folders: dict[str, Path]) -> None:
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    shipped = load(resolve("embedded:weights/vision")).model.vision_tower.state_dict()
    for folder in folders.values():
        own = load(folder).model.vision_tower.state_dict()
        assert all(torch.equal(own[name], weight) for name, weight in shipped.items())


def test_some_heads_begin_by_looking_back() -> None:
    processor = mini.build_processor()
    for size in mini.SIZES.values():
        decoder = mini.build_model(size, processor, seed=0).model.language_model
        decoder.set_attn_implementation("eager")
        ids = torch.arange(50, 90).unsqueeze(0)
        attentions = decoder(input_ids=ids, output_attentions=True).attentions
        for layer, head, distance in mini.BACKWARD_HEADS:
            looked = attentions[layer][0, head, distance:]  # [queries, keys]
            assert (looked.argmax(-1) == torch.arange(len(looked))).float().mean() > 0.9


def test_the_same_seed_gives_the_same_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    build("student", tmp_path, seed=1)
    first = (folders["student"] / "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_prompts_of_the_world_are_short_and_answers_few_tokens(processor: Any) -> None:
    tokenizer = processor.tokenizer
    for benchmark in BENCHMARKS:
        for row in rows(benchmark, "validation")[:40]:
            ids = tokenizer(prompt(benchmark, row)).input_ids
            assert len(ids) < 60
            assert len(tokenizer(f" {oracle_answer(benchmark, row)}").input_ids) <= 2


@pytest.mark.parametrize("text", ["zebra naïve 😀 你好", "A. 42\n\n<b>", " red  circle", "\t tabs"])
def test_any_text_survives(processor: Any, text: str) -> None:
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert processor.tokenizer.decode(ids) == text


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
    assert (made["input_ids"] == processor.image_token_id).sum() == 2 * 4
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
