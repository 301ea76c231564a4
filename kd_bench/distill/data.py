"""Read training conversations: JSON, JSONL, or a Hugging Face dataset on disk.

What a row may look like stands in `forms.py`; nothing is tokenised here, see `batches.py`.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kd_bench.distill.forms import Conversation, conversation_of, identifier_of
from kd_bench.distill.images import Unreadable
from kd_bench.distill.recipe import DataSource
from kd_bench.errors import UsageError, one_line
from kd_bench.world.build import resolve

CONTENT_LIMIT = 1 << 30  # pictures beyond this many bytes enter the digest by name and size


def read_conversations(source: DataSource) -> tuple[list[Conversation], list[tuple[str, str]]]:
    """All conversations of a source, and (name, reason) of those that are malformed.

    `skip` and `limit` count rows, so what is not asked for is not read.

    Raises:
        UsageError: a file is missing or not in a known form, or a picture's name leaves its folder.
    """
    sound: list[Conversation] = []
    broken: list[tuple[str, str]] = []
    last = None if source.limit is None else source.skip + source.limit
    for number, row, folder in islice(_all_rows(source), source.skip, last):
        identifier = identifier_of(row, number)
        try:
            if isinstance(row, Unreadable):
                raise row
            sound.append(conversation_of(row, number, folder))
        except Unreadable as error:
            broken.append(Conversation(identifier, (), (), number).given_up(error))
    if not sound and not broken:
        raise UsageError(f"{source.path} holds no conversations.", "Check data.path.")
    return sound, broken


def _all_rows(source: DataSource) -> Iterator[tuple[int, Any, Path]]:
    """Every row with its number in its file, and the folder its picture names are relative to."""
    for path in [source.path] if isinstance(source.path, str) else source.path:
        rows, folder = _rows(resolve(path), source.images)
        for number, row in enumerate(rows):
            yield number, row, folder


def _rows(path: Path, images: str | None) -> tuple[Any, Path]:
    """Raw rows of one file or folder; a line that is not JSON is an `Unreadable` among them."""
    if not path.exists():
        raise UsageError(f"There is no training data at {path}.", "Check data.path.")
    folder = resolve(images) if images else path if path.is_dir() else path.parent
    if path.is_dir():
        return _dataset_rows(path), folder
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl" or _is_lines(text):
            return [_line(line) for line in text.split("\n") if line.strip()], folder
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}.", "Repair that place.") from None
    if not isinstance(rows, list):
        raise UsageError(f"{path}: expected a list of conversations.", "LLaVA's JSON form is one.")
    return rows, folder


def _is_lines(text: str) -> bool:
    """Whether a file of another name holds one JSON object a line."""
    first, _, rest = text.partition("\n")
    return bool(rest.strip()) and isinstance(_line(first), dict)


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"its line is not valid JSON: {one_line(error)}")


def _dataset_rows(path: Path) -> Any:
    """Rows of a dataset folder with pictures left encoded, decoded only when needed."""
    from datasets import DatasetDict, Features, Sequence, load_from_disk
    from datasets import Image as ImageFeature

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # damaged files raise whatever their reader trips over
        raise UsageError(
            f"{path} is not a dataset folder: {one_line(error)}",
            "Write it with dataset.save_to_disk.",
        ) from None
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset:
            raise UsageError(f"{path} has no split named train.", "Name one of its split folders.")
        dataset = dataset["train"]
    features = dict(dataset.features)
    for name, feature in features.items():
        if isinstance(feature, ImageFeature):
            features[name] = ImageFeature(decode=False)
        elif isinstance(getattr(feature, "feature", None), ImageFeature):
            features[name] = type(feature)(ImageFeature(decode=False))
        elif isinstance(feature, list) and isinstance(feature[0], ImageFeature):
            features[name] = Sequence(ImageFeature(decode=False))
    return dataset.cast(Features(features))


def data_digest(conversations: list[Conversation]) -> dict[str, Any]:
    """Fingerprint of what is learnt from: turns, and pictures by content.

    Beyond 1 GiB of pictures the rest enters by name and size only; `pictures` says which.
    """
    digest = hashlib.sha256()
    budget = CONTENT_LIMIT
    by_content = True
    count = 0
    for conversation in conversations:
        turns = [(turn.role, turn.pieces) for turn in conversation.turns]
        digest.update(json.dumps([conversation.id, turns]).encode())
        for image in conversation.images:
            count += 1
            if isinstance(image, bytes):
                digest.update(hashlib.sha256(image).digest())
                continue
            size = image.stat().st_size if image.is_file() else -1
            digest.update(f"{image.name} {size}".encode())
            budget -= max(size, 0)
            if budget >= 0 and size >= 0:
                digest.update(hashlib.sha256(image.read_bytes()).digest())
            else:
                by_content = by_content and size < 0
    return {
        "sha256": digest.hexdigest(),
        "conversations": len(conversations),
        "images": count,
        "pictures": "content" if by_content else "names and sizes",
    }
