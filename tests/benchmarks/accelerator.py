"""What a GPU gives: `python -m tests.benchmarks.accelerator`, under eight minutes on an H100.

Nothing is downloaded: random weights in the shapes of Qwen2.5-0.5B and 3B behind SigLIP-so400m, a
vocabulary of 151,936. lmms-eval need not be installed. `--tiny` runs all of it on a CPU in seconds,
to see that it runs: its figures mean nothing.

Training: time of a step, tokens a second, MFU (operations without those computed again, over the
card's dense bfloat16 peak) and peak memory beside the estimate of `kd-bench train --plan`.
Evaluation: answers a second against transformers' `generate` in batches, and vLLM where it can be
imported; texts in bfloat16 unlike batch 1, beside batch 1 in another order.
"""

import argparse
import gc
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kd_bench.distill import plan as planning
from kd_bench.distill.counting import Shapes, count
from kd_bench.distill.distiller import Distiller
from kd_bench.distill.encoding import Collator
from kd_bench.distill.models import checkpoint_activations
from kd_bench.distill.recipe import Stage
from kd_bench.evals.benchmark import Question, Settings
from kd_bench.evals.engine import Engine
from tests.benchmarks.figures import Figure, print_table
from tests.benchmarks.training import QWEN_HALF, QWEN_THREE, SIGLIP, llava
from tests.support import tiny

