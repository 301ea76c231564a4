"""Training conversations in LLaVA's JSON form, about scenes of the training split.

A conversation is its scenes and its turns here; build.py draws the scenes and names the files.
"""

from __future__ import annotations

import re
from random import Random

from kd_bench.world.benchmarks import BUILDERS, Row, vizwiz_scene
from kd_bench.world.prompts import oracle_answer, prompt
from kd_bench.world.questions import caption
from kd_bench.world.scenes import Scene, sample_scene

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
    turns: list[Turn] = []
    asked: set[str] = set()
    while len(turns) < count:
        benchmark = rng.choice(pool)
        made = None if benchmark in asked else _turn(benchmark, scene, rng)
        asked.add(benchmark)
        if made:
            turns.append(made[1])
        if len(asked) == len(_WEIGHTS):
            break
    return turns


def _picture_scene(rng: Random) -> Scene:
    return sample_scene(rng, "train", "sign" if rng.randrange(3) == 0 else "full")


def picture_conversation(rng: Random, turns: int = 3) -> Conversation:
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
    """Describe one picture."""
    draw = rng.randrange(8)
    if draw == 0:
        scene = vizwiz_scene(rng, "train")
        if scene.blur > 2:
            return captioned(rng)
    else:
        scene = sample_scene(rng, "train", "single") if draw == 1 else _picture_scene(rng)
    return [scene], [(CAPTION, caption(scene))]


def drill(rng: Random, turns: int = 3) -> Conversation:
    """Ask about a scene that is told in words: no picture."""
    scene = _picture_scene(rng)
    asked = _turns(scene, rng, turns)
    first = (f"Picture: {caption(scene)}\n{asked[0][0]}", asked[0][1])
    return [], [first, *asked[1:]]


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


MAKERS = {"mixture": mixture, "captions": captioned, "drills": drill}


def conversations(name: str, kind: str, count: int, seed: int = 0) -> list[Conversation]:
    """Make the conversations of a file: kind is mixture, captions or drills."""
    rng = Random(f"kd-bench world {seed} {name}")
    return [MAKERS[kind](rng) for _ in range(count)]
