"""Which questions are answered together, what is prepared ahead, and what is done only once."""

import io
import math
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kd_bench.distill.models import load_model, load_processor
from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.evals import decoding, inputs
from kd_bench.evals.benchmark import Question, Settings
from kd_bench.evals.documents import Documents, _Images
from kd_bench.evals.engine import Engine, plan_groups
from tests.evals.test_engine import ask, facts
from tests.support.public_families import MODELS, save

TILED = "llava-next"
SHAPES = ((28, 28), (112, 56), (56, 112), (112, 112))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def of(family: str) -> tuple[Any, Any]:
        if family not in made:
            made[family] = save(tmp_path_factory.mktemp(family), family)
        return load_model(made[family]), load_processor(made[family])

    return of


def picture(number: int, shapes: int = 4) -> Image.Image:
    colour = (number * 37 % 256, number * 91 % 256, number * 13 % 256)
    return Image.new("RGB", SHAPES[number % shapes], colour)


def questions(count: int, an_image: int, shapes: int = 4) -> list[Question]:
    return [
        Question(
            number,
            "what is it? " + "red " * (number % 5),
            lambda image=number // an_image: [picture(image, shapes)],
            Settings(2),
            f"image {number // an_image}",
        )
        for number in range(count)
    ]


class Counts(Counter[str]):
    """Images in the tower and calls of it, image processors called, batches tried and failed."""

    def __init__(self, patch: pytest.MonkeyPatch, processor: Any, memory: float = math.inf) -> None:
        super().__init__()
        encode, decode = VisionLanguageModel.image_embeddings, decoding.Decoder.decode
        kind = type(processor.image_processor)
        prepare = kind.__call__

        def encoded(parts: Any, given: Any) -> Any:
            self["tower"] += 1
            return encode(parts, given)

        def decoded(decoder: Any, rows: Any, *more: Any) -> Any:
            self["tried"] += 1
            if sum(len(row.ids) for row in rows) > memory:
                self["failed"] += 1
                raise torch.OutOfMemoryError("out of memory")
            return decode(decoder, rows, *more)

        def prepared(image_processor: Any, *given: Any, **more: Any) -> Any:
            self["prepared"] += 1
            return prepare(image_processor, *given, **more)

        patch.setattr(VisionLanguageModel, "image_embeddings", encoded)
        patch.setattr(decoding.Decoder, "decode", decoded)
        patch.setattr(kind, "__call__", prepared)


