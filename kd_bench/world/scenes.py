"""What an image shows, in English and Chinese words; its sampling, its split, and its pixels.

Pixels are drawn in integers only, so that they are the same on every machine.
"""

import hashlib
import io
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

# --- words ----------------------------------------------------------------------------------------

COLOURS = ("red", "yellow", "green", "blue")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ("night", "sea", "forest", "soil")
FRAMES = ("gold", "silver")
SIGN_WORDS = ("bank", "cake", "fish", "milk", "shoe", "taxi")
# A shape's given name and an arrangement's name: knowledge that no single image shows.
NAMES = {"circle": "Otto", "square": "Boris", "triangle": "Tina", "cross": "Max"}
LANDMARKS = ("Tower", "Wall", "Stairs")
# What shapes of a colour are like: the world's science.
TRAITS = {"red": "warm", "yellow": "sweet", "green": "soft", "blue": "heavy"}


CHINESE = {
    "red": "红色", "yellow": "黄色", "green": "绿色", "blue": "蓝色",
    "circle": "圆形", "square": "方形", "triangle": "三角形", "cross": "十字",
    "small": "小", "large": "大",
    "top left": "左上", "top right": "右上", "bottom left": "左下", "bottom right": "右下",
    "night": "夜晚", "sea": "大海", "forest": "森林", "soil": "泥土",
    "yes": "是", "no": "否",
}  # fmt: skip
# Other Chinese words of the questions: with CHINESE, what the tokenizer splits text by.
CHINESE_PARTICLES = ("图中", "有几个", "图形", "什么", "颜色", "哪个", "在", "哪里", "的", "写着",
                     "数字", "单词", "场景", "这是", "大小", "有")  # fmt: skip


def chinese(word: str) -> str:
    """Return the Chinese of a word; numbers and words on signs stay as they are."""
    return CHINESE.get(word, word)


# Every English word of images, questions and answers beside the places: with CHINESE, digits,
# option letters and the benchmarks' fixed lines, what the tokenizer knows.
_ENGLISH = """
Are Boris Can Context Describe Does How Is It List Max Otto Stairs Tina Tower Wall What Where
Which a above and are artwork at bank below blue cake called circle circles color cross crosses
digit digits first fish forest four frame gold green heavy image in is large last left many milk
night no number of on one photo picture poster red right roll same scene sea second shape shapes
shoe show shows sign silver size small soft soil square squares sum sweet taxi the there third
this three to triangle triangles two unanswerable warm word yellow yes
"""
ENGLISH = tuple(_ENGLISH.split())

# --- scenes ---------------------------------------------------------------------------------------

GRID = 2


@dataclass(frozen=True)
class Shape:
    """One coloured shape in a cell of the grid."""

    name: str  # one of SHAPES
    colour: str  # one of COLOURS
    size: str  # one of SIZES
    cell: int  # 0 to 3, row by row

    @property
    def row(self) -> int:
        """Row of the grid, 0 at the top."""
        return self.cell // GRID

    @property
    def column(self) -> int:
        """Column of the grid, 0 at the left."""
        return self.cell % GRID

    @property
    def place(self) -> str:
        """One of PLACES."""
        return PLACES[self.cell]


@dataclass(frozen=True)
class Sign:
    """A white plate with a word or a number on it."""

    text: str  # lower case; drawn in capitals
    cell: int

    @property
    def is_number(self) -> bool:
        """Whether the sign shows a number rather than a word."""
        return self.text.isdigit()


@dataclass(frozen=True)
class Scene:
    """A whole image before it is drawn."""

    background: str
    shapes: tuple[Shape, ...]
    signs: tuple[Sign, ...] = ()
    frame: str = ""  # one of FRAMES, or none
    blur: int = 0  # radius of the box filter in pixels
    grain: int = 0  # seed of the pixel noise

    def canonical(self) -> str:
        """Return what the scene shows, without the pixel noise."""
        shapes = sorted(f"{s.cell} {s.size} {s.colour} {s.name}" for s in self.shapes)
        signs = sorted(f"{s.cell} {s.text}" for s in self.signs)
        parts = [self.background, self.frame, str(self.blur), *shapes, *signs]
        return "|".join(parts)

    def split(self) -> str:
        """Return the one split in which this scene may appear, from its digest."""
        bucket = hashlib.sha256(self.canonical().encode()).digest()[0] % 10
        return "validation" if bucket == 8 else "test" if bucket == 9 else "train"

    def landmark(self) -> str:
        """Return the name of the arrangement of exactly two shapes, or an empty string."""
        if len(self.shapes) != 2:
            return ""
        a, b = self.shapes
        if a.column == b.column:
            return "Tower"
        return "Wall" if a.row == b.row else "Stairs"


def _draft(rng: Random, kind: str, blur: int) -> Scene:
    """Sample one scene of any split; kind is full | single | sign | plate."""
    background = rng.choice(BACKGROUNDS)
    frame = rng.choice(FRAMES) if rng.randrange(4) == 0 else ""
    grain = rng.getrandbits(32)
    if kind == "single":
        count, signs = 1, 0
    elif kind == "plate":
        count, signs = 0, 1
    elif kind == "sign":
        count, signs = rng.randint(1, 2), rng.randint(1, 2)
    else:
        count, signs = rng.randint(2, 3), int(rng.randrange(3) == 0)
    cells = rng.sample(range(GRID * GRID), count)
    names = rng.sample(SHAPES, count)
    if count > 2 and rng.randrange(5) < 2:  # mostly different kinds, sometimes one kind twice
        names[1] = names[0]
    shapes = tuple(
        Shape(name, rng.choice(COLOURS), rng.choice(SIZES), cell)
        for name, cell in zip(names, cells, strict=True)
    )
    free = [cell for cell in range(GRID * GRID) if cell not in cells]
    number = bool(rng.randrange(2))
    plates = []
    for cell in rng.sample(free, signs):
        plates.append(Sign(str(rng.randrange(10, 100)) if number else rng.choice(SIGN_WORDS), cell))
        number = not number
    return Scene(background, shapes, tuple(plates), frame, blur, grain)


def sample_scene(rng: Random, split: str, kind: str = "full", blur: int = 0) -> Scene:
    """Sample a scene of a split: kind is full, sign, single (one shape) or plate (one sign)."""
    while True:
        scene = _draft(rng, kind, blur)
        if scene.split() == split:
            return scene


# --- drawing --------------------------------------------------------------------------------------

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


def png(scene: Scene) -> bytes:
    """Return a scene's image as the bytes of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels(scene)).save(buffer, format="PNG")
    return buffer.getvalue()
