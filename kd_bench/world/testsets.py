"""Sample the ten test sets of a split and write them as parquet files."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from kd_bench.world.benchmarks import BENCHMARKS, BUILDERS, Row
from kd_bench.world.drawing import png
from kd_bench.world.mme import CATEGORIES
from kd_bench.world.scenes import Scene

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
# benchmark -> (pictures, questions about each)
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
    given: list[dict[str, Any]]
    if benchmark in ("mmbench_en", "mmbench_cn"):
        given = [{"index": row["index"] + question} for row in rows]
    elif benchmark == "vqav2":
        given = [{"image_id": picture, "question_id": picture * 1000 + question % 1000}]
    elif benchmark == "gqa":
        given = [{"id": f"{question:08d}"}]
    elif benchmark == "mmmu":
        given = [{"id": f"validation_{row['id']}_{question + 1}"} for row in rows]
    elif benchmark == "textvqa":
        given = [{"image_id": f"{picture:016x}", "question_id": question}]
    elif benchmark == "vizwiz_vqa":
        given = [{"question_id": f"VizWiz_val_{question:08d}"}]
    elif benchmark == "pope":
        given = [
            {
                "id": str(picture * 6 + k),
                "question_id": str(picture * 6 + k + 1),
                "image_source": f"world_{picture:06d}",
            }
            for k in range(len(rows))
        ]
    else:
        given = [{} for _ in rows]
    return [row | ids for row, ids in zip(rows, given, strict=True)]


def rows(benchmark: str, split: str, seed: int = 0) -> list[Row]:
    """Return a test set's rows: split is validation or test, pictures are Scenes."""
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

    special = {
        "index": Value("int64"),
        "answers": List(Value("string")),
        "choices": List(Value("string")),
        "ocr_tokens": List(Value("string")),
        "isBalanced": Value("bool"),
    }
    types = {}
    for key, value in row.items():
        if key == "image" or (key.startswith("image_") and key[6:].isdigit()):
            types[key] = Image()
        elif key in special:
            types[key] = special[key]
        else:
            types[key] = Value("int64" if isinstance(value, int) else "string")
    if benchmark == "vqav2":
        answer = {"answer": Value("string"), "answer_confidence": Value("string")}
        types["answers"] = [answer | {"answer_id": Value("int64")}]
    if benchmark == "scienceqa_img":
        types["answer"] = Value("int8")
    return Features(types)


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


def fingerprint(split: str, seed: int = 0) -> str:
    """Return the rows of a split's ten test sets as canonical JSON, scenes by their content."""
    content = {name: rows(name, split, seed) for name in BENCHMARKS}
    return json.dumps(content, default=repr, sort_keys=True)
