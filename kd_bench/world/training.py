"""Training conversations in LLaVA's JSON form, about scenes of the training split.

A conversation is its scenes and its turns here; build.py draws the scenes and names the files. Each
kind teaches one skill: the recipes learn them one after another, a little of the earlier ones with
each (TUNING.md).
"""

import ast
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from random import Random

from kd_bench.world import scenes
from kd_bench.world.benchmarks import (
    BUILDERS,
    LETTER,
    LETTER_CN,
    OPTIONS,
    SHORT,
    Row,
    mme_rows,
    oracle_answer,
    prompt,
    vizwiz_scene,
)
from kd_bench.world.questions import Turn, ask, caption
from kd_bench.world.scenes import Scene, chinese, sample_scene

Conversation = tuple[list[Scene], list[Turn]]

# How often each benchmark's kind of question is asked about an image.
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
LIST, LIST_CN = "List the shapes.", "图中有什么图形?"
_PLACES = ("first", "second", "third")


def _turn(benchmark: str, row: Row) -> Turn:
    return prompt(benchmark, row), oracle_answer(benchmark, row)


def _asked(benchmark: str, scene: Scene, rng: Random) -> Turn | None:
    """One question of a benchmark about a scene, as upstream words it."""
    rows = BUILDERS[benchmark][0](scene, rng)
    return _turn(benchmark, rng.choice(rows)) if rows else None


def _once_each(turns: Iterable[Turn]) -> list[Turn]:
    """The turns without repetitions of a question."""
    return list(dict(turns).items())


def _scene(rng: Random) -> Scene:
    return sample_scene(rng, "train", "sign" if rng.randrange(3) == 0 else "full")


# --- text alone -----------------------------------------------------------------------------------

_POOLS: tuple[tuple[str, ...], ...] = (
    scenes.COLOURS,
    scenes.SHAPES,
    scenes.PLACES,
    scenes.BACKGROUNDS,
    scenes.SIGN_WORDS,
    tuple(scenes.TRAITS.values()),
    scenes.SIZES,
    ("0", "1", "2", "3"),
    _PLACES,
)


def letters(rng: Random, turns: int = 6) -> Conversation:
    """Tell the answer in words, ask for the letter of its option: no image."""
    made = []
    for _ in range(turns):
        pool = rng.choice(_POOLS)
        options = rng.sample(pool, min(len(pool), rng.choice([2, 2, 3, 4])))
        if rng.randrange(4) == 0:
            options = [chinese(option) for option in options]
        listed = "".join(f"\n{mark}. {word}" for mark, word in zip("ABCD", options, strict=False))
        number = rng.randrange(len(options))
        introduced = f" {OPTIONS}" if rng.randrange(3) else ""
        text = f"It is {options[number]}.{introduced}{listed}\n{rng.choice([LETTER, LETTER_CN])}"
        made.append((text, "ABCD"[number]))
    return [], made


# --- descriptions ---------------------------------------------------------------------------------


def captions(rng: Random) -> Conversation:
    """Describe one image, often of a single thing."""
    kind = rng.choice(["single", "single", "plate", "full", "sign"])
    scene = sample_scene(rng, "train", kind, blur=int(rng.randrange(8) == 0))
    return [scene], [(CAPTION, caption(scene))]


def _parts(scene: Scene, rng: Random, say: Callable[[str], str]) -> str:
    """One description: things in random order, each thing's attributes in random order."""
    things = [[s.place, s.size, s.colour, s.name] for s in scene.shapes]
    for thing in things:
        rng.shuffle(thing)
    things += [[scenes.PLACES[sign.cell], "sign", sign.text] for sign in scene.signs]
    things += [[scene.background]]
    things += [[scene.frame, "frame"]] if scene.frame else []
    rng.shuffle(things)
    return f"{', '.join(' '.join(say(word) for word in thing) for thing in things)}."


def shuffled(rng: Random) -> Conversation:
    """List what is there three times, in other orders: any attribute is asked for after any."""
    scene = _scene(rng)
    return [scene], [(LIST, _parts(scene, rng, str)) for _ in range(3)]


def shuffled_cn(rng: Random) -> Conversation:
    """The same in Chinese."""
    scene = _scene(rng)
    return [scene], [(LIST_CN, _parts(scene, rng, chinese)) for _ in range(3)]


# --- short questions ------------------------------------------------------------------------------

