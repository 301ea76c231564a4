"""Answer many questions with one model: group by image, batch, encode each image once.

Three paths, by what the family allows; `path` says which one a model takes:

    prefix     one size of image (LLaVA): quick prompts, shared prefixes
    general    any other family that takes embeddings: its own processor, shared prefixes
    generate   families that look back at the image from the question (PaliGemma, Gemma 3) or
               that are not known: `generate` of transformers on left-padded batches
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from kd_bench.distill.models import weight_count
from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.errors import UsageError, one_line
from kd_bench.evals.benchmark import PLACEHOLDER, Answer, Question, Settings
from kd_bench.evals.cache import is_plain
from kd_bench.evals.decoding import Constraints, Decoded, Decoder, PlainDecoder, end_ids
from kd_bench.evals.inputs import (
    FixedRows,
    GeneralRows,
    ImageStore,
    Prepared,
    PromptBuilder,
    Ready,
    padded_batch,
)
from kd_bench.records import Cost

NOT_FINITE = "the model's logits are not finite"

ONE_SIZE = ("LlavaForConditionalGeneration",)
LOOKING_BACK = ("PaliGemmaForConditionalGeneration", "Gemma3ForConditionalGeneration")


class Engine:
    """Greedy answers of one vision-language model.

    Args:
        model: a transformers model.
        processor: its processor.
        batch_size: questions at a time; None for as many as the memory budget allows.
        share: prefill what the questions of an image have in common once.
        images: store of prepared images, when several engines work on the same documents.
        budget_bytes: memory above the model's own that a batch may take.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        batch_size: int | None = None,
        share: bool = True,
        images: ImageStore | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.device = next(model.parameters()).device
        self._parts: VisionLanguageModel | None = None
        with contextlib.suppress(UsageError):
            self._parts = VisionLanguageModel(model)
        self._processor = processor
        self._prompts = PromptBuilder(processor)
        self._images = ImageStore() if images is None else images
        self.path = path_of(self._parts)
        ends = end_ids(model, processor.tokenizer, self._prompts.stop_ids)
        settings = getattr(model, "generation_config", None)
        self.constraints = Constraints(settings, ends, self.device)
        tokenizer = processor.tokenizer
        self._rows: Any
        self._decoder: Any
        if self.path == "generate" or self._parts is None:
            self._rows = partial(padded_batch, self._prompts, self.device)
            self._decoder = PlainDecoder(model, tokenizer, ends, self.constraints)
            self.share = False
        else:
            embed = model.get_input_embeddings()
            kind = FixedRows if self.path == "prefix" else GeneralRows
            self._rows = kind(self._parts, self._prompts, embed).rows
            parts = (self._parts.language_model, self._parts.lm_head, embed)
            self._decoder = Decoder(*parts, tokenizer, ends, self.constraints)
            self.share = share and is_plain(self._parts.language_model)
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
                    with torch.inference_mode():
                        rows = self._rows(ready)
                    decoded = self._decoder.decode(rows, settings, self.share)
                    found = zip(ready, decoded, strict=True)
                    answers = [self._answer(item, result, settings) for item, result in found]
                except Exception as error:
                    if len(ready) == 1:
                        yield [_failure(ready[0].question, error, ready[0].images)]
                        continue
                    # Let go of what the failed batch still holds before half of it is tried again.
                    error.__traceback__ = None
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
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
                images = self._images.prepared(question.image_key, question.images, processor)
                prompt = self._prompts.render(question.text, len(images))
            except Exception as error:
                failed.append(_failure(question, error, []))
                continue
            ready.append(Ready(question, images, prompt))
        return ready, failed

    def _answer(self, item: Ready, result: Decoded, settings: Settings) -> Answer:
        if result.broken:
            return _failure(item.question, FloatingPointError(NOT_FINITE), item.images)
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
            image_digest=item.images[0].digest if item.images else "",
        )


def path_of(parts: VisionLanguageModel | None) -> str:
    """Which way through the engine a family takes."""
    if parts is None or parts.architecture in LOOKING_BACK:
        return "generate"
    return "prefix" if parts.architecture in ONE_SIZE else "general"


def plan_batches(
    questions: Sequence[Question], limit: Callable[[Question], int]
) -> Iterator[tuple[Settings, list[Question]]]:
    """Questions in batches of equal settings, near in length, an image's questions together.

    Args:
        limit: rows of a batch whose longest question is the given one.
    """
    groups: dict[tuple[Settings, str], list[Question]] = {}
    for question in questions:
        key = question.image_key or f"alone {question.index}"
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


