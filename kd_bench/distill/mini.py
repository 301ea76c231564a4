"""Tiny teacher and student for the embedded world, of transformers' own classes.

Both are a `LlavaForConditionalGeneration` with SigLIP vision and a Qwen2 language model, saved with
`save_pretrained` beside a `LlavaProcessor`: nothing of kd-bench is needed to load them again. They
share the tokenizer, the vision width and the number of image tokens, as the visual switch demands;
each has a vision tower of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kd_bench.world import scenes
from kd_bench.world.benchmarks import FIXED_LINES

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

IMAGE_SIDE = 32
PATCH = 8  # 4 x 4 image tokens: a cell of the world is 2 x 2 of them, a digit lies in one
SPECIAL = ("<pad>", "</s>", "<unk>", "<image>")
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

    width: int  # of the language model
    layers: int
    heads: int
    vision_layers: int = 2
    vision_width: int = 64  # the same for teacher and student
    initializer_range: float = 0.1  # 0.02 does not learn to bind shapes to colours


SIZES = {
    "teacher": Size(width=128, layers=4, heads=4),
    "student": Size(width=96, layers=3, heads=3),
}


def _lines() -> list[str]:
    return [line.strip() for line in FIXED_LINES]


def vocabulary() -> list[str]:
    """Every token in the order of its id: a fixed line or a word, wherever it stands, is one."""
    chinese = {*scenes.CHINESE.values(), *scenes.CHINESE_PARTICLES}
    known = {*_lines(), *scenes.PLACES, *scenes.ENGLISH, *chinese, *'0123456789ABCDE.,?:"'}
    return [*SPECIAL, *ROLES, *sorted(known)]


def _splitter() -> str:
    """Return the pattern of a token; what lies between two of them is dropped."""
    chinese = sorted({*scenes.CHINESE.values(), *scenes.CHINESE_PARTICLES}, key=len, reverse=True)
    parts = [
        *map(re.escape, sorted(_lines(), key=len, reverse=True)),
        r"(?:top|bottom) (?:left|right)",
        *chinese,
        r"[A-Za-z]+",
        r"[0-9]",
        r"[^\sA-Za-z0-9]",
    ]
    return "|".join(parts)


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer of whole words: white space is dropped, an unknown word is `<unk>`.

    An option's mark ("A." at the beginning of a line) and the answer "A" are the same token: models
    of this size learn to answer with letters in hundreds of steps instead of thousands.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    ids = {word: number for number, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"(?<=\n[A-E])\."), behavior="removed"),
            pre_tokenizers.Split(Regex(_splitter()), behavior="removed", invert=True),
        ]
    )
    # Words with spaces between them, punctuation without, the digits of a number joined.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=[0-9]) (?=[0-9])"), ""),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    return tokenizer


def build_processor(tokenizer: Tokenizer | None = None) -> LlavaProcessor:
    """Build the processor of both models; no tokenizer given: the world's own."""
    from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessor

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer or build_tokenizer(),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
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
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=512,
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
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def build(name: str, folder: Path, seed: int = 0) -> None:
    """Save an untrained model and its processor: `teacher` or `student`."""
    processor = build_processor()
    build_model(SIZES[name], processor, seed).save_pretrained(folder)
    processor.save_pretrained(folder)


__all__: Sequence[str] = (
    "SIZES",
    "Size",
    "build",
    "build_model",
    "build_processor",
    "build_tokenizer",
    "vocabulary",
)