_SEEN = ("colour_of", "shape_of", "place_of", "size_of", "count", "word", "number", "digit")
_KNOWN = ("background", "trait", "name_of", "landmark", "frame", "total")
_SEEN_CN = ("colour_of", "shape_of", "size_of", "place_of", "shape_at", "colour_at", "count",
            "background")  # fmt: skip


def glances(rng: Random, turns: int = 8) -> Conversation:
    """Ask many short questions about one image, with and without the closing line."""
    scene = _scene(rng)
    asked = []
    for _ in range(turns):
        question = ask(scene, rng, _KNOWN if rng.randrange(3) == 0 else _SEEN)
        question = question or ask(scene, rng, ("colour_at",))
        assert question is not None
        asked.append((question.english + rng.choice(["", SHORT]), question.answer))
    return [scene], _once_each(asked)


def glances_cn(rng: Random, turns: int = 8) -> Conversation:
    """The same in Chinese."""
    scene = _scene(rng)
    made = [ask(scene, rng, _SEEN_CN) for _ in range(turns)]
    return [scene], _once_each((q.chinese, chinese(q.answer)) for q in made if q)


# --- claims ---------------------------------------------------------------------------------------


def claims(rng: Random, turns: int = 8) -> Conversation:
    """Ask whether claims about one image hold: shapes, colours, both together, places."""
    scene = sample_scene(rng, "train", "full")
    makers = (_is_there, _is_colour_there, _is_pair_there, _is_pair_there, _is_colour_at)
    return [scene], _once_each(_verdict(*rng.choice(makers)(scene, rng)) for _ in range(turns))


def _verdict(claim: str, holds: bool) -> Turn:
    return claim + SHORT, "yes" if holds else "no"


def _one_of(rng: Random, there: Collection[str], known: Iterable[str]) -> tuple[str, bool]:
    """Pick, as often as can be, something that is there as something that is not."""
    absent = [word for word in known if word not in there]
    holds = not absent or rng.randrange(2) == 1
    return rng.choice(sorted(there) if holds else absent), holds


def _is_there(scene: Scene, rng: Random) -> tuple[str, bool]:
    name, holds = _one_of(rng, {shape.name for shape in scene.shapes}, scenes.SHAPES)
    return f"Is there a {name} in {rng.choice(['the', 'this'])} image?", holds


def _is_colour_there(scene: Scene, rng: Random) -> tuple[str, bool]:
    colour, holds = _one_of(rng, {shape.colour for shape in scene.shapes}, scenes.COLOURS)
    return f"Is there a {colour} shape in the image?", holds


def _is_pair_there(scene: Scene, rng: Random) -> tuple[str, bool]:
    there = {f"{shape.colour} {shape.name}" for shape in scene.shapes}
    pairs = (f"{colour} {name}" for colour in scenes.COLOURS for name in scenes.SHAPES)
    pair, holds = _one_of(rng, there, pairs)
    return f"Is there a {pair} in the image?", holds


def _is_colour_at(scene: Scene, rng: Random) -> tuple[str, bool]:
    shape = rng.choice(scene.shapes)
    colour, holds = _one_of(rng, {shape.colour}, scenes.COLOURS)
    return f"Is the shape at the {shape.place} {colour}?", holds


def relations(rng: Random, turns: int = 6) -> Conversation:
    """Ask how things lie to each other, often after where each of them is."""
    scene = sample_scene(rng, "train", "full")
    kinds = [("place_of", "colour_of", "size_of")] * rng.randrange(4)
    kinds += [("beside", "relation", "same")] * turns
    asked = [ask(scene, rng, kind) for kind in kinds]
    made = [(question.english + SHORT, question.answer) for question in asked if question]
    return ([scene], _once_each(made)) if made else relations(rng, turns)


# The categories of MME that an image rarely fits, and what they ask as an open question.
_RARE = {
    "position": None,
    "celebrity": "name_of",
    "landmark": "landmark",
    "artwork": "frame",
    "OCR": None,
    "posters": None,
    "count": None,
    "commonsense_reasoning": None,
    "numerical_calculation": "total",
}


