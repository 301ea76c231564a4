"""From questions to rows of embeddings: the quick way of LLaVA, and the general one.

LLaVA's images all have one size and one number of tokens, so many are encoded at once and the
prompt is expanded here. Other families' own processors expand the prompt; an image's features are
computed once and kept.
"""

import copy
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from kd_bench.distill.chat import ChatFormat
from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.errors import UsageError
from kd_bench.evals.benchmark import PLACEHOLDER, Question
from kd_bench.evals.decoding import Row
from kd_bench.files import atomic_path


class PromptBuilder(ChatFormat):
    """Renders questions for one checkpoint, as its training does.

    Raises:
        UsageError: the checkpoint has no chat template, or one that cannot be used.

    A template that could not teach (its prompt opens a thought) is asked all the same.
    """

    def __init__(self, processor: Any) -> None:
        super().__init__(processor, learns=False)

    def render(self, text: str, images: int) -> str:
        """The conversation up to where the answer begins, one image token an image.

        Images stand at their placeholders, or else in front of the text.
        """
        image = {"type": "image"}
        parts = text.split(PLACEHOLDER)
        if images and len(parts) - 1 == images:
            content = [{"type": "text", "text": parts[0]}] if parts[0] else []
            for part in parts[1:]:
                content += [image, {"type": "text", "text": part}] if part else [image]
        else:
            # A stray image token in the question itself must not ask for an image.
            plain = text.replace(self.image_token, "").replace(PLACEHOLDER, "")
            content = [image] * images + [{"type": "text", "text": plain}]
        return self.prompt([{"role": "user", "content": content}])

    def encode(self, rendered: Sequence[str], counts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Token ids of rendered conversations, each image token as often as its image has features.

        Args:
            counts: image tokens of each image of each conversation.
        """
        texts = []
        for text, sizes in zip(rendered, counts, strict=True):
            first, *others = text.split(self.image_token)
            if len(others) != len(sizes):
                raise ValueError(
                    f"the chat template renders {len(others)} images, the question has {len(sizes)}"
                )
            pairs = zip(sizes, others, strict=True)
            texts.append(first + "".join(self.image_token * size + part for size, part in pairs))
        return self.prompt_ids(texts)


KEPT_IMAGES = 500
KEPT_SIDE = 512  # pixels


@dataclass(frozen=True)
class Prepared:
    """One image, ready for the vision tower.

    Attributes:
        digest: of its decoded RGB pixels.
        pixels: [channels, height, width], as the checkpoint's image processor makes them; empty
            where the processor is given the image itself.
        image: the decoded image, where the processor wants it.
    """

    digest: str
    pixels: Tensor
    image: Image | None = None


def pixel_digest(image: Image) -> str:
    """sha256 over size and RGB pixels, shortened; equal for equal images in any file format."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()[:32]


def keep_images(
    folder: Path, digests: Sequence[str], decode: Callable[[int], Sequence[Image]]
) -> None:
    """Keep a benchmark's images for people to look at, as `<first 16 digits of digest>.png`.

    At most 500, those with the smallest digests: every model's run asks for the same ones. They are
    not flushed to disk, and one that a crash has cut short is made again.

    Args:
        digests: of each document's first image; empty without one.
        decode: the images of the document with that number.
    """
    numbers = {digest: number for number, digest in enumerate(digests) if digest}
    for digest in sorted(numbers)[:KEPT_IMAGES]:
        file = folder / f"{digest[:16]}.png"
        if not _is_whole(file):
            image = decode(numbers[digest])[0].convert("RGB")
            image.thumbnail((KEPT_SIDE, KEPT_SIDE))
            with atomic_path(file, flushed=False) as temporary:
                image.save(temporary, format="png")


PNG_END = bytes(4) + b"IEND\xaeB`\x82"


def _is_whole(file: Path) -> bool:
    """Whether a PNG is there to its end."""
    try:
        with file.open("rb") as stream:
            stream.seek(-len(PNG_END), os.SEEK_END)
            return stream.read() == PNG_END
    except OSError:  # none there, or it is shorter
        return False


class Remembered(OrderedDict[Any, Any]):
    """Tensors and images by key, least recently used first, bounded in bytes."""

    def __init__(self, limit_bytes: int = 256 << 20) -> None:
        super().__init__()
        self._limit = limit_bytes
        self._size = 0

    def __getitem__(self, key: Any) -> Any:
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self._size += _bytes(value)
        while self._size > self._limit and len(self) > 1:
            self._size -= _bytes(self.popitem(last=False)[1])


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Prepared):
        width, height = value.image.size if value.image else (0, 0)
        return value.pixels.nbytes + 3 * width * height
    return sum(map(_bytes, value))


