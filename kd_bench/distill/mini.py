"""Tiny teacher and student for the embedded world, of transformers' own classes.

Both are a `LlavaForConditionalGeneration` with SigLIP vision and a Qwen2 language model, saved with
`save_pretrained` beside a `LlavaProcessor`: nothing of kd-bench is needed to load them again. They
share the tokenizer, the vision width and the number of image tokens, as the visual switch demands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kd_bench.world import words
from kd_bench.world.prompts import FIXED_LINES
from kd_bench.world.training import conversations

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

IMAGE_SIDE = 32
PATCH = 16  # 2 x 2 image tokens
CORPUS = {"mixture": 4000, "captions": 500, "glances": 500, "lists": 500, "drills": 500}
SPECIAL = ("<pad>", "</s>", "<image>")
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


TEACHER = Size(vision_layers=2, width=128, layers=3, heads=4)
STUDENT = Size(vision_layers=2, width=96, layers=2, heads=2)


def corpus(seed: int = 0) -> list[str]:
    """Return the text that the tokenizer's words are taken from."""
    texts: list[str] = []
    for kind, count in (
        ("mixture", 4000),
        ("captions", 500),
        ("glances", 500),
        ("lists", 500),
        ("drills", 500),
    ):
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


def build_tokenizer(texts: Iterable[str], least: int = 2) -> Tokenizer:
    """Build a byte-level BPE tokenizer: words met `least` times are whole, the rest is bytes.

    Whole words are looked up before merging (`ignore_merges`, as Llama 3 does), so no merge and no
    half word takes a place in the vocabulary.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_splitter()), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in split.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = sorted(word for word, n in counts.items() if n >= least and len(word) > 1)
    names = [*SPECIAL, *ROLES, *alphabet, *known]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<pad>"), AddedToken("</s>")])
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
        tokenizer_object=tokenizer or build_tokenizer(corpus()),
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
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _save(folder: Path, size: Size, seed: int) -> None:
    processor = build_processor()
    build_model(size, processor, seed).save_pretrained(folder)
    processor.save_pretrained(folder)


def build_teacher(folder: Path, seed: int = 0) -> None:
    """Save an untrained teacher and its processor to a folder."""
    _save(folder, TEACHER, seed)


def build_student(folder: Path, seed: int = 0) -> None:
    """Save an untrained student and its processor to a folder."""
    _save(folder, STUDENT, seed)


__all__: Sequence[str] = ("STUDENT", "TEACHER", "Size", "build_model", "build_processor",
                          "build_student", "build_teacher", "build_tokenizer")  # fmt: skip
