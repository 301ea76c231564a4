"""Conversations -> token ids with the prompt masked -> batches in a fixed order.

Only answers are supervised: every label outside an assistant turn is -100, the turn's end token is
kept. The order of samples is a function of seed and epoch alone, so a resumed run meets the same
batches, and of the whole batch size rather than of the number of devices.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kd_bench.distill.data import Conversation, Unreadable, open_image
from kd_bench.errors import TrainingError, UsageError

__all__ = ["IGNORED", "BatchOrder", "Collator", "ConversationDataset", "Encoder"]

IGNORED = -100
MEMORY_BUDGET = 2 << 30  # bytes of encoded samples that are kept in memory
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # an answer's mark in a chat template
FIRST, AT_A_TIME = 8, 256  # conversations encoded at a time
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")

SHOWN = 20  # unreadable samples that a message lists

Sample = dict[str, Tensor]


@dataclass(frozen=True)
class Lost:
    """A sample that could not be read when its batch was made."""

    index: int
    reason: str


class Encoder:
    """Turns conversations into the tensors of samples.

    Args:
        processor: the student's; its chat template writes the prompt.
        max_length: tokens kept; an answer cut off entirely makes the sample unreadable.
    """

    def __init__(self, processor: Any, max_length: int = 2048) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self.image_token_id = int(
            getattr(processor, "image_token_id", None)
            or self.tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", "<image>"))
        )
        # Pictures of one size and one run of image tokens each can go through in bulk.
        self.tokens_a_picture: int | None = None
        self.plain_pictures = type(processor).__name__ == "LlavaProcessor"
        template = getattr(processor, "chat_template", None)
        self.marks_answers = isinstance(template, str) and bool(GENERATION.search(template))
        if not getattr(self.tokenizer, "is_fast", False):
            raise UsageError(
                "The student's tokenizer is a slow one, which cannot say where an answer begins.",
                "Save its fast form (tokenizer.json) beside the checkpoint.",
            )

    def encode(self, conversation: Conversation) -> Sample:
        """`input_ids`, `labels` [length], and whatever the processor makes of the pictures.

        Raises:
            Unreadable: a picture cannot be decoded, or no answer fits into `max_length`.
        """
        made = self.encode_many([conversation])[0]
        if isinstance(made, Unreadable):
            raise made
        return made

    def encode_many(self, conversations: Sequence[Conversation]) -> list[Sample | Unreadable]:
        """One sample, or the reason why there is none, for each conversation."""
        rendered = [self.render(conversation) for conversation in conversations]
        tokens = self._tokens([text for text, _ in rendered])
        made: list[Sample | Unreadable] = []
        pictures = [_opened(conversation) for conversation in conversations]
        bulk = self._pixels_in_bulk(pictures)
        for index, (ids, offsets) in enumerate(tokens):
            text, spans = rendered[index]
            try:
                images = pictures[index]
                if isinstance(images, Unreadable):
                    raise images
                answers = within(offsets, spans)
                if not images:
                    made.append(self._sample(ids, answers, {}))
                elif bulk is not None:
                    made.append(self._sample(*self._expanded(ids, answers), {**bulk[index]}))
                else:
                    made.append(self._sample(*self._processed(text, images, ids, answers)))
            except Unreadable as error:
                made.append(error)
        return made

    def _processed(
        self, text: str, images: list[Image], ids: list[int], answers: list[bool]
    ) -> tuple[list[int], list[bool], Sample]:
        """Ids, mask and picture tensors as the processor itself expands the placeholders."""
        made = self.processor(
            text=[text],
            images=[images],
            return_tensors="pt",
            add_special_tokens=self._adds_special_tokens(text),
        )
        full = made.pop("input_ids")[0].tolist()
        made.pop("attention_mask", None)
        if self.plain_pictures and self.tokens_a_picture is None:
            count, rest = divmod(full.count(self.image_token_id), len(images))
            self.tokens_a_picture = count
            # Believed only if it gives what the processor gave.
            if rest or self._expanded(ids, answers)[0] != full:
                self.plain_pictures = False
        return full, spread_mask(ids, answers, full, self.image_token_id), dict(made)

    def _pixels_in_bulk(
        self, pictures: list[list[Image] | Unreadable]
    ) -> list[dict[str, Tensor]] | None:
        """`pixel_values` of every conversation from one call; None where that cannot be done."""
        if not self.plain_pictures or self.tokens_a_picture is None:
            return None
        groups = [[] if isinstance(group, Unreadable) else group for group in pictures]
        flat = [image for group in groups for image in group]
        if not flat:
            return [{} for _ in groups]
        made = self.processor.image_processor(images=flat, return_tensors="pt")["pixel_values"]
        parts = made.split([len(group) for group in groups])
        return [{"pixel_values": part.clone()} if len(part) else {} for part in parts]

    def _expanded(self, ids: list[int], answers: list[bool]) -> tuple[list[int], list[bool]]:
        """Every image placeholder repeated `tokens_a_picture` times."""
        count = self.tokens_a_picture or 1
        full: list[int] = []
        mask: list[bool] = []
        for token, answer in zip(ids, answers, strict=True):
            times = count if token == self.image_token_id else 1
            full += [token] * times
            mask += [answer] * times
        return full, mask

    def _sample(self, ids: list[int], answers: list[bool], extra: Sample) -> Sample:
        if len(ids) > self.max_length:
            if any(token == self.image_token_id for token in ids[self.max_length :]):
                raise Unreadable(f"a picture lies beyond max_length={self.max_length}")
            ids, answers = ids[: self.max_length], answers[: self.max_length]
            for name in PER_TOKEN:
                if name in extra:
                    extra[name] = extra[name][:, : self.max_length]
        input_ids = torch.tensor(ids)
        labels = torch.where(torch.tensor(answers), input_ids, IGNORED)
        labels[0] = IGNORED  # nothing comes before it to predict it from
        if not bool((labels != IGNORED).any()):
            raise Unreadable(f"no answer within max_length={self.max_length}")
        for name in PER_TOKEN:
            if name in extra:
                extra[name] = extra[name][0]
        return {"input_ids": input_ids, "labels": labels, **extra}

    def _tokens(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Token ids and character offsets of each text."""
        if not texts:
            return []
        made = self.tokenizer(
            texts,
            return_offsets_mapping=True,
            add_special_tokens=self._adds_special_tokens(texts[0]),
        )
        return list(zip(made["input_ids"], made["offset_mapping"], strict=True))

    def _adds_special_tokens(self, text: str) -> bool:
        """False where the template has written the begin token already."""
        begin = self.tokenizer.bos_token
        return not (begin and text.startswith(begin))

    def render(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as the chat template writes it, and the spans of its answers.

        A span runs from the end of the generation prompt to the end of the turn, end token
        included, so training sees the very prompts that evaluation sends.
        """
        messages = conversation.messages
        if self.marks_answers:
            return self._marked(messages)
        spans = []
        text = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._template(messages[:index], True)
            text = self._template(messages[: index + 1], False)
            if not text.startswith(prompt):
                raise UsageError(
                    "The chat template writes an answered turn otherwise than its generation "
                    "prompt, so answers cannot be told from prompts.",
                    "Use a template whose answered turn starts with the generation prompt.",
                )
            spans.append((len(prompt), len(prompt) + len(text[len(prompt) :].rstrip())))
        return text, spans  # what follows the last answer is never trained on

    def _marked(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The same from one rendering, by the template's own `{% generation %}` marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.processor.chat_template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], [(start, end) for start, end in spans[0]]

    def _template(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        return str(text)


def _opened(conversation: Conversation) -> list[Image] | Unreadable:
    try:
        return [open_image(image) for image in conversation.images]
    except Unreadable as error:
        return error


def within(offsets: Sequence[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Whether each token starts inside one of the (start, end) character spans."""
    inside = []
    pending = iter([*spans, (1 << 62, 1 << 62)])
    start, end = next(pending)
    for first, last in offsets:
        while first >= end:
            start, end = next(pending)
        inside.append(first >= start and last > first)
    return inside


def spread_mask(
    plain: list[int], mask: list[bool], full: list[int], image_token_id: int
) -> list[bool]:
    """Carry a mask over to the same text after each picture's placeholder was expanded.

    Between pictures the tokens are equal on both sides; what the expansion added is False.
    """
    places = [index for index, token in enumerate(plain) if token == image_token_id]
    if not places:
        if plain == full:
            return mask
        raise UsageError(
            "The processor rewrites the text around a picture in a way that cannot be followed.",
            "Put <image> marks in the processor's own form.",
        )
    head, tail = places[0], len(plain) - places[-1] - 1
    result = [False] * len(full)
    result[:head] = mask[:head]
    if tail:
        result[-tail:] = mask[-tail:]
    position = head
    for place, following in itertools.pairwise(places):
        segment = plain[place + 1 : following]
        if not segment:
            continue
        position = _find(full, segment, position + 1)
        result[position : position + len(segment)] = mask[place + 1 : following]
        position += len(segment)
    return result


def _find(full: list[int], segment: list[int], start: int) -> int:
    for index in range(start, len(full) - len(segment) + 1):
        if full[index] == segment[0] and full[index : index + len(segment)] == segment:
            return index
    raise UsageError(
        "The text between two pictures is not found again after the processor expanded them.",
        "Check that the processor belongs to this tokenizer.",
    )


def batched(conversations: Sequence[Conversation], size: int) -> Iterator[Sequence[Conversation]]:
    """Groups of `size`; the first is small, so that the encoder learns from it what is constant."""
    yield conversations[:FIRST]
    for start in range(FIRST, len(conversations), size):
        yield conversations[start : start + size]


class ConversationDataset(Dataset[Sample | Lost]):
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
        self._kept: list[Sample] = []
        self.check_limit()

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Sample | Lost:
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
        kept: list[Sample] = []
        sound: list[Conversation] = []
        lost: list[tuple[str, str]] = []
        for group in batched(self.conversations, AT_A_TIME):
            made = self.encoder.encode_many(group)
            for conversation, sample in zip(group, made, strict=True):
                if isinstance(sample, Unreadable):
                    lost.append((conversation.id, str(sample)))
                else:
                    sample["sample_index"] = torch.tensor(len(kept))
                    kept.append(sample)
                    sound.append(conversation)
            if _bytes(kept) / max(len(kept), 1) * len(self.conversations) > MEMORY_BUDGET:
                return
        self.conversations, self._kept = sound, kept
        self.unreadable += lost
        self.check_limit()

    def give_up(self, index: int, reason: str) -> None:
        """Count a sample that could not be read during training.

        Raises:
            TrainingError: more of them than the recipe allows.
        """
        entry = (self.conversations[index].id, reason)
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


def _bytes(samples: list[Sample]) -> int:
    return sum(tensor.nbytes for sample in samples for tensor in sample.values())


class Collator:
    """Pads samples on the right and joins their pictures."""

    def __init__(self, pad_token_id: int) -> None:
        self.padding = {"input_ids": pad_token_id, "labels": IGNORED}

    def __call__(self, made: Sequence[Sample | Lost]) -> dict[str, Any]:
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

    def _joined(self, samples: list[Sample]) -> dict[str, Tensor]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        longest = max(lengths)
        batch = {
            name: self._pad(samples, name, longest) for name in ("input_ids", "labels")
        }  # [batch, length]
        places = torch.arange(longest)
        batch["attention_mask"] = (places < torch.tensor(lengths).unsqueeze(1)).long()
        batch["sample_index"] = torch.stack([sample["sample_index"] for sample in samples])
        names = {name for sample in samples for name in sample} - batch.keys()
        for name in sorted(names):
            if name in PER_TOKEN:
                batch[name] = self._pad(samples, name, longest)
            else:
                batch[name] = joined([sample[name] for sample in samples if name in sample])
        return batch

    def _pad(self, samples: list[Sample], name: str, longest: int) -> Tensor:
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