TIED = {"tie_word_embeddings": True}


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
        student, teacher, vision: of the configs.
        samples: of a micro-batch, each of an image, a question and an answer.
        asked: images of the two evaluations, of 20 questions each and of one.
        cap: tokens of an answer of the evaluations.
        steps: that are timed.
    """

    student: dict[str, Any]
    teacher: dict[str, Any]
    vision: dict[str, Any]
    vocabulary: int = 151_936
    samples: int = 8
    question: int = 48
    answer: int = 96
    asked: tuple[int, int] = (12, 96)
    cap: int = 16
    steps: int = 8


FULL = Sizes({**QWEN_HALF, **TIED}, {**QWEN_THREE, **TIED}, SIGLIP)
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, **TIED}  # fmt: skip
TINY = Sizes(
    _SMALL,
    {**_SMALL, "hidden_size": 48},
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
     "image_size": 28, "patch_size": 14},
    vocabulary=300, samples=2, question=6, answer=5, asked=(1, 4), cap=3, steps=1,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> list[Figure]:
    """Measure and print; returns the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU if need be")
    parser.add_argument("--seconds", type=float, default=440, help="after which nothing is begun")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    given = parser.parse_args(arguments)
    if not given.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny shows that it runs")
    sizes = TINY if given.tiny else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begun, figures = time.perf_counter(), []
    for part in (training, answering):
        for name, measure in part(sizes, device):
            if time.perf_counter() - begun > given.seconds:
                figures.append(Figure(name, "not measured: out of time"))
                continue
            try:
                figures += measure()
            except Exception as error:  # one figure that fails costs no other
                figures.append(Figure(name, f"failed: {type(error).__name__}: {error}"[:200]))
            _clear(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print_table(f"On {name}", figures, "wall-clock seconds, median")
    if given.json is not None:
        told = {"device": name, "torch": torch.__version__, "figures": [*map(asdict, figures)]}
        given.json.write_text(json.dumps(told, indent=2), encoding="utf-8")
    return figures


Work = tuple[str, Callable[[], list[Figure]]]


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def model_of(
    language: dict[str, Any], sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Any:
    """A LLaVA of random weights, drawn on the device."""
    from transformers.initialization import no_init_weights

    with device, no_init_weights():
        model = llava(language, sizes.vision, vocabulary=sizes.vocabulary)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.02)
            else:
                weight.fill_(float(name.endswith("weight")))
    return model.to(dtype)


# Training


def training(sizes: Sizes, device: torch.device) -> list[Work]:
    """A step of sft, kl and switch-kd."""
    return [
        (f"a step of {method}", partial(_step_figures, method, sizes, device))
        for method in ("sft", "kl", "switch-kd")
    ]


def _batch(sizes: Sizes, device: torch.device | None) -> dict[str, Any]:
    tokens = (sizes.vision["image_size"] // sizes.vision["patch_size"]) ** 2
    side, samples = sizes.vision["image_size"], []
    for number in range(sizes.samples):
        length = tokens + sizes.question + sizes.answer
        ids = torch.randint(10, sizes.vocabulary, (length,))
        ids[:tokens] = 3
        labels = ids.clone()
        labels[: tokens + sizes.question] = -100
        samples.append(
            {
                "input_ids": ids,
                "labels": labels,
                "pixel_values": torch.randn(1, 3, side, side),
                "sample_index": torch.tensor(number),
            }
        )
    batch = Collator(0, (3, 3))(samples)
    if device is None:
        return batch
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}


def _step_figures(method: str, sizes: Sizes, device: torch.device) -> list[Figure]:
    stage = Stage(method=method, steps=1, precision="bfloat16")
    shapes = Shapes()
    estimate, flops = _plan(stage, shapes, sizes, device)
    recomputes = estimate.checkpointing
    student = model_of(sizes.student, sizes, device, torch.float32)
    teacher = None
    if method != "sft":
        teacher = model_of(sizes.teacher, sizes, device, torch.bfloat16)
    distiller = Distiller(student, teacher, stage.objective).train()
    for model, on in ((student, recomputes["student"]), (teacher, recomputes["teacher"])):
        if on:
            checkpoint_activations(model, frozen=model is teacher)
    batch = _batch(sizes, device)
    distiller.freeze_unreached(batch)
    learning = [p for p in distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=device.type == "cuda")
    items = int((batch["labels"] != -100).sum())

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss, _ = distiller(batch, items)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    for _ in range(2):
        assert bool(torch.isfinite(step()))
    times = []
    for _ in range(sizes.steps):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        times.append(time.perf_counter() - start)
    seconds = float(np.median(times))
    again = " and ".join(name for name, on in recomputes.items() if on) or "nothing"
    rate = batch["input_ids"].numel() / seconds
    what = f"{method}, {tuple(batch['input_ids'].shape)} tokens, {again} computed again"
    figures = [Figure(f"a step of {what}", f"{seconds * 1e3:.0f} ms, {rate:,.0f} tokens/s")]
    card = _card(device)
    if card is not None:
        figures.append(Figure(f"MFU, {method}", f"{flops / seconds / card.bfloat16:.1%}"))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        figures.append(
            Figure(
                f"peak memory, {method}, against train --plan",
                f"{peak / 1e9:.1f} GB",
                f"{estimate.needed / 1e9:.1f} GB",
                estimate.needed / peak,
                1,
            )
        )
    return figures


def _plan(
    stage: Stage, shapes: Shapes, sizes: Sizes, device: torch.device
) -> tuple[planning.StagePlan, int]:
    """The estimate, and operations of a step without those computed again."""

    def make(ours: bool, theirs: bool) -> Distiller:
        with shapes.making():
            student = llava(sizes.student, sizes.vision, vocabulary=sizes.vocabulary)
            teacher = llava(sizes.teacher, sizes.vision, vocabulary=sizes.vocabulary)
        student.tie_weights()
        for module in teacher.modules():
            for name, weight in list(module._parameters.items()):
                if weight is not None:
                    with shapes.mode:
                        half = torch.empty(weight.shape, dtype=torch.bfloat16)
                    module._parameters[name] = torch.nn.Parameter(half)
        teacher.tie_weights()
        distiller = Distiller(student, teacher, stage.objective).train()
        for model, on in ((student, ours), (teacher, theirs)):
            if on:
                checkpoint_activations(model, frozen=model is teacher)
        distiller.freeze_unreached(batch)
        return distiller

    batch = _batch(sizes, None)
    limit = planning.this_device() if device.type == "cuda" else None
    sharding = planning.Sharding()
    plan = planning.plan_memory(stage, make, batch, steps=1, sharding=sharding, limit=limit)
    return plan, count(make(False, False), batch, mixed=True).flops


def _card(device: torch.device) -> planning.Card | None:
    name = torch.cuda.get_device_name().lower().replace(" ", "") if device.type == "cuda" else ""
    known = [key for key in planning.CARDS if key in name]
    return planning.CARDS[max(known, key=len)] if known else None


# Evaluation


def answering(sizes: Sizes, device: torch.device) -> list[Work]:
    """Answers a second of the larger model at 20 questions an image and at one; flips."""
    made: list[Any] = []

    def parts() -> tuple[Any, Any]:
        if not made:
            model = model_of(sizes.teacher, sizes, device, torch.bfloat16).eval()
            processor = processor_of(sizes)
            model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
            model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
            made.extend((model, processor))
        return made[0], made[1]

    work: list[Work] = [
        (
            f"answers/s at {per_image} question(s) an image",
            partial(_speed_figures, parts, sizes, images, per_image),
        )
        for images, per_image in zip(sizes.asked, (20, 1), strict=True)
    ]
    return [*work, ("answers unlike batch 1 in bfloat16", partial(_flips, parts, sizes))]


def processor_of(sizes: Sizes) -> Any:
    """A processor of as many words as the model has rows."""
    words = (f"w{number}" for number in range(sizes.vocabulary - len(tiny.SPECIAL)))
    side, patch = sizes.vision["image_size"], sizes.vision["patch_size"]
    return tiny.processor(side, patch, words, padding_side="left")


def _questions(sizes: Sizes, images: int, per_image: int) -> list[Question]:
    chance, found = random.Random(0), []
    side = sizes.vision["image_size"]
    for number in range(images):
        noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        for _ in range(per_image):
            text = " ".join(f"w{chance.randrange(250)}" for _ in range(chance.randrange(8, 24)))
            settings = Settings(max_new_tokens=sizes.cap)
            found.append(Question(len(found), text, partial(list, [image]), settings, str(number)))
    return found


def _texts(engine: Engine, questions: Sequence[Question]) -> dict[int, str]:
    found = {answer.index: answer for batch in engine.answers(questions) for answer in batch}
    failed = [answer.error for answer in found.values() if answer.status == "error"]
    assert not failed, failed[0]
    return {index: answer.text for index, answer in found.items()}


def _rate(work: Callable[[], object], answers: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return answers / (time.perf_counter() - start)


def _speed_figures(
    parts: Callable[[], tuple[Any, Any]], sizes: Sizes, images: int, per_image: int
) -> list[Figure]:
    model, processor = parts()
    questions = _questions(sizes, images, per_image)
    _texts(Engine(model, processor), questions[:2])
    ours = _rate(lambda: _texts(Engine(model, processor), questions), len(questions), model.device)
    name = f"answers/s at {per_image} question(s) an image, {sizes.cap} tokens each"
    others = {"transformers' generate, batches of 16": partial(_generate, model, processor)}
    figures = []
    for other, ask in others.items():
        ask(questions[:2])
        theirs = _rate(partial(ask, questions), len(questions), model.device)
        ratio = ours / theirs
        line = f"{name}, against {other}"
        figures.append(Figure(line, f"{ours:.1f}", f"{theirs:.1f}", ratio, 1))
    return [*figures, *_vllm(model, processor, questions, ours, name)]


def _generate(model: Any, processor: Any, questions: Sequence[Question], size: int = 16) -> None:
    for start in range(0, len(questions), size):
        group = questions[start : start + size]
        texts = [f"user : <image> {question.text} assistant : " for question in group]
        images = [question.images() for question in group]
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=_cap(group), do_sample=False)


def _cap(group: Sequence[Question]) -> int:
    """Tokens of the longest answer of a batch."""
    return max(question.settings.max_new_tokens for question in group)


def _vllm(
    model: Any, processor: Any, questions: Sequence[Question], ours: float, name: str
) -> list[Figure]:
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        return [Figure(f"{name}, against vLLM", "not measured: vLLM is not installed")]
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        engine = LLM(model=folder, gpu_memory_utilization=0.4, enable_prefix_caching=True)
        settings = SamplingParams(temperature=0, max_tokens=_cap(questions), ignore_eos=True)
        asked = [
            {
                "prompt": f"user : <image> {question.text} assistant : ",
                "multi_modal_data": {"image": question.images()[0]},
            }
            for question in questions
        ]
        engine.generate(asked[:2], settings)
        theirs = _rate(lambda: engine.generate(asked, settings), len(asked), model.device)
    ratio = ours / theirs
    return [Figure(f"{name}, against vLLM", f"{ours:.1f}", f"{theirs:.1f}", ratio, 1)]


def _flips(parts: Callable[[], tuple[Any, Any]], sizes: Sizes) -> list[Figure]:
    model, processor = parts()
    questions = _questions(sizes, max(sizes.asked[0] // 3, 1), 20)
    alone = partial(Engine, model, processor, batch_size=1, share=False)
    first = _texts(alone(), questions)
    order = questions[:]
    random.Random(0).shuffle(order)
    again = _texts(alone(), order)
    ours = _texts(Engine(model, processor), questions)
    flips = [sum(first[n] != found[n] for n in first) for found in (ours, again)]
    return [
        Figure(
            "answers unlike batch 1 in bfloat16, beside batch 1 in another order",
            f"{flips[0]} of {len(questions)}",
            f"{flips[1]} of {len(questions)}",
        )
    ]


if __name__ == "__main__":
    main()
