"""InternVL in its transformers form (`InternVLForConditionalGeneration`)."""

from typing import Any

from kd_bench.distill.pathways.base import (
    Features,
    Inputs,
    PathwayBase,
    has_pixels,
    like_weights,
)

__all__ = ["InternVLPathway"]


class InternVLPathway(PathwayBase):
    """Tiles as pictures of their own; neighbouring patches joined before the projector."""

    def encode_image(self, inputs: Inputs) -> Features | None:
        """Joined patch features [tiles, image tokens, width]."""
        if not has_pixels(inputs):
            return None
        tower = self.vision_tower
        output = tower(
            pixel_values=like_weights(inputs["pixel_values"], tower), output_hidden_states=True
        )
        layer = self.config.vision_feature_layer
        # The tower's last norm is in its output, but not in the last of its hidden states.
        features = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        side = int(features.shape[1] ** 0.5)
        grid = features.reshape(len(features), side, side, -1)
        joined = self._core.pixel_shuffle(grid, scale_factor=self.config.downsample_ratio)
        return joined.flatten(1, 2)

    @property
    def vision_width(self) -> int:
        return int(self.config.vision_config.hidden_size) * self._side_joined**2

    @property
    def image_token_count(self) -> int | None:
        vision = self.config.vision_config
        (height, width), (down, across) = vision.image_size, vision.patch_size
        return (height // down) * (width // across) // self._side_joined**2

    @property
    def _side_joined(self) -> int:
        return int(1 / self.config.downsample_ratio)

    @property
    def geometry(self) -> dict[str, Any]:
        vision = self.config.vision_config
        return {
            "image_size": list(vision.image_size),
            "patch_size": list(vision.patch_size),
            "downsample_ratio": self.config.downsample_ratio,
        }
