"""The documents of a benchmark, read from parquet files in the upstream columns.

    <folder>/<benchmark id>/<split>-*.parquet        (GQA: <folder>/gqa_images/<split>-*.parquet)

Text columns are held in memory; pictures are read row group by row group when they are asked for.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from kd_bench.distill.images import Unreadable, open_image
from kd_bench.errors import UsageError, closest
from kd_bench.registry import TaskSpec

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Document",
    "Documents",
    "PictureError",
    "data_files",
    "load_documents",
    "open_picture",
]


class PictureError(ValueError):
    """A picture cannot be decoded."""


class Document(dict[str, Any]):
    """One row. Columns that hold pictures are decoded at the first access, not before.

    Attributes:
        index: place in its `Documents`.
    """

    def __init__(self, values: dict[str, Any], index: int, owner: "Documents") -> None:
        super().__init__(values)
        self.index = index
        self._owner = owner

    def __missing__(self, column: str) -> "Image | None":
        if column not in self._owner.picture_columns:
            raise KeyError(column)
        encoded = self._owner.encoded(self.index, column)
        picture = None if encoded is None else open_picture(encoded)
        self[column] = picture
        return picture


class Documents(Sequence[Document]):
    """Rows of one split, as lmms-eval wants them: indexable, iterable, with `features`.

    Every access gives fresh values: upstream's scorers change the rows they are given.
    """

    def __init__(
        self, table: pa.Table, pictures: "dict[str, _Pictures]", order: list[int] | None = None
    ) -> None:
        self._table = table
        self._pictures = pictures
        self._order = list(range(table.num_rows)) if order is None else order
        self.picture_columns = tuple(pictures)
        self.features = dict.fromkeys([*table.column_names, *pictures])
        self._digests: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Documents(self._table, self._pictures, self._order[index])
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
        return Documents(self._table, self._pictures, [self._order[index] for index in indices])

    def encoded(self, index: int, column: str) -> bytes | None:
        """The picture file as it is stored; None where the row has none."""
        return self._pictures[column].encoded(self._order[index])

    def picture_digests(self, column: str) -> list[str]:
        """sha256 of each row's stored picture file, shortened; empty where there is none."""
        if column not in self._digests:
            pictures = self._pictures[column]
            self._digests[column] = [pictures.digest(row) for row in self._order]
        return self._digests[column]

    def content_digests(self) -> list[str]:
        """sha256 of each row with all its pictures, hexadecimal."""
        columns = [self.picture_digests(column) for column in self.picture_columns]
        result = []
        for document in self:
            text = json.dumps(document, sort_keys=True, default=str, ensure_ascii=False)
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
            for name, digests in zip(self.picture_columns, columns, strict=True):
                digest.update(f"\0{name}:{digests[document.index]}".encode())
            result.append(digest.hexdigest())
        return result


class _Pictures:
    """Encoded pictures of one column over several files; `rows` maps table rows to picture rows."""

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
        self._cache: OrderedDict[int, list[bytes | None]] = OrderedDict()
        self._digests: dict[int, str] = {}

    def encoded(self, row: int) -> bytes | None:
        import bisect

        row = row if self._rows is None else self._rows[row]
        group = bisect.bisect_right(self._groups, (row, len(self._files), 0)) - 1
        return self._read(group)[row - self._groups[group][0]]

    def digest(self, row: int) -> str:
        place = row if self._rows is None else self._rows[row]
        if place not in self._digests:
            data = self.encoded(row)
            self._digests[place] = "" if data is None else hashlib.sha256(data).hexdigest()[:32]
        return self._digests[place]

    def _read(self, group: int) -> list[bytes | None]:
        if group not in self._cache:
            _, file, number = self._groups[group]
            column = self._files[file].read_row_group(number, columns=[self._column])
            values = column.column(0).to_pylist()
            self._cache[group] = [
                value["bytes"] if isinstance(value, dict) else value for value in values
            ]
            while len(self._cache) > 2:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


def open_picture(encoded: bytes) -> "Image":
    """Decode a picture as training does: RGB, upright by its EXIF tag.

    Raises:
        PictureError: it is damaged or cut off.
    """
    try:
        return open_image(encoded)
    except Unreadable as error:
        raise PictureError(f"the picture cannot be decoded: {error}") from error


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
    table = pa.concat_tables([pq.read_table(file, columns=plain) for file in files])
    pa.default_memory_pool().release_unused()
    if table.num_rows == 0:
        raise UsageError(f"{spec.id}: {files[0]} holds no rows.", "Fetch or build the data again.")
    pictures = {name: _Pictures(files, name) for name in media}
    if spec.dataset.images and "image" not in pictures:
        pictures["image"] = _joined(spec, folder, split, table)
    return Documents(table, pictures)


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
        try:
            schema = pq.read_schema(file)
        except (OSError, pa.ArrowException) as error:
            problem = f"{task}: {file} cannot be read: {str(error).splitlines()[0]}"
            raise UsageError(problem, "Fetch it again.") from None
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
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if pa.types.is_null(kind):
        return True
    if wanted == "image":
        return pa.types.is_binary(kind) or (
            pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        )
    if wanted == "text":
        return text
    if wanted == "integer":
        return pa.types.is_integer(kind)
    if wanted == "id":
        return text or pa.types.is_integer(kind)
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else None
    if inner is None:
        return False
    if wanted == "answers":
        return pa.types.is_struct(inner) and inner.get_field_index("answer") >= 0
    return pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner)


def _joined(spec: TaskSpec, folder: Path, split: str, table: pa.Table) -> _Pictures:
    """GQA: the pictures lie once in their own files, found by `imageId`."""
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
            f"{spec.id}: {folder / name} lacks the picture {absent[0]!r}"
            + (f" and {len(absent) - 1} others." if len(absent) > 1 else "."),
            "Fetch the pictures again.",
        )
    return _Pictures(files, "image", [places[key] for key in wanted])
