"""Answer many questions with one model: group by picture, batch, encode each picture once.

Three paths, by what the family allows; `path` says which one a model takes:

    prefix     one size of picture (LLaVA): quick prompts, shared prefixes
    general    any other family that takes embeddings: its own processor, shared prefixes
    generate   families that look back at the picture from the question (PaliGemma, Gemma 3) or
               that are not known: `generate` of transformers on left-padded batches
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.errors import UsageError, one_line
from kd_bench.evals.budget import MemoryBudget
from kd_bench.evals.constraints import Constraints, end_ids
from kd_bench.evals.generate import Decoded, Decoder
from kd_bench.evals.pictures import PictureStore, Prepared
from kd_bench.evals.plain import PlainDecoder
from kd_bench.evals.prompts import PromptBuilder
from kd_bench.evals.questions import Answer, Question, Settings
from kd_bench.evals.rows import FixedRows, GeneralRows, Ready, RowMaker

NOT_FINITE = "the model's logits are not finite"

ONE_SIZE = ("LlavaForConditionalGeneration",)
LOOKING_BACK = ("PaliGemmaForConditionalGeneration", "Gemma3ForConditionalGeneration")


class Engine:
    """Greedy answers of one vision-language model.

    Args:
        model: a transformers model.
        processor: its processor.
        batch_size: questions at a time; None for as many as the memory budget allows.
        share: prefill what the questions of a picture have in common once.
        pictures: store of prepared pictures, when several engines work on the same documents.
        budget_bytes: memory above the model's own that a batch may take.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        batch_size: int | None = None,
        share: bool = True,
        pictures: PictureStore | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.device = next(model.parameters()).device
        self._parts = _known(model)
        self._processor = processor
        self._prompts = PromptBuilder(processor)
        self._pictures = pictures or PictureStore()
        self.path = _path(self._parts)
        self.share = share and self.path != "generate" and not _slides(model)
        ends = end_ids(model, processor.tokenizer, self._prompts.chat.stop_ids)
        settings = getattr(model, "generation_config", None)
        self.constraints = Constraints(settings, ends, self.device)
        self._decoder: Decoder | PlainDecoder
        self._rows: RowMaker | None = None
        if self.path == "generate" or self._parts is None:
            self._decoder = PlainDecoder(model, processor, self._prompts, ends, self.constraints)
        else:
            embed = model.get_input_embeddings()
            self._rows = (
                FixedRows(self._parts, self._prompts, embed)
                if self.path == "prefix"
                else GeneralRows(self._parts, self._prompts, embed)
            )
            self._decoder = Decoder(
                self._parts.language_model,
                self._parts.lm_head,
                embed,
                processor.tokenizer,
                ends,
                self.constraints,
            )
        tokens = None if self._parts is None else self._parts.image_token_count
        self.budget = MemoryBudget(model, tokens, budget_bytes)

    def answers(self, questions: Sequence[Question]) -> Iterator[list[Answer]]:
        """Answers batch by batch, in the order that is quickest.

        A batch that fails (out of memory, or one bad question in it) is halved and tried again; an
        exception that stays with a single question becomes an answer with the status `error`.
        """
        size = self.batch_size
        limit = self.budget.rows if size is None else lambda question: size
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
                    answers = self._batch(ready, settings)
                except Exception as error:
                    if len(ready) == 1:
                        yield [_failure(ready[0].question, error, ready[0].pictures)]
                        continue
                    _free(error)
                    half = (len(ready) + 1) // 2
                    asked = [item.question for item in ready]
                    pending = [asked[:half], asked[half:], *pending]
                    continue
                yield answers

    def _ready(self, batch: Sequence[Question]) -> tuple[list[Ready], list[Answer]]:
        ready, failed = [], []
        processor = self._processor.image_processor if self.path == "prefix" else None
        for question in batch:
            try:
                pictures = self._pictures.get(question.picture_key, question.pictures, processor)
                prompt = self._prompts.render(question.text, len(pictures))
            except Exception as error:
                failed.append(_failure(question, error, []))
                continue
            ready.append(Ready(question, pictures, prompt))
        return ready, failed

    def _batch(self, ready: Sequence[Ready], settings: Settings) -> list[Answer]:
        if self._rows is None:
            assert isinstance(self._decoder, PlainDecoder)
            decoded = self._decoder.decode(ready, settings)
        else:
            assert isinstance(self._decoder, Decoder)
            with torch.inference_mode():
                rows = self._rows.rows(ready)
            decoded = self._decoder.decode(rows, settings, self.share)
        return [
            self._answer(item, result, settings)
            for item, result in zip(ready, decoded, strict=True)
        ]

    def _answer(self, item: Ready, result: Decoded, settings: Settings) -> Answer:
        if result.broken:
            return _failure(item.question, FloatingPointError(NOT_FINITE), item.pictures)
        text = self._processor.tokenizer.decode(result.tokens, skip_special_tokens=True)
        for stop in settings.until:
            text = text.split(stop)[0] if stop else text
        text = text.strip()
        status = "truncated" if not result.finished else "ok" if text else "empty"
        confidence = result.confidence
        return Answer(
            index=item.question.index,
            text=text,
            status=status,  # type: ignore[arg-type]
            tokens=len(result.tokens),
            confidence=None if confidence != confidence else round(confidence, 4),
            image_digest=item.pictures[0].digest if item.pictures else "",
        )


def _known(model: Any) -> VisionLanguageModel | None:
    try:
        return VisionLanguageModel(model)
    except UsageError:
        return None


def _path(parts: VisionLanguageModel | None) -> str:
    """Which way through the engine a family takes."""
    if parts is None or parts.architecture in LOOKING_BACK:
        return "generate"
    return "prefix" if parts.architecture in ONE_SIZE else "general"


def _slides(model: Any) -> bool:
    """Whether attention is cut to a window, in which padding behind a prefix would count."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return any("sliding" in kind for kind in kinds)


def plan_batches(
    questions: Sequence[Question], limit: Callable[[Question], int]
) -> Iterator[tuple[Settings, list[Question]]]:
    """Questions in batches of equal settings, near in length, a picture's questions together.

    Args:
        limit: rows of a batch whose longest question is the given one.
    """
    groups: dict[tuple[Settings, str], list[Question]] = {}
    for question in questions:
        key = question.picture_key or f"alone {question.index}"
        groups.setdefault((question.settings, key), []).append(question)
    pieces: list[list[Question]] = []
    for group in groups.values():
        group.sort(key=_length, reverse=True)
        size = limit(group[0])
        pieces += [group[start : start + size] for start in range(0, len(group), size)]
    # Longest first: a batch that does not fit into memory shows itself at once.
    pieces.sort(key=lambda piece: (piece[0].settings, -_length(piece[0])))
    batch: list[Question] = []
    for piece in pieces:
        full = batch and len(batch) + len(piece) > limit(batch[0])
        if batch and (full or batch[0].settings != piece[0].settings):
            yield batch[0].settings, batch
            batch = []
        batch = [*batch, *piece]
    if batch:
        yield batch[0].settings, batch


def _length(question: Question) -> int:
    return len(question.text.encode())


def _failure(question: Question, error: Exception, pictures: Sequence[Prepared]) -> Answer:
    text = f"{type(error).__name__}: {one_line(error)}"
    digest = pictures[0].digest if pictures else ""
    return Answer(question.index, "", "error", image_digest=digest, error=text[:500])


def _free(error: Exception) -> None:
    """Let go of what a failed batch still holds before half of it is tried again."""
    error.__traceback__ = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
