"""The ten benchmarks about scenes: their rows, in the column schemas of the real data sets.

A builder takes one scene and returns the rows about it; a column that holds an image holds a Scene
until it is written. Ids (question_id, index, id) are given later, when a test set is drawn.
The prompts and answers are those of lmms-eval 0.7.3 by default: training conversations are made of
them; evaluation uses upstream's own code, and a test compares both.
"""

import ast
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from kd_bench.world import scenes
from kd_bench.world.questions import GIVES_UP, SIDES, Question, ask, plural, ten_answers
from kd_bench.world.scenes import Scene, chinese, sample_scene

Row = dict[str, Any]

# --- MME: for each category, a question whose answer is yes and one whose answer is no ------------

Pair = tuple[str, str] | None  # the questions whose answers are yes and no
PairMaker = Callable[[Scene, Random], Pair]

_END = " Please answer yes or no."  # upstream takes it away again
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def _existence(scene: Scene, rng: Random) -> Pair:
    there = sorted({s.name for s in scene.shapes})
    absent = [name for name in scenes.SHAPES if name not in there]
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


def _claimed(kinds: tuple[str, ...], text: str, offered: int | None = None) -> PairMaker:
    """The answer of a question, and one of its first `offered` wrong ones (0: the first)."""

    def make(scene: Scene, rng: Random) -> Pair:
        question = ask(scene, rng, kinds)
        if question is None:
            return None
        wrong = question.wrong[0] if offered == 0 else rng.choice(question.wrong[:offered])
        asked = re.sub("What( color)? is", "Is", question.english)[:-1]
        yes, no = (
            text.format(word, kind=question.kind, asked=asked) for word in (question.answer, wrong)
        )
        return yes, no

    return make


def _scene(scene: Scene, rng: Random) -> Pair:
    wrong = rng.choice([name for name in scenes.BACKGROUNDS if name != scene.background])
    text = "Does this image show the {}?"
    return text.format(scene.background), text.format(wrong)


def _commonsense(scene: Scene, rng: Random) -> Pair:
    rolling = [s for s in scene.shapes if s.name == "circle"]
    fixed = [s for s in scene.shapes if s.name != "circle"]
    if not rolling or not fixed:
        return None
    text = "Can the shape at the {} roll?"
    yes, no = (rng.choice(group).place for group in (rolling, fixed))
    return text.format(yes), text.format(no)


