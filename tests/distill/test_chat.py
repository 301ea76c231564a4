"""Every family's public template with three kinds of tokenizer, on ids.

Learnt: the answer and its stop token, no more. Asked: what evaluation asks.
"""

import io
from typing import Any

import pytest

from kd_bench.distill.chat import TEMPLATES, ChatFormat, read_template, use_template
from kd_bench.distill.data import Conversation, Turn, Unreadable
from kd_bench.distill.encoding import Encoder
from kd_bench.errors import UsageError
from kd_bench.evals.inputs import PromptBuilder
from tests.support import chat_templates as public
from tests.support import tiny
from tests.support.chat_templates import PUBLIC, TOKENIZERS

FIRST, SECOND = "Yes, a red harbour", "Two"
QUESTION, FOLLOWING = "What is shown here?", "and how many boats?"


def encoded_image(colour: str = "red", size: tuple[int, int] = (70, 40)) -> bytes:
    buffer = io.BytesIO()
    public.image(colour, size).save(buffer, "png")
    return buffer.getvalue()


def conversation(*turns: tuple[Any, ...], images: int = 0) -> Conversation:
    """Turns by turns: what the user says (None is an image), what the assistant answers."""
    made = [Turn("assistant" if i % 2 else "user", turn) for i, turn in enumerate(turns)]
    return Conversation("x", tuple(made), tuple(encoded_image() for _ in range(images)))


