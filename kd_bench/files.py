"""Files that survive a crash: atomic writes, locks, an append-only journal, content digests."""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd_bench.errors import UsageError


@contextmanager
def atomic_path(path: Path, *, flushed: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it only when the block ends well.

    The content is flushed to disk before the rename, so a reader meets the old file or the
    new one, never half of either; what can be made again need not be, and half of it may be met
    after the machine has crashed. A link stays one: what it leads to is written. What is there
    and no regular file (a pipe, a device) is never replaced: the content is written into it.
    """
    if _is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            aside = Path(folder) / path.name
            yield aside
            try:  # nothing is made, cut short or renamed
                with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as stream:
                    stream.write(aside.read_bytes())
            except OSError as error:
                error.filename = error.filename or str(path)
                raise
        return
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if flushed:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        os.umask(mask := os.umask(0))  # it can only be read by setting it
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        if error.filename is None or error.filename == name:  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that replaces it only when the block ends well.

    What a killed process has left of one is removed by the next.
    """
    aside = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(written: Path, folder: Path) -> None:
    """Put a written folder in another's place once all its files are on disk."""
    for path in written.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    written.rename(folder)


@contextmanager
def locked(path: Path, problem: str, hint: str) -> Iterator[None]:
    """Hold a lock file; the system frees it when its process ends, however that comes.

    Args:
        problem, hint: what the error says.

    Raises:
        UsageError: another process holds it.
    """
    from filelock import FileLock, Timeout

    class Exclusive(FileLock):
        """lmms-eval makes every plain FileLock of its process one that can be taken again."""

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Exclusive(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(problem, hint) from None
    try:
        yield
    finally:
        lock.release()


def _is_stream(path: Path) -> bool:
    """Whether a path leads to something to write into: a pipe, a device, an open descriptor."""
    if not path.exists() or path.is_dir():
        return False
    # `/dev/stdout` is a regular file after `> file`, which the shell still holds open.
    return not path.is_file() or path.parts[:2] in (("/", "dev"), ("/", "proc"))


MARKER = ".kd-bench"
"""Marks a folder whose contents kd-bench made and may replace."""


def claim_folder(folder: Path, kind: str, names: Iterable[str], *, made_before: bool) -> None:
    """Mark a folder as kd-bench's own before anything in it is replaced.

    Args:
        kind: what kd-bench keeps there, for the marker and the message.
        names: what will be written or replaced.
        made_before: a version without markers made the folder, as its contents show.

    Raises:
        UsageError: a file or folder of these names is there, and kd-bench did not make it.
    """
    marker = folder / MARKER
    if marker.exists():
        return
    if not made_before:
        foreign = next((name for name in names if (folder / name).exists()), None)
        if foreign is not None:
            raise UsageError(
                f"{folder / foreign} was not made by kd-bench and would be replaced.",
                "Give another folder, or move it away.",
            )
    write_text(marker, f"A {kind} of kd-bench, which may replace what is in this folder.\n")


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file atomically: aside, flushed, renamed. Returns its sha256, hexadecimal."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return digest_bytes(data)


def write_text(path: Path, text: str) -> str:
    """Write UTF-8 text atomically; a lone surrogate is written as an escape."""
    return write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> str:
    """Write indented UTF-8 JSON atomically; key order is kept."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON; the message names the file.
    """
    return parse_json(path.read_bytes(), path)


def parse_json(data: bytes, path: Path) -> Any:
    """The value that lies in a JSON file.

    Raises:
        ValueError: it is not JSON; the message names the file.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        form = foreign_form(data[:8])
        why = f"it is {form}" if form else error
        raise ValueError(f"{path} is not valid JSON: {why}") from None


PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
"""First bytes of compressed files."""


def foreign_form(start: bytes) -> str:
    r"""What a file of JSON is that is not plain UTF-8, by its first bytes; empty if it may be.

    >>> foreign_form(b"\x1f\x8b\x08")
    'compressed by gzip'
    """
    for mark, name in PACKED.items():
        if start.startswith(mark):
            return f"compressed by {name}"
    encoding = json.detect_encoding(start)  # by a byte-order mark, or by where the zeros are
    if encoding == "utf-8-sig":
        return "text in UTF-8 behind a byte-order mark"
    is_json = encoding != "utf-8" and start.strip(b"\0\xff\xfe \t\r\n")[:1] in (b"{", b"[")
    return f"text in {encoding[:6].upper()}" if is_json else ""


def digest_bytes(data: bytes) -> str:
    """sha256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_text(*parts: str) -> str:
    """sha256 over text parts, hexadecimal; the borders between parts count."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def digest_files(paths: Iterable[Path]) -> str:
    """sha256 over the names and contents of files, in sorted order, hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


DIGESTS = "digests.json"


def write_digests(folder: Path) -> None:
    """Write down what every file of a folder holds; the last file that is written to it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    digests = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    write_json(folder / DIGESTS, {"format": 1, "files": digests})


def unsound(folder: Path) -> str | None:
    """The first file that is not as `write_digests` found it, and what is wrong; None if all are.

    A folder without digests, as earlier versions left them, cannot be told and is None, too.
    """
    if not (folder / DIGESTS).exists():
        return None
    try:
        files = dict(read_json(folder / DIGESTS)["files"])
    except (ValueError, KeyError, TypeError):
        return f"{folder / DIGESTS} is damaged"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if _digest(path) != digest:
            return f"{path} is not as it was written"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Journal:
    """Append-only records, one checksummed JSON line each.

    A process killed while it appends leaves at most one torn last line; opening the journal
    cuts it off. A line whose checksum does not fit is skipped and counted in `damaged`, so that
    its record is made again rather than believed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0

    def read(self) -> list[dict[str, Any]]:
        """All sound records in the order in which they were written."""
        records, torn = self._load()
        if torn:
            self.cut(torn)
        return records

    def examine(self) -> int:
        """Bytes of a torn last line; counts `damaged` lines, and changes nothing."""
        return self._load()[1]

    def cut(self, torn: int) -> None:
        """Cut a torn last line of `torn` bytes off."""
        with self.path.open("r+b") as stream:
            stream.truncate(self.path.stat().st_size - torn)

    def _load(self) -> tuple[list[dict[str, Any]], int]:
        """Sound records, and the bytes after the last whole line."""
        self.damaged = 0
        if not self.path.exists():
            return [], 0
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        records = (self._decode(line) for line in data[:whole].split(b"\n")[:-1])
        return [record for record in records if record is not None], len(data) - whole

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records and wait until they are on disk."""
        lines = "".join(self._encode(record) for record in records).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as stream:
            # A tail torn by another process must not swallow the first of these records.
            if stream.tell() > 0:
                stream.seek(-1, os.SEEK_END)
                lines = lines if stream.read(1) == b"\n" else b"\n" + lines
            stream.write(lines)
            stream.flush()
            os.fsync(stream.fileno())

    @staticmethod
    def _encode(record: dict[str, Any]) -> str:
        body = json.dumps(record, ensure_ascii=True, separators=(",", ":"))
        return f'{{"crc32":"{zlib.crc32(body.encode()):08x}","record":{body}}}\n'

    def _decode(self, line: bytes) -> dict[str, Any] | None:
        try:
            entry = json.loads(line)
            record = entry["record"]
            if self._encode(record).rstrip("\n").encode() == line and isinstance(record, dict):
                return record
        except (ValueError, KeyError, TypeError):
            pass
        self.damaged += 1
        return None
