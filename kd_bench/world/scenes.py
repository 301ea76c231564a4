"""What is in a picture: scenes, their sampling, and the split that each belongs to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random

from kd_bench.world import words

GRID = 2
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Shape:
    """One coloured shape in a cell of the grid."""

    name: str  # one of words.SHAPES
    colour: str  # one of words.COLOURS
    size: str  # one of words.SIZES
    cell: int  # 0 to 3, row by row

    @property
    def row(self) -> int:
        """Row of the grid, 0 at the top."""
        return self.cell // GRID

    @property
    def column(self) -> int:
        """Column of the grid, 0 at the left."""
        return self.cell % GRID


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
    """A whole picture before it is drawn."""

    background: str
    shapes: tuple[Shape, ...]
    signs: tuple[Sign, ...] = ()
    frame: str = ""  # one of words.FRAMES, or none
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


def _shape(rng: Random, name: str, cell: int) -> Shape:
    return Shape(name, rng.choice(words.COLOURS), rng.choice(words.SIZES), cell)


def _sign(rng: Random, cell: int, number: bool) -> Sign:
    text = str(rng.randrange(10, 100)) if number else rng.choice(words.SIGN_WORDS)
    return Sign(text, cell)


def _names(rng: Random, count: int) -> list[str]:
    """Mostly different kinds, sometimes one kind twice."""
    names = rng.sample(words.SHAPES, count)
    if count > 2 and rng.randrange(5) < 2:
        names[1] = names[0]
    return names


def _draft(rng: Random, kind: str) -> Scene:
    """Sample one scene of any split; kind is full | single | sign | plate."""
    background = rng.choice(words.BACKGROUNDS)
    frame = rng.choice(words.FRAMES) if rng.randrange(4) == 0 else ""
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
    shapes = tuple(
        _shape(rng, name, cell) for name, cell in zip(_names(rng, count), cells, strict=True)
    )
    free = [cell for cell in range(GRID * GRID) if cell not in cells]
    first_number = bool(rng.randrange(2))
    plates = tuple(
        _sign(rng, cell, number=first_number != bool(k))
        for k, cell in enumerate(rng.sample(free, signs))
    )
    return Scene(background, shapes, plates, frame, 0, grain)


def sample_scene(rng: Random, split: str, kind: str = "full", blur: int = 0) -> Scene:
    """Sample a scene of a split: kind is full, sign, single (one shape) or plate (one sign)."""
    while True:
        draft = _draft(rng, kind)
        scene = Scene(draft.background, draft.shapes, draft.signs, draft.frame, blur, draft.grain)
        if scene.split() == split:
            return scene
