"""Training data as a student will see it: forms, counts, and samples with what is learnt marked."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median
from typing import Any

from kd_bench.distill.chat import use_template
from kd_bench.distill.data import read_conversations
from kd_bench.distill.encoding import IGNORED, EncodedSample, Encoder
from kd_bench.distill.forms import Conversation
from kd_bench.distill.images import Unreadable
from kd_bench.distill.models import load_processor
from kd_bench.distill.recipe import DataSource
from kd_bench.world.build import resolve

AT_A_TIME = 64  # conversations encoded at a time


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
        pictured = self.conversations - self.text_only
        yield (
            f"{self.conversations:,} conversations with {self.answers:,} answers; {pictured:,} "
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
) -> DataPreview:
    """Read a data source and encode its first conversations for a student.

    Args:
        student: a checkpoint; only its processor is loaded.
        samples: how many are shown.
        encoded: conversations that are encoded; None for all.

    Raises:
        UsageError: data, checkpoint or template cannot be used.
    """
    processor = load_processor(resolve(student) if student.startswith("embedded:") else student)
    if prompt_template is not None:
        use_template(processor, prompt_template)
    encoder = Encoder(processor, max_length, max_pixels=source.max_image_pixels)
    found, broken = read_conversations(source)
    preview = _counted(found)
    preview.unreadable = list(broken)
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


def _counted(conversations: Sequence[Conversation]) -> DataPreview:
    return DataPreview(
        forms=Counter(each.form for each in conversations),
        conversations=len(conversations),
        images=sum(len(each.images) for each in conversations),
        text_only=sum(not each.images for each in conversations),
        answers=sum(turn.role == "assistant" for each in conversations for turn in each.turns),
    )


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
