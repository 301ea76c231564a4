"""Tiny teacher and student for the embedded world, of transformers' own classes.

Both are a `LlavaForConditionalGeneration` with SigLIP vision and a Qwen2 language model, saved with
`save_pretrained` beside a `LlavaProcessor`: nothing of kd-bench is needed to load them again. They
share the tokenizer, the vision width and the number of image tokens, as the visual switch demands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_bench.world import words
from kd_bench.world.prompts import FIXED_LINES
from kd_bench.world.training import conversations

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

IMAGE_SIDE = 32
PATCH = 16  # 2 x 2 image tokens
CORPUS = {"mixture": 4000, "captions": 500, "glances": 500, "letters": 500, "drills": 500}
ROLES = ("USER:", "ASSISTANT:")

# One line of text a turn; images where they are placed; a generation prompt ends with "ASSISTANT:".
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ':' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ ' ' + part['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' }}"
    "{% endgeneration %}"
    "{% else %}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{{ ' ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ ' ' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Widths and depths of a tiny model."""

    vision_layers: int
    width: int  # of the language model
    layers: int
    heads: int
    vision_width: int = 64  # the same for teacher and student
    initializer_range: float = 0.1  # 0.02 does not learn to bind shapes to colours


SIZES = {
    "teacher": Size(vision_layers=2, width=128, layers=4, heads=4),
    "student": Size(vision_layers=2, width=96, layers=4, heads=3),
    "vision": Size(vision_layers=2, width=96, layers=3, heads=3),
}
# Heads that begin by looking back a fixed distance: layer, head, tokens.
BACKWARD_HEADS = ((0, 0, 1), (0, 1, 2), (1, 0, 1))
BACKWARD_SHARPNESS = 30.0  # logit of the preferred distance


def corpus(seed: int = 0) -> list[str]:
    """Return the text that the tokenizer is trained on."""
    texts: list[str] = []
    for kind, count in CORPUS.items():
        for _, turns in conversations("tokenizer", kind, count, seed):
            for said, answer in turns:
                texts += [said.replace("<image>", "").strip(), f" {answer}"]
    return texts


def _splitter() -> str:
    """Return the pattern of a word: whole fixed lines, option marks, words, digits, Chinese."""
    import re

    lines = [r"\s*" + re.escape(line.strip()) for line in FIXED_LINES]
    chinese = sorted([*words.CHINESE.values(), *words.CHINESE_PARTICLES], key=len, reverse=True)
    parts = [
        *lines,
        r"\n[A-E]\.",
        r" ?(?:top|bottom) (?:left|right)",
        rf" ?(?:{'|'.join(chinese)})",
        r" ?[A-Za-z]+",
        r" ?[0-9]",
        r"\n",
        r" ?[^\sA-Za-z0-9]",
        r"\s+",
    ]
    return "|".join(parts)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer: what was met twice becomes whole, the rest is bytes."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_splitter()), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<pad>", "</s>", "<image>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # White space around these belongs to them: "<image>\nWhat" and "<image> What" are the same.
    tokenizer.add_special_tokens([AddedToken("<image>", lstrip=True, rstrip=True)])
    # An answer keeps its space, so that its word is the token of the prompt's word.
    user, assistant = (AddedToken(role, lstrip=True, rstrip=role == "USER:") for role in ROLES)
    tokenizer.add_tokens([user, assistant])
    return tokenizer


def build_processor(tokenizer: Tokenizer | None = None) -> LlavaProcessor:
    """Build the processor of both models; no tokenizer given: the world's own."""
    from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessor

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer or train_tokenizer(corpus()),
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=512,
        extra_special_tokens={"image_token": "<image>"},
    )
    pictures = SiglipImageProcessor(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(size: Size, processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """Build a randomly initialised model of a size for a processor's vocabulary."""
    import torch
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer = processor.tokenizer
    vision = SiglipVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=2 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        vision_use_head=False,
        initializer_range=size.initializer_range,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        initializer_range=size.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(IMAGE_SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
        initializer_range=size.initializer_range,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    for layer, head, distance in BACKWARD_HEADS:
        _look_back(model.model.language_model, layer, head, distance)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _look_back(language_model: Any, layer: int, head: int, distance: int) -> None:
    """Let a head begin by attending to the token `distance` back, by its biases alone.

    Rotary embedding turns equal biases of query and key into a preference for distance 0; turning
    the query's bias moves it. An option's letter stands before the option: without such heads its
    letter is learnt in thousands of steps, with them in hundreds (world/TUNING.md).
    """
    import torch

    frequencies = language_model.rotary_emb.inv_freq  # [half a head]
    half = len(frequencies)
    size = (BACKWARD_SHARPNESS * (2 * half) ** 0.5 / half) ** 0.5
    attention = language_model.layers[layer].self_attn
    own = slice(head * 2 * half, (head + 1) * 2 * half)
    turned = distance * frequencies
    with torch.no_grad():
        attention.k_proj.bias[own] = size * torch.cat([torch.ones(half), torch.zeros(half)])
        attention.q_proj.bias[own] = size * torch.cat([turned.cos(), -turned.sin()])
        attention.k_proj.weight[own] *= 0.1
        attention.q_proj.weight[own] *= 0.1


def build(name: str, folder: Path, seed: int = 0) -> None:
    """Save an untrained model and its processor: `teacher`, `student` or `vision`.

    Teacher and student get the shipped vision tower, as real ones share a SigLIP; `vision` is the
    model that the tower is trained in. The language models and projectors are fresh.
    """
    processor = build_processor()
    model = build_model(SIZES[name], processor, seed)
    if name != "vision":
        model.model.vision_tower.load_state_dict(_shipped_tower())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _shipped_tower() -> dict[str, Any]:
    from kd_bench.distill.models import load_model
    from kd_bench.world.embedded import resolve

    tower: dict[str, Any] = load_model(
        resolve("embedded:weights/vision")
    ).model.vision_tower.state_dict()
    return tower


__all__: Sequence[str] = (
    "SIZES",
    "Size",
    "build",
    "build_model",
    "build_processor",
    "train_tokenizer",
)
