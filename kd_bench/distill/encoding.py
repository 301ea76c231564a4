"""Conversations -> token ids with every prompt masked -> padded batches in a fixed order.

Only answers are supervised, each with the token that ends it: every other label is -100. The order
of samples is a function of seed and epoch alone, so a resumed run meets the same batches, and of
the whole batch size rather than of the number of devices.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median
from typing import Any, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from kd_bench.distill.chat import ChatFormat, Turns, use_template
from kd_bench.distill.conversations import WINDOW, Conversations, Stream, indexed
from kd_bench.distill.data import Conversation, Unreadable, open_image
from kd_bench.distill.models import load_processor
from kd_bench.distill.recipe import MAX_PIXELS, DataSource
from kd_bench.distill.vision_language import TEACHERS, entries_of, find_places, has_images
from kd_bench.errors import KdBenchError, TrainingError, UsageError, one_line

IGNORED = -100
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")  # what processors give beside `input_ids`
NO_LIMIT = 1 << 30  # tokens
LED_BY = 3  # tokens before an answer by which it is found again among expanded images
AT_A_TIME = 64  # conversations encoded at a time
MEMORY_BUDGET = 2 << 30  # bytes of encoded samples that are kept in memory
SHOWN = 20  # unreadable samples that a message lists

EncodedSample = dict[str, Tensor]
T = TypeVar("T")


class Encoder:
    """Turns conversations into the tensors of samples.

    Args:
        processor: the student's; its chat template writes the prompt.
        max_length: tokens kept; an answer cut off entirely makes the sample unreadable.
        max_pixels: larger images are not decoded.
    """

    def __init__(
        self, processor: Any, max_length: int = 2048, *, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.processor = processor
        self.chat = ChatFormat(processor)
        self.max_length = max_length
        self.max_pixels = max_pixels
        self.image_token_ids = _image_token_ids(processor)
        self.left_out = 0  # answers that are context only, see `Turns`
        self.images_left_out = 0  # of turns behind the last answer that is learnt
        # One row of pixels an image, so that many samples can go through in one call.
        self.plain_images = type(processor).__name__ == "LlavaProcessor"

    def encode(self, conversation: Conversation) -> EncodedSample:
        """`input_ids`, `labels` [length], and whatever the processor makes of the images.

        Raises:
            Unreadable: the sample cannot be used, whatever the reason.
        """
        made = self.encode_many([conversation])[0]
        if isinstance(made, Unreadable):
            raise made
        return made

    def encode_many(
        self, conversations: Sequence[Conversation]
    ) -> list[EncodedSample | Unreadable]:
        """One sample, or the reason why there is none, for each conversation."""
        drafts = [_attempt(self._draft, conversation) for conversation in conversations]
        drafts = _together(self._tokenise, drafts)
        drafts = _together(self._process, drafts, at_once=self.plain_images)
        return [
            draft if isinstance(draft, Unreadable) else _attempt(self._sample, draft)
            for draft in drafts
        ]

    def _draft(self, conversation: Conversation) -> "_Draft":
        turns = self.chat.turns(conversation.messages)
        if self.chat.plain and not turns.images:
            raise Unreadable("this family answers no question without an image")
        shown = conversation.images[: turns.images]
        if len(shown) != turns.images:
            raise Unreadable(f"{turns.images} places for {len(shown)} images")
        images = [open_image(image, self.max_pixels) for image in shown]
        return _Draft(turns, images, len(conversation.images) - len(shown))

    def _tokenise(self, drafts: "Sequence[_Draft]") -> None:
        """Ids of answers and of what stands between them."""
        chat = self.chat
        chat.answer_ids([text for each in drafts for text in each.turns.answers])
        for draft in drafts:
            draft.turns = chat.settled(draft.turns)
        answers = iter(chat.answer_ids([text for each in drafts for text in each.turns.answers]))
        between = iter(chat.between_ids([text for each in drafts for text in each.turns.between]))
        for draft in drafts:
            draft.answers = [next(answers) + chat.stop_ids for _ in draft.turns.answers]
            draft.between = [next(between) for _ in draft.turns.between]

    def _process(self, drafts: "Sequence[_Draft]") -> None:
        """Ids of prompts and tensors of images by the processor's own call, as evaluation makes it.

        Where later questions bring images of their own, the prompt is that of the last of them.
        """
        chat = self.chat
        text_only = [draft for draft in drafts if not draft.images]
        prompts = chat.prompt_ids([draft.turns.prompt for draft in text_only])
        for draft, ids in zip(text_only, prompts, strict=True):
            draft.prompt = ids
        drafts = [draft for draft in drafts if draft.images]
        if not drafts:
            return
        texts = []
        for draft in drafts:
            turns, text = draft.turns, draft.turns.prompt
            shown = [i + 1 for i, each in enumerate(turns.between) if chat.image_token in each]
            draft.inside = shown[-1] if shown else 0
            for answer, following in zip(
                turns.answers[: draft.inside], turns.between, strict=False
            ):
                text += answer + chat.stop + following
            texts.append(text)
        several = {"padding": True} if len(drafts) > 1 else {}
        made = dict(chat.processed(texts, [draft.images for draft in drafts], **several))
        input_ids = made.pop("input_ids")  # [drafts, length]
        masks = made.pop("attention_mask", torch.ones_like(input_ids)).bool()
        kinds = {name: made.pop(name) for name in PER_TOKEN if name in made}
        if several:
            pixels = made["pixel_values"].split([len(draft.images) for draft in drafts])
        for number, (draft, mask) in enumerate(zip(drafts, masks, strict=True)):
            draft.prompt = input_ids[number][mask].tolist()
            draft.tensors = {"pixel_values": pixels[number].clone()} if several else made
            draft.tensors |= {name: each[number][mask] for name, each in kinds.items()}

    def _sample(self, draft: "_Draft") -> EncodedSample:
        """Ids, labels and image tensors of one draft, of at most `max_length` tokens."""
        answers = self._answers_inside(draft)
        ids = list(draft.prompt)
        following = [*draft.between[draft.inside :], []]  # nothing behind the last answer
        for answer, between in zip(draft.answers[draft.inside :], following, strict=True):
            ids += answer + between
            answers += [True] * len(answer) + [False] * len(between)
        tensors = dict(draft.tensors)
        for name in tensors.keys() & set(PER_TOKEN):
            # PaliGemma's are 1 where attention is causal: in its answer.
            rest = len(ids) - len(draft.prompt)
            kind = tensors[name].new_full((rest,), int(self.chat.plain))
            tensors[name] = torch.cat([tensors[name], kind])[: self.max_length]
        if any(token in self.image_token_ids for token in ids[self.max_length :]):
            raise Unreadable(f"an image lies beyond max_length={self.max_length}")
        input_ids = torch.tensor(ids[: self.max_length])
        labels = torch.where(torch.tensor(answers[: self.max_length]), input_ids, IGNORED)
        labels[0] = IGNORED  # nothing comes before it to predict it from
        if not bool((labels != IGNORED).any()):
            raise Unreadable(f"no answer within max_length={self.max_length}")
        self.left_out += draft.turns.left_out
        self.images_left_out += draft.images_left_out
        return {"input_ids": input_ids, "labels": labels, **tensors}

    def _answers_inside(self, draft: "_Draft") -> list[bool]:
        """Where a draft's first answers lie inside its prompt, between the expanded images."""
        mask = [False] * len(draft.prompt)
        place = 0
        for number in range(draft.inside):
            before = draft.between[number - 1] if number else None
            if before is None:
                (before,) = self.chat.prompt_ids([draft.turns.prompt])
            led_by, answer = before[-LED_BY:], draft.answers[number]
            sought = led_by + answer
            starts = range(place, len(draft.prompt) - len(sought) + 1)
            found = (i for i in starts if draft.prompt[i : i + len(sought)] == sought)
            if (at := next(found, None)) is None:
                raise Unreadable("an answer is not found again among the images")
            start = at + len(led_by)
            place = start + len(answer)
            mask[start:place] = [True] * len(answer)
        return mask


