"""Draw a scene: integers only, so that pixels are the same on every machine."""

from __future__ import annotations

import io
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kd_bench.world.scenes import GRID, Scene, Shape, Sign

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = 16
SIDE = GRID * CELL

# Shapes and signs are brighter than every background.
_PAINT = {
    "red": (235, 50, 50),
    "yellow": (240, 235, 80),
    "green": (60, 210, 80),
    "blue": (70, 120, 255),
    "night": (12, 12, 20),
    "sea": (12, 38, 66),
    "forest": (14, 46, 20),
    "soil": (58, 36, 20),
    "gold": (150, 116, 30),
    "silver": (124, 128, 136),
}
_RADIUS = {"small": 4, "large": 6}
_NOISE = 6  # largest change of a channel by the grain
_TINT = 10  # largest change of a shape's whole colour

# Rows of 3x5 glyphs, three bits a row, from the top.
_GLYPHS = {
    "A": 0o25755, "B": 0o65656, "C": 0o34443, "D": 0o65556, "E": 0o74647, "F": 0o74644,
    "G": 0o34553, "H": 0o55755, "I": 0o72227, "J": 0o11152, "K": 0o55655, "L": 0o44447,
    "M": 0o57755, "N": 0o65555, "O": 0o25552, "P": 0o65644, "Q": 0o25563, "R": 0o65655,
    "S": 0o34216, "T": 0o72222, "U": 0o55557, "V": 0o55552, "W": 0o55775, "X": 0o55255,
    "Y": 0o55222, "Z": 0o71247, "0": 0o75557, "1": 0o26227, "2": 0o71747, "3": 0o71317,
    "4": 0o55711, "5": 0o74717, "6": 0o74757, "7": 0o71122, "8": 0o75757, "9": 0o75717,
}  # fmt: skip


def _mask(shape: Shape) -> Any:
    """Return the shape's pixels inside its cell as a (16, 16) boolean array."""
    r = _RADIUS[shape.size]
    y, x = np.mgrid[0:CELL, 0:CELL]
    x, y = x - CELL // 2, y - CELL // 2
    box = (abs(x) <= r) & (abs(y) <= r)
    if shape.name == "circle":
        return x * x + y * y <= r * r + 1
    if shape.name == "square":
        return (abs(x) < r) & (abs(y) < r)
    if shape.name == "triangle":
        return box & (2 * abs(x) <= y + r)
    return box & ((abs(x) <= r // 4) | (abs(y) <= r // 4))


def _draw_sign(cell: NDArray[Any], sign: Sign) -> None:
    """Write a sign's text on a white plate into a (16, 16, 3) cell, in place.

    The text lies in the cell's lower half: a patch of 8 x 8 pixels holds a glyph's whole height.
    """
    cell[7:14] = 245
    left = (CELL - 4 * len(sign.text) + 1) // 2
    for place, character in enumerate(sign.text.upper()):
        bits = _GLYPHS[character]
        for row in range(5):
            for column in range(3):
                if bits >> (14 - 3 * row - column) & 1:
                    cell[8 + row, left + 4 * place + column] = 10


def _box_blur(pixels: NDArray[Any], radius: int) -> NDArray[Any]:
    """Mean over a square of side 2 * radius + 1, edges repeated, rounded down."""
    side = 2 * radius + 1
    for axis in (0, 1):
        width = [(radius, radius) if axis == k else (0, 0) for k in range(3)]
        padded = np.pad(pixels, width, mode="edge")
        length = pixels.shape[axis]
        shifted = [padded.take(range(k, k + length), axis) for k in range(side)]
        pixels = np.sum(shifted, axis=0) // side
    return pixels


def pixels(scene: Scene) -> NDArray[Any]:
    """Draw a scene as a (32, 32, 3) uint8 array."""
    rng = Random(f"grain {scene.grain}")
    canvas = np.zeros((SIDE, SIDE, 3), dtype=np.int64)
    canvas[:] = _PAINT[scene.frame or scene.background]
    canvas[2:-2, 2:-2] = _PAINT[scene.background]
    for shape in scene.shapes:
        y, x = shape.row * CELL, shape.column * CELL
        tint = [rng.randint(-_TINT, _TINT) for _ in range(3)]
        canvas[y : y + CELL, x : x + CELL][_mask(shape)] = np.add(_PAINT[shape.colour], tint)
    for sign in scene.signs:
        y, x = sign.cell // GRID * CELL, sign.cell % GRID * CELL
        _draw_sign(canvas[y : y + CELL, x : x + CELL], sign)
    noise = np.frombuffer(rng.randbytes(SIDE * SIDE * 3), dtype=np.uint8).reshape(canvas.shape)
    canvas += noise.astype(np.int64) % (2 * _NOISE + 1) - _NOISE
    canvas = np.clip(canvas, 0, 255)
    if scene.blur:
        canvas = _box_blur(_box_blur(canvas, scene.blur), scene.blur)
    return canvas.astype(np.uint8)


def draw(scene: Scene) -> Image:
    """Draw a scene as a 32x32 RGB picture."""
    from PIL import Image

    return Image.fromarray(pixels(scene))


def png(scene: Scene) -> bytes:
    """Return a scene's picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    draw(scene).save(buffer, format="PNG")
    return buffer.getvalue()
