"""Questions about a scene, with the answer and wrong answers that are worth offering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from kd_bench.world import words
from kd_bench.world.scenes import Scene, Shape, Sign
from kd_bench.world.words import chinese


@dataclass(frozen=True)
class Question:
    """One question in two languages; the answers are English words, numbers or signs."""

    kind: str  # the name of its maker in KINDS
    english: str
    chinese: str
    answer: str
    wrong: tuple[str, ...]  # at least one, the most tempting first


Maker = Callable[[Scene, Random], Question | None]


def _others(
    rng: Random, answer: str, pool: Sequence[str], near: Sequence[str] = ()
) -> tuple[str, ...]:
    """Order the wrong answers: those present in the scene first, the rest shuffled."""
    tempting = sorted({word for word in near if word != answer})
    rest = [word for word in pool if word != answer and word not in tempting]
    rng.shuffle(tempting)
    rng.shuffle(rest)
    return (*tempting, *rest)


def _only(scene: Scene, attribute: str) -> list[Shape]:
    """Return the shapes that no other shape shares the attribute with."""
    values = [getattr(shape, attribute) for shape in scene.shapes]
    return [s for s in scene.shapes if values.count(getattr(s, attribute)) == 1]


def _pick(rng: Random, items: Sequence[Shape]) -> Shape | None:
    return rng.choice(items) if items else None


def colour_of(scene: Scene, rng: Random) -> Question | None:
    """Ask for the colour of the one shape of its kind."""
    shape = _pick(rng, _only(scene, "name"))
    if shape is None:
        return None
    wrong = _others(rng, shape.colour, words.COLOURS, [s.colour for s in scene.shapes])
    zh = f"{chinese(shape.name)}是什么颜色?"
    return Question("colour_of", f"What color is the {shape.name}?", zh, shape.colour, wrong)


def shape_of(scene: Scene, rng: Random) -> Question | None:
    """Ask which shape has a colour."""
    shape = _pick(rng, _only(scene, "colour"))
    if shape is None:
        return None
    wrong = _others(rng, shape.name, words.SHAPES, [s.name for s in scene.shapes])
    zh = f"{chinese(shape.colour)}的是什么图形?"
    return Question("shape_of", f"What shape is {shape.colour}?", zh, shape.name, wrong)


def size_of(scene: Scene, rng: Random) -> Question | None:
    """Ask for the size of the one shape of its kind."""
    shape = _pick(rng, _only(scene, "name"))
    if shape is None:
        return None
    wrong = _others(rng, shape.size, words.SIZES)
    zh = f"{chinese(shape.name)}的大小?"
    return Question("size_of", f"What size is the {shape.name}?", zh, shape.size, wrong)


def place_of(scene: Scene, rng: Random) -> Question | None:
    """Ask where the one shape of its kind is."""
    shape = _pick(rng, _only(scene, "name"))
    if shape is None:
        return None
    near = [words.PLACES[s.cell] for s in scene.shapes]
    answer = words.PLACES[shape.cell]
    wrong = _others(rng, answer, words.PLACES, near)
    zh = f"{chinese(shape.name)}在哪里?"
    return Question("place_of", f"Where is the {shape.name}?", zh, answer, wrong)


def shape_at(scene: Scene, rng: Random) -> Question | None:
    """Ask which shape is at a place."""
    shape = rng.choice(scene.shapes)
    place = words.PLACES[shape.cell]
    wrong = _others(rng, shape.name, words.SHAPES, [s.name for s in scene.shapes])
    zh = f"{chinese(place)}是什么图形?"
    return Question("shape_at", f"What shape is at the {place}?", zh, shape.name, wrong)


def colour_at(scene: Scene, rng: Random) -> Question | None:
    """Ask for the colour of the shape at a place."""
    shape = rng.choice(scene.shapes)
    place = words.PLACES[shape.cell]
    wrong = _others(rng, shape.colour, words.COLOURS, [s.colour for s in scene.shapes])
    zh = f"{chinese(place)}的图形是什么颜色?"
    english = f"What color is the shape at the {place}?"
    return Question("colour_at", english, zh, shape.colour, wrong)


def size_at(scene: Scene, rng: Random) -> Question | None:
    """Ask for the size of the shape at a place."""
    shape = rng.choice(scene.shapes)
    place = words.PLACES[shape.cell]
    zh = f"{chinese(place)}的图形的大小?"
    english = f"What size is the shape at the {place}?"
    return Question("size_at", english, zh, shape.size, _others(rng, shape.size, words.SIZES))


def _counted(rng: Random, answer: int) -> tuple[str, ...]:
    near = [str(n) for n in (answer - 1, answer + 1) if n >= 0]
    return _others(rng, str(answer), [str(n) for n in range(4)], near)


def count(scene: Scene, rng: Random) -> Question | None:
    """Ask how many shapes there are, in all or of one kind or colour."""
    what = rng.randrange(3)
    if what == 0:
        n, english, zh = len(scene.shapes), "How many shapes are there?", "图中有几个图形?"
    elif what == 1:
        name = rng.choice(scene.shapes).name if rng.randrange(4) else rng.choice(words.SHAPES)
        n = sum(s.name == name for s in scene.shapes)
        english, zh = f"How many {plural(name)} are there?", f"图中有几个{chinese(name)}?"
    else:
        colour = rng.choice(scene.shapes).colour
        n = sum(s.colour == colour for s in scene.shapes)
        english, zh = f"How many shapes are {colour}?", f"图中有几个{chinese(colour)}的图形?"
    return Question("count", english, zh, str(n), _counted(rng, n))


def plural(name: str) -> str:
    """Return the English plural of a shape's name."""
    return "crosses" if name == "cross" else f"{name}s"


