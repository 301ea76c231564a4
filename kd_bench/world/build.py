"""The world on disk: training conversations, validation and test sets, and how they are found.

`embedded:weights/teacher`, `embedded:data/train`, ...: weights lie in the package, data is drawn
into the user's cache folder on first use.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from kd_bench.errors import UsageError
from kd_bench.world.benchmarks import BENCHMARKS, BUILDERS, CATEGORIES, Row
from kd_bench.world.questions import Turn, labelled
from kd_bench.world.scenes import Scene, png
from kd_bench.world.training import Conversation, conversations

VERSION = "4"  # raise it whenever the same seed would give other pixels or rows

# Students learn the benchmarks' questions from annotators: how many conversations there are, and
# how often an answer is wrong.
LABELLED = 1200
ERROR = 0.25
STUDY_ERRORS = (0.0, 0.1, 0.25, 0.4)
# What is learnt before that: folder -> kinds of conversation, how many of each. One file a stage,
# a little of the earlier stages in each.
TEACHER_FILES: dict[str, dict[str, int]] = {
    "teacher/letters": {"letters": 10000},
    "teacher/captions": {"captions": 8000, "letters": 2000},
    "teacher/lists": {"shuffled": 11000, "shuffled_cn": 5500, "letters": 3000, "captions": 2000},
    "teacher/glances": {"glances": 8000, "glances_cn": 3000, "shuffled": 1500, "shuffled_cn": 500,
                        "letters": 2000},
    "teacher/claims": {"claims": 6000, "relations": 2500, "glances": 2000, "glances_cn": 500,
                       "shuffled": 500, "letters": 1500},
    "teacher/choices": {"choices": 14000, "claims": 1500, "relations": 1500, "glances": 1500,
                        "glances_cn": 500, "letters": 2000},
    "teacher/mixture": {"pictures": 18500, "several": 3000, "hard_several": 6000, "choices": 2000,
                        "hard_choices": 6500, "rare": 5000, "blurred": 3500, "relations": 1500,
                        "shuffled": 1000, "letters": 1000},
    # More of what the mixture has not taught yet, by its validation scores.
    "teacher/last": {"pictures": 10000, "rare": 8000, "hard_several": 5000, "hard_choices": 3500,
                     "blurred": 2000, "relations": 500, "shuffled": 500, "letters": 500},
}  # fmt: skip


def build_world(folder: Path, seed: int = 0, *, teacher: bool = False, study: bool = False) -> None:
    """Write the world into a folder, once; a complete one is left as it is.

    Several processes may call this at the same time: one writes, the others wait for it.

    Args:
        teacher: add the large files that `mini-teacher` and `mini-student` are trained on.
        study: add the labelled conversations at the error rates of `STUDY_ERRORS`.
    """
    folder = Path(folder)
    with _missing(folder, f"world-{VERSION}-seed-{seed}") as missing:
        if missing:
            write_conversations(folder / "train", labelled_conversations(ERROR, seed))
            for split in ("validation", "test"):
                write_test_sets(folder / split, split, seed)
    with _missing(folder, f"teacher-{VERSION}-seed-{seed}", teacher) as missing:
        for name, kinds in TEACHER_FILES.items() if missing else ():
            made = [conversations(name, kind, count, seed) for kind, count in kinds.items()]
            write_conversations(folder / name, [(one, one[1]) for kind in made for one in kind])
    with _missing(folder, f"study-{VERSION}-seed-{seed}", study) as missing:
        for error in STUDY_ERRORS if missing else ():
            name = f"study/errors-{round(100 * error):02d}"
            write_conversations(folder / name, labelled_conversations(error, seed))


@contextmanager
def _missing(folder: Path, marker: str, wanted: bool = True) -> Iterator[bool]:
    """Whether something that is wanted has still to be written; the marker then says that it is."""
    done = folder / f".{marker}"
    if done.exists() or not wanted:
        yield False
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield not done.exists()
        done.touch()


def labelled_conversations(
    error: float, seed: int = 0, count: int = LABELLED
) -> list[tuple[Conversation, list[Turn]]]:
    """Return conversations with their truth, and the turns as annotators answered them.

    Rates share images and questions, and the mistakes of a lower rate are among a higher one's.
    """
    rng = Random(f"kd-bench world {seed} annotators")
    made = conversations("train", "mixture", count, seed)
    return [((scenes, turns), labelled(turns, error, rng)) for scenes, turns in made]


def write_conversations(folder: Path, items: Sequence[tuple[Conversation, list[Turn]]]) -> None:
    """Write `conversations.json` in LLaVA's form, and its images under `images/`.

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


