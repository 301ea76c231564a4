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

from kd_bench.distill.pathways import Features, Pathway
from kd_bench.evals.generate import Row
from kd_bench.evals.pictures import Prepared
from kd_bench.evals.prompts import PromptBuilder
from kd_bench.evals.questions import Question

__all__ = ["FixedRows", "GeneralRows", "Ready", "RowMaker"]

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

    def __init__(self, pathway: Pathway, prompts: PromptBuilder, embed: Any) -> None:
        self._pathway = pathway
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
            places = tensor == self._pathway.image_token_id
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
            projected = self._pathway.project(self._pathway.encode_image(inputs), inputs)
            assert isinstance(projected, Tensor)
            for picture, embedding in zip(some, projected, strict=True):
                found[picture.digest] = self._features[picture.digest] = embedding
        return found


class GeneralRows:
    """Any family whose language model takes embeddings: its own processor writes the prompt."""

    def __init__(self, pathway: Any, processor: Any, embed: Any) -> None:
        self._pathway = pathway
        self._processor = copy.copy(processor)
        self._images = _Remembered(processor.image_processor)
        self._processor.image_processor = self._images
        self._embed = embed
        self._features = FeatureCache()

    def rows(self, ready: Sequence[Ready]) -> list[Row]:
        """One row a question, in order."""
        return [self._row(item) for item in ready]

    def _row(self, item: Ready) -> Row:
        key = str([picture.digest for picture in item.pictures])
        self._images.key = key
        inputs: dict[str, Any] = {"text": [item.prompt], "return_tensors": "pt"}
        if item.pictures:
            inputs["images"] = [picture.image for picture in item.pictures]
        if self._begins(item.prompt):
            inputs["add_special_tokens"] = False
        device = self._embed.weight.device
        given = {name: value.to(device) for name, value in self._processor(**inputs).items()}
        features = self._see(key, given) if item.pictures else None
        return row_of(self._pathway, self._embed, given, features, key)

    def _begins(self, prompt: str) -> bool:
        begin = self._processor.tokenizer.bos_token
        return bool(begin) and prompt.startswith(begin)

    def _see(self, key: str, inputs: dict[str, Any]) -> Features | None:
        if key not in self._features:
            seen = self._pathway.project(self._pathway.encode_image(inputs), inputs)
            self._features[key] = seen
        return self._features[key]


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
    pathway: Any, embed: Any, inputs: dict[str, Any], features: Features | None, key: str
) -> Row:
    """The row of one prompt from its processor's output ([1, length] and its pictures)."""
    embeddings, is_image = pathway.embed(features, inputs)
    told = pathway.language_arguments(features, inputs, is_image)
    positions = told.get("position_ids")
    if positions is not None:
        positions = positions[:, 0] if positions.dim() == 3 else positions
    ids = inputs["input_ids"][0].tolist()
    places = is_image[0]
    prefix = int(places.nonzero()[-1]) + 1 if features is not None else 0
    return Row(
        ids,
        embeddings[0],
        prefix,
        f"{key}{ids[:prefix]}" if prefix else "",
        positions,
        tuple(told.get("deepstack_visual_embeds") or ()),
        places,
    )
