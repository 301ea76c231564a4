"""The documents of a benchmark, read from parquet files in the upstream columns.

    <folder>/<benchmark id>/<split>-*.parquet        (GQA: <folder>/gqa_images/<split>-*.parquet)

Text columns are held in memory; images are read row group by row group when they are asked for.
They can be taken away (`Documents.with_images`), to see what a model guesses without them.
"""

import bisect
import contextlib
import functools
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.ExifTags
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL.Image import Image

from kd_bench.distill import processes
from kd_bench.distill.data import Unreadable, open_image
from kd_bench.errors import UsageError, closest, one_line
from kd_bench.registry import TaskSpec


class Document(dict[str, Any]):
    """One row. Columns that hold images are decoded at the first access, not before.

    Attributes:
        index: place in its `Documents`.
    """

    def __init__(self, values: dict[str, Any], index: int, owner: "Documents") -> None:
        super().__init__(values)
        self.index = index
        self._owner = owner

    def __missing__(self, column: str) -> Image | None:
        if column not in self._owner.image_columns:
            raise KeyError(column)
        encoded = self._owner.encoded(self.index, column)
        image = None if encoded is None else decode_image(encoded)
        self[column] = image
        return image


class Documents(Sequence[Document]):
    """Rows of one split, as lmms-eval wants them: indexable, iterable, with `features`.

    Every access gives fresh values: upstream's scorers change the rows they are given.
    """

    def __init__(
        self,
        table: pa.Table,
        images: "Mapping[str, _AnyImages]",
        order: list[int] | None = None,
        own_images: "Mapping[str, _AnyImages] | None" = None,
    ) -> None:
        self._table = table
        self._images = images
        self._own_images = images if own_images is None else own_images
        self._order = list(range(table.num_rows)) if order is None else order
        self.image_columns = tuple(images)
        self.features = dict.fromkeys([*table.column_names, *images])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._of(self._order[index])
        row = self._order[index]
        values = self._table.slice(row, 1).to_pylist()[0]
        return Document(values, index if index >= 0 else len(self) + index, self)

    def __iter__(self) -> Iterator[Document]:
        chunk = 512
        for start in range(0, len(self), chunk):
            rows = self._table.take(self._order[start : start + chunk]).to_pylist()
            for offset, values in enumerate(rows):
                yield Document(values, start + offset, self)

    def select(self, indices: list[int]) -> "Documents":
        """The chosen rows, in that order."""
        return self._of([self._order[index] for index in indices])

    def _of(self, order: list[int]) -> "Documents":
        return Documents(self._table, self._images, order, self._own_images)

    @property
    def as_stored(self) -> "Documents":
        """The same rows with their own images, which say what belongs together."""
        return Documents(self._table, self._own_images, self._order)

    def with_images(self, kind: str, task: str) -> "Documents":
        """The same rows with grey images of the same sizes (`blank`), or others' (`shuffled`).

        Raises:
            UsageError: the benchmark has no two different images to exchange.
        """
        own = self._own_images
        if kind == "blank":
            return Documents(self._table, {c: _Blank(own[c]) for c in own}, self._order, own)
        donors = _donors(own, self._order)
        if not donors:
            raise UsageError(
                f"{task}: the documents show one image, and there is no other to exchange it with.",
                "Use --images blank.",
            )
        images = {column: _Shuffled(own, column, donors) for column in own}
        return Documents(self._table, images, self._order, own)

    def encoded(self, index: int, column: str) -> bytes | None:
        """The image file as it is stored; None where the row has none."""
        return self._images[column].encoded(self._order[index])

    def image_digests(self, column: str) -> list[str]:
        """sha256 of each row's stored image file, shortened; empty where there is none."""
        return [self._images[column].digest(row) for row in self._order]

    def hash_together(self) -> None:
        """Read and hash each image in one of the processes only; then all of them know it."""
        for images in self._own_images.values():
            if isinstance(images, _Images) and processes.world_size() > 1:
                images.hash_together(self._order)

    def image_place(self, index: int) -> int:
        """Where the document's first image lies in its files; neighbours are read together."""
        row = self._order[index]
        first = next(iter(self._own_images.values()), None)
        return first.place(row) if isinstance(first, _Images) else row

    def content_digests(self) -> list[str]:
        """sha256 of each row with all its images, hexadecimal."""
        columns = [self.image_digests(column) for column in self.image_columns]
        result = []
        for document in self:
            text = json.dumps(document, sort_keys=True, default=str, ensure_ascii=False)
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
            for name, digests in zip(self.image_columns, columns, strict=True):
                digest.update(f"\0{name}:{digests[document.index]}".encode())
            result.append(digest.hexdigest())
        return result