@pytest.fixture(params=TOKENIZERS, scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(PUBLIC), scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def processor(family: str, kind: str) -> Any:
    return PUBLIC[family].processor(kind)


def asked(processor: Any, messages: list[dict[str, Any]], images: int) -> list[int]:
    """Ids of a prompt, by transformers alone."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if template is None:
        texts = [part.get("text", "<image>") for part in messages[0]["content"]]
        text = "".join(texts)
    else:
        if template in (public.QWEN3, public.OWN_STRING):
            messages = [
                {**m, "content": "".join(p.get("text", "<image>\n") for p in m["content"])}
                for m in messages
            ]
        text = processor.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True
        )
    given: dict[str, Any] = {"text": [text]}
    if images:
        given["images"] = [[public.image() for _ in range(images)]]
    begins = text.startswith(processor.tokenizer.bos_token)
    ids = processor(**given, add_special_tokens=not begins)["input_ids"][0]
    return list(ids)


def learnt(sample: Any) -> list[int]:
    return list(sample["input_ids"][sample["labels"] != -100].tolist())


def before_answer(sample: Any, number: int = 0) -> list[int]:
    """Ids in front of the answer with that number."""
    marks = (sample["labels"] != -100).tolist()
    starts = [i for i, mark in enumerate(marks) if mark and not marks[i - 1]]
    return list(sample["input_ids"][: starts[number]].tolist())


def check_answers(family: str, processor: Any, ids: list[int], *answers: str) -> None:
    """The ids are these answers, each with its stop token."""
    stop = processor.tokenizer.convert_tokens_to_ids(PUBLIC[family].stop)
    space = " " if PUBLIC[family].space else ""
    for answer in answers:
        end = ids.index(stop)
        assert processor.tokenizer.decode(ids[:end]) == space + answer
        ids = ids[end + 1 :]
    assert ids == []


def test_one_question_about_one_image(family: str, processor: Any) -> None:
    said = conversation((None, QUESTION), (FIRST,), images=1)
    encoder = Encoder(processor)
    sample = encoder.encode(said)
    check_answers(family, processor, learnt(sample), FIRST)
    assert before_answer(sample) == asked(processor, said.messages[:1], 1)
    again = encoder.encode(said)  # LLaVA's quick way, known from the second sample on
    assert again["input_ids"].tolist() == sample["input_ids"].tolist()
    assert again["labels"].tolist() == sample["labels"].tolist()


def test_evaluation_sends_the_prompt_that_was_learnt(family: str, processor: Any) -> None:
    said = conversation((None, QUESTION), (FIRST,), images=1)
    sample = Encoder(processor).encode(said)
    prompts = PromptBuilder(processor)
    text = prompts.render(QUESTION, 1)
    if type(processor).__name__ == "LlavaProcessor":
        image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
        count = sample["input_ids"].tolist().count(image_id)
        ids = prompts.encode([text], [[count]])[0]
    else:
        ids = prompts.processed([text], [[public.image()]])["input_ids"][0].tolist()
    assert before_answer(sample) == ids
    assert prompts.stop_ids == learnt(sample)[-1:]


def test_the_answer_is_tokenised_as_the_text_behind_the_prompt(family: str, processor: Any) -> None:
    """Where no token reaches over the prompt's end, the ids are those of the whole text."""
    said = conversation((None, QUESTION), (FIRST,), images=1)
    chat = ChatFormat(processor)
    prompt = chat.prompt(said.messages[:1]) + ("\n" if chat.plain else "")
    space = " " if PUBLIC[family].space else ""
    ask = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = processor.tokenizer(prompt + space + FIRST, add_special_tokens=False)["input_ids"]
    if whole[: len(ask)] != ask:
        assert family == "llava, prompt ends in a space"
        return
    assert learnt(Encoder(processor).encode(said))[:-1] == whole[len(ask) :]


def test_several_turns(family: str, processor: Any) -> None:
    said = conversation((None, QUESTION), (FIRST,), (FOLLOWING,), (SECOND,), images=1)
    encoder = Encoder(processor)
    sample = encoder.encode(said)
    if family == "paligemma":  # one question, one answer
        check_answers(family, processor, learnt(sample), FIRST)
        assert encoder.left_out == 1
        return
    if PUBLIC[family].rewrites:
        check_answers(family, processor, learnt(sample), SECOND)
        assert encoder.left_out == 1
        assert before_answer(sample) == asked(processor, said.messages[:3], 1)
        return
    check_answers(family, processor, learnt(sample), FIRST, SECOND)
    assert before_answer(sample) == asked(processor, said.messages[:1], 1)
    assert encoder.left_out == 0
    if processor.chat_template != public.LLAVA:  # which writes no end behind the first answer
        assert before_answer(sample, 1) == asked(processor, said.messages[:3], 1)


def test_a_second_image_in_a_later_turn(family: str, processor: Any) -> None:
    if family == "paligemma":
        pytest.skip("one question, one answer")
    said = conversation((None, QUESTION), (FIRST,), (None, FOLLOWING), (SECOND,), images=2)
    encoder = Encoder(processor)
    for _ in range(2):  # the second time by LLaVA's quick way
        sample = encoder.encode(said)
        rewritten = PUBLIC[family].rewrites
        check_answers(family, processor, learnt(sample), *([] if rewritten else [FIRST]), SECOND)
        if processor.chat_template != public.LLAVA:
            assert before_answer(sample, -1) == asked(processor, said.messages[:3], 2)


def test_two_images_in_one_question(family: str, processor: Any) -> None:
    said = conversation((None, None, QUESTION), (FIRST,), images=2)
    sample = Encoder(processor).encode(said)
    check_answers(family, processor, learnt(sample), FIRST)
    assert before_answer(sample) == asked(processor, said.messages[:1], 2)


def test_text_alone(family: str, processor: Any) -> None:
    said = conversation((QUESTION,), (FIRST,))
    if family == "paligemma":
        with pytest.raises(Unreadable, match="no question without an image"):
            Encoder(processor).encode(said)
        return
    sample = Encoder(processor).encode(said)
    check_answers(family, processor, learnt(sample), FIRST)
    assert before_answer(sample) == asked(processor, said.messages[:1], 0)


def test_thoughts_that_the_template_drops_are_learnt_in_the_last_turn_only(kind: str) -> None:
    processor = PUBLIC["llava, qwen3"].processor(kind)
    first, second = "<think>\nred\n</think>\n\nYes", "<think>\nblue\n</think>\n\nNo"
    said = conversation((None, QUESTION), (first,), (FOLLOWING,), (second,), images=1)
    encoder = Encoder(processor)
    sample = encoder.encode(said)
    check_answers("llava, qwen3", processor, learnt(sample), second)
    assert before_answer(sample) == asked(processor, said.messages[:3], 1)
    assert encoder.left_out == 1


def test_an_answer_with_space_around_it(family: str, processor: Any) -> None:
    """The data's own words, unless the template trims them: then it would be asked otherwise."""
    said = conversation((None, QUESTION), (f"  {FIRST}\n",), images=1)
    trims = family in ("gemma3", "llava, llama 3")
    check = FIRST if trims else f"  {FIRST}\n"
    check_answers(family, processor, learnt(Encoder(processor).encode(said)), check)


@pytest.mark.parametrize(
    "template,reason",
    [
        ("{{ messages[0]['content'][1]['text'] }}", "writes 0 places for one image"),
        ("{{ '<image>' }}", "leaves out what is said"),
        ("{{ raise_exception('none of it') }}", "none of it"),
        ("{% for", "refuses it"),
    ],
)
def test_templates_that_cannot_be_used(kind: str, template: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        ChatFormat(public.PUBLIC["llava-1.5"].make(kind, template))


def test_where_nothing_can_end_an_answer_it_is_refused(kind: str) -> None:
    processor = PUBLIC["llava-1.5"].processor(kind)
    processor.tokenizer.eos_token = None
    with pytest.raises(UsageError, match="could not learn to stop"):
        ChatFormat(processor)
    processor.chat_template = public.ONEVISION  # brings its own end
    assert ChatFormat(processor).stop == "<|im_end|>"


def test_two_prompts_are_both_shown(kind: str) -> None:
    template = public.ONEVISION.replace("'<|im_start|>assistant\n'", "'<|im_start|>model\n'")
    with pytest.raises(UsageError, match=r"assistant\\n' against .*model\\n'"):
        ChatFormat(PUBLIC["llava-1.5"].make(kind, template))


def test_the_tokenizers_template_stands_in(family: str, kind: str) -> None:
    processor = PUBLIC[family].processor(kind)
    if processor.chat_template is None:
        return
    said = conversation((None, QUESTION), (FIRST,), images=1)
    expected = Encoder(processor).encode(said)["input_ids"].tolist()
    processor.tokenizer.chat_template = processor.chat_template
    processor.chat_template = None
    assert Encoder(processor).encode(said)["input_ids"].tolist() == expected


def test_without_a_template_only_paligemma_has_a_form_of_its_own(family: str, kind: str) -> None:
    processor = PUBLIC[family].processor(kind)
    processor.chat_template = None
    if family == "paligemma":
        sample = Encoder(processor).encode(conversation((None, QUESTION), (FIRST,), images=1))
        names = processor.tokenizer.convert_ids_to_tokens(sample["input_ids"])
        assert names[:5] == ["<image>"] * 4 + ["<s>"]
        assert processor.tokenizer.decode(before_answer(sample)[5:]).strip(" ") == QUESTION + "\n"
        causal = sample["token_type_ids"].bool()
        assert causal.tolist() == (sample["labels"] != -100).tolist()
        return
    with pytest.raises(UsageError, match=r"has no chat template.*--prompt-template"):
        Encoder(processor)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_template_by_name(family: str, kind: str, name: str) -> None:
    processor = PUBLIC[family].processor(kind)
    use_template(processor, name)
    chat = ChatFormat(processor)
    prompt = chat.prompt(conversation((None, QUESTION), images=0).messages)
    image = processor.image_token
    assert (
        prompt
        == {
            "llava": f"USER: {image}\n{QUESTION} ASSISTANT:",
            "chatml": f"<|im_start|>user\n{image}\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
            "plain": f"{image}\n{QUESTION}\n",
        }[name]
    )
    eos = processor.tokenizer.eos_token
    assert chat.stop == ("<|im_end|>" if name == "chatml" else eos)


def test_a_template_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"no prompt template 'chatnl'\. Did you mean 'chatml'\?"):
        read_template("chatnl")


@pytest.mark.parametrize("text", ["Yes</s>", "Yes <|im_end|> no", "", "  \n", "see <image>"])
def test_an_answer_that_would_mislead_is_unreadable(kind: str, text: str) -> None:
    family = "llava, chatml of its own string" if "im_end" in text else "llava-1.5"
    with pytest.raises(Unreadable, match="an answer"):
        Encoder(PUBLIC[family].processor(kind)).encode(conversation((QUESTION,), (text,)))


def test_an_images_mark_in_the_text_is_unreadable(kind: str) -> None:
    processor = PUBLIC["qwen2.5-vl"].processor(kind)
    said = conversation((None, "what is <|image_pad|>?"), (FIRST,), images=1)
    with pytest.raises(Unreadable, match=r"holds <\|image_pad\|>, the mark of an image"):
        Encoder(processor).encode(said)


def test_evaluation_says_which_images_belong_together(family: str, processor: Any) -> None:
    """LLaVA-OneVision does not tile the images of a question that has several."""
    said = conversation((None, None, QUESTION), (FIRST,), images=2)
    sample = Encoder(processor).encode(said)
    prompts = PromptBuilder(processor)
    both = [public.image(), public.image()]
    made = prompts.processed([prompts.render(QUESTION, 2)], [both])
    assert made["input_ids"][0].tolist() == before_answer(sample)
    if family == "llava-onevision":
        alone = prompts.processed([prompts.render(QUESTION, 1)], [both[:1]])
        image_id = processor.image_token_id
        # 4 tokens and a line's end each, against the tiles of one image alone.
        assert made["input_ids"][0].tolist().count(image_id) == 10
        assert alone["input_ids"][0].tolist().count(image_id) > 10


def test_what_follows_the_last_answer_is_left_out_with_its_images(
    family: str, processor: Any
) -> None:
    whole = conversation((None, QUESTION), (FIRST,), (None, FOLLOWING), images=2)
    alone = conversation((None, QUESTION), (FIRST,), images=1)
    for _ in range(2):  # the second time by LLaVA's quick way
        encoder = Encoder(processor)
        encoder.encode(alone)
        made, expected = encoder.encode_many([whole, alone])
        assert not isinstance(made, Unreadable)
        assert not isinstance(expected, Unreadable)
        assert made.keys() == expected.keys()
        assert all(made[name].tolist() == expected[name].tolist() for name in made)
        assert encoder.images_left_out == 1


def test_paligemma_learns_the_first_turn_and_counts_the_rest(kind: str) -> None:
    said = conversation((None, QUESTION), (FIRST,), (None, FOLLOWING), (SECOND,), images=2)
    encoder = Encoder(PUBLIC["paligemma"].processor(kind))
    check_answers("paligemma", encoder.processor, learnt(encoder.encode(said)), FIRST)
    assert (encoder.left_out, encoder.images_left_out) == (1, 1)


def test_fewer_images_than_places_are_a_reason(kind: str) -> None:
    encoder = Encoder(PUBLIC["llava-1.5"].processor(kind))
    encoder.encode(conversation((None, QUESTION), (FIRST,), images=1))
    said = conversation((None, None, QUESTION), (FIRST,), images=1)
    with pytest.raises(Unreadable, match="2 places for 1 images"):
        encoder.encode(said)


@pytest.mark.parametrize("token", ["</s>", "<unk>", "<|im_start|>"])
def test_a_control_token_in_the_text_is_named(kind: str, token: str) -> None:
    processor = PUBLIC["llava, chatml of its own string"].processor(kind)
    processor.tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )
    for turns in (((f"a {token}",), (FIRST,)), ((QUESTION,), (f"b{token}",))):
        with pytest.raises(Unreadable, match=f"holds {token.replace('|', '.')}"):
            Encoder(processor).encode(conversation(*turns))


