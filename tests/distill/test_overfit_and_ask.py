"""Every family learns five answers and gives them back: nothing between training and a score lies.

Training, saving, loading and the evaluation's engine all take part, with processors, chat templates
and tokenizers in the form of the public repositories.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from kd_bench.distill.models import load_model, load_processor
from kd_bench.distill.recipe import load_recipe
from kd_bench.distill.train import train
from kd_bench.evals.benchmark import Answer, Question, Settings
from kd_bench.evals.engine import Engine
from tests.support.chat_templates import TOKENIZERS
from tests.support.public_families import MODELS, save

QUESTION = "What is shown here?"
ANSWERS = {
    "red": "a red harbour",
    "green": "Two of them, at night.",
    "blue": "blue",
    "white": "No",
    "black": "42 boats think about it",
}
SIZES = [(70, 40), (40, 70), (56, 56), (90, 30), (33, 64)]


def image_of(number: int) -> Image.Image:
    """A plain image with a black corner, so that its place matters too."""
    picture = Image.new("RGB", SIZES[number], list(ANSWERS)[number])
    picture.paste("black", (0, 0, 10 + 4 * number, 10))
    return picture


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number, answer in enumerate(ANSWERS.values()):
        image_of(number).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": f"<image>\n{QUESTION}"},
            {"from": "gpt", "value": answer},
        ]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def taught(folder: Path, student: Path, data: Path, **changes: Any) -> tuple[Path, float]:
    """The finished student, and the last loss of its training."""
    stage = {
        "method": "sft",
        "steps": 120,
        "batch_size": 5,
        "learning_rate": 4e-3,
        "warmup": 0.1,
        "trainable": ["vision_tower", "projector", "language_model"],
        "log_every": 10,
        **changes.pop("stage", {}),
    }
    recipe = {
        "name": "overfit",
        "student": str(student),
        "data": {"path": str(data)},
        "output": str(folder),
        "stages": [stage],
        **changes,
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    final = train(load_recipe(path))
    log = (folder / "train_log.jsonl").read_text().splitlines()
    return final, float(json.loads(log[-1])["loss"])


def asked(checkpoint: Path) -> list[Answer]:
    """What the evaluation's engine gets from a checkpoint, by number."""
    engine = Engine(load_model(checkpoint), load_processor(checkpoint))
    questions = [
        Question(i, QUESTION, lambda i=i: [image_of(i)], Settings(24), str(i))  # type: ignore[misc]
        for i in range(len(ANSWERS))
    ]
    return sorted((a for some in engine.answers(questions) for a in some), key=lambda a: a.index)


def knows(checkpoint: Path) -> None:
    found = asked(checkpoint)
    assert [answer.text for answer in found] == list(ANSWERS.values())
    assert {answer.status for answer in found} == {"ok"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "family,words", [(family, TOKENIZERS[i % 3]) for i, family in enumerate(MODELS)]
)
def test_what_was_learnt_is_answered(family: str, words: str, data: Path, tmp_path: Path) -> None:
    """By sft, then by kl from the teacher that sft made."""
    start = save(tmp_path / "start", family, words=words)
    teacher, loss = taught(tmp_path / "teacher", start, data)
    assert loss < 0.01
    knows(teacher)
    student = save(tmp_path / "student", family, seed=1, words=words)
    only_kl = {"terms": [{"loss": "ce", "weight": 0.0}, {"loss": "kl"}], "method": None}
    final, loss = taught(tmp_path / "kl", student, data, teacher=str(teacher), stage=only_kl)
    assert loss < 0.01
    knows(final)