class PairEncoder(Encoder):
    """Samples for a student and a teacher whose processors make other images of one.

    A sample holds the teacher's tensors beside the student's, as `teacher.<name>`. The text is the
    student's in both, so answers are the same ids; prompts may differ in their image tokens.

    Args:
        teacher_processor: expands and prepares the teacher's images.
        options: as `Encoder` takes them.
    """

    def __init__(self, processor: Any, teacher_processor: Any, *given: Any, **options: Any) -> None:
        super().__init__(processor, *given, **options)
        teacher_processor = copy.copy(teacher_processor)
        mark = str(getattr(teacher_processor, "image_token", None) or self.chat.image_token)
        template = self.chat.template
        teacher_processor.chat_template = template and template.replace(self.chat.image_token, mark)
        self.teacher = Encoder(teacher_processor, NO_LIMIT, max_pixels=self.max_pixels)

    def encode_many(
        self, conversations: Sequence[Conversation]
    ) -> list[EncodedSample | Unreadable]:
        """One sample of both sides, or the reason why there is none, for each conversation."""
        pairs = zip(
            super().encode_many(conversations),
            self.teacher.encode_many(conversations),
            strict=True,
        )
        return [self._paired(ours, theirs) for ours, theirs in pairs]

    def _paired(
        self, ours: EncodedSample | Unreadable, theirs: EncodedSample | Unreadable
    ) -> EncodedSample | Unreadable:
        if isinstance(ours, Unreadable):
            return ours
        if isinstance(theirs, Unreadable):
            return Unreadable(f"for the teacher: {theirs}")
        answered = ours["labels"][ours["labels"] != IGNORED]
        places = (theirs["labels"] != IGNORED).nonzero()[: len(answered), 0]
        if not torch.equal(theirs["input_ids"][places], answered):
            return Unreadable("the teacher's processor writes its answers otherwise")
        end = int(places[-1]) + 1  # the student's `max_length` may have cut answers off
        for name in theirs.keys() & {"input_ids", "labels", *PER_TOKEN}:
            theirs[name] = theirs[name][:end]
        return {**ours, **{f"{TEACHERS}{name}": value for name, value in theirs.items()}}


