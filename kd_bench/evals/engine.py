"""Answer many questions with one model: group by image, batch, encode each image once.

Three paths, by what the family allows; `path` says which one a model takes:

    prefix     one size of image (LLaVA): quick prompts, shared prefixes
    general    any other family that takes embeddings: its own processor, shared prefixes
    generate   families that look back at the image from the question (PaliGemma, Gemma 3) or
               that are not known: `generate` of transformers on left-padded batches
"""

import contextlib
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from PIL import Image

from kd_bench.distill.models import weight_count
from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.errors import UsageError, one_line
from kd_bench.evals.benchmark import PLACEHOLDER, Answer, Question, Settings
from kd_bench.evals.cache import is_plain
from kd_bench.evals.decoding import (
    PREFILL_ROWS,
    Constraints,
    Decoded,
    Decoder,
    PlainDecoder,
    end_ids,
    shares,
    worth_sharing,
)
from kd_bench.evals.inputs import (
    MOST_VALUES,
    VALUES_AT_A_TIME,
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

CPU = torch.device("cpu")
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
        self.device = next((p.device for p in model.parameters() if not p.is_meta), CPU)
        self._parts: VisionLanguageModel | None = None
        with contextlib.suppress(UsageError):
            self._parts = VisionLanguageModel(model)
        self._processor = processor
        self._prompts = PromptBuilder(processor)
        self._images = ImageStore() if images is None else images
        self.path = path_of(self._parts)
        self.places = len({*map(str, getattr(model, "hf_device_map", {"": ""}).values())})
        if self.places > 1:  # accelerate's hooks move states in the model's own forward
            self.path = "generate"
        ends = end_ids(model, processor.tokenizer, self._prompts.stop_ids)
        settings = getattr(model, "generation_config", None)
        self.constraints = Constraints(settings, ends, self.device)
        tokenizer = processor.tokenizer
        self._prepare: Callable[[Sequence[Ready]], Sequence[Ready]] = list
        self._rows: Any
        self._decoder: Any
        self.share = False
        if self.path == "generate" or self._parts is None:
            self._rows = partial(padded_batch, self._prompts, self.device)
            if self._parts is not None and takes_features(self._parts):
                rows = GeneralRows(self._parts, self._prompts)
                self._prepare, self._rows = rows.prepare, rows.padded
            self._decoder = PlainDecoder(model, tokenizer, ends, self.constraints)
        else:
            embed = model.get_input_embeddings()
            kind: Any = FixedRows if self.path == "prefix" else GeneralRows
            rows = kind(self._parts, self._prompts, embed)
            self._prepare, self._rows = rows.prepare, rows.rows
            parts = (self._parts.language_model, self._parts.lm_head, embed)
            self._decoder = Decoder(*parts, tokenizer, ends, self.constraints)
            self.share = share and is_plain(self._parts.language_model)
        self._image_tokens = (self._parts and self._parts.image_token_count) or 1024
        self.budget = MemoryBudget(model, batch_size, budget_bytes, self.share)

    def answers(self, questions: Sequence[Question]) -> Iterator[list[Answer]]:
        """Answers batch by batch, in the order that is quickest.

        While a batch is answered, a thread decodes and prepares the images of the next. A batch
        that fails is halved and tried again; where memory was short, no later one is as large. An
        exception that stays with a single question becomes an answer with the status `error`.
        """
        batches = self._batches(questions)
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(next, batches, None)
            while (batch := following.result()) is not None:
                following = pool.submit(next, batches, None)
                ready, failed = batch
                if failed:
                    yield failed
                yield from self._answered(ready)

    def _batches(self, questions: Sequence[Question]) -> Iterator[tuple[list[Ready], list[Answer]]]:
        """Prepared questions in batches, and answers to those that cannot be prepared."""
        failed: list[Answer] = []

        def prepared() -> Iterator[list[Ready]]:
            for group in plan_groups(questions, self._image_tokens):
                ready, broken = self._ready(group)
                failed.extend(broken)
                yield ready

        for batch in fill_batches(prepared(), self.budget.fits):
            yield batch, failed[:]
            failed.clear()
        if failed:
            yield [], failed

    def _answered(self, ready: Sequence[Ready]) -> Iterator[list[Answer]]:
        pending = list(fill_batches([ready], self.budget.fits))
        while pending:
            batch = pending.pop(0)
            settings = batch[0].question.settings
            try:
                with torch.inference_mode():
                    rows = self._rows(batch)
                decoded = self._decoder.decode(rows, settings, self.share)
                found = zip(batch, decoded, strict=True)
                answers = [self._answer(item, result, settings) for item, result in found]
            except Exception as error:
                if len(batch) == 1:
                    yield [_failure(batch[0].question, error, batch[0].images)]
                    continue
                # Let go of what the failed batch still holds before half of it is tried again.
                error.__traceback__ = None
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                half = (len(batch) + 1) // 2
                pending = [batch[:half], batch[half:], *pending]
                if out_of_memory(error):
                    self.budget.shrink(batch[:half])
                    pending = list(fill_batches(pending, self.budget.fits))
                continue
            yield answers

    def _ready(self, group: Sequence[Question]) -> tuple[list[Ready], list[Answer]]:
        ready: list[Ready] = []
        failed = []
        processor = self._processor.image_processor if self.path == "prefix" else None
        for question in group:
            try:
                images = self._images.prepared(question.image_key, question.images, processor)
                prompt = self._prompts.render(question.text, len(images))
                ready += self._prepare([Ready(question, images, prompt)])
            except Exception as error:
                failed.append(_failure(question, error, []))
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


def takes_features(parts: VisionLanguageModel) -> bool:
    """Whether `generate` can be given encoded images instead of pixels (transformers 5.2x).

    Families want them in unlike forms: these two as one tensor, LLaVA's as a tuple of tensors.
    """
    known = inspect.signature(parts.whole.forward).parameters
    return parts.architecture in LOOKING_BACK and "mm_encoder_outputs" in known


def out_of_memory(error: Exception) -> bool:
    """Whether half of a batch may succeed because it is half."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(
        error
    )


def plan_groups(questions: Sequence[Question], image_tokens: int) -> list[list[Question]]:
    """Questions about the same images under equal settings, in the order to answer them.

    By settings, then by length in steps of a factor of two, longest first: a batch that does not
    fit into memory shows itself at once. Then in the order of the documents, whose images are read
    row group by row group.
    """
    groups: dict[tuple[Settings, str], list[Question]] = {}
    for question in questions:
        key = question.image_key or f"alone {question.index}"
        groups.setdefault((question.settings, key), []).append(question)

    def order(group: list[Question]) -> tuple[Settings, int, int]:
        longest = group[0]
        images = max(1, longest.text.count(PLACEHOLDER))
        tokens = _length(longest) + images * image_tokens
        return longest.settings, -tokens.bit_length(), min(asked.index for asked in group)

    for group in groups.values():
        group.sort(key=_length, reverse=True)
    return sorted(groups.values(), key=order)


def fill_batches(
    groups: Iterable[Sequence[Ready]], fits: Callable[[Sequence[Ready]], bool]
) -> Iterator[list[Ready]]:
    """Batches of equal settings that fit; a group is torn apart only if it does not fit alone."""
    batch: list[Ready] = []
    for group in groups:
        rest = list(group)
        while rest:
            if batch and batch[0].question.settings != rest[0].question.settings:
                yield batch
                batch = []
            if fits([*batch, *rest]):
                batch, rest = [*batch, *rest], []
            elif batch:
                yield batch
                batch = []
            else:
                size = 1
                while fits(rest[: size + 1]):
                    size += 1
                yield rest[:size]
                rest = rest[size:]
    if batch:
        yield batch


def _length(question: Question) -> int:
    return len(question.text.encode())


def _failure(question: Question, error: Exception, images: Sequence[Prepared]) -> Answer:
    text = f"{type(error).__name__}: {one_line(error)}"
    digest = images[0].digest if images else ""
    return Answer(question.index, "", "error", image_digest=digest, error=text[:500])


MOST_ROWS = {"cpu": 64, "cuda": 256}
"""Above this a batch gains nothing more."""


class MemoryBudget:
    """An upper bound of what a batch of questions needs, and whether it stays below a budget.

    Args:
        model: for its language model's sizes.
        batch_size: questions at a time, whatever they need; None for as many as fit.
        budget_bytes: memory above the model's own; None takes a quarter of what is free now, at
            most 2 GiB on a CPU and half of what is free on a GPU.
        share: whether a prefix that several questions share is held once.
    """

    def __init__(
        self,
        model: Any,
        batch_size: int | None = None,
        budget_bytes: int | None = None,
        share: bool = False,
    ) -> None:
        config = model.config.get_text_config()
        weight = max(
            (p for p in model.parameters() if not p.is_meta), key=lambda p: p.is_floating_point()
        )
        size = weight.element_size()
        device = weight.device.type
        self._most = batch_size or MOST_ROWS.get(device, 64)
        self._at_once = PREFILL_ROWS.get(device, 1 << 30)
        self._share = share
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        pairs = getattr(config, "num_key_value_heads", None) or heads
        self._cache_token = 2 * config.num_hidden_layers * pairs * head * size
        # A layer's widest moment: its input, the two branches of the MLP, and copies of them.
        wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        self._working_token = (6 * config.hidden_size + 3 * wide) * size
        self._working_pixel = _tower_width(model.config) * size
        self._most_pixels = VALUES_AT_A_TIME.get(device, MOST_VALUES)
        self._embedding = config.hidden_size * size
        self._scores = 3 * 4 * heads
        self._logits = 3 * config.vocab_size * 4
        if batch_size is not None:
            budget_bytes = sys.maxsize
        elif budget_bytes is None and device == "cuda":
            budget_bytes = torch.cuda.mem_get_info()[0] // 2
        elif budget_bytes is None:
            free = _linux_bytes("/proc/meminfo", "MemAvailable:")
            budget_bytes = 1 << 30 if free is None else min(2 << 30, free // 4)
        self.bytes = budget_bytes

    def fits(self, batch: Sequence[Ready]) -> bool:
        """Whether a batch may be tried; a single question always may."""
        return len(batch) < 2 or (len(batch) <= self._most and self.need(batch) <= self.bytes)

    def shrink(self, batch: Sequence[Ready]) -> None:
        """Allow no more than this batch from now on: one of twice its size had no memory."""
        self.bytes = self.need(batch)

    def need(self, batch: Sequence[Ready]) -> int:
        """Bytes, by the lengths of its prompts."""
        lengths = [item.length for item in batch]
        prefixes = worth_sharing(batch) if self._share else {}
        before = max((item.prefix for item in prefixes.values()), default=0)
        own = max(
            length - (item.prefix if shares(item) and item.prefix_key in prefixes else 0)
            for item, length in zip(batch, lengths, strict=True)
        )
        room = own + batch[0].question.settings.max_new_tokens
        kept = len(prefixes) * before + len(batch) * room
        rows = min(len(batch), self._at_once)
        widest = max(min(len(prefixes), self._at_once) * before, rows * own)
        pixels = sum({item.key: item.pixels for item in batch}.values())
        tower = int(min(pixels, self._most_pixels) * self._working_pixel)
        return (
            kept * self._cache_token
            + max(tower, widest * self._working_token)
            + (rows * own * (before + own) * self._scores if prefixes else 0)  # of `cache.attend`
            + sum(lengths) * self._embedding
            + len(batch) * self._logits
        )


def _tower_width(config: Any) -> float:
    """Widest moment of a vision tower, as `MemoryBudget` counts it, for each value of a pixel."""
    vision = getattr(config, "vision_config", None)
    width: int = getattr(vision, "embed_dim", None) or getattr(vision, "hidden_size", None) or 0
    wide: int = getattr(vision, "intermediate_size", None) or 4 * width
    patch: Any = getattr(vision, "patch_size", None) or 14
    side = patch if isinstance(patch, int) else patch[0]
    return (6 * width + 3 * wide) / (3 * side**2)


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
