"""Tiny random models of every supported family, and batches that they read.

Each maker takes the width of the language model, so that a student and a teacher differ in it.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

VOCABULARY = 99
IMAGE = 90
VIDEO = 91
TEXT = range(5, 80)

TEXT_SETTINGS = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION_SETTINGS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def text_config(kind: type, width: int, **more: Any) -> Any:
    return kind(hidden_size=width, intermediate_size=2 * width, **TEXT_SETTINGS, **more)


def llava(width: int, tower: str = "siglip", **more: Any) -> Any:
    kind = hf.SiglipVisionConfig if tower == "siglip" else hf.CLIPVisionConfig
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=kind(**VISION_SETTINGS),
            text_config=text_config(hf.Qwen2Config, width),
            image_token_id=IMAGE,
            **more,
        )
    )


def llava_next(width: int) -> Any:
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**VISION_SETTINGS),
            text_config=text_config(hf.LlamaConfig, width),
            image_token_id=IMAGE,
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        )
    )


def llava_onevision(width: int) -> Any:
    return hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**VISION_SETTINGS),
            text_config=text_config(hf.Qwen2Config, width),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        )
    )


def internvl(width: int) -> Any:
    settings = VISION_SETTINGS | {"image_size": [16, 16], "patch_size": [4, 4]}
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(**settings),
            text_config=text_config(hf.Qwen2Config, width),
            image_token_id=IMAGE,
            image_seq_length=4,
        )
    )


def smolvlm(width: int, kind: str = "SmolVLM") -> Any:
    vision = getattr(hf, f"{kind}VisionConfig", None) or hf.Idefics3Config().vision_config.__class__
    config = getattr(hf, f"{kind}Config")(
        vision_config=vision(**VISION_SETTINGS).to_dict(),
        text_config=text_config(hf.LlamaConfig, width).to_dict(),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def paligemma(width: int, second: bool = False) -> Any:
    text: dict[str, Any] = {"head_dim": 8}
    if second:
        text |= {
            "sliding_window": 8,
            "final_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
    kind = hf.Gemma2Config if second else hf.GemmaConfig
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**VISION_SETTINGS),
            text_config=text_config(kind, width, **text),
            image_token_id=IMAGE,
            projection_dim=width,
        )
    )


def gemma3(width: int) -> Any:
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            vision_config=hf.SiglipVisionConfig(**VISION_SETTINGS, vision_use_head=False),
            text_config=text_config(
                hf.Gemma3TextConfig,
                width,
                head_dim=8,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            ),
            image_token_id=IMAGE,
            mm_tokens_per_image=4,
        )
    )


ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}


def qwen2(width: int) -> Any:
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(
            vision_config={
                "depth": 3,
                "embed_dim": 16,
                "mlp_ratio": 2,
                "num_heads": 2,
                "patch_size": 4,
                "hidden_size": width,
            },
            text_config={
                "hidden_size": width,
                "intermediate_size": 48,
                **TEXT_SETTINGS,
                "rope_parameters": ROPE
                | {"mrope_section": [width // 32, width // 32, width // 16]},
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=92,
            vision_end_token_id=93,
        )
    )


def qwen25(width: int) -> Any:
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            vision_config={
                "depth": 3,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 4,
                "window_size": 16,
                "fullatt_block_indexes": [1],
                "out_hidden_size": width,
            },
            text_config={
                "hidden_size": width,
                "intermediate_size": 48,
                **TEXT_SETTINGS,
                "rope_parameters": ROPE
                | {"mrope_section": [width // 32, width // 32, width // 16]},
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=92,
            vision_end_token_id=93,
        )
    )


def qwen3(width: int) -> Any:
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(
            vision_config={
                "depth": 4,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 4,
                "num_position_embeddings": 16,
                "out_hidden_size": width,
                "deepstack_visual_indexes": [0, 2],
            },
            text_config={
                "hidden_size": width,
                "intermediate_size": 48,
                **TEXT_SETTINGS,
                "head_dim": 8,
                "rope_parameters": ROPE,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=92,
            vision_end_token_id=93,
        )
    )


def square_pictures(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 16, 16)}


def tiled_pictures(count: int) -> dict[str, Tensor]:
    """Pictures of different shapes, padded to the most tiles."""
    sizes = torch.tensor([[16, 30], [28, 13], [32, 32]])[:count]
    return {"pixel_values": torch.randn(count, 5, 3, 16, 16), "image_sizes": sizes}


def padded_tiles(count: int) -> dict[str, Tensor]:
    """One sample a picture: two tiles each, the second one of the first sample padding."""
    pixels = torch.randn(count, 2, 3, 16, 16)
    pixels[0, 1] = 0
    mask = torch.ones(count, 2, 16, 16, dtype=torch.long)
    mask[-1, 0, 8:] = 0  # a picture smaller than its tile
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def packed_patches(count: int) -> dict[str, Tensor]:
    """Pictures of different shapes, some not a multiple of an attention window."""
    grids = torch.tensor([[1, 6, 8], [1, 4, 10], [1, 2, 2]])[:count]
    return {
        "pixel_values": torch.randn(int(grids.prod(-1).sum()), 3 * 2 * 4 * 4),
        "image_grid_thw": grids,
    }


FAMILIES: dict[str, tuple[Callable[[int], Any], Callable[[int], dict[str, Tensor]]]] = {
    "llava-siglip": (llava, square_pictures),
    "llava-clip": (lambda width: llava(width, "clip"), square_pictures),
    "llava-clip-layers": (
        lambda width: llava(
            width, "clip", vision_feature_layer=[-3, -1], vision_feature_select_strategy="full"
        ),
        square_pictures,
    ),
    "llava-next": (llava_next, tiled_pictures),
    "llava-onevision": (llava_onevision, tiled_pictures),
    "qwen2-vl": (qwen2, packed_patches),
    "qwen2.5-vl": (qwen25, packed_patches),
    "qwen3-vl": (qwen3, packed_patches),
    "smolvlm": (smolvlm, padded_tiles),
    "idefics3": (lambda width: smolvlm(width, "Idefics3"), padded_tiles),
    "internvl": (internvl, square_pictures),
    "paligemma": (paligemma, square_pictures),
    "paligemma2": (lambda width: paligemma(width, second=True), square_pictures),
    "gemma3": (gemma3, square_pictures),
}


def make(family: str, width: int = 32, seed: int = 0) -> Any:
    """A random model in evaluation mode; weights large enough that every input matters."""
    torch.manual_seed(seed)
    model = FAMILIES[family][0](width).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def batch_for(family: str, tokens: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Samples of different lengths, padded right, each with `tokens[i]` image tokens."""
    torch.manual_seed(seed)
    batch = FAMILIES[family][1](len(tokens))
    rows = []
    for index, count in enumerate(tokens):
        before = torch.randint(TEXT.start, TEXT.stop, (3,))
        after = torch.randint(TEXT.start, TEXT.stop, (4 + 2 * index,))
        rows.append(torch.cat([before, torch.full((count,), IMAGE), after]))
    return batch | text_batch(rows)


def text_batch(rows: list[Tensor]) -> dict[str, Tensor]:
    """Token ids, masks and labels; the last three tokens of each row are its answer."""
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
        labels[index, len(row) - 3 : len(row)] = row[-3:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def kinds_for(family: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What some families' processors add: the kind of each token."""
    kinds = (batch["input_ids"] == IMAGE).long()
    if family.startswith("qwen"):
        return {"mm_token_type_ids": kinds.int()}
    if family == "gemma3":
        return {"token_type_ids": kinds}
    if family.startswith("paligemma"):
        return {"token_type_ids": (batch["labels"] != -100).long()}  # 1 in the causal suffix
    return {}
