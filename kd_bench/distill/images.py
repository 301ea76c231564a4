"""One way to open an image, for training and evaluation alike."""

import io
import threading
import warnings
from pathlib import Path

from PIL import Image, ImageFile

MAX_PIXELS = 100_000_000
"""Larger images are not decoded: 0.3 GB as RGB, and every processor scales them down anyway."""

ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE = 258  # the TIFF tag
SIXTEEN_BITS = {"PNG", "PPM"}  # formats whose mode "I" holds 0 to 65,535

_settings = threading.Lock()  # Pillow's are those of the whole process


class Unreadable(Exception):  # noqa: N818 - a finding, not a failure of the program
    """One sample cannot be used; the message says why."""


def open_image(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one image fully: RGB of 8 bits, upright by its EXIF tag.

    16-bit greyscale is scaled by the format's full range. Pixels without a stated range (floats,
    32-bit integers) are refused, because a converter would clip them without a word.

    Raises:
        Unreadable: missing, damaged, truncated, larger than `max_pixels`, or no image.
    """
    name = source.name if isinstance(source, Path) else "an embedded image"
    try:
        with _settings:
            kept = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
            # lmms-eval switches the second one on: half an image would come back grey.
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
            try:
                with warnings.catch_warnings():  # about tags that nobody here reads
                    warnings.simplefilter("ignore")
                    return _decoded(source, max_pixels)
            finally:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = kept
    except Unreadable as error:
        raise Unreadable(f"{name}: {error}") from None
    except FileNotFoundError:
        raise Unreadable(f"{name} is missing") from None
    except Exception as error:  # decoders raise whatever their format suggests to them
        raise Unreadable(
            f"{name}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None


def _decoded(source: Path | bytes, max_pixels: int) -> Image.Image:
    with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as opened:
        if opened.width * opened.height > max_pixels:
            raise Unreadable(
                f"{opened.width} x {opened.height} pixels are more than the {max_pixels:,} allowed"
            )
        opened.load()
        upright = UPRIGHT.get(_orientation(opened))
        image = _eight_bits(opened).convert("RGB")
        return image if upright is None else image.transpose(upright)


def _orientation(image: Image.Image) -> int:
    """The EXIF tag's value; 0 where there is none or the tags are damaged."""
    try:
        return int(image.getexif().get(ORIENTATION) or 0)
    except Exception:
        return 0


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of more than 8 bits scaled from 0 to its format's largest value."""
    import numpy as np

    if image.mode == "I" and image.format in SIXTEEN_BITS:
        bits = 16
    elif image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        bits = int(tags.get(BITS_PER_SAMPLE, (16,))[0])
    elif image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise Unreadable(f"{kind} pixels have no stated range; save it with 8 or 16 bits a pixel")
    else:
        return image
    largest = (1 << bits) - 1
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + largest // 2) // largest).astype(np.uint8))
