"""Encoded samples -> padded batches in a fixed order.

The order of samples is a function of seed and epoch alone, so a resumed run meets the same batches,
and of the whole batch size rather than of the number of devices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kd_bench.distill.encoding import IGNORED, PER_TOKEN, EncodedSample, Encoder
from kd_bench.distill.forms import Conversation
from kd_bench.distill.images import Unreadable
from kd_bench.distill.vision_language import TEACHERS
from kd_bench.errors import TrainingError, UsageError

MEMORY_BUDGET = 2 << 30  # bytes of encoded samples that are kept in memory
FIRST, AT_A_TIME = 8, 256  # conversations encoded at a time
SHOWN = 20  # unreadable samples that a message lists


@dataclass(frozen=True)
class Lost:
    """A sample that could not be read when its batch was made."""

    index: int
    reason: str


def batched(conversations: Sequence[Conversation], size: int) -> Iterator[Sequence[Conversation]]:
    """Groups of `size`; the first is small, so that the encoder learns from it what is constant."""
    yield conversations[:FIRST]
    for start in range(FIRST, len(conversations), size):
        yield conversations[start : start + size]


class ConversationDataset(Dataset[EncodedSample | Lost]):
    """Encoded samples, made when asked for; `prepare` makes and keeps them all.

    Args:
        unreadable: samples already given up when the file was read.
        unreadable_limit: how many samples in all may be given up.
    """

    def __init__(
        self,
        conversations: list[Conversation],
        encoder: Encoder,
        *,
        unreadable: Sequence[tuple[str, str]] = (),
        unreadable_limit: int = 10,
    ) -> None:
        self.conversations = conversations
        self.encoder = encoder
        self.unreadable = list(unreadable)
        self.unreadable_limit = unreadable_limit
        self._kept: list[EncodedSample] = []
        self.left_out = 0  # answers that are context only, known once all samples are encoded
        self.check_limit()

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> EncodedSample | Lost:
        if self._kept:
            return self._kept[index]
        try:
            sample = self.encoder.encode(self.conversations[index])
        except Unreadable as error:
            return Lost(index, str(error))
        sample["sample_index"] = torch.tensor(index)
        return sample

    def prepare(self) -> None:
        """Encode everything now and keep it, unless it would not fit into memory.

        What cannot be read is left out of `conversations`.
        """
        kept: list[EncodedSample] = []
        sound: list[Conversation] = []
        lost: list[tuple[str, str]] = []
        for group in batched(self.conversations, AT_A_TIME):
            made = self.encoder.encode_many(group)
            for conversation, sample in zip(group, made, strict=True):
                if isinstance(sample, Unreadable):
                    lost.append(conversation.given_up(sample))
                else:
                    sample["sample_index"] = torch.tensor(len(kept))
                    kept.append(sample)
                    sound.append(conversation)
            if _bytes(kept) / max(len(kept), 1) * len(self.conversations) > MEMORY_BUDGET:
                return
        self.conversations, self._kept = sound, kept
        self.left_out = self.encoder.left_out
        self.unreadable += lost
        self.check_limit()

    def give_up(self, index: int, reason: str) -> None:
        """Count a sample that could not be read during training.

        Raises:
            TrainingError: more of them than the recipe allows.
        """
        entry = self.conversations[index].given_up(reason)
        if entry not in self.unreadable:
            self.unreadable.append(entry)
            self.check_limit()

    def check_limit(self) -> None:
        """Stop once more samples were given up than the recipe allows."""
        if len(self.unreadable) <= self.unreadable_limit:
            return
        shown = [f"{name}: {reason}" for name, reason in self.unreadable[:SHOWN]]
        if len(self.unreadable) > SHOWN:
            shown.append(f"and {len(self.unreadable) - SHOWN} more")
        raise TrainingError(
            f"{len(self.unreadable)} samples cannot be used, more than the "
            f"{self.unreadable_limit} allowed: {'; '.join(shown)}.",
            "Repair the data, or raise data.unreadable_limit.",
        )

    def has_image(self, index: int) -> bool:
        """Whether a sample holds a picture."""
        return bool(self.conversations[index].images)

    def length(self, index: int) -> int:
        """Tokens of a sample, or its characters while it is not encoded: for grouping only."""
        if self._kept:
            return len(self._kept[index]["input_ids"])
        turns = self.conversations[index].turns
        return sum(len(piece or "") for turn in turns for piece in turn.pieces)


def _bytes(samples: list[EncodedSample]) -> int:
    return sum(tensor.nbytes for sample in samples for tensor in sample.values())


class Collator:
    """Pads samples on the right and joins their pictures."""

    def __init__(self, pad_token_id: int) -> None:
        self.padding = {"input_ids": pad_token_id, "labels": IGNORED}

    def __call__(self, made: Sequence[EncodedSample | Lost]) -> dict[str, Any]:
        samples = [sample for sample in made if not isinstance(sample, Lost)]
        lost = [(sample.index, sample.reason) for sample in made if isinstance(sample, Lost)]
        if not samples:  # nothing to learn, but every device has to take its step
            alone = torch.tensor([self.padding["input_ids"]])
            samples = [
                {
                    "input_ids": alone,
                    "labels": torch.full_like(alone, IGNORED),
                    "sample_index": torch.tensor(-1),
                }
            ]
        batch = self._joined(samples)
        return {**batch, "unreadable": lost} if lost else batch

    def _joined(self, samples: list[EncodedSample]) -> dict[str, Tensor]:
        """The student's tensors and, where samples hold them, the teacher's own."""
        own, theirs = [], []
        for sample in samples:
            sides: dict[bool, EncodedSample] = {True: {}, False: {}}
            for name, tensor in sample.items():
                sides[name.startswith(TEACHERS)][name.removeprefix(TEACHERS)] = tensor
            own.append(sides[False])
            theirs.append(sides[True])
        batch = self._side(own)
        batch["sample_index"] = torch.stack([sample["sample_index"] for sample in samples])
        if any(theirs):
            batch |= {f"{TEACHERS}{name}": each for name, each in self._side(theirs).items()}
        return batch

    def _side(self, samples: list[EncodedSample]) -> dict[str, Tensor]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        longest = max(lengths)
        batch = {
            name: self._pad(samples, name, longest) for name in ("input_ids", "labels")
        }  # [batch, length]
        places = torch.arange(longest)
        batch["attention_mask"] = (places < torch.tensor(lengths).unsqueeze(1)).long()
        names = {name for sample in samples for name in sample} - {*batch, "sample_index"}
        for name in sorted(names):
            if name in PER_TOKEN:
                batch[name] = self._pad(samples, name, longest)
            else:
                batch[name] = joined([sample[name] for sample in samples if name in sample])
        return batch

    def _pad(self, samples: list[EncodedSample], name: str, longest: int) -> Tensor:
        filler = self.padding.get(name, 0)
        padded = samples[0]["input_ids"].new_full((len(samples), longest), filler)
        for row, sample in zip(padded, samples, strict=True):
            if name in sample:
                row[: len(sample[name])] = sample[name]
        return padded


def joined(tensors: list[Tensor]) -> Tensor:
    """Concatenate along the first dimension, zero-padding the others to their largest size."""
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    whole = tensors[0].new_zeros((sum(len(tensor) for tensor in tensors), *shape))
    row = 0
    for tensor in tensors:
        region = (slice(row, row + len(tensor)), *(slice(size) for size in tensor.shape[1:]))
        whole[region] = tensor
        row += len(tensor)
    return whole


class BatchOrder(Sampler[list[int]]):
    """Batches of sample indices, in an order that only seed and epoch decide.

    One optimizer step takes `batch_size` samples in a row, whatever number of devices and
    accumulation pieces share them. Text-only samples are batched together where their number
    allows, so that those batches never reach the vision tower; what is left over mixes. Samples
    beyond the last whole batch wait for another epoch.

    Args:
        piece: samples of one device at a time; divides `batch_size`.
    """

    drop_last = True

    def __init__(
        self,
        dataset: ConversationDataset,
        batch_size: int,
        piece: int,
        seed: int,
        group_by_length: bool = False,
    ) -> None:
        if len(dataset) < batch_size:
            raise UsageError(
                f"The data holds {len(dataset)} usable samples, fewer than one batch of "
                f"{batch_size}.",
                "Lower batch_size, or give more data.",
            )
        self.dataset = dataset
        self.whole = batch_size
        self.batch_size = piece
        self.seed = seed
        self.group_by_length = group_by_length
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset) // self.whole * (self.whole // self.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of one epoch."""
        return len(self.dataset) // self.whole

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches(self.epoch):
            for start in range(0, self.whole, self.batch_size):
                yield batch[start : start + self.batch_size]

    def batches(self, epoch: int) -> list[list[int]]:
        """All whole batches of one epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        order = order[: len(order) // self.whole * self.whole]
        if self.group_by_length:
            order = self._by_length(order)
        pictured = [index for index in order if self.dataset.has_image(index)]
        plain = [index for index in order if not self.dataset.has_image(index)]
        whole = len(plain) // self.whole * self.whole
        # Text left over joins the pictures' last batch.
        rows = plain[:whole] + pictured + plain[whole:]
        batches = [rows[i : i + self.whole] for i in range(0, len(rows), self.whole)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[index] for index in shuffled]

    def _by_length(self, order: list[int]) -> list[int]:
        """Sort by length inside windows of 16 batches: less padding, still mostly random."""
        window = 16 * self.whole
        result: list[int] = []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            result += sorted(part, key=self.dataset.length, reverse=True)
        return result
