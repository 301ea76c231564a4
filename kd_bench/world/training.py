"""Training conversations in LLaVA's JSON form, about scenes of the training split.

A conversation is its scenes and its turns here; build.py draws the scenes and names the files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable
from random import Random

from kd_bench.world import words
from kd_bench.world.benchmarks import BUILDERS, Row, vizwiz_scene
from kd_bench.world.prompts import LETTER, LETTER_CN, OPTIONS, SHORT, oracle_answer, prompt
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


_GLANCES = ("colour_of", "shape_of", "place_of", "size_of")


def glances(rng: Random, turns: int = 8) -> Conversation:
    """Ask many short questions about one picture of several things, each about one of them."""
    scene = sample_scene(rng, "train", "full")
    asked = {}
    for _ in range(turns):
        question = ask(scene, rng, _GLANCES) or ask(scene, rng, ("colour_at",))
        assert question is not None
        asked[question.english] = question.answer
    return [scene], list(asked.items())


def presence(rng: Random, turns: int = 8) -> Conversation:
    """Ask whether each of several shapes is in a picture."""
    scene = sample_scene(rng, "train", "full")
    return [scene], list(dict(_verdict(*_is_there(scene, rng)) for _ in range(turns)).items())


def claims(rng: Random, turns: int = 8) -> Conversation:
    """Ask whether claims about one picture hold: shapes, colours, both together, places."""
    scene = sample_scene(rng, "train", "full")
    makers = (_is_there, _is_colour_there, _is_pair_there, _is_pair_there, _is_colour_at)
    asked = dict(_verdict(*rng.choice(makers)(scene, rng)) for _ in range(turns))
    return [scene], list(asked.items())


def choices(rng: Random, turns: int = 6) -> Conversation:
    """Ask as MMBench does about one picture, in both languages."""
    scene = sample_scene(rng, "train", "full")
    made = [_turn(rng.choice(["mmbench_en", "mmbench_cn"]), scene, rng) for _ in range(turns)]
    return [scene], list(dict(turn[1] for turn in made if turn).items())


def _verdict(claim: str, holds: bool) -> Turn:
    return claim + SHORT, "yes" if holds else "no"


def _one_of(rng: Random, there: Collection[str], known: Iterable[str]) -> tuple[str, bool]:
    """Pick, as often as can be, something that is there as something that is not."""
    absent = [word for word in known if word not in there]
    holds = not absent or rng.randrange(2) == 1
    return rng.choice(sorted(there) if holds else absent), holds


def _is_there(scene: Scene, rng: Random) -> tuple[str, bool]:
    name, holds = _one_of(rng, {shape.name for shape in scene.shapes}, words.SHAPES)
    return f"Is there a {name} in {rng.choice(['the', 'this'])} image?", holds


def _is_colour_there(scene: Scene, rng: Random) -> tuple[str, bool]:
    colour, holds = _one_of(rng, {shape.colour for shape in scene.shapes}, words.COLOURS)
    return f"Is there a {colour} shape in the image?", holds


def _is_pair_there(scene: Scene, rng: Random) -> tuple[str, bool]:
    there = {f"{shape.colour} {shape.name}" for shape in scene.shapes}
    pairs = (f"{colour} {name}" for colour in words.COLOURS for name in words.SHAPES)
    pair, holds = _one_of(rng, there, pairs)
    return f"Is there a {pair} in the image?", holds


def _is_colour_at(scene: Scene, rng: Random) -> tuple[str, bool]:
    shape = rng.choice(scene.shapes)
    colour, holds = _one_of(rng, {shape.colour}, words.COLOURS)
    return f"Is the shape at the {words.PLACES[shape.cell]} {colour}?", holds


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


def letters(rng: Random, turns: int = 6) -> Conversation:
    """Tell the answer in one word and ask for its option letter: no picture."""
    made = []
    for _ in range(turns):
        pool = rng.choice(_POOLS)
        options = rng.sample(pool, min(len(pool), rng.choice([2, 2, 3, 4])))
        if rng.randrange(4) == 0:
            options = [chinese(option) for option in options]
        listed = "".join(f"\n{mark}. {word}" for mark, word in zip("ABCD", options, strict=False))
        number = rng.randrange(len(options))
        ending = rng.choice([LETTER, LETTER_CN])
        made.append((f"It is {options[number]}. {OPTIONS}{listed}\n{ending}", "ABCD"[number]))
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
    "presence": presence,
    "claims": claims,
    "choices": choices,
    "letters": letters,
    "drills": drill,
}


def conversations(name: str, kind: str, count: int, seed: int = 0) -> list[Conversation]:
    """Make the conversations of a file: kind is a key of `MAKERS`."""
    rng = Random(f"kd-bench world {seed} {name} {kind}")
    return [MAKERS[kind](rng) for _ in range(count)]