def test_memory_for_twenty_questions_costs_few_failures_and_no_image_again(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = checkpoints(TILED)
    asked = questions(150, 1, shapes=1)
    expected = facts(ask(Engine(model, processor, batch_size=1, share=False), asked))
    counts = Counts(monkeypatch, processor, memory=20 * 30)
    found = ask(Engine(model, processor, batch_size=64), asked)
    assert facts(found) == expected
    assert 1 <= counts["failed"] <= math.log2(64)
    assert counts["tried"] < 20
    assert counts["prepared"] == 150
    assert counts["tower"] < 20  # one for many images


def test_a_halved_batch_is_remembered_by_later_calls(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = checkpoints(TILED)
    counts = Counts(monkeypatch, processor, memory=20 * 30)
    engine = Engine(model, processor)
    ask(engine, questions(150, 1, shapes=1))
    assert counts["failed"] > 0
    before = counts["failed"]
    ask(engine, questions(150, 1, shapes=1))
    assert counts["failed"] == before


def test_one_bad_question_does_not_make_later_batches_smaller(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = checkpoints(TILED)
    decode, sizes = decoding.Decoder.decode, []

    def poisoned(decoder: Any, rows: Any, *more: Any) -> Any:
        sizes.append(len(rows))
        if any(row.ids.count(model.config.image_token_id) > 60 for row in rows):
            raise RuntimeError("bad")
        return decode(decoder, rows, *more)

    monkeypatch.setattr(decoding.Decoder, "decode", poisoned)
    large = Question(
        99, "what?" * 60, lambda: [picture(3), picture(3), picture(3)], Settings(2), "x"
    )
    answers = ask(Engine(model, processor, batch_size=8), [large, *questions(31, 1, shapes=1)])
    assert [answer.index for answer in answers.values() if answer.status == "error"] == [99]
    assert sizes[-1] == 8


def test_a_batch_is_bounded_by_the_tokens_that_its_images_have(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiled image has up to 22 tokens here, one tile has 4: counted so, too many rows fitted."""
    model, processor = checkpoints(TILED)
    budget = 1 << 20
    engine = Engine(model, processor, budget_bytes=budget, share=False)
    seen = []
    batches = engine._batches(questions(40, 1))
    for ready, failed in batches:
        assert not failed
        assert engine.budget.need(ready) <= budget
        assert all(len(item.ids) == item.length > 8 for item in ready)
        seen.append(len(ready))
    assert sum(seen) == 40
    [whole, _] = next(Engine(model, processor, batch_size=64)._batches(questions(40, 1)))
    assert engine.budget.need(whole) > budget


def test_questions_are_asked_as_their_images_lie_in_the_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sorted by length alone, 40 row groups were read 189 times."""
    chance = random.Random(0)
    encoded = []
    for number in range(400):
        stream = io.BytesIO()
        picture(number, 1).save(stream, format="png")
        encoded += [stream.getvalue()] * 5
    file = tmp_path / "test-00000-of-00001.parquet"
    pq.write_table(pa.table({"image": pa.array(encoded, pa.binary())}), file, row_group_size=50)
    read: Counter[int] = Counter()
    read_group = _Images._read_group

    def counted(self: _Images, group: int) -> Any:
        read[group] += 1
        return read_group(self, group)

    monkeypatch.setattr(_Images, "_read_group", counted)
    table = pa.table({"question": [""] * 2000})
    documents = Documents(table, {"image": _Images([file], "image")})
    asked = [
        Question(
            number,
            "word " * chance.randrange(5, 18),
            lambda number=number: [documents[number]["image"]],
            Settings(1),
            f"image {number // 5}",
        )
        for number in range(2000)
    ]
    for group in plan_groups(asked, image_tokens=576):
        group[0].images()
    assert len(read) == 40
    assert read.total() == 40
    read.clear()
    for group in plan_groups(asked, image_tokens=16):  # hardly an image: two steps of length
        group[0].images()
    assert read.total() <= 2 * 40


def test_the_next_batch_is_prepared_while_one_is_answered(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = checkpoints(TILED)
    decode, prepare = decoding.Decoder.decode, inputs.GeneralRows.prepare
    prepared: list[int] = []
    threads = set()
    third = threading.Event()

    def watched(rows: Any, items: Any) -> Any:
        threads.add(threading.current_thread().name)
        prepared.extend(item.question.index for item in items)
        if len(prepared) > 8:
            third.set()
        return prepare(rows, items)

    def waiting(decoder: Any, rows: Any, *more: Any) -> Any:
        assert third.wait(20)  # the second batch is under way before the first was answered
        return decode(decoder, rows, *more)

    monkeypatch.setattr(inputs.GeneralRows, "prepare", watched)
    monkeypatch.setattr(decoding.Decoder, "decode", waiting)
    answers = Engine(model, processor, batch_size=8).answers(questions(40, 1, shapes=1))
    next(answers)
    assert len(prepared) < 40  # one batch ahead, no more
    assert len(list(answers)) == 4
    assert sorted(prepared) == list(range(40))
    assert threading.current_thread().name not in threads


GENERAL = sorted(set(MODELS) - {"llava", "paligemma", "paligemma2", "gemma3"})


@pytest.mark.parametrize("family", GENERAL)
def test_images_encoded_together_are_as_if_alone(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Images of four shapes, most of two tile counts; within float32 rounding."""
    model, processor = checkpoints(family)
    engine = Engine(model, processor)
    [(ready, _)] = engine._batches(questions(12, 1))
    rows = engine._rows.__self__
    with torch.inference_mode():
        alone = {item.key: rows._found([item], engine.device)[item.key] for item in ready}
        rows._features = inputs.Features(rows._model)
        counts = Counts(monkeypatch, processor)
        together = rows._found(ready, engine.device)
    assert together.keys() == alone.keys()
    assert len(together) == 12
    assert counts["tower"] <= 4
    for key, features in together.items():
        for one, other in zip(features, alone[key], strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["paligemma", "paligemma2", "gemma3"])
def test_generate_is_given_each_image_encoded_once(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model, processor = checkpoints(family)
    asked = questions(24, 8, shapes=1)
    alone = ask(Engine(model, processor, batch_size=1), asked)
    seen = [0]
    kind = type(model.model.vision_tower)
    forward = kind.forward

    def counted(self: Any, pixel_values: Any, *more: Any, **options: Any) -> Any:
        seen[0] += len(pixel_values)
        return forward(self, pixel_values, *more, **options)

    monkeypatch.setattr(kind, "forward", counted)
    found = ask(Engine(model, processor, batch_size=10), asked)
    assert seen[0] == 3
    assert facts(found) == facts(alone)
