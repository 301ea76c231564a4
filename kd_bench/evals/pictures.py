"""Decode and prepare each picture once, also across the checkpoints of one process."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd_bench.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image


KEPT_PICTURES = 500
KEPT_SIDE = 512  # pixels


@dataclass(frozen=True)
class Prepared:
    """One picture, ready for the vision tower.

    Attributes:
        digest: of its decoded RGB pixels.
        pixels: [channels, height, width], as the checkpoint's image processor makes them; empty
            where the processor is given the picture itself.
        image: the decoded picture, where the processor wants it.
    """

    digest: str
    pixels: Tensor
    image: "Image | None" = None


def pixel_digest(picture: "Image") -> str:
    """sha256 over size and RGB pixels, shortened; equal for equal pictures in any file format."""
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    return hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()[:32]


def keep_pictures(
    folder: Path, digests: Sequence[str], decode: Callable[[int], Sequence["Image"]]
) -> None:
    """Keep a benchmark's pictures for people to look at, as `<first 16 digits of digest>.png`.

    At most 500, those with the smallest digests: every model's run asks for the same ones.

    Args:
        digests: of each document's first picture; empty without one.
        decode: the pictures of the document with that number.
    """
    numbers = {digest: number for number, digest in enumerate(digests) if digest}
    for digest in sorted(numbers)[:KEPT_PICTURES]:
        file = folder / f"{digest[:16]}.png"
        if not file.exists():
            picture = decode(numbers[digest])[0].convert("RGB")
            picture.thumbnail((KEPT_SIDE, KEPT_SIDE))
            with atomic_path(file) as temporary:
                picture.save(temporary, format="png")


class PictureStore:
    """Prepared pictures by key, least recently used first, bounded in bytes.

    Equal image processors share entries, so several checkpoints of one family prepare once.
    """

    def __init__(self, limit_bytes: int = 256 << 20) -> None:
        self._limit = limit_bytes
        self._size = 0
        self._entries: OrderedDict[tuple[str, str], list[Prepared]] = OrderedDict()

    def get(
        self, key: str, decode: Callable[[], Sequence["Image"]], processor: Any
    ) -> list[Prepared]:
        """The pictures behind `key`; an empty key is prepared anew each time.

        Without a processor they are decoded and kept as they are.
        """
        place = (_identity(processor), key)
        if key and place in self._entries:
            self._entries.move_to_end(place)
            return self._entries[place]
        prepared = [_prepare(picture, processor) for picture in decode()]
        if key:
            self._entries[place] = prepared
            self._size += _bytes(prepared)
            while self._size > self._limit and len(self._entries) > 1:
                self._size -= _bytes(self._entries.popitem(last=False)[1])
        return prepared


def _prepare(picture: "Image", processor: Any) -> Prepared:
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    if processor is None:
        return Prepared(pixel_digest(rgb), torch.empty(0), rgb)
    pixels = processor(images=[rgb], return_tensors="pt")["pixel_values"]
    tensor = torch.as_tensor(pixels[0])  # [channels, height, width]
    return Prepared(pixel_digest(rgb), tensor)


def _bytes(prepared: Sequence[Prepared]) -> int:
    tensors = sum(item.pixels.numel() * item.pixels.element_size() for item in prepared)
    images = sum(3 * item.image.width * item.image.height for item in prepared if item.image)
    return tensors + images


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
