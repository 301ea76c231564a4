"""MME's rows: for each category, a question whose answer is yes and one whose answer is no."""

from __future__ import annotations

from random import Random
from typing import Any

from kd_bench.world import words
from kd_bench.world.questions import SIDES, ask, plural
from kd_bench.world.scenes import Scene

Row = dict[str, Any]
Pair = tuple[str, str] | None  # the questions whose answers are yes and no

_END = " Please answer yes or no."  # upstream takes it away again
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def _existence(scene: Scene, rng: Random) -> Pair:
    there = sorted({s.name for s in scene.shapes})
    absent = [name for name in words.SHAPES if name not in there]
    text = "Is there a {} in this image?"
    return text.format(rng.choice(there)), text.format(rng.choice(absent))


def _count(scene: Scene, rng: Random) -> Pair:
    name = rng.choice(scene.shapes).name
    right = sum(s.name == name for s in scene.shapes)
    wrong = rng.choice([n for n in (right - 1, right + 1, right + 2) if n > 0])
    return _there_are(right, name), _there_are(wrong, name)


def _there_are(number: int, name: str) -> str:
    verb, noun = ("Is", name) if number == 1 else ("Are", plural(name))
    return f"{verb} there {_NUMBERS[number]} {noun} in this image?"


def _position(scene: Scene, rng: Random) -> Pair:
    question = ask(scene, rng, ("relation",))
    if question is None:
        return None
    text = question.english
    side = next(side for side in SIDES if side in text)
    turned = text.replace(side, SIDES[SIDES.index(side) ^ 1])
    return (text, turned) if question.answer == "yes" else (turned, text)


def _colour(scene: Scene, rng: Random) -> Pair:
    question = ask(scene, rng, ("colour_of",))
    if question is None:
        return None
    thing = question.english.removeprefix("What color is the ").removesuffix("?")
    wrong = rng.choice(question.wrong[:3])
    return f"Is the {thing} {question.answer}?", f"Is the {thing} {wrong}?"


def _poster(scene: Scene, rng: Random) -> Pair:
    question = ask(scene, rng, ("word",))
    if question is None:
        return None
    text = "Is this a poster of a {}?"
    return text.format(question.answer), text.format(question.wrong[0])


def _celebrity(scene: Scene, rng: Random) -> Pair:
    question = ask(scene, rng, ("name_of",))
    if question is None:
        return None
    text = question.english.replace("What is", "Is").replace("?", " {}?")
    return text.format(question.answer), text.format(rng.choice(question.wrong))


def _scene(scene: Scene, rng: Random) -> Pair:
    wrong = rng.choice([name for name in words.BACKGROUNDS if name != scene.background])
    text = "Does this image show the {}?"
    return text.format(scene.background), text.format(wrong)


def _landmark(scene: Scene, rng: Random) -> Pair:
    question = ask(scene, rng, ("landmark",))
    if question is None:
        return None
    text = "Is this a photo of the {}?"
    return text.format(question.answer), text.format(rng.choice(question.wrong))


def _artwork(scene: Scene, rng: Random) -> Pair:
    question = ask(scene, rng, ("frame",))
    if question is None:
        return None
    text = "Is the frame of this artwork {}?"
    return text.format(question.answer), text.format(question.wrong[0])


def _ocr(scene: Scene, rng: Random) -> Pair:
    question = ask(scene, rng, ("word", "number"))
    if question is None:
        return None
    text = 'Is the {} on the sign "{}"?'
    wrong = rng.choice(question.wrong[:3])
    return text.format(question.kind, question.answer), text.format(question.kind, wrong)


def _commonsense(scene: Scene, rng: Random) -> Pair:
    rolling = [s for s in scene.shapes if s.name == "circle"]
    fixed = [s for s in scene.shapes if s.name != "circle"]
    if not rolling or not fixed:
        return None
    text = "Can the shape at the {} roll?"
    yes, no = (words.PLACES[rng.choice(group).cell] for group in (rolling, fixed))
    return text.format(yes), text.format(no)


def _calculation(scene: Scene, rng: Random) -> Pair:
    question = ask(scene, rng, ("total",))
    if question is None:
        return None
    text = "Is the sum of the two digits on the sign {}?"
    return text.format(question.answer), text.format(rng.choice(question.wrong))


# Upstream's category names: ten of perception, two of cognition.
CATEGORIES = {
    "existence": _existence,
    "count": _count,
    "position": _position,
    "color": _colour,
    "posters": _poster,
    "celebrity": _celebrity,
    "scene": _scene,
    "landmark": _landmark,
    "artwork": _artwork,
    "OCR": _ocr,
    "commonsense_reasoning": _commonsense,
    "numerical_calculation": _calculation,
}


def mme_rows(scene: Scene, rng: Random) -> list[Row]:
    """Every category that fits the scene: two rows each."""
    rows = []
    for category, make in CATEGORIES.items():
        pair = make(scene, rng)
        if pair is None:
            continue
        for text, answer in zip(pair, ("Yes", "No"), strict=True):
            rows.append(
                {
                    "question_id": category,
                    "image": scene,
                    "question": text + _END,
                    "answer": answer,
                    "category": category,
                }
            )
    return rows
