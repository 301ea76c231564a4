"""LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision, with CLIP or SigLIP towers."""

from typing import Any

import torch
from torch import Tensor, nn

from kd_bench.distill.pathways.base import (
    Features,
    Inputs,
    PathwayBase,
    first,
    has_pixels,
    like_weights,
    projected,
    selected_layers,
    tower_token_count,
)

__all__ = ["LlavaNextPathway", "LlavaOnevisionPathway", "LlavaPathway"]


class LlavaPathway(PathwayBase):
    """`LlavaForConditionalGeneration`: one square picture, a two-layer projector."""

    def encode_image(self, inputs: Inputs) -> Features | None:
        """Patch features [images, image tokens, width]."""
        return self._see(inputs["pixel_values"]) if has_pixels(inputs) else None

    def _see(self, pixels: Tensor) -> Tensor:
        tower = self.vision_tower
        output = tower(like_weights(pixels, tower), output_hidden_states=True)
        return selected_layers(output, self._layers, self._drops_first)

    @property
    def _layers(self) -> int | list[int]:
        return self.config.vision_feature_layer

    @property
    def _drops_first(self) -> bool:
        return self.config.vision_feature_select_strategy == "default"

    @property
    def vision_width(self) -> int:
        layers = 1 if isinstance(self._layers, int) else len(self._layers)
        return int(self.config.vision_config.hidden_size) * layers

    @property
    def image_token_count(self) -> int | None:
        return tower_token_count(self.vision_tower) - int(self._drops_first)

    @property
    def geometry(self) -> dict[str, Any]:
        vision = self.config.vision_config
        return {"image_size": vision.image_size, "patch_size": vision.patch_size}


class LlavaNextPathway(LlavaPathway):
    """`LlavaNextForConditionalGeneration`: an overview and tiles, rows ended by a learnt token.

    `inputs` holds pixel_values [images, tiles, 3, height, width] padded to the most tiles, and
    image_sizes [images, 2].
    """

    def encode_image(self, inputs: Inputs) -> Features | None:
        """Patch features of all tiles [tiles, tokens a tile, width]."""
        if not has_pixels(inputs):
            return None
        pixels = inputs["pixel_values"]
        if pixels.dim() == 5:
            counts = self._tile_counts(inputs)
            pixels = torch.cat([tiles[:n] for tiles, n in zip(pixels, counts, strict=True)])
        return self._see(pixels)

    def project(self, features: Features | None, inputs: Inputs) -> Features | None:
        """Image embeddings [image tokens of all pictures, hidden]."""
        if features is None:
            return None
        embeddings = projected(self._core.multi_modal_projector, first(features))
        pictures = embeddings.split(self._tile_counts(inputs))
        packed, _ = self._core.pack_image_features(
            pictures, inputs["image_sizes"], image_newline=self._core.image_newline, **self._packing
        )
        return torch.cat(list(packed))

    @property
    def projector(self) -> nn.Module:
        """The projector and the token that ends a row of patches."""
        parts = nn.ModuleList([self._core.multi_modal_projector])
        parts.register_parameter("image_newline", self._core.image_newline)
        return parts

    @property
    def _packing(self) -> dict[str, Any]:
        return {"vision_feature_select_strategy": self.config.vision_feature_select_strategy}

    def _tile_counts(self, inputs: Inputs) -> list[int]:
        """Tiles of every picture, its overview included."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return [
            image_size_to_num_patches(
                image_size=size,
                grid_pinpoints=self.config.image_grid_pinpoints,
                patch_size=self.config.vision_config.image_size,
            )
            for size in inputs["image_sizes"]
        ]

    @property
    def geometry(self) -> dict[str, Any]:
        pinpoints = [list(size) for size in self.config.image_grid_pinpoints]
        return super().geometry | {"image_grid_pinpoints": pinpoints}


class LlavaOnevisionPathway(LlavaNextPathway):
    """`LlavaOnevisionForConditionalGeneration`: tiles shrunk to a limit, one tile where there are
    several pictures (`batch_num_images` in the inputs)."""

    @property
    def _packing(self) -> dict[str, Any]:
        return {"vision_aspect_ratio": self.config.vision_aspect_ratio}

    def _tile_counts(self, inputs: Inputs) -> list[int]:
        counts = super()._tile_counts(inputs)
        per_sample = inputs.get("batch_num_images")
        if per_sample is None:
            return counts
        alone = [n == 1 for n in torch.as_tensor(per_sample).tolist() for _ in range(n)]
        return [count if tiled else 1 for count, tiled in zip(counts, alone, strict=True)]