@dataclass
class _Draft:
    """One conversation on its way to a sample.

    Attributes:
        images_left_out: images of the conversation that no learnt answer follows.
        answers: ids of each answer with its stop token.
        between: ids from behind each stop token to where the next answer begins.
        prompt: ids up to the first answer behind the last image, images expanded.
        inside: how many answers that prompt holds.
        tensors: what else the processor made of it.
    """

    turns: Turns
    images: list[Image]
    images_left_out: int
    answers: list[list[int]] = field(default_factory=list)
    between: list[list[int]] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    inside: int = 0
    tensors: EncodedSample = field(default_factory=dict)


def _together(
    step: Callable[[Sequence[_Draft]], None],
    drafts: Sequence[_Draft | Unreadable],
    at_once: bool = True,
) -> list[_Draft | Unreadable]:
    """Take a step with all drafts at once; where that fails, one by one, to know whose fault."""
    sound = [draft for draft in drafts if isinstance(draft, _Draft)]
    if at_once:
        try:
            step(sound)
            return list(drafts)
        except Exception:
            pass
    failed = {id(draft): _attempt(step, [draft]) for draft in sound}
    return [failed.get(id(draft)) or draft for draft in drafts]


def _attempt(make: Callable[..., T], *given: Any) -> T | Unreadable:
    """What `make` gives, or why this one sample cannot be used."""
    try:
        return make(*given)
    except Unreadable as error:
        return error
    except KdBenchError:
        raise
    except Exception as error:  # processors, templates and tokenizers raise what they like
        return Unreadable(f"{type(error).__name__}: {one_line(error)}"[:500])


def _image_token_ids(processor: Any) -> frozenset[int]:
    """Ids that stand for an image: the placeholder's, and that which it is expanded to."""
    tokenizer = processor.tokenizer
    found = {getattr(owner, "image_token_id", None) for owner in (processor, tokenizer)}
    token = getattr(processor, "image_token", None) or "<image>"
    found.add(tokenizer.convert_tokens_to_ids(token))
    return frozenset(int(each) for each in found if each is not None)


@dataclass(frozen=True)
class UnreadableSample:
    """A sample that could not be read when its batch was made."""

    index: int
    reason: str


