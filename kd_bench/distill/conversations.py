"""Training conversations, memory-mapped: JSON, JSONL, parquet, `datasets` folders, hub names.

A source is read once, row by row, into an index: an Arrow file in the cache folder that is found
again by names, sizes and times. A row becomes a `Conversation` (`data.py`) when it is asked for,
so no process holds the data as Python objects; loader workers share the mapped pages.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kd_bench.distill.data import Conversation, Row, Unreadable, conversation_of, identifier_of
from kd_bench.distill.recipe import DataSource
from kd_bench.errors import UsageError, explained, one_line
from kd_bench.files import atomic_path, digest_text, read_json, write_json
from kd_bench.world.build import cache_folder, resolve

CONTENT_LIMIT = 1 << 30  # images beyond this many bytes enter the digest by name and size
VERSION = 2  # of the index; counted up when forms are read in another way
DIGEST = 2  # version of `data_digest`
SMALL = 16 << 20  # bytes; the index of smaller sources stays in memory
ROWS = 2_000  # a record batch
CHUNK = 1 << 20  # characters of JSON at a time
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

INDEX = pa.schema(
    {
        "json": pa.large_string(),  # the row's text; null where a `datasets` table holds the row
        "id": pa.string(),
        "problem": pa.string(),  # why it cannot be used
        "hint": pa.string(),  # with a problem: asking for the row is refused, not counted
        "form": pa.string(),
        "answers": pa.int32(),
        "characters": pa.int64(),  # of its text
        "images": pa.list_(pa.string()),  # files; empty for encoded bytes
        "sha256": pa.binary(32),  # of id, turns and encoded images
    }
)


@dataclass
class Part:
    """One file, folder or hub dataset.

    Attributes:
        name: as messages call it.
        folder: image names are relative to it.
        stamp: names, sizes and times of its files, or the dataset's fingerprint.
        source: its place among the sources that are mixed.
        weight: of that source.
        dataset: where rows are not JSON text.
        file: the index on disk; None for a small source, whose index is `made`.
    """

    name: str
    folder: Path
    stamp: str
    source: int = 0
    weight: float = 1.0
    dataset: Any = None
    file: Path | None = None
    made: pa.Table | None = None

    @cached_property
    def index(self) -> pa.Table:
        """One row of `INDEX` a row; mapped, not read."""
        if self.made is not None:
            return self.made
        return pa.ipc.open_file(pa.memory_map(str(self.file))).read_all()

    def __getstate__(self) -> dict[str, Any]:
        """A worker maps the file itself."""
        return {name: value for name, value in self.__dict__.items() if name != "index"}

    def conversation(self, row: int) -> Conversation:
        """One row, parsed now."""
        try:
            text = self.index["json"][row].as_py()
            found = self.dataset[row] if text is None else json.loads(text)
        except (ValueError, pa.ArrowInvalid):
            what, hint = self.file or self.name, "Delete it; an index is made again."
            raise UsageError(f"{what} is damaged at row {row}.", hint) from None
        return conversation_of(found, row, self.folder)


class Conversations(Sequence[Conversation]):
    """Conversations of several parts, each made when it is asked for.

    Attributes:
        rows: which are meant, int64 [n]: numbers over all parts one after another.
    """

    def __init__(self, parts: Sequence[Part], rows: NDArray[np.int64] | None = None) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(len(part.index) for part in self.parts)])
        self.rows = np.arange(self.starts[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> "Conversations": ...
    def __getitem__(self, index: int | slice) -> "Conversation | Conversations":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        row = int(self.rows[index])
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[part].conversation(row - int(self.starts[part]))

    def select(self, places: NDArray[np.int64] | Sequence[int]) -> "Conversations":
        """Those at some places of this one; nothing is copied."""
        return Conversations(self.parts, self.rows[np.asarray(places, dtype=np.int64)])

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of `INDEX`, one value a conversation."""
        whole = [part.index[name] for part in self.parts]
        joined = pa.chunked_array([chunk for each in whole for chunk in each.chunks],
                                  INDEX.field(name).type)  # fmt: skip
        if len(self.rows) == self.starts[-1] and (np.diff(self.rows) == 1).all():
            return joined
        return joined.take(pa.array(self.rows))

    def given_up(self, index: int, reason: str) -> tuple[str, str]:
        """The name of one that cannot be used, and why."""
        return self[index].given_up(reason)

    @cached_property
    def _sources(self) -> list[tuple[NDArray[np.int64], float]]:
        """Of each source the places of its conversations, and its weight."""
        part = np.searchsorted(self.starts, self.rows, side="right") - 1
        source = np.array([each.source for each in self.parts])[part]
        weights = {each.source: each.weight for each in self.parts}
        return [(np.flatnonzero(source == number), weight) for number, weight in weights.items()]

    @property
    def epoch_size(self) -> int:
        """Conversations that one epoch meets."""
        if all(part.weight == 1 for part in self.parts):
            return len(self)
        return sum(_share(len(places), weight) for places, weight in self._sources)

    def epoch(self, number: int, seed: int) -> NDArray[np.int64]:
        """Places that one epoch meets, int64 [epoch_size], by source.

        Each source is a stream of its own shuffled rounds, of which every epoch takes the next
        len x weight, one at least: no row comes a second time before all others came once.
        """
        if all(part.weight == 1 for part in self.parts):
            return np.arange(len(self))
        taken = []
        for source, (places, weight) in enumerate(self._sources):
            count = _share(len(places), weight)
            first, start = divmod(number * count, max(len(places), 1))
            rounds = [
                np.random.default_rng([seed, source, first + each]).permutation(places)
                for each in range(int(weight) + 2)
            ]
            taken.append(np.concatenate(rounds)[start : start + count])
        return np.concatenate(taken)

    @cached_property
    def characters(self) -> NDArray[np.int64]:
        """Characters of each one's text, int64 [n]."""
        return self.column("characters").to_numpy()

    @cached_property
    def images(self) -> NDArray[np.int64]:
        """How many images each one has, int64 [n]."""
        import pyarrow.compute

        return pyarrow.compute.list_value_length(self.column("images")).to_numpy()