class _Images:
    """Encoded images of one column over several files; `rows` maps table rows to image rows."""

    def __init__(self, files: list[Path], column: str, rows: list[int] | None = None) -> None:
        self._files = [pq.ParquetFile(file) for file in files]
        self._column = column
        self._rows = rows
        self._groups: list[tuple[int, int, int]] = []  # first row, file, row group
        first = 0
        for number, file in enumerate(self._files):
            for group in range(file.num_row_groups):
                self._groups.append((first, number, group))
                first += file.metadata.row_group(group).num_rows
        self._read = functools.lru_cache(maxsize=2)(self._read_group)
        self._digests: dict[int, str] = {}

    def encoded(self, row: int) -> bytes | None:
        return self._encoded(self.place(row))

    def digest(self, row: int) -> str:
        return self._digest(self.place(row))

    def _digest(self, place: int) -> str:
        if place not in self._digests:
            data = self._encoded(place)
            self._digests[place] = "" if data is None else hashlib.sha256(data).hexdigest()[:32]
        return self._digests[place]

    def hash_together(self, rows: Sequence[int]) -> None:
        """Each process hashes its part of the rows' images and tells the others."""
        places = sorted(set(map(self.place, rows)))
        rank, count = processes.rank(), processes.world_size()
        start, end = (len(places) * part // count for part in (rank, rank + 1))
        found = {place: self._digest(place) for place in places[start:end]}
        for share in processes.gather(found):
            self._digests.update(share)

    def place(self, row: int) -> int:
        """Which image of the files a row shows, counted over all of them."""
        return row if self._rows is None else self._rows[row]

    def _encoded(self, place: int) -> bytes | None:
        group = bisect.bisect_right(self._groups, (place, len(self._files), 0)) - 1
        return self._read(group)[place - self._groups[group][0]]

    def _read_group(self, group: int) -> list[bytes | None]:
        _, file, number = self._groups[group]
        column = self._files[file].read_row_group(number, columns=[self._column]).column(0)
        return [
            value["bytes"] if isinstance(value, dict) else value for value in column.to_pylist()
        ]


IMAGES = ("blank", "shuffled")
"""What can stand in for a benchmark's own images."""
GREY = (128, 128, 128)
_TURNED = (5, 6, 7, 8)  # values of the EXIF tag that exchange width and height


class _Blank:
    """Grey images of the sizes that the own ones have; equal sizes are equal images."""

    def __init__(self, own: "_AnyImages") -> None:
        self._own = own
        self._digests: dict[str, str] = {}

    def encoded(self, row: int) -> bytes | None:
        data = self._own.encoded(row)
        return None if data is None else _grey_like(data)

    def digest(self, row: int) -> str:
        own = self._own.digest(row)
        if own and own not in self._digests:
            self._digests[own] = hashlib.sha256(self.encoded(row) or b"").hexdigest()[:32]
        return self._digests[own] if own else ""


def _grey_like(encoded: bytes) -> bytes:
    """A grey image as large as another, of which only the header is read."""
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            width, height = image.size
            turned = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) in _TURNED
    except Exception:  # decoders raise whatever their format suggests to them
        return encoded  # it fails as it does where it is seen
    return _grey(height, width) if turned else _grey(width, height)


