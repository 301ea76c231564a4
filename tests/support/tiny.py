"""Tiny real models, pictures and conversations for the tests of training."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLOURS = ("red", "green", "blue", "yellow")
WORDS = [*COLOURS, "what", "colour", "is", "it", "?", "say", "a", "square", "two", "hello"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{{ ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


SPECIAL = ("<pad>", "</s>", "<image>", "<unk>", "user", "assistant", "system", ":")


def processor(
    side: int = 16, patch: int = 8, words: Iterable[str] = WORDS, **of_tokenizer: Any
) -> Any:
    """A word-level tokenizer, 16 x 16 pictures in patches of 8 (4 image tokens)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessor

    vocabulary = {name: index for index, name in enumerate((*SPECIAL, *words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        **of_tokenizer,
    )
    return LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def model(
    width: int = 32,
    vision_width: int = 16,
    layers: int = 1,
    seed: int = 0,
    rows: int | None = None,
    side: int = 16,
) -> Any:
    """An untrained LLaVA with SigLIP eyes and a Qwen2 language model."""
    import torch
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer = processor().tokenizer
    vision = SiglipVisionConfig(
        hidden_size=vision_width,
        intermediate_size=2 * vision_width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=8,
        vision_use_head=False,
        initializer_range=0.1,
    )
    text = Qwen2Config(
        vocab_size=rows or len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(side // 8) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).eval()


def save(folder: Path, **size: Any) -> Path:
    """A checkpoint of `model(**size)` with its processor."""
    model(**size).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def write_data(folder: Path, count: int = 24, text_only_every: int = 4) -> Path:
    """LLaVA JSON about plain coloured squares, some of it without a picture."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        colour = COLOURS[index % 4]
        if text_only_every and index % text_only_every == text_only_every - 1:
            turns = [("human", f"say {colour}"), ("gpt", f"{colour} {colour}")]
            rows.append({"id": f"text{index}", "conversations": _turns(turns)})
            continue
        Image.new("RGB", (16, 16), colour).save(folder / f"{index}.png")
        turns = [
            ("human", "<image>\nwhat colour is it ?"),
            ("gpt", colour),
            ("human", "say it"),
            ("gpt", f"{colour} square"),
        ]
        row = {"id": f"image{index}", "image": f"{index}.png", "conversations": _turns(turns)}
        rows.append(row)
    path = folder / "conversations.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def _turns(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": text} for speaker, text in turns]


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Teacher, student, data and a recipe of twelve steps in a folder."""
    from kd_bench.config import dump_yaml

    save(folder / "teacher", width=48, layers=2, seed=1)
    save(folder / "student", width=32, seed=2)
    stage = {
        "method": "switch-kd",
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "log_every": 4,
        "save_every": 4,
    }
    recipe = {
        "name": "tiny",
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": {"path": str(write_data(folder / "data"))},
        "output": str(folder / "out"),
        "stages": [stage],
    }
    recipe.update(changes)
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(recipe), encoding="utf-8")
    return path


def picture(colour: str, side: int = 16) -> Any:
    """A plain square."""
    from PIL import Image

    return Image.new("RGB", (side, side), colour)
