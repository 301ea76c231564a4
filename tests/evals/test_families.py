"""Every family: shared prefixes and batches give what `generate` gives one by one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.errors import UsageError
from kd_bench.evals import decoding
from kd_bench.evals.benchmark import Question, Settings
from kd_bench.evals.decoding import Constraints, Decoder, PlainDecoder
from kd_bench.evals.engine import Engine, MemoryBudget, path_of
from kd_bench.evals.inputs import Ready, row_of
from tests.support.eval_world import processor
from tests.support.tiny_families import (
    FAMILIES,
    IMAGE,
    TEXT,
    batch_for,
    kinds_for,
    make,
    text_batch,
)

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


CONSTRAINTS: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 1.8},
    "ngrams": {"no_repeat_ngram_size": 1, "min_new_tokens": 4},
    "words": {"suppress_tokens": list(range(3, 99, 3)), "min_length": 20},
    "several": {
        "repetition_penalty": 0.7,
        "bad_words_ids": [[11], [12, 13]],
        "sequence_bias": [[[14], 3.0]],
        "exponential_decay_length_penalty": [2, 1.5],
        "begin_suppress_tokens": [75, 54],
        "forced_eos_token_id": 2,
    },
}


KINDS_OF = {family: ["several"] for family in FAMILIES.keys() - BY_GENERATE}
KINDS_OF["qwen2.5-vl"] = sorted(CONSTRAINTS)


@pytest.mark.parametrize(
    "family,kind", [(family, kind) for family in sorted(KINDS_OF) for kind in KINDS_OF[family]]
)
def test_generation_settings_count_as_in_generate(family: str, kind: str) -> None:
    model = make(family)
    model.generation_config.update(eos_token_id=2, pad_token_id=2, **CONSTRAINTS[kind])
    parts = VisionLanguageModel(model)
    pixels, tokens = one_picture(family, model)
    asked = prompts(family, pixels, tokens)
    embed = model.get_input_embeddings()
    expected, rows = [], []
    with torch.inference_mode():
        for inputs in asked:
            out = model.generate(**inputs, max_new_tokens=GENERATED, do_sample=False)
            expected.append(out[0, inputs["input_ids"].shape[1] :].tolist())
            features = parts.image_embeddings(inputs)
            rows.append(row_of(parts, embed, inputs, features, "picture"))
    constraints = Constraints(model.generation_config, [2], torch.device("cpu"))
    assert constraints.settings == CONSTRAINTS[kind]
    decoder = Decoder(parts.language_model, parts.lm_head, embed, NoStops(), [2], constraints)
    assert [d.tokens for d in decoder.decode(rows, Settings(GENERATED))] == expected
    free = Decoder(parts.language_model, parts.lm_head, embed, NoStops(), [2])
    assert [d.tokens for d in free.decode(rows, Settings(GENERATED))] != expected


def written(prompts: list[str]) -> dict[str, Tensor]:
    """In place of a processor: the token ids that stand in the prompt, padded in front."""
    ids = [[int(word) for word in prompt.split()] for prompt in prompts]
    longest = max(len(row) for row in ids)
    padded = [[2] * (longest - len(row)) + row for row in ids]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


# The padding token is also the end, as in many checkpoints.
WRITTEN: Any = SimpleNamespace(pad_token_id=2, decode=lambda tokens, **_: str(tokens))


@pytest.mark.parametrize("kind", sorted(CONSTRAINTS))
def test_padding_is_no_token_where_generate_itself_decodes(kind: str) -> None:
    model = make("llava-siglip")
    model.generation_config.update(eos_token_id=2, pad_token_id=2, **CONSTRAINTS[kind])
    constraints = Constraints(model.generation_config, [2], torch.device("cpu"))
    decoder = PlainDecoder(model, WRITTEN, [2], constraints)
    prompts = ["5 6 7", "9 10 11 12 13 14 15 16", "30"]
    together = [found.tokens for found in decoder.decode(written(prompts), Settings(8))]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([[int(word) for word in prompt.split()]])
        out = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        expected.append(out[0, ids.shape[1] :].tolist())
    assert together == expected
    assert model.generation_config.to_dict().items() >= CONSTRAINTS[kind].items()


def test_a_generation_setting_without_sense_is_named() -> None:
    config = GenerationConfig(no_repeat_ngram_size="two")
    with pytest.raises(UsageError, match=r"no_repeat_ngram_size 'two' cannot be used"):
        Constraints(config, [2], torch.device("cpu"))


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava-siglip"])
def test_a_batch_may_mix_rows_with_pictures_and_without(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three axes of positions in one part of a batch, one in the other."""
    monkeypatch.setattr(decoding, "PREFILL_ROWS", {"cpu": 2})
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
            rows.append(decoding.Row(words.tolist(), embed(words), torch.arange(len(words))[None]))
    decoder = Decoder(parts.language_model, parts.lm_head, embed, NoStops(), [2])
    settings = Settings(GENERATED)
    alone = [decoder.decode([row], settings)[0].tokens for row in rows]
    assert [found.tokens for found in decoder.decode(rows, settings)] == alone


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_path_of_each_family_is_stated(family: str) -> None:
    path = path_of(VisionLanguageModel(make(family)))
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

    def prompts(number: int, words: int, new_tokens: int) -> list[Ready]:
        asked = Question(0, "", lambda: [], Settings(new_tokens))
        return [Ready(asked, [], "", range(words)) for _ in range(number)]

    def rows(budget: MemoryBudget, words: int, new_tokens: int = 16) -> int:
        """The most that fit."""
        fitting = [n for n in range(1, 99) if budget.fits(prompts(n, words, new_tokens))]
        return max(fitting)

    short, long = 80, 600
    most = {
        size: rows(MemoryBudget(model, budget_bytes=size), short) for size in (1, 1 << 20, 1 << 30)
    }
    assert most[1] == 1
    assert most[1] <= most[1 << 20] <= most[1 << 30] == 64
    budget = MemoryBudget(model, budget_bytes=4 << 20)
    assert rows(budget, long) < rows(budget, short)
    assert rows(budget, short, 1024) < rows(budget, short)


def test_a_language_model_with_windows_is_not_shared() -> None:
    model = make("llava-siglip")
    assert Engine(model, processor()).share
    model.config.text_config.layer_types = ["sliding_attention"] * 3
    assert not Engine(model, processor()).share
