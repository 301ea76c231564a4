"""From questions to rows of embeddings: the quick way of LLaVA, and the general one.

LLaVA's images all have one size and one number of tokens, so the prompt is expanded here. Other
families' own processors expand it. `prepare` does what needs no model and may run in a thread;
`rows` encodes each image once, many at a time, and keeps its features.
"""

import copy
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPooling

from kd_bench.distill.chat import ChatFormat
from kd_bench.distill.vision_language import OF_IMAGES, VisionLanguageModel
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


@dataclass(frozen=True)
class Ready:
    """A question whose images are decoded and whose prompt is rendered.

    Attributes:
        ids: its prompt's tokens, images expanded; empty where only `padded_batch` makes them.
        prefix: how many of them end with the last image token.
        inputs: what the model is given, as its processor made it; where there is one.
    """

    question: Question
    images: list[Prepared]
    prompt: str
    ids: Sequence[int] = ()
    prefix: int = 0
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Its tokens; no less than them where they are not known: a token is at least a byte."""
        unknown = len(self.prompt.encode()) + 1024 * len(self.images)
        return len(self.ids) or unknown

    @property
    def pixels(self) -> int:
        """Values that the tower is given."""
        own = self.inputs.get("pixel_values")
        return sum(i.pixels.numel() for i in self.images) + (0 if own is None else own.numel())

    @cached_property
    def key(self) -> str:
        """Equal for questions about the same images."""
        return str([image.digest for image in self.images])

    @cached_property
    def prefix_key(self) -> str:
        """Equal for questions whose tokens and images are equal up to the last image."""
        return f"{self.key}{list(self.ids[: self.prefix])}" if self.prefix else ""

    def tokenised(self, ids: list[int], image: int, inputs: Mapping[str, Tensor]) -> "Ready":
        """With its tokens, of which `image` stands for an image."""
        prefix = len(ids) - ids[::-1].index(image) if image in ids else 0
        return replace(self, ids=ids, prefix=prefix, inputs=inputs)


def padded_batch(prompts: PromptBuilder, device: Any, ready: Sequence[Ready]) -> dict[str, Any]:
    """Inputs of a family that is not known and whose `generate` is called, padded in front."""
    inputs = prompts.processed(
        [item.prompt for item in ready],
        [[image.image for image in item.images] for item in ready],
        padding=True,
        padding_side="left",
    )
    return {name: to_device(value, device) for name, value in inputs.items()}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the copy, where the device can do that."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


VALUES_AT_A_TIME = {"cpu": 8 * 3 * 384**2}
"""Of pixels in the tower: on a CPU the activations of more leave its caches (24 % slower at 48
images than at 8)."""
MOST_VALUES = 64 * 3 * 384**2


class FixedRows:
    """Images of one size: encoded in batches, their places written out here."""

    def __init__(self, model: VisionLanguageModel, prompts: PromptBuilder, embed: Any) -> None:
        self._model = model
        self._prompts = prompts
        self._embed = embed
        self._features = Features(model)

    def prepare(self, items: Sequence[Ready]) -> list[Ready]:
        """With their tokens."""
        count = self._model.image_token_count
        assert count is not None
        counts = [[count] * len(item.images) for item in items]
        ids = self._prompts.encode([item.prompt for item in items], counts)
        image = self._model.image_token_id
        return [
            item.tokenised(tokens, image, {"input_ids": torch.tensor([tokens])})
            for item, tokens in zip(items, ids, strict=True)
        ]

    def rows(self, ready: Sequence[Ready]) -> list[Row]:
        """One row a question, in order."""
        device = self._embed.weight.device
        images = {image.digest: image for item in ready for image in item.images}
        pixels = {key: {"pixel_values": image.pixels[None]} for key, image in images.items()}
        tokens = dict.fromkeys(pixels, self._model.image_token_count or 0)
        found = self._features.of(pixels, tokens, device)
        made = []
        for item in ready:
            of_item = [found[image.digest][0] for image in item.images]
            joined = (torch.cat(of_item),) if of_item else None
            made.append(row_of(self._model, self._embed, item.inputs, joined, item.key))
        return made


class GeneralRows:
    """Any family of ours with its own processor, which writes the prompt.

    Args:
        embed: of the language model, which is given embeddings; None to call `generate` instead.
    """

    def __init__(
        self, model: VisionLanguageModel, prompts: PromptBuilder, embed: Any = None
    ) -> None:
        self._model = model
        self._chat = copy.copy(prompts)
        self._chat.processor = processor = copy.copy(prompts.processor)
        self._images = _OnceAnImage(processor.image_processor)
        processor.image_processor = self._images
        self._embed = embed
        self._features = Features(model)

    def prepare(self, items: Sequence[Ready]) -> list[Ready]:
        """With their inputs."""
        made = []
        for item in items:
            self._images.key = item.key
            inputs = dict(self._chat.processed([item.prompt], [[p.image for p in item.images]]))
            ids = inputs["input_ids"][0].tolist()
            made.append(item.tokenised(ids, self._model.image_token_id, inputs))
        return made

    def rows(self, ready: Sequence[Ready]) -> list[Row]:
        """One row a question, in order."""
        found = self._found(ready, self._embed.weight.device)
        return [
            row_of(self._model, self._embed, item.inputs, found.get(item.key), item.key)
            for item in ready
        ]

    def padded(self, ready: Sequence[Ready]) -> dict[str, Any]:
        """What `generate` is given, padded in front; each image is encoded once."""
        device = self._model.whole.device
        longest = max(len(item.ids) for item in ready)
        pad = self._chat.processor.tokenizer.pad_token_id or 0
        made: dict[str, Any] = {}
        for name in ready[0].inputs:
            given = [item.inputs[name] for item in ready if name in item.inputs]
            if name not in OF_IMAGES and all(each.ndim == 2 for each in given):
                fill = pad if name == "input_ids" else 0
                wide = [
                    functional.pad(each, (longest - each.shape[1], 0), value=fill) for each in given
                ]
                made[name] = to_device(torch.cat(wide), device)
        found = self._found(ready, device)
        features = [found[item.key][0] for item in ready if item.images]
        if features:  # [images, image tokens, hidden]
            each = torch.cat(features).unflatten(0, (-1, self._model.image_token_count))
            made["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=each)}
        return made

    def _found(self, ready: Sequence[Ready], device: torch.device) -> dict[str, tuple[Tensor, ...]]:
        image = self._model.image_token_id
        seen = {item.key: item for item in ready if item.images}
        pixels = {
            key: {name: item.inputs[name] for name in OF_IMAGES if name in item.inputs}
            for key, item in seen.items()
        }
        tokens = {key: list(item.ids).count(image) for key, item in seen.items()}
        return self._features.of(pixels, tokens, device)


class Features:
    """Image embeddings by key, each computed once and kept as long as there is memory."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self._kept = Remembered()

    def of(
        self,
        pixels: Mapping[str, Mapping[str, Tensor]],
        tokens: Mapping[str, int],
        device: torch.device,
    ) -> dict[str, tuple[Tensor, ...]]:
        """`image_embeddings` of each key's images, computed for many at once.

        Args:
            pixels: what a processor made of each key's images.
            tokens: how many image tokens they have.
        """
        found = {key: self._kept[key] for key in pixels if key in self._kept}
        alike: dict[Any, list[str]] = {}
        for key in pixels:
            if key not in found:
                shapes = [(name, each.shape[1:]) for name, each in pixels[key].items()]
                alike.setdefault(str(shapes), []).append(key)
        most = VALUES_AT_A_TIME.get(device.type, MOST_VALUES)
        for keys in alike.values():  # as many tiles each, so that their tensors can be joined
            values = max(pixels[key]["pixel_values"].numel() for key in keys)
            size = max(1, most // values)
            for start in range(0, len(keys), size):
                for key, made in self._encoded(keys[start : start + size], pixels, tokens, device):
                    found[key] = self._kept[key] = made
        return found

    def _encoded(
        self,
        keys: Sequence[str],
        pixels: Mapping[str, Mapping[str, Tensor]],
        tokens: Mapping[str, int],
        device: torch.device,
    ) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        joined = {
            name: to_device(torch.cat([pixels[key][name] for key in keys]), device)
            for name in pixels[keys[0]]
        }
        made = self._model.image_embeddings(joined)
        sizes = [tokens[key] for key in keys]
        if len(keys) == 1:
            yield keys[0], made
        elif sum(sizes) == len(made[0]):
            yield from zip(
                keys, zip(*(each.split(sizes) for each in made), strict=True), strict=True
            )
        else:  # the one that does not fit its text is to say so
            for key in keys:
                yield from self._encoded([key], pixels, tokens, device)


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
    inputs: Any,
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
    # On the CPU, where the processor made it: a device would have to be waited for.
    input_ids = inputs["input_ids"]  # [1, length]
    device = embed.weight.device
    is_image = input_ids == model.image_token_id  # [1, length]
    # A placeholder may lie outside the embedding table; its row is overwritten below.
    embeddings: Tensor = embed(to_device(input_ids.masked_fill(is_image, 0), device))[0]
    places = is_image[0].nonzero().flatten()
    found = 0 if features is None else len(features[0])
    if found != len(places):
        raise UsageError(
            f"The images give {found} image tokens, the text has {len(places)} places.",
            "Use the processor of this checkpoint and do not truncate inside an image.",
        )
    ids = input_ids[0].tolist()
    prefix = 0
    deep: tuple[Tensor, ...] = ()
    if features is not None:
        image = features[0].to(embeddings.dtype)
        embeddings = embeddings.index_copy(0, to_device(places, device), image)
        prefix, deep = int(places[-1]) + 1, features[1:]
    shared = f"{key}{ids[:prefix]}" if prefix else ""
    positions = to_device(_positions(model, inputs, is_image), device)
    return Row(ids, embeddings, positions, prefix, shared, deep, to_device(is_image[0], device))


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