class ImageStore(Remembered):
    """Prepared images by key.

    Equal image processors share entries, so several checkpoints of one family prepare once.
    """

    def prepared(
        self, key: str, decode: Callable[[], Sequence[Image]], processor: Any
    ) -> list[Prepared]:
        """The images behind `key`; an empty key is prepared anew each time.

        Without a processor they are decoded and kept as they are.
        """
        place = (_identity(processor), key)
        if key and place in self:
            return self[place]
        made = []
        for image in decode():
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            if processor is None:
                made.append(Prepared(pixel_digest(rgb), torch.empty(0), rgb))
                continue
            pixels = processor(images=[rgb], return_tensors="pt")["pixel_values"]
            made.append(Prepared(pixel_digest(rgb), torch.as_tensor(pixels[0])))
        if key:
            self[place] = made
        return made


def _identity(processor: Any) -> str:
    """Equal for image processors with equal settings; kept on the object once computed."""
    if processor is None:
        return "decoded"
    known = getattr(processor, "_kd_bench_identity", None)
    if known is None:
        text = json.dumps(processor.to_dict(), sort_keys=True, default=str)
        known = hashlib.sha256(text.encode()).hexdigest()[:16]
        processor._kd_bench_identity = known
    return str(known)


IMAGES_AT_A_TIME = {"cpu": 8}
"""On a CPU the activations of more leave its caches: 24 % slower at 48 than at 8."""


@dataclass(frozen=True)
class Ready:
    """A question whose images are decoded and whose prompt is rendered."""

    question: Question
    images: list[Prepared]
    prompt: str

    @property
    def key(self) -> str:
        """Equal for questions about the same images."""
        return str([image.digest for image in self.images])


def padded_batch(prompts: PromptBuilder, device: Any, ready: Sequence[Ready]) -> dict[str, Any]:
    """Inputs of a family whose `generate` is called, one row a question, padded in front."""
    inputs = prompts.processed(
        [item.prompt for item in ready],
        [[image.image for image in item.images] for item in ready],
        padding=True,
        padding_side="left",
    )
    return {name: value.to(device) for name, value in inputs.items()}


class FixedRows:
    """Images of one size: encoded in batches, their places written out here."""

    def __init__(self, model: VisionLanguageModel, prompts: PromptBuilder, embed: Any) -> None:
        self._model = model
        self._prompts = prompts
        self._embed = embed
        self._features = Remembered()

    def rows(self, ready: Sequence[Ready]) -> list[Row]:
        """One row a question, in order."""
        device = self._embed.weight.device
        features = self._encode([p for item in ready for p in item.images], device)
        found = [[features[image.digest] for image in item.images] for item in ready]
        counts = [[len(each) for each in of_row] for of_row in found]
        ids = self._prompts.encode([item.prompt for item in ready], counts)
        made = []
        for item, tokens, of_row in zip(ready, ids, found, strict=True):
            inputs = {"input_ids": torch.tensor([tokens], device=device)}
            joined = (torch.cat(of_row),) if of_row else None
            made.append(row_of(self._model, self._embed, inputs, joined, item.key))
        return made

    def _encode(self, images: Sequence[Prepared], device: torch.device) -> dict[str, Tensor]:
        """Image embeddings [image tokens, hidden] by image digest."""
        wanted = {image.digest: image for image in images}
        found = {key: self._features[key] for key in wanted if key in self._features}
        fresh = [image for key, image in wanted.items() if key not in found]
        size = IMAGES_AT_A_TIME.get(device.type, 64)
        for start in range(0, len(fresh), size):
            some = fresh[start : start + size]
            inputs = {"pixel_values": torch.stack([p.pixels for p in some]).to(device)}
            (projected,) = self._model.image_embeddings(inputs)
            for image, embedding in zip(some, projected.chunk(len(some)), strict=True):
                found[image.digest] = self._features[image.digest] = embedding
        return found