def _share(size: int, weight: float) -> int:
    """How many rows of a source of this size one epoch meets."""
    return max(round(size * weight), min(size, 1))


def read_conversations(
    *sources: DataSource,
) -> tuple["Conversations | Stream", list[tuple[str, str]]]:
    """What is to be learnt from, and (name, reason) of rows that are malformed.

    Raises:
        UsageError: as `indexed` raises it; rows cannot be streamed.
    """
    if any(source.streaming for source in sources):
        return _stream(*sources), []
    return indexed(*sources)


def indexed(*sources: DataSource) -> tuple[Conversations, list[tuple[str, str]]]:
    """All conversations of the sources, and (name, reason) of those that are malformed.

    `skip` and `limit` count rows of their source, so what is not asked for is not read.

    Raises:
        UsageError: a file is missing or not in a known form, or an image's name leaves its folder.
    """
    parts: list[Part] = []
    rows: list[NDArray[np.int64]] = []
    start = 0
    for number, source in enumerate(sources):
        last = None if source.limit is None else source.skip + source.limit
        found = 0
        for path in [source.path] if isinstance(source.path, str) else source.path:
            for each in _files(path):
                if last is None or found < last:
                    stop = None if last is None else last - found
                    parts.append(_part(each, source, number, stop))
                    found += len(parts[-1].index)
        rows.append(np.arange(start, start + found)[source.skip : last])
        if not len(rows[-1]):
            raise UsageError(f"{source.path} holds no conversations.", "Check data.path.")
        start += found
    chosen = Conversations(parts, np.concatenate(rows))
    sound = np.asarray(chosen.column("problem").is_null())
    return chosen.select(np.flatnonzero(sound)), _told(chosen.select(np.flatnonzero(~sound)))


def _told(broken: Conversations) -> list[tuple[str, str]]:
    """Names of rows that cannot be used, and why."""
    told = []
    for row, name, problem, hint in zip(
        broken.rows, *(broken.column(c).to_pylist() for c in ("id", "problem", "hint")), strict=True
    ):
        if hint is not None:
            raise UsageError(problem, hint)
        part = int(np.searchsorted(broken.starts, row, side="right")) - 1
        number = int(row - broken.starts[part])
        if len(broken.parts) > 1:
            problem = f"{problem} ({broken.parts[part].name})"
        told.append(Conversation(name, (), (), number).given_up(problem))
    return told