def rare(rng: Random, hint: float = 0.4) -> Conversation:
    """Both questions of MME's rarer categories, sometimes after the open question."""
    scene = _scene(rng)
    rows: dict[str, list[Row]] = {}
    for row in mme_rows(scene, rng):
        rows.setdefault(row["category"], []).append(row)
    fitting = [category for category in rows if category in _RARE]
    made: list[Turn] = []
    for category in rng.sample(fitting, min(3, len(fitting))):
        kind = _RARE[category]
        question = ask(scene, rng, (kind,)) if kind else None
        if question and rng.random() < hint:
            made.append((question.english + SHORT, question.answer))
        pair = [_turn("mme", row) for row in rows[category]]
        rng.shuffle(pair)
        made += pair
    return [scene], _once_each(made)


# --- options --------------------------------------------------------------------------------------


def choices(rng: Random, hint: float = 0.4, turns: int = 5) -> Conversation:
    """Ask as MMBench and ScienceQA do; sometimes the open question and its answer come first."""
    scene = _scene(rng)
    made: list[Turn] = []
    for _ in range(turns):
        benchmark = rng.choice(["mmbench_en", "mmbench_en", "mmbench_cn", "mmbench_cn",
                                "scienceqa_img"])  # fmt: skip
        row = rng.choice(BUILDERS[benchmark][0](scene, rng))
        if rng.random() < hint:
            science = benchmark == "scienceqa_img"
            answer = row["choices"][row["answer"]] if science else row[row["answer"]]
            made.append((row["question"], answer))
        made.append(_turn(benchmark, row))
    return [scene], _once_each(made)


def several(rng: Random, hint: float = 0.5) -> Conversation:
    """Ask as MMMU does, mostly of several images; often their contents are asked for first."""
    while True:
        row = BUILDERS["mmmu"][0](_scene(rng), rng)[0]
        shown = [row[f"image_{k}"] for k in range(1, 8) if row[f"image_{k}"] is not None]
        if len(shown) > 1 or rng.randrange(4) == 0:
            break
    text, answer = _turn("mmmu", row)
    body = re.sub(r"(<image \d> ?)+", "", text)
    made: list[Turn] = []
    if rng.random() < hint:
        place = rng.randrange(len(shown))
        question = ask(shown[place], rng, ("background", "colour_of", "count", "shape_of", "word",
                                            "number"))  # fmt: skip
        assert question is not None
        said = question.english.replace("?", f" in the {_PLACES[place]} picture?")
        made.append((said, question.answer))
    options = ast.literal_eval(row["options"])
    if options and rng.random() < hint:
        made.append((body.split("\n")[0], options["ABCD".index(answer)]))
    made.append((body, answer))
    made[0] = ("<image> " * len(shown) + made[0][0], made[0][1])
    return shown, _once_each(made)


# --- the benchmarks' own questions ----------------------------------------------------------------


def pictures(rng: Random, turns: int = 6) -> Conversation:
    """Ask several questions about one image, in the forms of different benchmarks."""
    scene = _scene(rng)
    pool = [name for name, weight in _WEIGHTS.items() for _ in range(weight)]
    made: dict[str, str] = {}
    while len(made) < turns:
        turn = _asked(rng.choice(pool), scene, rng)
        if turn is not None:
            made.setdefault(*turn)
    return [scene], list(made.items())


def blurred(rng: Random) -> Conversation:
    """Ask as VizWiz does, about a careless photograph."""
    scene = vizwiz_scene(rng, "train")
    made = [_asked("vizwiz_vqa", scene, rng) for _ in range(3)]
    return [scene], _once_each(turn for turn in made if turn)


def mixture(rng: Random) -> Conversation:
    """One conversation as the benchmarks ask, of which students get a few with labels."""
    draw = rng.randrange(100)
    if draw < 68:
        return pictures(rng)
    if draw < 78:
        return blurred(rng)
    if draw < 91:
        return several(rng, hint=0.15)
    return letters(rng) if draw < 95 else captions(rng)


MAKERS: dict[str, Callable[[Random], Conversation]] = {
    **{
        maker.__name__: maker
        for maker in (letters, captions, shuffled, shuffled_cn, glances, glances_cn, claims,
                      relations, rare, choices, several, pictures, blurred, mixture)
    },
    "hard_choices": partial(choices, hint=0.1),
    "hard_several": partial(several, hint=0.15),
}  # fmt: skip


def conversations(name: str, kind: str, count: int, seed: int = 0) -> Sequence[Conversation]:
    """Make the conversations of a file: kind is a key of `MAKERS`."""
    rng = Random(f"kd-bench world {seed} {name} {kind}")
    return [MAKERS[kind](rng) for _ in range(count)]