def _sign(scene: Scene, rng: Random, number: bool) -> Sign | None:
    signs = [sign for sign in scene.signs if sign.is_number == number]
    return rng.choice(signs) if len(signs) == 1 else None


def word(scene: Scene, rng: Random) -> Question | None:
    """Ask for the word on the sign."""
    sign = _sign(scene, rng, number=False)
    if sign is None:
        return None
    wrong = _others(rng, sign.text, words.SIGN_WORDS)
    return Question("word", "What is the word on the sign?", "写着什么单词?", sign.text, wrong)


def number(scene: Scene, rng: Random) -> Question | None:
    """Ask for the number on the sign; wrong answers share one digit where they can."""
    sign = _sign(scene, rng, number=True)
    if sign is None:
        return None
    tens, units = sign.text[0], sign.text[1]
    near = [f"{rng.randint(1, 9)}{units}", f"{tens}{rng.randint(0, 9)}", units + tens]
    near = [text for text in near if text[0] != "0"]
    wrong = _others(rng, sign.text, [str(n) for n in rng.sample(range(10, 100), 4)], near)
    return Question("number", "What is the number on the sign?", "写着什么数字?", sign.text, wrong)


def digit(scene: Scene, rng: Random) -> Question | None:
    """Ask for one digit of the number on the sign."""
    sign = _sign(scene, rng, number=True)
    if sign is None:
        return None
    place = rng.randrange(2)
    wrong = _others(rng, sign.text[place], "0123456789", sign.text)
    english = f"What is the {('first', 'last')[place]} digit on the sign?"
    return Question("digit", english, "写着什么数字?", sign.text[place], wrong)


def background(scene: Scene, rng: Random) -> Question | None:
    """Ask for the scene's background."""
    wrong = _others(rng, scene.background, words.BACKGROUNDS)
    return Question("background", "What scene is this?", "这是什么场景?", scene.background, wrong)


def trait(scene: Scene, rng: Random) -> Question | None:
    """Ask what the one shape of its kind is like, which its colour decides."""
    shape = _pick(rng, _only(scene, "name"))
    thing = f"the {shape.name}" if shape else ""
    if shape is None:
        shape = rng.choice(scene.shapes)
        thing = f"the shape at the {words.PLACES[shape.cell]}"
    answer = words.TRAITS[shape.colour]
    near = [words.TRAITS[s.colour] for s in scene.shapes]
    wrong = _others(rng, answer, list(words.TRAITS.values()), near)
    return Question("trait", f"How is {thing}?", "", answer, wrong)


def name_of(scene: Scene, rng: Random) -> Question | None:
    """Ask for the given name of the one shape of a colour."""
    shape = _pick(rng, _only(scene, "colour"))
    if shape is None:
        return None
    wrong = tuple(words.NAMES[s] for s in _others(rng, shape.name, words.SHAPES))
    english = f"What is the {shape.colour} shape called?"
    return Question("name_of", english, "", words.NAMES[shape.name], wrong)


