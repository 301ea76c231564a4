"""Write the world to a folder: training conversations, validation and test sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from filelock import FileLock

from kd_bench.world.annotators import Turn, labelled
from kd_bench.world.drawing import png
from kd_bench.world.testsets import write_test_sets
from kd_bench.world.training import Conversation, conversations

VERSION = "4"  # raise it whenever the same seed would give other pixels or rows

# Students learn the benchmarks' questions from annotators: how many conversations there are, and
# how often an answer is wrong.
LABELLED = 1200
ERROR = 0.25
STUDY_ERRORS = (0.0, 0.1, 0.25, 0.4)
# What is learnt before that: folder -> kinds of conversation, how many of each. One file a stage,
# a little of the earlier stages in each.
Files = dict[str, dict[str, int]]
TEACHER_FILES: Files = {
    "teacher/letters": {"letters": 10000},
    "teacher/captions": {"captions": 8000, "letters": 2000},
    "teacher/lists": {"shuffled": 11000, "shuffled_cn": 5500, "letters": 3000, "captions": 2000},
    "teacher/glances": {
        "glances": 8000,
        "glances_cn": 3000,
        "shuffled": 1500,
        "shuffled_cn": 500,
        "letters": 2000,
    },
    "teacher/claims": {
        "claims": 6000,
        "relations": 2500,
        "glances": 2000,
        "glances_cn": 500,
        "shuffled": 500,
        "letters": 1500,
    },
    "teacher/choices": {
        "choices": 14000,
        "claims": 1500,
        "relations": 1500,
        "glances": 1500,
        "glances_cn": 500,
        "letters": 2000,
    },
    "teacher/mixture": {
        "pictures": 18500,
        "several": 3000,
        "hard_several": 6000,
        "choices": 2000,
        "hard_choices": 6500,
        "rare": 5000,
        "blurred": 3500,
        "relations": 1500,
        "shuffled": 1000,
        "letters": 1000,
    },
    # More of what the mixture has not taught yet, by its validation scores.
    "teacher/last": {
        "pictures": 10000,
        "rare": 8000,
        "hard_several": 5000,
        "hard_choices": 3500,
        "blurred": 2000,
        "relations": 500,
        "shuffled": 500,
        "letters": 500,
    },
}


def build_world(folder: Path, seed: int = 0, *, teacher: bool = False, study: bool = False) -> None:
    """Write the world into a folder, once; a complete one is left as it is.

    Several processes may call this at the same time: one writes, the others wait for it.

    Args:
        teacher: add the large files that `mini-teacher` and `mini-student` are trained on.
        study: add the labelled conversations at the error rates of `STUDY_ERRORS`.
    """
    folder = Path(folder)
    _once(folder, f"world-{VERSION}-seed-{seed}", lambda: _write_world(folder, seed))
    if teacher:
        done = f"teacher-{VERSION}-seed-{seed}"
        _once(folder, done, lambda: _write_files(folder, TEACHER_FILES, seed))
    if study:
        done = f"study-{VERSION}-seed-{seed}"
        _once(folder, done, lambda: _write_study(folder, seed))


def _once(folder: Path, marker: str, write: Callable[[], None]) -> None:
    """Run `write` unless the marker, written last, says that it has been run."""
    done = folder / f".{marker}"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if done.exists():
            return
        write()
        done.touch()


def _write_world(folder: Path, seed: int) -> None:
    write_conversations(folder / "train", labelled_conversations(ERROR, seed))
    for split in ("validation", "test"):
        write_test_sets(folder / split, split, seed)


def _write_study(folder: Path, seed: int) -> None:
    for error in STUDY_ERRORS:
        name = f"study/errors-{round(100 * error):02d}"
        write_conversations(folder / name, labelled_conversations(error, seed))


def labelled_conversations(
    error: float, seed: int = 0, count: int = LABELLED
) -> list[tuple[Conversation, list[Turn]]]:
    """Return conversations with their truth, and the turns as annotators answered them.

    Rates share pictures and questions, and the mistakes of a lower rate are among a higher one's.
    """
    rng = Random(f"kd-bench world {seed} annotators")
    made = conversations("train", "mixture", count, seed)
    return [((scenes, turns), labelled(turns, error, rng)) for scenes, turns in made]


def _write_files(folder: Path, files: Files, seed: int) -> None:
    for name, kinds in files.items():
        made = [conversations(name, kind, count, seed) for kind, count in kinds.items()]
        write_conversations(folder / name, [(one, one[1]) for kind in made for one in kind])


def write_conversations(folder: Path, items: Sequence[tuple[Conversation, list[Turn]]]) -> None:
    """Write `conversations.json` in LLaVA's form, and its pictures under `images/`.

    Args:
        items: conversations, each with the turns that are written; where these differ from the
            conversation's own, the row keeps the right answers as `truth`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, ((scenes, truth), turns) in enumerate(items):
        names = []
        for k, scene in enumerate(scenes):
            mark = "" if len(scenes) == 1 else f"-{k}"
            names.append(f"images/{number:06d}{mark}.png")
            (folder / names[-1]).write_bytes(png(scene))
        said = []
        for human, answer in turns:
            said += [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
        if len(names) == 1 and "<image>" not in said[0]["value"]:
            said[0]["value"] = f"<image>\n{said[0]['value']}"
        picture = {"image": names[0] if len(names) == 1 else names} if names else {}
        known = {"truth": [answer for _, answer in truth]} if turns != truth else {}
        rows.append({"id": f"{number:06d}", **picture, "conversations": said, **known})
    text = json.dumps(rows, ensure_ascii=False, indent=1)
    (folder / "conversations.json").write_text(text, encoding="utf-8")
