"""What a distillation method needs from a vision-language model, and the parts all families share.

    features         = encode_image(inputs)                  V(x_v)
    image_embeddings = project(features, inputs)             P(V(x_v))
    hidden           = decode(image_embeddings, inputs, at)  L(P(V(x_v)), x_t) before the LM head
    logits           = lm_head(hidden)

The visual switch of Switch-KD (arXiv 2604.14629) is the same four steps with the student's
`encode_image` and the teacher's other three.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kd_bench.errors import UsageError

__all__ = ["Features", "Inputs", "Pathway", "PathwayBase"]

Inputs = Mapping[str, Any]
"""What the processor returns: `input_ids`, `attention_mask`, `pixel_values`, ..."""

Features = Tensor | tuple[Tensor, ...]
"""One tensor, or several where a projector reads several layers (Qwen3-VL)."""


class Pathway(Protocol):
    """A vision-language model taken apart at its projector.

    Attributes:
        model: the model itself, adapters included.
        vision_width: last dimension of the features, as the projector expects it.
        image_token_count: image tokens of one picture (of one tile where pictures are tiled);
            None where it depends on the picture's size.
        geometry: settings that must be equal on both sides of a switch, by name.
    """

    @property
    def model(self) -> nn.Module: ...
    @property
    def vision_tower(self) -> nn.Module: ...
    @property
    def projector(self) -> nn.Module: ...
    @property
    def language_model(self) -> nn.Module: ...
    @property
    def vision_width(self) -> int: ...
    @property
    def image_token_count(self) -> int | None: ...
    @property
    def image_token_id(self) -> int: ...
    @property
    def vocabulary_size(self) -> int: ...
    @property
    def geometry(self) -> dict[str, Any]: ...

    def encode_image(self, inputs: Inputs) -> Features | None:
        """Vision tower output as the projector accepts it; None for a text-only batch."""

    def project(self, features: Features | None, inputs: Inputs) -> Features | None:
        """Image embeddings as this model's language model accepts them."""

    def decode(
        self, image_embeddings: Features | None, inputs: Inputs, positions: Tensor
    ) -> Tensor:
        """Hidden states [N, hidden] at the N true entries of `positions` [batch, length]."""

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits [N, vocabulary] of hidden states [N, hidden]."""


class PathwayBase:
    """The steps that are the same in every transformers family with a `.model` and a `.lm_head`."""

    def __init__(self, model: nn.Module) -> None:
        self._given = model
        self._whole: Any = unwrap(model)
        self._core: Any = self._whole.model

    @property
    def model(self) -> nn.Module:
        return self._given

    @property
    def config(self) -> Any:
        return self._whole.config

    @property
    def vision_tower(self) -> nn.Module:
        return self._core.vision_tower

    @property
    def projector(self) -> nn.Module:
        return self._core.multi_modal_projector

    @property
    def language_model(self) -> nn.Module:
        return self._core.language_model

    @property
    def image_token_id(self) -> int:
        return int(self.config.image_token_id)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the LM head: more than the tokenizer has where the checkpoint is padded."""
        return int(self._whole.get_output_embeddings().weight.shape[0])

    @property
    def vision_width(self) -> int:
        return int(self.config.vision_config.hidden_size)

    @property
    def image_token_count(self) -> int | None:
        return None

    @property
    def geometry(self) -> dict[str, Any]:
        return {}

    def project(self, features: Features | None, inputs: Inputs) -> Features | None:
        """Image embeddings [images or tiles, image tokens, hidden]."""
        return None if features is None else projected(self.projector, first(features))

    def decode(
        self, image_embeddings: Features | None, inputs: Inputs, positions: Tensor
    ) -> Tensor:
        embeddings, is_image = self.embed(image_embeddings, inputs)
        output = self.language_model(
            inputs_embeds=embeddings,
            use_cache=False,
            **self.language_arguments(image_embeddings, inputs, is_image),
        )
        return output.last_hidden_state[positions]  # [N, hidden]

    def embed(self, image_embeddings: Features | None, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Token embeddings [batch, length, hidden] with the image's in their places, and where."""
        input_ids = inputs["input_ids"]  # [batch, length]
        is_image = input_ids == self.image_token_id  # [batch, length]
        # A placeholder may lie outside the embedding table; its row is overwritten below.
        embeddings = self._whole.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        wanted = int(is_image.sum())
        found = 0 if image_embeddings is None else first(image_embeddings)[..., 0].numel()
        if found != wanted:
            raise UsageError(
                f"The pictures give {found} image tokens, the text has {wanted} places.",
                "Use the processor of this checkpoint and do not truncate inside a picture.",
            )
        if image_embeddings is None:
            return embeddings, is_image
        flat = first(image_embeddings).flatten(0, -2)  # [image tokens, hidden]
        spread = is_image.unsqueeze(-1).expand_as(embeddings)
        return embeddings.masked_scatter(spread, flat.to(embeddings.dtype)), is_image

    def language_arguments(
        self, image_embeddings: Features | None, inputs: Inputs, is_image: Tensor
    ) -> dict[str, Any]:
        """What this family's language model is given beside the embeddings."""
        return {
            "attention_mask": inputs.get("attention_mask"),
            "position_ids": inputs.get("position_ids"),
        }

    def lm_head(self, hidden: Tensor) -> Tensor:
        return self._whole.get_output_embeddings()(hidden)  # [N, vocabulary]


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft adapter or a data-parallel wrapper.

    The submodules are shared, so adapters stay in effect.
    """
    inner: Any = model
    while not hasattr(inner, "config") or hasattr(inner, "peft_config"):
        if hasattr(inner, "get_base_model"):  # peft
            inner = inner.get_base_model()
        elif hasattr(inner, "module"):  # DistributedDataParallel and kin
            inner = inner.module
        else:
            break
    return inner


def first(features: Features) -> Tensor:
    """The tensor that fills the image's places in the text."""
    return features if isinstance(features, Tensor) else features[0]


def has_pixels(inputs: Inputs) -> bool:
    """Whether the batch holds a picture.

    Raises:
        UsageError: it holds a video.
    """
    if inputs.get("pixel_values_videos") is not None:
        raise UsageError("The batch holds a video.", "Give pictures; videos are not supported.")
    pixels = inputs.get("pixel_values")
    return pixels is not None and pixels.numel() > 0


def like_weights(tensor: Tensor, module: nn.Module) -> Tensor:
    """`tensor` on the device and in the float type of `module`, which may differ in a switch."""
    weights = list(module.parameters())
    floats = [weight for weight in weights if weight.is_floating_point()]  # quantized ones are not
    if not floats:
        return tensor
    return tensor.to(weights[0].device, floats[0].dtype)


def projected(projector: nn.Module, features: Tensor) -> Tensor:
    """What a projector makes of features that may come from another model's tower."""
    embeddings: Tensor = projector(like_weights(features, projector))
    return embeddings


def tower_token_count(tower: Any) -> int:
    """Tokens that a fixed-size tower (CLIP, SigLIP) emits for one picture."""
    for module in tower.modules():
        if hasattr(module, "num_positions"):
            return int(module.num_positions)
    config = tower.config
    return int((config.image_size // config.patch_size) ** 2)


def selected_layers(output: Any, layers: int | list[int], drop_first: bool) -> Tensor:
    """The chosen hidden states of a vision tower [images, tokens, width], joined along width."""
    chosen = [layers] if isinstance(layers, int) else layers
    states = [output.hidden_states[layer] for layer in chosen]
    if drop_first:
        states = [state[:, 1:] for state in states]
    return states[0] if len(states) == 1 else torch.cat(states, dim=-1)
