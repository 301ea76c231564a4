"""From questions to rows of embeddings: the quick way of LLaVA, and the general one.

LLaVA's pictures all have one size and one number of tokens, so many are encoded at once and the
prompt is expanded here. Other families' own processors expand the prompt; a picture's features are
computed once and kept.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.errors import UsageError
from kd_bench.evals.generate import Row
from kd_bench.evals.pictures import Prepared
from kd_bench.evals.prompts import PromptBuilder
from kd_bench.evals.questions import Question

CACHE_BYTES = 256 << 20
PICTURES_AT_A_TIME = {"cpu": 8}
"""On a processor the activations of more leave its caches: 24 % slower at 48 than at 8."""


@dataclass(frozen=True)
class Ready:
    """A question whose pictures are decoded and whose prompt is rendered."""

    question: Question
    pictures: list[Prepared]
    prompt: str


class RowMaker(Protocol):
    """Turns questions into rows for the decoder."""

    def rows(self, ready: Sequence[Ready]) -> list[Row]:
        """One row a question, in order."""


class FeatureCache(OrderedDict[str, Any]):
    """Image features by picture, least recently used first, bounded in bytes."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        super().__init__()
        self._limit = limit_bytes
        self._size = 0

    def __getitem__(self, key: str) -> Any:
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._size += _bytes(value)
        while self._size > self._limit and len(self) > 1:
            _, dropped = self.popitem(last=False)
            self._size -= _bytes(dropped)


def _bytes(value: Any) -> int:
    tensors = value if isinstance(value, tuple) else (value,)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class FixedRows:
    """Pictures of one size: encoded in batches, their places written out here."""

    def __init__(self, model: VisionLanguageModel, prompts: PromptBuilder, embed: Any) -> None:
        self._model = model
        self._prompts = prompts
        self._embed = embed
        self._features = FeatureCache()

    def rows(self, ready: Sequence[Ready]) -> list[Row]:
        """One row a question, in order."""
        device = self._embed.weight.device
        features = self._encode([p for item in ready for p in item.pictures], device)
        counts = [[len(features[p.digest]) for p in item.pictures] for item in ready]
        ids = self._prompts.encode([item.prompt for item in ready], counts)
        made = []
        for item, tokens in zip(ready, ids, strict=True):
            tensor = torch.tensor(tokens, device=device)
            places = tensor == self._model.image_token_id
            # A placeholder may lie outside the embedding table; its row is overwritten.
            embeddings = self._embed(tensor.masked_fill(places, 0))  # [length, hidden]
            prefix, key = 0, ""
            if item.pictures:
                joined = torch.cat([features[picture.digest] for picture in item.pictures])
                embeddings[places] = joined.to(embeddings.dtype)
                prefix = int(places.nonzero()[-1]) + 1
                key = f"{[p.digest for p in item.pictures]}{tokens[:prefix]}"
            made.append(Row(tokens, embeddings, prefix, key))
        return made

    def _encode(self, pictures: Sequence[Prepared], device: torch.device) -> dict[str, Tensor]:
        """Image embeddings [image tokens, hidden] by picture digest."""
        wanted = {picture.digest: picture for picture in pictures}
        found = {key: self._features[key] for key in wanted if key in self._features}
        fresh = [picture for key, picture in wanted.items() if key not in found]
        size = PICTURES_AT_A_TIME.get(device.type, 64)
        for start in range(0, len(fresh), size):
            some = fresh[start : start + size]
            inputs = {"pixel_values": torch.stack([p.pixels for p in some]).to(device)}
            (projected,) = self._model.image_embeddings(inputs)
            for picture, embedding in zip(some, projected.chunk(len(some)), strict=True):
                found[picture.digest] = self._features[picture.digest] = embedding
        return found