def _files(path: str) -> list[str | list[str]]:
    """The files that a path with wildcards means; parquet files belong together."""
    if not glob.has_magic(path) or resolve(path).exists():
        return [path]
    found = resolve(path)
    start = Path(found.anchor)
    names = sorted(str(each) for each in start.glob(str(found.relative_to(found.anchor))))
    if not names:
        raise UsageError(f"There is no training data at {path}.", "Check data.path.")
    return [names] if all(_is_parquet(Path(name)) for name in names) else [*names]


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")


def _part(path: str | list[str], source: DataSource, number: int, stop: int | None) -> Part:
    """One part, its index made or found again.

    Args:
        number: of the source.
        stop: rows that are asked for; None for all.
    """
    first = resolve(path if isinstance(path, str) else path[0])
    is_json = first.is_file() and not _is_parquet(first)
    dataset: Any = None if is_json else _dataset(path, source)
    folder = first if first.is_dir() else first.parent if first.exists() else Path()
    if source.images:
        folder = resolve(source.images)
    files = [first] if isinstance(path, str) else [Path(name) for name in path]
    stamp, size = _stamp(files) if first.exists() else (str(dataset._fingerprint), SMALL + 1)
    name = first.name if isinstance(path, str) and first.exists() else str(source.path)
    part = Part(name, folder, stamp, number, source.weight or 1.0, dataset)
    rows = json_rows(first) if dataset is None else _rows(dataset, part.name)
    batches = _batches(islice(rows, stop), folder, dataset is None)
    if size <= SMALL:
        part.made = pa.Table.from_batches(batches, INDEX)
        return part
    key = digest_text(str(VERSION), stamp, str(folder.absolute()), str(stop))
    part.file = cache_folder() / "training-data" / f"{key}.arrow"
    if not _is_index(part.file):
        part.file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(part.file) as staging, pa.ipc.new_file(str(staging), INDEX) as writer:
            for batch in batches:
                writer.write_batch(batch)
    return part


def _is_index(path: Path) -> bool:
    """Whether a file is there and whole."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate()
        return bool(table.schema == INDEX)
    except (OSError, pa.ArrowInvalid):
        return False


def _rows(dataset: Any, name: str) -> Iterator[tuple[None, Any]]:
    with explained(f"{name} cannot be read", "Is its text UTF-8, and are its files whole?"):
        for row in dataset:
            yield None, row


def _stamp(paths: Iterable[Path]) -> tuple[str, int]:
    """Names, sizes and times of all files, as one digest; and their bytes."""
    files = [f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    states = [(str(file.absolute()), file.stat()) for file in files]
    told = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    return digest_text(json.dumps(told)), sum(size for _, size, _ in told)


# --- the index -------------------------------------------------------------------------------


def _batches(
    rows: Iterable[tuple[str | None, Any]], folder: Path, keep: bool
) -> Iterator[pa.RecordBatch]:
    """Index rows, `ROWS` at a time; `keep` keeps the text of each."""
    numbered = enumerate(rows)
    while group := [
        _described(text if keep else None, row, number, folder)
        for number, (text, row) in islice(numbered, ROWS)
    ]:
        yield pa.RecordBatch.from_pylist(group, INDEX)


def _described(text: str | None, row: Any, number: int, folder: Path) -> Row:
    """One row of `INDEX`."""
    told: dict[str, Any] = {"json": text, "id": identifier_of(row, number)}
    try:
        if isinstance(row, Unreadable):
            raise row
        found = conversation_of(row, number, folder)
    except Unreadable as error:
        return told | {"json": None, "problem": str(error), "images": []}
    except UsageError as error:
        return told | {"json": None, "problem": error.problem, "hint": error.hint, "images": []}
    return told | {
        "form": found.form,
        "answers": sum(turn.role == "assistant" for turn in found.turns),
        "characters": sum(len(piece or "") for turn in found.turns for piece in turn.pieces),
        "images": [str(each) if isinstance(each, Path) else "" for each in found.images],
        "sha256": hashlib.sha256(
            b"".join([_words(found), *(each for each in found.images if isinstance(each, bytes))])
        ).digest(),
    }


# --- JSON ------------------------------------------------------------------------------------


def json_rows(path: Path) -> Iterator[tuple[str | None, Any]]:
    """Text and value of each row; a line that is not JSON is an `Unreadable`.

    Raises:
        UsageError: the file as a whole is neither a list nor lines of JSON.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            if _is_lines(file, path.suffix == ".jsonl"):
                for line in file:
                    if line.strip():
                        value = _line(line)
                        yield None if isinstance(value, Unreadable) else line, value
            else:
                yield from json_items(file, path)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}.", "Repair that place.") from None


