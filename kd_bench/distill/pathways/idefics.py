"""SmolVLM and Idefics3."""

from typing import Any

from torch import Tensor, nn

from kd_bench.distill.pathways.base import (
    Features,
    Inputs,
    PathwayBase,
    has_pixels,
    like_weights,
)

__all__ = ["Idefics3Pathway"]


class Idefics3Pathway(PathwayBase):
    """`SmolVLMForConditionalGeneration`, `Idefics3ForConditionalGeneration`.

    `inputs` holds pixel_values [batch, tiles, 3, height, width], padded with tiles of zeros, and
    pixel_attention_mask [batch, tiles, height, width].
    """

    def encode_image(self, inputs: Inputs) -> Features | None:
        """Patch features of the tiles that are not padding [tiles, patches, width]."""
        if not has_pixels(inputs):
            return None
        pixels = inputs["pixel_values"].flatten(0, 1)
        real = (pixels != 0).flatten(1).any(dim=-1)  # [batch * tiles]
        if not real.any():
            return None
        pixels = like_weights(pixels[real], self.vision_tower)
        mask = inputs.get("pixel_attention_mask")
        shown = (
            pixels.new_ones(pixels[:, 0].shape) if mask is None else mask.flatten(0, 1)[real]
        ).bool()
        output = self.vision_tower(pixel_values=pixels, patch_attention_mask=self._patches(shown))
        return output.last_hidden_state

    def _patches(self, shown: Tensor) -> Tensor:
        """Pixel mask [tiles, height, width] -> patch mask [tiles, rows, columns]."""
        size = self.config.vision_config.patch_size
        windows = shown.unfold(1, size, size).unfold(2, size, size)
        return windows.flatten(-2).any(dim=-1)

    @property
    def vision_tower(self) -> nn.Module:
        return self._core.vision_model

    @property
    def projector(self) -> nn.Module:
        return self._core.connector

    @property
    def language_model(self) -> nn.Module:
        return self._core.text_model

    @property
    def image_token_count(self) -> int | None:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2

    @property
    def geometry(self) -> dict[str, Any]:
        vision = self.config.vision_config
        return {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "scale_factor": self.config.scale_factor,
        }
