"""Qwen2.5-VL and Qwen3-VL: pictures of any size, patches packed into one sequence.

`inputs` holds pixel_values [patches, values a patch] and image_grid_thw [images, 3].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_bench.distill.pathways.base import (
    Features,
    Inputs,
    PathwayBase,
    first,
    has_pixels,
    like_weights,
    projected,
)

__all__ = ["Qwen2_5VLPathway", "Qwen3VLPathway"]


class _QwenPathway(PathwayBase):
    """What both have in common: the merger is the projector, positions have three axes."""

    def _see(self, inputs: Inputs, **options: Any) -> Any:
        visual = self._core.visual
        pixels = like_weights(inputs["pixel_values"], visual)
        return visual(pixels, grid_thw=inputs["image_grid_thw"], **options)

    @property
    def vision_tower(self) -> nn.Module:
        """The vision model without the mergers that it contains."""
        children = self._core.visual.named_children()
        return nn.ModuleDict({name: part for name, part in children if "merger" not in name})

    @property
    def projector(self) -> nn.Module:
        children = self._core.visual.named_children()
        return nn.ModuleDict({name: part for name, part in children if "merger" in name})

    def language_arguments(
        self, image_embeddings: Features | None, inputs: Inputs, is_image: Tensor
    ) -> dict[str, Any]:
        arguments = super().language_arguments(image_embeddings, inputs, is_image)
        if arguments["position_ids"] is None and bool(is_image.any()):
            kinds = inputs.get("mm_token_type_ids")
            arguments["position_ids"], _ = self._core.get_rope_index(
                inputs["input_ids"],
                image_grid_thw=inputs["image_grid_thw"],
                attention_mask=inputs.get("attention_mask"),
                mm_token_type_ids=is_image.int() if kinds is None else kinds,
            )
        return arguments

    @property
    def geometry(self) -> dict[str, Any]:
        vision = self.config.vision_config
        return {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
        }


class Qwen2_5VLPathway(_QwenPathway):  # noqa: N801 - the model's own name
    """`Qwen2_5_VLForConditionalGeneration`."""

    def encode_image(self, inputs: Inputs) -> Features | None:
        """Patch features [patches, width] in the processor's order.

        The tower works, and answers, in the order of its attention windows, which need not be
        those of the projector's side.
        """
        if not has_pixels(inputs):
            return None
        hidden = self._see(inputs).last_hidden_state  # [patches, width]
        vision = self.config.vision_config
        merged = vision.spatial_merge_size
        order = window_order(
            inputs["image_grid_thw"], merged, vision.window_size // vision.patch_size // merged
        )
        groups = hidden.unflatten(0, (-1, merged**2))  # patches that become one token
        return groups[order.argsort().to(hidden.device)].flatten(0, 1)

    def project(self, features: Features | None, inputs: Inputs) -> Features | None:
        """Image embeddings [image tokens of all pictures, hidden]."""
        return None if features is None else projected(self._core.visual.merger, first(features))


class Qwen3VLPathway(_QwenPathway):
    """`Qwen3VLForConditionalGeneration`: earlier layers of the tower enter earlier layers of the
    language model (DeepStack, arXiv 2406.04334), each through a merger of its own."""

    def encode_image(self, inputs: Inputs) -> Features | None:
        """Patch features [patches, width]: of the last layer, then of each DeepStack layer."""
        if not has_pixels(inputs):
            return None
        output = self._see(inputs, output_hidden_states=True)
        layers = self._core.visual.deepstack_visual_indexes
        return (output.last_hidden_state, *(output.hidden_states[layer + 1] for layer in layers))

    def project(self, features: Features | None, inputs: Inputs) -> Features | None:
        """Image embeddings [image tokens, hidden] for the input and for each DeepStack layer."""
        if features is None:
            return None
        visual = self._core.visual
        mergers = (visual.merger, *visual.deepstack_merger_list)
        return tuple(
            projected(merger, layer) for merger, layer in zip(mergers, features, strict=True)
        )

    def language_arguments(
        self, image_embeddings: Features | None, inputs: Inputs, is_image: Tensor
    ) -> dict[str, Any]:
        arguments = super().language_arguments(image_embeddings, inputs, is_image)
        if image_embeddings is not None:
            arguments["visual_pos_masks"] = is_image
            arguments["deepstack_visual_embeds"] = list(image_embeddings[1:])
        return arguments

    @property
    def geometry(self) -> dict[str, Any]:
        layers = len(self.config.vision_config.deepstack_visual_indexes)
        return super().geometry | {"deepstack_layers": layers}


def window_order(grids: Tensor, merged: int, window: int) -> Tensor:
    """Places of the tokens of pictures, in the order of attention windows.

    Args:
        grids: frames, rows and columns of patches of each picture [images, 3].
        merged: patches a token covers, on a side.
        window: tokens a window covers, on a side.
    """
    orders = []
    start = 0
    for frames, rows, columns in grids.tolist():
        height, width = rows // merged, columns // merged
        place = torch.arange(frames * height * width).view(frames, height, width)
        padded = F.pad(place, (0, -width % window, 0, -height % window), value=-1)
        tiles = padded.unfold(1, window, window).unfold(2, window, window).flatten()
        orders.append(tiles[tiles >= 0] + start)
        start += place.numel()
    return torch.cat(orders)