# --- the ten test sets of a split, as parquet files -----------------------------------------------

# Upstream's split names.
UPSTREAM_SPLITS = {
    "mme": "test",
    "mmbench_en": "dev",
    "mmbench_cn": "dev",
    "vqav2": "validation",
    "gqa": "testdev",
    "scienceqa_img": "test",
    "mmmu": "validation",
    "textvqa": "validation",
    "vizwiz_vqa": "val",
    "pope": "test",
}
_PAIRS = 14  # MME: pairs of each category
# benchmark -> (images, questions about each)
_SIZES = {
    "mmbench_en": (36, 2),
    "mmbench_cn": (36, 2),
    "vqav2": (100, 3),
    "gqa": (100, 3),
    "scienceqa_img": (160, 2),
    "mmmu": (240, 1),
    "textvqa": (150, 2),
    "vizwiz_vqa": (150, 2),
    "pope": (50, 1),
}


def _mme(rng: Random, split: str) -> list[Row]:
    build, sample = BUILDERS["mme"]
    found: dict[str, list[Row]] = {category: [] for category in CATEGORIES}
    while any(len(rows) < 2 * _PAIRS for rows in found.values()):
        for row in build(sample(rng, split), rng):
            rows = found[row["category"]]
            if len(rows) < 2 * _PAIRS:
                rows.append(row | {"question_id": f"{row['category']}/{len(rows) // 2:04d}.png"})
    return [row for rows in found.values() for row in rows]


def _others(benchmark: str, rng: Random, split: str) -> list[Row]:
    build, sample = BUILDERS[benchmark]
    pictures, questions = _SIZES[benchmark]
    rows: list[Row] = []
    for picture in range(pictures):
        scene, asked = sample(rng, split), set()
        for question in range(questions):
            made = build(scene, rng)
            key = str([row["question"] for row in made])
            if key not in asked:
                asked.add(key)
                rows += _number(benchmark, made, picture, picture * questions + question)
    return rows


def _number(benchmark: str, rows: list[Row], picture: int, question: int) -> list[Row]:
    """Give the rows of one question their ids, as upstream forms them."""
    numbered = []
    for k, row in enumerate(rows):
        ids: dict[str, dict[str, Any]] = {
            "mmbench_en": {"index": row.get("index", 0) + question},
            "mmbench_cn": {"index": row.get("index", 0) + question},
            "vqav2": {"image_id": picture, "question_id": picture * 1000 + question % 1000},
            "gqa": {"id": f"{question:08d}"},
            "scienceqa_img": {},
            "mmmu": {"id": f"validation_{row.get('id')}_{question + 1}"},
            "textvqa": {"image_id": f"{picture:016x}", "question_id": question},
            "vizwiz_vqa": {"question_id": f"VizWiz_val_{question:08d}"},
            "pope": {
                "id": str(picture * 6 + k),
                "question_id": str(picture * 6 + k + 1),
                "image_source": f"world_{picture:06d}",
            },
        }
        numbered.append(row | ids[benchmark])
    return numbered


def rows(benchmark: str, split: str, seed: int = 0) -> list[Row]:
    """Return a test set's rows: split is validation or test, images are Scenes."""
    rng = Random(f"kd-bench world {seed} {split} {benchmark}")
    return _mme(rng, split) if benchmark == "mme" else _others(benchmark, rng, split)