# Upstream's category names: ten of perception, two of cognition.
CATEGORIES: dict[str, PairMaker] = {
    "existence": _existence,
    "count": _count,
    "position": _position,
    "color": _claimed(("colour_of",), "{asked} {}?", 3),
    "posters": _claimed(("word",), "Is this a poster of a {}?", 0),
    "celebrity": _claimed(("name_of",), "{asked} {}?"),
    "scene": _scene,
    "landmark": _claimed(("landmark",), "Is this a photo of the {}?"),
    "artwork": _claimed(("frame",), "Is the frame of this artwork {}?", 0),
    "OCR": _claimed(("word", "number"), 'Is the {kind} on the sign "{}"?', 3),
    "commonsense_reasoning": _commonsense,
    "numerical_calculation": _claimed(("total",), "Is the sum of the two digits on the sign {}?"),
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


# --- the other nine -------------------------------------------------------------------------------

SEEING = (
    "colour_of",
    "shape_of",
    "size_of",
    "place_of",
    "shape_at",
    "colour_at",
    "size_at",
    "count",
)
READING = ("word", "number")
# MMBench: kind of question -> (category, L2-category), upstream's names.
_MMBENCH = {
    "colour_of": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "shape_of": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "place_of": ("object_localization", "finegrained_perception (instance-level)"),
    "shape_at": ("object_localization", "finegrained_perception (instance-level)"),
    "colour_at": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "count": ("object_localization", "finegrained_perception (instance-level)"),
    "word": ("ocr", "finegrained_perception (instance-level)"),
    "background": ("image_scene", "coarse_perception"),
}


def _options(rng: Random, question: Question, most: int = 4) -> tuple[list[str], int]:
    """Return shuffled options and the answer's place among them."""
    options = [question.answer, *question.wrong[: most - 1]]
    rng.shuffle(options)
    return options, options.index(question.answer)


def _mmbench(scene: Scene, rng: Random, translate: bool) -> list[Row]:
    question = ask(scene, rng, list(_MMBENCH))
    assert question is not None  # background always fits
    options, place = _options(rng, question)
    if translate:
        options = [chinese(option) for option in options]
    category, l2_category = _MMBENCH[question.kind]
    rows = []
    for turn in range(len(options)):
        turned = options[turn:] + options[:turn]
        row: Row = {
            "index": turn * 1_000_000,
            "question": question.chinese if translate else question.english,
            "hint": None,
            "answer": "ABCD"[(place - turn) % len(options)],
            **dict.fromkeys("ABCD"),
            "category": category,
            "image": scene,
            "source": "kd-bench world",
            "L2-category": l2_category,
            "split": "dev",
        }
        row.update(zip("ABCD", turned, strict=False))
        rows.append(row)
    return rows


def mmbench_en_rows(scene: Scene, rng: Random) -> list[Row]:
    """One multiple-choice question, once for every rotation of its options."""
    return _mmbench(scene, rng, translate=False)


def mmbench_cn_rows(scene: Scene, rng: Random) -> list[Row]:
    """The same in Chinese."""
    return _mmbench(scene, rng, translate=True)


def vqav2_rows(scene: Scene, rng: Random) -> list[Row]:
    """One open or yes/no question with ten annotators' answers."""
    question = ask(scene, rng, (*SEEING, "same", "background"))
    assert question is not None
    answers = ten_answers(question.english, question.answer, 0.2, rng)
    kinds, number = dict.fromkeys(("yes", "no"), "yes/no"), question.answer.isdigit()
    return [
        {
            "question_type": " ".join(question.english.lower().split()[:2]),
            "multiple_choice_answer": question.answer,
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": k + 1}
                for k, answer in enumerate(answers)
            ],
            "image_id": 0,
            "answer_type": kinds.get(question.answer, "number" if number else "other"),
            "question_id": 0,
            "question": question.english,
            "image": scene,
        }
    ]


def gqa_rows(scene: Scene, rng: Random) -> list[Row]:
    """One question about relations; the image is joined by imageId when written."""
    question = ask(scene, rng, ("beside", "beside", "relation", "same"))
    question = question or ask(scene, rng, ("shape_at", "colour_at"))
    assert question is not None
    full = f"The answer is {question.answer}."
    row = {"id": "", "imageId": scene, "question": question.english, "answer": question.answer}
    return [row | {"fullAnswer": full, "isBalanced": True}]


def scienceqa_rows(scene: Scene, rng: Random) -> list[Row]:
    """One question of the world's science; every second one recalls two of its rules."""
    question = ask(scene, rng, ("trait",))
    assert question is not None  # fits every scene
    choices, answer = _options(rng, question, most=3)
    colours = [colour for colour, trait in scenes.TRAITS.items() if trait in choices[:2]]
    rules = [f"{colour} shapes are {scenes.TRAITS[colour]}" for colour in colours]
    return [
        {
            "image": scene,
            "question": question.english,
            "choices": choices,
            "answer": answer,
            "hint": f"{', '.join(rules)}." if rng.randrange(2) else "",
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "physics",
            "category": "Materials",
            "skill": "Classify by a rule",
            "lecture": "",
            "solution": "",
        }
    ]


def textvqa_rows(scene: Scene, rng: Random) -> list[Row]:
    """One reading question with ten answers."""
    question = ask(scene, rng, ("word", "number", "digit"))
    if question is None:
        return []
    answers = ten_answers(question.english, question.answer, 0.1, rng)
    tokens = [sign.text.upper() for sign in scene.signs]
    row = {"image_id": "", "question_id": 0, "question": question.english.lower(), "image": scene}
    return [row | {"answers": answers, "ocr_tokens": tokens, "set_name": "val"}]