class ConversationDataset(Dataset[EncodedSample | UnreadableSample]):
    """Encoded samples, made when asked for; `prepare` makes and keeps them all.

    Args:
        unreadable: samples already given up when the file was read.
        unreadable_limit: how many samples in all may be given up.
    """

    def __init__(
        self,
        conversations: Conversations | Stream,
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

    def __getitem__(self, index: int) -> EncodedSample | UnreadableSample:
        if self._kept:
            return self._kept[index]
        try:
            sample = self.encoder.encode(self.conversations[index])
        except Unreadable as error:
            return UnreadableSample(index, str(error))
        sample["sample_index"] = torch.tensor(index)
        return sample

    @property
    def kept(self) -> Sequence[EncodedSample]:
        """All samples, where `prepare` keeps them in memory; else none."""
        return self._kept

    def prepare(self) -> None:
        """Encode everything now and keep it, unless it would not fit into memory.

        What cannot be read is left out of `conversations`. A stream is never kept.
        """
        if isinstance(self.conversations, Stream):
            return
        kept: list[EncodedSample] = []
        sound: list[int] = []
        lost: list[tuple[str, str]] = []
        for start in range(0, len(self), AT_A_TIME):
            group = list(self.conversations[start : start + AT_A_TIME])
            made = enumerate(self.encoder.encode_many(group), start)
            for conversation, (place, sample) in zip(group, made, strict=True):
                if isinstance(sample, Unreadable):
                    lost.append(conversation.given_up(sample))
                else:
                    sample["sample_index"] = torch.tensor(len(kept))
                    kept.append(sample)
                    sound.append(place)
            size = sum(tensor.nbytes for sample in kept for tensor in sample.values())
            if size / max(len(kept), 1) * len(self) > MEMORY_BUDGET:
                return
        self.conversations, self._kept = self.conversations.select(sound), kept
        self.left_out = self.encoder.left_out
        self.unreadable += lost
        self.check_limit()

    def give_up(self, index: int, reason: str) -> None:
        """Count a sample that could not be read during training.

        Raises:
            TrainingError: more of them than the recipe allows.
        """
        entry = self.conversations.given_up(index, reason)
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

    def first_with_image(self) -> EncodedSample | None:
        """The first readable sample with an image; of a stream, among its first window."""
        if isinstance(self.conversations, Stream):
            places: Iterable[int] = range(min(WINDOW, len(self)))
        else:
            places = self.conversations.images.nonzero()[0].tolist()
        samples = (self[index] for index in places)
        return next((each for each in samples if isinstance(each, dict) and has_images(each)), None)

    def lengths(self) -> Sequence[int]:
        """Tokens of each sample, or its characters while it is not encoded: for grouping only."""
        if self._kept:
            return [len(sample["input_ids"]) for sample in self._kept]
        assert isinstance(self.conversations, Conversations)  # a stream is not grouped
        return self.conversations.characters.tolist()


class Collator:
    """Pads samples on the right, joins their images, and finds where answers and images lie.

    Args:
        image_token_ids: the student's and the teacher's.
    """

    def __init__(self, pad_token_id: int, image_token_ids: tuple[int, int] = (-1, -1)) -> None:
        self.padding = {"input_ids": pad_token_id, "labels": IGNORED}
        self.image_token_ids = image_token_ids

    def __call__(self, made: Sequence[EncodedSample | UnreadableSample]) -> dict[str, Any]:
        """One batch, with the indices and reasons of samples that are unreadable."""
        samples = [sample for sample in made if isinstance(sample, dict)]
        lost = [(each.index, each.reason) for each in made if isinstance(each, UnreadableSample)]
        if not samples:  # nothing to learn, but every device has to take its step
            alone = torch.tensor([self.padding["input_ids"]])
            labels = torch.full_like(alone, IGNORED)
            samples = [{"input_ids": alone, "labels": labels, "sample_index": torch.tensor(-1)}]
        batch: dict[str, Any] = self._side(samples, "")
        batch["sample_index"] = torch.stack([sample["sample_index"] for sample in samples])
        if any(name.startswith(TEACHERS) for sample in samples for name in sample):
            batch |= self._side(samples, TEACHERS)
        return {**batch, "unreadable": lost} if lost else batch

    def _side(self, samples: list[EncodedSample], prefix: str) -> dict[str, Any]:
        """The student's tensors, or those whose names begin with the teacher's prefix."""
        sides = [
            {
                name.removeprefix(prefix): tensor
                for name, tensor in sample.items()
                if name.startswith(TEACHERS) == bool(prefix)
            }
            for sample in samples
        ]
        ones = [torch.ones_like(side["input_ids"]) for side in sides]
        # [batch, length]
        batch: dict[str, Any] = {f"{prefix}attention_mask": pad_sequence(ones, batch_first=True)}
        for name in sorted({name for side in sides for name in side} - {"sample_index"}):
            if name in (*self.padding, *PER_TOKEN):
                rows = [s[name] if name in s else torch.zeros_like(s["input_ids"]) for s in sides]
                filler = self.padding.get(name, 0)
                batch[prefix + name] = pad_sequence(rows, batch_first=True, padding_value=filler)
            else:
                whole = joined([side[name] for side in sides if name in side])
                # Sizes are read by the host, once an image.
                batch[prefix + name] = whole.tolist() if name == "image_sizes" else whole
        if (image := self.image_token_ids[bool(prefix)]) >= 0:
            places = find_places({n.removeprefix(prefix): v for n, v in batch.items()}, image)
            batch |= {f"{prefix}{name}": each for name, each in entries_of(places).items()}
        return batch


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
    micro-batches share them. Text-only samples are batched together where their number
    allows, so that those batches never reach the vision tower; what is left over mixes. Samples
    beyond the last whole batch wait for another epoch.

    Args:
        micro_batch: samples of one device at a time; divides `batch_size`.
    """

    drop_last = True

    def __init__(
        self,
        dataset: ConversationDataset,
        batch_size: int,
        micro_batch: int,
        seed: int,
        group_by_length: bool = False,
    ) -> None:
        self.count = dataset.conversations.epoch_size
        if self.count < batch_size:
            raise UsageError(
                f"The data holds {self.count} usable samples, fewer than one batch of "
                f"{batch_size}.",
                "Lower batch_size, or give more data.",
            )
        self.dataset = dataset
        self.whole = batch_size
        self.batch_size = micro_batch
        self.seed = seed
        self.group_by_length = group_by_length
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps * (self.whole // self.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of one epoch."""
        return self.count // self.whole

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
        conversations = self.dataset.conversations
        if isinstance(conversations, Stream):
            return self._within_windows(generator)
        places = conversations.epoch(epoch, self.seed)
        order = places[torch.randperm(len(places), generator=generator).numpy()].tolist()
        order = order[: len(order) // self.whole * self.whole]
        if self.group_by_length:
            # Sorted inside windows of 16 batches: less padding, still mostly random.
            window = 16 * self.whole
            parts = (order[start : start + window] for start in range(0, len(order), window))
            length = self.dataset.lengths().__getitem__
            order = [i for part in parts for i in sorted(part, key=length, reverse=True)]
        images = conversations.images
        with_images = [index for index in order if images[index]]
        plain = [index for index in order if not images[index]]
        whole = len(plain) // self.whole * self.whole
        # Text left over joins the images' last batch.
        rows = plain[:whole] + with_images + plain[whole:]
        batches = [rows[i : i + self.whole] for i in range(0, len(rows), self.whole)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[index] for index in shuffled]

    def _within_windows(self, generator: torch.Generator) -> list[list[int]]:
        """A stream's rows in their order, mixed within each window; images are not known before."""
        rows: list[int] = []
        for start in range(0, self.count, WINDOW):
            size = min(WINDOW, self.count - start)
            rows += (start + torch.randperm(size, generator=generator)).tolist()
        return [rows[i : i + self.whole] for i in range(0, self.steps * self.whole, self.whole)]


@dataclass(frozen=True)
class SamplePreview:
    """One sample as the model will see it.

    Attributes:
        name: its id.
        parts: texts in order, each with whether it is learnt; image tokens are counted.
        learnt: the tokens that are learnt, as the tokenizer spells them.
    """

    name: str
    parts: list[tuple[str, bool]]
    learnt: list[str]


@dataclass
class DataPreview:
    """What a student will learn from.

    Attributes:
        forms: conversations by the form of their rows.
        conversations, images, text_only, answers: counts over all rows that can be read.
        encoded: conversations that were also encoded, from the first on.
        tokens: lengths of the encoded ones.
        learnt: how many tokens of each are learnt.
        left_out: answers of them that are context only, see `chat.Turns`.
        images_left_out: images of them that no learnt answer follows.
        unreadable: (id, reason), of reading and of encoding.
    """

    forms: Counter[str] = field(default_factory=Counter)
    conversations: int = 0
    images: int = 0
    text_only: int = 0
    answers: int = 0
    encoded: int = 0
    tokens: list[int] = field(default_factory=list)
    learnt: list[int] = field(default_factory=list)
    left_out: int = 0
    images_left_out: int = 0
    samples: list[SamplePreview] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The counts, a line each."""
        forms = ", ".join(f"{name} ({count:,})" for name, count in self.forms.items()) or "none"
        yield f"form: {forms}"
        with_images = self.conversations - self.text_only
        yield (
            f"{self.conversations:,} conversations with {self.answers:,} answers; {with_images:,} "
            f"with {self.images:,} images, {self.text_only:,} text only"
        )
        if self.tokens:
            yield (
                f"the first {self.encoded:,} encoded: {min(self.tokens):,} to "
                f"{max(self.tokens):,} tokens, median {median(self.tokens):,.0f}; "
                f"{sum(self.learnt):,} of {sum(self.tokens):,} tokens are learnt"
            )
        if self.left_out:
            yield f"{self.left_out:,} earlier answers are context only"
        if self.images_left_out:
            yield f"{self.images_left_out:,} images that no learnt answer follows are left out"


def preview_data(
    source: DataSource,
    student: str,
    *,
    samples: int = 3,
    encoded: int | None = 200,
    max_length: int = 2048,
    prompt_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> DataPreview:
    """Read a data source and encode its first conversations for a student.

    Args:
        student: a checkpoint; only its processor is loaded.
        samples: how many are shown.
        encoded: conversations that are encoded; None for all.

    Raises:
        UsageError: data, checkpoint or template cannot be used.
    """
    processor = load_processor(student)
    use_template(processor, prompt_template, chat_template_kwargs)
    encoder = Encoder(processor, max_length, max_pixels=source.max_image_pixels)
    found, broken = indexed(source)
    preview = DataPreview(
        forms=Counter(found.column("form").to_pylist()),
        conversations=len(found),
        images=int(found.images.sum()),
        text_only=int((found.images == 0).sum()),
        answers=sum(found.column("answers").to_pylist()),
        unreadable=list(broken),
    )
    chosen = found[: max(samples, len(found) if encoded is None else encoded)]
    for start in range(0, len(chosen), AT_A_TIME):
        group = chosen[start : start + AT_A_TIME]
        for conversation, sample in zip(group, encoder.encode_many(group), strict=True):
            preview.encoded += 1
            if isinstance(sample, Unreadable):
                preview.unreadable.append(conversation.given_up(sample))
                continue
            preview.tokens.append(len(sample["input_ids"]))
            preview.learnt.append(int((sample["labels"] != IGNORED).sum()))
            if len(preview.samples) < samples:
                preview.samples.append(_shown(encoder, conversation.id, sample))
    preview.left_out, preview.images_left_out = encoder.left_out, encoder.images_left_out
    return preview


def _shown(encoder: Encoder, name: str, sample: EncodedSample) -> SamplePreview:
    tokenizer: Any = encoder.processor.tokenizer
    ids = sample["input_ids"].tolist()
    learnt = (sample["labels"] != IGNORED).tolist()
    parts: list[tuple[str, bool]] = []

    def kind(pair: tuple[int, bool]) -> tuple[bool, bool]:
        return pair[1], pair[0] in encoder.image_token_ids

    for (marked, is_image), run in groupby(zip(ids, learnt, strict=True), key=kind):
        tokens = [token for token, _ in run]
        if is_image:
            parts.append((f"<image tokens: {len(tokens)}>", marked))
        else:
            parts.append((str(tokenizer.decode(tokens, skip_special_tokens=False)), marked))
    names = [tokenizer.convert_ids_to_tokens(i) for i, m in zip(ids, learnt, strict=True) if m]
    return SamplePreview(name, parts, [str(each) for each in names])
