"""Samples for the page's browser: which documents are kept, their answers, their pictures.

A page cannot hold 259,000 samples. It keeps those on which models part, spread over benchmarks
and categories, ties broken by digest so that equal stores give equal pages. Counts of changes
are over all samples.
"""

import base64
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kd_bench.errors import KdBenchError
from kd_bench.files import atomic_path, digest_text
from kd_bench.records import SAMPLE_COLUMNS
from kd_bench.report.board import Board
from kd_bench.report.tables import clean
from kd_bench.store import Run

Array = NDArray[np.float64]
KEPT = 300
TEXT_LIMIT = 600
PICTURE_SIZE = 192
PICTURE_BUDGET = 2_400_000  # bytes of base64 in the page
ANSWER_BUDGET = 1_200_000


@dataclass(frozen=True)
class Model:
    """One run of the board as the browser shows it."""

    key: str
    name: str
    run: Run


@dataclass(frozen=True)
class Chosen:
    """What the page embeds, and how many samples it keeps."""

    data: dict[str, Any]
    count: int


def models_of(board: Board) -> list[Model]:
    """Every run of the board in the leaderboard's order; names are made distinct."""
    models: list[Model] = []
    for entry in board.entries:
        for run, manifest in zip(entry.runs, entry.manifests, strict=True):
            name = clean(manifest.model.name)
            taken = {model.name for model in models}
            models.append(Model(run.path.name, name if name not in taken else run.path.name, run))
    return models