def vizwiz_rows(scene: Scene, rng: Random) -> list[Row]:
    """One question of a photographer who cannot see; a strong blur has no answer."""
    if scene.signs and rng.randrange(2):
        question = ask(scene, rng, ("word", "number"))
    else:
        question = ask(scene, rng, ("colour_of", "shape_of", "size_of", "place_of", "background"))
    question = question or ask(scene, rng, ("background",))
    assert question is not None
    text, lost = question.english, scene.blur > 2
    if not scene.signs and rng.randrange(8) == 0:  # the sign that is asked for is not there
        text, lost = f"What is the {rng.choice(READING)} on the sign?", True
    if lost:
        question = Question("lost", text, "", GIVES_UP, (question.answer,))
    answers = ten_answers(text, question.answer, 0.3, rng)
    kind = "unanswerable" if lost else "other"
    row = {"question_id": "", "image": scene, "question": text.lower(), "answers": answers}
    return [row | {"category": kind}]


def pope_rows(scene: Scene, rng: Random) -> list[Row]:
    """Six questions for a coloured shape: a yes and a no of each way to choose the negative."""
    there = sorted({(s.colour, s.name) for s in scene.shapes})
    colours, names = sorted({c for c, _ in there}), sorted({n for _, n in there})
    every = [(c, n) for c in scenes.COLOURS for n in scenes.SHAPES if (c, n) not in there]
    popular = [(c, n) for c, n in every if c in scenes.COLOURS[:2] or n in scenes.SHAPES[:2]]
    mixed = [(c, n) for c, n in every if c in colours and n in names]
    near = [(c, n) for c, n in every if c in colours or n in names]
    rows = []
    for category, pool in (
        ("random", every), ("popular", popular), ("adversarial", mixed or near)
    ):  # fmt: skip
        for answer, pair in (("yes", rng.choice(there)), ("no", rng.choice(pool))):
            rows.append(
                {
                    "id": "",
                    "question_id": "",
                    "question": f"Is there {article(pair[0])} {pair[0]} {pair[1]} in the image?",
                    "answer": answer,
                    "image_source": "",
                    "image": scene,
                    "category": category,
                }
            )
    return rows


def article(word: str) -> str:
    """Return a or an."""
    return "an" if word[0] in "aeiou" else "a"


_PLACES = ("first", "second", "third")


def mmmu_rows(scene: Scene, rng: Random) -> list[Row]:
    """One question of a subject on one, two or three images of the scene's split."""
    subject = rng.choice(["Art", "Geography", "Literature", "Math", "Computer_Science", "Design"])
    split, kind = scene.split(), "full"
    if subject in ("Art", "Geography"):
        question, pictures = ask(scene, rng, (*SEEING, "background")), [scene]
    elif subject == "Design":
        question, pictures = _odd_picture(rng, split)
    else:
        kind = "sign" if subject == "Literature" else "full"
        pictures = [sample_scene(rng, split, kind) for _ in range(2)]
        place = rng.randrange(2)
        wanted: tuple[str, ...] = READING if subject == "Literature" else ("count",)
        if subject == "Computer_Science":
            wanted = ("colour_of", "shape_of", "background")
        asked = ask(pictures[place], rng, wanted)
        question = asked or ask(pictures[place], rng, ("background",))
        assert question is not None
        text = question.english.replace("?", f" in the {_PLACES[place]} picture?")
        question = Question(question.kind, text, "", question.answer, question.wrong)
    assert question is not None
    marks = " ".join(f"<image {k + 1}>" for k in range(len(pictures)))
    opened = question.answer.isdigit() and rng.randrange(3) == 0
    options, place = _options(rng, question)
    row: Row = {
        "id": subject,
        "question": f"{marks} {question.english}",
        "options": "[]" if opened else repr(options),
        "explanation": "",
        "answer": question.answer if opened else "ABCD"[place],
        "question_type": "open" if opened else "multiple-choice",
        "topic_difficulty": ("Easy", "Medium", "Hard")[len(pictures) - 1],
        "img_type": "['Drawings']",
        "subfield": question.kind,
    }
    for k in range(7):
        row[f"image_{k + 1}"] = pictures[k] if k < len(pictures) else None
    return [row]


def _odd_picture(rng: Random, split: str) -> tuple[Question, list[Scene]]:
    """Ask which of three images has a background or a shape that the other two lack."""
    by_shape = bool(rng.randrange(2))
    while True:
        pictures = [sample_scene(rng, split) for _ in range(3)]
        place = rng.randrange(3)
        sought = pictures[place]
        name = rng.choice(sought.shapes).name
        others = [p for k, p in enumerate(pictures) if k != place]
        if by_shape and any(s.name == name for p in others for s in p.shapes):
            continue
        if not by_shape and any(p.background == sought.background for p in others):
            continue
        thing = f"shows {article(name)} {name}" if by_shape else f"shows the {sought.background}"
        wrong = tuple(place_name for place_name in _PLACES if place_name != _PLACES[place])
        question = Question("odd", f"Which picture {thing}?", "", _PLACES[place], wrong)
        return question, pictures


