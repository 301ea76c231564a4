"""Tiny untrained checkpoints of every family, with the processors of `chat_templates`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.support.chat_templates import PUBLIC

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _text(kind: type, words: Any, width: int, **more: Any) -> Any:
    return kind(
        hidden_size=width,
        intermediate_size=2 * width,
        vocab_size=len(words),
        max_position_embeddings=512,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        tie_word_embeddings=False,
        **{**LAYERS, **more},
    )


def _siglip(side: int = 28, patch: int = 14, **more: Any) -> Any:
    return hf.SiglipVisionConfig(**VISION, image_size=side, patch_size=patch, **more)


def _clip() -> Any:
    return hf.CLIPVisionConfig(**VISION, image_size=28, patch_size=14)


PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def llava(words: Any, width: int) -> Any:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=_clip(),
            text_config=_text(hf.LlamaConfig, words, width),
            image_token_id=words.convert_tokens_to_ids("<image>"),
        )
    )


def llava_next(words: Any, width: int) -> Any:
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            vision_config=_clip(),
            text_config=_text(hf.LlamaConfig, words, width),
            image_token_id=words.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=PINPOINTS,
        )
    )


def llava_onevision(words: Any, width: int) -> Any:
    return hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            vision_config=_siglip(),
            text_config=_text(hf.Qwen2Config, words, width),
            image_token_id=words.convert_tokens_to_ids("<image>"),
            video_token_id=words.convert_tokens_to_ids("<video>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_grid_pinpoints=PINPOINTS,
        )
    )


def _qwen(name: str, words: Any, width: int, vision: dict[str, Any], text: dict[str, Any]) -> Any:
    config = getattr(hf, f"{name}Config")(
        vision_config={"depth": 2, "num_heads": 2, **vision},
        text_config={
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "vocab_size": len(words),
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [2, 2, 4],
            },
            **LAYERS,
            **text,
        },
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


def qwen2(words: Any, width: int) -> Any:
    return _qwen("Qwen2VL", words, width, {"embed_dim": 32, "hidden_size": width}, {})


def qwen25(words: Any, width: int) -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": width}
    return _qwen("Qwen2_5_VL", words, width, vision | {"fullatt_block_indexes": [1]}, {})


def qwen3(words: Any, width: int) -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": width,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return _qwen("Qwen3VL", words, width, vision, {"head_dim": 16})


def _idefics(name: str) -> Callable[[Any, int], Any]:
    def make(words: Any, width: int) -> Any:
        vision = {**VISION, "image_size": 32, "patch_size": 8}
        config = getattr(hf, f"{name}Config")(
            vision_config=vision,
            text_config=_text(hf.LlamaConfig, words, width).to_dict(),
            image_token_id=words.convert_tokens_to_ids("<image>"),
            scale_factor=2,
            pad_token_id=words.pad_token_id,
            tie_word_embeddings=False,
        )
        return getattr(hf, f"{name}ForConditionalGeneration")(config)

    return make


def internvl(words: Any, width: int) -> Any:
    vision = {**VISION, "image_size": [28, 28], "patch_size": [7, 7]}
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(**vision),
            text_config=_text(hf.Qwen2Config, words, width),
            image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=4,
        )
    )


def gemma3(words: Any, width: int) -> Any:
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            vision_config=_siglip(vision_use_head=False),
            text_config=_text(hf.Gemma3TextConfig, words, width, head_dim=16),
            image_token_id=words.convert_tokens_to_ids("<image_soft_token>"),
            boi_token_id=words.convert_tokens_to_ids("<start_of_image>"),
            eoi_token_id=words.convert_tokens_to_ids("<end_of_image>"),
            mm_tokens_per_image=4,
        )
    )


def paligemma(words: Any, width: int, text: type = hf.GemmaConfig) -> Any:
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            vision_config=_siglip(),
            text_config=_text(text, words, width, head_dim=16),
            image_token_id=words.convert_tokens_to_ids("<image>"),
            projection_dim=width,
        )
    )


def paligemma2(words: Any, width: int) -> Any:
    return paligemma(words, width, hf.Gemma2Config)


MODELS: dict[str, tuple[str, Callable[[Any, int], Any]]] = {
    "llava": ("llava-1.5", llava),
    "llava-next": ("llava-next vicuna", llava_next),
    "llava-onevision": ("llava-onevision", llava_onevision),
    "qwen2-vl": ("qwen2-vl", qwen2),
    "qwen2.5-vl": ("qwen2.5-vl", qwen25),
    "qwen3-vl": ("qwen3-vl", qwen3),
    "smolvlm": ("smolvlm", _idefics("SmolVLM")),
    "idefics3": ("idefics3", _idefics("Idefics3")),
    "internvl": ("internvl", internvl),
    "paligemma": ("paligemma", paligemma),
    "paligemma2": ("paligemma", paligemma2),
    "gemma3": ("gemma3", gemma3),
}
"""Name of the public form in `chat_templates.PUBLIC` and maker of a model, by family."""


def save(
    folder: Path, family: str, width: int = 64, seed: int = 0, words: str = "pre-tokenizer"
) -> Path:
    """A checkpoint as the family's repositories ship it: model, processor, chat template.

    Args:
        words: the kind of tokenizer.
    """
    public, make = MODELS[family]
    processor = PUBLIC[public].processor(words)
    torch.manual_seed(seed)
    model = make(processor.tokenizer, width)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)  # so that images are told apart from the start
    stop = processor.tokenizer.convert_tokens_to_ids(PUBLIC[public].stop)
    model.generation_config.eos_token_id = stop
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