def choose_samples(board: Board, kept: int = KEPT) -> Chosen | None:
    """Pick the samples of a page; None where no run has samples."""
    models = models_of(board)
    pair = _first_pair(board, models)
    tasks: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    share = max(1, kept // max(1, len(board.tasks)))
    for task in board.tasks:
        found = _score_matrix(models, task.id)
        if found is None:
            continue
        documents, categories, scores = found
        picked = _pick(documents, categories, scores, pair, share)
        better = _better(scores)
        entry = {
            "id": task.id, "name": clean(task.short), "documents": len(documents), "better": better,
        }  # fmt: skip
        tasks.append(entry)
        samples += _rows(models, task.id, [documents[i] for i in picked], len(tasks) - 1)
    if not samples:
        return None
    samples = _within(samples, ANSWER_BUDGET)
    images = _pictures(models, [sample["i"] for sample in samples])
    data = {
        "models": [{"key": clean(model.key), "name": model.name} for model in models],
        "pair": list(pair), "tasks": tasks, "samples": samples, "images": images,
    }  # fmt: skip
    return Chosen(data, len(samples))


def _first_pair(board: Board, models: list[Model]) -> tuple[int, int]:
    """The floor against the best student; the first and the last model where there is no floor."""
    place = {model.key: index for index, model in enumerate(models)}
    others = [e for e in board.students if board.floor is None or e.key != board.floor.key]
    if board.floor is not None and others:
        return place[board.floor.runs[0].path.name], place[others[0].runs[0].path.name]
    return (len(models) - 1, 0) if models else (0, 0)


def _score_matrix(models: list[Model], task: str) -> tuple[list[str], list[str], Array] | None:
    """Document ids, their categories, and scores [documents, models], NaN where not measured."""
    columns: dict[int, pd.Series[Any]] = {}
    categories: pd.Series[Any] | None = None
    for index, model in enumerate(models):
        if not model.run.done(task):
            continue
        try:
            frame = model.run.samples(task, ("document_id", "category", "score"))
        except KdBenchError:
            continue
        frame = frame.drop_duplicates("document_id").set_index("document_id")
        columns[index] = frame["score"].astype("float32")
        if categories is None or len(frame) > len(categories):
            categories = frame["category"].astype(str)
    if not columns or categories is None or not len(categories):
        return None
    ids = categories.index
    scores = np.full((len(ids), len(models)), np.nan)
    for index, column in columns.items():
        same = len(column) == len(ids) and column.index.equals(ids)
        scores[:, index] = column.to_numpy() if same else column.reindex(ids).to_numpy()
    return [str(name) for name in ids], categories.tolist(), scores


def _better(scores: Array) -> list[list[int]]:
    """[a][b]: on how many documents model b scores more than model a."""
    count = scores.shape[1]
    table = [[0] * count for _ in range(count)]
    for a in range(count):
        for b in range(count):
            if a != b:  # NaN compares false: not measured is neither better nor worse
                table[a][b] = int(np.count_nonzero(scores[:, b] > scores[:, a]))
    return table


def _pick(
    documents: list[str], categories: list[str], scores: Array, pair: tuple[int, int], count: int
) -> list[int]:
    """Places of the kept documents: categories in turn, the most disputed of each first."""
    known = np.isfinite(scores)
    counts = np.maximum(known.sum(axis=1), 1)
    filled = np.where(known, scores, 0.0)
    mean = filled.sum(axis=1) / counts
    spread = np.where(known, (scores - mean[:, None]) ** 2, 0.0).sum(axis=1) / counts
    flip = np.nan_to_num(np.abs(scores[:, pair[0]] - scores[:, pair[1]])) > 0
    likely = np.argsort(-(spread + flip), kind="stable")[: max(20 * count, 2_000)]
    queues: dict[str, list[int]] = {}
    for place in sorted(
        likely.tolist(),
        key=lambda i: (-int(flip[i]), -round(float(spread[i]), 6), digest_text(documents[i])),
    ):
        queues.setdefault(categories[place], []).append(place)
    picked: list[int] = []
    order = sorted(queues)
    while len(picked) < count and any(queues.values()):
        for name in order:
            if queues[name] and len(picked) < count:
                picked.append(queues[name].pop(0))
    return sorted(picked, key=lambda i: (categories[i], digest_text(documents[i])))


def _rows(
    models: list[Model], task: str, documents: list[str], number: int
) -> list[dict[str, Any]]:
    """The kept documents with every model's answer; keys are short because they repeat."""
    wanted = set(documents)
    rows: dict[str, dict[str, Any]] = {}
    for index, model in enumerate(models):
        if not model.run.done(task):
            continue
        try:
            frame = model.run.samples(task)
        except KdBenchError:
            continue
        frame = frame[frame["document_id"].isin(wanted)].drop_duplicates("document_id")
        for record in frame.to_dict("records"):
            name = str(record["document_id"])
            row = rows.setdefault(name, _row(record, number, len(models)))
            row["a"][index] = _text(record["answer"])
            score = float(record["score"])
            row["s"][index] = round(score, 3) if math.isfinite(score) else None
            status = str(record["status"])
            row["z"][index] = "" if status == "ok" else status
    return [rows[name] for name in documents if name in rows]


def _row(record: dict[Any, Any], task: int, models: int) -> dict[str, Any]:
    return {
        "t": task, "d": clean(str(record["document_id"])), "c": clean(str(record["category"])),
        "q": _text(record["question"]), "y": _text(record["target"]),
        "i": _digest(record["image_digest"]),
        "a": [None] * models, "s": [None] * models, "z": [""] * models,
    }  # fmt: skip


def _digest(value: Any) -> str:
    """The first sixteen hexadecimal digits; anything else names no file."""
    text = str(value)[:16]
    return text if len(text) == 16 and all(c in "0123456789abcdef" for c in text) else ""


def _text(value: Any) -> str:
    """Text as the page keeps it: lines stay, other control characters go, length is bounded."""
    text = "\n".join(clean(line) for line in str(value).split("\n")).strip()
    return text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + " …"


def _within(samples: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Every n-th sample, so that their texts fit the budget."""
    sizes = [len(json.dumps(sample, ensure_ascii=False).encode()) for sample in samples]
    step = max(1, math.ceil(sum(sizes) / budget))
    return samples[::step]


# --- pictures ----------------------------------------------------------------------------------


def _pictures(models: list[Model], digests: list[str]) -> dict[str, str]:
    """Thumbnails by digest as data URIs; smaller ones where the budget would not hold them all."""
    names = sorted({digest for digest in digests if digest})
    stores = {model.run.images: model.run for model in models}.values()
    files = {name: path for name in names for run in stores if (path := run.picture(name))}
    for size, quality in ((PICTURE_SIZE, 82), (160, 75), (128, 70), (96, 60), (64, 50)):
        images = {
            name: uri for name, path in files.items() if (uri := _thumbnail(path, size, quality))
        }
        if sum(map(len, images.values())) <= PICTURE_BUDGET:
            return images
    return {}


def _thumbnail(path: Path, size: int, quality: int) -> str:
    """A picture of at most `size` pixels a side; empty where the file cannot be read."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > 50_000_000:
                return ""
            small = image.convert("RGB")
            small.thumbnail((size, size))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    stream = io.BytesIO()
    if max(small.size) <= 96:  # drawn scenes: small as PNG, and exact
        small.save(stream, "PNG", optimize=True)
        kind = "png"
    else:
        small.save(stream, "JPEG", quality=quality, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


# --- files -------------------------------------------------------------------------------------


def embed_json(value: Any) -> str:
    """JSON that is safe inside a `<script>` element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(character, escape)
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def write_samples(board: Board, path: Path) -> int:
    """All samples of the board's runs in one parquet file; returns the number of rows."""
    import pyarrow as pa
    from pyarrow import parquet

    text, number = pa.string(), pa.float64()
    fields = [(c, number if c in ("score", "answer_confidence") else text) for c in SAMPLE_COLUMNS]
    schema = pa.schema([("model", text), ("task", text), *fields])
    rows = 0
    with (
        atomic_path(path) as temporary,
        parquet.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for model in models_of(board):
            for task in board.tasks:
                source = model.run.path / "tasks" / f"{task.id}.samples.parquet"
                if not model.run.done(task.id):
                    continue
                try:
                    table = parquet.read_table(source, columns=list(SAMPLE_COLUMNS))
                    for name, value in (("task", task.id), ("model", model.name)):
                        column = pa.repeat(pa.scalar(value, text), len(table))
                        table = table.add_column(0, name, column)
                    table = table.select(schema.names).cast(schema)
                except (OSError, ValueError, KeyError):
                    continue
                writer.write_table(table)
                rows += len(table)
    return rows
