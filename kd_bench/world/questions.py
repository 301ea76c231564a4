"""Questions about a scene: the answer, wrong ones worth offering, and what annotators write.

A mistake is one that a person makes: the neighbouring colour, the other size, a count off by one,
a place beside it, the wrong letter. Whoever asks holds the truth, so label quality can be measured.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from kd_bench.world import scenes
from kd_bench.world.scenes import Scene, Shape, Sign, chinese


@dataclass(frozen=True)
class Question:
    """One question in two languages; the answers are English words, numbers or signs."""

    kind: str  # a key of KINDS
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


_WORDS = {
    "colour": scenes.COLOURS,
    "name": scenes.SHAPES,
    "size": scenes.SIZES,
    "place": scenes.PLACES,
}
# Kind of question -> what singles a shape out, what is asked of it, the question in two languages.
_OF_A_SHAPE = {
    "colour_of": ("name", "colour", "What color is the {}?", "{}是什么颜色?"),
    "shape_of": ("colour", "name", "What shape is {}?", "{}的是什么图形?"),
    "size_of": ("name", "size", "What size is the {}?", "{}的大小?"),
    "place_of": ("name", "place", "Where is the {}?", "{}在哪里?"),
    "shape_at": ("place", "name", "What shape is at the {}?", "{}是什么图形?"),
    "colour_at": ("place", "colour", "What color is the shape at the {}?", "{}的图形是什么颜色?"),
    "size_at": ("place", "size", "What size is the shape at the {}?", "{}的图形的大小?"),
}


def _of_a_shape(kind: str, scene: Scene, rng: Random) -> Question | None:
    """Ask one thing of the one shape of its name, its colour or its place."""
    known, asked, english, zh = _OF_A_SHAPE[kind]
    alone = _only(scene, known)
    if not alone:
        return None
    shape = rng.choice(alone)
    word, answer = getattr(shape, known), getattr(shape, asked)
    wrong = _others(rng, answer, _WORDS[asked], [getattr(s, asked) for s in scene.shapes])
    return Question(kind, english.format(word), zh.format(chinese(word)), answer, wrong)


def count(scene: Scene, rng: Random) -> Question | None:
    """Ask how many shapes there are, in all or of one kind or colour."""
    what = rng.randrange(3)
    if what == 0:
        n, english, zh = len(scene.shapes), "How many shapes are there?", "图中有几个图形?"
    elif what == 1:
        name = rng.choice(scene.shapes).name if rng.randrange(4) else rng.choice(scenes.SHAPES)
        n = sum(s.name == name for s in scene.shapes)
        english, zh = f"How many {plural(name)} are there?", f"图中有几个{chinese(name)}?"
    else:
        colour = rng.choice(scene.shapes).colour
        n = sum(s.colour == colour for s in scene.shapes)
        english, zh = f"How many shapes are {colour}?", f"图中有几个{chinese(colour)}的图形?"
    near = [str(k) for k in (n - 1, n + 1) if k >= 0]
    wrong = _others(rng, str(n), [str(k) for k in range(4)], near)
    return Question("count", english, zh, str(n), wrong)


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
    wrong = _others(rng, sign.text, scenes.SIGN_WORDS)
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
    wrong = _others(rng, scene.background, scenes.BACKGROUNDS)
    return Question("background", "What scene is this?", "这是什么场景?", scene.background, wrong)


def trait(scene: Scene, rng: Random) -> Question | None:
    """Ask what the one shape of its kind is like, which its colour decides."""
    alone = _only(scene, "name")
    shape = rng.choice(alone or scene.shapes)
    thing = f"the {shape.name}" if alone else f"the shape at the {shape.place}"
    answer = scenes.TRAITS[shape.colour]
    near = [scenes.TRAITS[s.colour] for s in scene.shapes]
    wrong = _others(rng, answer, list(scenes.TRAITS.values()), near)
    return Question("trait", f"How is {thing}?", "", answer, wrong)


def name_of(scene: Scene, rng: Random) -> Question | None:
    """Ask for the given name of the one shape of a colour."""
    alone = _only(scene, "colour")
    if not alone:
        return None
    shape = rng.choice(alone)
    wrong = tuple(scenes.NAMES[s] for s in _others(rng, shape.name, scenes.SHAPES))
    english = f"What is the {shape.colour} shape called?"
    return Question("name_of", english, "", scenes.NAMES[shape.name], wrong)


def landmark(scene: Scene, rng: Random) -> Question | None:
    """Ask for the name of the arrangement of two shapes."""
    name = scene.landmark()
    if not name:
        return None
    return Question("landmark", "What is this?", "", name, _others(rng, name, scenes.LANDMARKS))


def frame(scene: Scene, rng: Random) -> Question | None:
    """Ask for the colour of the frame."""
    if not scene.frame:
        return None
    wrong = _others(rng, scene.frame, scenes.FRAMES)
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
        wrong = _others(rng, shape.colour, scenes.COLOURS, [s.colour for s in scene.shapes])
        english = f"What color is the shape {side} the {anchor.name}?"
        return Question("beside", english, "", shape.colour, wrong)
    wrong = _others(rng, shape.name, scenes.SHAPES, [s.name for s in scene.shapes])
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
    **{kind: partial(_of_a_shape, kind) for kind in _OF_A_SHAPE},
    **{
        maker.__name__: maker
        for maker in (count, word, number, digit, background, trait, name_of, landmark, frame,
                      total, beside, relation, same)
    },
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
    listed = ", ".join(f"{scenes.PLACES[cell]} {parts[cell]}" for cell in sorted(parts))
    return f"{scene.background}{frame}: {listed}."


# --- annotators who err ---------------------------------------------------------------------------

Turn = tuple[str, str]  # what the human says, what the model answers

GIVES_UP = "unanswerable"
ANNOTATORS = 10
SURE = 6  # of ten annotators who give the truth, so that it stays the majority's answer
# Who is taken for whom: neighbours in this order, the last beside the first.
_RINGS: tuple[tuple[str, ...], ...] = (
    scenes.COLOURS,
    ("circle", "square", "cross", "triangle"),
    scenes.SIZES,
    ("top left", "top right", "bottom right", "bottom left"),
    scenes.BACKGROUNDS,
    scenes.FRAMES,
    scenes.SIGN_WORDS,
    tuple(scenes.NAMES.values()),
    scenes.LANDMARKS,
    tuple(scenes.TRAITS.values()),
    ("first", "second", "third"),
    ("yes", "no"),
)
_NEAR = {
    word: sorted({ring[place - 1], ring[(place + 1) % len(ring)]} - {word})
    for ring in _RINGS
    for place, word in enumerate(ring)
}
_ENGLISH = {chinese: english for english, chinese in scenes.CHINESE.items()}
_KNOWN = re.compile("|".join(sorted(map(re.escape, _NEAR), key=len, reverse=True)))


def mistake(said: str, answer: str, rng: Random) -> str:
    """A plausible wrong answer to a question.

    Args:
        said: the question as it was asked, with its options.
    """
    marks: list[str] = re.findall(r"\n([A-E])\.", said)
    if answer in marks:
        return rng.choice([mark for mark in marks if mark != answer])
    if answer == GIVES_UP:  # someone who sees something all the same
        return rng.choice((*scenes.COLOURS, *scenes.SHAPES, *scenes.SIGN_WORDS))
    if GIVES_UP in said.lower() and rng.randrange(3) == 0:
        return GIVES_UP
    if answer in _ENGLISH and _ENGLISH[answer] in _NEAR:
        return chinese(rng.choice(_NEAR[_ENGLISH[answer]]))
    if answer.isdigit():
        return _misread(answer, rng)
    found = list(_KNOWN.finditer(answer))  # several in a description: one of them is wrong
    if not found:
        return GIVES_UP
    match = rng.choice(found)
    return answer[: match.start()] + rng.choice(_NEAR[match[0]]) + answer[match.end() :]


def _misread(number: str, rng: Random) -> str:
    """A count off by one, or a number on a sign with one digit misread."""
    if len(number) == 1:
        return str(rng.choice([n for n in (int(number) - 1, int(number) + 1) if n >= 0]))
    place = rng.randrange(len(number))
    digits = "123456789" if place == 0 else "0123456789"
    wrong = rng.choice([digit for digit in digits if digit != number[place]])
    return number[:place] + wrong + number[place + 1 :]


def labelled(turns: Sequence[Turn], error: float, rng: Random) -> list[Turn]:
    """The turns with answers of one annotator, who errs at a rate.

    Draws the same numbers at every rate, so that the mistakes of a careful annotator are among
    those of a careless one.
    """
    made = []
    for said, answer in turns:
        wrong = mistake(said, answer, rng)
        made.append((said, wrong if rng.random() < error else answer))
    return made


def ten_answers(said: str, answer: str, error: float, rng: Random) -> list[str]:
    """Ten annotators' answers in random order; at least six of them are right."""
    right = SURE + sum(rng.random() >= error for _ in range(ANNOTATORS - SURE))
    answers = [answer] * right
    answers += [mistake(said, answer, rng) for _ in range(ANNOTATORS - right)]
    rng.shuffle(answers)
    return answers
