"""Write the world to a folder: training conversations, validation and test sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from kd_bench.world.drawing import png
from kd_bench.world.testsets import write_test_sets
from kd_bench.world.training import Conversation, conversations

VERSION = "3"  # raise it whenever the same seed would give other pixels or rows

# Training files: folder -> kinds of conversation, how many of each.
Files = dict[str, dict[str, int]]
STUDENT_FILES: Files = {"train": {"mixture": 2000}, "captions": {"captions": 1500}}
# One file a stage of the recipes: a little of what was learnt before goes on.
TEACHER_FILES: Files = {
    "teacher/looks": {"looks": 6000},
    "teacher/letters": {"letters": 7000},
    "teacher/alignment": {"looks": 6000, "letters": 1500},
    "teacher/glances": {"glances": 6000, "letters": 450},
    "teacher/presence": {"presence": 4000, "glances": 1500, "letters": 500},
    "teacher/claims": {"claims": 5000, "glances": 1500, "letters": 500},
    "teacher/choices": {"choices": 5000, "claims": 1000, "letters": 500},
    "teacher/mixture": {"mixture": 8000, "drills": 1500, "claims": 1500},
}


def build_world(folder: Path, seed: int = 0, *, teacher: bool = False) -> None:
    """Write the world into a folder, once; a complete one is left as it is.

    Several processes may call this at the same time: one writes, the others wait for it.
    `teacher=True` adds the large files that `mini-teacher` and `mini-student` are trained on.
    """
    folder = Path(folder)
    _once(folder, f"world-{VERSION}-seed-{seed}", lambda: _write_world(folder, seed))
    if teacher:
        done = f"teacher-{VERSION}-seed-{seed}"
        _once(folder, done, lambda: _write_files(folder, TEACHER_FILES, seed))


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
    _write_files(folder, STUDENT_FILES, seed)
    for split in ("validation", "test"):
        write_test_sets(folder / split, split, seed)


def _write_files(folder: Path, files: Files, seed: int) -> None:
    for name, kinds in files.items():
        made = [conversations(name, kind, count, seed) for kind, count in kinds.items()]
        write_conversations(folder / name, [one for kind in made for one in kind])


def write_conversations(folder: Path, items: list[Conversation]) -> None:
    """Write `conversations.json` in LLaVA's form, and its pictures under `images/`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (scenes, turns) in enumerate(items):
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
        rows.append({"id": f"{number:06d}", **picture, "conversations": said})
    text = json.dumps(rows, ensure_ascii=False, indent=1)
    (folder / "conversations.json").write_text(text, encoding="utf-8")
