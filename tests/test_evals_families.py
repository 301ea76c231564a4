"""Every family: shared prefixes and batches give what `generate` gives one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.evals import generate
from kd_bench.evals.budget import MemoryBudget
from kd_bench.evals.engine import Engine, _path
from kd_bench.evals.generate import Decoder
from kd_bench.evals.questions import Question, Settings
from kd_bench.evals.rows import row_of
from tests.eval_world import processor
from tests.tiny_families import FAMILIES, IMAGE, TEXT, batch_for, kinds_for, make, text_batch

GENERATED = 6
BY_GENERATE = {"paligemma", "paligemma2", "gemma3"}


class NoStops:
    """The decoder asks a tokenizer for stop strings only."""


def one_picture(family: str, model: Any) -> tuple[dict[str, Tensor], int]:
    """The inputs of a single picture, and how many image tokens it has."""
    batch = batch_for(family, [1])
    pixels = {
        name: value
        for name, value in batch.items()
        if name not in ("input_ids", "attention_mask", "labels")
    }
    parts = VisionLanguageModel(model)
    with torch.inference_mode():
        return pixels, len(parts.image_embeddings(pixels)[0])


def prompts(family: str, pixels: dict[str, Tensor], tokens: int) -> list[dict[str, Tensor]]:
    """Four questions about one picture, of different lengths, with one prefix."""
    torch.manual_seed(1)
    head = torch.randint(TEXT.start, TEXT.stop, (3,))
    made = []
    for length in (2, 9, 4, 6):
        tail = torch.randint(TEXT.start, TEXT.stop, (length,))
        batch = text_batch([torch.cat([head, torch.full((tokens,), IMAGE), tail])])
        inputs = {**pixels, **batch, **kinds_for(family, batch)}
        del inputs["labels"]
        made.append(inputs)
    return made


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - BY_GENERATE))
def test_rows_give_what_generate_gives(family: str) -> None:
    model = make(family)
    model.generation_config.eos_token_id = 2
    parts = VisionLanguageModel(model)
    pixels, tokens = one_picture(family, model)
    asked = prompts(family, pixels, tokens)
    expected = []
    for inputs in asked:
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=GENERATED, do_sample=False)
        expected.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    embed = model.get_input_embeddings()
    with torch.inference_mode():
        rows = []
        for inputs in asked:
            features = parts.image_embeddings(inputs)
            rows.append(row_of(parts, embed, inputs, features, "picture"))
    assert {row.prefix for row in rows} == {3 + tokens}
    decoder = Decoder(parts.language_model, parts.lm_head, embed, NoStops(), [2])
    settings = Settings(GENERATED)
    alone = [decoder.decode([row], settings, share=False)[0].tokens for row in rows]
    assert alone == expected
    assert [d.tokens for d in decoder.decode(rows, settings, share=False)] == expected
    assert [d.tokens for d in decoder.decode(rows, settings, share=True)] == expected
    assert len({tuple(answer) for answer in expected}) > 1


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava-siglip"])
def test_a_batch_may_mix_rows_with_pictures_and_without(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three axes of positions in one part of a batch, one in the other."""
    monkeypatch.setattr(generate, "PREFILL_ROWS", {"cpu": 2})
    model = make(family)
    parts = VisionLanguageModel(model)
    pixels, tokens = one_picture(family, model)
    embed = model.get_input_embeddings()
    rows = []
    with torch.inference_mode():
        for inputs in prompts(family, pixels, tokens):
            features = parts.image_embeddings(inputs)
            rows.append(row_of(parts, embed, inputs, features, "picture"))
            words = inputs["input_ids"][0][inputs["input_ids"][0] != IMAGE]
            rows.append(generate.Row(words.tolist(), embed(words)))
    decoder = Decoder(parts.language_model, parts.lm_head, embed, NoStops(), [2])
    settings = Settings(GENERATED)
    alone = [decoder.decode([row], settings)[0].tokens for row in rows]
    assert [found.tokens for found in decoder.decode(rows, settings)] == alone


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_path_of_each_family_is_stated(family: str) -> None:
    path = _path(VisionLanguageModel(make(family)))
    if family in BY_GENERATE:
        assert path == "generate"
    else:
        assert path == (
            "prefix"
            if family.startswith("llava-") and "next" not in family and "onevision" not in family
            else "general"
        )


def test_more_memory_allows_more_rows_and_one_row_always_fits() -> None:
    model = make("llava-siglip")
    short = Question(0, "what?", lambda: [], Settings(16))
    long = Question(0, "what? " * 500, lambda: [], Settings(16))
    talkative = Question(0, "what?", lambda: [], Settings(1024))
    rows = {size: MemoryBudget(model, 16, size).rows(short) for size in (1, 1 << 20, 1 << 30)}
    assert rows[1] == 1
    assert rows[1] <= rows[1 << 20] <= rows[1 << 30] == 64
    budget = MemoryBudget(model, 16, 4 << 20)
    assert budget.rows(long) < budget.rows(short)
    assert budget.rows(talkative) < budget.rows(short)


def test_a_language_model_with_windows_is_not_shared() -> None:
    model = make("llava-siglip")
    assert Engine(model, processor()).share
    model.config.text_config.layer_types = ["sliding_attention"] * 3
    assert not Engine(model, processor()).share
