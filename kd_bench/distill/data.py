"""Read training conversations: files and rows in the forms that they have in the wild, and images.

Null is absent everywhere. Every part of a row is used, or the row is `Unreadable` with the reason:
what would be dropped without a word (a video, an image under an unknown key) would be learnt blind.
Nothing is tokenised here, see `encoding.py`.
"""

import base64
import binascii
import contextlib
import io
import posixpath
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image, ImageFile, ImageOps

from kd_bench.distill.recipe import MAX_PIXELS
from kd_bench.errors import UsageError

BITS_PER_SAMPLE = 258  # the TIFF tag
SIXTEEN_BITS = {"PNG", "PPM"}  # formats whose mode "I" holds 0 to 65,535

_settings = threading.Lock()  # Pillow's are those of the whole process


class Unreadable(Exception):  # noqa: N818 - a finding, not a failure of the program
    """One sample cannot be used; the message says why."""

    def __init__(self, reason: str) -> None:  # printable, whatever words of the data it repeats
        super().__init__(reason.encode("utf-8", "replace").decode("utf-8"))


def open_image(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one image fully: RGB of 8 bits, upright by its EXIF tag.

    16-bit greyscale is scaled by the format's full range. Pixels without a stated range (floats,
    32-bit integers) are refused, because a converter would clip them without a word.

    Raises:
        Unreadable: missing, damaged, truncated, larger than `max_pixels`, or no image.
    """
    name = source.name if isinstance(source, Path) else "an embedded image"
    try:
        with _settings:
            kept = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
            # lmms-eval switches the second one on: half an image would come back grey.
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
            try:
                with warnings.catch_warnings():  # about tags that nobody here reads
                    warnings.simplefilter("ignore")
                    return _decoded(source, max_pixels)
            finally:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = kept
    except Unreadable as error:
        raise Unreadable(f"{name}: {error}") from None
    except FileNotFoundError:
        raise Unreadable(f"{name} is missing") from None
    except Exception as error:  # decoders raise whatever their format suggests to them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreadable(f"{name}: {reason}") from None


def _decoded(source: Path | bytes, max_pixels: int) -> Image.Image:
    with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as opened:
        if opened.width * opened.height > max_pixels:
            raise Unreadable(
                f"{opened.width} x {opened.height} pixels are more than the {max_pixels:,} allowed"
            )
        return _upright(opened)


def _upright(image: Image.Image) -> Image.Image:
    """RGB of 8 bits; the image itself is turned, as a copy would not know its format and tags."""
    image.load()
    with contextlib.suppress(Exception):  # damaged tags say nothing
        ImageOps.exif_transpose(image, in_place=True)
    return _eight_bits(image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of more than 8 bits scaled from 0 to its format's largest value."""
    import numpy as np

    if image.mode == "I" and image.format in SIXTEEN_BITS:
        bits = 16
    elif image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        bits = int(tags.get(BITS_PER_SAMPLE, (16,))[0])
    elif image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise Unreadable(f"{kind} pixels have no stated range; save it with 8 or 16 bits a pixel")
    else:
        return image
    largest = (1 << bits) - 1
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + largest // 2) // largest).astype(np.uint8))


