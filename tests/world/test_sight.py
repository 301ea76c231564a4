"""Proof of sight: a student that learnt from answers alone gains nothing from the images.

Two students are trained from the same base on the same questions and answers. One sees the images
that belong to them; of the other, images are another conversation's or grey, in four copies of the
data, so that nothing an image shows tells an answer. Each is evaluated with its images and blank.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from PIL import Image
from rich.console import Console

from kd_bench.compare import compare
from kd_bench.distill.recipe import load_recipe
from kd_bench.distill.train import train
from kd_bench.evals.documents import GREY
from kd_bench.evals.run import EvalSettings, evaluate
from kd_bench.records import AVERAGE
from kd_bench.report.relations import OWN_GAPS, gap_table, read_board
from kd_bench.store import find_run
from kd_bench.world.build import resolve

TASKS = ["gqa", "vqav2"]
GREY_NAME = "images/grey.png"


def images_of(row: dict[str, Any]) -> list[str]:
    image = row.get("image", [])
    return image if isinstance(image, list) else [image]


def without_meaning(source: Path, folder: Path) -> Path:
    """The conversations of `source` with images that have nothing to do with them."""
    shutil.copytree(source.parent / "images", folder / "images")
    Image.new("RGB", (32, 32), GREY).save(folder / GREY_NAME)
    rows, numbers = json.loads(source.read_text(encoding="utf-8")), random.Random(0)
    named = [name for row in rows for name in images_of(row)]
    made = []
    for number in range(4):
        donors = iter(numbers.sample(named, len(named)))
        for row in rows:
            shown = [next(donors) for _ in images_of(row)]
            if len(made) % 3 == 0:
                shown = [GREY_NAME for _ in shown]
            image = {"image": shown if len(shown) > 1 else shown[0]} if shown else {}
            made.append({**row, **image, "id": f"{number}-{row['id']}"})
    path = folder / "conversations.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    return path


def taught(name: str, data: Path, folder: Path, steps: int, rows: int) -> None:
    """Train a student, then evaluate it with its images and with blank ones."""
    settings = ["method=sft", "learning_rate=1.5e-3", f"steps={steps}",
                f"output={folder / name}", f"data.path={data}",
                f"data.images={data.parent}", f"data.limit={rows}"]  # fmt: skip
    final = train(load_recipe("mini", settings), console=Console(quiet=True))
    for images in ("", "blank"):
        options = EvalSettings(
            data=Path(resolve("embedded:data/test")), results=folder / "results", tasks=TASKS,
            images=images, name=f"{name}-{images}".strip("-"), role="student", progress=False,
        )  # fmt: skip
        evaluate(str(final), options)


@pytest.mark.slow
def test_a_student_of_answers_alone_has_no_sight(tmp_path: Path) -> None:
    source = Path(resolve("embedded:data/train")) / "conversations.json"
    taught("sees", source, tmp_path, steps=60, rows=600)
    (tmp_path / "data").mkdir()
    taught("guesses", without_meaning(source, tmp_path / "data"), tmp_path, steps=200, rows=4800)
    board, evidence = read_board(tmp_path / "results")
    assert sorted(entry.name for entry in board.entries) == ["guesses", "sees"]
    for key in (*TASKS, AVERAGE):
        sight = {e.name: evidence.sight(key, [e.runs[0].path.name]) for e in board.entries}
        assert sight["sees"].interval.low > 0
        assert sight["guesses"].interval.low <= 0 <= sight["guesses"].interval.high
    table = gap_table(board, evidence)
    shown = {row.cells[0].value: row for row in table.rows if row.section == OWN_GAPS["sight"]}
    assert shown["sees"].cells[-1].value > 10 > abs(shown["guesses"].cells[-1].value)
    # What the one has over the other is sight more than guessing.
    runs = [find_run(tmp_path / "results", name) for name in ("guesses", "sees")]
    found = compare(runs)
    parts = {kind: found.measures(f"{kind} difference", runs[1].path.name)[AVERAGE].value
             for kind in ("sight", "guessing")}  # fmt: skip
    assert parts["sight"] > 10
    assert sum(parts.values()) == pytest.approx(found.average_differences[0].value)