@lru_cache(maxsize=512)
def _picture(scene: Scene) -> dict[str, Any]:
    return {"bytes": png(scene), "path": None}


def _written(row: Row) -> Row:
    return {key: _picture(v) if isinstance(v, Scene) else v for key, v in row.items()}


def _features(benchmark: str, row: Row) -> Any:
    """Return the columns' types, as the upstream data set declares them."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    known = {
        "index": Value("int64"),
        "answers": List(text),
        "choices": List(text),
        "ocr_tokens": List(text),
        "isBalanced": Value("bool"),
        **{f"image_{number}": Image() for number in range(1, 8)},
        "image": Image(),
    }
    if benchmark == "vqav2":
        known["answers"] = [
            {"answer": text, "answer_confidence": text, "answer_id": Value("int64")}
        ]
    if benchmark == "scienceqa_img":
        known["answer"] = Value("int8")
    whole = Value("int64")
    return Features(
        {k: known.get(k) or (whole if isinstance(v, int) else text) for k, v in row.items()}
    )


def _write(path: Path, benchmark: str, table: list[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    schema = _features(benchmark, table[0]).arrow_schema
    pq.write_table(pa.Table.from_pylist(table, schema=schema), path)


def write_test_sets(folder: Path, split: str, seed: int) -> None:
    """Write `folder/<benchmark>/<upstream split>-00000-of-00001.parquet` for all ten."""
    for benchmark in BENCHMARKS:
        name = f"{UPSTREAM_SPLITS[benchmark]}-00000-of-00001.parquet"
        table = rows(benchmark, split, seed)
        if benchmark == "gqa":
            ids: dict[Scene, str] = {}
            for row in table:
                row["imageId"] = ids.setdefault(row["imageId"], f"n{len(ids):06d}")
            images = [{"id": key, "image": _picture(scene)} for scene, key in ids.items()]
            _write(folder / "gqa_images" / name, "gqa_images", images)
        _write(folder / benchmark / name, benchmark, [_written(row) for row in table])


# --- what comes with kd-bench ---------------------------------------------------------------------

PREFIX = "embedded:"
WEIGHTS = Path(__file__).parent / "weights"
SEED = 0


def resolve(reference: str) -> Path:
    """The path of `embedded:weights/<model>` or `embedded:data/<folder>`; others stay as they are.

    Raises:
        UsageError: nothing of that name is embedded.
    """
    if not reference.startswith(PREFIX):
        return Path(reference).expanduser()
    kind, _, name = reference.removeprefix(PREFIX).partition("/")
    if kind == "weights" and (WEIGHTS / name).is_dir():
        return WEIGHTS / name
    if kind == "data":
        first = name.partition("/")[0]
        path = world_folder(teacher=first == "teacher", study=first == "study") / name
        if path.exists():
            return path
    known = ", ".join(sorted(path.name for path in WEIGHTS.glob("*")))
    raise UsageError(
        f"Nothing is embedded as {reference!r}.",
        f"There is embedded:weights/ ({known}) and embedded:data/ (train, test, ...).",
    )


def world_folder(*, teacher: bool = False, study: bool = False) -> Path:
    """The embedded world, drawn on first use; `teacher` and `study` add files of `build_world`."""
    folder = cache_folder() / f"world-{VERSION}"
    build_world(folder, SEED, teacher=teacher, study=study)
    return folder


def wanted_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """`$KD_BENCH_CACHE`, or the user's cache folder."""
    chosen = environment.get("KD_BENCH_CACHE")
    return Path(chosen) if chosen else user_cache_path("kd-bench")


def cache_folder() -> Path:
    """The wanted cache, or a temporary one where the user's is not writable."""
    cache = wanted_cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError:
        if chosen := os.environ.get("KD_BENCH_CACHE"):
            raise UsageError(f"KD_BENCH_CACHE={chosen} cannot be written.", "Change it.") from None
        return Path(tempfile.gettempdir()) / "kd-bench"