def with_system(template: str) -> str:
    """LLaVA-OneVision's turns behind a system message that this template writes."""
    rest = "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}"
    return template + rest + TEMPLATES["chatml"]


def chatml(kind: str, template: str) -> Any:
    processor = PUBLIC["llava, chatml of its own string"].make(kind, template)
    processor.tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return processor


@pytest.mark.parametrize("wrapped", ["{{ messages[0]['content'] | trim }}", ""])
def test_a_system_text_is_written_as_text_or_the_row_is_refused(kind: str, wrapped: str) -> None:
    system = "{% if messages[0]['role'] == 'system' %}" + wrapped + "{% endif %}"
    encoder = Encoder(chatml(kind, with_system(system)))
    plain = conversation((None, QUESTION), (FIRST,), images=1)
    said = Conversation("x", (Turn("system", ("Be brief.",)), *plain.turns), plain.images)
    encoder.encode(plain)
    if not wrapped:
        with pytest.raises(Unreadable, match="leaves out its system text"):
            encoder.encode(said)
        return
    check = encoder.chat.prompt(said.messages[:2])
    assert check == "Be brief." + encoder.chat.prompt(plain.messages[:1])
    encoder.encode(said)


@pytest.mark.parametrize(
    "change",
    [
        ("{% if add_generation_prompt %}", "{% if false %}"),
        ("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif"),
    ],
)
def test_a_prompt_that_answered_turns_do_not_have_is_refused(
    kind: str, change: tuple[str, str]
) -> None:
    template = TEMPLATES["chatml"].replace(*change)
    assert template != TEMPLATES["chatml"]
    with pytest.raises(UsageError, match="otherwise than its generation prompt"):
        ChatFormat(chatml(kind, template))
    asked = PromptBuilder(chatml(kind, template))  # a thinking model can be evaluated
    assert "What?" in asked.render("What?", 1)
    assert asked.stop == "<|im_end|>"
    if "think" in change[1]:
        assert asked.render("What?", 1).endswith("assistant\n<think>\n")