class GeneralRows:
    """Any family whose language model takes embeddings: its own processor writes the prompt."""

    def __init__(self, model: VisionLanguageModel, prompts: PromptBuilder, embed: Any) -> None:
        self._model = model
        self._chat = copy.copy(prompts.chat)
        self._chat.processor = processor = copy.copy(prompts.chat.processor)
        self._images = _Remembered(processor.image_processor)
        processor.image_processor = self._images
        self._embed = embed
        self._features = FeatureCache()

    def rows(self, ready: Sequence[Ready]) -> list[Row]:
        """One row a question, in order."""
        return [self._row(item) for item in ready]

    def _row(self, item: Ready) -> Row:
        key = str([picture.digest for picture in item.pictures])
        self._images.key = key
        inputs = self._chat.processed([item.prompt], [[p.image for p in item.pictures]])
        device = self._embed.weight.device
        given = {name: value.to(device) for name, value in inputs.items()}
        features = self._see(key, given) if item.pictures else None
        return row_of(self._model, self._embed, given, features, key)

    def _see(self, key: str, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        if key not in self._features:
            self._features[key] = self._model.image_embeddings(inputs)
        found: tuple[Tensor, ...] = self._features[key]
        return found


class _Remembered:
    """An image processor that prepares the pictures of one key once."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._known: OrderedDict[str, Any] = OrderedDict()
        self.key = ""

    def __call__(self, *given: Any, **options: Any) -> Any:
        if self.key not in self._known:
            self._known[self.key] = self._inner(*given, **options)
            if len(self._known) > 8:
                self._known.popitem(last=False)
        self._known.move_to_end(self.key)
        return copy.copy(self._known[self.key])  # processors take entries out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def row_of(
    model: VisionLanguageModel,
    embed: Any,
    inputs: dict[str, Any],
    features: tuple[Tensor, ...] | None,
    key: str,
) -> Row:
    """The row of one prompt from its processor's output ([1, length] and its pictures).

    Args:
        features: `image_embeddings` of the inputs; None where there is no picture.
    """
    embeddings, is_image = embedded(model, embed, inputs, features)
    ids = inputs["input_ids"][0].tolist()
    places = is_image[0]
    prefix = int(places.nonzero()[-1]) + 1 if features is not None else 0
    return Row(
        ids,
        embeddings[0],
        prefix,
        f"{key}{ids[:prefix]}" if prefix else "",
        _positions(model, inputs, is_image),
        () if features is None else features[1:],
        places,
    )


def embedded(
    model: VisionLanguageModel,
    embed: Any,
    inputs: dict[str, Any],
    features: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor]:
    """Token embeddings [batch, length, hidden] with the pictures' in their places, and where.

    Raises:
        UsageError: the pictures do not fill the places.
    """
    input_ids = inputs["input_ids"]  # [batch, length]
    is_image = input_ids == model.image_token_id  # [batch, length]
    # A placeholder may lie outside the embedding table; its row is overwritten below.
    embeddings: Tensor = embed(input_ids.masked_fill(is_image, 0))
    targets = int(is_image.sum())
    found = 0 if features is None else len(features[0])
    if found != targets:
        raise UsageError(
            f"The pictures give {found} image tokens, the text has {targets} places.",
            "Use the processor of this checkpoint and do not truncate inside a picture.",
        )
    if features is None:
        return embeddings, is_image
    spread = is_image.unsqueeze(-1).expand_as(embeddings)
    return embeddings.masked_scatter(spread, features[0].to(embeddings.dtype)), is_image


def _positions(
    model: VisionLanguageModel, inputs: dict[str, Any], is_image: Tensor
) -> Tensor | None:
    """Positions [axes, length] of one prompt where the family counts them its own way (Qwen)."""
    count = getattr(model.core, "get_rope_index", None)
    if count is None or not bool(is_image.any()):
        return None
    kinds = inputs.get("mm_token_type_ids")
    positions: Tensor
    positions, _ = count(
        inputs["input_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs.get("attention_mask"),
        mm_token_type_ids=is_image.int() if kinds is None else kinds,
    )
    return positions[:, 0]
