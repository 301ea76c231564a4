"""Conversations -> token ids with every prompt masked, pictures in the processor's own form.

Only answers are supervised: every label outside an assistant turn is -100, the turn's end token is
kept.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from kd_bench.distill.data import Conversation, Unreadable, open_image
from kd_bench.errors import UsageError

__all__ = ["IGNORED", "PER_TOKEN", "EncodedSample", "Encoder", "spread_mask", "within"]

IGNORED = -100
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # an answer's mark in a chat template
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")  # what processors give beside `input_ids`

EncodedSample = dict[str, Tensor]


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

    def encode(self, conversation: Conversation) -> EncodedSample:
        """`input_ids`, `labels` [length], and whatever the processor makes of the pictures.

        Raises:
            Unreadable: a picture cannot be decoded, or no answer fits into `max_length`.
        """
        made = self.encode_many([conversation])[0]
        if isinstance(made, Unreadable):
            raise made
        return made

    def encode_many(
        self, conversations: Sequence[Conversation]
    ) -> list[EncodedSample | Unreadable]:
        """One sample, or the reason why there is none, for each conversation."""
        rendered = [self.render(conversation) for conversation in conversations]
        tokens = self._tokens([text for text, _ in rendered])
        made: list[EncodedSample | Unreadable] = []
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
    ) -> tuple[list[int], list[bool], EncodedSample]:
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

    def _sample(self, ids: list[int], answers: list[bool], extra: EncodedSample) -> EncodedSample:
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
