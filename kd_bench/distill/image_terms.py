"""Terms on image tokens, for the methods that Switch-KD is compared with.

LLaVA-KD (arXiv 2410.16236) compares the last layer at image positions, Align-KD (arXiv 2412.01282)
the projected image tokens and the first layer's attention from text to image.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.errors import UsageError


def count_items(batch: Mapping[str, Tensor], image_token_id: int) -> dict[str, Tensor]:
    """What the sums of the terms are divided by, so that they are the same on any number of
    micro-batches and devices once these counts are added up over them.

    Returns:
        answers: positions whose next token is supervised.
        image_samples: samples with an image.
        image_tokens: image positions.
        image_pairs: text positions times the image positions before each.
    """
    places = batch["input_ids"] == image_token_id  # [batch, length]
    asks = batch["attention_mask"].bool() & ~places
    return {
        "answers": (batch["labels"][:, 1:] != -100).sum(),
        "image_samples": places.any(1).sum(),
        "image_tokens": places.sum(),
        "image_pairs": places.cumsum(1)[asks].sum(),
    }


def image_correlation(teacher: Tensor, other: Tensor, owners: Tensor) -> Tensor:
    """1 - cosine of the two models' self-correlation matrices, summed over samples; a scalar.

    Args:
        teacher, other: last hidden states at image positions [M, width]; the widths may differ.
        owners: sample that each position belongs to [M].

    The source speaks of the language model's output at image positions; hidden states are taken
    here, not logits (OPEN).
    """
    values = []
    for sample in owners.unique().tolist():
        chosen = owners == sample
        left, right = teacher[chosen].detach().float(), other[chosen].float()  # [m, width]
        relation = (left @ left.T).flatten(), (right @ right.T).flatten()  # [m * m]
        values.append(1 - F.cosine_similarity(*relation, dim=0))
    return torch.stack(values).sum()


def image_mse(teacher: Tensor, other: Tensor, adapter: nn.Module | None) -> Tensor:
    """Squared error of the projected image tokens, averaged over the width and summed; a scalar.

    Args:
        teacher, other: embeddings [M, width] that enter the language models.
        adapter: linear map of the teacher's width to the student's where they differ. It learns
            with the student and is no part of the checkpoint (upstream: a 1 x 1 convolution).
    """
    left = teacher.detach()
    if adapter is not None:
        left = adapter(left.to(next(adapter.parameters()).dtype))
    return F.mse_loss(other.float(), left.float(), reduction="none").mean(-1).sum()


def attention_mse(teacher: Tensor, other: Tensor, asks: Tensor, seen: Tensor) -> Tensor:
    """Squared error of text-to-image attention averaged over heads, summed over pairs; a scalar.

    Args:
        teacher, other: attention weights [batch, heads, length, length]; heads may differ.
        asks: text positions [batch, length], padding excluded.
        seen: image positions [batch, length].
    """
    pairs = asks.unsqueeze(2) & seen.unsqueeze(1)  # [batch, length, length]
    pairs = pairs & torch.ones_like(pairs[0]).tril()  # nothing is seen before it comes
    left, right = teacher.detach().float().mean(1), other.float().mean(1)
    return F.mse_loss(right[pairs], left[pairs], reduction="sum")


class FirstLayerProbe:
    """What enters a language model and its first layer's attention, while it runs inside a `with`.

    The fused kernels that models use do not give attention weights, so that one layer's attention
    is run again in its plain form on the same inputs.

    Attributes:
        embeddings: [batch, length, width], image tokens in their places.
    """

    def __init__(self, model: VisionLanguageModel, watches_attention: bool = True) -> None:
        self.language: Any = model.language_model
        self.embeddings: Any = None
        self.inputs: dict[str, Any] | None = None
        self.module: Any = None
        self._hooks: list[Any] = []
        if not watches_attention:
            return
        layers = getattr(self.language, "layers", None)
        if layers is None or not hasattr(layers[0], "self_attn"):
            raise UsageError(
                f"{type(self.language).__name__} has no layers[0].self_attn to watch.",
                "Leave attention_mse out for this model.",
            )
        self.module = layers[0].self_attn

    def __enter__(self) -> "FirstLayerProbe":
        watched: list[tuple[Any, Any]] = [(self.language, self._keep_embeddings)]
        if self.module is not None:
            watched.append((self.module, self._keep_inputs))
        self._hooks = [
            module.register_forward_pre_hook(keep, with_kwargs=True) for module, keep in watched
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep_embeddings(self, _: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        self.embeddings = given["inputs_embeds"]

    def _keep_inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.inputs is None:
            names = ("hidden_states", "position_embeddings")
            self.inputs = {**dict(zip(names, args, strict=False)), **kwargs}

    def weights(self, attention_mask: Tensor) -> Tensor:
        """[batch, heads, length, length] for a right-padded batch's mask [batch, length]."""
        assert self.inputs is not None  # the model ran inside the `with`
        settings = self.module.config
        before = settings._attn_implementation
        settings._attn_implementation = "eager"
        try:
            _, weights = self.module.forward(
                hidden_states=self.inputs["hidden_states"],
                position_embeddings=self.inputs["position_embeddings"],
                attention_mask=self._blocked(attention_mask),
            )
        finally:
            settings._attn_implementation = before
        assert isinstance(weights, Tensor)
        return weights

    def _blocked(self, attention_mask: Tensor) -> Tensor:
        """What is added to attention scores, [batch or 1, 1, length, length].

        The layer's own mask where it was given one (Gemma's prefix sees in both directions), else
        causal.
        """
        assert self.inputs is not None
        hidden, given = self.inputs["hidden_states"], self.inputs.get("attention_mask")
        if isinstance(given, Tensor) and given.dim() == 4:
            if given.is_floating_point():
                return given
            allowed = given.bool()
        else:
            length = hidden.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
            allowed = attention_mask.bool()[:, None, None, :] & causal
        blocked = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
        return blocked.masked_fill(~allowed, torch.finfo(hidden.dtype).min)