def _is_lines(file: TextIO, named_so: bool) -> bool:
    """Whether a file holds one JSON object a line, whatever its name; a list may be called so."""
    start = file.read(CHUNK).lstrip()
    file.seek(0)
    if named_so or start[:1] != "{":
        return named_so and start[:1] != "["
    lines = (line for line in file if line.strip())
    found = isinstance(_line(next(lines, "")), dict) and next(lines, None) is not None
    file.seek(0)
    return found


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"its line is not valid JSON: {one_line(error)}")


def json_items(file: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    """Text and value of each item of a JSON list that is never in memory as a whole."""
    text = _Window(file)
    if text.following() != "[":
        json.loads(text.rest())  # says what is wrong where it is no JSON at all
        raise UsageError(f"{path}: expected a list of conversations.", "LLaVA's JSON form is one.")
    text.place += 1
    if text.following() != "]":
        while True:
            yield text.value()
            if text.following() != ",":
                break
            text.place += 1
            text.following()
    if text.following() != "]":
        raise text.error("Expecting ',' delimiter")
    text.place += 1
    if text.following():
        raise text.error("Extra data")


@dataclass
class _Window:
    """A part of a text that moves over a file."""

    file: TextIO
    text: str = ""
    place: int = 0
    lines: int = field(default=1, init=False)  # of the file, at the window's start
    before: int = field(default=0, init=False)  # characters before it

    def following(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            rest = self.text[self.place : self.place + CHUNK]
            if bare := rest.lstrip(" \t\n\r"):
                self.place += len(rest) - len(bare)
                return bare[0]
            self.place += len(rest)
            if not rest and not self.more():
                return ""

    def more(self, size: int = CHUNK) -> bool:
        """Drop what lies behind and read on; False at the end of the file."""
        read = self.file.read(size)
        self.lines += self.text.count("\n", 0, self.place)
        self.before += self.place
        self.text, self.place = self.text[self.place :] + read, 0
        return bool(read)

    def value(self) -> tuple[str, Any]:
        """The next value and its text."""
        size = CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.place)
                goes_on = isinstance(value, int | float) and self.text[end : end + 1] in _NUMBERS
                if end < len(self.text) and not goes_on:
                    start, self.place = self.place, end
                    return self.text[start:end], value
                problem = self.error("Expecting ',' delimiter", end)
            except json.JSONDecodeError as error:
                problem = self.error(error.msg, error.pos)
                cut_off = len(self.text) - error.pos < 16 or error.msg.startswith("Unterminated")
                if not cut_off:
                    raise problem from None
            if not self.more(size):
                raise problem
            size = max(size, len(self.text))  # a long value is not parsed again and again

    def error(self, message: str, at: int | None = None) -> ValueError:
        """The parser's complaint with its place in the file."""
        place = self.place if at is None else at
        line = self.lines + self.text.count("\n", 0, place)
        return ValueError(f"{message}: line {line} (char {self.before + place})")

    def rest(self) -> str:
        """Everything from the window's start to the file's end."""
        return self.text + self.file.read()


_DECODER = json.JSONDecoder()
_NUMBERS = frozenset("0123456789.eE+-")


# --- datasets --------------------------------------------------------------------------------


def _told_why(load: Any, *arguments: Any, **options: Any) -> Any:
    """`load_dataset`, whose own errors hide what went wrong."""
    from datasets.exceptions import DatasetGenerationError

    try:
        return load(*arguments, **options)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _dataset(path: str | list[str], source: DataSource, *, streaming: bool = False) -> Any:
    """Rows of parquet files, of a `save_to_disk` folder or of the hub; images stay encoded.

    Raises:
        UsageError: it is not there, cannot be read, or has neither the subset nor the split.
    """
    from datasets import DatasetDict, Features, Sequence, load_dataset, load_from_disk
    from datasets import Image as ImageFeature

    name = str(path)
    first = resolve(path if isinstance(path, str) else path[0])
    if first.is_dir():
        with explained(f"{name} is not a dataset folder", "Write it with dataset.save_to_disk."):
            dataset = load_from_disk(str(first))
    elif first.exists():
        files = [str(first)] if isinstance(path, str) else path
        with explained(f"{name} is not a parquet file", "Write it with dataset.to_parquet."):
            dataset = _told_why(
                load_dataset, "parquet", data_files=files, split="train", streaming=streaming
            )
    elif HUB_NAME.fullmatch(name):
        with explained(
            f"There is no training data at {name}: neither a file nor a dataset of the hub",
            "Check data.path, data.subset and data.split, and the network.",
        ):
            split = source.split or "train"
            dataset = _told_why(load_dataset, name, source.subset, split=split, streaming=streaming)
    else:
        raise UsageError(f"There is no training data at {name}.", "Check data.path.")
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset:
            raise UsageError(f"{name} has no split named train.", "Name one of its split folders.")
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


# --- streaming -------------------------------------------------------------------------------

WINDOW = 512  # rows of a stream that are in memory, and within which they are mixed


class Stream(Sequence[Conversation]):
    """Rows of a dataset that is never whole on this machine, read forward a window at a time.

    A row is still known by its number, so batches do not depend on processes and workers, and a
    resumed training goes on where it was, after it has skipped the rows before.

    Args:
        dataset: iterable, of `datasets`.
        skip, size: the rows that are meant.
    """

    def __init__(self, dataset: Any, folder: Path, stamp: str, skip: int, size: int) -> None:
        self.dataset, self.folder, self.stamp = dataset, folder, stamp
        self.skip, self.size = skip, size
        self._rows: list[Any] = []
        self._window = -1
        self._windows: Iterator[Any] = iter(())
        self._process = -1

    def __len__(self) -> int:
        return self.size

    @property
    def epoch_size(self) -> int:
        """Conversations that one epoch meets."""
        return self.size

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self[each] for each in range(self.size)[index]]
        if not 0 <= index < self.size:
            raise IndexError(index)
        window, place = divmod(index, WINDOW)
        if window != self._window or self._process != os.getpid():
            with explained("The stream of training data cannot be read", "Check data.path."):
                self._move_to(window)
        return conversation_of(self._rows[place], self.skip + index, self.folder)

    def _move_to(self, window: int) -> None:
        """Read on to a window, or from its start where it lies behind.

        A forked worker begins for itself: its parent's files would move under both. Columns are
        asked for, since of rows `datasets` gives each worker a part.
        """
        ahead = window - self._window - 1
        if self._process != os.getpid() or ahead < 0:
            left = self.dataset.skip(self.skip + window * WINDOW)
            self._windows, ahead = left.iter(batch_size=WINDOW), 0
        columns = next(islice(self._windows, ahead, None))
        values = zip(*columns.values(), strict=True)
        self._rows = [dict(zip(columns, row, strict=True)) for row in values]
        self._window, self._process = window, os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """A worker reads for itself."""
        return self.__dict__ | {"_rows": [], "_window": -1, "_windows": iter(()), "_process": -1}

    def given_up(self, index: int, reason: str) -> tuple[str, str]:
        """The name of one that cannot be used, and why; it is not read again."""
        return f"row {self.skip + index}", reason