def landmark(scene: Scene, rng: Random) -> Question | None:
    """Ask for the name of the arrangement of two shapes."""
    name = scene.landmark()
    if not name:
        return None
    return Question("landmark", "What is this?", "", name, _others(rng, name, words.LANDMARKS))


def frame(scene: Scene, rng: Random) -> Question | None:
    """Ask for the colour of the frame."""
    if not scene.frame:
        return None
    wrong = _others(rng, scene.frame, words.FRAMES)
    return Question("frame", "What is the frame?", "", scene.frame, wrong)


def total(scene: Scene, rng: Random) -> Question | None:
    """Ask for the sum of the two digits on the sign."""
    sign = _sign(scene, rng, number=True)
    if sign is None:
        return None
    answer = sum(map(int, sign.text))
    near = [n for n in (answer - 2, answer - 1, answer + 1, answer + 2) if n > 0]
    wrong = tuple(str(n) for n in rng.sample(near, len(near)))
    english = "What is the sum of the two digits on the sign?"
    return Question("total", english, "", str(answer), wrong)


SIDES = ("to the left of", "to the right of", "above", "below")  # opposites side by side


def _holds(side: str, a: Shape, b: Shape) -> bool:
    """Whether a is on that side of b."""
    if side in SIDES[:2]:
        return a.column < b.column if side == SIDES[0] else a.column > b.column
    return a.row < b.row if side == SIDES[2] else a.row > b.row


def beside(scene: Scene, rng: Random) -> Question | None:
    """Ask for the colour or kind of the one shape on a side of another."""
    found = []
    for anchor in _only(scene, "name"):
        for side in SIDES:
            there = [s for s in scene.shapes if _holds(side, s, anchor)]
            if len(there) == 1:
                found.append((side, anchor, there[0]))
    if not found:
        return None
    side, anchor, shape = rng.choice(found)
    if rng.randrange(2):
        wrong = _others(rng, shape.colour, words.COLOURS, [s.colour for s in scene.shapes])
        english = f"What color is the shape {side} the {anchor.name}?"
        return Question("beside", english, "", shape.colour, wrong)
    wrong = _others(rng, shape.name, words.SHAPES, [s.name for s in scene.shapes])
    english = f"What shape is {side} the {anchor.name}?"
    return Question("beside", english, "", shape.name, wrong)


def _yes_no(kind: str, english: str, truth: bool) -> Question:
    answer, wrong = ("yes", "no") if truth else ("no", "yes")
    return Question(kind, english, "", answer, (wrong,))


def relation(scene: Scene, rng: Random) -> Question | None:
    """Ask whether one shape is on a side of another, in columns or rows that differ."""
    single = _only(scene, "name")
    if len(single) < 2:
        return None
    a, b = rng.sample(single, 2)
    fitting = [*(SIDES[:2] if a.column != b.column else ())]
    fitting += SIDES[2:] if a.row != b.row else ()
    side = rng.choice(fitting)
    return _yes_no("relation", f"Is the {a.name} {side} the {b.name}?", _holds(side, a, b))


def same(scene: Scene, rng: Random) -> Question | None:
    """Ask whether two shapes share their colour or size."""
    single = _only(scene, "name")
    if len(single) < 2:
        return None
    a, b = rng.sample(single, 2)
    said, attribute = rng.choice([("color", "colour"), ("size", "size")])
    truth = getattr(a, attribute) == getattr(b, attribute)
    return _yes_no("same", f"Are the {a.name} and the {b.name} the same {said}?", truth)


KINDS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (colour_of, shape_of, size_of, place_of, shape_at, colour_at, size_at, count, word,
                  number, digit, background, trait, name_of, landmark, frame, total, beside,
                  relation, same)
}  # fmt: skip


def ask(scene: Scene, rng: Random, kinds: Sequence[str]) -> Question | None:
    """Ask one question of one of the kinds, or None where no kind fits the scene."""
    for kind in rng.sample(kinds, len(kinds)):
        question = KINDS[kind](scene, rng)
        if question is not None:
            return question
    return None


def caption(scene: Scene) -> str:
    """Describe a whole scene, reading the grid row by row."""
    parts = {s.cell: f"{s.size} {s.colour} {s.name}" for s in scene.shapes}
    parts |= {s.cell: f"sign {s.text}" for s in scene.signs}
    frame = f" in a {scene.frame} frame" if scene.frame else ""
    listed = ", ".join(f"{words.PLACES[cell]} {parts[cell]}" for cell in sorted(parts))
    return f"{scene.background}{frame}: {listed}."
