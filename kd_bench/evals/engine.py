"""Answer many questions with one model: group by picture, batch, encode each picture once."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_bench.distill.pathways import pathway_for
from kd_bench.errors import one_line
from kd_bench.evals.generate import Decoded, Decoder, Row
from kd_bench.evals.pictures import PictureStore, Prepared
from kd_bench.evals.prompts import PromptBuilder
from kd_bench.evals.questions import Answer, Question, Settings

__all__ = ["DEFAULT_BATCH", "Engine", "plan_batches"]

DEFAULT_BATCH = 64


@dataclass(frozen=True)
class _Ready:
    """A question whose pictures are decoded and whose prompt is rendered."""

    question: Question
    pictures: list[Prepared]
    prompt: str


class Engine:
    """Greedy answers of one vision-language model.

    Args:
        model: a transformers model that `pathway_for` knows.
        processor: its processor.
        batch_size: questions at a time; None for the default.
        share: prefill what the questions of a picture have in common once.
        pictures: store of prepared pictures, when several engines work on the same documents.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        batch_size: int | None = None,
        share: bool = True,
        pictures: PictureStore | None = None,
    ) -> None:
        self.model = model
        self.batch_size = batch_size or DEFAULT_BATCH
        self.share = share
        self._pathway = pathway_for(model)
        self._processor = processor
        self._prompts = PromptBuilder(processor)
        self._pictures = pictures or PictureStore()
        self._features = _FeatureCache()
        self._embed = model.get_input_embeddings()
        self.device = next(model.parameters()).device
        self._decoder = Decoder(
            self._pathway.language_model,
            self._pathway.lm_head,
            self._embed,
            processor.tokenizer,
            _end_ids(model, processor.tokenizer),
        )

    def answers(self, questions: Sequence[Question]) -> Iterator[list[Answer]]:
        """Answers batch by batch, in the order that is quickest.

        An exception inside a batch is retried question by question; one that stays becomes an
        answer with the status `error`.
        """
        limit = self.batch_size
        for settings, planned in plan_batches(questions, limit):
            pending = [planned]
            while pending:
                batch = pending.pop(0)
                ready, failed = self._ready(batch)
                if failed:
                    yield failed
                if not ready:
                    continue
                try:
                    yield self._batch(ready, settings)
                except Exception as error:
                    if len(ready) == 1:
                        yield [_failure(ready[0].question, error, ready[0].pictures)]
                        continue
                    _free(error)
                    half = (len(ready) + 1) // 2
                    asked = [item.question for item in ready]
                    pending = [asked[:half], asked[half:], *pending]

    def _ready(self, batch: Sequence[Question]) -> tuple[list[_Ready], list[Answer]]:
        ready, failed = [], []
        for question in batch:
            try:
                pictures = self._pictures.get(
                    question.picture_key, question.pictures, self._processor.image_processor
                )
                prompt = self._prompts.render(question.text, len(pictures))
            except Exception as error:
                failed.append(_failure(question, error, []))
                continue
            ready.append(_Ready(question, pictures, prompt))
        return ready, failed

    def _batch(self, ready: Sequence[_Ready], settings: Settings) -> list[Answer]:
        with torch.inference_mode():
            rows = self._rows(ready)
        decoded = self._decoder.decode(rows, settings, self.share)
        return [
            self._answer(item, result, settings)
            for item, result in zip(ready, decoded, strict=True)
        ]

    def _rows(self, ready: Sequence[_Ready]) -> list[Row]:
        features = self._encode([picture for item in ready for picture in item.pictures])
        counts = [[len(features[p.digest]) for p in item.pictures] for item in ready]
        ids = self._prompts.encode([item.prompt for item in ready], counts)
        image_id = self._pathway.image_token_id
        rows = []
        for item, tokens in zip(ready, ids, strict=True):
            tensor = torch.tensor(tokens, device=self.device)
            places = tensor == image_id
            # A placeholder may lie outside the embedding table; its row is overwritten.
            embeddings = self._embed(tensor.masked_fill(places, 0))  # [length, hidden]
            prefix, key = 0, ""
            if item.pictures:
                joined = torch.cat([features[picture.digest] for picture in item.pictures])
                embeddings[places] = joined.to(embeddings.dtype)
                prefix = int(places.nonzero()[-1]) + 1
                key = f"{[p.digest for p in item.pictures]}{tokens[:prefix]}"
            rows.append(Row(tokens, embeddings, prefix, key))
        return rows

    def _encode(self, pictures: Sequence[Prepared]) -> dict[str, Tensor]:
        """Image embeddings [image tokens, hidden] by picture digest."""
        wanted = {picture.digest: picture for picture in pictures}
        found = {key: self._features[key] for key in wanted if key in self._features}
        fresh = [picture for key, picture in wanted.items() if key not in found]
        if fresh:
            inputs = {"pixel_values": torch.stack([p.pixels for p in fresh]).to(self.device)}
            projected = self._pathway.project(self._pathway.encode_image(inputs), inputs)
            assert isinstance(projected, Tensor)
            for picture, embedding in zip(fresh, projected, strict=True):
                found[picture.digest] = self._features[picture.digest] = embedding
        return found

    def _answer(self, item: _Ready, result: Decoded, settings: Settings) -> Answer:
        text = self._processor.tokenizer.decode(result.tokens, skip_special_tokens=True)
        for stop in settings.until:
            text = text.split(stop)[0] if stop else text
        text = text.strip()
        status = "truncated" if not result.finished else "ok" if text else "empty"
        return Answer(
            index=item.question.index,
            text=text,
            status=status,  # type: ignore[arg-type]
            tokens=len(result.tokens),
            confidence=round(result.confidence, 4),
            image_digest=item.pictures[0].digest if item.pictures else "",
        )