def _stream(*sources: DataSource) -> Stream:
    """The only source, as a stream.

    Raises:
        UsageError: several sources, rows that cannot be streamed, or an unknown number of them.
    """
    import pyarrow.parquet

    source = sources[0]
    if len(sources) > 1 or not isinstance(source.path, str):
        raise UsageError(
            "data.streaming reads one source in its order; several cannot be mixed so.",
            "Leave streaming out: an index of all rows is made once and memory-mapped.",
        )
    found, *others = _files(source.path)
    files = [resolve(name) for name in ([found] if isinstance(found, str) else found)]
    if others or (files[0].exists() and not _is_parquet(files[0])):
        raise UsageError(
            f"{source.path} cannot be streamed: data.streaming is for parquet files and datasets "
            "of the hub.",
            "Leave data.streaming out: JSON and dataset folders are memory-mapped.",
        )
    dataset = _dataset(found, source, streaming=True)
    if files[0].exists():
        total = sum(pyarrow.parquet.read_metadata(name).num_rows for name in files)
        folder, (stamp, _) = files[0].parent, _stamp(files)
    else:
        splits = dataset.info.splits or {}
        total = getattr(splits.get(source.split or "train"), "num_examples", None) or 0
        if not total:
            raise UsageError(
                f"{source.path} does not say how many rows it has, so it cannot be streamed.",
                "Leave data.streaming out.",
            )
        folder = Path()
        stamp = digest_text(source.path, str(source.subset), str(source.split), str(total))
    count = min(total - source.skip, source.limit or total)
    if count <= 0:
        raise UsageError(f"{source.path} holds no conversations.", "Check data.path and data.skip.")
    folder = resolve(source.images) if source.images else folder
    return Stream(dataset, folder, stamp, source.skip, count)


