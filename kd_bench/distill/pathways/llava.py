"""LLaVA 1.5 and its kin (`LlavaForConditionalGeneration`) with CLIP or SigLIP towers."""

from typing import Any

from torch import Tensor

from kd_bench.distill.pathways.base import (
    Features,
    Inputs,
    PathwayBase,
    first,
    has_pixels,
    like_weights,
    selected_layers,
    tower_token_count,
)

__all__ = ["LlavaPathway"]


class LlavaPathway(PathwayBase):
    """One square picture, one layer or more of its tower, a two-layer projector."""

    def encode_image(self, inputs: Inputs) -> Features | None:
        """Patch features [images, image tokens, width]."""
        if not has_pixels(inputs):
            return None
        output = self.vision_tower(
            like_weights(inputs["pixel_values"], self.vision_tower), output_hidden_states=True
        )
        return selected_layers(output, self._layers, self._drops_first)

    def project(self, features: Features | None, inputs: Inputs) -> Features | None:
        """Image embeddings [images, image tokens, hidden]."""
        if features is None:
            return None
        return self._project(first(features))

    def _project(self, features: Tensor) -> Tensor:
        return self.projector(like_weights(features, self.projector))

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
        return {"image_size": self.config.vision_config.image_size}
