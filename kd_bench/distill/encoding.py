"""Conversations -> token ids with every prompt masked, images in the processor's own form.

Only answers are supervised, each with the token that ends it: every other label is -100.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from kd_bench.distill.chat import ChatFormat, Turns
from kd_bench.distill.forms import Conversation
from kd_bench.distill.images import MAX_PIXELS, Unreadable, open_image
from kd_bench.distill.vision_language import TEACHERS
from kd_bench.errors import KdBenchError, one_line

IGNORED = -100
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")  # what processors give beside `input_ids`
NO_LIMIT = 1 << 30  # tokens
LED_BY = 3  # tokens before an answer by which it is found again among expanded images

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
        # Images of one size and one run of image tokens each can go through in bulk.
        self.tokens_an_image: int | None = None
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
        sound = [draft for draft in drafts if isinstance(draft, _Draft)]
        untokenised = self._tokenise(sound)
        self._see_in_bulk([draft for draft in sound if id(draft) not in untokenised])
        made: list[EncodedSample | Unreadable] = []
        for draft in drafts:
            if isinstance(draft, Unreadable):
                made.append(draft)
            elif id(draft) in untokenised:
                made.append(untokenised[id(draft)])
            else:
                made.append(_attempt(self._sample, draft))
        return made

    def _draft(self, conversation: Conversation) -> "_Draft":
        turns = self.chat.turns(conversation.messages)
        if self.chat.plain and not turns.images:
            raise Unreadable("this family answers no question without an image")
        shown = conversation.images[: turns.images]
        if len(shown) != turns.images:
            raise Unreadable(f"{turns.images} places for {len(shown)} images")
        images = [open_image(image, self.max_pixels) for image in shown]
        return _Draft(turns, images, len(conversation.images) - len(shown))

    def _tokenise(self, drafts: "list[_Draft]") -> dict[int, Unreadable]:
        """Fill in the ids of all drafts at once; else one by one, and why one has none, by id."""
        try:
            self._set_ids(drafts)
            return {}
        except Exception:
            found = {id(draft): _attempt(self._set_ids, [draft]) for draft in drafts}
            return {key: why for key, why in found.items() if why is not None}

    def _set_ids(self, drafts: "list[_Draft]") -> None:
        chat = self.chat
        chat.answer_ids([text for each in drafts for text in each.turns.answers])
        for draft in drafts:
            draft.turns = chat.settled(draft.turns)
        prompts = chat.prompt_ids([draft.turns.prompt for draft in drafts])
        answers = iter(chat.answer_ids([text for each in drafts for text in each.turns.answers]))
        between = iter(chat.between_ids([text for each in drafts for text in each.turns.between]))
        for draft, prompt in zip(drafts, prompts, strict=True):
            draft.prompt = prompt
            draft.answers = [next(answers) + chat.stop_ids for _ in draft.turns.answers]
            draft.between = [next(between) for _ in draft.turns.between]

    def _see_in_bulk(self, drafts: "list[_Draft]") -> None:
        """`pixel_values` of every draft from one call, where images have a constant size."""
        if not self.plain_images or self.tokens_an_image is None:
            return
        flat = [image for draft in drafts for image in draft.images]
        if not flat:
            return
        try:
            made = self.processor.image_processor(images=flat, return_tensors="pt")["pixel_values"]
        except Exception:
            return  # one by one it will be known whose image it was
        parts = made.split([len(draft.images) for draft in drafts])
        for draft, part in zip(drafts, parts, strict=True):
            draft.pixels = part.clone() if draft.images else None

    def _sample(self, draft: "_Draft") -> EncodedSample:
        """Ids, labels and image tensors of one draft."""
        if draft.images and draft.pixels is None:
            sample = self._cut(*self._processed(draft))
        else:
            ids, mask = draft.behind(0)
            marks = sum(token in self.image_token_ids for token in draft.prompt + ids)
            if marks != len(draft.images):
                raise Unreadable(f"{marks} image tokens for {len(draft.images)} images")
            extra = {} if draft.pixels is None else {"pixel_values": draft.pixels}
            sample = self._cut(
                *self._expanded(draft.prompt + ids, [False] * len(draft.prompt) + mask), extra
            )
        self.left_out += draft.turns.left_out
        self.images_left_out += draft.images_left_out
        return sample

    def _processed(self, draft: "_Draft") -> tuple[list[int], list[bool], EncodedSample]:
        """Ids and mask behind the processor's own call on the prompt, as evaluation makes it.

        Where later questions bring images of their own, the prompt is that of the last of them, and
        the answers inside are found again between the expanded images.
        """
        turns = draft.turns
        shown = [i + 1 for i, text in enumerate(turns.between) if self.chat.image_token in text]
        inside = shown[-1] if shown else 0  # answers in front of the last image
        text = turns.prompt
        for answer, following in zip(turns.answers[:inside], turns.between, strict=False):
            text += answer + self.chat.stop + following
        made = dict(self.chat.processed([text], [draft.images]))
        prompt = made.pop("input_ids")[0].tolist()
        made.pop("attention_mask", None)
        mask = self._found_again(prompt, draft, inside)
        if self.plain_images and self.tokens_an_image is None:
            self._learn_size(prompt, draft, inside)
        ids, answers = draft.behind(inside)
        for name in PER_TOKEN:
            if name in made:
                # PaliGemma's are 1 where attention is causal: in its answer.
                kind = made[name].new_full((1, len(ids)), int(self.chat.plain))
                made[name] = torch.cat([made[name], kind], dim=1)
        return prompt + ids, mask + answers, made

    def _found_again(self, prompt: list[int], draft: "_Draft", count: int) -> list[bool]:
        """Where the first `count` answers of a draft lie inside its expanded prompt."""
        mask = [False] * len(prompt)
        place = 0
        for number in range(count):
            led_by = (draft.prompt, *draft.between)[number][-LED_BY:]
            answer = draft.answers[number]
            start = _find(prompt, led_by + answer, place) + len(led_by)
            place = start + len(answer)
            mask[start:place] = [True] * len(answer)
        return mask

    def _learn_size(self, prompt: list[int], draft: "_Draft", inside: int) -> None:
        """Take the quick way from now on, if it reproduces the processor's ids."""
        self.tokens_an_image, rest = divmod(
            sum(token in self.image_token_ids for token in prompt), len(draft.images)
        )
        ids = draft.prompt + draft.behind(0)[0]
        ids = ids[: len(ids) - len(draft.behind(inside)[0])]
        self.plain_images = not rest and self._expanded(ids, [False] * len(ids))[0] == prompt

    def _expanded(self, ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
        """Every image placeholder repeated `tokens_an_image` times."""
        count = self.tokens_an_image or 1
        full: list[int] = []
        answers: list[bool] = []
        for token, answer in zip(ids, mask, strict=True):
            times = count if token in self.image_token_ids else 1
            full += [token] * times
            answers += [answer] * times
        return full, answers

    def _cut(self, ids: list[int], answers: list[bool], extra: EncodedSample) -> EncodedSample:
        """The sample of at most `max_length` tokens."""
        if len(ids) > self.max_length:
            if any(token in self.image_token_ids for token in ids[self.max_length :]):
                raise Unreadable(f"an image lies beyond max_length={self.max_length}")
            ids, answers = ids[: self.max_length], answers[: self.max_length]
        input_ids = torch.tensor(ids)
        labels = torch.where(torch.tensor(answers), input_ids, IGNORED)
        labels[0] = IGNORED  # nothing comes before it to predict it from
        if not bool((labels != IGNORED).any()):
            raise Unreadable(f"no answer within max_length={self.max_length}")
        for name in PER_TOKEN:
            if name in extra:
                extra[name] = extra[name][0, : self.max_length]
        return {"input_ids": input_ids, "labels": labels, **extra}


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
        for name in ("input_ids", "labels", *PER_TOKEN):
            if name in theirs:
                theirs[name] = theirs[name][:end]
        return {**ours, **{f"{TEACHERS}{name}": value for name, value in theirs.items()}}


@dataclass
class _Draft:
    """One conversation on its way to a sample.

    Attributes:
        images_left_out: images of the conversation that no learnt answer follows.
        prompt: ids up to the first answer, images' marks not expanded.
        answers: ids of each answer with its stop token.
        between: ids from behind each stop token to where the next answer begins.
        pixels: of all images, where they went through in bulk.
    """

    turns: Turns
    images: list[Image]
    images_left_out: int = 0
    prompt: list[int] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    between: list[list[int]] = field(default_factory=list)
    pixels: Tensor | None = None

    def behind(self, number: int) -> tuple[list[int], list[bool]]:
        """Everything from answer `number` on, and whether it is an answer's."""
        ids: list[int] = []
        mask: list[bool] = []
        behind = [*self.between[number:], []]  # nothing behind the last answer
        for answer, following in zip(self.answers[number:], behind, strict=True):
            ids += answer + following
            mask += [True] * len(answer) + [False] * len(following)
        return ids, mask


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


def _find(ids: list[int], wanted: list[int], start: int) -> int:
    for index in range(start, len(ids) - len(wanted) + 1):
        if ids[index] == wanted[0] and ids[index : index + len(wanted)] == wanted:
            return index
    raise Unreadable("an answer is not found again among the images")
