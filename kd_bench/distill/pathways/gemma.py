"""Gemma 3 and PaliGemma, whose image tokens see each other in both directions."""

import inspect
from functools import cached_property
from typing import Any

from torch import Tensor

from kd_bench.distill.pathways.base import (
    Features,
    Inputs,
    PathwayBase,
    has_pixels,
    like_weights,
    tower_token_count,
)

__all__ = ["Gemma3Pathway", "PaliGemmaPathway"]


class PaliGemmaPathway(PathwayBase):
    """`PaliGemmaForConditionalGeneration`.

    `inputs` may hold token_type_ids [batch, length], from which the model makes its mask.
    """

    def encode_image(self, inputs: Inputs) -> Features | None:
        """Patch features [images, patches, width]."""
        if not has_pixels(inputs):
            return None
        tower = self.vision_tower
        return tower(like_weights(inputs["pixel_values"], tower)).last_hidden_state

    def decode(
        self, image_embeddings: Features | None, inputs: Inputs, positions: Tensor
    ) -> Tensor:
        # Through the model around the language model: it makes the masks and the position ids.
        embeddings, _ = self.embed(image_embeddings, inputs)
        output = self._core(
            inputs_embeds=embeddings,
            token_type_ids=inputs.get("token_type_ids"),
            use_cache=False,
            **self.language_arguments(image_embeddings, inputs, positions),
        )
        return output.last_hidden_state[positions]  # [N, hidden]

    def lm_head(self, hidden: Tensor) -> Tensor:
        logits = super().lm_head(hidden)
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None or not self._caps else (logits / cap).tanh() * cap

    @cached_property
    def _caps(self) -> bool:
        """Whether the installed transformers caps these logits: 5.17 does not, 5.23 does."""
        return "final_logit_softcapping" in inspect.getsource(type(self._whole).forward)

    @property
    def image_token_count(self) -> int | None:
        return tower_token_count(self.vision_tower)

    @property
    def geometry(self) -> dict[str, Any]:
        vision = self.config.vision_config
        return {"image_size": vision.image_size, "patch_size": vision.patch_size}


class Gemma3Pathway(PaliGemmaPathway):
    """`Gemma3ForConditionalGeneration`: patches averaged to a fixed number in the projector."""

    @property
    def image_token_count(self) -> int | None:
        return int(self.config.mm_tokens_per_image)
