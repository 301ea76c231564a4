"""Answers do not depend on batch size, sharing or neighbours, and nothing is lost on the way."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from kd_bench.distill.vision_language import VisionLanguageModel
from kd_bench.evals import decoding
from kd_bench.evals.benchmark import PLACEHOLDER, Answer, Question, Settings
from kd_bench.evals.engine import Engine, fill_batches, plan_groups
from kd_bench.evals.inputs import FixedRows, ImageStore, PromptBuilder, Ready
from tests.support.eval_world import processor, talker

SHORT = Settings(24, ("\n\n",))
WORDS = (
    "what", "colour", "is", "the", "big", "red", "square", "left", "of", "two", "small", "blue",
    "circles", "in", "the", "image",
)  # fmt: skip


def picture(number: int) -> Image.Image:
    drawn = Image.new("RGB", (48, 48), (number * 53 % 256, number * 97 % 256, 90))
    shape = (number * 7 % 30, number * 11 % 30)
    ImageDraw.Draw(drawn).rectangle((*shape, shape[0] + 15, shape[1] + 15), (255, 255, number))
    return drawn


def question(index: int, image: int, words: int, settings: Settings = SHORT) -> Question:
    text = " ".join(WORDS[(index + place) % len(WORDS)] for place in range(words)) + "?"
    return Question(index, text, lambda: [picture(image)], settings, f"picture {image}")


def questions(count: int = 60) -> list[Question]:
    """Several questions a picture, lengths from none to long, two settings."""
    settings = (SHORT, Settings(5, ("the",)))
    return [
        question(index, index * 5 % 11, (index * 13) % 37, settings[index % 7 == 0])
        for index in range(count)
    ]


def ask(engine: Engine, asked: Sequence[Question]) -> dict[int, Answer]:
    return {answer.index: answer for batch in engine.answers(asked) for answer in batch}


def facts(answers: dict[int, Answer]) -> dict[int, tuple[Any, ...]]:
    """What must be equal; probabilities differ in the last digits."""
    return {i: (a.text, a.status, a.tokens, a.image_digest) for i, a in answers.items()}


@pytest.fixture(scope="module")
def model() -> Any:
    return talker()


@pytest.fixture(scope="module")
def one_by_one(model: Any) -> dict[int, Answer]:
    return ask(Engine(model, processor(), batch_size=1, share=False), questions())


@pytest.mark.slow
def test_reference_is_worth_comparing_with(one_by_one: dict[int, Answer]) -> None:
    assert len({answer.text for answer in one_by_one.values()}) > 20
    assert {answer.status for answer in one_by_one.values()} >= {"ok", "truncated"}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("batch_size", [1, 8, 16, 64])
@pytest.mark.slow
def test_answers_equal_batch_one(
    model: Any, one_by_one: dict[int, Answer], batch_size: int, share: bool
) -> None:
    engine = Engine(model, processor(), batch_size=batch_size, share=share)
    answers = ask(engine, questions())
    assert facts(answers) == facts(one_by_one)
    for index, answer in answers.items():
        assert answer.confidence == pytest.approx(one_by_one[index].confidence, abs=2e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.slow
def test_prefilling_a_few_rows_at_a_time_changes_nothing(
    model: Any,
    one_by_one: dict[int, Answer],
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "PREFILL_ROWS", {"cpu": rows})
    for share in (False, True):
        answers = ask(Engine(model, processor(), batch_size=64, share=share), questions())
        assert facts(answers) == facts(one_by_one)


@pytest.mark.slow
def test_answers_equal_generate_of_transformers(model: Any, one_by_one: dict[int, Answer]) -> None:
    for asked in questions()[:12]:
        content = [{"type": "image"}, {"type": "text", "text": asked.text}]
        text = processor().apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor()(text=text, images=asked.images(), return_tensors="pt")
        cap = asked.settings.max_new_tokens
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=cap, do_sample=False)
        said = processor().tokenizer.decode(
            ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for stop in asked.settings.until:
            said = said.split(stop)[0]
        assert one_by_one[asked.index].text == said.strip()


def test_each_picture_is_encoded_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, seen = VisionLanguageModel.image_embeddings, []

    def counted(self: VisionLanguageModel, inputs: Any) -> Any:
        seen.append(len(inputs["pixel_values"]))
        return encode(self, inputs)

    monkeypatch.setattr(VisionLanguageModel, "image_embeddings", counted)
    ask(Engine(model, processor(), batch_size=4), questions())
    assert sum(seen) == 11


def test_pictures_inside_the_question_stand_where_they_are_named(model: Any) -> None:
    def of(*numbers: int) -> Any:
        return lambda: [picture(number) for number in numbers]

    text = f"is {PLACEHOLDER} the same shape {PLACEHOLDER} or not?"
    asked = [
        Question(0, text, of(1, 2), SHORT, "a"),
        Question(1, text, of(2, 1), SHORT, "b"),
        Question(2, "no picture at all", lambda: [], SHORT),
        Question(3, f"two in front, none named {PLACEHOLDER}", of(3, 4), SHORT),
    ]
    engine = Engine(model, processor(), batch_size=4)
    parts, prompts, store = VisionLanguageModel(model), PromptBuilder(processor()), ImageStore()
    ready = []
    for question in asked:
        images = store.prepared(question.image_key, question.images, processor().image_processor)
        ready.append(Ready(question, images, prompts.render(question.text, len(images))))
    with torch.inference_mode():
        fixed = FixedRows(parts, prompts, model.get_input_embeddings())
        rows = fixed.rows(fixed.prepare(ready))
    image, each = parts.image_token_id, parts.image_token_count
    for row, pictures in zip(rows, (2, 2, 0, 2), strict=True):
        assert list(row.ids).count(image) == pictures * each
    ids = list(rows[0].ids)
    first, last = ids.index(image), len(ids) - 1 - ids[::-1].index(image)
    between = [token for token in ids[first:last] if token != image]
    assert processor().tokenizer.decode(between).split() == ["the", "same", "shape"]
    assert not torch.equal(rows[0].embeddings, rows[1].embeddings)
    alone = ask(Engine(model, processor(), batch_size=1, share=False), asked)
    assert facts(ask(engine, asked)) == facts(alone)


def test_inputs_are_not_changed(model: Any) -> None:
    asked = questions(20)
    before = list(asked)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ask(Engine(model, processor()), asked)
    assert asked == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_stop_string_cuts_and_finishes(model: Any, one_by_one: dict[int, Answer]) -> None:
    long = max(one_by_one.values(), key=lambda answer: len(answer.text))
    words = long.text.split()
    stop = next(word for word in words[2:] if word not in words[:2] and not words[0].endswith(word))
    asked = questions()[long.index]
    cut = Question(0, asked.text, asked.images, Settings(24, (stop,)), asked.image_key)
    answer = ask(Engine(model, processor()), [cut])[0]
    assert stop not in answer.text
    assert long.text.startswith(answer.text)
    assert answer.status == "ok"
    assert answer.tokens < long.tokens


def test_an_unreadable_picture_is_a_counted_error(model: Any) -> None:
    def broken() -> list[Image.Image]:
        raise OSError("image file is truncated")

    asked = [*questions(6), Question(6, "what?", broken, SHORT, "broken")]
    answers = ask(Engine(model, processor()), asked)
    assert answers[6].status == "error"
    assert answers[6].error == "OSError: image file is truncated"
    assert answers[6].text == ""
    assert all(answers[index].status != "error" for index in range(6))


def test_out_of_memory_at_any_batch_gives_the_same_answers(
    model: Any, one_by_one: dict[int, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = decoding.Decoder.decode

    def small_memory(self: Any, rows: Any, settings: Any, share: bool) -> Any:
        if len(rows) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return decode(self, rows, settings, share)

    monkeypatch.setattr(decoding.Decoder, "decode", small_memory)
    engine = Engine(model, processor(), batch_size=32)
    assert facts(ask(engine, questions())) == facts(one_by_one)


def test_a_failing_question_does_not_cost_its_neighbours(
    model: Any, one_by_one: dict[int, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = FixedRows.rows

    def poisoned(self: FixedRows, ready: Any) -> Any:
        if any(item.question.index == 17 for item in ready):
            raise RuntimeError("device-side assert")
        return rows(self, ready)

    monkeypatch.setattr(FixedRows, "rows", poisoned)
    answers = facts(ask(Engine(model, processor(), batch_size=32), questions()))
    assert answers.pop(17)[1] == "error"
    expected = facts(one_by_one)
    del expected[17]
    assert answers == expected


def test_batches_hold_equal_settings_and_whole_pictures() -> None:
    groups = [
        [Ready(asked, [], "") for asked in group]
        for group in plan_groups(questions(), image_tokens=16)
    ]
    planned = [
        [item.question for item in batch]
        for batch in fill_batches(groups, lambda batch: len(batch) <= 16)
    ]
    seen = []
    for batch in planned:
        assert 0 < len(batch) <= 16
        assert {asked.settings for asked in batch} == {batch[0].settings}
        seen += [asked.index for asked in batch]
    assert sorted(seen) == list(range(60))
    batches = [batch for batch in planned if batch[0].settings == SHORT]
    homes = [{asked.image_key for asked in batch} for batch in batches]
    assert sum(map(len, homes)) == 11


def odd_pictures() -> dict[str, Image.Image]:
    turned = Image.new("RGB", (30, 10), (200, 10, 10))
    turned.getexif()[0x0112] = 6
    return {
        "one pixel": Image.new("RGB", (1, 1)),
        "very wide": Image.new("RGB", (10_000, 10), (9, 9, 9)),
        "cmyk": Image.new("CMYK", (20, 20), (10, 20, 30, 40)),
        "palette": Image.new("P", (20, 20), 3),
        "alpha": Image.new("RGBA", (20, 20), (1, 2, 3, 100)),
        "grey": Image.new("L", (20, 20), 77),
        "turned": turned,
    }


@pytest.mark.parametrize("name", sorted(odd_pictures()))
def test_odd_pictures_and_empty_questions_are_answered(model: Any, name: str) -> None:
    odd = odd_pictures()[name]
    answer = ask(Engine(model, processor()), [Question(0, "", lambda: [odd], SHORT)])[0]
    assert answer.status != "error"
    assert answer.image_digest