class _FeatureCache(OrderedDict[str, Tensor]):
    """Image embeddings by picture digest, least recently used first, bounded in bytes."""

    def __init__(self, limit_bytes: int = 256 << 20) -> None:
        super().__init__()
        self._limit = limit_bytes
        self._size = 0

    def __getitem__(self, key: str) -> Tensor:
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Tensor) -> None:
        super().__setitem__(key, value)
        self._size += value.numel() * value.element_size()
        while self._size > self._limit and len(self) > 1:
            _, dropped = self.popitem(last=False)
            self._size -= dropped.numel() * dropped.element_size()


def plan_batches(
    questions: Sequence[Question], limit: int
) -> Iterator[tuple[Settings, list[Question]]]:
    """Questions in batches of equal settings, near in length, a picture's questions together."""
    groups: dict[tuple[Settings, str], list[Question]] = {}
    for question in questions:
        key = question.picture_key or f"alone {question.index}"
        groups.setdefault((question.settings, key), []).append(question)
    pieces: list[tuple[Settings, list[Question]]] = []
    for (settings, _), group in groups.items():
        group.sort(key=lambda question: len(question.text))
        starts = range(0, len(group), limit)
        pieces += [(settings, group[start : start + limit]) for start in starts]
    # Longest first: a batch that does not fit into memory shows itself at once.
    pieces.sort(key=lambda piece: (piece[0], -max(len(q.text) for q in piece[1])))
    batch: list[Question] = []
    current: Settings | None = None
    for settings, group in pieces:
        if batch and (settings != current or len(batch) + len(group) > limit):
            assert current is not None
            yield current, batch
            batch = []
        current = settings
        batch = [*batch, *group]
    if batch and current is not None:
        yield current, batch


def _failure(question: Question, error: Exception, pictures: Sequence[Prepared]) -> Answer:
    text = f"{type(error).__name__}: {one_line(error)}"
    digest = pictures[0].digest if pictures else ""
    return Answer(question.index, "", "error", image_digest=digest, error=text[:500])


def _free(error: Exception) -> None:
    """Let go of what a failed batch still holds before half of it is tried again."""
    error.__traceback__ = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer, from the generation settings and the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None})