class GeneralRows:
    """Any family whose language model takes embeddings: its own processor writes the prompt."""

    def __init__(self, model: VisionLanguageModel, prompts: PromptBuilder, embed: Any) -> None:
        self._model = model
        self._chat = copy.copy(prompts)
        self._chat.processor = processor = copy.copy(prompts.processor)
        self._images = _OnceAnImage(processor.image_processor)
        processor.image_processor = self._images
        self._embed = embed
        self._features = Remembered()

    def rows(self, ready: Sequence[Ready]) -> list[Row]:
        """One row a question, in order."""
        device = self._embed.weight.device
        made = []
        for item in ready:
            self._images.key = key = item.key
            inputs = self._chat.processed([item.prompt], [[p.image for p in item.images]])
            given = {name: value.to(device) for name, value in inputs.items()}
            if item.images and key not in self._features:
                self._features[key] = self._model.image_embeddings(given)
            features = self._features[key] if item.images else None
            made.append(row_of(self._model, self._embed, given, features, key))
        return made


class _OnceAnImage:
    """An image processor that prepares the images of one key once; equal keys come in a row."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._known: Any = None
        self._known_key: str | None = None
        self.key = ""

    def __call__(self, *given: Any, **options: Any) -> Any:
        if self.key != self._known_key:
            self._known, self._known_key = self._inner(*given, **options), self.key
        return copy.copy(self._known)  # processors take entries out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def row_of(
    model: VisionLanguageModel,
    embed: Any,
    inputs: dict[str, Any],
    features: tuple[Tensor, ...] | None,
    key: str,
) -> Row:
    """The row of one prompt from its processor's output ([1, length] and its images).

    Args:
        features: `image_embeddings` of the inputs; None where there is no image.
        key: equal for equal images.

    Raises:
        UsageError: the images do not fill their places.
    """
    input_ids = inputs["input_ids"]  # [1, length]
    is_image = input_ids == model.image_token_id  # [1, length]
    # A placeholder may lie outside the embedding table; its row is overwritten below.
    embeddings: Tensor = embed(input_ids.masked_fill(is_image, 0))  # [1, length, hidden]
    targets = int(is_image.sum())
    found = 0 if features is None else len(features[0])
    if found != targets:
        raise UsageError(
            f"The images give {found} image tokens, the text has {targets} places.",
            "Use the processor of this checkpoint and do not truncate inside an image.",
        )
    ids = input_ids[0].tolist()
    prefix = 0
    deep: tuple[Tensor, ...] = ()
    if features is not None:
        spread = is_image.unsqueeze(-1).expand_as(embeddings)
        embeddings = embeddings.masked_scatter(spread, features[0].to(embeddings.dtype))
        prefix, deep = int(is_image[0].nonzero()[-1]) + 1, features[1:]
    shared = f"{key}{ids[:prefix]}" if prefix else ""
    positions = _positions(model, inputs, is_image)
    return Row(ids, embeddings[0], positions, prefix, shared, deep, is_image[0])


def _positions(model: VisionLanguageModel, inputs: dict[str, Any], is_image: Tensor) -> Tensor:
    """Positions [axes, length] of one prompt; some families (Qwen) count them their own way."""
    ids = inputs["input_ids"]
    count = getattr(model.core, "get_rope_index", None)
    if count is None or not bool(is_image.any()):
        return torch.arange(ids.shape[1], device=ids.device)[None]
    kinds = inputs.get("mm_token_type_ids")
    positions, _ = count(
        ids,
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs.get("attention_mask"),
        mm_token_type_ids=is_image.int() if kinds is None else kinds,
    )
    return positions[:, 0]