IMAGE_MARK = "<image>"
ROLES: dict[str, Literal["user", "assistant", "system"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
IMAGE_KEYS = ("image", "images")
REJECTED = ("rejected_response", "rejected", "rejected_messages", "rejected_images")
NOT_SUPPORTED = ("tools", *REJECTED)  # keys of rows
MEDIA_KEY = re.compile(r"video|audio", re.IGNORECASE)  # what keys for them begin with, anywhere
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
NOT_SUPPORTED_IN_TURNS = ("tool_calls", "function_call", *THOUGHTS)
MEDIA_MARKS = ("<video>", "<audio>")
NOT_LEARNT = ("weight", "train", "loss", "loss_scale")  # keys of turns that some trainers weigh
IMAGE_NAME = re.compile(
    r"\.(a?png|jpe?g?|jfif|jp2|jxl|webp|gif|bmp|tiff?|avif|hei[cf]|svg|p[bgpn]m|tga)([?#].*)?$",
    re.IGNORECASE,
)
IMAGE_KEY = re.compile(
    r"((images?|img|pictures?|photos?)[ _-]?(\d+|(path|file|url|bytes|base64)s?)?|bytes|base64)",
    re.IGNORECASE,
)
WEB = re.compile(r"https?://", re.IGNORECASE)
ORIGIN = ("source", "data_source", "dataset", "model", "image_id", "image_name", "file_name",
          "filename")  # fmt: skip # keys of rows that may name the file of an image beside it
IN_PART = ("image", "image_url", "url", "path", "bytes", "base64")  # where a part has its image
IN_ENTRY = ("bytes", "base64", "path", "url", "image")  # where a mapping has it
ABOUT_PART = ("id", "index", "name", "filename", "detail", "media_type", "mime_type",
              "cache_control", "annotations")  # fmt: skip # nothing to learn from
SHOWN_KEYS = 8
DEEPEST = 100  # levels of lists and mappings in a row

Source: TypeAlias = Path | bytes
Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """One message: text pieces and image places in order; None is an image."""

    role: Literal["system", "user", "assistant"]
    pieces: tuple[str | None, ...]


@dataclass(frozen=True)
class Conversation:
    """Turns, and the images for their places in order (file paths, or encoded bytes).

    Attributes:
        number: its row in its file, from 0.
        form: of its row, a name of `FORMS`.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Source, ...] = field(repr=False)
    number: int | None = field(default=None, compare=False)
    form: str = field(default="", compare=False)

    def given_up(self, reason: object) -> tuple[str, str]:
        """Its id, and why it cannot be used, with its row where the id does not tell."""
        told = self.number is None or self.id == str(self.number)
        return self.id, str(reason) if told else f"{reason} (row {self.number})"

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


@dataclass(frozen=True)
class _Image:
    """An image that stands inside a turn; a place for one of the row's list is None."""

    entry: Any


Piece: TypeAlias = str | _Image | None
Said: TypeAlias = tuple[Literal["system", "user", "assistant"], tuple[Piece, ...]]
"""Role and pieces of one message before its images have found their places."""


def conversation_of(row: Any, number: int, folder: Path) -> Conversation:
    """The conversation of one row, whatever its form.

    Args:
        folder: image names are relative to it.

    Raises:
        Unreadable: the row cannot be used.
        UsageError: an image's name leaves the folder.
    """
    if not isinstance(row, Mapping):
        raise Unreadable("not a mapping")
    row = _without_nulls(row)
    identifier = identifier_of(row, number)
    form = form_of(row)
    for key in NOT_SUPPORTED:
        if row.get(key):
            what = key if key.startswith("rejected") else key.removesuffix("s")
            raise Unreadable(f"{what} is not supported")
    _refuse_media(row)
    said = FORMS[form].read(row)
    if not said:
        raise Unreadable("no conversations")
    _refuse_unused_text(row, form, said)
    listed = [entry for key in IMAGE_KEYS for entry in _listed(row.get(key))]
    turns, entries = _placed(said, listed)
    _refuse_hidden_images(row, ("id", *TEXT_KEYS, *IMAGE_KEYS), beside=bool(entries))
    if not any(turn.role == "assistant" for turn in turns):
        raise Unreadable("no answer to learn from")
    images = tuple(_source(entry, identifier, folder) for entry in entries)
    return Conversation(identifier, turns, images, number, form)


def identifier_of(row: Any, number: int) -> str:
    """A row's own id, else its number."""
    found = row.get("id") if isinstance(row, Mapping) else None
    try:
        text = str(number if found is None else found)[:200]
    except RecursionError:  # such a row is nested too deep
        text = str(number)
    return text.encode("utf-8", "replace").decode("utf-8")


def form_of(row: Row) -> str:
    """The name of the form that a row without nulls has.

    Raises:
        Unreadable: none of `FORMS`.
    """
    for name, form in FORMS.items():
        if any(all(key in row for key in keys) for keys in form.needs):
            return name
    keys = ", ".join(str(key)[:60] for key in list(row)[:SHOWN_KEYS]) or "none"
    raise Unreadable(f"its form is not known (keys: {keys}); known are: {', '.join(FORMS)}")


# Forms


def _conversations(row: Row) -> list[Said]:
    """LLaVA's and ShareGPT's `conversations` (from, value), OpenAI's `messages` (role, content)."""
    said = _only(row, "conversations", "messages")
    if not isinstance(said, list | tuple):
        raise Unreadable("no conversations")
    return [*_system(row), *map(_message, said)]


def _texts(row: Row) -> list[Said]:
    """The Cauldron's `images` and `texts` (user, assistant)."""
    said = _system(row)
    for pair in row["texts"] if isinstance(row["texts"], list | tuple) else [None]:
        if not isinstance(pair, Mapping) or not {"user", "assistant"} <= set(pair):
            raise Unreadable("a text is not a pair of user and assistant")
        _refuse_media(pair)
        _refuse_hidden_images(pair, ("user", "assistant", *ORIGIN))
        said += [_spoken("user", pair["user"]), _spoken("assistant", pair["assistant"])]
    return said


def _prompt_and_completion(row: Row) -> list[Said]:
    """TRL's: each a text or a list of messages."""
    said = _system(row)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[key]
        if isinstance(value, list | tuple):
            said += map(_message, value)
        else:
            said.append(_spoken(role, value))
    return said


def _query_and_response(row: Row) -> list[Said]:
    """ms-swift's: `query`, `response`, earlier turns in `history`, `system`."""
    return _single(row, row["query"], row["response"])


def _instruction_and_output(row: Row) -> list[Said]:
    """Alpaca's: `instruction`, an optional `input` on the lines behind it, `output`."""
    asked = row["instruction"]
    if isinstance(asked, str) and isinstance(row.get("input"), str) and row["input"]:
        asked = f"{asked}\n{row['input']}"
    elif row.get("input") not in (None, ""):
        raise Unreadable("its input is no text")
    return _single(row, asked, row["output"])


def _single(row: Row, asked: Any, answer: Any) -> list[Said]:
    turns = (_spoken("user", asked), _spoken("assistant", answer))
    return [*_system(row), *_history(row), *turns]


@dataclass(frozen=True)
class Form:
    """One form of rows.

    Attributes:
        read: row -> messages.
        needs: alternative sets of keys that a row of this form has.
        further: keys for text that it reads, too, beside the system's.
    """

    read: Callable[[Row], list[Said]]
    needs: tuple[tuple[str, ...], ...]
    further: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys for text that the form reads."""
        return (*(key for keys in self.needs for key in keys), *self.further, *SYSTEM_KEYS)


SYSTEM_KEYS = ("system", "system_prompt")
FORMS = {
    "conversations": Form(_conversations, (("conversations",), ("messages",))),
    "texts": Form(_texts, (("texts",),)),
    "prompt and completion": Form(_prompt_and_completion, (("prompt", "completion"),)),
    "query and response": Form(_query_and_response, (("query", "response"),), ("history",)),
    "instruction and output": Form(
        _instruction_and_output, (("instruction", "output"),), ("input", "history")
    ),
}
"""How each form's rows are known and read, by the form's name."""

TEXT_KEYS = tuple(dict.fromkeys(key for form in FORMS.values() for key in form.keys))


def _system(row: Row) -> list[Said]:
    """A system message that stands in a key of its own."""
    text = _only(row, *SYSTEM_KEYS)
    return [] if text in (None, "") else [_spoken("system", text)]


def _history(row: Row) -> list[Said]:
    said: list[Said] = []
    for pair in _listed(row.get("history")):
        if isinstance(pair, Mapping):
            said.append(_message(pair))
        elif isinstance(pair, list | tuple) and len(pair) == 2:
            said += [_spoken("user", pair[0]), _spoken("assistant", pair[1])]
        else:
            raise Unreadable("its history is not made of questions with answers")
    return said


# Messages and their parts


def _message(message: Any) -> Said:
    if not isinstance(message, Mapping):
        raise Unreadable("a turn is not a mapping")
    role = message.get("from", message.get("role"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Unreadable(f"unknown speaker {_short(role)}")
    other = message.get("role", role)
    if not isinstance(other, str) or ROLES.get(other.lower()) != ROLES[role.lower()]:
        raise Unreadable("a turn's from and role contradict each other")
    for key in NOT_SUPPORTED_IN_TURNS:
        if message.get(key):
            raise Unreadable(f"a turn with {key} is not supported")
    for key in NOT_LEARNT:
        if key in message and message[key] not in (1, True):
            raise Unreadable(f"a turn with {key}={_short(message[key])} is not supported")
    said = _spoken(role.lower(), _only(message, "value", "content"))
    _refuse_media(message)
    _refuse_hidden_images(message, ("from", "role", "value", "content", *IMAGE_KEYS))
    _refuse_other_text(message, said)
    own = [entry for key in IMAGE_KEYS for entry in _listed(message.get(key))]
    return _with_own_images(said, own) if own else said


def _with_own_images(said: Said, own: list[Any]) -> Said:
    """A message with the images of its own keys: at its marks, else before its text."""
    role, pieces = said
    if role == "assistant":
        raise Unreadable("an answer holds an image")
    if all(isinstance(piece, str) for piece in pieces):
        pieces = (None,) * len(own) + pieces
    if pieces.count(None) != len(own):
        raise Unreadable(f"{pieces.count(None)} {IMAGE_MARK} marks for {len(own)} images of a turn")
    rest = iter(own)
    return role, tuple(_Image(next(rest)) if piece is None else piece for piece in pieces)


def _spoken(role: str, content: Any) -> Said:
    if isinstance(content, str):
        pieces: tuple[Piece, ...] = _pieces(_text(content))
    elif isinstance(content, list | tuple):
        pieces = tuple(map(_part, content))
    else:
        raise Unreadable("a turn has no text")
    for mark in MEDIA_MARKS:
        if any(isinstance(piece, str) and mark in piece for piece in pieces):
            raise Unreadable(f"its text holds {mark}, which is not supported")
    if role in ("assistant", "gpt", "model") and not all(isinstance(p, str) for p in pieces):
        raise Unreadable(f"an answer holds {IMAGE_MARK}")
    return ROLES[role], pieces


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


def _part(part: Any) -> Piece:
    """One part of a message: OpenAI's, Qwen's or TRL's way to write text and images."""
    if not isinstance(part, Mapping):
        raise Unreadable(f"a part of a turn is {_short(part)}, not a mapping")
    kind = part.get("type", next((key for key in ("text", "image") if key in part), None))
    if kind in ("text", "input_text"):
        text = part.get("text", "" if set(part) <= {"type"} else None)  # null is absent
        if not isinstance(text, str) or _beside(part, "text"):
            raise Unreadable("a text part of a turn is not text alone")
        return _text(text)
    if kind not in ("image", "image_url", "input_image"):
        raise Unreadable(f"{_short(kind)} is not supported")
    if part.get("text"):
        raise Unreadable("an image part of a turn holds text")
    if other := _beside(part, "source", *IN_PART):
        raise Unreadable(f"an image part of a turn holds {_short(other)}, too")
    given = [key for key in ("source", *IN_PART) if part.get(key) not in (None, "")]
    if len(given) > 1 and set(given) != {"bytes", "path"}:
        raise Unreadable(f"an image part of a turn has both {given[0]} and {given[1]}")
    if not given:
        return None
    key = "bytes" if "bytes" in given else given[0]
    if key == "source":
        return _Image(_from_source(part[key]))
    return _Image(part[key] if key not in ("bytes", "base64") else {key: part[key]})


def _beside(part: Row, *used: str) -> str | None:
    """A key of a part that is not used and says something; numbers are settings."""
    for key, value in part.items():
        is_number = isinstance(value, int | float) and not MEDIA_KEY.match(str(key))
        if value and not is_number and key not in ("type", *used, *ABOUT_PART):
            return key
    return None


def _from_source(source: Any) -> Any:
    """The entry for Anthropic's `source` of an image part."""
    if isinstance(source, Mapping) and source.get("type") == "base64" and source.get("data"):
        return {"base64": source["data"]}
    if isinstance(source, Mapping) and source.get("type") == "url" and source.get("url"):
        return source["url"]
    raise Unreadable("an image part's source is neither base64 nor url")


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unreadable("its text is not valid Unicode (a lone surrogate)") from None
    return text


# Images


def _placed(said: list[Said], listed: list[Any]) -> tuple[tuple[Turn, ...], list[Any]]:
    """Turns with places, and the entry of each place: its own, else the next of the row's list."""
    places = [piece for _, pieces in said for piece in pieces if not isinstance(piece, str)]
    waiting = sum(place is None for place in places)
    if listed and not places:  # images without a mark come first, as LLaVA's own data does
        first = next((i for i, (role, _) in enumerate(said) if role == "user"), 0)
        role, pieces = said[first]
        said = [*said[:first], (role, (None,) * len(listed) + pieces), *said[first + 1 :]]
    elif waiting != len(listed):
        raise Unreadable(f"{waiting} {IMAGE_MARK} marks for {len(listed)} images")
    rest = iter(listed)
    turns: list[Turn] = []
    entries: list[Any] = []
    for role, pieces in said:
        turns.append(Turn(role, tuple(p if isinstance(p, str) else None for p in pieces)))
        images = (piece for piece in pieces if not isinstance(piece, str))
        entries += [next(rest) if image is None else image.entry for image in images]
    return tuple(turns), entries


def _source(entry: Any, identifier: str, folder: Path) -> Source:
    """An image's file, or its encoded bytes; a file outside the folder is refused for all rows."""
    if isinstance(entry, bytes | bytearray):
        return bytes(entry)
    if isinstance(entry, Image.Image):
        return _encoded(entry)
    if isinstance(entry, Mapping):
        _refuse_media(entry)
        _refuse_hidden_images(entry, (*IN_ENTRY, *ABOUT_PART))
        given = [key for key in IN_ENTRY if entry.get(key)]
        if given[1:] and given != ["bytes", "path"]:
            raise Unreadable(f"an image has both {given[0]} and {given[1]}")
        key = given[0] if given else "path"
        if key == "bytes":
            return _from_bytes(entry[key])
        if key == "base64":
            return _from_base64(entry[key])
        if isinstance(entry.get(key), Mapping | Image.Image | bytes):
            return _source(entry[key], identifier, folder)
        entry = entry.get(key)
    if not isinstance(entry, str) or not entry:
        raise Unreadable("an image has no name")
    if entry.startswith("data:"):
        return _from_base64(entry.partition(",")[2])
    if WEB.match(entry):
        raise Unreadable(f"the image {_short(entry)} is on the web; download it first")
    plain = posixpath.normpath(_text(entry).removeprefix("file://").replace("\\", "/"))
    if "\0" in plain or any(len(part.encode()) > 255 for part in plain.split("/")):
        raise Unreadable("an image's name is no file name")
    if entry.startswith("file://") and plain.startswith(f"{folder}/"):
        return Path(plain)
    if plain.startswith(("/", "../")) or plain == ".." or re.match(r"[A-Za-z]:", plain):
        raise UsageError(
            f"Sample {identifier} names the image {entry!r}, outside of {folder}.",
            "Image names must stay below data.images.",
        )
    return folder / plain


def _encoded(image: Image.Image) -> bytes:
    """A decoded image, as `datasets` gives those inside messages, as PNG."""
    buffer = io.BytesIO()
    try:
        _upright(image).save(buffer, "PNG", compress_level=1)
    except Exception as error:  # decoders raise whatever their format suggests to them
        raise Unreadable(f"a decoded image: {str(error) or type(error).__name__}") from None
    return buffer.getvalue()


def _from_bytes(data: Any) -> bytes:
    """Arrow gives bytes, JSON a list of their numbers."""
    if isinstance(data, bytes | bytearray):
        return bytes(data)
    if isinstance(data, list) and all(type(each) is int and 0 <= each < 256 for each in data):
        return bytes(data)
    raise Unreadable("an image's bytes are not bytes")


def _from_base64(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise Unreadable("an image is not valid base64") from None


# Nothing is dropped


def _only(row: Row, first: str, second: str) -> Any:
    """The value under one of two keys for the same thing; both may hold it if they agree."""
    given = [row[key] for key in (first, second) if row.get(key) not in (None, "", [])]
    if len(given) == 2 and given[0] != given[1]:
        raise Unreadable(f"{first} and {second} both say something, and not the same")
    return given[0] if given else row.get(first, row.get(second))


def _refuse_unused_text(row: Row, form: str, said: list[Said]) -> None:
    """Refuse rows that say something more under a key that their form does not read."""
    whole = "\n".join(piece for _, pieces in said for piece in pieces if isinstance(piece, str))
    for key in TEXT_KEYS:
        value = row.get(key)
        if not value or key in FORMS[form].keys:
            continue
        if not isinstance(value, str) or value.replace(IMAGE_MARK, "").strip() not in whole:
            raise Unreadable(f"its key {key} is not read from the form {form}")


def _refuse_other_text(message: Row, said: Said) -> None:
    """Refuse a turn whose text stands under another key, or that says something more there."""
    whole = "".join(piece for piece in said[1] if isinstance(piece, str))
    is_empty = not whole.strip() and all(isinstance(piece, str) for piece in said[1])
    read = {"from", "role", "value", "content", *IMAGE_KEYS, *ABOUT_PART, *ORIGIN}
    others = [key for key in message if key not in read] if is_empty else []
    for key in ("text", *TEXT_KEYS, *others):
        value = message.get(key)
        if isinstance(value, int | float) or not value:
            continue
        if not isinstance(value, str) or value.replace(IMAGE_MARK, "").strip() not in whole:
            raise Unreadable(f"a turn's key {_short(key)} is not read")


def _refuse_media(owner: Row) -> None:
    """Refuse videos and audio, whatever their keys are called in full."""
    for key, value in owner.items():
        if value and MEDIA_KEY.match(str(key)):
            raise Unreadable(f"{str(key).removesuffix('s')} is not supported")


def _refuse_hidden_images(owner: Row, read: tuple[str, ...], *, beside: bool = False) -> None:
    """Refuse what seems to have an image under a key that is not read.

    Args:
        beside: images of this row are used, so that it may also tell where they are from.
    """
    for key, value in owner.items():
        told = isinstance(value, str) and (
            key in ORIGIN or (WEB.match(value) and not IMAGE_KEY.fullmatch(str(key)))
        )
        if key not in read and not (beside and told) and _looks_like_image(str(key), value):
            raise Unreadable(
                f"its key {_short(key)} looks like an image; images are read from "
                f"{' and '.join(IMAGE_KEYS)}"
            )


def _looks_like_image(key: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_looks_like_image(str(name), each) for name, each in value.items())
    if isinstance(value, list | tuple):
        numbers = bool(value) and key == "bytes"
        return numbers or any(_looks_like_image(key, each) for each in value)
    if isinstance(value, str) and value:
        is_name = len(value) < 500 and IMAGE_NAME.search(value)
        return bool(is_name or IMAGE_KEY.fullmatch(key) or re.match(r"data:[^\s,]*,", value))
    return isinstance(value, bytes | bytearray | Image.Image)


def _listed(value: Any) -> list[Any]:
    """A value that may stand alone or in a list; empty texts are absent."""
    values: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if each is not None and each != ""]


def _without_nulls(value: Any, level: int = 1) -> Any:
    """Mappings without the keys that are null: Arrow writes one for every key that others have."""
    if level > DEEPEST and isinstance(value, Mapping | list | tuple):
        raise Unreadable(f"nested too deep (more than {DEEPEST} levels)")
    if isinstance(value, Mapping):
        kept = {key: each for key, each in value.items() if each is not None}
        return {key: _without_nulls(each, level + 1) for key, each in kept.items()}
    if isinstance(value, list | tuple):
        return [_without_nulls(each, level + 1) for each in value]
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