# --- which builder has which scenes ---------------------------------------------------------------


def vizwiz_scene(rng: Random, split: str) -> Scene:
    """Sample a careless photograph: few things, sharp, slightly blurred or lost."""
    blur = rng.choice([0, 0, 0, 1, 1, 5, 5])
    return sample_scene(rng, split, rng.choice(["single", "single", "sign"]), blur)


def _either(rng: Random, split: str) -> Scene:
    return sample_scene(rng, split, "sign" if rng.randrange(4) == 0 else "full")


Builder = Callable[[Scene, Random], list[Row]]
# benchmark id -> (rows of a scene, scenes that suit it)
BUILDERS: dict[str, tuple[Builder, Callable[[Random, str], Scene]]] = {
    "mme": (mme_rows, _either),
    "mmbench_en": (mmbench_en_rows, _either),
    "mmbench_cn": (mmbench_cn_rows, _either),
    "vqav2": (vqav2_rows, sample_scene),
    "gqa": (gqa_rows, sample_scene),
    "scienceqa_img": (scienceqa_rows, sample_scene),
    "mmmu": (mmmu_rows, sample_scene),
    "textvqa": (textvqa_rows, partial(sample_scene, kind="sign")),
    "vizwiz_vqa": (vizwiz_rows, vizwiz_scene),
    "pope": (pope_rows, sample_scene),
}
BENCHMARKS = tuple(BUILDERS)


# --- how lmms-eval asks, and what it takes for right ----------------------------------------------

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接使用所提供的选项字母作为答案回答。"
OPTIONS = "There are several options:"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
FIXED_LINES = (SHORT, LETTER, LETTER_CN, OPTIONS, UNANSWERABLE)


def _options_asked(row: Row) -> str:
    options = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCD" if row[letter])
    hint = f"{row['hint']} " if row["hint"] else ""
    return f"{hint}{row['question']} {OPTIONS}\n{options}\n"


def _scienceqa(row: Row) -> str:
    options = "\n".join(f"{chr(65 + k)}. {choice}" for k, choice in enumerate(row["choices"]))
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    return f"{context}{row['question']}\n{options}{LETTER}"


def _mmmu(row: Row) -> str:
    if row["question_type"] == "open":
        return f"{row['question']}\n{SHORT}"
    choices = ast.literal_eval(row["options"])
    options = "\n".join(f"{chr(65 + k)}. {choice}" for k, choice in enumerate(choices))
    return f"{row['question']}\n{options}\n{LETTER}"


def prompt(benchmark: str, row: Row) -> str:
    """Return the text that lmms-eval asks a row's question with (MMMU keeps its <image n>)."""
    question = str(row["question"])
    if benchmark == "mmbench_en":
        return _options_asked(row) + LETTER
    if benchmark == "mmbench_cn":
        return _options_asked(row) + LETTER_CN
    if benchmark == "scienceqa_img":
        return _scienceqa(row)
    if benchmark == "mmmu":
        return _mmmu(row)
    if benchmark == "vizwiz_vqa":
        return question.capitalize() + UNANSWERABLE + SHORT
    if benchmark == "textvqa":
        return question.capitalize() + SHORT
    return question.replace(" Please answer yes or no.", "") + SHORT


def oracle_answer(benchmark: str, row: Row) -> str:
    """Return the answer that gets the highest score on a row, from the row's own targets."""
    if benchmark == "scienceqa_img":
        return chr(65 + int(row["answer"]))
    if benchmark == "vqav2":
        return _majority([answer["answer"] for answer in row["answers"]])
    if benchmark in ("textvqa", "vizwiz_vqa"):
        return _majority(list(row["answers"]))
    if benchmark in ("mme", "pope"):
        return str(row["answer"]).lower()
    return str(row["answer"])


def _majority(answers: list[str]) -> str:
    return Counter(answers).most_common(1)[0][0]