def _failure(question: Question, error: Exception, images: Sequence[Prepared]) -> Answer:
    text = f"{type(error).__name__}: {one_line(error)}"
    digest = images[0].digest if images else ""
    return Answer(question.index, "", "error", image_digest=digest, error=text[:500])


MOST_ROWS = {"cpu": 64, "cuda": 256}
"""Above this a batch gains nothing more."""


class MemoryBudget:
    """An upper bound of what a batch of questions needs, and the rows that stay below a budget.

    Args:
        model: for its language model's sizes.
        budget_bytes: memory above the model's own; None takes a quarter of what is free now, at
            most 2 GiB on a CPU and half of what is free on a GPU.
    """

    def __init__(
        self, model: Any, image_tokens: int | None, budget_bytes: int | None = None
    ) -> None:
        config = model.config.get_text_config()
        weight = max(model.parameters(), key=lambda each: each.is_floating_point())
        size = weight.element_size()
        self._device = weight.device.type
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        pairs = getattr(config, "num_key_value_heads", None) or heads
        self._cache_token = 2 * config.num_hidden_layers * pairs * head * size
        # A layer's widest moment: its input, the two branches of the MLP, and copies of them.
        wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        self._working_token = (6 * config.hidden_size + 3 * wide) * size
        self._logits = 3 * config.vocab_size * 4
        self._image_tokens = image_tokens or 1024
        if budget_bytes is None and self._device == "cuda":
            budget_bytes = torch.cuda.mem_get_info()[0] // 2
        elif budget_bytes is None:
            free = _linux_bytes("/proc/meminfo", "MemAvailable:")
            budget_bytes = 1 << 30 if free is None else min(2 << 30, free // 4)
        self.bytes = budget_bytes

    def rows(self, question: Question) -> int:
        """How many questions as long as this one fit, at least one."""
        images = max(1, question.text.count(PLACEHOLDER))
        # A token is at least a byte of text.
        prompt = _length(question) + 64 + images * self._image_tokens
        kept = prompt + question.settings.max_new_tokens
        # The prefixes' caches, then the rows that go on, stand for a moment beside the batch's own.
        cache = int(1.5 * kept * self._cache_token)
        need = cache + prompt * self._working_token + self._logits
        return max(1, min(MOST_ROWS.get(self._device, 64), self.bytes // need))


def _linux_bytes(file: str, field: str) -> int | None:
    """One of the memory lines below /proc; None on other systems."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text(encoding="ascii").splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None


class MemoryMeter:
    """Peak memory since the meter was made: the accelerator's own, or this process's growth."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        # Linux forgets its high-water mark when asked to; elsewhere nothing is measured.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._before = _linux_bytes("/proc/self/status", "VmRSS:")

    def peak(self) -> int | None:
        """Bytes, None where it cannot be told."""
        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
        peak = _linux_bytes("/proc/self/status", "VmHWM:")
        return None if peak is None or self._before is None else max(0, peak - self._before)


def measure(engine: Engine, memory: MemoryMeter, repeats: int = 15) -> Cost:
    """Measure a loaded model on a fixed question about a fixed image, four tokens an answer.

    The latency is the median of `repeats` answers at batch 1, image encoding included. On an
    accelerator the peak memory is the evaluation's. On a CPU it is the weights and what the answers
    need: the evaluation's would count the libraries that a process loads with its first model.
    """
    cost = size_of(engine.model)
    on_cpu = not torch.cuda.is_available()
    meter = MemoryMeter() if on_cpu else memory
    times = []
    for number in range(repeats + 2):
        shade = (number * 7) % 256  # a new image each time: nothing is read from a cache
        image = Image.new("RGB", (64, 64), (shade, 128, 255 - shade))
        question = Question(number, "What is this?", partial(list, (image,)), Settings(4))
        started = time.perf_counter()
        list(engine.answers([question]))
        times.append(1000 * (time.perf_counter() - started))
    peak = meter.peak()
    return replace(
        cost,
        latency_ms=round(statistics.median(times[2:]), 3),  # the first two warm up
        peak_memory_bytes=peak + (cost.weight_bytes or 0) if on_cpu and peak is not None else peak,
    )


def size_of(model: torch.nn.Module) -> Cost:
    """A model's parameters and their bytes, shared ones once."""
    weights = {id(weight): weight for weight in model.parameters()}.values()
    return Cost(
        parameters=sum(weight_count(weight) for weight in weights),
        weight_bytes=sum(weight.nbytes for weight in weights),
    )
