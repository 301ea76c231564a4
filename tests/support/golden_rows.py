"""Rows in the columns of the real data sets, written by hand, one or a few a benchmark."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from kd_bench.registry import load_task

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ANSWERS = pa.list_(
    pa.struct(
        [
            ("answer", pa.string()),
            ("answer_confidence", pa.string()),
            ("answer_id", pa.int64()),
        ]
    )
)
Row = dict[str, Any]


def picture(red: int) -> Row:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (red, 20, 30)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def ten(*answers: str) -> list[str]:
    """Ten annotators: the given answers, the first repeated."""
    return [answers[0]] * (11 - len(answers)) + list(answers[1:])


def mmbench(index: int, letters: dict[str, str | None], answer: str, hint: str | None) -> Row:
    return {
        "index": index,
        "question": "Which animal is shown?",
        "hint": hint,
        "answer": answer,
        **{letter: letters.get(letter) for letter in "ABCD"},
        "category": "identity_reasoning",
        "image": picture(4),
        "source": "hand",
        "L2-category": "attribute_reasoning",
        "split": "dev",
    }


ANIMALS = ["a horse", "a zebra", "a donkey"]
MMBENCH = [
    mmbench(
        7 + 1_000_000 * turn,
        dict(zip("ABC", ANIMALS[turn:] + ANIMALS[:turn], strict=True)),
        "BAC"[turn],
        "It has stripes." if turn else None,
    )
    for turn in range(3)
]

ROWS: dict[str, list[Row]] = {
    "mme": [
        {
            "image": picture(1),
            "question": f"Is there a {thing} in this image? Please answer yes or no.",
            "answer": answer,
            "category": "existence",
            "question_id": "existence/0001.png",
        }
        for thing, answer in (("dog", "Yes"), ("boat", "No"))
    ],
    "mmbench_en": MMBENCH,
    "mmbench_cn": [
        {**row, "question": "图中是什么动物？", "hint": "有条纹。" if row["hint"] else None}
        for row in MMBENCH
    ],
    "vqav2": [
        {
            "question_type": "how many",
            "multiple_choice_answer": "2",
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
                for number, answer in enumerate(ten("2", "3", "3", "two dogs"))
            ],
            "image_id": 262148,
            "answer_type": "number",
            "question_id": 262148001,
            "question": "How many dogs are there?",
            "image": picture(2),
        }
    ],
    "gqa": [
        {
            "id": "201307251",
            "imageId": "n161313",
            "question": "What is the man to the left of the car wearing?",
            "answer": "t-shirt",
            "fullAnswer": "The man is wearing a t-shirt.",
            "isBalanced": True,
            "image": picture(3),
        }
    ],
    "scienceqa_img": [
        {
            "image": picture(5),
            "question": "Which of these is a mineral?",
            "choices": ["gneiss", "quartz", "wood"],
            "answer": 1,
            "hint": "A mineral is a pure solid.",
            "subject": "natural science",
        },
        {
            "image": picture(5),
            "question": "What is the capital?",
            "choices": ["Salem", "Boise"],
            "answer": 0,
            "hint": "",
            "subject": "social science",
        },
    ],
    "mmmu": [
        {
            "id": "validation_Math_3",
            "question": "Which is larger, <image 2> or <image 1>?",
            "options": "['the first', 'the second', 'equal']",
            "answer": "B",
            "question_type": "multiple-choice",
            "image_1": picture(10),
            "image_2": picture(200),
        },
        {
            "id": "validation_Physics_12",
            "question": "Read the current in <image 1> in ampere.",
            "options": "[]",
            "answer": "2.5",
            "question_type": "open",
            "image_1": picture(10),
            "image_2": None,
        },
    ],
    "textvqa": [
        {
            "image_id": "003a8ae2ef43b901",
            "question_id": 34602,
            "question": "what is the brand of this camera?",
            "image": picture(6),
            "answers": ten("dakota", "dakota digital", "nous les gosses"),
            "ocr_tokens": ["DAKOTA", "DIGITAL"],
            "set_name": "val",
        }
    ],
    "vizwiz_vqa": [
        {
            "question_id": "VizWiz_val_00000001.jpg",
            "image": picture(7),
            "question": "can you tell me what is in this can please?",
            "answers": ten("unanswerable", "unsuitable", "beans"),
            "category": "unanswerable",
        }
    ],
    "pope": [
        {
            "id": str(number),
            "question_id": str(number),
            "question": f"Is there a {thing} in the image?",
            "answer": answer,
            "image_source": "COCO_val2014_000000310196",
            "image": picture(8),
            "category": category,
        }
        for number, (thing, answer, category) in enumerate(
            [
                ("snowboard", "yes", "adversarial"),
                ("dining table", "no", "adversarial"),
                ("person", "yes", "popular"),
                ("car", "no", "popular"),
                ("ski", "yes", "random"),
                ("banana", "no", "random"),
            ]
        )
    ],
}


def _type(task: str, column: str, value: Any) -> pa.DataType:
    if column.startswith("image") and (value is None or isinstance(value, dict)):
        return PICTURE
    if column == "answers":
        return ANSWERS if task == "vqav2" else pa.list_(pa.string())
    if column in ("choices", "ocr_tokens", "options") and isinstance(value, list):
        return pa.list_(pa.string())
    if isinstance(value, bool):
        return pa.bool_()
    if column == "answer" and task == "scienceqa_img":
        return pa.int8()
    return pa.int64() if isinstance(value, int) else pa.string()


def write_rows(folder: Path, task: str, rows: list[Row], split: str | None = None) -> Path:
    """Write rows as the benchmark's parquet file; returns the data folder."""
    named = split or load_task(task).dataset.split
    schema = pa.schema([(name, _type(task, name, value)) for name, value in rows[0].items()])
    file = folder / task / f"{named}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return folder
