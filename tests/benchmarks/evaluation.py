"""The evaluation engine's table: `python -m tests.benchmarks.evaluation`, about ten minutes.

Side by side in one process, on the same documents; answers are compared string by string.
"""

import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from kd_bench.distill.build import build_processor
from kd_bench.evals import inputs
from kd_bench.evals.benchmark import Question, Settings, lmms_eval, prepare, quiet
from kd_bench.evals.engine import Engine
from kd_bench.evals.models import KdBench
from kd_bench.registry import load_suite, load_task
from kd_bench.world.build import resolve
from tests.benchmarks.figures import Figure, peak_memory, print_table

CAP = 8
WORDS = "what is the colour of left red dog near a square letter how many on under"


def main() -> None:
    """Print the table."""
    lmms_eval()
    figures = equal_answers()
    with TemporaryDirectory() as scratch:
        figures += speed(Path(scratch))
    print_table("The evaluation engine", figures, "wall-clock seconds, faster of two runs")


# Equal answers


def equal_answers() -> list[Figure]:
    """The ten mini benchmarks and 2,000 random prompts, in float32 and bfloat16."""
    from kd_bench.distill.models import load_model, load_processor

    place = resolve("embedded:weights/teacher")
    model, processor = load_model(place), load_processor(place)
    questions = mini_questions()
    questions += random_questions(2_000, start=len(questions))
    figures = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = model.to(dtype)
        single = partial(Engine, model, processor, batch_size=1, share=False)
        reference = texts(single(), questions)
        shared = differing(reference, texts(Engine(model, processor), questions))
        ours = f"{shared} of {len(questions):,} differ"
        theirs = ""
        if dtype == torch.bfloat16:
            order = questions[:]
            random.Random(0).shuffle(order)
            again = differing(reference, texts(single(), order))
            theirs = f"batch 1, other order: {again} differ"
        figures.append(
            Figure(f"answers unlike batch 1 without sharing, {name}, mini teacher", ours, theirs)
        )
    return figures


def mini_questions() -> list[Question]:
    """Every document of the embedded world's ten benchmarks."""
    questions: list[Question] = []
    data = resolve("embedded:data/test")
    for task in load_suite("mini").tasks:
        spec = load_task(task)
        prepared = prepare(spec, data)
        settings = Settings(spec.generation.max_new_tokens, tuple(spec.generation.until))
        for document, prompt, key in zip(
            prepared.documents, prepared.prompts, prepared.image_digests, strict=True
        ):
            visual = partial(prepared.task.doc_to_visual, document)
            questions.append(Question(len(questions), prompt, visual, settings, key))
    return questions