# --- the fingerprint -------------------------------------------------------------------------


def data_digest(
    conversations: Conversations | Stream, *, verify: bool = False, version: int = DIGEST
) -> dict[str, Any]:
    """Fingerprint of what is learnt from: turns, and images by content.

    Beyond 1 GiB of images the rest enters by name and size only; `pictures` says which. A large
    source's is kept in the cache and found again while names, sizes and times of all files are
    the same.

    Args:
        verify: read the images' content again.
        version: 1 is that of trainings from before conversations had digests of their own.
    """
    if isinstance(conversations, Stream):
        told = (conversations.stamp, str(conversations.skip), str(conversations.size))
        return {
            "sha256": digest_text(*told),
            "conversations": conversations.size,
            "images": 0,
            "pictures": "not read",
            "version": version,
        }
    digest, count = hashlib.sha256(str(version).encode() if version > 1 else b""), 0
    kept = _digest_file(conversations, version)
    if kept is not None and kept.exists() and not verify:
        return dict(read_json(kept))
    budget, by_content = CONTENT_LIMIT, True
    for text, images in _parts_of_digest(conversations, version):
        digest.update(text)
        for image in images:
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
    found = {
        "sha256": digest.hexdigest(),
        "conversations": len(conversations),
        "images": count,
        "pictures": "content" if by_content else "names and sizes",
    }
    if version > 1:
        found["version"] = version
    if kept is not None:
        write_json(kept, found)
    return found


def _words(conversation: Conversation) -> bytes:
    turns = [(turn.role, turn.pieces) for turn in conversation.turns]
    return json.dumps([conversation.id, turns]).encode()


def _parts_of_digest(
    conversations: Conversations, version: int
) -> Iterator[tuple[bytes, Sequence[Path | bytes]]]:
    if version == 1:
        for conversation in conversations:
            yield _words(conversation), conversation.images
        return
    digests, images = conversations.column("sha256"), conversations.column("images")
    for start in range(0, len(conversations), ROWS):
        window = [each.slice(start, ROWS).to_pylist() for each in (digests, images)]
        for digest, names in zip(*window, strict=True):
            yield digest, [Path(name) if name else b"" for name in names]


def _digest_file(conversations: Conversations, version: int) -> Path | None:
    """Where the digest of these very rows is kept; None for small sources."""
    if all(part.file is None for part in conversations.parts):
        return None
    stamps = [part.stamp for part in conversations.parts]
    key = hashlib.sha256(json.dumps([version, stamps]).encode())
    key.update(conversations.rows.tobytes())
    for chunk in conversations.column("images").chunks:
        for name in chunk.flatten().to_pylist():
            try:
                state = os.stat(name) if name else None  # noqa: PTH116 - a million of them
            except OSError:
                state = None
            told = (name, state.st_size, state.st_mtime_ns) if state else name
            key.update(repr(told).encode())
    return cache_folder() / "training-data" / f"{key.hexdigest()}.json"
