"""Documents and a tiny model for the tests of the evaluation engine."""

import string
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from kd_bench.evals.benchmark import Answer, PreparedTask
from kd_bench.evals.documents import Document

TEN = (
    "mme",
    "mmbench_en",
    "mmbench_cn",
    "vqav2",
    "gqa",
    "scienceqa_img",
    "mmmu",
    "textvqa",
    "vizwiz_vqa",
    "pope",
)

FIRST = 23
"""Added to a talker's seed: talkers from here on say much that differs, and end by themselves."""


@lru_cache
def processor() -> Any:
    """The embedded world's processor."""
    from kd_bench.distill.build import build_processor

    return build_processor()


def talker(seed: int = 0, end: float = 6.0) -> Any:
    """A tiny random LLaVA whose answers differ by picture and question and end after a few tokens.

    Args:
        end: how loud the end mark is; 0 would talk until the cap.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from kd_bench.distill.build import Size, build_model

    tied = build_model(Size(width=96, layers=4, heads=3), processor(), seed + FIRST)
    config = LlavaConfig(**{**tied.config.to_dict(), "tie_word_embeddings": False})
    config.text_config.tie_word_embeddings = False
    torch.manual_seed(seed + FIRST)
    model = LlavaForConditionalGeneration(config)
    model.load_state_dict(
        {k: v for k, v in tied.state_dict().items() if k != "lm_head.weight"}, strict=False
    )
    with torch.no_grad():
        torch.nn.init.normal_(model.lm_head.weight, std=0.2)
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight *= 10  # answers follow the context, not the last token
        model.lm_head.weight[processor().tokenizer.eos_token_id] *= end
    model.generation_config.eos_token_id = processor().tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor().tokenizer.pad_token_id
    return model.eval()


def save_talker(folder: Path, seed: int = 0, end: float = 6.0) -> Path:
    """A checkpoint of `talker`."""
    talker(seed, end).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def write_replicas(folder: Path) -> Path:
    """The ten embedded test sets in the upstream columns."""
    from kd_bench.world.build import write_test_sets

    write_test_sets(folder, "test", 0)
    return folder


class Parrot:
    """Answers each document by a rule over its row, instead of a model."""

    def __init__(self, prepared: PreparedTask, rule: Callable[[Document], str]) -> None:
        self._prepared = prepared
        self._rule = rule

    def answers(self, requests: Sequence[Any], keys: Sequence[str]) -> Iterator[list[Answer]]:
        for number, request in enumerate(requests):
            text = self._rule(self._prepared.documents[request.args[3]])
            yield [Answer(number, text, "ok" if text else "empty", 1, 0.5, keys[number])]


def oracle(task: str) -> Callable[[Document], str]:
    """The right answer, read from the row as a person would."""

    def right(document: Document) -> str:
        if task in ("vqav2", "textvqa", "vizwiz_vqa"):
            given = [a["answer"] if isinstance(a, dict) else a for a in document["answers"]]
            return max(given, key=given.count)
        if task == "scienceqa_img":
            return string.ascii_uppercase[document["answer"]]
        return str(document["answer"])

    return right
