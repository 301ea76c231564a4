"""The frozen teacher's last hidden states at answers, on disk or, of a stage, in memory."""

import contextlib
import hashlib
import secrets
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_bench.distill.conversations import data_digest
from kd_bench.distill.encoding import ConversationDataset, PairEncoder
from kd_bench.distill.processes import rank
from kd_bench.distill.vision_language import Places, VisionLanguageModel, teacher_inputs
from kd_bench.errors import UsageError
from kd_bench.files import digest_text, read_json, write_json
from kd_bench.world.build import cache_folder as user_cache

RECORD = np.dtype(
    [("sample", "<i8"), ("row", "<i8"), ("rows", "<i8"), ("values", "<u4"), ("check", "<u4")]
)
"""`values`: crc32 of the sample's values; `check`: crc32 of the four fields before it."""


def cache_folder(root: Path, **identity: Any) -> Path:
    """A folder below `root` for what all of `identity` decides, created with a note of it."""
    key = digest_text(*(f"{name}={value}" for name, value in sorted(identity.items())))
    folder = root.expanduser() / key[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "identity.json").exists():
        write_json(folder / "identity.json", {name: str(value) for name, value in identity.items()})
    return folder


class TeacherCache:
    """The teacher's last hidden states at answer positions, kept on disk between trainings.

    Some 70 times smaller than its logits, and the same for every student of one teacher. A folder
    belongs to one teacher on one set of samples; in it, states are known by sample and number of
    answer positions. Nothing is believed because it is there: a record and the values that it
    points to carry checksums, and what does not fit is asked of the teacher again and written anew.

    Each process appends to two files that it creates itself under a name of its own, so that two
    writers, or one whose process id was given away before, never write into the same file.

    Args:
        folder: of `cache_folder`.
        width: hidden size of the teacher.
        dtype: float32 or bfloat16, as the teacher computes.
        rank: number of this process; part of the names of its files.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype, rank: int = 0) -> None:
        self.width = width
        self.dtype = dtype
        self._bytes: np.dtype[Any] = np.dtype("<f4" if dtype == torch.float32 else "<i2")
        note, layout = folder / "layout.json", {"width": width, "dtype": str(dtype)}
        try:
            known = read_json(note)
        except (FileNotFoundError, ValueError):  # torn: checksums tell what else is wrong
            write_json(note, layout)
            known = layout
        if known != layout:
            raise UsageError(
                f"{folder} holds hidden states of another form.", "Delete that folder."
            )
        # (sample, answer positions) -> places: values of a file, None for our own; first row;
        # checksum. Two where two processes asked, or where one was damaged and written again.
        self._where: dict[tuple[int, int], list[tuple[np.memmap | None, int, int]]] = {}
        for records in sorted(folder.glob("samples-*.bin")):
            self._read(records)
        own = f"{rank}-{secrets.token_hex(8)}"
        self._values = folder / f"values-{own}.bin"
        self._records = folder / f"samples-{own}.bin"
        self._rows = 0

    def _read(self, records: Path) -> None:
        """Take up another process's samples: whole records that point to whole values."""
        values = records.with_name(records.name.replace("samples", "values"))
        a_row = self._bytes.itemsize * self.width
        size = values.stat().st_size // a_row if values.exists() else 0
        if size == 0:
            return
        rows = np.memmap(values, self._bytes, "r", shape=(size, self.width))
        entries = np.fromfile(records, RECORD, records.stat().st_size // RECORD.itemsize)
        for entry in entries:
            sample, row, count, checksum, check = entry.tolist()
            sound = zlib.crc32(entry.tobytes()[:-4]) == check
            if sound and count > 0 and 0 <= row <= size - count:
                self._where.setdefault((sample, count), []).append((rows, row, checksum))

    def get(self, samples: Sequence[int], counts: Sequence[int]) -> Tensor | None:
        """Hidden states [sum of counts, width] of samples in order; None if any is missing."""
        parts = [self._get(key) for key in zip(samples, counts, strict=True)]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        joined = torch.from_numpy(np.concatenate(found))
        return joined if self.dtype == torch.float32 else joined.view(torch.bfloat16)

    def _get(self, key: tuple[int, int]) -> Any:
        """Verified values [count, width] of a sample; forgotten where they are not as written."""
        if key[1] == 0:  # no answer to learn from: nothing was kept
            return np.empty((0, self.width), self._bytes)
        places = self._where.get(key, [])
        while places:
            source, row, checksum = places[-1]
            if source is None:
                source = np.memmap(self._values, self._bytes, "r", shape=(self._rows, self.width))
            values = np.array(source[row : row + key[1]])
            if zlib.crc32(values.tobytes()) == checksum:
                return values
            places.pop()
        return None

    def put(self, samples: Sequence[int], counts: Sequence[int], hidden: Tensor) -> None:
        """Keep hidden states [sum of counts, width] of samples that are not kept yet."""
        flat = hidden.detach().to("cpu", self.dtype)
        raw = flat if self.dtype == torch.float32 else flat.view(torch.int16)
        with self._values.open("ab") as values, self._records.open("ab") as records:
            entries = []
            for sample, count, part in zip(samples, counts, raw.split(list(counts)), strict=True):
                if count == 0 or self._where.get((sample, count)):
                    continue
                data = part.contiguous().numpy().tobytes()
                values.write(data)
                entry = np.array((sample, self._rows, count, zlib.crc32(data), 0), RECORD)
                entry["check"] = zlib.crc32(entry.tobytes()[:-4])
                entries.append(entry.tobytes())
                place = (None, self._rows, int(entry["values"]))
                self._where.setdefault((sample, count), []).append(place)
                self._rows += count
            values.flush()
            records.write(b"".join(entries))


STATES_BUDGET = 128 << 20
"""Bytes of teacher states that a stage keeps in memory, for samples that are met again."""
STATES_TOGETHER = 16  # samples


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's last hidden states at the answers of all samples of a stage.

    Computed once, in batches that the samples alone decide. So they are the same bits in every
    epoch, for every seed and method, in a training that was stopped and resumed, and whoever of
    several trainings wrote them down first.

    Attributes:
        states: [answers of all samples, width].
        first: row of each sample's first answer [samples].
    """

    states: Tensor
    first: Tensor

    def of(self, samples: Tensor, places: Places) -> Tensor:
        """States [N, width] at the answers of a batch whose samples [batch] are given."""
        first = self.first.index_select(0, samples.index_select(0, places.owners))  # [N]
        return self.states.index_select(0, first + places.slots % places.table.shape[1])


def answer_counts(samples: Iterable[Mapping[str, Tensor]]) -> list[int]:
    """Answer positions of each sample."""
    return [int((sample["labels"][1:] != -100).sum()) for sample in samples]


def states_bytes(samples: Iterable[Mapping[str, Tensor]], width: int, dtype: torch.dtype) -> int:
    """Size of the teacher's states at the answers of samples."""
    return sum(answer_counts(samples)) * width * dtype.itemsize


def digest_samples(samples: Iterable[Mapping[str, Tensor]]) -> str:
    """blake2b over names, types, shapes and values of all tensors, hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        for name, tensor in sorted(sample.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def compute_states(
    teacher: VisionLanguageModel,
    samples: Sequence[Mapping[str, Tensor]],
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    cache: TeacherCache | None,
) -> TeacherStates:
    """The teacher's states of all samples, from the cache where it has them, which keeps the rest.

    Args:
        samples: in the order of their indices.
        collate: makes a batch of some of them.
        cache: None where there is no room for one.
    """
    width, dtype = teacher.hidden_size, teacher.whole.dtype
    device = next(teacher.model.parameters()).device
    counts = torch.tensor(answer_counts(samples))
    first = counts.cumsum(0) - counts
    states = torch.empty(int(counts.sum()), width, dtype=dtype)
    order = sorted(range(len(samples)), key=lambda index: (len(samples[index]["input_ids"]), index))
    for start in range(0, len(order), STATES_TOGETHER):
        group = order[start : start + STATES_TOGETHER]
        answered = counts[group].tolist()
        known = cache.get(group, answered) if cache else None
        if known is None:
            batch = collate([samples[index] for index in group])
            moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}
            known = teacher.answer_states(teacher_inputs(moved)).to("cpu", dtype)
            if cache:
                with contextlib.suppress(OSError):  # no room to share them
                    cache.put(group, answered, known)
        for index, part in zip(group, known.split(answered), strict=True):
            states[first[index] : first[index] + len(part)] = part
    return TeacherStates(states.to(device), first.to(device))


def open_cache(
    root: Path, teacher: Any, weights: str, dataset: ConversationDataset, **own: Any
) -> TeacherCache:
    """The cache below `root` of a teacher's states on a dataset.

    Args:
        teacher: the model, as transformers loads it.
        weights: digest of the teacher's.
        own: what else decides the states.
    """
    if isinstance(encoder := dataset.encoder, PairEncoder):  # images of its own decide, too
        own["images"] = encoder.teacher.processor.image_processor.to_json_string()
    folder = cache_folder(
        root,
        teacher=weights,
        data=data_digest(dataset.conversations)["sha256"],
        max_length=encoder.max_length,
        template=encoder.chat.template,
        dtype=teacher.dtype,
        **own,
    )
    width = teacher.get_input_embeddings().weight.shape[1]
    return TeacherCache(folder, width, teacher.dtype, rank())


def states_of_stage(
    teacher: VisionLanguageModel,
    weights: str,
    dataset: ConversationDataset,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    *,
    met: int,
    precision: str,
    root: str | None,
) -> TeacherStates | None:
    """The teacher's states of all samples, where they are few and met more than once.

    Args:
        weights: digest of the teacher's.
        met: samples that the stage goes through.
        precision: that it computes in.
        root: folder of caches; by default the user's own.
    """
    samples, dtype = dataset.kept, teacher.whole.dtype
    if not samples or met <= len(samples):
        return None
    if states_bytes(samples, teacher.hidden_size, dtype) > STATES_BUDGET:
        return None
    device = next(teacher.model.parameters()).device.type
    own = {
        # All that the teacher is given, whatever it was made of, and how it reads that.
        "samples": digest_samples(samples),
        "config": teacher.whole.config.to_json_string(),
        # What rounding may depend on.
        "attention": teacher.whole.config._attn_implementation,
        "precision": precision,
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads() if device == "cpu" else 0,
        "together": STATES_TOGETHER,
    }
    cache = None
    with contextlib.suppress(OSError):  # a folder that is full, or another user's
        place = Path(root or user_cache() / "teacher-states")
        cache = open_cache(place, teacher.whole, weights, dataset, **own)
    return compute_states(teacher, samples, collate, cache)
