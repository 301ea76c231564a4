"""One way to open an image: upright, of 8 bits, never clipped, the same for training and eval."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from kd_bench.distill.data import MAX_PIXELS, Unreadable, open_image
from kd_bench.evals.documents import decode_image

KINDS = ("png", "jpeg", "webp", "avif", "dds", "tiff", "gif", "bmp", "ico")
RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0, 257, ..., 65535


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners() -> Image.Image:
    """Red, green, blue and white quarters, wider than high."""
    image = Image.new("RGB", (32, 16), "white")
    for box, colour in (((0, 0), "red"), ((16, 0), "green"), ((0, 8), "blue")):
        image.paste(colour, (*box, box[0] + 16, box[1] + 8))
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_upright_by_the_exif_tag(orientation: int, kind: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "jpeg" else {}
    data = encoded(corners(), kind, exif=exif.tobytes(), **options)
    found = open_image(data)
    with Image.open(io.BytesIO(data)) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    assert found.size == expected.size
    assert (np.asarray(found) == np.asarray(expected)).all()
    assert found.size == ((16, 32) if orientation >= 5 else (32, 16))


def test_damaged_exif_is_no_reason_to_lose_an_image() -> None:
    data = encoded(corners(), "jpeg", exif=b"Exif\0\0damaged")
    assert open_image(data).size == (32, 16)


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm", "jpeg2000"])
def test_sixteen_bits_are_scaled_by_the_formats_range(kind: str) -> None:
    image = Image.fromarray(RAMP)
    if kind == "ppm":
        data = b"P5\n16 16\n65535\n" + RAMP.astype(">u2").tobytes()
    else:
        data = encoded(image, kind)
    found = np.asarray(open_image(data))
    assert (found == np.arange(256).reshape(16, 16, 1)).all()


def test_a_dark_ramp_stays_a_ramp() -> None:
    """0 to 3,069 of 65,535, as depth cameras write: dark, not white."""
    ramp = np.linspace(0, 3069, 256).astype(np.uint16).reshape(16, 16)
    found = np.asarray(open_image(encoded(Image.fromarray(ramp), "png")))[..., 0]
    assert found.max() == 12
    assert (np.diff(found.reshape(-1).astype(int)) >= 0).all()


@pytest.mark.parametrize(
    "values,reason",
    [(np.float32, "floating-point"), (np.int32, "32-bit")],
)
def test_pixels_without_a_range_are_refused(values: Any, reason: str) -> None:
    data = encoded(Image.fromarray(RAMP.astype(values)), "tiff")
    with pytest.raises(Unreadable, match=f"{reason}.*no stated range"):
        open_image(data)
    with pytest.raises(Unreadable, match="no stated range"):
        decode_image(data)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_training_and_evaluation_see_the_same(mode: str) -> None:
    image = corners().convert(mode) if mode != "I;16" else Image.fromarray(RAMP)
    kind = "tiff" if mode in ("CMYK", "YCbCr") else "png"
    data = encoded(image, kind)
    found = open_image(data)
    assert found.mode == "RGB"
    assert decode_image(data).tobytes() == found.tobytes()


@pytest.mark.slow
def test_the_bound_of_pixels(tmp_path: Path) -> None:
    data = encoded(Image.new("L", (400, 300)), "png")
    assert open_image(data, max_pixels=120_000).size == (400, 300)
    with pytest.raises(Unreadable, match="400 x 300 pixels are more than the 119,999 allowed"):
        open_image(data, max_pixels=119_999)
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(encoded(Image.new("1", (30_000, 30_000)), "png"))
    with pytest.raises(Unreadable, match=r"bomb\.png: 30000 x 30000 pixels"):
        open_image(bomb)
    assert Image.MAX_IMAGE_PIXELS is not None  # Pillow's own bound is left as it was
    assert MAX_PIXELS < 30_000**2


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_any_kind_is_unreadable_never_another_error(kind: str) -> None:
    data = encoded(corners(), kind)
    rng = np.random.default_rng(0)
    for cut in rng.integers(1, len(data), 20):
        attempt(data[:cut])
    for _ in range(60):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), 6):
            changed[place] = rng.integers(0, 256)
        attempt(bytes(changed))


def attempt(data: bytes) -> None:
    reason = ""
    try:
        assert open_image(data, max_pixels=1_000_000).mode == "RGB"
    except Unreadable as error:
        reason = str(error)
    assert "\n" not in reason


def test_half_an_image_is_unreadable_whatever_others_switched_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval does
    data = encoded(Image.effect_noise((64, 64), 80), "png")
    with pytest.raises(Unreadable, match="an embedded image"):
        open_image(data[:-900])
    assert ImageFile.LOAD_TRUNCATED_IMAGES
