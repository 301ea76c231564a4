"""Training conversations in LLaVA's JSON form, about scenes of the training split.

A conversation is its scenes and its turns here; build.py draws the scenes and names the files.
"""

from __future__ import annotations

import ast
import re
from random import Random

from kd_bench.world import words
from kd_bench.world.benchmarks import BUILDERS, Row, vizwiz_scene
from kd_bench.world.prompts import OPTIONS, oracle_answer, prompt
from kd_bench.world.questions import ask, caption
from kd_bench.world.scenes import Scene, sample_scene
from kd_bench.world.words import chinese

Turn = tuple[str, str]  # what the human says, what the model answers
Conversation = tuple[list[Scene], list[Turn]]

# How often each benchmark's kind of question is asked about a picture.
_WEIGHTS = {
    "mme": 3,
    "mmbench_en": 3,
    "mmbench_cn": 3,
    "vqav2": 3,
    "gqa": 2,
    "scienceqa_img": 2,
    "textvqa": 3,
    "pope": 2,
}
CAPTION = "Describe the image."


def _turn(benchmark: str, scene: Scene, rng: Random) -> tuple[Row, Turn] | None:
    rows = BUILDERS[benchmark][0](scene, rng)
    if not rows:
        return None
    row = rng.choice(rows)
    return row, (prompt(benchmark, row), oracle_answer(benchmark, row))


def _turns(scene: Scene, rng: Random, count: int) -> list[Turn]:
    """Ask about one scene in the forms of different benchmarks."""
    pool = [name for name, weight in _WEIGHTS.items() for _ in range(weight)]
    turns: dict[str, str] = {}
    while len(turns) < count:
        benchmark = rng.choice(pool)
        rows = BUILDERS[benchmark][0](scene, rng)
        if rows:
            row = rng.choice(rows)
            turns.setdefault(prompt(benchmark, row), oracle_answer(benchmark, row))
    return list(turns.items())


def _picture_scene(rng: Random) -> Scene:
    return sample_scene(rng, "train", "sign" if rng.randrange(3) == 0 else "full")


def picture_conversation(rng: Random, turns: int = 6) -> Conversation:
    """Ask several questions about one picture."""
    scene = _picture_scene(rng)
    return [scene], _turns(scene, rng, turns)


def blurred_conversation(rng: Random) -> Conversation:
    """Ask as VizWiz does, about a careless photograph."""
    scene = vizwiz_scene(rng, "train")
    made = [_turn("vizwiz_vqa", scene, rng) for _ in range(2)]
    return [scene], [turn[1] for turn in made if turn]


def several_pictures(rng: Random) -> Conversation:
    """Ask as MMMU does, about one to three pictures."""
    made = _turn("mmmu", _picture_scene(rng), rng)
    assert made is not None
    row, (text, answer) = made
    scenes = [row[f"image_{k}"] for k in range(1, 8) if row[f"image_{k}"] is not None]
    return scenes, [(re.sub(r"<image \d>", "<image>", text), answer)]


def captioned(rng: Random) -> Conversation:
    """Describe one picture, often of a single thing."""
    kind = rng.choice(["single", "single", "plate", "full", "sign"])
    scene = sample_scene(rng, "train", kind, blur=int(rng.randrange(8) == 0))
    return [scene], [(CAPTION, caption(scene))]


def first_looks(rng: Random) -> Conversation:
    """Describe a picture of a single thing, sometimes slightly blurred."""
    kind = rng.choice(["single", "single", "plate"])
    scene = sample_scene(rng, "train", kind, blur=int(rng.randrange(8) == 0))
    return [scene], [(CAPTION, caption(scene))]


_GLANCES = ("colour_of", "shape_of", "place_of", "shape_at", "colour_at", "size_at")


def glances(rng: Random, turns: int = 6) -> Conversation:
    """Ask many short questions about one picture, each about one thing in it."""
    scene = sample_scene(rng, "train", rng.choice(["single", "full", "full", "sign"]))
    kinds = ("word", "number", *_GLANCES) if scene.signs else _GLANCES
    asked = {}
    for _ in range(turns):
        question = ask(scene, rng, kinds) or ask(scene, rng, ("colour_at",))
        assert question is not None
        translate = question.chinese and rng.randrange(4) == 0
        text = question.chinese if translate else question.english
        asked[text] = chinese(question.answer) if translate else question.answer
    return [scene], list(asked.items())


_POOLS: tuple[tuple[str, ...], ...] = (
    words.COLOURS,
    words.SHAPES,
    words.PLACES,
    words.BACKGROUNDS,
    words.SIGN_WORDS,
    words.TRAITS,
    words.SIZES,
    ("0", "1", "2", "3"),
    ("first", "second", "third"),
)

_WORDS = tuple(word for pool in _POOLS for word in pool)


def lists(rng: Random, turns: int = 3) -> Conversation:
    """Name the letter of every option, twice over and in any order: no picture."""
    made = []
    for _ in range(turns):
        pool = rng.choice(_POOLS)
        options = rng.sample(pool, min(len(pool), rng.choice([2, 3, 4, 4])))
        if rng.randrange(3) == 0:
            options = [chinese(option) for option in options]
        elif rng.randrange(2):
            options = [" ".join(rng.sample(_WORDS, rng.randint(2, 3))) for _ in range(3)]
        marked = list(zip("ABCD", options, strict=False))
        listed = "".join(f"\n{letter}. {option}" for letter, option in marked)
        named = rng.sample(marked * 2, 2 * len(marked))
        made.append((OPTIONS + listed, " ".join(f"{option} {letter}" for letter, option in named)))
    return [], made


def drill(rng: Random, turns: int = 1) -> Conversation:
    """Tell the answer in words and ask for its option letter: no picture."""
    made = []
    for _ in range(turns):
        scene = _picture_scene(rng)
        benchmark = rng.choice(["mmbench_en", "mmbench_cn", "mmmu", "scienceqa_img"])
        row = rng.choice(BUILDERS[benchmark][0](scene, rng))
        letter = oracle_answer(benchmark, row)
        if benchmark == "mmmu" and row["question_type"] == "open":
            continue
        text = re.sub(r"(<image \d> )+", "", prompt(benchmark, row))
        if benchmark != "scienceqa_img":
            options = ast.literal_eval(row["options"]) if benchmark == "mmmu" else None
            answer = options["ABCD".index(letter)] if options else row[letter]
            text = f"It is {answer}. {text}"
        else:
            text = f"{_facts(scene)}\n{text}"
        made.append((text, letter))
    return ([], made) if made else drill(rng, turns)


def _facts(scene: Scene) -> str:
    return ", ".join(f"{s.colour} {s.name}" for s in scene.shapes)


def mixture(rng: Random) -> Conversation:
    """Sample one conversation of the instruction mix."""
    draw = rng.randrange(100)
    if draw < 62:
        return picture_conversation(rng)
    if draw < 72:
        return blurred_conversation(rng)
    if draw < 84:
        return several_pictures(rng)
    if draw < 90:
        return captioned(rng)
    return drill(rng)


MAKERS = {
    "mixture": mixture,
    "captions": captioned,
    "looks": first_looks,
    "glances": glances,
    "lists": lists,
    "drills": drill,
}


def conversations(name: str, kind: str, count: int, seed: int = 0) -> list[Conversation]:
    """Make the conversations of a file: kind is mixture, captions or drills."""
    rng = Random(f"kd-bench world {seed} {name}")
    return [MAKERS[kind](rng) for _ in range(count)]
