"""Read training conversations: LLaVA JSON, JSONL, or a Hugging Face dataset on disk.

A conversation is a list of turns with pictures inside, whatever file it came from. Nothing is
tokenised here; see `batches.py`.
"""

import hashlib
import json
import posixpath
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kd_bench.distill.images import Unreadable, open_image
from kd_bench.distill.recipe import DataSource
from kd_bench.errors import UsageError
from kd_bench.world.embedded import resolve

__all__ = ["Conversation", "Turn", "Unreadable", "data_digest", "open_image", "read_conversations"]

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
CONTENT_LIMIT = 1 << 30  # pictures beyond this many bytes enter the digest by name and size


@dataclass(frozen=True)
class Turn:
    """One message: text pieces and picture places in order; None is a picture."""

    role: Literal["system", "user", "assistant"]
    pieces: tuple[str | None, ...]


@dataclass(frozen=True)
class Conversation:
    """Turns, and the pictures for their places in order (file paths, or encoded bytes)."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path | bytes, ...] = field(repr=False)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What a chat template takes."""
        return [
            {
                "role": turn.role,
                "content": [
                    {"type": "image"} if piece is None else {"type": "text", "text": piece}
                    for piece in turn.pieces
                ],
            }
            for turn in self.turns
        ]


def read_conversations(source: DataSource) -> tuple[list[Conversation], list[tuple[str, str]]]:
    """All conversations of a source, and (id, reason) of those that are malformed.

    Raises:
        UsageError: a file is missing or not in a known form, or a picture's name leaves its folder.
    """
    paths = [source.path] if isinstance(source.path, str) else source.path
    sound: list[Conversation] = []
    broken: list[tuple[str, str]] = []
    for path in paths:
        for index, (row, folder) in enumerate(_rows(resolve(path), source.images)):
            identifier = str(row.get("id", index)) if isinstance(row, dict) else str(index)
            try:
                sound.append(_conversation(row, identifier, folder))
            except Unreadable as error:
                broken.append((identifier, str(error)))
    last = None if source.limit is None else source.skip + source.limit
    sound = sound[source.skip : last]
    if not sound and not broken:
        raise UsageError(f"{source.path} holds no conversations.", "Check data.path.")
    return sound, broken


def _rows(path: Path, images: str | None) -> list[tuple[Any, Path]]:
    """Raw rows, each with the folder its picture names are relative to."""
    if not path.exists():
        raise UsageError(f"There is no training data at {path}.", "Check data.path.")
    if path.is_dir():
        return [(row, path) for row in _dataset_rows(path)]
    folder = resolve(images) if images else path.parent
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}.", "Repair that place.") from None
    if not isinstance(rows, list):
        raise UsageError(f"{path}: expected a list of conversations.", "LLaVA's JSON form is one.")
    return [(row, folder) for row in rows]


def _dataset_rows(path: Path) -> Any:
    """Rows of a dataset folder with pictures left encoded, decoded only when needed."""
    from datasets import DatasetDict, Features, Sequence, load_from_disk
    from datasets import Image as ImageFeature

    try:
        dataset = load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise UsageError(
            f"{path} is not a dataset folder: {error}", "Write it with dataset.save_to_disk."
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


def _conversation(row: Any, identifier: str, folder: Path) -> Conversation:
    if not isinstance(row, dict):
        raise Unreadable("not a mapping")
    said = row.get("conversations", row.get("messages"))
    if not isinstance(said, list) or not said:
        raise Unreadable("no conversations")
    turns = tuple(_turn(message) for message in said)
    named = row.get("image", row.get("images"))
    named = [] if named is None else named if isinstance(named, list) else [named]
    images = tuple(_image(entry, identifier, folder) for entry in named)
    places = sum(piece is None for turn in turns for piece in turn.pieces)
    if images and not places:  # pictures without a mark come first, as LLaVA's own data does
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
        opened = Turn(turns[first].role, (None,) * len(images) + turns[first].pieces)
        turns = (*turns[:first], opened, *turns[first + 1 :])
    elif places != len(images):
        raise Unreadable(f"{places} {IMAGE_MARK} marks for {len(images)} pictures")
    if not any(turn.role == "assistant" for turn in turns):
        raise Unreadable("no answer to learn from")
    return Conversation(identifier, turns, images)


def _turn(message: Any) -> Turn:
    """One message of LLaVA's form (`from`, `value`) or the chat form (`role`, `content`)."""
    if not isinstance(message, dict):
        raise Unreadable("a turn is not a mapping")
    role = message.get("from", message.get("role"))
    content = message.get("value", message.get("content"))
    if role == "system" and isinstance(content, str):
        return Turn("system", (content,))
    if role not in ROLES:
        raise Unreadable(f"unknown speaker {role!r}")
    if isinstance(content, list):
        pieces = tuple(
            None if part.get("type") == "image" else str(part.get("text", "")) for part in content
        )
    elif isinstance(content, str):
        pieces = _pieces(content)
    else:
        raise Unreadable("a turn has no text")
    return Turn("user" if ROLES[role] == "user" else "assistant", pieces)


def _pieces(text: str) -> tuple[str | None, ...]:
    """Split at `<image>` marks; the line break that LLaVA writes beside a mark belongs to it."""
    if IMAGE_MARK not in text:
        return (text,)
    pieces: list[str | None] = []
    for part in re.split(rf"(\n?{IMAGE_MARK}\n?)", text):
        if part.strip("\n") == IMAGE_MARK:
            pieces.append(None)
        elif part:
            pieces.append(part)
    return tuple(pieces)


def _image(entry: Any, identifier: str, folder: Path) -> Path | bytes:
    if isinstance(entry, dict):  # an encoded picture of a dataset
        if entry.get("bytes"):
            return bytes(entry["bytes"])
        entry = entry.get("path")
    if not isinstance(entry, str) or not entry:
        raise Unreadable("a picture has no name")
    plain = posixpath.normpath(entry.replace("\\", "/"))
    if plain.startswith(("/", "../")) or plain == ".." or re.match(r"[A-Za-z]:", plain):
        raise UsageError(
            f"Sample {identifier} names the picture {entry!r}, outside of {folder}.",
            "Picture names must stay below data.images.",
        )
    return folder / plain


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
