"""A stored answer is what plain transformers gives: own processor, own template, `generate`."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kd_bench.distill.models import load_model, load_processor
from kd_bench.evals.benchmark import Question, Settings
from kd_bench.evals.decoding import end_ids
from kd_bench.evals.engine import Engine
from kd_bench.evals.models import KdBench
from tests.support.chat_templates import SPECIAL
from tests.support.public_families import MODELS, save

NEW_TOKENS = 8
WORDS = ["What is shown here?", "Answer the questions. How many boats?", "Yes or no, a blue one?"]


def images(number: int, count: int) -> list[Image.Image]:
    found = []
    for place in range(count):
        image = Image.new("RGB", (70 - 12 * place, 40 + 9 * number), ("red", "blue")[place])
        image.paste("white", (0, 0, 9 + 5 * number, 12 + 3 * place))
        found.append(image)
    return found


def plain_answers(folder: Path, asked: list[tuple[str, int]]) -> list[str]:
    """What transformers alone gives, one question at a time."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    ends = end_ids(model, processor.tokenizer, ())
    answers = []
    for number, (text, count) in enumerate(asked):
        pictures = images(number, count)
        if getattr(processor, "chat_template", None):
            content = [{"type": "image", "image": image} for image in pictures]
            message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
            inputs = processor.apply_chat_template(
                [message],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:  # PaliGemma: images, then the text
            prompt = "<image>" * count + text
            inputs = processor(text=prompt, images=[pictures], return_tensors="pt")
        with torch.no_grad():
            output = model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                eos_token_id=ends,
            )
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def stored_answers(folder: Path, asked: list[tuple[str, int]], batch_size: int) -> list[str]:
    """What `eval` stores."""
    return answers_of(
        KdBench(pretrained=str(folder), batch_size=batch_size, device="cpu").engine, asked
    )


def answers_of(engine: Engine, asked: list[tuple[str, int]]) -> list[str]:
    questions = [
        Question(number, text, partial(images, number, count), Settings(NEW_TOKENS))
        for number, (text, count) in enumerate(asked)
    ]
    answers = {answer.index: answer for batch in engine.answers(questions) for answer in batch}
    assert [answers[number].error for number in range(len(asked))] == [""] * len(asked)
    return [answers[number].text for number in range(len(asked))]


def merged(base: Path, folder: Path) -> Path:
    """The checkpoint with a random adapter merged into its language model, saved by peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoProcessor

    model: Any = load_model(base)
    torch.manual_seed(3)
    names = r".*(language_model|text_model).*\.(q_proj|v_proj|down_proj)"
    wrapped = get_peft_model(model, LoraConfig(target_modules=names, init_lora_weights=False))
    wrapped.merge_and_unload().save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


def constrain(folder: Path) -> None:
    """A penalty; words instead of special tokens and spaces, and at least one of them."""
    words = load_processor(folder).tokenizer
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    ends = {words.eos_token_id, settings["eos_token_id"]}
    unseen = set(words.convert_tokens_to_ids(list(SPECIAL)))
    unseen |= {number for number in range(len(words)) if not words.decode([number]).strip()}
    settings |= {
        "repetition_penalty": 1.3,
        "suppress_tokens": sorted(unseen - ends),
        "begin_suppress_tokens": sorted(ends),
    }
    file.write_text(json.dumps(settings))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_stored_answer_is_what_generate_gives(family: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", family)
    constrain(base)
    asked = [(words, count) for count in (1, 2) for words in WORDS]
    seen = []
    for folder in (base, merged(base, tmp_path / "merged")):
        expected = plain_answers(folder, asked)
        assert stored_answers(folder, asked, 4) == expected
        assert any(expected)
        seen.append(expected)
    assert seen[0] != seen[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(MODELS))
def test_every_family_answers_when_it_is_quantized(family: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = save(tmp_path / "base", family)
    for kind in ("nf4", "int8"):
        model = KdBench(pretrained=str(base), device="cpu", quantize=kind)
        model.check(family)
        inner = model.engine.model
        inner.save_pretrained(tmp_path / kind)
        load_processor(base).save_pretrained(tmp_path / kind)
        rounded = [
            name for name, weight in inner.named_parameters() if not weight.is_floating_point()
        ]
        assert len(rounded) > 10
        again = KdBench(pretrained=str(tmp_path / kind), device="cpu")
        asked = [(WORDS[0], 1), (WORDS[1], 2)]
        assert answers_of(model.engine, asked) == answers_of(again.engine, asked)