def random_questions(wanted: int, start: int) -> list[Question]:
    """Random words about random pictures, four each: up to 59 words, caps of 1 to 24 tokens."""
    chance = random.Random(0)
    questions = []
    for number in range(wanted):
        picture = noise(number // 4, 64)
        text = " ".join(chance.choices(WORDS.split(), k=chance.randrange(60)))
        settings = Settings(chance.choice((1, 4, 12, 24)))
        questions.append(
            Question(start + number, text, partial(list, [picture]), settings, f"r{number // 4}")
        )
    return questions


def noise(seed: int, side: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def texts(engine: Engine, questions: Sequence[Question]) -> dict[int, str]:
    """Answers by the question's index."""
    found = {a.index: a for batch in engine.answers(questions) for a in batch}
    assert all(answer.status != "error" for answer in found.values())
    return {index: answer.text for index, answer in found.items()}


def differing(left: dict[int, str], right: dict[int, str]) -> int:
    assert left.keys() == right.keys()
    return sum(left[index] != right[index] for index in left)


# Speed


def speed(scratch: Path) -> list[Figure]:
    """Against lmms-eval's llava_hf and against our own batches without sharing."""
    heavy = save_heavy(scratch / "heavy")
    mini = resolve("embedded:weights/teacher")
    figures = []
    for name, place, side, goals in (
        ("tower 4 x the prefill", heavy, 224, (15.0, 1.0)),
        ("mini teacher", mini, 64, (None, 3.0)),
    ):
        for a_picture, goal in zip((20, 1), goals, strict=True):
            requests, keys, documents = make_requests(12 if a_picture > 1 else 60, a_picture, side)
            runs = {
                "stock": stock_answers(place, documents),
                "unshared": our_answers(place, documents, share=False, share_tower=False),
                "tower": our_answers(place, documents, share=False),
                "ours": our_answers(place, documents),
            }
            rates, said = {}, {}
            for run, answer in runs.items():
                rates[run], said[run] = answers_a_second(answer, requests, keys)
            equal = np.mean([a == b for a, b in zip(said["ours"], said["stock"], strict=True)])
            label = f"answers/s, {a_picture} question(s) a picture, {name}"
            figures.append(
                Figure(
                    f"{label}, against llava_hf ({equal:.0%} of the texts equal)",
                    f"{rates['ours']:.1f}",
                    f"{rates['stock']:.1f}",
                    rates["ours"] / rates["stock"],
                    goal,
                )
            )
            for run, what in (("unshared", "nothing shared"), ("tower", "only the tower shared")):
                assert said["ours"] == said[run]
                if a_picture > 1:
                    figures.append(
                        Figure(
                            f"{label}, against our own batches, {what}",
                            f"{rates['ours']:.1f}",
                            f"{rates[run]:.1f}",
                            rates["ours"] / rates[run],
                            4.0 if (place, run) == (heavy, "unshared") else None,
                        )
                    )
    return figures + memory(heavy)


def memory(place: Path) -> list[Figure]:
    """Most bytes alive during an evaluation, above the model's own, beside the budget."""
    from kd_bench.distill.models import load_model, load_processor

    model, processor = load_model(place), load_processor(place)
    requests = [
        Question(
            n,
            " ".join([WORDS] * 3),
            partial(list, [noise(n // 20, 224)]),
            Settings(CAP),
            f"p{n // 20}",
        )
        for n in range(120)
    ]
    figures = []
    for budget in (64 << 20, 256 << 20, None):
        engine = Engine(model, processor, budget_bytes=budget)
        rows = max(len(ready) for ready, _ in engine._batches(requests))
        peak = peak_memory(partial(texts, engine, requests))
        figures.append(
            Figure(
                f"peak memory above the model's, {rows} rows a batch",
                f"{peak / 2**20:.0f} MiB",
                f"budget {engine.budget.bytes / 2**20:.0f} MiB",
                engine.budget.bytes / peak,
                1.0,
            )
        )
    return figures


def save_heavy(folder: Path) -> Path:
    """A random LLaVA whose SigLIP-like tower costs four times the prefill."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen2Config,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    own = build_processor()
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": 224, "width": 224}),
        tokenizer=own.tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        chat_template=own.chat_template,
    )
    vision = SiglipVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6,
        image_size=224, patch_size=16, vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=len(own.tokenizer), hidden_size=256, intermediate_size=1024,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        bos_token_id=None, eos_token_id=own.tokenizer.eos_token_id,
        pad_token_id=own.tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=own.image_token_id,
            vision_feature_layer=-1, vision_feature_select_strategy="full", image_seq_length=196,
        )
    )  # fmt: skip
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    model.generation_config.eos_token_id = own.tokenizer.eos_token_id
    model.generation_config.pad_token_id = own.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_requests(
    number: int, a_picture: int, side: int
) -> tuple[list[Any], list[str], list[dict[str, Any]]]:
    """lmms-eval's requests, our picture keys, and the documents."""
    chance = random.Random(1)
    documents: list[dict[str, Any]] = []
    for picture in range(number):
        image = noise(picture, side)
        for _ in range(a_picture):
            question = " ".join(chance.choices(WORDS.split(), k=chance.randrange(6, 18))) + "?"
            documents.append({"image": image, "question": question, "key": f"{picture}"})
    settings = {"max_new_tokens": CAP, "do_sample": False, "temperature": 0, "until": ["\n\n"]}
    requests = [
        SimpleNamespace(args=(document["question"], dict(settings), _visual, n, "speed", "test"))
        for n, document in enumerate(documents)
    ]
    return requests, [document["key"] for document in documents], documents


def _visual(document: dict[str, Any]) -> list[Image.Image]:
    return [document["image"]]


def our_answers(
    place: Path, documents: list[Any], share: bool = True, share_tower: bool = True
) -> Callable[..., list[str]]:
    """The adapter, fresh for every run: its picture caches are empty.

    Args:
        share_tower: False gives every question's picture a digest of its own, so that it is
            prepared and encoded again.
    """
    from kd_bench.distill.models import load_model, load_processor

    model, processor = load_model(place), load_processor(place)

    def run(requests: list[Any], keys: list[str]) -> list[str]:
        adapter = KdBench(model=model, processor=processor, share=share)
        adapter.task_dict = {"speed": {"test": documents}}
        numbers = count()
        digest = inputs.pixel_digest if share_tower else lambda _: f"picture {next(numbers)}"
        named = keys if share_tower else [""] * len(keys)
        with patch.object(inputs, "pixel_digest", digest):
            found = {a.index: a.text for batch in adapter.answers(requests, named) for a in batch}
        return [found[number] for number in range(len(requests))]

    return run


def stock_answers(place: Path, documents: list[Any]) -> Callable[..., list[str]]:
    """lmms-eval's llava_hf at batch 1, with what it needs to start on a processor."""
    decord = ModuleType("decord")
    decord.VideoReader = decord.cpu = None  # type: ignore[attr-defined]
    sys.modules.setdefault("decord", decord)
    with quiet():
        from lmms_eval.models.simple.llava_hf import LlavaHf

        model = LlavaHf(
            pretrained=str(place), device="cpu", device_map="cpu", dtype="float32", batch_size=1
        )
    model.task_dict = {"speed": {"test": documents}}

    def run(requests: list[Any], keys: list[str]) -> list[str]:
        del keys
        with quiet():
            return [str(text).strip() for text in model.generate_until(requests)]

    return run


def answers_a_second(
    run: Callable[..., list[str]], requests: list[Any], keys: list[str], repeats: int = 2
) -> tuple[float, list[str]]:
    """The faster of some runs, after a short one to warm up."""
    run(requests[:2], keys[:2])
    best, said = 0.0, []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        said = run(requests, keys)
        best = max(best, len(requests) / (time.perf_counter() - start))
    return best, said


if __name__ == "__main__":
    main()