def test_an_end_that_stands_between_turns_alone_is_learnt(kind: str) -> None:
    ended = "{{ '<|im_end|>\n' }}{% endfor %}"
    last = "{% if not loop.last or m_last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    last = last.replace("m_last", "message['role'] == 'user'")
    encoder = Encoder(chatml(kind, TEMPLATES["chatml"].replace(ended, last)))
    assert encoder.chat.stop == "<|im_end|>"
    sample = encoder.encode(conversation((QUESTION,), (FIRST,), (FOLLOWING,), (SECOND,)))
    names = encoder.processor.tokenizer.convert_ids_to_tokens(sample["input_ids"])
    assert names.count("<|im_end|>") == 4
    assert encoder.processor.tokenizer.eos_token not in names


THINKING = (  # how hybrid thinking models let themselves be told: an empty thought, invented
    "\n{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{%- if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}"
    "{%- endfor %}{% endif %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}{{ greeting | default('') }}"
)


@pytest.mark.parametrize(
    "variables", [{"enable_thinking": False}, {"enable_thinking": True, "greeting": 'a "b"\n'}]
)
def test_variables_of_a_template_render_as_transformers_renders_them(variables):
    processor = tiny.processor()
    processor.chat_template = THINKING
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hm ?"}]}]
    expected = processor.apply_chat_template(asked, add_generation_prompt=True, **variables)
    use_template(processor, variables=variables)
    assert processor.apply_chat_template(asked, add_generation_prompt=True) == expected
    assert ("<think>" in expected) == (variables["enable_thinking"] is False)


def test_a_variable_that_the_template_does_not_read_is_refused():
    processor = tiny.processor()
    processor.chat_template = THINKING
    with pytest.raises(UsageError, match=r"'enable_thinkin'\. Did you mean 'enable_thinking'"):
        use_template(processor, variables={"enable_thinkin": False})
