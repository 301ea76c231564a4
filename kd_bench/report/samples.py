"""Samples for the page's browser: which documents are kept, their answers, their images.

A page cannot hold 259,000 samples. It keeps those on which models part, spread over benchmarks
and categories, ties broken by digest so that equal stores give equal pages. Counts of changes
are over all samples.
"""

import base64
import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kd_bench.errors import KdBenchError
from kd_bench.files import atomic_path, digest_text
from kd_bench.records import SAMPLE_COLUMNS
from kd_bench.report.board import Board
from kd_bench.report.tables import clean
from kd_bench.store import Run

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]
KEPT = 300
TEXT_LIMIT = 600
IMAGE_SIZE = 192
IMAGE_BUDGET = 2_400_000  # bytes of base64 in the page
ANSWER_BUDGET = 1_200_000


class Model(NamedTuple):
    """One run of the board as the browser shows it."""

    key: str
    name: str
    run: Run


def models_of(board: Board) -> list[Model]:
    """Every run of the board in the leaderboard's order; names are made distinct."""
    models: list[Model] = []
    for entry in board.entries:
        for run, manifest in zip(entry.runs, entry.manifests, strict=True):
            name = clean(manifest.model.name)
            taken = {model.name for model in models}
            models.append(Model(run.path.name, name if name not in taken else run.path.name, run))
    return models


def choose_samples(board: Board, kept: int = KEPT) -> dict[str, Any] | None:
    """What the page's browser shows, the picked `samples` among it; None where no run has any."""
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
        picked = pick(documents, categories, scores, pair, share)
        samples += _rows(models, task.id, [documents[i] for i in picked], len(tasks))
        about = {
            "id": task.id, "name": clean(task.short), "documents": len(documents),
            "better": better(scores),
        }  # fmt: skip
        tasks.append(about)
    if not samples:
        return None
    samples = within(samples, ANSWER_BUDGET)
    return {
        "models": [{"key": clean(model.key), "name": model.name} for model in models],
        "pair": list(pair), "tasks": tasks, "samples": samples,
        "images": _thumbnails(models, {sample["i"] for sample in samples}),
    }  # fmt: skip


def _first_pair(board: Board, models: list[Model]) -> tuple[int, int]:
    """The floor against the best student; the first and the last model where there is no floor."""
    place = {model.key: index for index, model in enumerate(models)}
    others = [e for e in board.students if board.floor is None or e.key != board.floor.key]
    if board.floor is not None and others:
        return place[board.floor.runs[0].path.name], place[others[0].runs[0].path.name]
    return (len(models) - 1, 0) if models else (0, 0)


def _score_matrix(models: list[Model], task: str) -> tuple[list[str], list[str], Array] | None:
    """Document ids, their categories, and scores [documents, models], NaN where not measured."""
    frames = dict(_frames(models, task, ("document_id", "category", "score")))
    frames = {index: frame.set_index("document_id") for index, frame in frames.items()}
    largest = max(frames.values(), key=len, default=None)
    if largest is None or not len(largest):
        return None
    ids = largest.index
    scores = np.full((len(ids), len(models)), np.nan)
    for index, frame in frames.items():
        column = frame["score"].astype("float32")
        scores[:, index] = column if column.index.equals(ids) else column.reindex(ids)
    return [str(name) for name in ids], largest["category"].astype(str).tolist(), scores


def _frames(
    models: list[Model], task: str, columns: Sequence[str] = SAMPLE_COLUMNS
) -> "Iterator[tuple[int, pd.DataFrame]]":
    """The samples of each model, by its place, that has a sound file of them; documents once."""
    for index, model in enumerate(models):
        if not model.run.done(task):
            continue
        try:
            frame = model.run.samples(task, columns)
        except KdBenchError:
            continue
        yield index, frame.drop_duplicates("document_id")


def better(scores: Array) -> list[list[int]]:
    """[a][b]: on how many documents model b scores more than model a; scores [documents, models].

    Not measured (NaN) is neither better nor worse.
    """
    columns = range(scores.shape[1])
    return [np.count_nonzero(scores > scores[:, [a]], axis=0).tolist() for a in columns]


def pick(
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
    rows: dict[str, dict[str, Any]] = {}
    for index, frame in _frames(models, task):
        for record in frame[frame["document_id"].isin(set(documents))].to_dict("records"):
            row = rows.setdefault(str(record["document_id"]), _row(record, number, len(models)))
            row["a"][index] = bounded(record["answer"])
            score, status = float(record["score"]), str(record["status"])
            row["s"][index] = round(score, 3) if math.isfinite(score) else None
            row["z"][index] = "" if status == "ok" else status
    return [rows[name] for name in documents if name in rows]


def _row(record: dict[Any, Any], task: int, models: int) -> dict[str, Any]:
    return {
        "t": task, "d": clean(str(record["document_id"])), "c": clean(str(record["category"])),
        "q": bounded(record["question"]), "y": bounded(record["target"]),
        "i": _digest(record["image_digest"]),
        "a": [None] * models, "s": [None] * models, "z": [""] * models,
    }  # fmt: skip


def _digest(value: Any) -> str:
    """The first sixteen hexadecimal digits; anything else names no file."""
    text = str(value)[:16]
    return text if len(text) == 16 and all(c in "0123456789abcdef" for c in text) else ""


def bounded(value: Any) -> str:
    """Text as the page keeps it: lines stay, other control characters go, length is bounded."""
    text = "\n".join(clean(line) for line in str(value).split("\n")).strip()
    return text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + " …"


def within(samples: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Every n-th sample, so that their texts fit the budget."""
    sizes = [len(json.dumps(sample, ensure_ascii=False).encode()) for sample in samples]
    step = max(1, math.ceil(sum(sizes) / budget))
    return samples[::step]


# --- images ------------------------------------------------------------------------------------


def _thumbnails(models: list[Model], digests: set[str]) -> dict[str, str]:
    """Data URIs by image digest; smaller ones where the budget would not hold them all."""
    stores = {model.run.images: model.run for model in models}.values()
    names = sorted(digests - {""})
    files = {name: path for name in names for run in stores if (path := run.image(name))}
    for size, quality in ((IMAGE_SIZE, 82), (160, 75), (128, 70), (96, 60), (64, 50)):
        found = {name: thumbnail(path, size, quality) for name, path in files.items()}
        if sum(map(len, found.values())) <= IMAGE_BUDGET:
            return {name: uri for name, uri in found.items() if uri}
    return {}


def thumbnail(path: Path, size: int, quality: int) -> str:
    """An image of at most `size` pixels a side as a data URI; empty where it cannot be read."""
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
        for model, task in itertools.product(models_of(board), board.tasks):
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
