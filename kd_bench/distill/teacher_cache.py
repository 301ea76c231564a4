"""The teacher's last hidden states at answer positions, kept on disk between trainings.

Some 70 times smaller than its logits, and the same for every student of one teacher. Each process
appends to two files of its own: values, and fixed-size records that say where a sample's values
lie. A record is written after its values, so a killed process leaves at most a torn tail.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_bench.errors import UsageError
from kd_bench.files import digest_text, read_json, write_json

__all__ = ["TeacherCache", "cache_folder"]

RECORD = np.dtype([("sample", "<i8"), ("row", "<i8"), ("rows", "<i8")])


def cache_folder(root: Path, **identity: Any) -> Path:
    """A folder below `root` for what all of `identity` decides, created with a note of it."""
    key = digest_text(*(f"{name}={value}" for name, value in sorted(identity.items())))
    folder = root.expanduser() / key[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "identity.json").exists():
        write_json(folder / "identity.json", {name: str(value) for name, value in identity.items()})
    return folder


class TeacherCache:
    """Hidden states by sample.

    Args:
        folder: of `cache_folder`.
        width: hidden size of the teacher.
        dtype: float32 or bfloat16, as the teacher computes.
        rank: number of this process; every process writes files of its own.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype, rank: int = 0) -> None:
        self.folder = folder
        self.width = width
        self.dtype = dtype
        self._check()
        self._where: dict[int, tuple[np.memmap | None, int, int]] = {}
        for records in sorted(folder.glob("records-*.bin")):
            self._read(records)
        # A process id in the name: a restarted process never appends behind a torn tail.
        own = f"{rank}-{os.getpid()}"
        self._values = folder / f"values-{own}.bin"
        self._records = folder / f"records-{own}.bin"
        self._rows = 0

    def _check(self) -> None:
        note = self.folder / "layout.json"
        layout = {"width": self.width, "dtype": str(self.dtype)}
        if not note.exists():
            write_json(note, layout)
        elif read_json(note) != layout:
            raise UsageError(
                f"{self.folder} holds hidden states of another form.", "Delete that folder."
            )

    @property
    def _bytes(self) -> np.dtype[Any]:
        return np.dtype("<f4") if self.dtype == torch.float32 else np.dtype("<i2")

    def _read(self, records: Path) -> None:
        """Take up another process's samples, as far as their values are whole."""
        values = records.with_name(records.name.replace("records", "values"))
        size = (
            values.stat().st_size // (self._bytes.itemsize * self.width) if values.exists() else 0
        )
        if size == 0:
            return
        rows = np.memmap(values, self._bytes, "r", shape=(size, self.width))
        whole = records.stat().st_size // RECORD.itemsize
        for sample, row, count in np.fromfile(records, RECORD, whole).tolist():
            if row + count <= size:
                self._where[sample] = (rows, row, count)

    def get(self, samples: Sequence[int], counts: Sequence[int]) -> Tensor | None:
        """Hidden states [sum of counts, width] of samples in order; None if any is missing."""
        known = [self._where.get(sample) for sample in samples]
        fits = all(
            place is not None and place[2] == count
            for place, count in zip(known, counts, strict=True)
        )
        if not fits:
            return None
        parts = []
        for place in known:
            assert place is not None
            rows, row, count = place
            source = self._own() if rows is None else rows
            parts.append(np.array(source[row : row + count]))
        joined = torch.from_numpy(np.concatenate(parts))
        return joined if self.dtype == torch.float32 else joined.view(torch.bfloat16)

    def _own(self) -> Any:
        return np.memmap(self._values, self._bytes, "r", shape=(self._rows, self.width))

    def put(self, samples: Sequence[int], counts: Sequence[int], hidden: Tensor) -> None:
        """Keep hidden states [sum of counts, width] of samples that are not kept yet."""
        flat = hidden.detach().to("cpu", self.dtype)
        raw = flat if self.dtype == torch.float32 else flat.view(torch.int16)
        with self._values.open("ab") as values, self._records.open("ab") as records:
            entries = []
            for sample, count, part in zip(samples, counts, raw.split(list(counts)), strict=True):
                if sample in self._where:
                    continue
                values.write(part.contiguous().numpy().tobytes())
                entries.append((sample, self._rows, count))
                self._where[sample] = (None, self._rows, count)
                self._rows += count
            values.flush()
            records.write(np.array(entries, RECORD).tobytes())
