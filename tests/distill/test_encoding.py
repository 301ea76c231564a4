"""Answers kept, all else masked; pictures one at a time and in bulk."""

import pytest
import torch

from kd_bench.distill.chat import shipped_template
from kd_bench.distill.conversations import read_conversations
from kd_bench.distill.data import Conversation, Turn, Unreadable
from kd_bench.distill.encoding import Encoder
from kd_bench.distill.recipe import DataSource
from kd_bench.errors import UsageError
from tests.support import tiny


@pytest.fixture(scope="module")
def processor():
    return tiny.processor()


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = tiny.write_data(tmp_path_factory.mktemp("data"), count=24)
    return read_conversations(DataSource(path=str(path)))[0]


def words(processor, ids):
    return processor.tokenizer.convert_ids_to_tokens(ids)


def test_answers_and_their_end_are_kept_and_all_else_is_masked(processor, conversations):
    sample = Encoder(processor).encode(conversations[0])
    assert " ".join(words(processor, sample["input_ids"])) == (
        "user : <image> <image> <image> <image> what colour is it ? assistant : red </s> "
        "user : say it assistant : red square </s>"
    )
    kept = sample["labels"] != -100
    assert words(processor, sample["input_ids"][kept]) == ["red", "</s>", "red", "square", "</s>"]
    assert torch.equal(sample["labels"][kept], sample["input_ids"][kept])
    assert sample["pixel_values"].shape == (1, 3, 16, 16)


def test_text_only_samples_carry_no_pixels(processor, conversations):
    sample = Encoder(processor).encode(conversations[3])
    assert set(sample) == {"input_ids", "labels"}
    kept = sample["input_ids"][sample["labels"] != -100]
    assert words(processor, kept) == ["yellow", "yellow", "</s>"]


def several(tmp_path):
    """Two pictures in two turns, an answer between them."""
    for name in ("red", "blue"):
        tiny.picture(name).save(tmp_path / f"{name}.png")
    turns = (
        Turn("user", (None, "what")),
        Turn("assistant", ("red",)),
        Turn("user", ("and", None, "it")),
        Turn("assistant", ("blue",)),
    )
    return Conversation("two", turns, (tmp_path / "red.png", tmp_path / "blue.png"))


def test_an_answer_between_two_pictures_is_kept(processor, tmp_path):
    sample = Encoder(processor).encode(several(tmp_path))
    kept = sample["input_ids"][sample["labels"] != -100]
    assert words(processor, kept) == ["red", "</s>", "blue", "</s>"]
    assert sample["pixel_values"].shape[0] == 2
    assert (sample["input_ids"] == 2).sum() == 8


def test_one_at_a_time_by_marks_and_in_bulk_are_the_same(processor, conversations, tmp_path):
    both = [*conversations, several(tmp_path)]
    bulk = Encoder(processor)
    bulk.encode_many(both[:2])  # learns how many tokens a picture has
    made = bulk.encode_many(both)
    marked_processor = tiny.processor()
    marked_processor.chat_template = tiny.TEMPLATE.replace(
        "{% for p in m['content'] %}",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'][0]['text'] + '</s>' }}"
        "{% endgeneration %}{% else %}{% for p in m['content'] %}",
    ).replace(
        "{% endfor %}{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{{ ' ' }}",
        "{% endfor %}{% endif %}{{ ' ' }}",
    )
    marked = Encoder(marked_processor)
    for conversation, sample in zip(both, made, strict=True):
        single = Encoder(processor)
        single.plain_images = False  # by the processor's own expansion
        for other in (single.encode(conversation), marked.encode(conversation)):
            assert other.keys() == sample.keys()
            assert all(torch.equal(other[name], sample[name]) for name in sample)


def test_too_long_loses_its_end_or_is_given_up(processor, conversations):
    sample = Encoder(processor, max_length=16).encode(conversations[0])
    assert len(sample["input_ids"]) == 16
    kept = sample["input_ids"][sample["labels"] != -100]
    assert words(processor, kept) == ["red", "</s>"]
    with pytest.raises(Unreadable, match="no answer within max_length=12"):
        Encoder(processor, max_length=12).encode(conversations[0])
    with pytest.raises(Unreadable, match="an image lies beyond"):
        Encoder(processor, max_length=4).encode(conversations[0])


def test_a_template_that_turns_its_prompt_around_is_refused(conversations):
    processor = tiny.processor()
    processor.chat_template = tiny.TEMPLATE.replace("assistant : {% endif %}", "think {% endif %}")
    with pytest.raises(UsageError, match="generation prompt"):
        Encoder(processor).encode(conversations[0])


def test_tinyllavas_prompt_to_the_letter(conversations):
    processor = tiny.processor()
    processor.chat_template = shipped_template("tinyllava")
    messages = conversations[0].messages
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
    )
    first = "USER: <image>\nwhat colour is it ? ASSISTANT:"
    assert processor.apply_chat_template(messages[:1], add_generation_prompt=True) == system + first
    whole = f"{first} red</s>USER: say it ASSISTANT: red square</s>"
    assert processor.apply_chat_template(messages) == system + whole
    chat = Encoder(processor).chat
    turns = chat.turns(messages)
    assert turns.prompt == system + first
    assert [answer + chat.stop for answer in turns.answers] == [" red</s>", " red square</s>"]
    assert turns.between == ("USER: say it ASSISTANT:",)