@functools.lru_cache(maxsize=1024)
def _grey(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    PIL.Image.new("RGB", (width, height), GREY).save(stream, format="png")
    return stream.getvalue()


class _Shuffled:
    """Each image is that of another document: the same one in every run."""

    def __init__(
        self, own: "Mapping[str, _AnyImages]", column: str, donors: dict[str, tuple[str, int]]
    ) -> None:
        self._own = own
        self._column = column
        self._donors = donors

    def encoded(self, row: int) -> bytes | None:
        digest = self._own[self._column].digest(row)
        if not digest:
            return None
        column, donor = self._donors[digest]
        return self._own[column].encoded(donor)

    def digest(self, row: int) -> str:
        digest = self._own[self._column].digest(row)
        if not digest:
            return ""
        column, donor = self._donors[digest]
        return self._own[column].digest(donor)


_AnyImages = _Images | _Blank | _Shuffled


def _donors(own: "Mapping[str, _AnyImages]", rows: list[int]) -> dict[str, tuple[str, int]]:
    """For each image, by its digest, column and row of the one that stands in for it.

    Images that one document shows go together, and so do the questions of an image. The groups
    form a ring in the order of a hash, and each gets the images of the next. The ring hangs on the
    images alone, not on their order, the model or a limit. A single group has no other: nothing.
    """
    place: dict[str, tuple[str, int]] = {}
    group: dict[str, set[str]] = {}
    for row in rows:
        shown = set()
        for column, images in own.items():
            if digest := images.digest(row):
                shown.add(digest)
                place.setdefault(digest, (column, row))
        merged = shown.union(*(group[digest] for digest in shown if digest in group))
        group.update(dict.fromkeys(merged, merged))
    members = {min(each): each for each in group.values()}
    ring = [
        sorted(members[first])
        for first in sorted(
            members, key=lambda first: hashlib.sha256(f"shuffled {first}".encode()).digest()
        )
    ]
    if len(ring) < 2:
        return {}
    return {
        digest: place[others[number % len(others)]]
        for images, others in zip(ring, [*ring[1:], ring[0]], strict=True)
        for number, digest in enumerate(images)
    }


def decode_image(encoded: bytes) -> Image:
    """Decode an image as training does: RGB, upright by its EXIF tag.

    Raises:
        Unreadable: it is damaged or cut off.
    """
    try:
        return open_image(encoded)
    except Unreadable as error:
        raise Unreadable(f"the image cannot be decoded: {error}") from error


def load_documents(spec: TaskSpec, folder: Path, profile: str | None = None) -> Documents:
    """Read one benchmark's rows from a data folder.

    Raises:
        UsageError: the folder, a file or a column is missing or has the wrong type.
    """
    variant = spec.profile(profile)
    split = variant.split or spec.dataset.split
    files = _files(folder, spec.id, split)
    required = {**spec.columns, **variant.columns}
    if not variant.scored:  # nobody has the answers of a test split
        required.pop("answers", None)
    kinds = {**spec.optional_columns, **spec.columns, **variant.columns}
    schema = _check_columns(spec.id, files, required, kinds)
    media = [name for name in schema.names if kinds.get(name) == "image"]
    plain = [name for name in schema.names if name not in media]
    _check_shards(spec.id, files)
    tables = []
    for file in files:
        with _readable(spec.id, file):
            tables.append(pq.read_table(file, columns=plain, partitioning=None))
    wanted = {name: kind for name, kind in required.items() if name not in spec.nullable}
    for file, rows in zip(files, tables, strict=True):
        _check_values(spec, file, rows, wanted)
    table = pa.concat_tables(tables)
    pa.default_memory_pool().release_unused()
    if table.num_rows == 0:
        raise UsageError(f"{spec.id}: {files[0]} holds no rows.", "Fetch or build the data again.")
    images = {name: _Images(files, name) for name in media}
    if spec.dataset.images and "image" not in images:
        images["image"] = _joined(spec, folder, split, table)
    expected = variant.documents or spec.documents
    _check_duplicates(spec, files, table, images, whole=table.num_rows == expected)
    if table.num_rows > expected:
        raise UsageError(
            f"{spec.id}: {folder / spec.id} holds {table.num_rows:,} documents, the benchmark has "
            f"{expected:,}.",
            "Is a file there that does not belong? `kd-bench tasks verify` tells.",
        )
    return Documents(table, images)


def data_files(spec: TaskSpec, folder: Path, profile: str | None = None) -> list[Path]:
    """The files that a benchmark is read from.

    Raises:
        UsageError: the folder lacks them.
    """
    split = spec.profile(profile).split or spec.dataset.split
    files = _files(folder, spec.id, split)
    if spec.dataset.images:
        files += sorted((folder / f"{spec.id}_images").glob(f"{split}-*.parquet"))
    return files


# --- what rows hold ------------------------------------------------------------------------------


@contextlib.contextmanager
def _readable(task: str, file: Path) -> Iterator[None]:
    """Name a file that is no parquet, or a damaged one."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        problem = f"{task}: {file} cannot be read: {one_line(error)[:200]}."
        raise UsageError(problem, "Fetch it again.") from None


def _check_shards(task: str, files: list[Path]) -> None:
    """Files `split-00000-of-00003.parquet` must be all of one set, each once."""
    found = [re.search(r"-(\d+)-of-(\d+)\.parquet$", file.name) for file in files]
    numbers = [(int(match[1]), int(match[2])) for match in found if match]
    totals = sorted({total for _, total in numbers})
    if len(totals) > 1:
        raise UsageError(
            f"{task}: {files[0].parent} holds files of two sets, of {totals[0]} and of "
            f"{totals[-1]}.",
            "Remove the set that does not belong.",
        )
    missing = set(range(totals[0] if totals else 0)) - {number for number, _ in numbers}
    if missing:
        raise UsageError(
            f"{task}: {files[0].parent} lacks file {min(missing):05d} of {totals[0]}.",
            "Fetch the data again.",
        )


def _check_values(spec: TaskSpec, file: Path, rows: pa.Table, wanted: dict[str, Any]) -> None:
    """Every row must say what is asked and what is right."""
    for column, kind in wanted.items():
        problem = "is missing"
        if kind == "image":
            bad = _rows_without_image(file, column)
        else:
            bad = _rows_without_value(rows[column], kind)
        if not bad and spec.answer == "yes_no" and column == "answer" and kind == "text":
            said = pc.utf8_lower(pc.utf8_trim_whitespace(rows[column]))
            known = pc.is_in(said, value_set=pa.array(["yes", "no"]))
            bad, problem = _true_rows(pc.invert(known)), "is neither yes nor no"
        if bad:
            shown = ", ".join(map(str, bad[:5]))
            more = f" and {len(bad) - 5:,} more" if len(bad) > 5 else ""
            raise UsageError(
                f"{spec.id}: {file}: {column!r} {problem} in row{'s' * (len(bad) > 1)} "
                f"{shown}{more} (counted from 0).",
                "It would be scored as if it were an answer: mend or fetch the data again.",
            )


def _rows_without_value(column: pa.ChunkedArray, kind: str) -> list[int]:
    """Rows that are null, blank text, or a list that is empty or holds a null."""
    if pa.types.is_null(column.type):
        return list(range(len(column)))
    bad = set(_true_rows(pc.is_null(column)))
    if kind == "text":
        bad |= set(_true_rows(pc.equal(pc.utf8_trim_whitespace(column), "")))
    if kind in ("texts", "answers"):
        values = column.combine_chunks()
        bad |= set(_true_rows(pc.equal(pc.list_value_length(values), 0)))
        inner = pc.list_flatten(values)
        if kind == "answers":
            inner = pc.struct_field(inner, "answer")
        bad |= set(pc.list_parent_indices(values).filter(pc.is_null(inner)).to_pylist())
    return sorted(bad)


def _true_rows(mask: Any) -> list[int]:
    return pc.indices_nonzero(pc.fill_null(mask, False)).to_pylist()


def _rows_without_image(file: Path, column: str) -> list[int]:
    """Rows whose image is null; only row groups whose statistics admit one are read."""
    bad: list[int] = []
    first = 0
    with pq.ParquetFile(file) as opened:
        for number in range(opened.num_row_groups):
            group = opened.metadata.row_group(number)
            leaves = [group.column(i) for i in range(group.num_columns)]
            # An image is bytes alone, or bytes beside a path that may be null.
            own = [c for c in leaves if c.path_in_schema in (column, f"{column}.bytes")]
            told = [c.statistics for c in own if c.is_stats_set]
            if any(s is None or not s.has_null_count or s.null_count for s in told):
                for row, value in enumerate(
                    opened.read_row_group(number, columns=[column]).column(0).to_pylist()
                ):
                    data = value.get("bytes") if isinstance(value, dict) else value
                    bad += [] if data else [first + row]
            first += group.num_rows
    return bad


def _check_duplicates(
    spec: TaskSpec,
    files: list[Path],
    table: pa.Table,
    images: "dict[str, _Images]",
    *,
    whole: bool,
) -> None:
    """A question that is asked twice counts twice, and makes intervals too short.

    The same document is one with the same id, question and images; without ids, one that is the
    same in every column. A whole data set without ids may hold such rows of its own.
    """
    ids = [column for column in spec.id_columns if column in table.column_names]
    if whole and not ids:
        return
    asked = [*ids, *(["question"] if "question" in table.column_names else [])]
    columns = asked if ids else table.column_names
    texts = [table[column].to_pylist() for column in columns]
    alike: dict[str, list[int]] = {}
    for row, key in enumerate(zip(*texts, strict=True)):
        alike.setdefault(repr(key), []).append(row)
    duplicates: list[tuple[int, int]] = []
    for rows in alike.values():
        first: dict[tuple[str, ...], int] = {}
        for row in rows if len(rows) > 1 else ():
            seen = tuple(images[column].digest(row) for column in sorted(images))
            if first.setdefault(seen, row) != row:
                duplicates.append((first[seen], row))
    if duplicates:
        one, other = (_place(files, row) for row in min(duplicates, key=lambda pair: pair[1]))
        raise UsageError(
            f"{spec.id}: {len(duplicates):,} documents are there twice, the first in {one} and "
            f"{other}.",
            "Remove the file or the rows that do not belong.",
        )


def _place(files: list[Path], row: int) -> str:
    """`file row n` of a row counted over all files."""
    for file in files:
        count = pq.read_metadata(file).num_rows
        if row < count:
            return f"{file} row {row}"
        row -= count
    return f"row {row}"


def _files(folder: Path, name: str, split: str) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"There is no data folder {folder}.", "Check --data.")
    files = sorted((folder / name).glob(f"{split}-*.parquet"))
    if files:
        return files
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    raise UsageError(
        f"{folder} has no {name}/{split}-*.parquet.{closest(name, there)}",
        "The layout is DATA/<benchmark id>/<split>-00000-of-00001.parquet.",
    )


def _check_columns(
    task: str, files: list[Path], required: dict[str, Any], kinds: dict[str, Any]
) -> pa.Schema:
    """The schema of the first file, after every file was checked."""
    first: pa.Schema | None = None
    for file in files:
        with _readable(task, file):
            schema = pq.read_schema(file)
        for column in required:
            if column not in schema.names:
                raise UsageError(
                    f"{task}: {file} has no column {column!r}.{closest(column, schema.names)}",
                    f"Its columns are {', '.join(schema.names)}.",
                )
        for column, kind in kinds.items():
            if column in schema.names and not _fits(schema.field(column).type, kind):
                raise UsageError(
                    f"{task}: column {column!r} of {file} is {schema.field(column).type}.",
                    f"It must hold: {kind}.",
                )
        first = first or schema
    assert first is not None
    return first


def _fits(kind: pa.DataType, wanted: str) -> bool:
    types = pa.types

    def is_text(each: pa.DataType) -> bool:
        return bool(types.is_string(each) or types.is_large_string(each))

    def has(each: pa.DataType, field: str) -> bool:
        return bool(types.is_struct(each) and each.get_field_index(field) >= 0)

    is_list = types.is_list(kind) or types.is_large_list(kind)
    inner = kind.value_type if is_list else None
    return (
        types.is_null(kind)
        or {
            "image": types.is_binary(kind) or has(kind, "bytes"),
            "text": is_text(kind),
            "integer": types.is_integer(kind),
            "id": is_text(kind) or types.is_integer(kind),
            "answers": is_list and has(inner, "answer"),
            "texts": is_list and (is_text(inner) or types.is_null(inner)),
        }[wanted]
    )


def _joined(spec: TaskSpec, folder: Path, split: str, table: pa.Table) -> _Images:
    """GQA: the images lie once in their own files, found by `imageId`."""
    name = f"{spec.id}_images"
    files = _files(folder, name, split)
    for file in files:
        for column in ("id", "image"):
            if column not in pq.read_schema(file).names:
                raise UsageError(f"{spec.id}: {file} has no column {column!r}.", "Fetch it again.")
    ids = [key for file in files for key in pq.read_table(file, columns=["id"])["id"].to_pylist()]
    places = {str(key): place for place, key in enumerate(ids)}
    wanted = [str(key) for key in table["imageId"].to_pylist()]
    absent = sorted({key for key in wanted if key not in places})
    if absent:
        raise UsageError(
            f"{spec.id}: {folder / name} lacks the image {absent[0]!r}"
            + (f" and {len(absent) - 1} others." if len(absent) > 1 else "."),
            "Fetch the images again.",
        )
    return _Images(files, "image", [places[key] for key in wanted])
